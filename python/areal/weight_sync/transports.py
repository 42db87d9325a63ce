"""Which sender a run has."""

from __future__ import annotations

from pathlib import Path

import torch

from areal.config import GRPOConfig
from areal.weight_sync.stream import Sender


def weights_folder(config: GRPOConfig, run_folder: Path) -> Path:
    """Where transport disk puts versions: a folder of this run's own."""
    if not config.weight_sync.folder:
        return run_folder / "weights"
    return Path(config.weight_sync.folder).expanduser().absolute() / config.experiment_name / config.trial_name


def make_sender(config: GRPOConfig, model_folder: Path, run_folder: Path, device: torch.device) -> Sender:
    """Rank 0's end of the configured transport. ``ValueError`` for shm, which does not stream."""
    sync = config.weight_sync
    match config.transport:
        case "broadcast":
            from areal.weight_sync.broadcast import BroadcastSender

            # With retract, requests wait inside of the server, which cannot flush its cache then.
            return BroadcastSender(device, timeout=sync.timeout, flush_cache=config.update_mode == "abort")
        case "disk":
            from areal.weight_sync.disk import DiskSender

            return DiskSender(weights_folder(config, run_folder), model_folder, device=device, timeout=sync.timeout)
        case "tensor":
            from areal.weight_sync.tensor import TensorSender

            return TensorSender(device, timeout=sync.timeout, flush_cache=config.update_mode == "abort")
        case transport:
            raise ValueError(f"weights do not stream over the transport '{transport}'")
