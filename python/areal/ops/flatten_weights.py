"""Many tensors into one contiguous bucket, cast on the way, and back into place: what a transport of weights sends.

The bucket is uint8; each tensor begins at a multiple of 64 bytes and the gaps are zeros, so that its bytes follow from the weights
alone. Its ``WeightsLayout`` says what lies where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from areal.ops._dispatch import backend_for, compiled_module
from areal.ops._pointer_table import device_table
from areal.ops._registration import check_tensor, cuda_stream, define_op, on_device
from areal.ops.weights_layout import ALIGNMENT, DTYPES, WeightsLayout

Backend = Literal["cpp", "cuda", "torch"]

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_CONVERSIONS = {(torch.float32, torch.bfloat16): 1, (torch.bfloat16, torch.float32): 2}  # enum class Conversion of csrc/flatten_weights.h


def flatten_weights(
    tensors: Mapping[str, Tensor],
    out: Tensor | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    backend: Backend | None = None,
) -> tuple[Tensor, WeightsLayout]:
    """Copies named tensors (contiguous, all on one device) into a bucket: uint8 [layout.nbytes], and its layout.

    Floating tensors of 16 bits and more are cast to ``dtype``; None keeps everything as it is. ``out``, if given, is the memory to use:
    uint8, contiguous, from a multiple of 64 bytes on, at least ``WeightsLayout.plan(tensors, dtype).nbytes`` long; the bucket is its
    beginning. One launch on a GPU. float32 from and to bfloat16 are cast on the way, any other pair by torch first, with a copy of that tensor. ``ValueError`` for
    tensors that are not contiguous, of a dtype that no layout takes, or on several devices.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"flatten_weights: tensors['{name}'] is a {type(tensor).__name__}; it must be a tensor")
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu") if out is None else out.device)
    for name, tensor in tensors.items():
        if not (tensor.dtype in _CODES and tensor.device == device and tensor.is_contiguous()):
            check_tensor("flatten_weights", f"tensors['{name}']", tensor, (None,) * tensor.dim(), DTYPES, device)
    layout = WeightsLayout.plan(tensors, dtype)
    if out is None:
        out = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    check_bucket("flatten_weights", "out", out, layout, device)
    bucket = out[: layout.nbytes]
    if layout.entries:
        codes = [_CODES[entry.dtype] for entry in layout.entries]
        _flatten_op([tensor.detach() for tensor in tensors.values()], bucket, [e.offset for e in layout.entries], codes, backend)
    return bucket, layout


def unflatten_weights(
    bucket: Tensor, layout: WeightsLayout, tensors: Mapping[str, Tensor] | None = None, backend: Backend | None = None
) -> dict[str, Tensor]:
    """The tensors of a bucket (uint8, contiguous, from a multiple of 64 bytes on).

    Without ``tensors`` views of the bucket; nothing is copied. With it the bucket is copied into those tensors (of the same names and
    shapes; contiguous, on the bucket's device) and cast to their dtypes, in one launch on a GPU, and they are returned. ``ValueError``
    if they do not fit the layout; nothing is copied then.
    """
    check_bucket("unflatten_weights", "bucket", bucket, layout, bucket.device)
    if tensors is None:
        if not torch.compiler.is_compiling():
            _check_start("unflatten_weights", "bucket", bucket)
        return {e.name: bucket[e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape) for e in layout.entries}
    difference = {entry.name for entry in layout.entries} ^ set(tensors)
    if difference:
        raise ValueError(f"unflatten_weights: only one of tensors and layout has '{min(difference)}'; they must have the same names")
    targets = {entry.name: tensors[entry.name] for entry in layout.entries}
    device = bucket.device
    for entry, target in zip(layout.entries, targets.values(), strict=True):
        if not (
            isinstance(target, Tensor)
            and target.shape == entry.shape
            and target.dtype in _CODES
            and target.device == device
            and target.is_contiguous()
        ):
            check_tensor("unflatten_weights", f"tensors['{entry.name}']", target, entry.shape, DTYPES, device)
    if layout.entries:
        offsets, codes = [e.offset for e in layout.entries], [_CODES[e.dtype] for e in layout.entries]
        _unflatten_op(bucket, [target.detach() for target in targets.values()], offsets, codes, backend)
    return targets


def check_bucket(op: str, name: str, bucket: Tensor, layout: WeightsLayout, device: torch.device) -> None:
    """``ValueError`` unless ``bucket`` is memory that holds what ``layout`` says."""
    check_tensor(op, name, bucket, (None,), (torch.uint8,), device)
    if len(bucket) < layout.nbytes:
        raise ValueError(f"{op}: {name} has {len(bucket)} bytes; the layout needs {layout.nbytes}")


def _check_start(op: str, name: str, bucket: Tensor) -> None:
    # Apart from check_bucket, since a trace cannot ask for it.
    if bucket.storage_offset() % ALIGNMENT:
        raise ValueError(f"{op}: {name} begins {bucket.storage_offset()} bytes into its storage; it must be a multiple of {ALIGNMENT}")


def _flatten(tensors: list[Tensor], bucket: Tensor, offsets: list[int], dtypes: list[int], backend: str | None) -> None:
    """Writes all of ``bucket``; tensor i, as DTYPES[dtypes[i]], from offsets[i] on."""
    _check_start("flatten_weights", "out", bucket)
    which = backend_for("flatten_weights", bucket.device, backend, has=("cpp", "cuda", "torch"))
    ends = [*offsets[1:], len(bucket)]
    if which == "torch":
        for tensor, offset, end, code in zip(tensors, offsets, ends, dtypes, strict=True):
            nbytes = tensor.numel() * DTYPES[code].itemsize
            bucket[offset : offset + nbytes].view(DTYPES[code]).copy_(tensor.view(-1))
            bucket[offset + nbytes : end].zero_()
        return
    rows, kept, start = [], [], bucket.data_ptr()
    for tensor, offset, end, code in zip(tensors, offsets, ends, dtypes, strict=True):
        dtype = DTYPES[code]
        count = tensor.numel()
        nbytes, conversion = count * dtype.itemsize, 0
        if tensor.dtype != dtype:
            conversion = _CONVERSIONS.get((tensor.dtype, dtype), 0)
            if not conversion:
                tensor = tensor.to(dtype)
                kept.append(tensor)  # until the copy is on its way; torch's allocator keeps to the order of the stream after that
        rows.append([tensor.data_ptr(), start + offset, count if conversion else nbytes, end - offset - nbytes, conversion])
    _copy(rows, bucket, which)
    torch.autograd.graph.increment_version(bucket)


def _unflatten(bucket: Tensor, tensors: list[Tensor], offsets: list[int], dtypes: list[int], backend: str | None) -> None:
    """Reads tensor i, which is DTYPES[dtypes[i]] there, from offsets[i] of ``bucket`` on."""
    _check_start("unflatten_weights", "bucket", bucket)
    which = backend_for("unflatten_weights", bucket.device, backend, has=("cpp", "cuda", "torch"))
    rows, start = [], bucket.data_ptr()
    for tensor, offset, code in zip(tensors, offsets, dtypes, strict=True):
        dtype = DTYPES[code]
        count, conversion = tensor.numel(), 0
        if tensor.dtype != dtype:
            conversion = _CONVERSIONS.get((dtype, tensor.dtype), 0)
        if which == "torch" or (tensor.dtype != dtype and not conversion):
            tensor.view(-1).copy_(bucket[offset : offset + count * dtype.itemsize].view(dtype))
        else:
            rows.append([start + offset, tensor.data_ptr(), count if conversion else count * dtype.itemsize, 0, conversion])
    if rows:
        _copy(rows, bucket, which)
        torch.autograd.graph.increment_version(tensors)


def _copy(rows: list[list[int]], bucket: Tensor, which: str) -> None:
    module = compiled_module()
    assert module is not None
    if which == "cpp":
        module.copy_list([(*row, 0) for row in rows], torch.get_num_threads())
        return
    table, n_chunks = [], 0
    for row in rows:
        table += [*row, n_chunks]
        n_chunks += -(-row[2] // module.copy_list_cuda_chunk) or (row[3] > 0)
    if n_chunks == 0:
        return
    on_it = device_table(table, bucket.device)
    with on_device(bucket):
        module.copy_list_cuda(on_it.data_ptr(), len(rows), n_chunks, cuda_stream(bucket))


_flatten_op = define_op(
    "flatten_weights(Tensor[] tensors, Tensor(a!) bucket, int[] offsets, int[] dtypes, str? backend) -> ()",
    _flatten,
    lambda tensors, bucket, offsets, dtypes, backend: None,
)
_unflatten_op = define_op(
    "unflatten_weights(Tensor bucket, Tensor(a!)[] tensors, int[] offsets, int[] dtypes, str? backend) -> ()",
    _unflatten,
    lambda bucket, tensors, offsets, dtypes, backend: None,
)
