"""Tables of addresses in device memory, for kernels that take a whole list of tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def device_table(words: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on ``device``: ``words``, signed, sent on its current stream without waiting for anything."""
    table = torch.from_numpy(np.array(words, np.int64))
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
