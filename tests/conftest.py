"""What every test shares: one thread, and tests that need a GPU or SGLang are skipped where there is none."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.sglang_python import sglang_python

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if sglang_python() is None:
        missing["sglang"] = "needs SGLang: `make test-sglang` installs it, or name its interpreter in AREAL_SGLANG_PYTHON"
    for item in items:
        for marker in missing.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.get_closest_marker("sglang") is not None:
        from tests.sglang_servers import SGLangServer

        dead = [s.process.describe_death(40) for s in SGLangServer.started if s.process.poll() is not None]
        report.sections += [("a server that has ended", text) for text in dead]
    return report


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:  # a bare machine with a GPU: tests then have no time limit
        config.addinivalue_line("markers", "timeout(seconds): the limit of a test, by pytest-timeout")


class _GpuOnlyModule(pytest.Module):
    """A file of tests in a run of `-m gpu`, skipped with its reason where a package of the trainer or of other tests is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            if not isinstance(cause, ModuleNotFoundError) or (cause.name or "").partition(".")[0] in ("", "areal", "benchmarks", "tests"):
                raise
            return pytest.skip(f"{cause.name} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # A machine with a GPU may have torch and little else; elsewhere a missing package stays an error.
    if parent.config.option.markexpr != "gpu":
        return None
    return _GpuOnlyModule.from_parent(parent, path=module_path)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Here, because it takes a minute, which would count against the time limit of the first test that wants it.
    # Tests on a GPU do without it: their time is short.
    on_cpu = [item for item in session.items if item.get_closest_marker("gpu") is None]
    wanted = any("cuda_on_host" in getattr(item, "fixturenames", ()) or "[cuda" in item.nodeid for item in on_cpu)
    if wanted and not session.config.option.collectonly:
        _build_cuda_on_host()


@functools.cache
def _build_cuda_on_host() -> Path | str:
    """The library, or the reason why there is none."""
    if importlib.util.find_spec("pybind11") is None or shutil.which("cmake", path=_search_path()) is None:
        return "needs pybind11 and cmake"
    folder = ROOT / "build" / f"cuda_on_host-{sys.version_info.major}.{sys.version_info.minor}"
    environment = {**os.environ, "PATH": _search_path()}
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=_search_path()) else []
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        *generator,
        "-DAREAL_CUDA=OFF",
        "-DAREAL_CUDA_ON_HOST=ON",
        "-DAREAL_WERROR=ON",
    ]
    import pybind11

    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", "-DSKBUILD_PROJECT_VERSION=0"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests may run in several processes
        for argv in configure, ["cmake", "--build", str(folder)]:
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode != 0:
                return f"FAILED {argv}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    (library,) = folder.glob("_C*.so")
    return library


@pytest.fixture(scope="session")
def cuda_on_host_module() -> ModuleType:
    """``areal._C`` with the CUDA kernels compiled as C++ (tests/cuda_on_host), built once and kept up to date in build/."""
    library = _build_cuda_on_host()
    if isinstance(library, str):
        assert not library.startswith("FAILED"), library
        pytest.skip(library)
    spec = importlib.util.spec_from_file_location("cuda_on_host._C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _search_path() -> str:
    """PATH with the tools of this environment before it, also when it is not activated."""
    tools = [Path(sys.executable).parent, *(Path(p).parents[2] / "bin" for p in sys.path if p.endswith("site-packages"))]
    return os.pathsep.join([*map(str, tools), os.environ["PATH"]])


@pytest.fixture
def cuda_on_host(cuda_on_host_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The backend ``cuda`` of every op takes CPU tensors during the test, and its kernels run on the CPU."""
    from areal.ops import _dispatch

    monkeypatch.setitem(sys.modules, "areal._C", cuda_on_host_module)
    _dispatch.forget_choices()
    yield cuda_on_host_module
    monkeypatch.undo()
    _dispatch.forget_choices()


@pytest.fixture
def on_backend(request: pytest.FixtureRequest, backend: str, device: str) -> tuple[str, str]:
    """The parameters of ``op_backends.backends``, once what they need is there."""
    if backend == "cuda" and device == "cpu":
        request.getfixturevalue("cuda_on_host")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    return backend, device


@pytest.fixture
def areal_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets AREAL_OPS during the test."""
    from areal.ops import _dispatch

    def force(setting: str) -> None:
        monkeypatch.setenv("AREAL_OPS", setting)
        _dispatch.forget_choices()

    yield force
    monkeypatch.undo()
    _dispatch.forget_choices()
