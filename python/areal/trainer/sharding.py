"""FSDP2: parameters cut over the ranks, layer by layer, gradients summed."""

from __future__ import annotations

import types

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from areal.models.heads import packed_logprobs, packed_ppo_loss, packed_values
from areal.models.loading import decoder_layers

_HEAD_METHODS = (packed_logprobs, packed_ppo_loss, packed_values)


def add_head_methods(model: PreTrainedModel) -> None:
    """Makes ``packed_logprobs``, ``packed_ppo_loss`` and ``packed_values`` methods: FSDP unshards the root, which owns embedding, norm and head, around
    methods only."""
    for function in _HEAD_METHODS:
        setattr(model, function.__name__, types.MethodType(function, model))


def shard_model(model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype, *, offload: bool = False) -> None:
    """Shards in place; ``model`` holds float32 master weights, products run in ``dtype``, gradients are summed in float32.

    ``mesh`` is (shards,), or (replicas, shards): HSDP. ``offload`` keeps shards, gradients and what the optimizer makes of them in host memory.

    Tied weights lie in one unit, the root, because only the layers are units of their own; a layer that shares a parameter with
    anything outside of it would be untied silently, so that is a ``ValueError``.
    """
    layers = decoder_layers(model)
    _check_ties(model)
    # cast_forward_inputs would turn whatever float tensor is handed in into bfloat16.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=place)
    if (value_head := getattr(model, "value_head", None)) is not None:  # float32 in every product, so it is a unit of its own
        whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(value_head, mesh=mesh, mp_policy=whole, offload_policy=place)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=place)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor
    for function in _HEAD_METHODS:
        register_fsdp_forward_method(model, function.__name__)


def _check_ties(model: PreTrainedModel) -> None:
    owners: dict[int, int] = {}
    inside: set[int] = set()
    for index, layer in enumerate(decoder_layers(model)):
        inside.update(id(module) for module in layer.modules())
        for name, parameter in layer.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise ValueError(f"{type(model).__name__}: layers {owners[id(parameter)]} and {index} share '{name}'; train on one rank")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(module) not in inside and id(parameter) in owners:
                raise ValueError(f"{type(model).__name__}: '{name}' is shared with layer {owners[id(parameter)]}; train on one rank")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor: a collective that every rank must take part in."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
