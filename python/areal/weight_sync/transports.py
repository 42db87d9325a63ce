"""Which sender a run has."""

from __future__ import annotations

from pathlib import Path

import torch

from areal.config import GRPOConfig
from areal.weight_sync.adapter import AdapterInfo
from areal.weight_sync.stream import Sender


def weights_folder(config: GRPOConfig, run_folder: Path) -> Path:
    """Where transport disk puts versions: a folder of this run's own."""
    if not config.weight_sync.folder:
        return run_folder / "weights"
    return Path(config.weight_sync.folder).expanduser().absolute() / config.experiment_name / config.trial_name


def make_sender(
    config: GRPOConfig, model_folder: Path, run_folder: Path, device: torch.device, adapter: AdapterInfo | None = None
) -> Sender:
    """Rank 0's end of the configured transport. ``ValueError`` for shm, which does not stream.

    ``adapter``: what is sent are the factors of adapters, which disk alone can stream.
    """
    sync = config.weight_sync
    match config.transport:
        case "broadcast":
            from areal.weight_sync.broadcast import BroadcastSender

            # With retract, requests wait inside of the server, which cannot flush its cache then.
            return BroadcastSender(device, timeout=sync.timeout, flush_cache=config.update_mode == "abort")
        case "disk":
            from areal.weight_sync.disk import DiskSender

            folder = weights_folder(config, run_folder)
            return DiskSender(folder, model_folder, device=device, timeout=sync.timeout, adapter=adapter)
        case "tensor":
            from areal.weight_sync.tensor import TensorSender

            return TensorSender(device, timeout=sync.timeout, flush_cache=config.update_mode == "abort")
        case transport:
            raise ValueError(f"weights do not stream over the transport '{transport}'")
