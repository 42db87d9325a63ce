"""The Linux calls that Python's library does not have, by ctypes. Errors are ``OSError`` with the call's name."""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NEWTIME, CLONE_NEWCGROUP = 0x00000080, 0x02000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
# From 424 on, the numbers of all architectures are the same.
_SYS_MOUNT_SETATTR = 442
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_ADD_RULE, _SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_LANDLOCK_RULE_PATH_BENEATH = 1
_CAPABILITY_VERSION_3 = 0x20080522

MACHINE = os.uname().machine
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {source} on {target}")


def unmount(target: str, flags: int) -> None:
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    _check(_syscall(ctypes.c_long(_SYS_PIVOT_ROOT[MACHINE]), new.encode(), old.encode()), "pivot_root")


def make_read_only(target: str, *, below: bool = True) -> None:
    """The mount at ``target``, and all ``below`` it, also for their owner. Linux 5.12."""
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    flags, size = ctypes.c_long(_AT_RECURSIVE if below else 0), ctypes.c_long(len(attributes))
    number, here = ctypes.c_long(_SYS_MOUNT_SETATTR), ctypes.c_long(_AT_FDCWD)
    _check(_syscall(number, here, target.encode(), flags, attributes, size), f"mount_setattr {target}")


def prctl(option: int, value: int = 0, pointer: ctypes.c_void_p | None = None) -> None:
    _check(
        _libc.prctl(option, ctypes.c_ulong(value), pointer or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), f"prctl {option}"
    )


def drop_capabilities() -> None:
    """All of them; with no_new_privs nothing that this process starts gets any back."""
    header, nothing = struct.pack("=II", _CAPABILITY_VERSION_3, 0), bytes(24)
    _check(_syscall(ctypes.c_long(_SYS_CAPSET[MACHINE]), header, nothing), "capset")


def landlock_abi() -> int:
    """0 where the kernel has none, or has it switched off."""
    return max(0, _syscall(ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET), None, ctypes.c_long(0), ctypes.c_long(1)))


def landlock_create(attributes: bytes) -> int:
    number = ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET)
    return _check(_syscall(number, attributes, ctypes.c_long(len(attributes)), ctypes.c_long(0)), "landlock_create_ruleset")


def landlock_allow(ruleset: int, parent: int, access: int) -> None:
    rule = struct.pack("=Qi", access, parent)
    number, kind = ctypes.c_long(_SYS_LANDLOCK_ADD_RULE), ctypes.c_long(_LANDLOCK_RULE_PATH_BENEATH)
    _check(_syscall(number, ctypes.c_long(ruleset), kind, rule, ctypes.c_long(0)), "landlock_add_rule")


def landlock_restrict(ruleset: int) -> None:
    _check(_syscall(ctypes.c_long(_SYS_LANDLOCK_RESTRICT_SELF), ctypes.c_long(ruleset), ctypes.c_long(0)), "landlock_restrict_self")
