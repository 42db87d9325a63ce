"""Recover checkpoints, the ranks' side: all that training depends on, out of these ranks and into as many as there are later.

Models and optimizers go through torch.distributed.checkpoint, which cuts tensors anew for another number of ranks. Every tensor has a
name that no layout changes: ``actor/model/<parameter>`` and ``actor/optimizer/<parameter>/<what is remembered of it>``.

Training waits until its state has been copied to host memory, and never for the disk: a thread a rank writes, and where there are several
they meet in a process group of their own. What is written has no name yet: the controller gives it one when all of it is there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from areal.random_state import random_state, set_random_state
from areal.recover_files import Files, file_digest
from areal.trainer.mesh import RankMesh
from areal.trainer.model import RankModel

if TYPE_CHECKING:
    from areal.trainer.critic import Critic
    from areal.trainer.engine import TrainEngine

_MODELS = "models"
_REFERENCE = "ref"
"""Name of the model that a run may stop to use, where it was kept."""
_COUNTERS = ("train_steps", "nonfinite_in_a_row")
_GROUP_TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the slowest one's disk."""

Done = Callable[[Path, str | None, Files, float, float], None]


class OtherModel(ValueError):
    """A checkpoint whose tensors are not those of the model."""


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that training changes, and all of a model that is not trained; the frozen ones around adapters come from their own folder."""
    everything = dict(model.named_parameters())
    return {name: p for name, p in everything.items() if p.requires_grad} or everything


def state_tensors(models: Mapping[str, RankModel]) -> dict[str, Tensor]:
    """Every tensor as this rank holds it, by its name; they are those of training, not copies."""
    state: dict[str, Tensor] = {}
    for model_name, model in models.items():
        model.reshard()  # only what is sharded is what the optimizer knows
        for name, parameter in saved_parameters(model.model).items():
            state[f"{model_name}/model/{name}"] = parameter.detach()
            for slot, value in model.optimizer_state(parameter).items():
                state[f"{model_name}/optimizer/{name}/{slot}"] = value
    return state


def counters(engine: TrainEngine) -> dict[str, int]:
    """What else a later step depends on."""
    return {f"{name}/{what}": getattr(owner, what) for name, owner in _owners(engine) for what in _COUNTERS} | {"version": engine.version}


def set_counters(engine: TrainEngine, values: Mapping[str, int]) -> None:
    engine.version = values["version"]
    for name, owner in _owners(engine):
        for what in _COUNTERS:
            setattr(owner, what, values[f"{name}/{what}"])


def _owners(engine: TrainEngine) -> list[tuple[str, TrainEngine | Critic]]:
    return [("actor", engine)] + ([] if engine.critic is None else [("critic", engine.critic)])


class StateWriter:
    """One checkpoint at a time; ``done(folder, error, files, begin, end)`` is called on rank 0, from the thread that wrote.

    All ranks make the same calls. With several ranks the first one is a collective of the default group.
    """

    def __init__(self, mesh: RankMesh, done: Done) -> None:
        self._mesh = mesh
        self._done = done
        self._group: dist.ProcessGroup | None = None
        self._stager: DefaultStager | None = None
        self._thread: threading.Thread | None = None

    def start(self, folder: Path, engine: TrainEngine) -> None:
        """Returns when the state has been copied; ``folder`` must be there."""
        self.wait()
        state = state_tensors(engine.models)
        record = {"world_size": self._mesh.world_size, "counters": counters(engine), "random": random_state()}
        n_bytes = sum(t.numel() * t.element_size() for t in state.values())  # of all ranks: a DTensor's numel is the whole tensor's
        if self._group is None and self._mesh.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        copies = self._copy(state)
        self._thread = threading.Thread(target=self._write, args=(folder, copies, record, n_bytes), name=f"recover {folder.name}")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()

    def _copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        on_gpu = self._mesh.device.type == "cuda"
        # Pinned memory is dear to get and several times as fast, so it is kept for the next checkpoint.
        if self._stager is None or not on_gpu:
            self._stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))
        copies = self._stager.stage(state)
        assert isinstance(copies, dict)
        return copies

    def _write(self, folder: Path, state: dict[str, Tensor], record: dict[str, Any], n_bytes: int) -> None:
        begin, error, files = time.time(), None, Files()
        try:
            files = self._write_files(folder, state, record, n_bytes)
        except (
            Exception,
            CheckpointException,
        ) as failure:  # the latter is none; thread boundary: the controller must hear of whatever it is
            error = _reason(failure)
        state.clear()
        try:
            error, files = self._gather(error, files)
        except RuntimeError as failure:  # a rank is gone, and the run with it
            error = error or str(failure)
        if self._mesh.rank == 0:
            self._done(folder, error, files, begin, time.time())

    def _write_files(self, folder: Path, state: dict[str, Tensor], record: dict[str, Any], n_bytes: int) -> Files:
        rank = self._mesh.rank
        writer = _Writer(folder / _MODELS, n_bytes)
        _expect_one_rank()
        dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        own = _rank_file(folder, rank)
        with own.open("w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        mine = [own, *(folder / _MODELS).glob(f"__{rank}_*")] + ([folder / _MODELS / ".metadata"] if rank == 0 else [])
        return {str(path.relative_to(folder)): (path.stat().st_size, file_digest(path)) for path in mine}

    def _gather(self, error: str | None, files: Files) -> tuple[str | None, Files]:
        """Of all ranks, on rank 0."""
        if self._group is None:
            return error, files
        parts: list[Any] | None = [None] * self._mesh.world_size if self._mesh.rank == 0 else None
        dist.gather_object((error, files), parts, dst=0, group=self._group)
        for other_error, other_files in parts or []:
            error = error or other_error
            files = files | other_files
        return error, files


class _Writer(FileSystemWriter):
    """Sees a disk that is too small before it is full for everybody. Where this raises, all ranks learn of it."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        super().__init__(path, sync_files=True)
        self._n_bytes = n_bytes

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        free = shutil.disk_usage(Path(self.path).parent).free
        if free < self._n_bytes:
            raise OSError(errno.ENOSPC, f"it needs {self._n_bytes / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free")
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save, about the end of a file that could not be written: what was the matter is behind it
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise (reason or error) from error


def _reason(failure: BaseException) -> str:
    """The first rank's own error, where several failed because of it."""
    error = next(iter(failure.failures.values()))[0] if isinstance(failure, CheckpointException) else failure
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or repr(error)


def _expect_one_rank() -> None:
    """No warning in the log about a rank that is alone, as it is meant to be."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:04d}.json"


# -- reading ----------------------------------------------------------------------------------------------------------------------


def restore(folder: Path, engine: TrainEngine) -> None:
    """Puts the state of a whole checkpoint into models, optimizers, counters and random numbers; a collective.

    Random numbers are restored where the number of ranks is the same. ``OtherModel`` leaves everything as it was.
    """
    models, mesh = engine.models, engine.mesh
    reader = FileSystemReader(folder / _MODELS)
    found = reader.read_metadata().state_dict_metadata
    if _REFERENCE not in models:  # this run has none any more, or takes it from its own path
        found = {name: entry for name, entry in found.items() if not name.startswith(f"{_REFERENCE}/")}
    for model in models.values():
        model.reshard()  # or a forward pass before this would hide what is loaded
    parameters = {f"{m}/model/{name}": p for m, model in models.items() for name, p in saved_parameters(model.model).items()}
    _check_same(folder, found, parameters)
    slots: dict[str, Tensor] = {}
    for model_name, model in models.items():
        for name, parameter in saved_parameters(model.model).items():
            prefix = f"{model_name}/optimizer/{name}/"
            slots |= {key: _like(parameter, entry) for key, entry in found.items() if key.startswith(prefix)}
    state = {name: p.detach() for name, p in parameters.items()} | slots
    _expect_one_rank()
    try:
        dcp.load(state, storage_reader=reader, no_dist=mesh.world_size == 1)
    except CheckpointException as failure:  # no Exception, so nobody else would catch it
        raise OSError(f"the recover checkpoint {folder} cannot be loaded: {_reason(failure)}") from failure
    for model_name, model in models.items():
        for name, parameter in saved_parameters(model.model).items():
            prefix = f"{model_name}/optimizer/{name}/"
            remembered = {key.removeprefix(prefix): value for key, value in slots.items() if key.startswith(prefix)}
            model.set_optimizer_state(parameter, remembered)
    record = json.loads(_rank_file(folder, 0).read_text())
    if record["world_size"] == mesh.world_size:
        set_random_state(json.loads(_rank_file(folder, mesh.rank).read_text())["random"])
    set_counters(engine, record["counters"])


def _check_same(folder: Path, found: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    saved = {name: tuple(entry.size) for name, entry in found.items() if "/model/" in name}
    here = {name: tuple(p.shape) for name, p in parameters.items()}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            was, now = (f"the shape {t[name]}" if name in t else "no place" for t in (saved, here))
            raise OtherModel(
                f"the recover checkpoint {folder} is of another model: '{name}' has {was} there and {now} here; give actor.path, "
                "actor.init_from_scratch, actor.lora, critic, warmup as they were, or start anew with recover.mode=off"
            )


def _like(parameter: nn.Parameter, entry: TensorStorageMetadata) -> Tensor:
    """A place for what an optimizer remembers: cut as the parameter is, where it has its shape."""
    if tuple(entry.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=entry.properties.dtype)
    return torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)
