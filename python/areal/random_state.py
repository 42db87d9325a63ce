"""The state of a process's random numbers as plain values that JSON takes: Python's, numpy's global ones, and torch's where it is loaded."""

from __future__ import annotations

import base64
import random
import sys
from typing import Any

import numpy as np


def random_state() -> dict[str, Any]:
    """Of this process, now."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "numpy": [name, np.asarray(keys).tolist(), *rest]}
    if (torch := sys.modules.get("torch")) is not None:
        state["torch"] = _text(torch.get_rng_state())
        if torch.cuda.is_initialized():
            state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """As ``random_state`` found it; what this process or the other one does not have is left as it is."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    if (torch := sys.modules.get("torch")) is not None:
        if "torch" in state:
            torch.set_rng_state(_tensor(torch, state["torch"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_tensor(torch, state["cuda"]))


def _text(tensor: Any) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _tensor(torch: Any, text: str) -> Any:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
