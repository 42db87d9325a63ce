"""Which implementation of an op runs: the only place that imports the compiled module ``areal._C`` and the Triton kernels.

Every op has the backend ``torch``, its reference. ``AREAL_OPS`` forces another for all ops (``AREAL_OPS=torch``) or for some
(``AREAL_OPS=weights_hash=torch,plan_microbatches=cpp``), and is read when an op first runs; an op's ``backend`` argument goes before
it. What is forced is used, or is an error: there is no silent fall-back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch


class BackendUnavailable(RuntimeError):
    """A backend was forced that cannot run here."""


class UnknownBackend(ValueError):
    """A backend was forced that the op does not have."""


@functools.cache
def compiled_module() -> ModuleType | None:
    """``areal._C``, or None where the package runs from source, not built. One that is there but does not load raises."""
    try:
        return importlib.import_module("areal._C")
    except ModuleNotFoundError as error:
        if error.name != "areal._C":
            raise
        return None


def build_info() -> dict[str, Any] | None:
    """What the compiled module was built with (compiler, cuda, instruction_sets), or None without it."""
    module = compiled_module()
    return None if module is None else module.build_info()


def missing_cpp() -> str | None:
    """Why the backend ``cpp`` cannot run, or None if it can."""
    return None if compiled_module() is not None else "areal._C is not built; run `pip install .` in the source folder"


def missing_cuda() -> str | None:
    """Why the backend ``cuda`` cannot run, or None if it can."""
    module = compiled_module()
    if module is None:
        return missing_cpp()
    if module.build_info()["cuda"] is None:
        return "areal._C was built without CUDA; install again where nvcc is"
    return None if torch.cuda.is_available() or _emulates_cuda() else "torch finds no CUDA device"


def _emulates_cuda() -> bool:
    """Whether the compiled module is the one of the tests, whose CUDA kernels run on the CPU."""
    module = compiled_module()
    return module is not None and module.build_info()["cuda"] == "on the host"


def interprets_triton() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_triton() -> str | None:
    """Why the backend ``triton`` cannot run, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch for CUDA"
    return None if torch.cuda.is_available() or interprets_triton() else "torch finds no CUDA device"


def triton_kernels(op: str) -> ModuleType:
    """The module ``areal.kernels.<op>_triton``."""
    return importlib.import_module(f"areal.kernels.{op}_triton")


@functools.cache
def _forced_by_environment(op: str) -> str | None:
    forced = None
    for entry in filter(None, (part.strip() for part in os.environ.get("AREAL_OPS", "").split(","))):
        name, separator, backend = entry.rpartition("=")
        if not separator and forced is None:
            forced = backend
        elif name.strip() == op:
            forced = backend.strip()
    return forced


def choose_backend(op: str, candidates: Mapping[str, str | None], backend: str | None = None) -> str:
    """The backend to run ``op`` with.

    ``candidates`` maps the op's backends, best first, to the reason why each cannot run, None where it can. ``UnknownBackend``, a
    ``ValueError``, for a forced name that the op does not have, ``BackendUnavailable`` for one that cannot run here.
    """
    forced = backend or _forced_by_environment(op)
    if forced is None:
        return next(name for name, missing in candidates.items() if missing is None)
    if forced not in candidates:
        source = "backend" if backend else "AREAL_OPS"
        raise UnknownBackend(
            f"{source}='{forced}': {op} has the backends {', '.join(candidates)} (AREAL_OPS={op}=NAME sets it for this op alone)"
        )
    missing = candidates[forced]
    if missing is not None:
        raise BackendUnavailable(f"{op}: backend '{forced}' was asked for, but {missing}")
    return forced


@functools.lru_cache(maxsize=256)
def _backend_for(op: str, device_type: str, has: tuple[str, ...], unfit: tuple[tuple[str, str], ...], forced: str | None) -> str:
    on_cuda = device_type == "cuda"
    reasons: dict[str, str | None] = {}
    for name in ("cuda", "triton", "torch") if on_cuda else ("cpp", "torch", "triton", "cuda"):
        if name not in has:
            continue
        match name:
            case "cpp":
                reasons[name] = missing_cpp()
            case "triton":
                reasons[name] = missing_triton() or (None if on_cuda or interprets_triton() else "the tensors are on the CPU")
            case "cuda":
                reasons[name] = missing_cuda() or (None if on_cuda or _emulates_cuda() else "the tensors are on the CPU")
            case _:
                reasons[name] = None
    if "cpp" in has and device_type != "cpu":
        reasons["cpp"] = "the tensors are on a GPU" if on_cuda else f"the tensors are on the device {device_type}"
    for name, why in unfit:
        reasons[name] = reasons[name] or why
    return choose_backend(op, reasons, forced)


def backend_for(
    op: str, device: torch.device, backend: str | None, *, has: tuple[str, ...], unfit: tuple[tuple[str, str], ...] = ()
) -> str:
    """The backend for tensors on ``device``: the first of cuda, triton, torch on a GPU, of cpp, torch on the CPU, torch elsewhere.

    ``has`` names the backends that the op has at all, ``unfit`` those that cannot take these tensors, with the reason. A forced one
    (``backend``, or ``AREAL_OPS``) that cannot run is ``BackendUnavailable``, an unknown one ``UnknownBackend``.
    """
    return _backend_for(op, device.type, has, unfit, backend or _forced_by_environment(op))


# torch.compile calls it while tracing and keeps the answer, as torch.compiler.assume_constant_result would have it do; that function is
# not called, because it imports all of the compiler.
backend_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget_choices() -> None:
    """Looks at the machine and at AREAL_OPS again; for tests that exchange them."""
    compiled_module.cache_clear()
    _forced_by_environment.cache_clear()
    _backend_for.cache_clear()
