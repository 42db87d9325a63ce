"""Hugging Face checkpoints, written in the background: a folder has its name when it is whole, or does not exist."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from areal.models.loading import save_model
from areal.weight_sync.adapter import WEIGHTS, AdapterInfo

ADAPTER_FOLDER = "adapter"
_PARTIAL = ".partial"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


class CheckpointError(OSError):
    """A checkpoint that could not be written; nothing of it is left on the disk."""


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """The adapter of a model in training, on the CPU, by the names of peft's files."""

    factors: Mapping[str, Tensor]
    info: AdapterInfo

    def write(self, folder: Path) -> None:
        """As ``peft.PeftModel.from_pretrained`` reads it."""
        folder.mkdir()
        self.info.write_config(folder)
        save_file(dict(self.factors), folder / WEIGHTS, metadata={"format": "pt"})


def write_checkpoint(
    folder: Path, template: PreTrainedModel, weights: Mapping[str, Tensor], source: Path, adapter: SavedAdapter | None = None
) -> None:
    """Writes the model with the tokenizer and other small files of ``source``; an older checkpoint of that name is replaced.

    ``adapter`` goes into the subfolder ``adapter``; ``weights`` are those with its product added.

    Atomic: written beside ``folder``, synced, then renamed. ``CheckpointError`` when the disk is full or not writable.
    """
    partial = folder.with_name(f"{folder.name}{_PARTIAL}-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _check_space(partial, sum(w.nbytes for w in weights.values()))
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copyfile(file, partial / file.name)
        save_model(template, weights, partial)
        if adapter is not None:
            adapter.write(partial / ADAPTER_FOLDER)
        for file in partial.rglob("*"):
            _sync(file)
        _sync(partial)
        _replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"the checkpoint {folder} could not be written ({reason}); free space there or change stats_logger.fileroot"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(28, f"it needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free")


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}{_PARTIAL}-old-{os.getpid()}")  # a kill here leaves what the next start removes
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointWriter:
    """One thread a checkpoint, one checkpoint at a time; ``done(folder, error, begin, end)`` is called from that thread."""

    def __init__(self, template: PreTrainedModel, source: Path, done: Callable[[Path, str | None, float, float], None]) -> None:
        self._template = template
        self._source = source
        self._done = done
        self._busy = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, folder: Path, weights: Mapping[str, Tensor], adapter: SavedAdapter | None = None) -> None:
        """Tensors must be copies that nobody changes."""
        self._threads = [t for t in self._threads if t.is_alive()]
        thread = threading.Thread(target=self._write, args=(folder, weights, adapter), name=f"checkpoint {folder.name}")
        thread.start()
        self._threads.append(thread)

    def _write(self, folder: Path, weights: Mapping[str, Tensor], adapter: SavedAdapter | None) -> None:
        with self._busy:
            begin = time.time()
            error = None
            try:
                write_checkpoint(folder, self._template, weights, self._source, adapter)
            except Exception as failure:  # thread boundary: whatever it is, the controller must hear of it
                error = str(failure) if isinstance(failure, CheckpointError) else f"the checkpoint {folder} failed: {failure!r}"
            self._done(folder, error, begin, time.time())

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        for thread in self._threads:
            thread.join()
