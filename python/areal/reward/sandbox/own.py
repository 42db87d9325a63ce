"""The harness's builtins, which are not those that a program can change: each module of it imports them as its ``__builtins__``."""

from __future__ import annotations

import builtins

BUILTINS = dict(vars(builtins))
