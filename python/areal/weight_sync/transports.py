"""Which sender a run has."""

from __future__ import annotations

from pathlib import Path

import torch

from areal.config import GRPOConfig
from areal.weight_sync.stream import Sender


def make_sender(config: GRPOConfig, model_folder: Path, run_folder: Path, device: torch.device) -> Sender:
    """Rank 0's end of the configured transport. ``ValueError`` for shm, which does not stream."""
    sync = config.weight_sync
    match config.transport:
        case "broadcast":
            from areal.weight_sync.broadcast import BroadcastSender

            # With retract, requests wait inside of the server, which cannot flush its cache then.
            return BroadcastSender(device, timeout=sync.timeout, flush_cache=config.update_mode == "abort")
        case transport:
            raise ValueError(f"weights do not stream over the transport '{transport}'")
