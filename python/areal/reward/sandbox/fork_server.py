"""The fork server: a small interpreter with the usual modules in memory, of which every program is a confined fork.

Who waits on whom: the judge (judge.py) sends one request at a time with three descriptors, the program's channel to it and the program's
stdout and stderr; this process forks, watches the limits, ends the program when one is exceeded, when it has ended by itself or when the judge says
stop, and answers with how it ended. The program's source and its tests never pass through here.
"""

from __future__ import annotations

import fcntl
import gc
import marshal
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn, Protocol

from .harness import FAULT, STOP, read_frame, run_case, run_tests
from .limits import Level, Limits
from .snapshot import PREIMPORTED, Snapshot
from .syscalls import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, landlock_abi, prctl
from .unit import record_results
from .view import import_path

_FIRST_LOOK = 0.02
_LOOK_EVERY = 0.05
_MAX_REQUEST = 4096
_CHANNEL = 1000
"""A program's end of the channel is at this number or above, if it may be, out of the way of programs that count on low ones."""


class Cell(Protocol):
    """How programs are confined."""

    level: Level
    notes: list[str]

    def before_fork(self) -> None: ...

    def after_fork(self) -> None: ...

    def confine(self, limits: Limits) -> None: ...

    def folder(self) -> str: ...

    def usage(self, pid: int) -> tuple[float, int] | None: ...

    def end(self, pid: int) -> tuple[int, float]: ...


def main(fd: int, level: str, parent: int) -> None:
    """Serves until the judge is gone. The first message tells the level, or why it cannot be had."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A low number, whatever the judge's process holds: programs have all low ones closed.
    judge = socket.socket(fileno=fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
    os.close(fd)
    gc.disable()
    sys.argv = ["solution.py"]
    record_results()
    snapshot = Snapshot(PREIMPORTED)
    try:
        _be_first_to_go()
        cell = _make_cell(level)
    except (OSError, StopIteration) as error:
        judge.send(marshal.dumps({"error": str(error) or repr(error)}))
        return
    judge.send(marshal.dumps({"level": cell.level, "landlock": landlock_abi(), "notes": cell.notes}))
    sys.path[:] = import_path()
    os.environ.clear()
    os.environ.update(LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    for name in [n for n in sys.modules if n.partition(".")[0] == __name__.partition(".")[0]]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    while request := _receive(judge):
        judge.send(marshal.dumps(_serve(judge, cell, snapshot, *request)))


def _make_cell(level: str) -> Cell:
    if level == "namespaces":
        from .namespaces import NamespaceCell

        return NamespaceCell()
    from .rlimit import RlimitCell

    return RlimitCell()


def _be_first_to_go() -> None:
    """Where memory runs out, the kernel is to end programs before anything of the run."""
    prctl(PR_SET_DUMPABLE, 1)
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
            score.write("500")
    except OSError:
        pass


def _receive(judge: socket.socket) -> tuple[Limits, float, list[int]] | None:
    message, fds, _, _ = socket.recv_fds(judge, _MAX_REQUEST, 3)
    while message == STOP:  # it was meant for a program that ended by itself meanwhile
        message, fds, _, _ = socket.recv_fds(judge, _MAX_REQUEST, 3)
    if not message:
        return None
    limits, seconds = marshal.loads(message)
    return Limits(**limits), seconds, fds


def _serve(judge: socket.socket, cell: Cell, snapshot: Snapshot, limits: Limits, seconds: float, fds: list[int]) -> Any:
    """Runs one program; (how it ended, its wait status, CPU seconds, wall seconds)."""
    begin = time.monotonic()
    cell.before_fork()
    os.environ["HOME"] = os.environ["TMPDIR"] = cell.folder()
    pid = os.fork()
    if pid == 0:
        _program(judge, cell, snapshot, limits, *fds)
    for fd in fds:
        os.close(fd)
    cell.after_fork()
    try:
        how = _watch(judge, cell, limits, pid, begin + seconds)
        if how == "ended" and _lowered_cpu_limit(pid, limits):
            how = "own limit"
    finally:  # also when the judge is gone
        status, cpu = cell.end(pid)
    return how, status, cpu, time.monotonic() - begin


def _lowered_cpu_limit(pid: int, limits: Limits) -> bool:
    """Whether the program, which is still there as a zombie, has given itself less time, and may have been killed by that."""
    try:
        return resource.prlimit(pid, resource.RLIMIT_CPU)[1] < limits.cpu_seconds
    except OSError:
        return False


def _watch(judge: socket.socket, cell: Cell, limits: Limits, pid: int, deadline: float) -> str:
    """Until the program has ended or must end: why."""
    process = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(judge, select.POLLIN)
    pause = _FIRST_LOOK
    try:
        while True:
            ready = dict(poll.poll(max(0.0, min(pause, deadline - time.monotonic())) * 1000))
            if process in ready:
                return "ended"
            if ready:
                if not judge.recv(1):
                    sys.exit(0)
                return "stopped"
            if time.monotonic() >= deadline:
                return "wall"
            pause = _LOOK_EVERY
            used = cell.usage(pid)
            if used is not None and used[0] > limits.cpu_seconds:
                return "cpu"
            if used is not None and used[1] > limits.memory_bytes:
                return "memory"
    finally:
        os.close(process)


def _program(judge: socket.socket, cell: Cell, snapshot: Snapshot, limits: Limits, channel: int, output: int, errors: int) -> NoReturn:
    """The forked process: nothing of this server is left in it when the program begins."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1
        high = fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, min(_CHANNEL, highest))
        kind, source, stdin, nonce, modules = marshal.loads(read_frame(high))
        _standard_streams(stdin, output, errors)
        os.closerange(3, high)
        os.closerange(high + 1, high + 1024)
        judge.detach()
        cell.confine(limits)
    except BaseException as error:  # before anything of the program has run: a fault of the sandbox
        os.write(channel, FAULT + f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    try:
        if kind == "case":
            run_case(high, source)
        run_tests(high, source, nonce, modules, snapshot)
    finally:  # whatever got past the harness must not come back into the server's loop
        os._exit(1)


def _standard_streams(stdin: bytes, output: int, errors: int) -> None:
    if stdin:
        source = os.memfd_create("stdin")
        with open(source, "wb", closefd=False) as file:
            file.write(stdin)
        os.lseek(source, 0, os.SEEK_SET)
    else:
        source = os.open("/dev/null", os.O_RDONLY)
    for fd, number in ((source, 0), (output, 1), (errors, 2)):
        os.dup2(fd, number)
