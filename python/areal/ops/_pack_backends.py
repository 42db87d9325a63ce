"""What ``pack`` and ``unpack`` run: the ops of torch.library with their backends, and the autograd functions around them.

A layout is ``cu_seqlens`` int32 [n + 1] and ``starts`` int64, [n] or, where every sequence begins at its row's first column, [0].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from areal.ops._dispatch import compiled_module
from areal.ops._registration import cuda_stream, define_op, on_device

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Job(NamedTuple):
    """What to make: the first ``n_fields`` sources as they are; of sources ``targets`` and ``loss_mask`` (-1: none) the next token's."""

    n_fields: int
    targets: int
    final_target: int
    loss_mask: int
    ragged: bool  # sources are the sequences of all fields, field by field; else each is [n, width], or [T], packed already
    backend: str


def run_pack(job: Job, total: int, cu_seqlens: Tensor, starts: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """The fields, position ids, sequence ids, loss mask, and targets if wanted: [total] each."""
    if job.n_fields and torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return list(_Pack.apply(*job, total, cu_seqlens, starts, *sources))
    return _PACK(sources, *job, total, cu_seqlens, starts)


def run_unpack(
    sources: list[Tensor], fills: list[float], cu_seqlens: Tensor, starts: Tensor, width: int, backend: str
) -> list[Tensor] | tuple[Tensor, ...]:
    """Each source [T] as [n, width]."""
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return _Unpack.apply(fills, cu_seqlens, starts, width, backend, *sources)
    return _UNPACK(sources, fills, cu_seqlens, starts, width, backend)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        n_fields, targets, final_target, loss_mask, ragged, backend, total, cu_seqlens, starts, *sources = arguments
        made = _PACK(sources, n_fields, targets, final_target, loss_mask, ragged, backend, total, cu_seqlens, starts)
        ctx.save_for_backward(cu_seqlens, starts)
        ctx.n_fields, ctx.ragged, ctx.backend, ctx.shapes = n_fields, ragged, backend, [source.shape for source in sources]
        ctx.mark_non_differentiable(*(x for i, x in enumerate(made) if i >= n_fields or not x.is_floating_point()))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        cu_seqlens, starts = ctx.saved_tensors
        n_extra, per_field = 9, len(ctx.shapes) // ctx.n_fields
        made: list[Tensor | None] = [None] * len(ctx.shapes)
        wanted = [f for f in range(ctx.n_fields) if any(ctx.needs_input_grad[n_extra + f * per_field : n_extra + (f + 1) * per_field])]
        columns = [gradients[f].contiguous() for f in wanted]  # zeros where none came
        if ctx.ragged:
            sizes = [shape[0] for shape in ctx.shapes[:per_field]]
            for f, column in zip(wanted, columns, strict=True):
                made[f * per_field : (f + 1) * per_field] = column[: sum(sizes)].split(sizes)
        else:
            padded = run_unpack(columns, [0.0] * len(columns), cu_seqlens, starts, ctx.shapes[0][1], ctx.backend)
            for f, x in zip(wanted, padded, strict=True):
                made[f] = x
        return (None,) * n_extra + tuple(made)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fills: list[float], cu_seqlens: Tensor, starts: Tensor, width: int, backend: str, *sources: Tensor) -> Any:
        made = _UNPACK(list(sources), fills, cu_seqlens, starts, width, backend)
        ctx.save_for_backward(cu_seqlens, starts)
        ctx.backend, ctx.total = backend, sources[0].shape[0]
        ctx.mark_non_differentiable(*(x for x in made if not x.is_floating_point()))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        cu_seqlens, starts = ctx.saved_tensors
        wanted = [i for i in range(len(gradients)) if ctx.needs_input_grad[5 + i]]
        columns = [gradients[i].contiguous() for i in wanted]  # zeros where none came
        packed = run_pack(Job(len(columns), -1, 0, -1, False, ctx.backend), ctx.total, cu_seqlens, starts, columns)
        made: list[Tensor | None] = [None] * len(gradients)
        for i, x in zip(wanted, packed, strict=False):
            made[i] = x
        return None, None, None, None, None, *made


def _require(condition: Tensor, message: str) -> None:
    """``ValueError`` on the CPU; on a GPU an assertion on the device, so that nothing waits for it."""
    if condition.is_cuda:
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _layout(lengths: Tensor | None, mask: Tensor | None, width: int, total: int, backend: str) -> tuple[Tensor, Tensor]:
    if lengths is not None:
        _require(((lengths >= 0) & (lengths <= width)).all(), f"pack: lengths must be from 0 to {width}, the columns of the fields")
        starts = lengths.new_empty(0, dtype=torch.int64)
    else:
        assert mask is not None
        lengths, starts = _runs(mask, width, backend)
    ends = torch.cumsum(lengths, 0, dtype=torch.int64)
    room = 2**31 - 1 if total < 0 else total
    _require((ends <= room).all(), f"pack: total={room} is less than the number of tokens")
    return torch.cat([ends.new_zeros(1), ends]).int(), starts


def _runs(mask: Tensor, width: int, backend: str) -> tuple[Tensor, Tensor]:
    """How many non-zero entries each row has, and where they begin."""
    apart = "pack: attention_mask must have its non-zero entries side by side in every row"
    if backend == "cpp":
        lengths, starts = (torch.empty(len(mask), dtype=torch.int64) for _ in range(2))
        module = compiled_module()
        assert module is not None
        addresses = (starts.data_ptr(), lengths.data_ptr())
        row = module.find_runs(mask.data_ptr(), mask.element_size(), len(mask), width, *addresses, torch.get_num_threads())
        if row >= 0:
            raise ValueError(f"{apart}; in row {row} they are not")
        return lengths, starts
    kept = mask != 0
    lengths = kept.sum(1)
    starts = kept.view(torch.int8).argmax(1) if width else torch.zeros_like(lengths)  # of equals, the first
    runs = (kept[:, 1:] > kept[:, :-1]).sum(1) + kept[:, :1].sum(1)
    _require((runs <= 1).all(), apart)
    return lengths, starts


def _layout_fake(lengths: Tensor | None, mask: Tensor | None, width: int, total: int, backend: str) -> tuple[Tensor, Tensor]:
    like = mask if lengths is None else lengths
    assert like is not None
    starts = like.new_empty(like.shape[0] if lengths is None else 0, dtype=torch.int64)
    return like.new_empty(like.shape[0] + 1, dtype=torch.int32), starts


def _pack(
    sources: list[Tensor],
    n_fields: int,
    targets: int,
    final_target: int,
    loss_mask: int,
    ragged: bool,
    backend: str,
    total: int,
    cu_seqlens: Tensor,
    starts: Tensor,
) -> list[Tensor]:
    job, n = Job(n_fields, targets, final_target, loss_mask, ragged, backend), len(cu_seqlens) - 1
    if backend == "torch":
        return _reference_pack(job, total, cu_seqlens, starts, sources)
    made = _pack_fake(sources, *job, total, cu_seqlens, starts)
    fields, (position_ids, sequence_ids, mask), next_ids = made[:n_fields], made[n_fields : n_fields + 3], made[n_fields + 3 :]
    columns = [(f, field, 0, 0) for f, field in enumerate(fields)]
    columns += [(targets, x, 1, final_target) for x in next_ids]
    columns += [(loss_mask, mask, 1, 0)] if loss_mask >= 0 else []
    rows = [
        (f * n if ragged else sources[f].data_ptr(), target.data_ptr(), target.element_size(), shift, fill)
        for f, target, shift, fill in columns
    ]
    table = None
    if ragged:
        host = torch.tensor([source.data_ptr() for source in sources], pin_memory=cu_seqlens.is_cuda)
        table = host.to(cu_seqlens.device, non_blocking=True)
    layout = (
        cu_seqlens.data_ptr(),
        starts.data_ptr() if len(starts) else 0,
        0 if table is None else table.data_ptr(),
        n,
        sources[0].shape[1] if sources[0].ndim == 2 else 0,
        total,
    )
    derived = (position_ids.data_ptr(), sequence_ids.data_ptr(), mask.data_ptr() if loss_mask < 0 else 0)
    module = compiled_module()
    assert module is not None
    if backend == "cuda":
        with on_device(cu_seqlens):
            module.pack_cuda(rows, layout, derived, cuda_stream(cu_seqlens))
    else:
        module.pack(rows, layout, derived, torch.get_num_threads())
    return made


def _pack_fake(
    sources: list[Tensor],
    n_fields: int,
    targets: int,
    final_target: int,
    loss_mask: int,
    ragged: bool,
    backend: str,
    total: int,
    cu_seqlens: Tensor,
    starts: Tensor,
) -> list[Tensor]:
    step = cu_seqlens.shape[0] - 1 if ragged else 1
    made = [sources[f * step].new_empty(total) for f in range(n_fields)]
    made += [cu_seqlens.new_empty(total, dtype=torch.int64), cu_seqlens.new_empty(total)]
    made.append(cu_seqlens.new_empty(total, dtype=torch.bool) if loss_mask < 0 else sources[loss_mask * step].new_empty(total))
    return made + ([sources[targets * step].new_empty(total)] if targets >= 0 else [])


def _reference_pack(job: Job, total: int, cu_seqlens: Tensor, starts: Tensor, sources: list[Tensor]) -> list[Tensor]:
    n, ends = len(cu_seqlens) - 1, cu_seqlens[1:].long()
    tokens = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tokens, right=True)
    inside = sequence < n
    sequence = torch.where(inside, sequence, -1)
    begin = torch.cat([ends.new_zeros(1), ends])
    position = torch.where(inside, tokens - begin[sequence], 0)
    has_next = inside & (tokens + 1 < begin[sequence + 1])
    if job.ragged:
        sources = [torch.cat(sources[f * n : (f + 1) * n]) for f in range(len(sources) // n)]
        at = tokens
    else:
        width = sources[0].shape[1] if sources[0].ndim == 2 else 0
        at = sequence * width + position + (starts[sequence] if len(starts) else 0)

    def column(f: int, shift: int, fill: int) -> Tensor:
        where = has_next if shift else inside
        made = sources[f].new_full((total,), fill)
        made[where] = sources[f].reshape(-1)[at[where] + shift]
        return made

    made = [column(f, 0, 0) for f in range(job.n_fields)]
    made += [position, sequence.int(), has_next if job.loss_mask < 0 else column(job.loss_mask, 1, 0)]
    return made + ([column(job.targets, 1, job.final_target)] if job.targets >= 0 else [])


def _unpack(sources: list[Tensor], fills: list[float], cu_seqlens: Tensor, starts: Tensor, width: int, backend: str) -> list[Tensor]:
    lengths, total = torch.diff(cu_seqlens), sources[0].shape[0] if sources else 0
    _require(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= total) & (lengths >= 0).all(),
        f"unpack: cu_seqlens must ascend from 0 to at most {total}, the length of packed",
    )
    _require((lengths <= width).all(), f"unpack: max_length={width} is less than the longest sequence")
    if backend == "torch":
        return _reference_unpack(sources, fills, cu_seqlens, starts, width)
    made = _unpack_fake(sources, fills, cu_seqlens, starts, width, backend)
    rows = [
        (source.data_ptr(), target.data_ptr(), source.element_size(), 0, _bits(fill, source.dtype))
        for source, target, fill in zip(sources, made, fills, strict=True)
    ]
    layout = (cu_seqlens.data_ptr(), starts.data_ptr() if len(starts) else 0, 0, len(cu_seqlens) - 1, width, total)
    module = compiled_module()
    assert module is not None
    if backend == "cuda":
        with on_device(cu_seqlens):
            module.unpack_cuda(rows, layout, cuda_stream(cu_seqlens))
    else:
        module.unpack(rows, layout, torch.get_num_threads())
    return made


def _unpack_fake(sources: list[Tensor], fills: list[float], cu_seqlens: Tensor, starts: Tensor, width: int, backend: str) -> list[Tensor]:
    return [source.new_empty(cu_seqlens.shape[0] - 1, width) for source in sources]


def _bits(value: float, dtype: torch.dtype) -> int:
    """``value`` in ``dtype`` as a signed integer of its bits."""
    if value == 0:
        return 0
    number = value if dtype.is_floating_point else int(value)
    return int(torch.tensor(number, dtype=dtype).view(BITS[dtype.itemsize]).item())


def _reference_unpack(sources: list[Tensor], fills: list[float], cu_seqlens: Tensor, starts: Tensor, width: int) -> list[Tensor]:
    begin = cu_seqlens[:-1].long().unsqueeze(1)
    position = torch.arange(width, device=cu_seqlens.device) - (starts.unsqueeze(1) if len(starts) else 0)
    inside = (position >= 0) & (position < torch.diff(cu_seqlens).unsqueeze(1))
    at = (begin + position)[inside]
    made = []
    for source, fill in zip(sources, fills, strict=True):
        padded = source.new_full(inside.shape, fill if source.is_floating_point() else int(fill))
        padded[inside] = source[at]
        made.append(padded)
    return made


layout_op = define_op(
    "pack_layout(Tensor? lengths, Tensor? mask, SymInt width, SymInt total, str backend) -> (Tensor, Tensor)", _layout, _layout_fake
)
_PACK = define_op(
    "pack(Tensor[] sources, int n_fields, int targets, int final_target, int loss_mask, bool ragged, str backend, SymInt total, "
    "Tensor cu_seqlens, Tensor starts) -> Tensor[]",
    _pack,
    _pack_fake,
)
_UNPACK = define_op(
    "unpack(Tensor[] sources, float[] fills, Tensor cu_seqlens, Tensor starts, SymInt width, str backend) -> Tensor[]",
    _unpack,
    _unpack_fake,
)
