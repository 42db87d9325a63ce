"""Where SGLang is, for tests. The standard library only: conftest asks also where nothing of the trainer is installed."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sglang_python() -> str | None:
    """The interpreter that has SGLang, None where there is none."""
    named = os.environ.get("AREAL_SGLANG_PYTHON")
    if named:
        return named
    own = ROOT / ".venv-sglang" / "bin" / "python"
    return str(own) if own.exists() else None
