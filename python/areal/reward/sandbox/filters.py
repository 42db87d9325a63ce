"""Landlock and seccomp: what remains forbidden to a program that got around everything else.

The seccomp filter names what is refused (with EPERM, so that a program sees an error), as BPF assembled here for x86-64 and aarch64:
other namespaces, mounts, tracing, the kernel's own interfaces, sockets other than Unix ones, memory that no limit counts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from .syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWTIME,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MACHINE,
    PR_SET_SECCOMP,
    landlock_abi,
    landlock_allow,
    landlock_create,
    landlock_restrict,
    prctl,
)

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
# (x86-64, aarch64); None: not there.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "init_module": (175, 105),
    "ioperm": (173, None),
    "iopl": (172, None),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "mount": (165, 40),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
_UNKNOWN_TO_OLD_KERNELS = {"clone3": 435, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}
"""Answered with ENOSYS: libraries then do without. Arguments of clone3 lie in memory, where a filter cannot see them."""
_NEW_MOUNT_CALLS = (428, 433)
"""open_tree to fspick; mount_setattr is refused too."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_FORKS = {"x86_64": (57, 58), "aarch64": ()}
_SIGNALS = {"x86_64": (62, 234), "aarch64": (129, 131)}  # kill, tgkill
_SIGNALS_BY_OTHER_WAYS = {
    "x86_64": (200, 129, 297, 424),
    "aarch64": (130, 138, 240, 424),
}  # tkill, (rt_)(tg)sigqueueinfo, pidfd_send_signal
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_NEW_NAMESPACE = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWTIME | CLONE_NEWCGROUP
_CLONE_THREAD = 0x00010000
_AF_UNIX = 1

_LOAD, _JUMP_EQUAL, _JUMP_ABOVE_OR_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; the low half of the first argument


class _Assembler:
    def __init__(self) -> None:
        self.code: list[bytes] = []

    def emit(self, operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        self.code.append(struct.pack("=HBBI", operation, if_true, if_false, value))

    def answer(self, action: int) -> None:
        self.emit(_RETURN, action)

    def refuse(self, number: int, error: int) -> None:
        self.emit(_JUMP_EQUAL, number, 0, 1)
        self.answer(_ERRNO | error)

    def argument(self, number: int, tests: list[tuple[int, int, int, int]]) -> None:
        """Looks at the first argument of a call: each test is (jump, value, action if it holds, action if not; -1 = next test)."""
        body = _Assembler()
        body.emit(_LOAD, _ARG0)
        for jump, value, hit, miss in tests:
            if hit >= 0:
                body.emit(jump, value, 0, 1)
                body.answer(hit)
            else:
                body.emit(jump, value, 1, 0)
                body.answer(miss)
        body.answer(_ALLOW)
        self.emit(_JUMP_EQUAL, number, 0, len(body.code))
        self.code += body.code


def seccomp_program(alone: int | None = None) -> bytes:
    """The filter.

    Args:
        alone: the id of a process that may start threads but no processes, send signals to itself only and open no socket at all:
            where no namespace keeps it from others. None: one in namespaces.

    Raises:
        OSError: no table for this architecture.
    """
    if MACHINE not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"seccomp: no table of system calls for {MACHINE}")
    column = list(_AUDIT_ARCH).index(MACHINE)
    asm = _Assembler()
    asm.emit(_LOAD, _ARCH)
    asm.emit(_JUMP_EQUAL, _AUDIT_ARCH[MACHINE], 1, 0)
    asm.answer(_KILL)
    asm.emit(_LOAD, _NUMBER)
    if MACHINE == "x86_64":
        asm.emit(_JUMP_ABOVE_OR_EQUAL, _X32_BIT, 0, 1)
        asm.answer(_ERRNO | errno.ENOSYS)
    for number in sorted(numbers[column] or -1 for numbers in _REFUSED.values()):
        if number >= 0:
            asm.refuse(number, errno.EPERM)
    for number in (*range(_NEW_MOUNT_CALLS[0], _NEW_MOUNT_CALLS[1] + 1), 442):
        asm.refuse(number, errno.EPERM)
    for number in _UNKNOWN_TO_OLD_KERNELS.values():
        asm.refuse(number, errno.ENOSYS)
    clone = [(_JUMP_ANY_BIT, _NEW_NAMESPACE, _ERRNO | errno.EPERM, -1)]
    if alone is None:
        asm.argument(_SOCKET[MACHINE], [(_JUMP_EQUAL, _AF_UNIX, -1, _ERRNO | errno.EACCES)])
    else:
        clone.append((_JUMP_ANY_BIT, _CLONE_THREAD, -1, _ERRNO | errno.EPERM))
        for number in (*_FORKS[MACHINE], _SOCKET[MACHINE]):
            asm.refuse(number, errno.EPERM)
        _refuse_reaching_others(asm, alone)
    asm.argument(_CLONE[MACHINE], clone)
    asm.answer(_ALLOW)
    return b"".join(asm.code)


def _refuse_reaching_others(asm: _Assembler, pid: int) -> None:
    for number in _SIGNALS_BY_OTHER_WAYS[MACHINE]:
        asm.refuse(number, errno.EPERM)
    for number in _SIGNALS[MACHINE]:
        asm.argument(number, [(_JUMP_EQUAL, pid, -1, _ERRNO | errno.EPERM)])
    asm.argument(_PRLIMIT[MACHINE], [(_JUMP_EQUAL, pid, _ALLOW, -1), (_JUMP_EQUAL, 0, -1, _ERRNO | errno.EPERM)])


class Seccomp:
    """A filter ready to be installed: by the fork server for all programs, since making the buffers takes as long as installing them."""

    def __init__(self, program: bytes) -> None:
        self._code = ctypes.create_string_buffer(program, len(program))
        self._header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(self._code)))
        self._pointer = ctypes.cast(self._header, ctypes.c_void_p)

    def install(self) -> None:
        """For this process and all that it starts; needs no_new_privs."""
        prctl(PR_SET_SECCOMP, 2, self._pointer)


# Landlock's rights: which came with which version of its interface (ABI).
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
_WRITE_FILE = 1 << 1
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_TCP = 1 << 0 | 1 << 1
_ABSTRACT_SOCKETS_AND_SIGNALS = 1 << 0 | 1 << 1


def restrict_files(readable: Iterable[str], writable: Iterable[str], devices: Iterable[str]) -> int:
    """Only these paths from now on, and no TCP; folders with all that is below. Needs no_new_privs. Returns Landlock's ABI, 0 = there is none."""
    abi = landlock_abi()
    if abi == 0:
        return 0
    everything = 0
    for since, rights in _FILE_RIGHTS.items():
        everything |= rights if abi >= since else 0
    attributes = struct.pack("=QQQ", everything, _TCP if abi >= 4 else 0, _ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0)
    ruleset = landlock_create(attributes[: 24 if abi >= 6 else 16 if abi >= 4 else 8])
    try:
        for paths, rights in ((readable, _READ), (writable, everything), (devices, 1 << 2 | _WRITE_FILE)):
            for path in paths:
                _allow(ruleset, path, rights)
        landlock_restrict(ruleset)
    finally:
        os.close(ruleset)
    return abi


def _allow(ruleset: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= 1 << 0 | 1 << 1 | 1 << 2
        landlock_allow(ruleset, parent, rights)
    finally:
        os.close(parent)
