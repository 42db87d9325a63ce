"""Sequences of different lengths, ragged or padded, to packed columns and back; for CUDA all columns in one launch.

Packed means one after another without padding: sequence i has the tokens ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``, the form that
attention over variable lengths takes. T is the number of packed tokens, n of sequences, L the width of the padded form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from areal.ops._dispatch import backend_for
from areal.ops._pack_backends import BITS, Job, layout_op, run_pack, run_unpack
from areal.ops._registration import check_tensor

BACKENDS = ("cuda", "cpp", "torch")
Backend = Literal["torch", "cpp", "cuda"]
_INTEGERS = (torch.int32, torch.int64)


class Packed(NamedTuple):
    """What ``pack`` returns. T is ``total``, or the number of tokens without it."""

    fields: dict[str, Tensor]
    """Each [T], in its dtype; 0 behind the last token."""
    cu_seqlens: Tensor
    """int32 [n + 1], from 0 to the number of tokens."""
    position_ids: Tensor
    """int64 [T], from 0 in every sequence; 0 behind the last token."""
    sequence_ids: Tensor
    """int32 [T]; -1 behind the last token."""
    targets: Tensor | None
    """[T], the next token's id; ``final_target`` at a sequence's end and behind the last token. None without a field for it."""
    loss_mask: Tensor
    """[T], aligned with ``targets``: the loss mask of the next token in its dtype; without a field for it bool and true where there is a
    next token. 0 at a sequence's end and behind the last token."""
    max_length: int
    """No sequence is longer: the longest for ragged fields, L for padded ones."""


def pack(
    fields: Mapping[str, Tensor | Sequence[Tensor]],
    lengths: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    total: int | None = None,
    targets: str = "input_ids",
    loss_mask: str = "loss_mask",
    final_target: int = 0,
    backend: Backend | None = None,
) -> Packed:
    """Packs ``fields``, which are all padded or all ragged, on one device, of any dtypes of up to 8 bytes.

    Padded: tensors [n, L] with ``lengths`` (int32 or int64 [n], the first tokens of each row) or ``attention_mask`` (bool or integer
    [n, L], its non-zero entries side by side in each row: padded on the right, the left, or both). Ragged: lists of n tensors [L_i].

    ``total`` is how many tokens to make room for, at least as many as there are. Padded fields on a GPU need it to be packed without
    waiting for the device, since their number of tokens is known there only; ``torch.compile`` needs it for the same reason. What is
    wrong with the values of lengths or mask is a ``ValueError`` on the CPU, and a device-side assertion on a GPU.

    ``targets`` and ``loss_mask`` name the fields to derive ``Packed.targets`` and ``Packed.loss_mask`` from; the last token of a
    sequence, which has no next one, gets ``final_target`` (-100 is what torch's cross entropy leaves out). Gradients flow to the
    packed fields' sources. ``ValueError`` names the argument that has a wrong type, shape, dtype or device, or is not contiguous.
    """
    if not isinstance(fields, Mapping) or not fields:
        raise ValueError("pack: fields has no entries; it must map names to tensors [n, L] or lists of tensors [L_i]")
    ragged = not isinstance(next(iter(fields.values())), Tensor)
    for name, field in fields.items():
        if isinstance(field, Tensor) == ragged:
            raise ValueError(f"pack: fields['{name}'] is {'padded' if ragged else 'ragged'}, the first one is not; all must be alike")
    options = (total, targets, loss_mask, final_target, backend)
    if ragged:
        if lengths is not None or attention_mask is not None:
            raise ValueError("pack: lengths and attention_mask are for padded fields; ragged ones have their lengths")
        return _pack_ragged(fields, *options)  # type: ignore[arg-type]
    return _pack_padded(fields, lengths, attention_mask, *options)  # type: ignore[arg-type]


def _pack_padded(
    fields: Mapping[str, Tensor],
    lengths: Tensor | None,
    mask: Tensor | None,
    total: int | None,
    targets: str,
    loss_mask: str,
    final_target: int,
    backend: Backend | None,
) -> Packed:
    first = next(iter(fields.values()))
    shape = tuple(first.shape) if first.ndim == 2 else (None, None)
    for name, field in fields.items():
        check_tensor("pack", f"fields['{name}']", field, shape, (field.dtype,), first.device)
        _check_bytes("pack", f"fields['{name}']", field.dtype)
    if total is not None and not 0 <= total < 2**31:
        raise ValueError(f"pack: total={total}; it must be from 0 to 2^31 - 1")
    if (lengths is None) == (mask is None):
        raise ValueError("pack: padded fields need either lengths [n] or attention_mask [n, L]")
    if lengths is not None:
        check_tensor("pack", "lengths", lengths, (first.shape[0],), _INTEGERS, first.device)
    else:
        assert mask is not None
        dtypes = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        check_tensor("pack", "attention_mask", mask, tuple(first.shape), dtypes, first.device)
    chosen = backend_for("pack", first.device, backend, has=BACKENDS)
    cu_seqlens, starts = layout_op(lengths, mask, first.shape[1], -1 if total is None else total, chosen)
    n_tokens = int(cu_seqlens[-1]) if total is None else total
    names = list(fields)
    job = Job(len(names), _find(names, targets), final_target, _find(names, loss_mask), False, chosen)
    made = run_pack(job, n_tokens, cu_seqlens, starts, list(fields.values()))
    return _result(names, made, job, cu_seqlens, first.shape[1])


def _pack_ragged(
    fields: Mapping[str, Sequence[Tensor]], total: int | None, targets: str, loss_mask: str, final_target: int, backend: Backend | None
) -> Packed:
    names, rows = list(fields), [list(field) for field in fields.values()]
    lengths, device = _check_ragged(names, rows)
    n_tokens = sum(lengths)
    room = n_tokens if total is None else total
    if room < n_tokens or room >= 2**31:
        raise ValueError(f"pack: total={room}; it must be at least the {n_tokens} tokens that there are, and below 2^31")
    chosen = backend_for("pack", device, backend, has=BACKENDS)
    host = torch.tensor([0, *lengths], pin_memory=device.type == "cuda")
    cu_seqlens = torch.cumsum(host.to(device, non_blocking=True), 0, dtype=torch.int32)
    job = Job(len(names), _find(names, targets), final_target, _find(names, loss_mask), True, chosen)
    if chosen == "cuda":
        made = run_pack(job, room, cu_seqlens, cu_seqlens.new_empty(0), [tensor for row in rows for tensor in row])
    else:
        # torch.cat is as fast as memory; what is left are the derived columns, from fields that are packed already.
        tail = room - n_tokens
        packed = [torch.cat([*row, row[0].new_zeros(tail)] if tail else row) for row in rows]
        derive = job._replace(n_fields=0, ragged=False)
        made = packed + run_pack(derive, room, cu_seqlens, cu_seqlens[:-1].long(), [field.detach() for field in packed])
    return _result(names, made, job, cu_seqlens, max(lengths))


def unpack(
    packed: Tensor | Mapping[str, Tensor],
    cu_seqlens: Tensor,
    *,
    max_length: int | None = None,
    padding: float | Mapping[str, float] = 0,
    side: Literal["right", "left"] = "right",
    backend: Backend | None = None,
) -> Any:
    """Packed columns [T] as padded ones [n, max_length], one tensor or a dict of them as given; gradients flow back.

    ``padding`` goes where no token is, on the ``side`` given: one value, or one by name (0 for names that are missing). ``max_length``
    is the longest sequence without it, for which a GPU is waited for; with it nothing is. ``cu_seqlens`` is int32 [n + 1]; T may be more
    than its last entry. ``ValueError`` as for ``pack``. ``unpack_ragged`` gives lists.
    """
    fields = packed if isinstance(packed, Mapping) else {"packed": packed}
    values = padding if isinstance(padding, Mapping) else dict.fromkeys(fields, padding)
    device = _check_packed("unpack", fields, cu_seqlens)
    if side not in ("right", "left"):
        raise ValueError(f"unpack: side='{side}'; it must be 'right' or 'left'")
    for name, field in fields.items():
        _check_padding(name, values.get(name, 0), field.dtype)
    if max_length is None:
        max_length = int(torch.diff(cu_seqlens).max()) if len(cu_seqlens) > 1 else 0
    elif max_length < 0:
        raise ValueError(f"unpack: max_length={max_length}; it must be at least 0")
    chosen = backend_for("unpack", device, backend, has=BACKENDS)
    starts = max_length - torch.diff(cu_seqlens).long() if side == "left" else cu_seqlens.new_empty(0, dtype=torch.int64)
    fills = [float(values.get(name, 0)) for name in fields]
    made = run_unpack(list(fields.values()), fills, cu_seqlens, starts, max_length, chosen)
    return dict(zip(fields, made, strict=True)) if isinstance(packed, Mapping) else made[0]


def unpack_ragged(packed: Tensor | Mapping[str, Tensor], cu_seqlens: Tensor) -> Any:
    """Packed columns [T] as lists of n views [L_i], one list or a dict of them as given. Waits for a GPU: list sizes are the host's."""
    fields = packed if isinstance(packed, Mapping) else {"packed": packed}
    _check_packed("unpack_ragged", fields, cu_seqlens)
    ends = cu_seqlens.tolist()
    sizes = [end - begin for begin, end in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] > len(next(iter(fields.values()))) or min(sizes, default=0) < 0:
        raise ValueError("unpack_ragged: cu_seqlens must ascend from 0 to at most the length of packed")
    made = {name: list(field[: ends[-1]].split(sizes)) if sizes else [] for name, field in fields.items()}
    return made if isinstance(packed, Mapping) else made["packed"]


def _find(names: list[str], name: str) -> int:
    return names.index(name) if name in names else -1


def _result(names: list[str], made: list[Tensor], job: Job, cu_seqlens: Tensor, max_length: int) -> Packed:
    """``made``: fields, position ids, sequence ids, loss mask, and targets if wanted."""
    position_ids, sequence_ids, loss_mask = made[job.n_fields : job.n_fields + 3]
    targets = made[-1] if job.targets >= 0 else None
    return Packed(dict(zip(names, made, strict=False)), cu_seqlens, position_ids, sequence_ids, targets, loss_mask, max_length)


def _check_bytes(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype.itemsize not in BITS:
        raise ValueError(f"{op}: {name} is {str(dtype).removeprefix('torch.')}; it must be of at most 8 bytes")


def _check_ragged(names: list[str], rows: list[list[Tensor]]) -> tuple[list[int], torch.device]:
    """The lengths, and the device. Looks at every tensor, of which there are many: whole lists at a time."""
    if not rows[0]:
        raise ValueError(f"pack: fields['{names[0]}'] is empty; it must have a tensor for every sequence")
    for name, row in zip(names, rows, strict=True):
        if not all(isinstance(x, Tensor) for x in row):
            raise ValueError(f"pack: fields['{name}'] has entries that are no tensors; each must be a tensor [L_i]")
    lengths, device = list(map(Tensor.numel, rows[0])), rows[0][0].device
    for name, row in zip(names, rows, strict=True):
        what = f"fields['{name}']"
        if len(row) != len(lengths):
            raise ValueError(f"pack: {what} has {len(row)} tensors; it must have {len(lengths)}, like the first field")
        if set(map(Tensor.dim, row)) != {1}:
            raise ValueError(f"pack: {what} has tensors that are not 1-D; each must be [L_i]")
        found = list(map(Tensor.numel, row))
        if found != lengths:
            i = next(i for i, (a, b) in enumerate(zip(found, lengths, strict=True)) if a != b)
            raise ValueError(f"pack: {what}[{i}] has the length {found[i]}; it must be {lengths[i]}, as in the first field")
        dtypes, devices = {x.dtype for x in row}, {x.device for x in row}
        if len(dtypes) > 1:
            raise ValueError(f"pack: {what} has tensors of {' and '.join(sorted(map(str, dtypes)))}; they must have one dtype")
        if devices != {device}:
            raise ValueError(f"pack: {what} is on {', '.join(sorted(map(str, devices)))}; it must be on {device}, like the first tensor")
        if not all(map(Tensor.is_contiguous, row)):
            raise ValueError(f"pack: {what} has tensors that are not contiguous; call .contiguous() on them")
        _check_bytes("pack", what, row[0].dtype)
    return lengths, device


def _check_packed(op: str, fields: Mapping[str, Tensor], cu_seqlens: Tensor) -> torch.device:
    if not fields:
        raise ValueError(f"{op}: packed has no entries; it must map names to tensors [T]")
    first = next(iter(fields.values()))
    for name, field in fields.items():
        what = "packed" if len(fields) == 1 and name == "packed" else f"packed['{name}']"
        length = len(first) if isinstance(first, Tensor) and first.ndim == 1 else None
        check_tensor(op, what, field, (length,), (getattr(field, "dtype", torch.float32),), getattr(first, "device", None))
        _check_bytes(op, what, field.dtype)
    check_tensor(op, "cu_seqlens", cu_seqlens, (None,), (torch.int32,), first.device)
    if len(cu_seqlens) < 1:
        raise ValueError(f"{op}: cu_seqlens is empty; it must be [n + 1]")
    return first.device


def _check_padding(name: str, value: float, dtype: torch.dtype) -> None:
    if dtype.is_floating_point or dtype.is_complex:
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if math.isnan(value) or not low <= value <= high or int(value) != value:
        raise ValueError(f"unpack: padding={value} is no {str(dtype).removeprefix('torch.')}, the dtype of '{name}'")
