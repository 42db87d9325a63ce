"""``areal doctor``: what this machine has, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import shared_memory
from pathlib import Path
from typing import Literal

from areal.launcher.gpus import installed_gpus

State = Literal["ok", "optional", "problem"]
TORCH_TESTED = ((2, 11), (2, 14))
"""First tested version, first untested one: the range in pyproject.toml."""
SGLANG_TESTED = ("0.5.14",)
TRAIN_PACKAGES = (
    "transformers",
    "safetensors",
    "pydantic",
    "PyYAML",
    "aiohttp",
    "orjson",
    "rich",
    "matplotlib",
    "tensorboard",
    "math-verify",
)
MIN_FILES = 4096
MIN_SHM = 256 << 20


@dataclass(frozen=True)
class Finding:
    """One line of the answer; ``hint`` says what to do unless all is well."""

    name: str
    state: State
    text: str
    hint: str = ""


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}, {platform.machine()}"
    return Finding("python", "ok", text)


def check_extension() -> Finding:
    from areal.ops._dispatch import build_info

    try:
        info = build_info()
    except ImportError as error:
        return Finding(
            "extension", "problem", f"areal._C does not load: {error}", "build it again: `pip install --force-reinstall --no-deps .`"
        )
    if info is None:
        hint = "slower Python code stands in; `pip install .` in areal's folder builds it (a C++ compiler is needed)"
        return Finding("extension", "problem", "areal._C is not built", hint)
    cuda = f"CUDA {info['cuda']}" if info.get("cuda") else "no CUDA kernels"
    return Finding("extension", "ok", f"areal._C, compiler {info.get('compiler', 'unknown')}, {cuda}")


def check_torch() -> Finding:
    version = version_of("torch")
    if version is None:
        return Finding("torch", "problem", "not installed", "`pip install 'torch>=2.11,<2.14'`")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", "problem", f"{version} does not load: {error}", "install torch again in this environment")
    text = f"{version}, {'built for CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU only'}, {torch.get_num_threads()} threads"
    low, high = TORCH_TESTED
    if not low <= _release(version) < high:
        hint = f"tested are {low[0]}.{low[1]} and later, before {high[0]}.{high[1]}: `pip install 'torch>=2.11,<2.14'`"
        return Finding("torch", "problem", text, hint)
    return Finding("torch", "ok", text)


def check_cuda() -> Finding:
    n_installed = installed_gpus()
    if n_installed == 0:
        return Finding("CUDA", "optional", "no NVIDIA driver or GPU", "everything runs on the CPU; real models want a GPU")
    try:
        import torch
    except (ImportError, OSError):
        return Finding("CUDA", "problem", f"{n_installed} GPUs, but torch does not load", "see torch above")
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return Finding("CUDA", "problem", f"{n_installed} GPUs, but this torch is CPU only", "install torch for CUDA (see pytorch.org)")
        hint = "is CUDA_VISIBLE_DEVICES empty, or the driver older than torch's CUDA?"
        return Finding("CUDA", "problem", f"{n_installed} GPUs, but torch cannot use them", hint)
    names = [
        f"{torch.cuda.get_device_name(i)} {torch.cuda.get_device_properties(i).total_memory >> 30} GiB"
        for i in range(torch.cuda.device_count())
    ]
    return Finding("CUDA", "ok", f"{len(names)} of {n_installed} GPUs usable: {', '.join(dict.fromkeys(names))}")


def check_nvcc() -> Finding:
    path = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)
    if path is None:
        return Finding(
            "nvcc", "optional", "not found", "only needed to build the CUDA kernels: install the CUDA toolkit, then `pip install .` again"
        )
    return Finding("nvcc", "ok", path)


def check_train_packages() -> Finding:
    missing = [name for name in TRAIN_PACKAGES if version_of(name) is None]
    if missing:
        return Finding("train packages", "problem", f"missing: {', '.join(missing)}", "`pip install '.[train]'` in areal's folder")
    return Finding("train packages", "ok", f"transformers {version_of('transformers')} and {len(TRAIN_PACKAGES) - 1} others")


def _optional(name: str, packages: tuple[str, ...], hint: str) -> Finding:
    for package in packages:
        if (version := version_of(package)) is not None:
            return Finding(name, "ok", version)
    return Finding(name, "optional", "not installed", hint)


def check_triton() -> Finding:
    return _optional("triton", ("triton", "triton-windows"), "comes with CUDA builds of torch; not used on the CPU")


def check_flash_attn() -> Finding:
    return _optional("flash-attn", ("flash-attn",), "torch's own attention is used; on GPUs `pip install '.[flash-attn]'` may be faster")


def check_sglang() -> Finding:
    """Where ``rollout.backend: sglang:dN`` would find its server."""
    from areal.config import ConfigError
    from areal.inference.sglang import installed_version, sglang_python

    try:
        python = sglang_python()
        version = installed_version(python)
    except ConfigError as error:
        return Finding("SGLang", "optional", f"areal's own engine generates; {error.message}", error.hint)
    if version not in SGLANG_TESTED:
        hint = f"tested: {', '.join(SGLANG_TESTED)}; another one may take other options, or map weights in another way"
        return Finding("SGLang", "optional", f"{version} in {python}", hint)
    return Finding("SGLang", "ok", f"{version} in {python}")


def check_shared_memory() -> Finding:
    try:
        block = shared_memory.SharedMemory(create=True, size=1 << 20)
    except OSError as error:
        return Finding(
            "shared memory", "problem", f"cannot be had: {error}", "weights reach rollout servers through /dev/shm: mount it writable"
        )
    block.close()
    block.unlink()
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "ok", "works")
    usage = shutil.disk_usage(folder)
    text = f"{_size(usage.free)} free of {_size(usage.total)}"
    if usage.free < MIN_SHM:
        return Finding("shared memory", "problem", text, "two copies of the weights must fit; in Docker: --shm-size=8g or --ipc=host")
    return Finding("shared memory", "ok", f"{text}: models of up to {_size(usage.free // 2)}")


def check_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{'no limit' if soft == resource.RLIM_INFINITY else soft} open files a process"
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        way = (
            f"`ulimit -n {MIN_FILES}` before starting"
            if hard == resource.RLIM_INFINITY or hard >= MIN_FILES
            else "ask for a higher hard limit"
        )
        return Finding("file descriptors", "problem", text, f"many requests in flight need more: {way}")
    return Finding("file descriptors", "ok", text)


def check_ports() -> Finding:
    """Whether a server on the loopback interface can be reached: what every rollout server needs."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
    except OSError as error:
        return Finding(
            "free ports", "problem", f"127.0.0.1 cannot be served: {error}", "rollout servers listen there: allow loopback connections"
        )
    taken = [number for number in (30000,) if not _free(number)]
    if taken:
        return Finding("free ports", "ok", f"loopback works; {taken[0]}, the default of `areal serve`, is taken (use --port)")
    return Finding("free ports", "ok", f"loopback works, e.g. port {port}")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_sandbox() -> Finding:
    """How programs would be confined that areal.reward.code scores."""
    from areal.reward.sandbox.judge import SandboxError
    from areal.reward.sandbox.levels import HINT, describe, namespaces_missing

    if missing := namespaces_missing():
        try:
            text = f"{describe('rlimit')}; no namespaces: {missing}"
        except SandboxError as error:
            return Finding("code sandbox", "optional", f"no code can be scored: {error}", HINT)
        return Finding("code sandbox", "optional", text, f"code rewards: {HINT}")
    return Finding("code sandbox", "ok", describe("namespaces"))


def check_cpu() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{cores} cores, {_size(memory)} memory"
    if cores < 2:
        return Finding("CPU", "problem", text, "generation and training run side by side: with one core they take turns")
    return Finding("CPU", "ok", text)


def check_disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    text = f"{_size(usage.free)} free in {Path.cwd()}"
    if not os.access(Path.cwd(), os.W_OK):
        return Finding("disk", "problem", f"{Path.cwd()} cannot be written", "run elsewhere, or set stats_logger.fileroot")
    if usage.free < 1 << 30:
        return Finding("disk", "problem", text, "make room, or set stats_logger.fileroot")
    return Finding("disk", "ok", text)


def _size(n_bytes: int) -> str:
    value = float(n_bytes)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB" if value < 100 else f"{value:.0f} GiB"


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_cpu,
    check_extension,
    check_torch,
    check_train_packages,
    check_shared_memory,
    check_files,
    check_ports,
    check_sandbox,
    check_disk,
    check_cuda,
    check_nvcc,
    check_triton,
    check_flash_attn,
    check_sglang,
)


def findings() -> Iterator[Finding]:
    for check in CHECKS:
        yield check()


def run_doctor(as_json: bool = False) -> int:
    """Prints the findings; 1 when something is broken that a run on this machine needs."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    marks = {"ok": ("ok", "32"), "optional": ("--", "90"), "problem": ("!!", "1;31")}
    found = []
    for finding in findings():
        found.append(finding)
        if as_json:
            continue
        mark, code = marks[finding.state]
        print(f"\033[{code}m{mark}\033[0m" if color else mark, f"{finding.name:<17} {finding.text}", flush=True)
        if finding.hint:
            print(f"   {'':<17} {finding.hint}")
    problems = [f.name for f in found if f.state == "problem"]
    if as_json:
        print(json.dumps({f.name: {k: v for k, v in asdict(f).items() if k != "name"} for f in found}, indent=2))
    elif problems:
        print(f"\nto be looked at: {', '.join(problems)}")
    else:
        print("\nready: `areal train examples/arithmetic.yaml`")
    return 1 if problems else 0
