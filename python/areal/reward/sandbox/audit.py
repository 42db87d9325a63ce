"""What programs may not ask of the interpreter while they are tested: the frames of those who call them, and what finds everything.

Honest programs have no use for them, and modules of the library may go on using them. It is no wall (``ctypes`` is there), but what is
needed to skip the lines of a test, or to take the token of a pass out of the harness, is no longer two lines of Python.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident
from collections.abc import Callable
from typing import Any

from .own import BUILTINS as __builtins__  # type: ignore[no-redef]  # noqa: F401
from .view import import_path

_LIBRARY = ("<tests>", "<frozen ", *(os.path.join(folder, "") for folder in (os.path.dirname(__file__), *import_path())))
"""How the file names begin of code that may: the tests', the harness's, the library's."""
_FRAMES = frozenset(("tb_frame", "gi_frame", "cr_frame", "ag_frame"))
_TRACING = ("sys.settrace", "sys.monitoring.register_callback")
_REFUSED = frozenset(
    (
        *("sys._getframe", "sys._current_frames", "sys._current_exceptions", "sys.setprofile", "sys.addaudithook", *_TRACING),
        *("gc.get_objects", "gc.get_referrers", "gc.get_referents", "object.__getattr__"),
    )
)
_MAY_TRACE = ("threading.py", "doctest.py", "snapshot.py")
_GIVERS = {
    "inspect.py": ("currentframe", "stack", "trace", "getinnerframes", "getouterframes"),
    "traceback.py": ("walk_stack", "walk_tb"),
    "__init__.py": ("currentframe", "<lambda>"),  # logging
}
"""Functions of the library that hand out frames: who calls them is asked, not they."""


def refuse_frames() -> None:
    """From now on in this process, and nothing takes it back.

    What is refused raises RuntimeError; ``sys.addaudithook`` does nothing.
    """
    sys.addaudithook(_make_hook(sys._getframe))


def _make_hook(getframe: Callable[[int], Any]) -> Callable[[str, tuple[Any, ...]], None]:
    asking = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal asking
        if event not in _REFUSED or (event == "object.__getattr__" and args[1] not in _FRAMES) or asking == get_ident():
            return
        asking = get_ident()  # what we ask is such an event too
        try:
            frame = getframe(1)
        finally:
            asking = 0
        while frame is not None:
            code = frame.f_code
            file = code.co_filename.rpartition("/")[2]
            if not code.co_filename.startswith(_LIBRARY) or (event in _TRACING and file not in _MAY_TRACE):
                raise RuntimeError(f"{event} is not for programs that are tested")
            if code.co_name not in _GIVERS.get(file, ()):
                return
            frame = frame.f_back

    return hook
