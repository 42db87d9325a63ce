"""The package as users get it: an sdist, a wheel built from it, installed into a fresh environment; and the CUDA build where nvcc is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HAS_TOOLS = all(importlib.util.find_spec(tool) for tool in ("scikit_build_core", "pybind11")) and (
    shutil.which("cmake") is not None or importlib.util.find_spec("cmake") is not None
)

pytestmark = pytest.mark.timeout(500)  # compilers on a busy machine


def site_packages() -> list[str]:
    """Where this process finds its packages, the source folder left out."""
    return [path for path in sys.path if path.endswith("site-packages")]


def run(*argv: str | Path, cwd: Path, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(site_packages()), "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run(list(map(str, argv)), cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, f"{argv}: exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def pip(*argv: str | Path, cwd: Path, **environment: str) -> str:
    isolation = ["--no-build-isolation"] if HAS_TOOLS else []
    return run(sys.executable, "-m", "pip", argv[0], *isolation, "--no-deps", "--quiet", *argv[1:], cwd=cwd, **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not HAS_TOOLS:
        pytest.skip("needs scikit-build-core, pybind11 and cmake")
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build_wheel(source: Path, folder: Path, cuda: str) -> Path:
    pip("wheel", "-C", f"cmake.define.AREAL_CUDA={cuda}", "-C", "cmake.define.AREAL_WERROR=ON", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_sdist_has_what_a_build_and_the_tests_need_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "CMakeLists.txt", "Makefile", "LICENSE", "README.md", "PKG-INFO"} <= names
    assert {
        "csrc/bindings.cpp",
        "kernels/weights_hash.cu",
        "python/areal/ops/weights_hash.py",
        "tests/test_packaging.py",
        "docs/kernels.md",
    } <= names
    unwanted = [
        name for name in names if name.startswith((".", "build/", "dist/", "runs/")) or "__pycache__" in name or name.endswith(".so")
    ]
    assert set(unwanted) <= {".gitignore", ".clang-format"}


@pytest.mark.slow
def test_a_wheel_from_the_sdist_works_in_a_fresh_environment(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path, "OFF")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("areal_async-0.1.0.dist-info/METADATA").decode()
    extension = f"areal/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert {extension, "areal/__init__.py", "areal/py.typed", "areal/kernels/weights_hash.cu"} <= set(names)
    assert "areal/kernels/__init__.py" not in names, "it would shadow the package `kernels` where the folder is on the path"
    assert not [name for name in names if not name.startswith(("areal/", "areal_async-0.1.0.dist-info/"))]
    core = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.partition("<")[0].partition(">")[0] for line in core) == ["numpy", "torch"]

    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path, PYTHONPATH="")
    libraries = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    (libraries / "torch_from_here.pth").write_text("\n".join(site_packages()) + "\n")
    code = (
        "import areal, areal._C, torch; from areal.ops.weights_hash import weights_hash; from areal.ops._dispatch import build_info;"
        "x = {'x': torch.arange(1000.)}; assert weights_hash(x, backend='cpp') == weights_hash(x, backend='torch');"
        "assert build_info()['cuda'] is None; print(areal.__file__)"
    )
    assert run(python, "-I", "-c", code, cwd=tmp_path).strip() == str(libraries / "areal" / "__init__.py")
    assert (tmp_path / "venv" / "bin" / "areal").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_compile_and_the_module_imports_without_a_gpu(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path, "ON")
    with zipfile.ZipFile(wheel) as archive:
        extension = archive.extract(f"areal/_C{sysconfig.get_config_var('EXT_SUFFIX')}", tmp_path)
    load = f"from importlib.util import spec_from_file_location as s, module_from_spec as m; spec = s('_C', {extension!r}); c = m(spec);"
    code = load + "spec.loader.exec_module(c); assert c.build_info()['cuda']; assert c.weights_hash_cuda; print('loaded')"
    assert run(sys.executable, "-I", "-c", code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="").strip() == "loaded"
    if shutil.which("ldd"):
        needed = run("ldd", extension, cwd=tmp_path)
        assert "cuda" not in needed and "torch" not in needed, needed
    if shutil.which("cuobjdump"):
        code_objects = run("cuobjdump", "--list-elf", extension, cwd=tmp_path)
        assert "sm_80" in code_objects and "sm_90a" in code_objects, code_objects


def test_this_environment_runs_the_compiled_module() -> None:
    from areal.ops._dispatch import build_info

    info = build_info()
    if info is None:
        pytest.skip("the package runs from its source folder, not installed")
    assert info["instruction_sets"][-1] == "baseline"
