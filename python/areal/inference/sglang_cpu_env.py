"""Makes a virtual environment with an SGLang server that runs on a CPU: ``python -m areal.inference.sglang_cpu_env FOLDER``.

SGLang's package asks for GPU kernels that a machine without a GPU can neither use nor always install; on the CPU it needs none of them.
So every package is pinned in sglang_cpu_requirements.txt and installed without its dependencies. 2.3 GB, two minutes.
TORCH_INDEX names a package index for torch alone, for instance PyTorch's own of CPU-only builds. On a GPU: pip install '.[sglang]'.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
REQUIREMENTS = Path(__file__).with_name("sglang_cpu_requirements.txt")
_STAMP = ".areal_sglang"
_SHIM = "areal_torchvision_ops"

_SHIM_CODE = '''\
"""torchvision from a package index may be built for CUDA; its compiled part then does not load beside a CPU-only torch, and its Python
part, which SGLang imports, fails for want of two operators. They are declared here, when torchvision is about to be imported."""

import sys


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare()
        return None


def _declare():
    import importlib.machinery

    import torch

    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            torch.ops.load_library(folder + "/_C.so")
            return  # the real operators
        except OSError:
            pass
    global _library  # it forgets its operators when it is collected
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
'''


def make(folder: Path) -> bool:
    """Makes or completes the environment; False if it was there already.

    Raises:
        subprocess.CalledProcessError: an installation failed; the next call takes up where this one ended.
    """
    stamp = folder / _STAMP
    wanted = hashlib.sha256(TORCH.encode() + REQUIREMENTS.read_bytes() + _SHIM_CODE.encode()).hexdigest()
    python = folder / "bin" / "python"
    if python.exists() and stamp.exists() and stamp.read_text().strip() == wanted:
        return False
    if not python.exists():
        venv.create(folder, with_pip=True)
    index = os.environ.get("TORCH_INDEX", "")
    _install(python, *(["--index-url", index] if index else []), TORCH)
    _install(python, "--no-deps", "-r", str(REQUIREMENTS))
    libraries = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(libraries, f"{_SHIM}.py").write_text(_SHIM_CODE)
    Path(libraries, f"{_SHIM}.pth").write_text(f"import {_SHIM}\n")
    stamp.write_text(wanted + "\n")
    return True


def _install(python: Path, *words: str) -> None:
    _run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *words)


def _run(python: Path, *words: str) -> str:
    # -I: PYTHONPATH may name the packages of another environment.
    return subprocess.run([str(python), "-I", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="areal.inference.sglang_cpu_env", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the environment, e.g. .venv-sglang")
    folder = parser.parse_args(argv).folder.absolute()
    print(f"Making {folder} with {sys.executable}" if not folder.exists() else f"Looking at {folder}", file=sys.stderr)
    try:
        made = make(folder)
    except subprocess.CalledProcessError as error:
        print(
            f"error: `{' '.join(map(str, error.cmd))}` failed with exit code {error.returncode}; pip's own words are above", file=sys.stderr
        )
        return 1
    print(f"{folder}: {'installed' if made else 'there already'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
