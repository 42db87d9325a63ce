"""Weights on their way in buckets: what every transport that streams shares.

The trainer's ranks gather one bucket at a time, all of them together; rank 0 hands it to a ``Sender``, which has it on the wire while
the next one is gathered. No rank ever holds more than its own parameters and two buckets.

A bucket is uint8 memory with its tensors one directly behind the other, without gaps: the form of SGLang's ``flattened_bucket`` and of
the data section of a safetensors file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from areal.ops.weights_hash import weights_hash

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a bucket, by the name that goes over the wire (that of a Hugging Face checkpoint)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Bytes from the start of the bucket."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, data: Tensor) -> Tensor:
        """This tensor in the bucket's memory; a copy where the offset is no multiple of the dtype's size."""
        raw = data[self.offset : self.offset + self.nbytes]
        if (raw.storage_offset() + raw.untyped_storage().data_ptr()) % self.dtype.itemsize:
            raw = raw.clone()
        return raw.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """What one bucket holds; every rank makes the same plan."""

    index: int
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        last = self.tensors[-1]
        return last.offset + last.nbytes


@dataclass(frozen=True, slots=True)
class Target:
    """A rollout server that is to get weights."""

    url: str
    n_ranks: int = 1
    """Its tensor-parallel ranks."""


@dataclass(slots=True)
class Outcome:
    """What became of one target."""

    url: str
    error: str | None = None
    """One sentence that names server, bucket and parameter; None = it has all buckets."""


@dataclass(frozen=True, slots=True)
class SendResult:
    """What became of one update, for the controller."""

    outcomes: list[Outcome]
    hash: int | None
    """``weights_hash`` of what was sent, by the names that the servers hold it under; None if it was not asked for."""
    seconds: float
    """From the first gather to the last server's answer."""


class Sender(Protocol):
    """Rank 0's end of a transport. One update at a time: begin, then buffer and send for every bucket in order, then finish."""

    def begin(self, version: int, buckets: Sequence[BucketPlan], targets: Sequence[Target]) -> None:
        """Gets ready, connecting targets that are new. A target that fails here or later is left out of the rest of this update."""
        ...

    def buffer(self, bucket: BucketPlan) -> Tensor:
        """Memory for a bucket, uint8 [nbytes], on the trainer's device; waits until one of the two is free."""
        ...

    def send(self, bucket: BucketPlan, data: Tensor) -> None:
        """Puts ``data`` (what ``buffer`` gave, filled) on the way to every target and returns at once."""
        ...

    def finish(self, digest: int | None = None) -> list[Outcome]:
        """Waits, at most until the deadline, and says what became of every target. ``digest``: the hash of all that was sent, if known."""
        ...

    def close(self) -> None: ...


def plan_buckets(tensors: Iterable[tuple[str, Sequence[int], torch.dtype]], bucket_bytes: int) -> list[BucketPlan]:
    """Cuts tensors, in their order, into buckets of at most ``bucket_bytes``; a larger tensor has one of its own."""
    buckets: list[BucketPlan] = []
    specs: list[TensorSpec] = []
    end = 0
    for name, shape, dtype in tensors:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if specs and end + nbytes > bucket_bytes:
            buckets.append(BucketPlan(len(buckets), tuple(specs)))
            specs, end = [], 0
        specs.append(TensorSpec(name, tuple(shape), dtype, end))
        end += nbytes
    if specs:
        buckets.append(BucketPlan(len(buckets), tuple(specs)))
    return buckets


def stream_weights(
    gather: Callable[[BucketPlan, Tensor | None], None],
    buckets: Sequence[BucketPlan],
    sender: Sender | None,
    version: int,
    targets: Sequence[Target] = (),
    want_hash: bool = False,
    as_held: Callable[[BucketPlan], BucketPlan] = lambda bucket: bucket,
) -> SendResult | None:
    """One update, bucket by bucket: a collective. Ranks other than 0 have no ``sender`` and get None.

    ``as_held``: a bucket as the servers know its bytes, where they give them other names than the wire; the hash is by these.
    Also when every target has failed all buckets are gathered, because the other ranks would wait for rank 0.
    """
    if sender is None:
        for bucket in buckets:
            gather(bucket, None)
        return None
    start = time.monotonic()
    digest = 0
    sender.begin(version, buckets, targets)
    for bucket in buckets:
        data = sender.buffer(bucket)
        gather(bucket, data)
        sender.send(bucket, data)
        if want_hash:  # while it is on the wire, which only reads it
            digest += weights_hash({spec.name: spec.view(data) for spec in as_held(bucket).tensors})
    known = digest & _MASK if want_hash else None
    return SendResult(sender.finish(known), known, time.monotonic() - start)


def hash_tensors(
    gather: Callable[[BucketPlan, Tensor | None], None], buckets: Sequence[BucketPlan], device: torch.device | None
) -> dict[str, int]:
    """``weights_hash`` of each tensor alone, as it would be sent: a collective. ``device`` is None on ranks other than 0."""
    found: dict[str, int] = {}
    for bucket in buckets:
        data = None if device is None else torch.empty(bucket.nbytes, dtype=torch.uint8, device=device)
        gather(bucket, data)
        if data is not None:
            found |= {spec.name: weights_hash({spec.name: spec.view(data)}) for spec in bucket.tensors}
    return found
