"""Where each tensor lies in a bucket of weights. Plain numbers and names, so it can go over a wire as JSON."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes of which every offset in a bucket is a multiple: a cache line, the widest vector of a CPU, four of a GPU's widest loads."""

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128,
)  # fmt: skip
"""What tensors of a bucket may be, in the order of the codes that the registered ops take."""

_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_CAST = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """One tensor of a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Bytes from the start of the bucket."""

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True, slots=True)
class WeightsLayout:
    """The tensors of a bucket in their order, none over another, each at a multiple of ``ALIGNMENT`` bytes; gaps hold zeros.

    ``ValueError`` for entries that overlap, leave the bucket, or repeat a name.
    """

    entries: tuple[LayoutEntry, ...]
    nbytes: int
    """Bytes of the bucket, gaps included."""

    def __post_init__(self) -> None:
        end, names = 0, set()
        for entry in self.entries:
            if (
                entry.offset < end
                or entry.offset % ALIGNMENT
                or entry.offset + entry.nbytes > self.nbytes
                or min(entry.shape, default=0) < 0
            ):
                raise ValueError(f"weights layout: '{entry.name}' of {entry.nbytes} bytes cannot lie at offset {entry.offset}")
            if entry.dtype not in DTYPES:
                raise ValueError(f"weights layout: '{entry.name}' is {entry.dtype}, which a bucket does not take")
            end = entry.offset + entry.nbytes
            names.add(entry.name)
        if len(names) != len(self.entries):
            raise ValueError("weights layout: it names a tensor twice")

    @classmethod
    def plan(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Self:
        """The layout of ``tensors`` in their order; floating ones of 16 bits and more become ``dtype``, if given."""
        described = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        if torch.compiler.is_compiling():
            return cls(*_lay_out(described, dtype))
        return cls._planned(described, dtype)

    @classmethod
    @functools.lru_cache(maxsize=16)  # a transport sends the same tensors again and again
    def _planned(cls, described: tuple[tuple[str, torch.Size, torch.dtype], ...], dtype: torch.dtype | None) -> Self:
        return cls(*_lay_out(described, dtype))

    def to_json(self) -> dict[str, Any]:
        """Made of what JSON has: {"nbytes": 128, "tensors": [{"name": "w", "shape": [2, 3], "dtype": "bfloat16", "offset": 0}]}."""
        tensors = [
            {"name": e.name, "shape": list(e.shape), "dtype": str(e.dtype).removeprefix("torch."), "offset": e.offset} for e in self.entries
        ]
        return {"nbytes": self.nbytes, "tensors": tensors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What ``to_json`` made; ``ValueError`` for anything else."""
        try:
            entries = tuple(_entry(tensor) for tensor in data["tensors"])
            return cls(entries, int(data["nbytes"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"weights layout: {error!r} in {str(data)[:200]}") from error

    def gaps(self) -> Iterable[tuple[int, int]]:
        """Begin and end of what lies between the tensors and after the last one."""
        ends = [entry.offset for entry in self.entries[1:]] + [self.nbytes]
        return ((entry.offset + entry.nbytes, end) for entry, end in zip(self.entries, ends, strict=True))


def _lay_out(described: tuple[tuple[str, torch.Size, torch.dtype], ...], dtype: torch.dtype | None) -> tuple[tuple[LayoutEntry, ...], int]:
    entries, offset = [], 0
    for name, shape, found in described:
        entry = LayoutEntry(name, tuple(shape), dtype if dtype is not None and found in _CAST else found, offset)
        entries.append(entry)
        offset += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(entries), offset


def _entry(tensor: Mapping[str, Any]) -> LayoutEntry:
    return LayoutEntry(str(tensor["name"]), tuple(int(n) for n in tensor["shape"]), _BY_NAME[tensor["dtype"]], int(tensor["offset"]))
