"""The command that starts one SGLang server: interpreter, arguments, environment, and what it said when it refused to start."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from areal.config import ConfigError, GRPOConfig
from areal.inference.placement import shares_gpu

PLUGIN = Path(__file__).with_name("sglang_plugin")
"""On the server's PYTHONPATH; its files need nothing of areal, which the server's environment may not have."""
OWN_ENVIRONMENT = Path(".venv-sglang")
"""What ``make sglang-env`` makes, in the folder that areal is started from."""
PYTHON_VARIABLE = "AREAL_SGLANG_PYTHON"

_LAUNCH = PLUGIN / "areal_sglang_launch.py"
_WEIGHT_LOADERS = ("areal_sglang_weights.report_hash",)
_CPU_CORES = "SGLANG_CPU_OMP_THREADS_BIND"
_CPU_POOL_TOKENS = 65536
_SHARED_GPU_FRACTION = 0.4  # of a GPU's memory, for weights and KV, where a trainer lives on it too
_SPARE_CONTEXT = 8
"""SGLang ends an answer 2 tokens before its context length and refuses an input 6 tokens before it (managers/tp_worker.py): so much
longer than the longest sequence its context is, or the last tokens of a long answer would silently be missing."""

_CPU_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""SGLang allocates every bucket of weights twice anew. Faulting that in 4 KiB at a time takes longer than receiving it: glibc keeps freed
memory, and torch asks for huge pages."""

Option = bool | int | float | str | list[int | float | str]


def sglang_argv(
    model: Path,
    port: int,
    *,
    device: str,
    dtype: str,
    n_ranks: int = 1,
    host: str = "127.0.0.1",
    dist_port: int | None = None,
    max_running_requests: int | None = None,
    max_context: int = 0,
    keep_prefixes: bool = True,
    shared_gpu: bool = False,
    options: Mapping[str, Option] | None = None,
) -> list[str]:
    """What comes behind the interpreter.

    Args:
        device: cpu or cuda:N, the first of ``n_ranks`` GPUs.
        dist_port: where its ranks find each other; None lets SGLang look for one.
        max_context: longest prompt and answer together, in tokens; 0 = the model's limit.
        keep_prefixes: false without radix cache, which ``retract`` needs: it would serve prompt KV of old weights.
        shared_gpu: a trainer has its memory on the same GPU.
        options: by SGLang's names; they win over ours. true gives a flag, false leaves one of ours out.
    """
    ours: dict[str, Option] = {
        "model_path": str(model),
        "host": host,
        "port": port,
        "dtype": dtype,
        "tensor_parallel_size": n_ranks,
        "sleep_on_idle": True,  # an idle server burns a core otherwise
        "disable_radix_cache": not keep_prefixes,
        "incremental_streaming_output": not keep_prefixes,  # streamed then, and every chunk would hold the whole answer so far
        "log_level_http": "warning",  # a line a request says nothing
    }
    if dist_port is not None:
        ours["nccl_port"] = dist_port
    if max_running_requests is not None:
        ours["max_running_requests"] = max_running_requests
    if context := _context_length(model, max_context):
        ours["context_length"] = context
    if device == "cpu":
        ours |= {"device": "cpu", "attention_backend": "torch_native", "grammar_backend": "none"}
        ours["max_total_tokens"] = max(_CPU_POOL_TOKENS, 2 * context)
    else:
        ours["base_gpu_id"] = int(device.partition(":")[2] or 0)
        if shared_gpu:
            ours["mem_fraction_static"] = _SHARED_GPU_FRACTION
    given = {name.replace("-", "_").lstrip("_"): value for name, value in (options or {}).items()}
    loaders = given.pop("custom_weight_loader", [])
    ours["custom_weight_loader"] = [*_WEIGHT_LOADERS, *(loaders if isinstance(loaders, list) else [str(loaders)])]
    return [str(_LAUNCH), *option_words({**ours, **given})]


def option_words(options: Mapping[str, Option]) -> list[str]:
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not False:
            words += [flag, str(value)]
    return words


def _context_length(model: Path, longest: int) -> int:
    """Context that holds ``longest`` tokens (0 = the model's limit) to the last one; 0 leaves it to SGLang."""
    if not longest:
        tree = json.loads((model / "config.json").read_text(encoding="utf-8"))
        rope = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            return 0  # SGLang works a longer limit out of it
        longest = tree.get("max_position_embeddings") or 0
    return longest + _SPARE_CONTEXT if longest else 0


def sglang_env(device: str, threads: int, python: str = "", n_ranks: int = 1) -> dict[str, str]:
    """Environment of the server's process, on top of ours. ``python``: what ``sglang_python`` gave; ``threads`` of each rank on a CPU."""
    own = not python or python == sys.executable
    # Another environment must not find the packages of this one.
    libraries = [str(PLUGIN), *([os.environ["PYTHONPATH"]] if own and os.environ.get("PYTHONPATH") else [])]
    env = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(libraries),
        # SGLang calls ninja and other tools of its environment by name.
        "PATH": os.pathsep.join([str(Path(python or sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        # Otherwise /health generates a token: it takes a second, and fails after 20 while generation is paused.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        # A server whose scheduler was killed would sleep 5 s before it ends, to have its dead processes examined.
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "false",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "false",
        # Nobody listens there (gRPC is off), but SGLang refuses a --port above 55535 without it: the other one would be 10000 more.
        "SGLANG_GRPC_PORT": "1",
        # The few spare tokens of _SPARE_CONTEXT; no position beyond the model's limit is ever used.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }
    if device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        if n_ranks > 1 and _CPU_CORES not in os.environ:  # SGLang wants to be told once there are more ranks than NUMA nodes
            cores = sorted(os.sched_getaffinity(0))
            ranks = [[cores[(rank * threads + i) % len(cores)] for i in range(min(threads, len(cores)))] for rank in range(n_ranks)]
            env[_CPU_CORES] = "|".join(",".join(map(str, rank)) for rank in ranks)
        env |= {key: value for key, value in _CPU_MEMORY.items() if key not in os.environ}
    return env


def sglang_python(configured: str = "") -> str:
    """The interpreter that runs SGLang: the configured one, that of AREAL_SGLANG_PYTHON, this one, or .venv-sglang's.

    Raises:
        ConfigError: SGLang is in none of them. Nothing is imported to find out.
    """
    for key, named in (("sglang.python", configured), (PYTHON_VARIABLE, os.environ.get(PYTHON_VARIABLE, ""))):
        if named:
            python = os.path.abspath(os.path.expanduser(named))  # not resolved: the link is what tells a virtual environment
            installed_version(python, key)
            return python
    if _own_version() is not None:
        return sys.executable
    beside = OWN_ENVIRONMENT.absolute() / "bin" / "python"
    if beside.exists():
        installed_version(str(beside), str(OWN_ENVIRONMENT))
        return str(beside)
    raise ConfigError(
        f"SGLang is not installed in {sys.executable}, and there is no {OWN_ENVIRONMENT} here",
        "`make sglang-env` makes that environment for the CPU; on GPUs `pip install '.[sglang]'`; or name its python in sglang.python",
    )


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_version(python: str, key: str = "sglang.python") -> str:
    """SGLang's version in the environment of ``python``; ``ConfigError`` naming ``key`` where there is none."""
    code = "from importlib.metadata import version as v; print(v('sglang'))"
    way_out = "`make sglang-env` makes one for the CPU; on GPUs `pip install 'sglang>=0.5.12'` there"
    env = {**os.environ, "PYTHONPATH": sglang_env("cpu", 1, python)["PYTHONPATH"]}
    try:
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, env=env, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{key}: '{python}' cannot be run: {error}", "give the interpreter of an environment with SGLang") from None
    if asked.returncode == 0:
        return asked.stdout.strip()
    said = asked.stderr.strip().splitlines()
    raise ConfigError(f"{key}: '{python}' has no SGLang ({said[-1] if said else asked.returncode})", way_out)


def refusal(log: str) -> str | None:
    """SGLang's own words about an option that it does not take, from the log of a server that died; None for other deaths."""
    for line in reversed(log.splitlines()):
        if (match := re.match(r"\S[^:]*: error: (.+)", line)) is not None:  # argparse
            return match.group(1)
    return None


def taken_of_trainer_gpu(config: GRPOConfig) -> float:
    """The share of a trainer's GPU that a server of SGLang takes, which was started here; 0 where none has to share."""
    if config.layout.engine != "sglang" or config.rollout.urls or not any(shares_gpu(config, i) for i in range(config.layout.n_servers)):
        return 0.0
    options = {name.replace("-", "_").lstrip("_"): value for name, value in config.sglang.options.items()}
    given = options.get("mem_fraction_static", _SHARED_GPU_FRACTION)
    return float(given) if isinstance(given, (int, float)) else _SHARED_GPU_FRACTION
