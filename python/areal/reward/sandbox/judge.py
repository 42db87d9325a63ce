"""One program as the judge sees it, which trusts nothing that a program says but the token of a pass."""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from .harness import FAULT, HEADER, IMPORT_FAILED, STARTED, STOP
from .limits import Level, Limits

GRACE = 3.0
"""Seconds after a program's wall time in which the fork server must have said how it ended."""
_MAX_DETAIL = 4000


class SandboxError(RuntimeError):
    """The sandbox failed, not the program: there is no score."""


class LevelMissing(SandboxError):
    """This machine does not have a level of isolation; the text says why."""


class MissingModule(ValueError):
    """The tests import a module that programs do not have."""


@dataclass(frozen=True)
class TestProgram:
    """A test program that runs after the completion, in its module (code_tests.py compiles it)."""

    __test__ = False  # pytest: not a test

    code: bytes
    modules: dict[str, bool] = field(default_factory=dict)
    """What they import, and whether they fail without it."""
    expects: frozenset[str] = frozenset()
    """Names that they take from the completion."""
    exits: frozenset[int] = frozenset()
    """Lines in which they end themselves."""
    changes: frozenset[str] = frozenset()
    """Names in modules and classes that they set themselves."""


@dataclass(frozen=True)
class Case:
    """One run of the completion as a program."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class Outcome:
    """``why``: passed, failed, or the limit that was exceeded (cpu, wall, memory, output); ``detail``: the end of what it printed."""

    passed: bool
    why: str
    detail: str = ""


class Run:
    """One program as the judge sees it: its channel, its output, and the fork server that watches it."""

    def __init__(self, server: socket.socket, level: Level, limits: Limits, seconds: float) -> None:
        self._server = server
        self._level = level
        self._limits = limits
        self._seconds = seconds
        self.why = ""
        self.garbage = self.done = self.started = False
        self.missing_import: int | None = None
        self.fault = ""
        self._heard = bytearray()
        self._output, self._errors = bytearray(), bytearray()

    def start(self, header: tuple[Any, ...], expected: list[bytes], tests: bytes, *, apart: bool = False) -> None:
        """Hands the program to the fork server.

        Args:
            expected: what it must say after STARTED; after the first of them it gets ``tests``.
            apart: stderr is not a part of the output.
        """
        self._expected, self._tests = expected, tests
        self._deadline = time.monotonic() + self._seconds + GRACE
        self._channel, theirs = socket.socketpair()
        ends = [os.pipe() for _ in range(2 if apart else 1)]
        self._pipes = {read_end: text for (read_end, _), text in zip(ends, (self._output, self._errors), strict=False)}
        try:
            self._server.settimeout(GRACE)
            request = marshal.dumps((asdict(self._limits), self._seconds))
            socket.send_fds(self._server, [request], [theirs.fileno(), ends[0][1], ends[-1][1]])
        except OSError as error:
            self._close()
            raise SandboxError(f"the sandbox's fork server has died: {error}") from error
        finally:
            theirs.close()
            for _, write_end in ends:
                os.close(write_end)
        for read_end in self._pipes:
            os.set_blocking(read_end, False)
        self._send(marshal.dumps(header))

    def _close(self) -> None:
        self._channel.close()
        for read_end in self._pipes:
            os.close(read_end)

    def _send(self, message: bytes) -> None:
        self._channel.settimeout(max(0.01, self._deadline - time.monotonic()))
        with contextlib.suppress(OSError):  # it has died, or does not listen: what that means the report tells
            self._channel.sendall(HEADER.pack(len(message)) + message)
        self._channel.setblocking(False)

    def wait(self) -> tuple[str, int, float, float]:
        """Until the fork server reports the program's end: (how, wait status, CPU seconds, wall seconds).

        Raises:
            SandboxError: it does not, or the program was not even begun, or something outside killed it.
        """
        try:
            report = self._wait()
            self._hear()
            for read_end in self._pipes:
                self._read_output(read_end)
        finally:
            self._close()
        if self.fault:
            raise SandboxError(f"a program could not be confined: {self.fault}")
        if not self.started:
            raise SandboxError(f"a program ended before it began ({report[0]}, wait status {report[1]})")
        return report

    def _wait(self) -> tuple[str, int, float, float]:
        poll = select.poll()
        for fd in (self._server.fileno(), self._channel.fileno(), *self._pipes):
            poll.register(fd, select.POLLIN)
        while True:
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                raise SandboxError(f"the sandbox's fork server said nothing for {self._seconds + GRACE:.1f} s about a program it runs")
            ready = [fd for fd, _ in poll.poll(seconds * 1000)]
            if self._server.fileno() in ready:
                message = self._server.recv(1 << 16)
                if not message:
                    raise SandboxError("the sandbox's fork server died")
                return marshal.loads(message)
            if self._channel.fileno() in ready and not self._hear():
                poll.unregister(self._channel.fileno())
            for read_end in self._pipes:
                if read_end in ready and not self._read_output(read_end):
                    poll.unregister(read_end)
            if (self.garbage or self._n_written > self._limits.output_bytes) and not self.why:
                self.why = "failed" if self.garbage else "output"
                self._stop()

    def _stop(self) -> None:
        with contextlib.suppress(OSError):  # it is on its way to tell us
            self._server.send(STOP)

    @property
    def _n_written(self) -> int:
        return len(self._output) + len(self._errors)

    def _read_output(self, read_end: int) -> bool:
        """False at its end. What is over the limit is not kept."""
        try:
            while data := os.read(read_end, 1 << 16):
                if self._n_written <= self._limits.output_bytes:
                    self._pipes[read_end] += data
                else:
                    return True
        except BlockingIOError:
            return True
        return False

    def _hear(self) -> bool:
        """Reads the channel; false at its end."""
        try:
            while data := self._channel.recv(1 << 12):
                self._heard += data
                self._understand()
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        return False

    def _understand(self) -> None:
        if not self.started:
            first = bytes(self._heard[:1])
            if first == FAULT:
                self.fault = self._heard[1:].decode(errors="replace")
                return
            if first == IMPORT_FAILED:
                self.missing_import = int.from_bytes(self._heard[1:2]) if len(self._heard) > 1 else None
                self.started = True
                return
            if first != STARTED:
                self.garbage = True
                return
            self.started = True
            del self._heard[:1]
        while self._expected and self._heard[: len(self._expected[0])] == self._expected[0]:
            del self._heard[: len(self._expected.pop(0))]
            if self._tests:
                self._send(self._tests)
                self._tests = b""
            self.done = not self._expected
        wanted = self._expected[0] if self._expected else b""
        self.garbage = self.garbage or not wanted.startswith(self._heard)

    def text(self) -> str:
        return self._output.decode(errors="replace")

    def detail(self) -> str:
        """The end of all that it wrote, for people."""
        return (self._output[-_MAX_DETAIL:] + self._errors[-_MAX_DETAIL:]).decode(errors="replace")

    def verdict(self, report: tuple[str, int, float, float]) -> str:
        """Why a program that did not pass did not.

        Raises:
            SandboxError: it was killed by something other than us and itself, for instance because the machine has no memory left.
        """
        how, status, cpu, _ = report
        if self.why:
            return self.why
        if how in ("cpu", "wall", "memory"):
            return how
        if how == "own limit":
            return "cpu" if os.WIFSIGNALED(status) else "failed"
        if how == "ended" and os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, -signal.SIGXCPU):
            if cpu > self._limits.cpu_seconds - 0.5:
                return "cpu"
            if self._level == "namespaces":  # nothing inside can kill the first process there
                raise SandboxError("a program was killed from outside of its sandbox; has the machine no memory left?")
        return "failed"
