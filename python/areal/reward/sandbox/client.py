"""The judge: the scoring process's end of its fork server, which trusts nothing that a program says but the token of a pass.

Who waits on whom: a call waits for the fork server at most the limits' wall time and ``_GRACE`` seconds more; one that is silent for longer,
or has died, is a fault of the sandbox (``SandboxError``), is killed, and the next call starts another one.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .harness import FAULT, HEADER, IMPORT_FAILED, STARTED
from .limits import Isolation, Level, Limits

_START_SECONDS = 30.0
_GRACE = 3.0
# Loads this folder as a package of its own: areal.reward would bring asyncio, and a folder on sys.path its math.py.
_RUN = """
import importlib.util, sys
folder, fd, level, parent = sys.argv[1:]
spec = importlib.util.spec_from_file_location("areal_sandbox", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["areal_sandbox"] = importlib.util.module_from_spec(spec)
from areal_sandbox.fork_server import main
main(int(fd), level, int(parent))
"""
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # the same program has the same score
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class SandboxError(RuntimeError):
    """The sandbox failed, not the program: there is no score."""


class LevelMissing(SandboxError):
    """This machine does not have a level of isolation; the text says why."""


class MissingModule(ValueError):
    """The tests import a module that programs do not have."""


@dataclass(frozen=True)
class TestProgram:
    """A test program that runs after the completion, in its module (test_program.py compiles it)."""

    __test__ = False  # pytest: not a test

    code: bytes
    modules: dict[str, bool] = field(default_factory=dict)
    """What they import, and whether they fail without it."""
    true_names: dict[str, str] = field(default_factory=dict)


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


class ForkServer:
    """One fork server; one program at a time.

    Raises:
        LevelMissing: the machine does not have this level.
    """

    def __init__(self, level: Level) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = os.path.dirname(os.path.abspath(__file__))
        with theirs:
            argv = [sys.executable, "-P", "-s", "-c", _RUN, folder, str(theirs.fileno()), level, str(os.getpid())]
            # Its own interpreter, not a fork of ours: it has one thread and nothing of ours in its memory.
            self._process = subprocess.Popen(
                argv, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self._socket = ours
        self.level = level
        self.landlock = 0
        self.notes: list[str] = []
        try:
            self._hello()
        except BaseException:
            self.close()
            raise

    def _hello(self) -> None:
        self._socket.settimeout(_START_SECONDS)
        try:
            message = self._socket.recv(1 << 16)
        except TimeoutError:
            raise SandboxError(f"the sandbox's fork server was not ready after {_START_SECONDS:.0f} s") from None
        if not message:
            raise SandboxError(f"the sandbox's fork server ended while starting (exit status {self._process.wait(5)})")
        hello = marshal.loads(message)
        if "error" in hello:
            raise LevelMissing(hello["error"])
        self.landlock, self.notes = hello["landlock"], hello["notes"]
        try:
            outcome = self.run_tests("answer = 42", _PROBE, Limits())
        except SandboxError as error:
            raise LevelMissing(str(error)) from None
        if not outcome.passed:
            raise LevelMissing(f"a first program did not run ({outcome.why}): {outcome.detail[-300:]}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it and every program."""
        self._socket.close()
        self._process.kill()
        self._process.wait(timeout=10)

    def run_tests(self, source: str, tests: TestProgram, limits: Limits) -> Outcome:
        """The completion ``source``, then ``tests``.

        Raises:
            SandboxError: the sandbox failed.
            MissingModule: the tests need a module that is not there.
        """
        run = _Run(self._socket, limits, limits.wall_seconds)
        nonce, token = secrets.token_bytes(16), secrets.token_bytes(16)
        run.start(("tests", source, b"", nonce, tests.modules), [nonce, token], marshal.dumps((token, tests.code, tests.true_names)))
        report = run.wait()
        if run.missing_import is not None:
            raise MissingModule(f"the tests import '{list(tests.modules)[run.missing_import]}', which the sandbox's Python does not have")
        passed = run.done and not run.garbage and not run.why
        return Outcome(passed, "passed" if passed else run.verdict(report), run.text())

    def run_cases(self, source: str, cases: Sequence[Case], limits: Limits) -> Outcome:
        """The completion as a program, once for each case, until one fails.

        Raises:
            SandboxError: the sandbox failed.
        """
        deadline = time.monotonic() + limits.wall_seconds
        for case in cases:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return Outcome(False, "wall")
            run = _Run(self._socket, limits, seconds)
            run.start(("case", source, case.stdin.encode(errors="surrogatepass"), b"", {}), [], b"")
            report = run.wait()
            ended = report[0] == "ended" and not run.why and os.waitstatus_to_exitcode(report[1]) == 0
            if not ended or run.garbage or not same_output(run.text(), case.stdout):
                return Outcome(False, run.verdict(report), run.text())
        return Outcome(True, "passed")


def same_output(written: str, wanted: str) -> bool:
    """Line by line, without white space at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in written.rstrip().splitlines()] == [line.rstrip() for line in wanted.rstrip().splitlines()]


class _Run:
    """One program as the judge sees it: its channel, its output, and the fork server that watches it."""

    def __init__(self, server: socket.socket, limits: Limits, seconds: float) -> None:
        self._server = server
        self._limits = limits
        self._seconds = seconds
        self.why = ""
        self.garbage = self.done = self.started = False
        self.missing_import: int | None = None
        self.fault = ""
        self._heard = bytearray()
        self._output = bytearray()

    def start(self, header: tuple[Any, ...], expected: list[bytes], tests: bytes) -> None:
        """Hands the program to the fork server. ``expected``: what it must say after STARTED; after the first of them it gets ``tests``."""
        self._expected, self._tests = expected, tests
        self._deadline = time.monotonic() + self._seconds + _GRACE
        self._channel, theirs = socket.socketpair()
        self._read_end, write_end = os.pipe()
        try:
            self._server.settimeout(_GRACE)
            request = marshal.dumps((asdict(self._limits), self._seconds))
            socket.send_fds(self._server, [request], [theirs.fileno(), write_end])
        except OSError as error:
            self._channel.close()
            os.close(self._read_end)
            raise SandboxError(f"the sandbox's fork server has died: {error}") from error
        finally:
            theirs.close()
            os.close(write_end)
        os.set_blocking(self._read_end, False)
        self._send(marshal.dumps(header))

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
            self._read_output()
        finally:
            self._channel.close()
            os.close(self._read_end)
        if self.fault:
            raise SandboxError(f"a program could not be confined: {self.fault}")
        if not self.started:
            raise SandboxError(f"a program ended before it began ({report[0]}, wait status {report[1]})")
        return report

    def _wait(self) -> tuple[str, int, float, float]:
        poll = select.poll()
        for fd in (self._server.fileno(), self._channel.fileno(), self._read_end):
            poll.register(fd, select.POLLIN)
        while True:
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                raise SandboxError(f"the sandbox's fork server said nothing for {self._seconds + _GRACE:.1f} s about a program it runs")
            ready = [fd for fd, _ in poll.poll(seconds * 1000)]
            if self._server.fileno() in ready:
                message = self._server.recv(1 << 16)
                if not message:
                    raise SandboxError("the sandbox's fork server died")
                return marshal.loads(message)
            if self._channel.fileno() in ready and not self._hear():
                poll.unregister(self._channel.fileno())
            if self._read_end in ready and not self._read_output():
                poll.unregister(self._read_end)
            if (self.garbage or len(self._output) > self._limits.output_bytes) and not self.why:
                self.why = "failed" if self.garbage else "output"
                self._stop()

    def _stop(self) -> None:
        with contextlib.suppress(OSError):  # it is on its way to tell us
            self._server.send(b"x")

    def _read_output(self) -> bool:
        """False at its end. What is over the limit is not kept."""
        try:
            while data := os.read(self._read_end, 1 << 16):
                if len(self._output) <= self._limits.output_bytes:
                    self._output += data
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
        if os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, -signal.SIGXCPU):
            if cpu > self._limits.cpu_seconds - 0.5:
                return "cpu"
        return "failed"


_PROBE = TestProgram(marshal.dumps(compile("assert answer == 42", "<probe>", "exec")))
_lock = threading.Lock()
_servers: dict[str, ForkServer] = {}
_owner = 0


@contextlib.contextmanager
def fork_server(isolation: Isolation) -> Any:
    """The fork server of this process, for one program at a time; started when there is none. A fault ends it.

    Raises:
        LevelMissing: the level was demanded, and the machine does not have it.
    """
    global _owner  # noqa: PLW0603
    with _lock:
        if _owner != os.getpid():  # the parent's are not ours
            _servers.clear()
            _owner = os.getpid()
        server = _servers.get(isolation)
        if server is not None and not server.alive:
            server.close()
            server = None
        if server is None:
            server = _servers[isolation] = start(isolation)
        try:
            yield server
        except MissingModule:
            raise
        except BaseException:  # its state is unknown: a program may still run there
            del _servers[isolation]
            server.close()
            raise


def start(isolation: Isolation) -> ForkServer:
    """A new fork server at the level, or for auto at the strongest that the machine has."""
    if isolation != "auto":
        return ForkServer(isolation)
    try:
        return ForkServer("namespaces")
    except LevelMissing as reason:
        server = ForkServer("rlimit")
        server.notes.insert(0, f"no namespaces: {reason}")
        return server
