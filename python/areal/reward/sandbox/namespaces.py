"""The level ``namespaces``: programs in user, mount, pid, network, IPC and UTS namespaces of their own, under Landlock and seccomp.

What is expensive and nobody can change is made once, by the fork server: the user namespace, an empty network, and a read-only root that
shows the interpreter and the system's libraries. Each program gets a pid namespace, whose end is the end of all its processes, and in a
mount namespace its own /proc and an empty /tmp in memory. Three processes: the one that was started keeps the outer side (it dies
with the scoring process), process 1 of the inner pid namespace is the fork server, and each program is process 1 of one below.
"""

from __future__ import annotations

import os
import signal

from .filters import Seccomp, restrict_files, seccomp_program
from .limits import Level, Limits
from .rlimit import become, private_user, set_limits
from .syscalls import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    drop_capabilities,
    landlock_abi,
    make_read_only,
    mount,
    pivot_root,
    prctl,
    setns,
    unmount,
    unshare,
)
from .view import DEVICES, WORK, is_inside, readable_paths

_ALL = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
_INNER_USER = 1000
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class NamespaceCell:
    """Where this fork server's programs run, one at a time. Making one leaves the caller in the inner pid namespace; the process that
    it was waits outside and never returns.

    Raises:
        OSError: the machine does not let us; the text names the call.
    """

    level: Level = "namespaces"

    def __init__(self) -> None:
        self.notes: list[str] = [] if landlock_abi() else ["no Landlock"]
        self._seccomp = Seccomp(seccomp_program())
        self._is_root = os.geteuid() == 0
        paths = readable_paths()
        _new_namespaces(self._is_root)
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        self._has_proc = _build_root(paths)
        if not self._has_proc:
            self.notes.append("no /proc: CPU time and memory are limited by process, not by program")
        self._own_memory = self._memory_of(os.getpid())

    def before_fork(self) -> None:
        unshare(CLONE_NEWPID)

    def after_fork(self) -> None:
        setns(self._pid_namespace, CLONE_NEWPID)

    def confine(self, limits: Limits) -> None:
        """In the program's process, before anything of it runs."""
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        unshare(CLONE_NEWNS)
        mount("tmpfs", WORK, "tmpfs", MS_NOSUID | MS_NODEV, f"size={limits.folder_bytes},nr_inodes=4096,mode=1777")
        if self._has_proc:
            mount("proc", "/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
        # The two processes around the programs have their user id where only one can be mapped.
        set_limits(limits, limits.processes + (0 if self._is_root else 2))
        if self._is_root:
            become(_INNER_USER)
        drop_capabilities()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        os.chdir(WORK)
        restrict_files(["/"], [WORK], ["/dev"])
        self._seccomp.install()

    def folder(self) -> str:
        return WORK

    def usage(self, pid: int) -> tuple[float, int] | None:
        """CPU seconds and bytes of all processes of the program that runs; None where that cannot be seen."""
        if not self._has_proc:
            return None
        cpu, memory = 0.0, []
        for name in os.listdir("/proc"):
            if not name.isdigit() or name == "1":
                continue
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    fields = stat.read().rpartition(b")")[2].split()
                memory.append(self._memory_of(int(name)))
            except (FileNotFoundError, ProcessLookupError):
                continue
            cpu += sum(int(field) for field in fields[11:15]) / _TICK
        # What a fork shares with us is counted once.
        return cpu, self._own_memory + sum(max(0, used - self._own_memory) for used in memory)

    def _memory_of(self, pid: int) -> int:
        if not self._has_proc:
            return 0
        with open(f"/proc/{pid}/statm", "rb") as statm:
            _, resident, shared = (int(word) for word in statm.read().split()[:3])
        return (resident - shared) * _PAGE

    def end(self, pid: int) -> tuple[int, float]:
        """Kills what is left of a program: its wait status and CPU seconds. Its pid namespace takes all its processes with it."""
        os.kill(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
        return status, used.ru_utime + used.ru_stime


def _new_namespaces(is_root: bool) -> None:
    """Returns in process 1 of the new pid namespace."""
    if is_root:
        _unshare_as_root()
    else:
        user, group = os.geteuid(), os.getegid()
        unshare(_ALL)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/gid_map", f"{_INNER_USER} {group} 1")
        _write("/proc/self/uid_map", f"{_INNER_USER} {user} 1")
    pid = os.fork()
    if pid:
        os.closerange(3, 1024)  # the ends of its connections must be the fork server's alone
        _, status = os.waitpid(pid, 0)
        os._exit(max(0, os.waitstatus_to_exitcode(status)))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != 0:  # in a new pid namespace the parent is nobody
        raise OSError(0, "unshare: the new pid namespace did not begin")


def _unshare_as_root() -> None:
    """Two users are mapped, root for the preparations and a private one for programs. A process that stays outside must write that."""
    user = private_user()
    go_read, go_write = os.pipe()
    done_read, done_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(go_write)
            if os.read(go_read, 1):
                for name in ("uid_map", "gid_map"):
                    _write(f"/proc/{os.getppid()}/{name}", f"0 0 1\n{_INNER_USER} {user} 1\n")
                os.write(done_write, b"done")
        except OSError as error:
            os.write(done_write, str(error).encode())
        finally:
            os._exit(0)
    os.close(done_write)
    try:
        unshare(_ALL)
        os.write(go_write, b"g")
        answer = os.read(done_read, 4096)
    finally:
        for fd in (go_read, go_write, done_read):
            os.close(fd)
        os.waitpid(helper, 0)
    if answer != b"done":
        raise OSError(0, f"uid_map: {answer.decode() or 'the process that writes it died'}")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _build_root(paths: list[str]) -> bool:
    """Makes a new root of ``paths`` alone, read-only, and goes there. Whether it has a /proc."""
    candidates = ("/mnt", "/media", "/srv", "/run", "/opt", "/home", WORK)
    root = next(c for c in candidates if os.path.isdir(c) and not any(is_inside(p, c) for p in paths))
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in paths:
        _show(root, path)
    os.makedirs(f"{root}/dev", exist_ok=True)
    for device in DEVICES:
        os.close(os.open(root + device, os.O_CREAT | os.O_WRONLY, 0o444))
        mount(device, root + device, None, MS_BIND)
    os.symlink(WORK, f"{root}/dev/shm")  # semaphores of multiprocessing
    for folder in (WORK, "/proc"):
        os.makedirs(root + folder, exist_ok=True)
    try:
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        has_proc = True
    except OSError:  # containers cover parts of theirs; the kernel then gives no other
        has_proc = False
    os.chdir(root)
    pivot_root(".", ".")
    unmount(".", MNT_DETACH)
    os.chdir("/")
    make_read_only("/", below=False)
    return has_proc


def _show(root: str, path: str) -> None:
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    mount(path, target, None, MS_BIND | MS_REC)
    make_read_only(target)
