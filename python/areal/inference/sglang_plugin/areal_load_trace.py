"""Where a model of SGLang keeps each tensor of a checkpoint: found by asking its own loader, without writing anything.

SGLang fuses projections (q, k, v into one), shards over tensor-parallel ranks, pads vocabularies and replicates heads, each model in its
own way. Instead of a table of names that would have to follow every model, ``trace_load`` calls the model's ``load_weights`` with tensors
that have a shape and no memory (device meta) while a dispatch mode looks at every operation: a copy into a parameter is noted (which part
of which tensor, to which place) and left out. What the loader would not load, or would compute from more than views and copies, is
reported by name with the reason.

Runs inside a server of SGLang: torch and the standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PADDING = (_aten.fill_.Scalar, _aten.zero_.default)
"""Constants written behind what was loaded: rows of a vocabulary that no token has, heads that only fill up a rank."""
_CONSTANTS = (_aten.zeros_like.default, _aten.empty_like.default, _aten.new_zeros.default, _aten.new_empty.default)
"""These take of a tensor only its form."""


class Wanted(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Held:
    """A part of a checkpoint's tensor in this process: element by element ``place`` is what lies at ``offset`` and ``strides`` in it."""

    index: int
    """Of the tensor, in the sequence that was asked for."""
    place: Tensor
    """A view of the parameter."""
    offset: int
    strides: Sequence[int]


class Trace(NamedTuple):
    """What the loader would do."""

    held: list[Held]
    unmapped: dict[int, str]
    """Why it cannot be told where a tensor goes, by its index. One that goes nowhere (other ranks may hold it) is not among them."""
    unfilled: list[str]
    """Parameters into which no tensor goes."""


class NotACopy(RuntimeError):
    """The loader does something with a tensor that is no view and no copy into a parameter."""


class _Recorder(TorchDispatchMode):
    """Lets views pass, notes copies of ours into parameters, and refuses whatever else would read or write a parameter."""

    def __init__(self, ours: Sequence[Tensor]) -> None:
        super().__init__()
        self._index = {_storage(tensor): index for index, tensor in enumerate(ours)}
        self.held: list[Held] = []
        self.padded: set[int] = set()
        """Memory into which the loader writes constants: a rank may hold nothing but padding of a parameter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is _aten.copy_.default:
            return self._copy(*args[:2])
        if func in _PADDING and first is not None:
            self.padded.add(_storage(first))
            return first
        # Onto another device, into another dtype, into contiguous memory: for the question of what goes where, the same tensor.
        if func in (_aten._to_copy.default, _aten.clone.default) and first is not None and _storage(first) in self._index:
            return _aten.alias.default(first)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # inference mode hands these over as they are
                return func.decompose(*args, **kwargs)
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if all(tensor.is_meta for tensor in tensors) or _is_view(func) or func in _CONSTANTS:
            return func(*args, **kwargs)
        raise NotACopy(f"the model's loader computes {func.name()} with it")

    def _copy(self, target: Tensor, source: Tensor) -> Tensor:
        if not source.is_meta:  # a constant: whatever is made from ours has no memory either
            self.padded.add(_storage(target))
            return target
        index = self._index.get(_storage(source))
        if index is None:
            raise NotACopy("the model's loader copies something computed from it")
        if target.shape != source.shape:
            raise NotACopy(f"the model's loader spreads {list(source.shape)} over {list(target.shape)}")
        if not target.is_meta:
            self.held.append(Held(index, target, int(source.storage_offset()), source.stride()))
        return target


def trace_load(model: Any, wanted: Sequence[Wanted]) -> Trace:
    """Asks ``model.load_weights`` where it would put each tensor. Parameters are neither read nor written."""
    tensors = [torch.empty(w.shape, dtype=w.dtype, device="meta") for w in wanted]
    recorder = _Recorder(tensors)
    unmapped: dict[int, str] = {}
    position = -1

    def rest() -> Iterator[tuple[str, Tensor]]:
        nonlocal position
        while position + 1 < len(wanted):
            position += 1
            yield wanted[position].name, tensors[position]

    while position + 1 < len(wanted):
        before = position
        try:
            with recorder:
                model.load_weights(rest())
        except Exception as error:  # a loader may raise anything at what it cannot take
            if position == before:
                raise
            if position < len(wanted):
                unmapped[position] = _sentence(error)
        else:
            break  # also if it did not ask for all: the others are not loaded
    held = [h for h in recorder.held if h.index not in unmapped]
    filled = {_storage(h.place) for h in held} | recorder.padded
    unfilled = [name for name, parameter in model.named_parameters() if _storage(parameter) not in filled]
    return Trace(held, unmapped, unfilled)


def _storage(tensor: Tensor) -> int:
    """The same number for all views of one memory; tensors on meta have no address."""
    return tensor.untyped_storage()._cdata


def _is_view(func: Any) -> bool:
    aliases = [argument.alias_info for argument in func._schema.arguments]
    return any(a is not None for a in aliases) and not any(a is not None and a.is_write for a in aliases)


def _sentence(error: BaseException) -> str:
    said = str(error).strip()
    return said.splitlines()[0][:200] if said else type(error).__name__
