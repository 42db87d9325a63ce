"""Which implementation of an op runs: the only place that imports the compiled module ``areal._C``.

Every op has the backend ``torch``, its reference. ``AREAL_OPS`` forces another for all ops (``AREAL_OPS=torch``) or for some
(``AREAL_OPS=weights_hash=torch,plan_microbatches=cpp``); an op's ``backend`` argument goes before it. What is forced is used, or is
an error: there is no silent fall-back.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class BackendUnavailable(RuntimeError):
    """A backend was forced that cannot run here."""


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
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


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

    ``candidates`` maps the op's backends, best first, to the reason why each cannot run, None where it can. ``ValueError`` for a
    forced name that the op does not have, ``BackendUnavailable`` for one that cannot run here.
    """
    forced = backend or _forced_by_environment(op)
    if forced is None:
        return next(name for name, missing in candidates.items() if missing is None)
    if forced not in candidates:
        source = "backend" if backend else "AREAL_OPS"
        raise ValueError(
            f"{source}='{forced}': {op} has the backends {', '.join(candidates)} (AREAL_OPS={op}=NAME sets it for this op alone)"
        )
    missing = candidates[forced]
    if missing is not None:
        raise BackendUnavailable(f"{op}: backend '{forced}' was asked for, but {missing}")
    return forced
