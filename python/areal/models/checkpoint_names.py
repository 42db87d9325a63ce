"""The names and shapes that a model's weights have in a Hugging Face checkpoint: what goes over the wire to a server of SGLang.

transformers changes some checkpoints on loading (experts of a layer stacked into one tensor, modules renamed) and changes them back in
``save_pretrained``. The same is done here for one gathered tensor at a time, without moving a byte: every tensor of a checkpoint that is
one range of a parameter's memory is a view of it. Which range is found once, by letting transformers convert tensors that have a shape
and no memory. A model for which it takes more than that (a transposition, one tensor made of several parameters) is refused by name.
For Qwen2, Llama and most others nothing changes at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from areal.models.selfcheck import UnsupportedModel
from areal.weight_sync.stream import BucketPlan, TensorSpec

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of a checkpoint, as a range of the memory of a parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    """Elements from the start of the parameter."""


class CheckpointNames:
    """From the parameters of a model to the tensors of its checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        """``model`` may be on the meta device. ``UnsupportedModel`` if its checkpoint is not made of ranges of its parameters."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found = _ranges(model, shapes)
        self._ranges = {name: tuple(found[name]) for name in shapes}
        self.is_identity = all(ranges == (CheckpointTensor(name, shapes[name], 0),) for name, ranges in self._ranges.items())
        """Whether names and shapes are those of the parameters."""

    def of(self, name: str) -> tuple[CheckpointTensor, ...]:
        """What the parameter ``name`` is in a checkpoint; together its whole memory, in order."""
        return self._ranges[name]

    def on_the_wire(self, bucket: BucketPlan) -> BucketPlan:
        """The same bytes as ``bucket``, whose tensors are parameters, described as tensors of the checkpoint."""
        if self.is_identity:
            return bucket
        specs = [
            TensorSpec(tensor.name, tensor.shape, spec.dtype, spec.offset + tensor.start * spec.dtype.itemsize)
            for spec in bucket.tensors
            for tensor in self._ranges[spec.name]
        ]
        return BucketPlan(bucket.index, tuple(specs))


class _KeepMemory(TorchDispatchMode):
    """Copies of tensors without memory stay views of what they are copies of, so that it shows where they come from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _aten.clone.default:
            return _aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))


def _ranges(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[CheckpointTensor]]:
    sources = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    owner = {_memory(tensor): name for name, tensor in sources.items()}
    try:
        with _KeepMemory():
            converted: Mapping[str, Tensor] = revert_weight_conversion(model, dict(sources))
    except Exception as error:  # transformers says "Undefined Operation" and the like in many ways
        raise _refused(model, f"transformers cannot convert it back piece by piece ({error})") from error
    found: dict[str, list[CheckpointTensor]] = {name: [] for name in shapes}
    for name, tensor in converted.items():
        source = owner.get(_memory(tensor))
        if source is None:
            raise _refused(model, f"'{name}' of its checkpoint is computed from parameters")
        if not tensor.is_contiguous():
            raise _refused(model, f"'{name}' of its checkpoint lies scattered in parameter '{source}'")
        found[source].append(CheckpointTensor(name, tuple(tensor.shape), int(tensor.storage_offset())))
    for name, tensors in found.items():
        tensors.sort(key=lambda tensor: tensor.start)
        if not _tiles(tensors, sources[name].numel()):
            raise _refused(model, f"parameter '{name}' is not wholly in its checkpoint")
    return found


def _tiles(tensors: Sequence[CheckpointTensor], numel: int) -> bool:
    """Whether ranges, sorted, lie one behind the other from 0 to ``numel``."""
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            return False
        end += torch.Size(tensor.shape).numel()
    return end == numel


def _memory(tensor: Tensor) -> int:
    """The same number for all views of one memory; tensors on meta have no address."""
    return tensor.untyped_storage()._cdata


def _refused(model: PreTrainedModel, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights of {type(model).__name__} cannot be sent in the form of its checkpoint: {why}; use rollout.backend=embedded:dN, weight_sync.transport=shm"
    )
