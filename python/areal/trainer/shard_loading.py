"""Weights of a checkpoint into the shards of a model: each rank reads the bytes that it keeps, and no rank ever holds a whole model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from areal.models.checkpoint_ranges import CheckpointRanges, NoRanges
from areal.models.loading import load_model

log = logging.getLogger(__name__)


def allocate_shards(model: nn.Module, device: torch.device) -> None:
    """Gives the sharded parameters that are on the meta device memory on ``device``, without values.

    Tied parameters stay one; ``nn.Module.to_empty`` would make two of them, and forget the values of buffers.
    """
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


def fill_shards(tensors: Mapping[str, Tensor], template: PreTrainedModel, folder: Path) -> None:
    """Reads the checkpoint ``folder`` of the architecture ``template`` into sharded parameters and whole buffers, by their names there.

    A collective. A checkpoint of which parameters are not ranges (see ``checkpoint_names``) is loaded whole by transformers on rank 0, which
    hands out one parameter after the other; the log says why.
    """
    try:
        ranges = CheckpointRanges(folder, template)
    except NoRanges as error:
        log.warning("%s is loaded whole by rank 0, not by each rank what it keeps: %s", folder, error)
        _hand_out(tensors, template, folder)
        return
    with ranges, torch.no_grad():
        for name, tensor in tensors.items():
            begin, local = _own_rows(tensor)
            if local.numel():
                ranges.read(name, begin * tensor.shape[1:].numel(), local)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a checkpoint holds."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in parameters}


def _own_rows(tensor: Tensor) -> tuple[int, Tensor]:
    """The first row that this rank keeps, and the rows: FSDP cuts the first dimension as ``torch.chunk`` does."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.detach()
    mesh = tensor.device_mesh
    chunk = -(-tensor.shape[0] // mesh.size(-1))
    return chunk * mesh.get_local_rank(mesh.ndim - 1), tensor.to_local().detach()


def _hand_out(tensors: Mapping[str, Tensor], template: PreTrainedModel, folder: Path) -> None:
    for tensor, whole in _whole_tensors(tensors, template, folder):
        begin, local = _own_rows(tensor)
        local.copy_(whole if local.shape == whole.shape else whole[begin : begin + len(local)])


def _whole_tensors(tensors: Mapping[str, Tensor], template: PreTrainedModel, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """What to fill, and its whole values on this rank, one after the other."""
    loaded: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        model = load_model(folder, dtype=torch.float32)
        loaded = dict(model.named_parameters()) | persistent_buffers(model)
        if untied := sorted(loaded.keys() - dict(template.named_parameters()).keys() - persistent_buffers(template).keys()):
            raise ValueError(
                f"{folder}: '{untied[0]}' is tied to another parameter by config.json, and has other values in the checkpoint; "
                "set tie_word_embeddings to false in config.json"
            )
    for name, tensor in tensors.items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=_own_rows(tensor)[1].device)
        if name in loaded:
            whole.copy_(loaded.pop(name).detach())
        if dist.get_world_size() > 1:
            dist.broadcast(whole, 0)
        yield tensor, whole
