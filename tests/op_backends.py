"""Which backends of an op a test runs on, and on which device: pytest parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


def backends(*names: str) -> list[Any]:
    """Parameters (backend, device) for those of ``names`` out of torch, cpp, triton, cuda.

    The CPU runs torch, cpp, triton in its interpreter and, through the fixture ``cuda_on_host``, cuda; the same again on a GPU, marked
    ``gpu``. A test with these parameters takes the fixture ``on_backend``, which prepares what the backend needs.
    """
    on_cpu = [pytest.param(name, "cpu", id=name) for name in names if not (name == "triton" and HAS_GPU)]
    on_gpu = [pytest.param(name, "cuda", id=f"{name}-gpu", marks=pytest.mark.gpu) for name in names if name != "cpp"]
    return on_cpu + on_gpu
