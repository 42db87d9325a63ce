"""Clocks, memory and limits of the op benchmarks: how one call is timed, what it allocates, and what the machine can do at best.

CPU: ``perf_counter`` around as many calls as fill ``SHORTEST_TIMING``, caches warm. CUDA: a pair of events around every single call,
after writes that push everything else out of L2; these also give Python the time to enqueue the call, so that the events measure the
device and not the interpreter. There are as many of them as the host needs for the call, up to ``LONGEST_LEAD``.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SHORTEST_TIMING = 200e-6  # seconds: a CPU timing shorter than this is mostly the clock and the scheduler
MOST_ROUNDS = 300
LONGEST_LEAD = 10e-3  # seconds of writes before a call; one that waits for the device itself would want as many as it takes


@dataclass(frozen=True)
class Effort:
    """How long a variant is measured: up to ``seconds``, but at least ``rounds`` times (3 where one call takes over two seconds)."""

    seconds: float
    rounds: int
    cpu_copy_bytes: int
    cuda_copy_bytes: int


FULL = Effort(seconds=0.6, rounds=7, cpu_copy_bytes=2**28, cuda_copy_bytes=2**30)
QUICK = Effort(seconds=0.1, rounds=3, cpu_copy_bytes=2**26, cuda_copy_bytes=2**28)


def _cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    turns = itertools.repeat(None, repeats)
    start = time.perf_counter()
    for _ in turns:
        call()
    return (time.perf_counter() - start) / repeats


class _CudaClock:
    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        # Half a GiB takes some 150 microseconds to write on a data-centre GPU.
        self.flush = torch.empty(max(4 * l2_bytes, 2**29), dtype=torch.int8, device="cuda")
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.write_seconds = min(self._elapsed(self.flush.zero_) for _ in range(3))
        self.writes: dict[int, int] = {}  # by the id of the call

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        assert repeats == 1  # the second call of a pair would find its inputs in L2
        if id(call) not in self.writes:
            self.writes[id(call)] = writes_before(_host_seconds(call), self.write_seconds)
        for _ in range(self.writes[id(call)]):
            self.flush.zero_()
        return self._elapsed(call)

    def _elapsed(self, call: Callable[[], object]) -> float:
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def writes_before(host_seconds: float, write_seconds: float) -> int:
    """How many writes keep the device busy while the host enqueues a call, half as long again included, and at least one."""
    lead = min(1.5 * host_seconds, LONGEST_LEAD)
    return max(1, math.ceil(lead / max(write_seconds, 1e-6)))


def _host_seconds(call: Callable[[], object]) -> float:
    """What the host needs to enqueue a call on an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def time_interleaved(calls: Mapping[str, Callable[[], object]], device: str, effort: Effort) -> dict[str, list[float]]:
    """Seconds of each timing of each call; the calls take turns, spread evenly, so that a slow spell of the machine hits them all.

    A fast call has more timings than a slow one. Calls must have run before (compiled, allocated)."""
    seconds_of = _cpu_seconds if device == "cpu" else _CudaClock().seconds
    repeats, wanted = {}, {}
    for name, call in calls.items():
        estimate = _warm_up(call, seconds_of)
        repeats[name] = max(1, math.ceil(SHORTEST_TIMING / estimate)) if device == "cpu" else 1
        least = effort.rounds if estimate < 2.0 else min(3, effort.rounds)
        wanted[name] = min(MOST_ROUNDS, max(least, int(effort.seconds / (estimate * repeats[name]))))
    rounds = max(wanted.values(), default=0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    if device == "cpu":  # on a GPU a cycle that waits for the collector may hold gigabytes
        gc.disable()
    try:
        for turn in range(rounds):
            for name, call in calls.items():
                if turn * wanted[name] // rounds != (turn + 1) * wanted[name] // rounds:
                    seconds[name].append(seconds_of(call, repeats[name]))
    finally:
        gc.enable()
    return seconds


def _warm_up(call: Callable[[], object], seconds_of: Callable[[Callable[[], object], int], float]) -> float:
    """Calls for 50 ms, at most 20 times; the best time, in seconds."""
    best, spent = math.inf, 0.0
    for _ in range(20):
        seconds = seconds_of(call, 1)
        best, spent = min(best, max(seconds, 1e-9)), spent + seconds
        if spent > 0.05:
            break
    return best


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call holds at its peak beyond what was held before it, its result included; None where that cannot be told.

    CUDA: torch's allocator. CPU: the peak of the process's resident memory, which Linux lets a process reset; freed heap is given back
    first, or reused pages would hide what is allocated. Its resolution is some hundred KiB."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, libc = Path("/proc/self/status"), ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident(status.read_text(), "VmRSS")
        call()
        return max(0, _resident(status.read_text(), "VmHWM") - before)
    except (OSError, LookupError):  # not Linux, or a sandbox without these files
        return None


def _resident(status: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise LookupError(field)
    return int(found[1]) * 1024


def copy_call(device: str, effort: Effort) -> tuple[Callable[[], object], int]:
    """A call that copies a buffer far larger than any cache, and the bytes it moves (each read once and written once).

    On the CPU it is memcpy, cut among as many threads as torch uses."""
    if device == "cuda":
        source = torch.zeros(effort.cuda_copy_bytes, dtype=torch.int8, device="cuda")
        target = torch.zeros_like(source)
        return lambda: target.copy_(source), 2 * source.nbytes
    threads = torch.get_num_threads()
    words = effort.cpu_copy_bytes // 8
    pieces = [slice(i * words // threads, (i + 1) * words // threads) for i in range(threads)]
    read, written = np.ones(words), np.ones(words)  # ones, not zeros: every page must exist
    if threads == 1:
        return lambda: np.copyto(written, read), 2 * read.nbytes
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda piece: np.copyto(written[piece], read[piece]), pieces)), 2 * read.nbytes


def products_call(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: str) -> Callable[[], object]:
    """The bare matrix products one after another, on normal random numbers (the clock of a GPU depends on the data)."""
    operands = [
        (
            torch.randn(m, k, dtype=dtype, device=device),
            torch.randn(k, n, dtype=dtype, device=device),
            torch.empty(m, n, dtype=dtype, device=device),
        )
        for m, k, n in shapes
    ]

    def call() -> None:
        for left, right, product in operands:
            torch.mm(left, right, out=product)

    return call
