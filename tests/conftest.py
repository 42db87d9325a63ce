"""What every test shares: one thread, and tests that need a GPU or SGLang are skipped where there is none."""

from __future__ import annotations

import importlib.util

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if importlib.util.find_spec("sglang") is None:
        missing["sglang"] = "needs SGLang"
    for item in items:
        for marker in missing.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))
