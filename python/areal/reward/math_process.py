"""math-verify in a process of its own, so that what an answer takes in time and memory is bounded from outside, in any thread.

An answer may be a tower of powers, a factorial or a sum that no Python signal handler interrupts, and may ask for any memory. The process
that scores keeps one child, started at the first answer that needs it. What counts is the child's CPU time, so that a busy machine makes
no answer wrong: a timer ends most, and the kernel the child itself a second later. Who waits on whom: the scorer on its child,
``_wall_seconds`` for the reference and again for the answer, after which it is the machine's fault; the child on its parent, whose death
ends it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from areal.launcher.local import ChildProcess, die_with_parent

_START_SECONDS = 60.0
_STARVED = 5.0  # seconds, and 4 times the CPU time allowed: a child that is silent for longer does not get to run
_MEMORY = 2 << 30  # bytes of address space; sympy itself takes a tenth
_READY, _READ, _UNREADABLE, _LATE, _EQUAL, _DIFFERENT = "ready", "read", "unreadable", "late", "equal", "different"

_Job = tuple[str, str, float, bool]  # reference, answer, CPU seconds for each, whether units are dropped


class MathScorerError(RuntimeError):
    """The scorer, or the reference answer, is at fault: no score."""


class _Child:
    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            argv = ["-c", f"from areal.reward.math_process import main; main({theirs.fileno()})"]
            self.process = ChildProcess("math-verify", argv, Path(os.devnull), pass_fds=[theirs.fileno()])

    def receive(self, seconds: float) -> str | None:
        """Its next message, for which it has so much CPU time, or None. Raises EOFError or OSError when it has died."""
        return self.connection.recv() if self.connection.poll(_wall_seconds(seconds)) else None


def _wall_seconds(cpu_seconds: float) -> float:
    return 4 * cpu_seconds + _STARVED


class _Verifier:
    """The scorer's end. One job at a time; threads wait for one another."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """A forked process has no child yet: the one it knows is its parent's."""
        self.child: _Child | None = None
        self._lock = threading.Lock()

    def equal(self, job: _Job) -> bool:
        with self._lock:
            status = self._ask(job)
            if status is None:  # it may have been killed by others: ended twice by the same answer, it is the answer
                status = self._ask(job)
        return status == _EQUAL

    def _ask(self, job: _Job) -> str | None:
        """The child's verdict; None when it died over the answer."""
        reference, _, seconds, _ = job
        status = self._send(job)
        if status == _READ:
            assert self.child is not None
            try:
                status = self.child.receive(seconds)
            except (EOFError, OSError):
                return _DIFFERENT if self.drop() == -signal.SIGXCPU else None
        if status is None:
            self.drop()
            raise MathScorerError(f"math-verify got no CPU time: it was silent for {_wall_seconds(seconds):g} s")
        if status == _LATE:
            raise MathScorerError(f"the reference answer {reference[:80]!r} took math-verify over {seconds:g} s; simplify it")
        return status

    def _send(self, job: _Job) -> str | None:
        """What the child says of the reference; None when it says nothing. A child that died while idle is replaced."""
        for attempt in (1, 2):
            child = self._started()
            try:
                child.connection.send(job)
                return child.receive(job[2])
            except (EOFError, OSError) as error:
                code = self.drop()
                if code == -signal.SIGXCPU:
                    return _LATE
                if attempt == 2:
                    raise MathScorerError(f"math-verify's process ended (code {code}) over the reference answer {job[0][:80]!r}") from error
        raise AssertionError

    def _started(self) -> _Child:
        if self.child is None:
            self.child = _Child()
            try:
                status = self.child.connection.recv() if self.child.connection.poll(_START_SECONDS) else ""
            except (EOFError, OSError):
                status = f"its process ended with code {self.child.process.wait(1.0)}"
            if status != _READY:
                self.drop()
                raise MathScorerError(f"math-verify does not start: {status or f'it was not ready after {_START_SECONDS:g} s'}")
        return self.child

    def drop(self) -> int | None:
        """Ends the child, and returns its exit code; the next job gets a new one."""
        child, self.child = self.child, None
        if child is None:
            return None
        child.connection.close()
        child.process.wait(1.0)  # it may be about to: how it ended matters
        child.process.kill()
        return child.process.poll()


_VERIFIER = _Verifier()


def symbolically_equal(reference: str, answer: str, seconds: float, *, units: bool = True) -> bool:
    """Whether math-verify holds two expressions for equal. ``units``: drop them from both.

    False for an answer that takes over ``seconds`` of CPU time or all memory, and for a reference that math-verify cannot read.

    Raises:
        MathScorerError: the reference takes over ``seconds``, or math-verify does not run.
    """
    return _VERIFIER.equal((reference, answer, seconds, units))


class _TimeUp(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


def _time_up(_number: int, _frame: FrameType | None) -> None:
    raise _TimeUp


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """CPU time: ``_TimeUp`` where Python code runs, and where none does SIGXCPU, which nothing catches, at least a second later."""
    used, hard = time.process_time(), resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = math.ceil(used + seconds + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@functools.lru_cache(maxsize=256)  # the answers of a group have one reference
def _parse(text: str, units: bool) -> list[Any]:
    """One sympy expression, or none. Only all of ``text``: math-verify would also look for a number inside of it."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normal = NormalizationConfig(basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="all")
    latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)
    return list(parse(f"\\boxed{{{text}}}", [latex], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None))


def _judge(connection: Connection, reference: str, answer: str, seconds: float, units: bool) -> str:
    from math_verify import verify

    try:
        with _at_most(seconds):
            gold = _parse(reference, units)
    except _TimeUp:
        return _LATE
    if not gold:
        return _UNREADABLE
    connection.send(_READ)
    try:
        with _at_most(seconds):
            return _EQUAL if verify(gold, _parse(answer, units), allow_set_relation_comp=True, timeout_seconds=None) else _DIFFERENT
    except _TimeUp:
        return _DIFFERENT


def main(fd: int) -> None:
    """The child: jobs in, verdicts out."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _time_up)
    connection = Connection(fd)
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they warn of every timer that they were told not to set
    try:
        from math_verify import verify

        verify(
            _parse("\\sqrt{x}+1", True), _parse("1+x", True), timeout_seconds=None
        )  # loads the parser's tables and much of sympy: nobody's time
    except ImportError as error:
        connection.send(f"{error}; pip install '.[train]'")
        return
    connection.send(_READY)
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = connection.recv()
            connection.send(_judge(connection, *job))
