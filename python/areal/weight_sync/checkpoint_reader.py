"""Any Hugging Face checkpoint into a model's parameters, tensor by tensor: no second whole model is held."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from areal.weight_sync.safetensors_file import FileTensor, read_header, read_tensor

_INDEX = "model.safetensors.index.json"


def open_checkpoint(folder: Path, model: PreTrainedModel) -> CheckpointReader | LoadedCheckpoint:
    """What ``read_into`` can be called on for the model's parameters; to be used as a context manager.

    ``ValueError`` or ``OSError`` if the folder cannot be loaded into this model; parameters are not touched.
    """
    if not any(folder.glob("*.safetensors")):
        return LoadedCheckpoint(folder, model)
    reader = CheckpointReader(folder)
    try:
        reader.check(dict(model.named_parameters()))
    except ValueError:
        reader.close()
        if getattr(model, "_weight_conversions", None):
            return LoadedCheckpoint(folder, model)
        raise
    reader.prefetch()
    return reader


class LoadedCheckpoint:
    """A checkpoint in another format, or whose tensors become parameters by a conversion: loaded whole, by transformers."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, local_files_only=True, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"the checkpoint has no tensor '{missing[0]}'")
        if mismatched := sorted(report["mismatched_keys"]):
            raise ValueError(f"tensor '{mismatched[0][0]}' has shape {tuple(mismatched[0][1])}, the model's is {tuple(mismatched[0][2])}")
        self._parameters = dict(loaded.named_parameters())

    def read_into(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies every parameter; ``ValueError`` before the first copy if names or shapes differ."""
        for name, parameter in parameters.items():
            if name not in self._parameters or self._parameters[name].shape != parameter.shape:
                raise ValueError(f"the checkpoint's model has no '{name}' of shape {tuple(parameter.shape)}")
        for name, parameter in parameters.items():
            parameter.copy_(self._parameters[name].detach())

    def __enter__(self) -> LoadedCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._parameters = {}


class CheckpointReader:
    """The safetensors files of a folder, opened: a version that is removed meanwhile can be read to its end. A context manager.

    ``ValueError`` or ``OSError`` if there are none, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tensors: dict[str, FileTensor] = {}
        """What the checkpoint holds, by name."""
        self._open = ExitStack()
        self._descriptors: dict[Path, int] = {}
        try:
            for path in _weight_files(folder):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._open.callback(os.close, descriptor)
                self._descriptors[path] = descriptor
                self.tensors |= read_header(path)
        except BaseException:
            self._open.close()
            raise

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """``ValueError`` unless every parameter is there, in its shape. The checkpoint may hold more (tied weights)."""
        for name, parameter in parameters.items():
            found = self.tensors.get(name)
            if found is None:
                raise ValueError(f"the checkpoint has no tensor '{name}'")
            if found.shape != tuple(parameter.shape):
                raise ValueError(f"tensor '{name}' has shape {found.shape}, the model's is {tuple(parameter.shape)}")

    def prefetch(self) -> None:
        """Asks the system to have the files in memory soon."""
        for descriptor in self._descriptors.values():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def read_into(self, parameters: Mapping[str, Tensor]) -> None:
        """Reads every parameter, in the order of the files. Only an ``OSError`` of the file system can leave some of them old."""
        self.check(parameters)
        order = {path: index for index, path in enumerate(self._descriptors)}
        for name in sorted(parameters, key=lambda name: (order[self.tensors[name].path], self.tensors[name].offset)):
            source = self.tensors[name]
            try:
                read_tensor(self._descriptors[source.path], source, parameters[name])
            except OSError as error:
                raise OSError(f"'{name}' could not be read, and parameters before it are new already ({error}); update again") from error

    def read(self, source: FileTensor, target: Tensor) -> None:
        """One of ``tensors``, or a part of one, into ``target`` of the same shape. ``OSError``."""
        read_tensor(self._descriptors[source.path], source, target)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of a checkpoint: {error!r}") from error
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors files")
    return files
