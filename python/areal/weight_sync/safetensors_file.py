"""Safetensors files without a copy too many: headers made for a bucket's bytes, and tensors read straight into memory that is there.

The format: 8 bytes little-endian length of the header, the header in JSON (name -> dtype, shape, [begin, end) in the data), the data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from areal.weight_sync.stream import TensorSpec

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64",
    torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LONGEST_HEADER = 100 << 20
_READ_PIECE = 1 << 30  # Linux reads at most 2 GiB a call


def header_bytes(tensors: Iterable[TensorSpec]) -> bytes:
    """What comes before the data, which begins at a multiple of 8 bytes. ``ValueError`` for a dtype that the format lacks."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for spec in tensors:
        if spec.dtype not in _NAMES:
            raise ValueError(f"'{spec.name}' is {spec.dtype}, which safetensors files do not take")
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [spec.offset, spec.offset + spec.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file. ``ValueError`` if it is no safetensors file, or shorter than it says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            entries: Mapping[str, Any] = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        tensors = {name: _tensor(path, 8 + length, entry) for name, entry in entries.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.offset + tensor.nbytes > size:
            raise ValueError(f"{path} has {size} bytes; '{name}' ends at {tensor.offset + tensor.nbytes}")
    return tensors


def _tensor(path: Path, data: int, entry: Mapping[str, Any]) -> FileTensor:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if end - begin != torch.Size(shape).numel() * dtype.itemsize or begin < 0:
        raise ValueError(f"{shape} of {dtype} in {end - begin} bytes")
    return FileTensor(path, dtype, shape, data + begin, end - begin)


def read_tensor(descriptor: int, source: FileTensor, target: Tensor) -> None:
    """Reads a tensor of the open file into ``target`` (same shape), cast if its dtype is another. ``OSError`` if the file is cut short."""
    direct = target.device.type == "cpu" and target.dtype == source.dtype and target.is_contiguous()
    memory = target if direct else torch.empty(source.shape, dtype=source.dtype)
    rest = memory.detach().reshape(-1).view(torch.uint8).numpy().data if source.nbytes else memoryview(b"")
    offset = source.offset
    while rest:
        n = os.preadv(descriptor, [rest[:_READ_PIECE]], offset)
        if n == 0:
            raise OSError(f"{source.path} ends at byte {offset}, in the middle of a tensor")
        rest, offset = rest[n:], offset + n
    if not direct:
        target.copy_(memory)
