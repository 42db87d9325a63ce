"""What every op on tensors needs: its entry in ``torch.library``, checks of its arguments, the stream that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("areal", "FRAGMENT")


def define_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``torch.ops.areal.<name>`` for all devices, and returns it (its default overload).

    ``implementation`` gets plain tensors on one device; ``fake`` returns empty tensors like its results, for tracing. Neither
    differentiates: an ``autograd.Function`` around the op does. ``library.custom_op`` would cost 7 microseconds more a call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"areal::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.areal, name).default


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """``ValueError`` naming ``op`` and the argument ``name`` unless ``tensor`` is a contiguous tensor like this.

    ``shape`` has None where any size will do; ``device`` None means any.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{op}: {name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {wanted}")
    found = tensor.shape
    if len(found) != len(shape) or any(want is not None and size != want for size, want in zip(found, shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{op}: {name} has the shape {list(found)}; it must be [{wanted}]")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on {device}, like the first argument")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} is not contiguous; call .contiguous() on it")


def cuda_stream(tensor: Tensor) -> int:
    """The address of the current stream of the tensor's device; 0 on the CPU, where the tests run CUDA kernels."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, for launches; does nothing on the CPU, where the tests run CUDA kernels."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
