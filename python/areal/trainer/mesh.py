"""Who this rank is among all of them: which data it gets, with whom it shares sequences and parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from areal.config import TrainerLayout


@dataclass(slots=True)
class RankMesh:
    """One rank of a layout. Ranks that share sequences are neighbours: rank = data index * context + context index; so are those of a
    replica: replica = rank // (ranks / replicas).

    With more than one rank, or ``sharded``, ``torch.distributed`` must be initialised. Process groups are made once, at the first call on
    all ranks.
    """

    device: torch.device
    rank: int = 0
    layout: TrainerLayout = field(default_factory=lambda: TrainerLayout(1))
    _shard_mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)
    _context_group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

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

    @property
    def counts(self) -> bool:
        """Whether this rank adds to sums over micro-batches, which are the same on all context ranks."""
        return self.context_index == 0

    def shard_mesh(self) -> DeviceMesh:
        """Over which parameters are sharded: gradients are sums over tokens, so data and context ranks are alike to it.

        (ranks,), or with replicas (replicas, ranks of one), over whose last dimension parameters are sharded.
        """
        if self._shard_mesh is None:
            n, replicas = self.world_size, self.layout.replicas
            if replicas == 1:
                self._shard_mesh = init_device_mesh(self.device.type, (n,), mesh_dim_names=("shard",))
            else:
                self._shard_mesh = init_device_mesh(self.device.type, (replicas, n // replicas), mesh_dim_names=("replica", "shard"))
        return self._shard_mesh

    def context_group(self) -> dist.ProcessGroup | None:
        """The ranks that have this rank's micro-batches, itself included; None where it is alone."""
        context = self.layout.context
        if context > 1 and self._context_group is None:
            mesh = init_device_mesh(self.device.type, (self.layout.data, context), mesh_dim_names=("data", "context"))
            self._context_group = mesh.get_group("context")
        return self._context_group
