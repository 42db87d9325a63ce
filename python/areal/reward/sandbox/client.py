"""The scoring process's end of its fork server.

Who waits on whom: a call waits for the fork server at most the limits' wall time and ``GRACE`` seconds more; one that is silent for longer,
or has died, is a fault of the sandbox (``SandboxError``), is killed, and the next call starts another one.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from .judge import Case, LevelMissing, MissingModule, Outcome, Run, SandboxError, TestProgram
from .limits import Isolation, Level, Limits

_START_SECONDS = 30.0
_END_SECONDS = 0.5
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


class ForkServer:
    """One fork server; one program at a time.

    Raises:
        LevelMissing: the machine does not have this level.
    """

    def __init__(self, level: Level) -> None:
        if sys.platform != "linux":
            raise LevelMissing(f"programs are confined on Linux only, and this is {sys.platform}")
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
        try:
            self._process.wait(timeout=_END_SECONDS)  # it has seen the end of its connection
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10)

    def run_tests(self, source: str, tests: TestProgram, limits: Limits, *otherwise: str) -> Outcome:
        """The completion ``source`` (``otherwise``: what it is when that does not compile), then ``tests``.

        Raises:
            SandboxError: the sandbox failed.
            MissingModule: the tests need a module that is not there.
        """
        run = Run(self._socket, self.level, limits, limits.wall_seconds)
        nonce, token = secrets.token_bytes(16), secrets.token_bytes(16)
        run.start(("tests", (source, *otherwise), b"", nonce, tests.modules), [nonce, token], tests_message(token, tests))
        report = run.wait()
        if run.missing_import is not None:
            raise MissingModule(f"the tests import '{list(tests.modules)[run.missing_import]}', which the sandbox's Python does not have")
        passed = run.done and not run.garbage and not run.why
        return Outcome(passed, "passed" if passed else run.verdict(report), run.detail())

    def run_program(self, source: str, stdin: str, limits: Limits) -> Outcome:
        """``source`` as a program; it has passed when it ends by itself with exit status 0. ``detail`` is all that it wrote.

        Raises:
            SandboxError: the sandbox failed.
        """
        run, report, ended = self._run(source, stdin, limits, limits.wall_seconds, apart=False)
        return Outcome(ended, "passed" if ended else run.verdict(report), run.text())

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
            run, report, ended = self._run(source, case.stdin, limits, seconds)
            if not ended or not same_output(run.text(), case.stdout):
                return Outcome(False, run.verdict(report), run.detail())
        return Outcome(True, "passed")

    def _run(
        self, source: str, stdin: str, limits: Limits, seconds: float, *, apart: bool = True
    ) -> tuple[Run, tuple[str, int, float, float], bool]:
        """One run of a program, its report, and whether it ended by itself and well."""
        run = Run(self._socket, self.level, limits, seconds)
        run.start(("case", source, stdin.encode(errors="surrogatepass"), b"", {}), [], b"", apart=apart)
        report = run.wait()
        return (
            run,
            report,
            report[0] in ("ended", "own limit") and not run.why and not run.garbage and os.waitstatus_to_exitcode(report[1]) == 0,
        )


def same_output(written: str, wanted: str) -> bool:
    """Line by line, without white space at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in written.rstrip().splitlines()] == [line.rstrip() for line in wanted.rstrip().splitlines()]


def tests_message(token: bytes, tests: TestProgram) -> bytes:
    return marshal.dumps((token, tests.code, tests.exits, tests.changes))


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


def close_all() -> None:
    """Ends the fork servers of this process; they end with it anyway."""
    with _lock:
        if _owner == os.getpid():
            for server in _servers.values():
                server.close()
        _servers.clear()


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
