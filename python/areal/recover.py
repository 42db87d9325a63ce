"""A run that was cut off goes on: what the controller writes down of it, when, and how it finds its way back.

A checkpoint of step i holds the state after i train steps: models, optimizers and random numbers by the ranks (``trainer/recover.py``), the
rest here, as the command has it (``recover_train.py``, ``recover_supervised.py``).
"""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from areal.config import ConfigError, GRPOConfig
from areal.random_state import random_state
from areal.recover_files import (
    begin_checkpoint,
    checkpoints,
    cut_back,
    finish_checkpoint,
    keep_newest,
    set_aside,
    step_of,
    sync_logs,
    what_is_wrong,
)
from areal.run_folder import refuse_running, run_folder_of

if TYPE_CHECKING:
    from areal.cluster import Cluster

_FIXED = ("seed", "actor.init_from_scratch", "actor.lora", "actor.lora.rank", "actor.lora.alpha", "actor.lora.target_modules")
"""Keys that say, for every command, which tensors there are and what they mean."""
_UNIMPORTANT = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
"""Keys of a model's config.json that say nothing about its tensors."""
WAY_OUT = "give the trial another name (trial_name), or start anew with recover.mode=off"
_PICKLE = "rows.pickle"


@dataclass(kw_only=True)
class SavedState(ABC):
    """What the controller knows after ``step`` train steps; a class for each command that can go on."""

    command: ClassVar[str]
    """That writes and reads it, as people type it."""
    pickled: ClassVar[tuple[str, ...]] = ()
    """Fields that hold users' objects; all others are written as JSON."""
    steps_are_of_warmup: ClassVar[bool] = False
    """Whether ``step`` counts the rows of warmup.jsonl."""

    step: int
    config: dict[str, Any]
    model: dict[str, Any]
    """The config.json of the starting model."""
    drops: dict[str, int]
    random: dict[str, Any]
    folder: Path = field(default=Path(), compare=False)
    """Where it was read from."""
    notes: list[str] = field(default_factory=list, compare=False)
    """What the user should know about how it was found."""

    @classmethod
    @abstractmethod
    def is_over(cls, summary: Mapping[str, Any], config: GRPOConfig) -> bool:
        """Whether the run of this summary.json has done all that is wanted; true of another command's, which has nothing to go on with."""

    @classmethod
    @abstractmethod
    def planned(cls, config: GRPOConfig) -> tuple[str, int]:
        """The key that says how many steps are wanted, and its value."""

    @classmethod
    @abstractmethod
    def fixed(cls, config: GRPOConfig) -> tuple[str, ...]:
        """Keys that give this state its meaning, besides those that do so for every command."""

    def check(self, config: GRPOConfig, folder: Path) -> None:
        """``ConfigError`` for what else does not fit: fewer steps than were done."""
        key, n_steps = self.planned(config)
        if n_steps < self.step:
            raise ConfigError(f"{key}={n_steps}, but the run in {folder} has done {self.step} steps", f"raise it, or {WAY_OUT}")

    def files(self) -> dict[str, bytes]:
        """By their names in the checkpoint.

        Raises:
            OSError: rows that cannot be pickled.
        """
        names = [f.name for f in fields(self) if f.name not in ("folder", "notes", *self.pickled)]
        files = {"state.json": json.dumps({"command": self.command} | {name: getattr(self, name) for name in names}).encode()}
        if self.pickled:
            try:
                files[_PICKLE] = pickle.dumps({name: getattr(self, name) for name in self.pickled})
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise OSError(f"rows of train_dataset cannot be pickled ({error})") from error
        return files

    @classmethod
    def read(cls, folder: Path) -> Self:
        plain = json.loads((folder / "state.json").read_bytes())
        if plain.get("command", cls.command) != cls.command:
            raise ConfigError(
                f"the run that would go on in {folder.parents[1]} is one of `{plain['command']}`, not of `{cls.command}`", WAY_OUT
            )
        try:
            del plain["command"]
            pickled = pickle.loads((folder / _PICKLE).read_bytes()) if cls.pickled else {}
            return cls(**plain, **pickled, folder=folder)
        except (KeyError, TypeError, AttributeError, ImportError) as error:  # other fields than these, or rows of classes that are not here
            raise ConfigError(
                f"the recover checkpoint {folder} cannot be read here ({error})", "go on with the areal and the code that wrote it"
            ) from error


S = TypeVar("S", bound=SavedState)


def fixed_of_rows(key: str) -> tuple[str, ...]:
    """The keys of a data set, itself named ``key``, that give a place in it its meaning."""
    return tuple(f"{key}.{name}" for name in ("type", "split", "limit", "shuffle", "min_terms", "max_terms", "terms"))


# -- finding the way back ---------------------------------------------------------------------------------------------------------------


def find_resumable(config: GRPOConfig, kind: type[S]) -> S | None:
    """The state that this run, one of ``kind.command``, goes on from, every byte of its checkpoint checked; None to start anew.

    Raises:
        ConfigError: nothing to go on from where ``recover.mode=required``, only damaged checkpoints, or a configuration that the state
            does not fit.
    """
    if config.recover.mode == "off":
        return None
    folder = run_folder_of(config)
    refuse_running(folder)
    found = checkpoints(folder)
    if not found or _is_finished(folder, config, kind):
        if config.recover.mode == "required":
            why = f"the run in {folder} has finished" if found else f"there is no recover checkpoint in {folder}"
            way_out = "set recover.mode=auto to start one"
            if found:
                way_out = f"raise {kind.planned(config)[0]} if that is what ended it, or set recover.mode=auto to start anew"
            raise ConfigError(f"recover.mode=required, but {why}", way_out)
        return None
    notes: list[str] = []
    for checkpoint in found:
        if wrong := what_is_wrong(checkpoint):
            notes.append(f"the recover checkpoint {checkpoint.name} is damaged: {wrong}")
            continue
        state = kind.read(checkpoint)
        _check_config(state, config, folder)
        state.notes = notes
        return state
    raise ConfigError(
        f"no recover checkpoint of {folder} can be used; {notes[0]}",
        "put back a copy of one, or start anew with recover.mode=off, which keeps this folder under another name",
    )


def _is_finished(folder: Path, config: GRPOConfig, kind: type[SavedState]) -> bool:
    try:
        return kind.is_over(json.loads((folder / "summary.json").read_text()), config)
    except FileNotFoundError:
        return False


def _check_config(state: SavedState, config: GRPOConfig, folder: Path) -> None:
    now = config.model_dump(mode="json")
    for key in (*_FIXED, *state.fixed(config)):
        was, wanted = look_up(state.config, key), look_up(now, key)
        if was != wanted:
            raise ConfigError(f"{key} is {_show(wanted)}, but the run that would go on in {folder} has {_show(was)}", WAY_OUT)
    if config.actor.path:
        model = _model_config(Path(config.actor.path).expanduser())
        if differing := sorted(k for k in model.keys() | state.model.keys() if model.get(k) != state.model.get(k)):
            key = differing[0]
            raise ConfigError(
                f"actor.path={config.actor.path} is another model than that of the run that would go on in {folder}: "
                f"{key} is {_show(model.get(key))} instead of {_show(state.model.get(key))}",
                WAY_OUT,
            )
    state.check(config, folder)


def look_up(tree: Any, key: str) -> Any:
    """A value by its dotted key; of a section, whether it is there."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return "given" if isinstance(tree, Mapping) and key in ("actor.lora", "critic", "warmup.dataset") else tree


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _model_config(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key not in _UNIMPORTANT}


def go_on(state: SavedState, run_folder: Path) -> None:
    """Takes the files of the run back to the state; ``state.notes`` says what this removed."""
    for folder in checkpoints(run_folder):
        if step_of(folder) > state.step:
            set_aside(folder)
    if later := cut_back(run_folder, state.step, of_warmup=state.steps_are_of_warmup):
        state.notes.append(f"removed checkpoints of later steps: {', '.join(later)}")


# -- writing -------------------------------------------------------------------------------------------------------------------------------


class Recovery(ABC):
    """The checkpoints of one run, from its loop: ``save`` after a step that is due.

    A checkpoint that fails, or is due while the one before is still being written, is counted and shown, and the run goes on.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._writing = False

    @abstractmethod
    def _state(self, step: int) -> SavedState: ...

    def _common(self, step: int) -> dict[str, Any]:
        """The fields that every command's state has."""
        cluster = self._cluster
        return {
            "step": step,
            "config": cluster.config.model_dump(mode="json"),
            "model": _model_config(cluster.model_folder),
            "drops": cluster.drops.totals,
            "random": random_state(),
        }

    def is_due(self, step: int) -> bool:
        every = self._cluster.config.recover.every_steps
        return every > 0 and step % every == 0

    async def save(self, tasks: asyncio.TaskGroup, step: int) -> None:
        """Returns when the state has been copied; the rest goes on in a task."""
        cluster = self._cluster
        if self._writing:
            cluster.drops.add("recover_skipped", f"that of step {step}: the one before is still being written")
            cluster.display.note(f"no recover checkpoint of step {step}: the one before is still being written; raise recover.every_steps")
            return
        state = self._state(step)
        try:
            partial = await asyncio.to_thread(begin_checkpoint, cluster.run_folder, step)
        except OSError as error:
            self._failed(step, error)
            return
        begin = time.time()
        await cluster.trainer.copy_state(partial)
        self._writing = True
        tasks.create_task(self._write(state, partial, begin), name=f"recover checkpoint {step}")

    async def _write(self, state: SavedState, partial: Path, begin: float) -> None:
        cluster = self._cluster
        try:
            written = await cluster.trainer.state_written(partial)
            await asyncio.to_thread(self._finish, state, partial, written["files"])
            cluster.stats.span("trainer 0", "checkpoint", begin, time.time())
        except OSError as error:
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
            self._failed(state.step, error)
        finally:
            self._writing = False

    def _finish(self, state: SavedState, partial: Path, files: dict[str, tuple[int, str]]) -> None:
        own = state.files()
        sync_logs(self._cluster.run_folder)
        finish_checkpoint(partial, files, own)
        keep_newest(self._cluster.run_folder, self._cluster.config.recover.keep)

    def _failed(self, step: int, error: OSError) -> None:
        reason = error.strerror or str(error)
        self._cluster.drops.add("recover_failed", reason)
        self._cluster.display.note(f"the recover checkpoint of step {step} could not be written to {self._cluster.run_folder}: {reason}")
