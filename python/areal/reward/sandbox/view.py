"""What programs may see of this machine: the interpreter's files and the system's libraries, nothing of anybody's."""

from __future__ import annotations

import os
import site
import sys
import sysconfig

WORK = "/tmp"
"""A program's working folder at the level ``namespaces``."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/alternatives",  # libraries that are symbolic links through there
    "/etc/ld.so.cache",
    "/etc/localtime",
)
_PACKAGE_FOLDERS = ("lib-dynload", "site-packages", "dist-packages")
_STANDARD = sysconfig.get_path("stdlib")


def import_path() -> list[str]:
    """``sys.path`` of programs: the standard library and installed packages, no folders of projects."""
    return [p for p in dict.fromkeys(sys.path) if p == _STANDARD or (os.path.basename(p) in _PACKAGE_FOLDERS and os.path.isdir(p))]


def readable_paths() -> list[str]:
    """Files and folders that programs may read, none of them inside another; symbolic links are given as they are."""
    wide = {"/", "/usr", "/usr/local", "/home", "/root", "/opt", os.path.expanduser("~"), site.getuserbase()}
    own = [p for p in (sys.base_prefix, sys.base_exec_prefix) if p not in wide]
    paths = [*_SYSTEM, *own, _STANDARD, *import_path()]
    found: list[str] = []
    for path in sorted({os.path.normpath(p) for p in paths if os.path.exists(p)}):
        if not any(is_inside(path, other) for other in found):
            found.append(path)
    return found


def is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
