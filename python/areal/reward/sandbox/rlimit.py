"""The level ``rlimit``: limits, a session and, for root, a user of its own; Landlock and seccomp where the kernel has them.

Best effort: programs see the machine's processes, and without Landlock its files. They may start threads but no processes (seccomp
refuses): without a pid namespace nothing would end all of them for certain.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import time

from .filters import Seccomp, restrict_files, seccomp_program
from .limits import Level, Limits
from .syscalls import PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, drop_capabilities, landlock_abi, prctl
from .view import DEVICES, readable_paths

_FIRST_PRIVATE_USER = 0x60000000
_END_SECONDS = 2.0


def set_limits(limits: Limits, processes: int | None) -> None:
    """The kernel's own limits; ``processes`` None: no limit of them (it would count those of others)."""
    cpu = int(-(-limits.cpu_seconds // 1))
    bounds = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if processes is not None:
        bounds[resource.RLIMIT_NPROC] = processes
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    deep = 64 << 20  # deep recursion through C code; it is part of the address space
    resource.setrlimit(resource.RLIMIT_STACK, (deep if hard == resource.RLIM_INFINITY else min(deep, hard), hard))


def private_user() -> int:
    """A user id that nobody has, another one for each fork server: the kernel counts processes by user."""
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        first, _, count = (int(word) for word in lines.read().splitlines()[-1].split())
    wanted = _FIRST_PRIVATE_USER + os.getpid()
    return wanted if first <= wanted < first + count else first + count - 2 - os.getpid() % max(1, count // 2)


def become(user: int) -> None:
    """From root to ``user``, for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # forgotten with the change of user


class RlimitCell:
    """Where this fork server's programs run, one at a time."""

    level: Level = "rlimit"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._paths = readable_paths()
        self._user = self._private_user()
        self._folder = ""
        self._seccomp = True
        try:
            seccomp_program()
        except OSError as error:
            self._seccomp = False
            self.notes.append(str(error))
        if landlock_abi() == 0:
            self.notes.append("no Landlock: programs can read what their user can")
        prctl(PR_SET_CHILD_SUBREAPER, 1)

    def _private_user(self) -> int | None:
        """None where we are not root, or where that user could not read the interpreter's own files."""
        if os.geteuid() != 0:
            return None
        user = private_user()
        pid = os.fork()
        if pid == 0:
            try:
                become(user)
                os._exit(0 if os.access(os.__file__, os.R_OK) else 1)
            finally:
                os._exit(2)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            return user
        self.notes.append("programs keep the user root, without its rights: another one cannot read this Python's files")
        return None

    def before_fork(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="areal-program-")
        if self._user is not None:
            os.chown(self._folder, self._user, self._user)

    def after_fork(self) -> None:
        pass

    def confine(self, limits: Limits) -> None:
        """In the program's process, before anything of it runs."""
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        set_limits(limits, None if self._user is None else limits.processes)
        if os.geteuid() == 0:
            if self._user is not None:
                become(self._user)
            drop_capabilities()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        os.chdir(self._folder)
        tempfile.tempdir = None  # ours; the program's is this folder
        restrict_files(self._paths, [self._folder], [d for d in DEVICES if os.path.exists(d)])
        if self._seccomp:
            Seccomp(seccomp_program(os.getpid())).install()

    def folder(self) -> str:
        return self._folder

    def usage(self, pid: int) -> tuple[float, int] | None:
        return None

    def end(self, pid: int) -> tuple[int, float]:
        """Kills what is left of a program: its wait status and CPU seconds."""
        os.kill(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
        self._kill_children()
        self._remove_folder()
        return status, used.ru_utime + used.ru_stime

    def _kill_children(self) -> None:
        """Orphans of the program became our children; one that dies leaves us its own."""
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                for child in _children(os.getpid()):
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.001)
        raise TimeoutError(f"processes of a program were still there {_END_SECONDS:g} s after they had been killed")

    def _remove_folder(self) -> None:
        def open_up(function: object, path: str, error: object) -> None:
            os.chmod(os.path.dirname(path), 0o700)
            os.chmod(path, 0o700, follow_symlinks=False) if not os.path.islink(path) else None
            shutil.rmtree(path, ignore_errors=True)

        shutil.rmtree(self._folder, onerror=open_up)


def _children(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    if int(stat.read().rpartition(b")")[2].split()[1]) == parent:
                        found.append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found
