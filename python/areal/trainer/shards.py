"""Weights of a checkpoint into the shards of a model: each rank reads the bytes that it keeps, and no rank ever holds a whole model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from areal.models.checkpoint_ranges import CheckpointRanges, NoRanges
from areal.models.loading import load_model

log = logging.getLogger(__name__)


def fill_shards(model: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Gives the parameters of a sharded model, which are on the meta device, memory on ``device`` and the values of the checkpoint.

    A collective. A checkpoint of which parameters are not ranges (see ``checkpoint_names``) is loaded whole by transformers on rank 0, which
    hands out one parameter after the other; the log says why.
    """
    buffers = _persistent_buffers(model)
    try:
        ranges = CheckpointRanges(folder, model)
    except NoRanges as error:
        log.warning("%s is loaded whole by rank 0 and not by each rank what it keeps: %s", folder, error)
        _allocate(model, device)
        _hand_out(model, buffers, folder)
        return
    _allocate(model, device)
    with ranges, torch.no_grad():
        for name, parameter in model.named_parameters():
            begin, local = _own_rows(parameter)
            if local.numel():
                ranges.read(name, begin * parameter.shape[1:].numel(), local)
        for name, buffer in buffers.items():
            ranges.read(name, 0, buffer)


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in parameters}


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Tied parameters stay one; ``nn.Module.to_empty`` would make two of them, and forget the values of buffers."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                assert isinstance(parameter, DTensor)
                local = torch.empty(parameter.to_local().shape, dtype=parameter.dtype, device=device)
                sharded = DTensor.from_local(
                    local,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
                made[id(parameter)] = nn.Parameter(sharded, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def _own_rows(parameter: Tensor) -> tuple[int, Tensor]:
    """The first row that this rank keeps, and the rows: FSDP cuts the first dimension as ``torch.chunk`` does."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    chunk = -(-parameter.shape[0] // mesh.size(-1))
    return chunk * mesh.get_local_rank(mesh.ndim - 1), parameter.detach().to_local()


def _hand_out(model: PreTrainedModel, buffers: dict[str, Tensor], folder: Path) -> None:
    for name, tensor, whole in _whole_tensors(model, buffers, folder):
        if name in buffers:
            tensor.copy_(whole)
            continue
        begin, local = _own_rows(tensor)
        local.copy_(whole[begin : begin + len(local)])


def _whole_tensors(model: PreTrainedModel, buffers: dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, what to fill, and the whole values on this rank, one after the other."""
    wanted = dict(model.named_parameters()) | buffers
    loaded: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        from_transformers = load_model(folder, dtype=torch.float32)
        loaded = dict(from_transformers.named_parameters()) | _persistent_buffers(from_transformers)
        if loaded.keys() != wanted.keys():
            name = min(loaded.keys() ^ wanted.keys())
            raise ValueError(
                f"{folder}: '{name}' is a parameter of its own in the checkpoint or in the model, but not in both; "
                "look at tie_word_embeddings in config.json"
            )
    for name, tensor in wanted.items():
        device = tensor.to_local().device if isinstance(tensor, DTensor) else tensor.device
        if name in loaded:
            whole = loaded.pop(name).detach().to(device)
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if dist.get_world_size() > 1:
            dist.broadcast(whole, 0)
        yield name, tensor, whole
