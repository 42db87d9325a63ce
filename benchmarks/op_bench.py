"""The frame of the op benchmarks: what a bench_<op>.py declares, and how its cases are checked, timed and held against a limit.

A module ``benchmarks/bench_<op>.py`` has one function, ``cases(device, backends) -> Iterator[Case]``. Every variant of a case is run
and compared with the case's reference before anything is timed; one that differs ends the run with its name. One that cannot run here
(backend not built, rival not installed, out of memory) is a row that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from areal.ops._dispatch import BackendUnavailable, UnknownBackend
from benchmarks.measure import summary
from benchmarks.op_timing import FULL, Effort, copy_call, peak_memory, products_call, time_interleaved

BACKENDS = ("torch", "cpp", "triton", "cuda")
COMPILED_BACKENDS = BACKENDS[1:]  # what targets are for; `torch` is the plain reference
LIMIT = "limit"


@dataclass(frozen=True)
class Bytes:
    """The limit is moving ``n`` bytes (reads and writes added) at copy bandwidth, measured in the same run."""

    n: int


@dataclass(frozen=True)
class Products:
    """The limit is these bare matrix products, timed in the same run; (m, k, n) is [m, k] @ [k, n]."""

    shapes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Rival:
    """The limit is the time of another variant of the case over a factor: "at least 5x eager torch"."""

    name: str
    factor: float


@dataclass(frozen=True)
class Seconds:
    """The limit is a fixed time."""

    n: float


@dataclass
class Case:
    """One shape of an op.

    A variant is named by its backend, or by a backend and more ("cpp avx2"); any other name is a rival's. Targets are for the variants
    named just cpp, triton or cuda: what users get. A variant is called many times and must do the same each time."""

    label: str
    """Names the case within its op and phase: "T 65536"."""
    size: float
    """x axis of the plot."""
    variants: dict[str, Callable[[], object]]
    """Backend or rival name to one call; the results are compared, then the calls are timed, taking turns."""
    check: Callable[[object, object], None] | None
    """Given a result and the reference's, raises AssertionError where they differ; None is ``torch.testing.assert_close``."""
    reference: str
    """The variant that is the reference."""
    limit: Bytes | Products | Rival | Seconds | None
    target: float | None
    """Wanted share of the limit (0.85), for a ``Rival`` the wanted factor over it (default: its factor)."""
    phase: str = "forward"
    """Or "backward", "forward+backward"."""
    most_memory: int | None = None
    """Bytes that a call may hold at its peak, its result included."""


@dataclass(frozen=True)
class Settings:
    """What one run of the command asks for."""

    device: str = "cpu"
    backends: tuple[str, ...] = ("torch", "cpp")
    effort: Effort = field(default=FULL)
    deadline: float | None = None
    """On ``time.monotonic``: no case begins after it."""


class WrongResult(Exception):
    """A variant's result is not the reference's."""


# A row of the result: plain JSON values. Times in seconds, memory in bytes, `achieved` and `target` a share of the limit or, where
# `limit_kind` is "rival", a factor over it. A row with `not_run` has no figures.
Row = dict[str, Any]


def run_op(op: str, cases: Callable[[str, Sequence[str]], Iterable[Case]], settings: Settings) -> Iterator[list[Row]]:
    """The rows of one case after another. ``WrongResult`` if a variant's result is not the reference's."""
    asked = tuple(dict.fromkeys(("torch", *settings.backends)))  # the reference is needed for the check even where it is not timed
    seen: set[str] = set()
    last = "nothing"
    for case in cases(settings.device, asked):
        if settings.deadline is not None and time.monotonic() > settings.deadline:
            yield [_not_run(op, f"from {case.label} on", case.phase, "all", f"the time was spent; the last case run is: {last}")]
            return
        try:
            rows = _run_case(op, case, settings)
        except torch.OutOfMemoryError as error:  # of the check or the limit: the variants' own are rows of theirs
            rows = [_not_run(op, case.label, case.phase, "all", f"out of memory: {str(error).partition('.')[0]}")]
        seen |= {_backend(name) for name in case.variants}
        last = f"{case.label}, {case.phase}"
        del case  # its tensors go before the next case makes its own
        yield rows
    if not seen:
        yield [_not_run(op, "all", "", "all", f"bench_{op} has no cases for {settings.device}")]
    elif absent := [name for name in settings.backends if name not in seen]:
        yield [_not_run(op, "all", "", name, f"bench_{op} has no such variant on {settings.device}") for name in absent]


def _run_case(op: str, case: Case, settings: Settings) -> list[Row]:
    if case.reference not in case.variants:
        raise ValueError(f"bench_{op}, {case.label}: the reference '{case.reference}' is not among {', '.join(case.variants)}")
    if isinstance(case.limit, Rival) and case.limit.name not in case.variants:
        raise ValueError(f"bench_{op}, {case.label}: the rival '{case.limit.name}' is not among {', '.join(case.variants)}")
    missing = _check(op, case, settings.device)
    needed = case.limit.name if isinstance(case.limit, Rival) else None
    timed = {
        name: call
        for name, call in case.variants.items()
        if name not in missing and (_backend(name) not in BACKENDS or _backend(name) in settings.backends or name == needed)
    }
    limit_call, limit_facts = _limit_call(case.limit, settings)
    calls = timed if limit_call is None else timed | {LIMIT: limit_call}
    times = {name: summary(s) | {"timings": len(s)} for name, s in time_interleaved(calls, settings.device, settings.effort).items()}
    del calls, limit_call
    limit_seconds, scale = _limit_seconds(case.limit, limit_facts, times)
    target = case.limit.factor if isinstance(case.limit, Rival) and case.target is None else case.target
    rows = []
    for name, call in timed.items():
        median = times[name]["median"]
        achieved = None if limit_seconds is None else limit_seconds * scale / median
        judged = achieved is not None and target is not None and name in COMPILED_BACKENDS and name != needed
        rows.append(
            {"op": op, "case": case.label, "size": case.size, "phase": case.phase, "variant": name, "is_reference": name == case.reference}
            | times[name]
            | {"peak_memory": peak_memory(call, settings.device), "most_memory": case.most_memory}
            | {"times_reference": times[case.reference]["median"] / median if case.reference in times else None}
            | {"limit": limit_seconds, "limit_kind": _kind(case.limit), **limit_facts, "achieved": achieved, "target": target}
            | {"met": achieved >= target if judged and achieved is not None and target is not None else None}
        )
    return rows + [_not_run(op, case.label, case.phase, name, reason) for name, reason in missing.items()]


def _check(op: str, case: Case, device: str) -> dict[str, str]:
    """Runs every variant once and compares it with the reference; the variants that cannot run here, with the reason."""
    missing: dict[str, str] = {}
    expected = _attempt(case.reference, case, missing, device)
    for name in case.variants:
        if name == case.reference:
            continue
        if case.reference in missing:
            missing[name] = f"unchecked, since the reference {case.reference} did not run: {missing[case.reference]}"
            continue
        result = _attempt(name, case, missing, device)
        if name in missing:
            continue
        try:
            (case.check or torch.testing.assert_close)(result, expected)
        except AssertionError as error:
            where = f"{op}, {case.label}, {case.phase}"
            raise WrongResult(f"{where}: the result of '{name}' is not that of '{case.reference}': {error}") from error
        del result  # or two results of this size would be held while the next is made
    return missing


def _attempt(name: str, case: Case, missing: dict[str, str], device: str) -> object:
    try:
        result = case.variants[name]()
        if device == "cuda":
            torch.cuda.synchronize()
        return result
    except (BackendUnavailable, UnknownBackend, ImportError) as error:
        missing[name] = str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        missing[name] = f"out of memory: {str(error).partition('.')[0]}"
    return None


def _limit_call(limit: Bytes | Products | Rival | Seconds | None, settings: Settings) -> tuple[Callable[[], object] | None, Row]:
    match limit:
        case Bytes(n):
            call, moved = copy_call(settings.device, settings.effort)
            return call, {"limit_bytes": n, "copied_bytes": moved}
        case Products(shapes, dtype):
            flops = sum(2 * m * k * n for m, k, n in shapes)
            return products_call(shapes, dtype, settings.device), {"limit_flops": flops}
    return None, {}


def _limit_seconds(
    limit: Bytes | Products | Rival | Seconds | None, facts: Row, times: dict[str, dict[str, float]]
) -> tuple[float | None, float]:
    """The limit, and what `achieved` multiplies it by: 1 for a share of the limit, the factor for a factor over the rival."""
    match limit:
        case Bytes(n):
            return times[LIMIT]["median"] * n / facts["copied_bytes"], 1.0
        case Products():
            return times[LIMIT]["median"], 1.0
        case Rival(name, factor):
            return (times[name]["median"] / factor if name in times else None), factor
        case Seconds(n):
            return n, 1.0
    return None, 1.0


def _kind(limit: object) -> str | None:
    return {Bytes: "copy", Products: "products", Rival: "rival", Seconds: "seconds"}.get(type(limit))


def _backend(variant: str) -> str:
    return variant.partition(" ")[0]


def _not_run(op: str, label: str, phase: str, variant: str, reason: str) -> Row:
    return {"op": op, "case": label, "phase": phase, "variant": variant, "not_run": " ".join(reason.split())}
