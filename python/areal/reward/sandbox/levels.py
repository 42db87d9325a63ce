"""Which level of isolation this machine has: found out by running a program at it."""

from __future__ import annotations

import functools

from .client import ForkServer, start
from .judge import LevelMissing
from .limits import Isolation

HINT = (
    "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, "
    "user.max_user_namespaces above 0; in Docker --security-opt seccomp=unconfined --security-opt systempaths=unconfined)"
)


def describe_server(server: ForkServer) -> str:
    landlock = f"Landlock {server.landlock}" if server.landlock else ""
    return f"{server.level} ({', '.join([*filter(None, [landlock]), *server.notes]) or 'no notes'})"


@functools.cache
def describe(isolation: Isolation) -> str:
    """The level that programs get, with what is to be known about it.

    Raises:
        LevelMissing: the machine does not have it.
        SandboxError: none works.
    """
    server = start(isolation)
    try:
        return describe_server(server)
    finally:
        server.close()


@functools.cache
def namespaces_missing() -> str:
    """Why the level ``namespaces`` cannot be had here; empty where it can."""
    try:
        describe("namespaces")
    except LevelMissing as error:
        return str(error)
    return ""
