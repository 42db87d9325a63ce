"""Weights out of the ranks, a bucket at a time: each rank casts what it holds of a bucket, rank 0 receives it where it belongs.

FSDP2 cuts a parameter along its first dimension as ``torch.chunk`` does: equal pieces from the first rank on, and the last ranks may
hold a smaller piece or none. A piece is thus one range of bytes of the whole tensor, so rank 0 receives every piece straight into the
bucket and needs no memory besides it; another rank needs its own part of the bucket, and only where it has to cast. With replicas (HSDP)
each of them has all pieces; those of the first one go out.

A weight with an adapter leaves as W + scale * B A: W and B are cut alike, so a rank adds the product to its own rows, for which it needs all of
A. So there is never a second model either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from areal.models.checkpoint_names import CheckpointNames
from areal.models.lora import Adapters, base_parameters
from areal.ops.flatten_weights import flatten_weights
from areal.ops.weights_layout import ALIGNMENT
from areal.trainer.sharding import local_part
from areal.weight_sync.stream import BucketPlan, plan_buckets


class WeightGatherer:
    """Parameters of one rank by name. Tied ones count once; all ranks make the same calls in the same order."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor] | nn.Module,
        dtype: torch.dtype,
        rank: int,
        world_size: int,
        names: CheckpointNames | None = None,
        adapters: Adapters | None = None,
        device: torch.device | None = None,
    ) -> None:
        """``dtype``: what they are cast to on their way. ``names``: what they are called there, if not as here. ``adapters``: of them.
        ``device``: from where they go, if they are elsewhere (offloaded)."""
        self._parameters: Mapping[str, Tensor] = base_parameters(parameters) if isinstance(parameters, nn.Module) else parameters
        self._adapters = adapters
        self._dtype = dtype
        self._rank = rank
        self._n_shards = world_size
        self._device = device
        self._names = names if names is not None and not names.is_identity else None
        self._in_memory: dict[BucketPlan, BucketPlan] = {}
        """From a bucket as the wire describes it to the same bytes as parameters, where these differ."""
        for name, parameter in self._parameters.items():
            if isinstance(parameter, DTensor):
                if parameter.placements not in ((Shard(0),), (Replicate(), Shard(0))):
                    raise ValueError(
                        f"parameter '{name}' is sharded as {parameter.placements}; weights are gathered from shards of dimension 0"
                    )
                self._n_shards = parameter.device_mesh.size(-1)

    def bucket_plan(self, bucket_bytes: int) -> list[BucketPlan]:
        """The same on every rank. Tensors of whole cache lines come first, so that ``flatten_weights`` can lay them out without gaps."""
        if self._names is None:
            return self._plan(bucket_bytes)
        planned = {self._names.on_the_wire(bucket): bucket for bucket in self._plan(bucket_bytes)}
        self._in_memory |= planned
        return list(planned)

    def manifest(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor of ``parts``."""
        return [(name, tuple(p.shape), self._dtype) for name, p in self._parameters.items()]

    def _plan(self, bucket_bytes: int) -> list[BucketPlan]:
        itemsize = self._dtype.itemsize
        return plan_buckets(sorted(self.manifest(), key=lambda t: torch.Size(t[1]).numel() * itemsize % ALIGNMENT != 0), bucket_bytes)

    def as_parameters(self, bucket: BucketPlan) -> BucketPlan:
        """The same bytes as one of ``bucket_plan``'s buckets, by the names that the parameters have here."""
        return self._in_memory.get(bucket, bucket)

    def gather(self, bucket: BucketPlan, out: Tensor | None) -> None:
        """Fills ``out`` (uint8 [bucket.nbytes], on the parameters' device) on rank 0; None elsewhere. A collective."""
        bucket = self.as_parameters(bucket)
        if self._rank >= self._n_shards:
            return  # of another replica
        with torch.no_grad():
            here = {spec.name: self._piece(spec.name) for spec in bucket.tensors}  # collectives of adapters come before the rows
            if self._rank != 0:
                self._send(here)
                return
            assert out is not None
            if self._n_shards == 1:
                self._fill(bucket, here, out)
                return
            receiving = [
                dist.P2POp(dist.irecv, rows, rank) for rank in range(1, self._n_shards) for rows in self._pieces(bucket, out, rank)
            ]
            works = dist.batch_isend_irecv(receiving) if receiving else []
            sources = [piece for piece in here.values() if piece.numel()]
            for target, source in zip(self._pieces(bucket, out, 0), sources, strict=True):
                target.copy_(source)
            for work in works:
                work.wait()

    def parts(self, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
        """All parameters by their own names, for somebody on this machine who copies them: a collective, of which the ranks but 0 get empty parts.

        A rank that shards with no other hands out its own parameters, not cast, in one part, unless they have adapters. Otherwise a part is
        a bucket, in memory that the next part uses again.
        """
        if self._n_shards == 1 and self._adapters is None:
            yield {} if self._rank else {name: self._local(name) for name in self._parameters}
            return
        buckets = self._plan(bucket_bytes)
        memory = None
        if self._rank == 0:
            device = self._device or self._local(next(iter(self._parameters))).device
            memory = torch.empty(max(bucket.nbytes for bucket in buckets), dtype=torch.uint8, device=device)
        for bucket in buckets:
            out = None if memory is None else memory[: bucket.nbytes]
            self.gather(bucket, out)
            yield {} if out is None else {spec.name: spec.view(out) for spec in bucket.tensors}

    def _piece(self, name: str) -> Tensor:
        """This rank's piece of a parameter, on the device from where it goes; on one rank all of it. A collective if it has an adapter."""
        local = self._local(name)
        local = local if self._device is None else local.to(self._device)
        return local if self._adapters is None else self._adapters.added_to(name, local)

    def _local(self, name: str) -> Tensor:
        return local_part(self._parameters[name].detach())

    def _pieces(self, bucket: BucketPlan, out: Tensor, rank: int) -> Iterator[Tensor]:
        """Where the pieces that ``rank`` holds lie in the bucket, without those that are empty."""
        for spec in bucket.tensors:
            chunk = -(-spec.shape[0] // self._n_shards)
            rows = spec.view(out)[rank * chunk : (rank + 1) * chunk]
            if rows.numel():
                yield rows

    def _fill(self, bucket: BucketPlan, here: Mapping[str, Tensor], out: Tensor) -> None:
        """All of a bucket, when this rank has everything."""
        aligned: dict[str, Tensor] = {}
        for spec in bucket.tensors:
            if spec.offset % ALIGNMENT or spec.nbytes % ALIGNMENT or not here[spec.name].is_contiguous():
                break
            aligned[spec.name] = here[spec.name]
        flatten_weights(aligned, out, self._dtype)
        for spec in bucket.tensors[len(aligned) :]:
            spec.view(out).copy_(here[spec.name])

    def _send(self, here: Mapping[str, Tensor]) -> None:
        """This rank's pieces, cast together; those that need no cast go out from where they are."""
        pieces = {name: piece.contiguous() for name, piece in here.items() if piece.numel()}
        if not pieces:
            return
        if any(piece.dtype != self._dtype for piece in pieces.values()):
            flat, layout = flatten_weights(pieces, dtype=self._dtype)
            pieces = {e.name: flat[e.offset : e.offset + e.nbytes].view(e.dtype) for e in layout.entries}
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, piece, 0) for piece in pieces.values()]):
            work.wait()
