"""A 64-bit hash of a model's weights: equal on two sides, they hold the same bits.

    hash = sum over tensors t of [ mix(key_t) + sum over words i of mix(word_i xor (key_t + i * golden)) ]   (mod 2^64)

``word_i`` are the tensor's bytes in memory order, row-major, eight at a time and little-endian, zero-padded at its end; ``key_t`` is
BLAKE2b-64 of its name, dtype and shape; ``mix`` is the finaliser of splitmix64 and ``golden`` its increment (Steele, Lea, Flood 2014,
"Fast splittable pseudorandom number generators"). It is a sum, so neither the order of the tensors nor how they are cut for transport
matters; ``mix`` is a bijection, so a change of any one word changes it. Values are compared as bits: 0.0 is not -0.0. It guards against
accidents, not against an adversary.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from areal.ops._dispatch import backend_for, choose_backend, compiled_module, missing_cpp, missing_cuda
from areal.ops._pointer_table import device_table
from areal.ops._registration import cuda_stream, define_op, on_device

Backend = Literal["cpp", "cuda", "torch"]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_REFERENCE_CHUNK = 2**22  # bytes that the torch reference works on at a time; it makes several copies of them


class HashedCopy(NamedTuple):
    """One tensor of ``copy_and_hash``; the target, of the same shape, is contiguous and on the CPU, and its dtype is that of the hash."""

    key: int
    source: Tensor
    target: Tensor


def tensor_key(name: str, shape: Iterable[int], dtype: torch.dtype) -> int:
    """The 64-bit key of a tensor's name, dtype and shape."""
    return _key(name, tuple(shape), dtype)


@functools.lru_cache(maxsize=2**15)  # a model's tensors are hashed after every step
def _key(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    text = f"{name}\0{str(dtype).removeprefix('torch.')}\0{','.join(map(str, shape))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def weights_hash(tensors: Mapping[str, Tensor], *, backend: Backend | None = None) -> int:
    """The hash of named tensors (any shapes, dtypes and strides; on the CPU, on CUDA devices, or mixed), in [0, 2^64).

    Without ``backend`` the tensors of each device are hashed where they are, by ``cpp`` or ``cuda`` if built (one launch a device, and
    one wait for its result), else by ``torch``. ``TypeError`` for tensors without plain storage (DTensor, meta, sparse),
    ``BackendUnavailable`` if a forced backend cannot reach a tensor's device.
    """
    by_device: defaultdict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        check_plain(name, tensor)
        key = _signed(tensor_key(name, tensor.shape, tensor.dtype))
        by_device[tensor.device].append((key, tensor.detach().contiguous()))
    if not by_device:
        choose_backend("weights_hash", {"cpp": missing_cpp(), "cuda": missing_cuda(), "torch": None}, backend)
    # All devices are started before the first result is waited for.
    sums = [_op([tensor for _, tensor in keyed], [key for key, _ in keyed], backend) for keyed in by_device.values()]
    return sum(int(part.item()) for part in sums) & _MASK


def copy_and_hash(copies: Iterable[HashedCopy], *, backend: Literal["cpp", "torch"] | None = None) -> int:
    """Copies each source into its target, cast to its dtype, and returns the hash of what the targets hold.

    Sources may be written by others meanwhile (shared memory): the hash is that of the bytes that arrived.
    """
    rows: list[tuple[int, int, int, int]] = []
    hashed = 0
    which = choose_backend("copy_and_hash", {"cpp": missing_cpp(), "torch": None}, backend)
    for key, source, target in copies:
        if which == "cpp" and source.device.type == "cpu" and source.dtype == target.dtype and source.is_contiguous():
            rows.append((source.data_ptr(), target.data_ptr(), target.nbytes, key))
            continue
        target.copy_(source)
        if which == "cpp":
            rows.append((target.data_ptr(), 0, target.nbytes, key))
        else:
            hashed += int(_torch(_signed(key), target).item())
    return (hashed + (_run_cpp(rows) if rows else 0)) & _MASK


def check_plain(name: str, tensor: Tensor) -> None:
    """``TypeError`` if a tensor has no storage of its own that could be copied or hashed."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"weights: '{name}' is a {type(tensor).__name__}; give plain tensors (full_tensor() of a DTensor)")
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise TypeError(f"weights: '{name}' is a {tensor.device.type} tensor of layout {tensor.layout}; it needs strided storage")


def _run(tensors: list[Tensor], keys: list[int], backend: str | None) -> Tensor:
    """int64 [] on the tensors' device: the hash of contiguous tensors of one device, with their keys, as a signed number."""
    device = tensors[0].device
    match backend_for("weights_hash", device, backend, has=("cpp", "cuda", "torch")):
        case "cpp":
            return torch.tensor(_signed(_run_cpp([(t.data_ptr(), 0, t.nbytes, key & _MASK) for key, t in zip(keys, tensors, strict=True)])))
        case "cuda":
            return _cuda(tensors, keys)
        case _:
            return torch.stack([_torch(key, tensor) for key, tensor in zip(keys, tensors, strict=True)]).sum()


def _fake(tensors: list[Tensor], keys: list[int], backend: str | None) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.int64)


_op = define_op("weights_hash(Tensor[] tensors, int[] keys, str? backend) -> Tensor", _run, _fake)


def _run_cpp(rows: list[tuple[int, int, int, int]]) -> int:
    module = compiled_module()
    assert module is not None
    return module.copy_and_hash(rows, torch.get_num_threads())


def _cuda(tensors: list[Tensor], keys: list[int]) -> Tensor:
    module = compiled_module()
    assert module is not None
    chunk = module.weights_hash_cuda_chunk
    table, n_chunks = [], 0
    for key, tensor in zip(keys, tensors, strict=True):
        table += [tensor.data_ptr(), tensor.nbytes, key, n_chunks]
        n_chunks += max(1, -(-tensor.nbytes // chunk))
    # The sum starts as the 0 behind the rows, and so needs no launch of its own.
    rows = device_table([*table, 0], tensors[0].device)
    with on_device(tensors[0]):
        module.weights_hash_cuda(rows.data_ptr(), len(tensors), n_chunks, rows[-1].data_ptr(), cuda_stream(rows))
    return rows[-1]


def _signed(word: int) -> int:
    return (word & _MASK) - 2**64 if word & 2**63 else word & _MASK


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products and sums wrap; its right shifts are arithmetic, hence the masks."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_MULTIPLIER_1)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_MULTIPLIER_2)
    return x ^ ((x >> 31) & (2**33 - 1))


def _torch(key: int, tensor: Tensor) -> Tensor:
    total = _mix(torch.tensor([key], device=tensor.device)).sum()
    data = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    for begin in range(0, len(data), _REFERENCE_CHUNK):
        piece = data[begin : begin + _REFERENCE_CHUNK]
        words = F.pad(piece, (0, -len(piece) % 8)).clone().view(torch.int64)
        states = (torch.arange(len(words), device=tensor.device) + begin // 8) * _signed(_GOLDEN) + key
        total += _mix(words ^ states).sum()
    return total
