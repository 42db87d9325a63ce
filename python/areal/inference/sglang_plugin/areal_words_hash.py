"""The words of a tensor, hashed as ``areal.ops.weights_hash`` does it, also where a process holds only a part of them.

    part = sum over words i held of mix(word_i xor (key + i * golden))   (mod 2^64)

``word_i`` is the i-th eight bytes of the whole tensor in row-major order; parts that have no word in common add up. The tensor's own
term, mix(key), is added once by whoever adds the parts.

Runs inside a server of SGLang: torch, numpy and the standard library only.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_WORD = 8
_BLOCK_CPU = 2**15
"""Words hashed at a time: 256 KiB and two buffers of as much stay in the second-level cache."""
_BLOCK_GPU = 2**21
"""Words: two buffers of 16 MiB, small beside what SGLang leaves free."""


class NotWholeWords(ValueError):
    """A part begins or ends inside a word of the whole tensor."""


def tensor_key(name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    text = f"{name}\0{str(dtype).removeprefix('torch.')}\0{','.join(map(str, shape))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def part_hash(key: int, numel: int, place: Tensor, offset: int, strides: Sequence[int]) -> int:
    """The part that ``place`` has in a tensor of ``numel`` elements: its elements lie there from ``offset`` on at ``strides``.

    ``NotWholeWords`` if a word of the tensor lies in it only partly.
    """
    total = 0
    for first, words_RW in _rows_of_words(numel, place, offset, strides):
        for starts_R, piece_RW in _blocks(first, words_RW):
            total += _sum_cpu(key, starts_R, piece_RW) if piece_RW.device.type == "cpu" else _sum_torch(key, starts_R, piece_RW)
    return total & _MASK


def _rows_of_words(numel: int, place: Tensor, offset: int, strides: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows that are contiguous in the whole tensor: index of their first word, int64 [R], and their words, int64 [R, W]."""
    order = sorted((d for d in range(place.dim()) if place.shape[d] != 1), key=lambda d: -strides[d])
    inner, run = len(order), 1
    while inner and strides[order[inner - 1]] == run:
        inner -= 1
        run *= place.shape[order[inner]]
    starts = torch.tensor([offset])
    for d in order[:inner]:
        starts = (starts[:, None] + torch.arange(place.shape[d]) * strides[d]).reshape(-1)
    size = place.element_size()
    ones = [d for d in range(place.dim()) if place.shape[d] == 1]
    rows = place.detach().permute(*ones, *order).reshape(len(starts), run)
    tail = run * size % _WORD
    if tail and len(starts) == 1 and offset + run == numel:  # the end of the tensor, which is filled up with zeros
        whole = (run * size - tail) // size
        if whole:
            yield from _rows_of_words(numel, rows[0, :whole], offset, (1,))
        last = torch.zeros(_WORD // size, dtype=rows.dtype, device=rows.device)
        last[: run - whole] = rows[0, whole:]
        rows, starts = last[None], starts + whole
    if bool((starts * size % _WORD).any()) or rows.shape[1] * size % _WORD:
        raise NotWholeWords(f"a part of {run} elements of {size} bytes from element {int(starts[0])} on does not consist of whole words")
    if rows.storage_offset() * size % _WORD or rows.stride(-1) != 1 or (len(rows) > 1 and rows.stride(0) * size % _WORD):
        rows = rows.clone(memory_format=torch.contiguous_format)
    yield starts * size // _WORD, rows.view(torch.int64)


def _blocks(starts_R: Tensor, words_RW: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same in pieces of about a block: several short rows, or a piece of a long one."""
    block = _BLOCK_CPU if words_RW.device.type == "cpu" else _BLOCK_GPU
    n_rows, width = words_RW.shape
    step = max(1, block // max(width, 1))
    for row in range(0, n_rows, step):
        for column in range(0, width, block):
            yield starts_R[row : row + step] + column, words_RW[row : row + step, column : column + block]


@functools.cache
def _scratch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Multiples of golden, and two buffers, of a block each: memory taken anew for every block would cost more than the hash."""
    steps = np.arange(_BLOCK_CPU, dtype=np.uint64) * np.uint64(_GOLDEN)
    return steps, np.empty_like(steps), np.empty_like(steps)


def _sum_cpu(key: int, starts_R: Tensor, words_RW: Tensor) -> int:
    """numpy: its shifts are logical, and it takes half the passes of torch. At most a block of words; one thread at a time."""
    words = words_RW.numpy().view(np.uint64)
    steps, *buffers = _scratch()
    state, shifted = (buffer[: words.size].reshape(words.shape) for buffer in buffers)
    bases_R = starts_R.numpy().astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    np.add(bases_R[:, None], steps[: words.shape[1]], out=state)
    np.bitwise_xor(state, words, out=state)
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        np.right_shift(state, np.uint64(shift), out=shifted)
        np.bitwise_xor(state, shifted, out=state)
        if multiplier != 1:
            np.multiply(state, np.uint64(multiplier), out=state)
    return int(state.sum(dtype=np.uint64))


def _sum_torch(key: int, starts_R: Tensor, words_RW: Tensor) -> int:
    """int64, whose products and sums wrap; its right shifts are arithmetic, hence the masks."""
    device = words_RW.device
    bases_R = starts_R.to(device) * _signed(_GOLDEN) + _signed(key)
    state = bases_R[:, None] + torch.arange(words_RW.shape[1], device=device) * _signed(_GOLDEN)
    state.bitwise_xor_(words_RW)
    shifted = torch.empty_like(state)
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        torch.bitwise_right_shift(state, shift, out=shifted)
        state.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))
        if multiplier != 1:
            state.mul_(_signed(multiplier))
    return int(state.sum().item())


def numel_of(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _signed(word: int) -> int:
    return (word & _MASK) - 2**64 if word & 2**63 else word & _MASK
