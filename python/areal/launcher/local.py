"""Child processes on this machine: each in its own session with its own log file, none outliving the controller."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_PARENT_VARIABLE = "AREAL_PARENT_PID"
IMPORTING_MAIN_VARIABLE = "AREAL_IMPORTING_MAIN"
"""Set while a worker imports the user's script to find its functions: that import must not start a second run."""
_PR_SET_PDEATHSIG = 1


def refuse_second_start() -> None:
    """Raises in a worker that imports the training script: nothing of a run may begin there, not even its folder."""
    if IMPORTING_MAIN_VARIABLE in os.environ:
        raise RuntimeError("the training script started again while a worker imported it; put its start under if __name__ == '__main__':")


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class AddressError(OSError):
    """An address that nobody can listen on, in one sentence."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A TCP socket to listen on; made before anything heavy is, so that a port in use is told at once (``AddressError``)."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take the lower 16 bits
        raise AddressError(f"cannot listen on {host}:{port} (a port is at most 65535); give another --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise AddressError(f"cannot listen on {host}:{port} ({error.strerror}); give another --host or --port") from error
    return bound


def die_with_parent() -> None:
    """To be called first thing in a child: it is killed when its parent dies, even by kill -9.

    On Linux the kernel does it; the thread covers other systems and a parent that died before this call.
    """
    expected = int(os.environ.get(_PARENT_VARIABLE, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os._exit(1)
    threading.Thread(target=_watch_parent, args=(expected,), name="watch-parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class ChildProcess:
    """A started process. ``argv`` after the interpreter: ``["-m", "module", ...]`` runs with this Python.

    Without ``log_path`` its output goes to our stderr.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log_path: Path | None,
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        pass_fds: Sequence[int] = (),
    ) -> None:
        refuse_second_start()
        self.name = name
        self.log_path = log_path
        self._reaping = threading.Lock()
        environment = {**os.environ, **(env or {}), _PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with contextlib.ExitStack() as files:
            log: IO[bytes] | int
            if log_path is None:
                log = sys.stderr.fileno()
            else:
                log_path.parent.mkdir(parents=True, exist_ok=True)
                log = files.enter_context(log_path.open("ab"))
            # Own session: Ctrl-C reaches the controller only, which then ends its children in order.
            self._process = subprocess.Popen(
                [python, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                pass_fds=pass_fds,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs. What is left of its process group is killed when its end is seen."""
        with self._reaping:
            return self._poll()

    def wait(self, timeout: float) -> int | None:
        """Exit code as ``poll``; None if it still runs after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return code

    def _poll(self) -> int | None:
        if self._process.returncode is None:
            try:
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # reaped by somebody who waits for any child
                return self._process.poll()
            if ended is not None:
                # Before it is reaped: afterwards its number may be that of somebody else's process group.
                self._signal_group(signal.SIGKILL)
                self._process.wait(timeout=10)  # returns at once
        return self._process.returncode

    def last_log_lines(self, n: int = 10) -> str:
        if self.log_path is None:
            return ""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - 64 * 1024))
                lines = log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-n:])

    def describe_death(self, n: int = 10) -> str:
        """Name, exit code and last log lines, for an error message."""
        code = self.poll()
        how = (
            "is still running"
            if code is None
            else f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exited with code {code}"
        )
        lines = self.last_log_lines(n)
        return (
            f"{self.name} (pid {self.pid}) {how}; its log {self.log_path} ends:\n{lines}"
            if lines
            else f"{self.name} (pid {self.pid}) {how}"
        )

    def kill(self) -> None:
        """Kills the whole process group at once and reaps the child."""
        self.kill_soon()
        if self.wait(10) is None:
            raise TimeoutError(f"{self.name} (pid {self.pid}) was killed and is still there after 10 s")

    def kill_soon(self) -> None:
        """As ``kill``, without waiting: ``poll`` reaps the child."""
        self._signal(signal.SIGKILL)

    def terminate(self, grace: float = 5.0) -> None:
        """Asks the process group to end, and kills what is left after ``grace`` seconds."""
        self._signal(signal.SIGTERM)
        self.wait(grace)
        self.kill()

    def _signal(self, number: int) -> None:
        """To the process group, unless its leader was seen to have ended."""
        with self._reaping:
            if self._poll() is None:
                self._signal_group(number)

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass  # nobody of the group is left
