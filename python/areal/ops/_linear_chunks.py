"""The matrix products of a linear head, a chunk of tokens at a time: what ``linear_logprob_entropy`` and ``linear_ppo_loss`` share.

T tokens, H hidden, V vocabulary. Only one chunk of logits exists at a time; its memory is used again for the gradient of these logits
and then for the next chunk.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from areal.ops._registration import check_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_TILE = 128
"""Chunks are multiples of it, the tile of the matrix products."""
_SLAB_ELEMENTS = 1 << 22
"""Elements that are cast to float32 at a time where products cannot write float32."""
_DEFAULT_BUDGET = {"cuda": 5 << 28, "cpu": 1 << 26}
"""Bytes. On a GPU 1.25 GiB: 4096 tokens in bfloat16 for the largest vocabularies; on a CPU, where small products are as fast, 64 MiB."""


def memory_budget_for(op: str, device: torch.device, memory_budget: int | None) -> int:
    """The given budget, checked, or the default of the device; bytes."""
    if memory_budget is None:
        return _DEFAULT_BUDGET.get(device.type, _DEFAULT_BUDGET["cuda"])
    if not isinstance(memory_budget, int) or memory_budget <= 0:
        raise ValueError(f"{op}: memory_budget is {memory_budget}; it must be a whole number of bytes above 0")
    return memory_budget


def check_head(op: str, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    """``ValueError`` unless hidden [T, H], weight [V, H] and targets int64 [T] fit together."""
    check_tensor(op, "hidden", hidden, (None, None), DTYPES)
    tokens, width = hidden.shape
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            f"{op}: weight is a sharded DTensor; call the op where the weight is gathered, e.g. in a method of the model registered with "
            "torch.distributed.fsdp.register_fsdp_forward_method"
        )
    check_tensor(op, "weight", weight, (None, width), (hidden.dtype,), hidden.device)
    check_tensor(op, "targets", targets, (tokens,), (torch.int64,), hidden.device)
    if len(weight) == 0:
        raise ValueError(f"{op}: weight has the shape {list(weight.shape)}; it needs at least one row")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}; it must be a finite number above 0")


def chunk_tokens(tokens: int, vocabulary: int, itemsize: int, memory_budget: int) -> int:
    """Tokens of a chunk: as many as ``memory_budget`` bytes hold, at least a tile of 128, in chunks of nearly equal size."""
    most = memory_budget // (max(vocabulary, 1) * itemsize)
    if tokens <= most:
        return max(1, tokens)
    most = max(_TILE, most // _TILE * _TILE)
    n_chunks = -(-tokens // most)
    return -(-tokens // n_chunks // _TILE) * _TILE


def check_targets(op: str, targets: Tensor, vocabulary: int) -> None:
    """``ValueError`` for a target that is no row of the weight; not on a GPU, where it would have to wait for the device."""
    if len(targets) and not targets.is_cuda:
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"{op}: targets has values from {low} to {high}; they must lie in [0, {vocabulary})")


class LogitChunks:
    """Walks over the tokens: ``for rows, logits in chunks: ...``, logits [n, V] of the tokens ``rows`` (a slice).

    The logits may be overwritten in place; their memory is that of the next chunk.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, memory_budget: int) -> None:
        self.hidden = hidden
        self.weight = weight
        self.size = chunk_tokens(len(hidden), len(weight), hidden.element_size(), memory_budget)

    def __len__(self) -> int:
        return (len(self.hidden) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        tokens, vocabulary = len(self.hidden), len(self.weight)
        if not tokens:
            return
        buffer = self.hidden.new_empty(self.size, vocabulary)
        for begin in range(0, tokens, self.size):
            rows = slice(begin, min(begin + self.size, tokens))
            logits = buffer[: rows.stop - begin]
            torch.mm(self.hidden[rows], self.weight.t(), out=logits)
            yield rows, logits


class HeadGradients:
    """d(hidden) and d(weight), gathered chunk by chunk from d(logits). What is not needed costs nothing and is an empty tensor.

    Over several chunks d(weight) of a 16-bit head is summed in float32, and rounded once.
    """

    def __init__(self, chunks: LogitChunks, *, needs_hidden: bool, needs_weight: bool) -> None:
        self._chunks = chunks
        self._needs_weight = needs_weight
        hidden, weight = chunks.hidden, chunks.weight
        self._hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
        self._weight = weight.new_empty(0)
        if needs_weight:
            wide = weight.element_size() < 4 and len(chunks) > 1
            self._weight = torch.empty_like(weight, dtype=torch.float32 if wide else weight.dtype)
            if not len(chunks):
                self._weight.zero_()

    def add(self, rows: slice, d_logits: Tensor) -> None:
        hidden, weight = self._chunks.hidden[rows], self._chunks.weight
        if len(self._hidden):
            torch.mm(d_logits, weight, out=self._hidden[rows])
        if self._needs_weight:
            first = rows.start == 0
            if self._weight.dtype == weight.dtype:
                torch.addmm(self._weight, d_logits.t(), hidden, beta=0 if first else 1, out=self._weight)
            else:
                _add_product_in_float32(self._weight, d_logits, hidden, first)

    def result(self) -> tuple[Tensor, Tensor]:
        """d(hidden), d(weight) in the dtypes of hidden and weight. Call it when the chunks' memory is free again."""
        return self._hidden, self._weight.to(self._chunks.weight.dtype)


def _add_product_in_float32(total: Tensor, d_logits: Tensor, hidden: Tensor, first: bool) -> None:
    """total [V, H] (+)= d_logits.T @ hidden, of 16-bit factors without rounding the product."""
    if total.is_cuda and _products_accumulate_float32(total.device, hidden.dtype):
        if first:
            torch.mm(d_logits.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, d_logits.t(), hidden, out_dtype=torch.float32, out=total)
        return
    wide = hidden.float()
    slab = max(1, _SLAB_ELEMENTS // max(len(hidden), 1))
    for begin in range(0, len(total), slab):
        part = total[begin : begin + slab]
        torch.addmm(part, d_logits[:, begin : begin + slab].float().t(), wide, beta=0 if first else 1, out=part)


@functools.cache
def _products_accumulate_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``addmm`` of 16-bit factors adds to a float32 matrix here. Older versions of torch took no such matrix."""
    a, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a.t(), a, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:  # says nothing about the product, and the answer is kept
        raise
    except (RuntimeError, TypeError) as error:
        warnings.warn(
            f"torch {torch.__version__} cannot add 16-bit products to a float32 d(weight) here ({error}); they are cast to float32, which is slower",
            stacklevel=2,
        )
        return False
    return True
