"""Who this rank is among all of them: which data it gets, with whom it shares sequences and parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from areal.config import TrainerLayout


@dataclass(slots=True)
class RankMesh:
    """One rank of a layout. Ranks that share sequences are neighbours: rank = data index * context + context index.

    With more than one rank, or ``sharded``, ``torch.distributed`` must be initialised.
    """

    device: torch.device
    rank: int = 0
    layout: TrainerLayout = field(default_factory=lambda: TrainerLayout(1))

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def data_index(self) -> int:
        """Which part of a batch this rank gets."""
        return self.rank // self.layout.context

    @property
    def context_index(self) -> int:
        """Which part of each micro-batch's tokens."""
        return self.rank % self.layout.context

    def shard_mesh(self) -> DeviceMesh:
        """Of all ranks, over which parameters are sharded: gradients are sums over tokens, so data and context ranks are alike to it."""
        return init_device_mesh(self.device.type, (self.world_size,))
