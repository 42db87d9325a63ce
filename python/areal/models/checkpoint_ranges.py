"""Any range of any parameter straight from the files of a checkpoint, so that a rank reads what it keeps and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from areal.models.checkpoint_names import CheckpointNames, CheckpointTensor
from areal.models.selfcheck import UnsupportedModel
from areal.weight_sync.checkpoint_reader import CheckpointReader
from areal.weight_sync.safetensors_file import FileTensor


class NoRanges(Exception):
    """The parameters are not ranges of the checkpoint's tensors; the message says why. transformers may still be able to load it."""


class CheckpointRanges:
    """The parameters of a model as they lie in the safetensors files of ``folder``. A context manager; ``NoRanges``."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """``model`` may be on the meta device."""
        try:
            self._files = CheckpointReader(folder)
        except FileNotFoundError as error:
            raise NoRanges(str(error)) from error
        try:
            self._sources = _sources(model, self._files.tensors)
        except BaseException:
            self._files.close()
            raise

    def read(self, name: str, begin: int, target: Tensor) -> None:
        """Fills ``target`` (contiguous, any dtype and device) with the elements of parameter ``name`` from number ``begin`` on."""
        flat = target.view(-1)
        for tensor in self._sources[name]:
            file = self._files.tensors[tensor.name]
            first = max(begin, tensor.start)
            last = min(begin + flat.numel(), tensor.start + file.nbytes // file.dtype.itemsize)
            if first < last:
                self._files.read(_part(file, first - tensor.start, last - tensor.start), flat[first - begin : last - begin])

    def __enter__(self) -> CheckpointRanges:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()


def _part(file: FileTensor, begin: int, end: int) -> FileTensor:
    size = file.dtype.itemsize
    return replace(file, shape=(end - begin,), offset=file.offset + begin * size, nbytes=(end - begin) * size)


def _sources(model: PreTrainedModel, tensors: Mapping[str, FileTensor]) -> dict[str, tuple[CheckpointTensor, ...]]:
    """Of every parameter, and of every buffer that a checkpoint holds."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise NoRanges("its weights are quantised")
    try:
        names = CheckpointNames(model)
    except UnsupportedModel as error:
        raise NoRanges(str(error)) from error
    sources = {name: names.of(name) for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - sources.keys()
    if twice := sorted(tied & tensors.keys()):
        raise NoRanges(f"it holds '{twice[0]}', which is tied to another parameter")  # transformers compares them, and may untie them
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in sources and name not in tied:
            sources[name] = (CheckpointTensor(name, tuple(value.shape), 0),)
    for parts in sources.values():
        for part in parts:
            found = tensors.get(part.name)
            if found is None:
                raise NoRanges(f"it has no tensor '{part.name}'")
            if found.shape != part.shape:
                raise NoRanges(f"its tensor '{part.name}' has shape {found.shape}, the model's is {part.shape}")
    return sources
