"""A run that was cut off goes on: what the controller writes down of it, when, and how it finds its way back.

A checkpoint of step i holds the state after i train steps, when version i has been published: models, optimizers and random numbers by the
ranks (``trainer/recover.py``), the rest here. Groups that were not trained on by then are generated again, from the same rows under the
same numbers: admission restarts at ``i * B``, so eta means the same as before, and with eta = 0 and ``deterministic: true`` the run goes on
bit for bit as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from areal.config import ConfigError, GRPOConfig
from areal.metrics import RunTotals
from areal.random_state import random_state, set_random_state
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
    from areal.buffer import TrajectoryBuffer
    from areal.cluster import Cluster
    from areal.group_filter import GroupFilter
    from areal.runner import Runner

_FIXED = (
    "seed",
    "train_dataset.type",
    "train_dataset.split",
    "train_dataset.limit",
    "train_dataset.shuffle",
    "train_dataset.min_terms",
    "train_dataset.max_terms",
    "train_dataset.terms",
    "actor.init_from_scratch",
    "actor.optimizer.type",
    "actor.lora",
    "actor.lora.rank",
    "actor.lora.alpha",
    "actor.lora.target_modules",
    "critic",
    "critic.path",
    "critic.shared",
    "critic.optimizer.type",
)
"""Keys that give the saved state its meaning: the order of the rows, and which tensors there are."""
_UNIMPORTANT = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
"""Keys of a model's config.json that say nothing about its tensors."""


@dataclass
class RunState:
    """What the controller knows after ``step`` train steps. All but ``data`` and ``pending`` is written as JSON."""

    step: int
    config: dict[str, Any]
    model: dict[str, Any]
    """The config.json of the starting model."""
    totals: dict[str, Any]
    tokens_generated: int
    busy_seconds: float
    drops: dict[str, int]
    reward_failures: dict[str, int]
    filter: dict[str, float]
    n_masked_tokens: int
    next_group: int
    n_rows: int
    """Rows that were read from the data set."""
    random: dict[str, Any]
    data: Any = None
    """Of the data set's ``state_dict``; None where it has none."""
    pending: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Group numbers and rows of the groups that were not trained on yet."""
    folder: Path = field(default=Path(), compare=False)
    """Where it was read from."""
    notes: list[str] = field(default_factory=list, compare=False)
    """What the user should know about how it was found."""

    def files(self) -> dict[str, bytes]:
        """By their names in the checkpoint.

        Raises:
            OSError: rows that cannot be pickled.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("data", "pending", "folder", "notes")}
        try:
            rows = pickle.dumps({"data": self.data, "pending": self.pending})
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise OSError(f"rows of train_dataset cannot be pickled ({error})") from error
        return {"state.json": json.dumps(plain).encode(), "rows.pickle": rows}

    @classmethod
    def read(cls, folder: Path) -> RunState:
        plain = json.loads((folder / "state.json").read_bytes())
        try:
            return cls(**plain, **pickle.loads((folder / "rows.pickle").read_bytes()), folder=folder)
        except (TypeError, AttributeError, ImportError) as error:  # other fields than these, or rows of classes that are not here
            raise ConfigError(
                f"the recover checkpoint {folder} cannot be read here ({error})", "go on with the areal and the code that wrote it"
            ) from error

    def place(self, rows: Any) -> None:
        """Takes a data set to where it was: by its own ``load_state_dict``, else by reading over as many rows as were read then."""
        if self.data is not None and hasattr(rows, "load_state_dict"):
            rows.load_state_dict(self.data)
            return
        for n in range(self.n_rows):
            if next(rows, None) is None:
                raise ConfigError(
                    f"train_dataset ended after {n} rows, but the run that goes on has read {self.n_rows}", "give the same rows"
                )


# -- finding the way back ---------------------------------------------------------------------------------------------------------------


def find_resumable(config: GRPOConfig) -> RunState | None:
    """The state that this run goes on from, every byte of its checkpoint checked; None to start anew.

    Raises:
        ConfigError: nothing to go on from where ``recover.mode=required``, only damaged checkpoints, or a configuration that the state
            does not fit.
    """
    if config.recover.mode == "off":
        return None
    folder = run_folder_of(config)
    refuse_running(folder)
    found = checkpoints(folder)
    if not found or _is_finished(folder, config):
        if config.recover.mode == "required":
            why = f"the run in {folder} has finished" if found else f"there is no recover checkpoint in {folder}"
            way_out = "raise total_train_steps" if found else "set recover.mode=auto to start one"
            raise ConfigError(f"recover.mode=required, but {why}", way_out)
        return None
    notes: list[str] = []
    for checkpoint in found:
        if wrong := what_is_wrong(checkpoint):
            notes.append(f"the recover checkpoint {checkpoint.name} is damaged: {wrong}")
            continue
        state = RunState.read(checkpoint)
        _check_config(state, config, folder)
        state.notes = notes
        return state
    raise ConfigError(
        f"no recover checkpoint of {folder} can be used; {notes[0]}",
        "put back a copy of one, or start anew with recover.mode=off, which keeps this folder under another name",
    )


def _is_finished(folder: Path, config: GRPOConfig) -> bool:
    """Whether the run has done all steps that are wanted."""
    try:
        return json.loads((folder / "summary.json").read_text())["train_steps"] >= config.total_train_steps
    except FileNotFoundError:
        return False


def _check_config(state: RunState, config: GRPOConfig, folder: Path) -> None:
    now = config.model_dump(mode="json")
    way_out = "give the trial another name (trial_name), or start anew with recover.mode=off"
    for key in _FIXED:
        was, wanted = _look_up(state.config, key), _look_up(now, key)
        if was != wanted:
            raise ConfigError(f"{key} is {_show(wanted)}, but the run that would go on in {folder} has {_show(was)}", way_out)
    if config.actor.path:
        model = _model_config(Path(config.actor.path).expanduser())
        if differing := sorted(k for k in model.keys() | state.model.keys() if model.get(k) != state.model.get(k)):
            key = differing[0]
            raise ConfigError(
                f"actor.path={config.actor.path} is another model than that of the run that would go on in {folder}: "
                f"{key} is {_show(model.get(key))} instead of {_show(state.model.get(key))}",
                way_out,
            )
    _check_reference(state, config, folder, way_out)
    if config.total_train_steps < state.step:
        raise ConfigError(
            f"total_train_steps={config.total_train_steps}, but the run in {folder} has done {state.step} steps", f"raise it, or {way_out}"
        )


def _check_reference(state: RunState, config: GRPOConfig, folder: Path, way_out: str) -> None:
    """A reference model that the warm-up made is part of the state, and nothing else can make it again."""
    if not config.uses_ref or config.ref.path:
        return
    warmed_up = state.config.get("warmup") is not None
    if (config.warmup is not None) != warmed_up:
        raise ConfigError(
            f"warmup is {'given' if config.warmup else 'null'}, but the run that would go on in {folder} began with{'' if warmed_up else 'out'} "
            "one, after which the reference model of actor.kl_ctl is taken",
            f"leave warmup as it was, set ref.path, or {way_out}",
        )
    if warmed_up and not (_look_up(state.config, "actor.kl_ctl") and not _look_up(state.config, "ref.path")):
        raise ConfigError(
            f"actor.kl_ctl={config.actor.kl_ctl:g} needs the reference model that the warm-up made, and the run that would go on in {folder} "
            "did not keep one",
            f"set ref.path, or {way_out}",
        )


def _look_up(tree: Any, key: str) -> Any:
    """A value by its dotted key; of a section, whether it is there."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return "given" if isinstance(tree, Mapping) and key in ("actor.lora", "critic") else tree


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _model_config(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key not in _UNIMPORTANT}


def go_on(state: RunState, run_folder: Path) -> None:
    """Takes the files of the run back to the state; ``state.notes`` says what this removed."""
    for folder in checkpoints(run_folder):
        if step_of(folder) > state.step:
            set_aside(folder)
    if later := cut_back(run_folder, state.step):
        state.notes.append(f"removed checkpoints of later steps: {', '.join(later)}")


# -- writing and going on ---------------------------------------------------------------------------------------------------------------


class Recovery:
    """The checkpoints of one run, from its loop: ``resume`` before the first step, ``save`` after a step that is due.

    A checkpoint that fails, or is due while the one before is still being written, is counted and shown, and the run goes on.
    """

    def __init__(
        self, cluster: Cluster, runner: Runner, buffer: TrajectoryBuffer, totals: RunTotals, group_filter: GroupFilter, started: float
    ) -> None:
        """``started``: of the whole run, as ``time.monotonic()``."""
        self._cluster = cluster
        self._runner = runner
        self._buffer = buffer
        self._totals = totals
        self._filter = group_filter
        self._started, self._begin = started, time.monotonic() - totals.seconds_rl
        self._writing = False

    def resume(self, state: RunState) -> None:
        """Runner, counters and random numbers as they were."""
        cluster = self._cluster
        self._runner.resume(state.next_group, state.n_rows, state.pending)
        self._buffer.n_masked_tokens = state.n_masked_tokens
        self._filter.load_state_dict(state.filter)
        cluster.drops.restore(state.drops)
        cluster.rewards.counters.failures.update(state.reward_failures)
        cluster.meter.tokens_generated += state.tokens_generated
        cluster.meter.busy_seconds += state.busy_seconds
        set_random_state(state.random)

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

    async def _write(self, state: RunState, partial: Path, begin: float) -> None:
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

    def _finish(self, state: RunState, partial: Path, files: dict[str, tuple[int, str]]) -> None:
        own = state.files()
        sync_logs(self._cluster.run_folder)
        finish_checkpoint(partial, files, own)
        keep_newest(self._cluster.run_folder, self._cluster.config.recover.keep)

    def _failed(self, step: int, error: OSError) -> None:
        reason = error.strerror or str(error)
        self._cluster.drops.add("recover_failed", reason)
        self._cluster.display.note(f"the recover checkpoint of step {step} could not be written to {self._cluster.run_folder}: {reason}")

    def _state(self, step: int) -> RunState:
        cluster, rows = self._cluster, self._cluster.train_dataset
        totals = asdict(self._totals) | {"seconds_rl": self.seconds(), "seconds_total": time.monotonic() - self._started}
        next_group, n_rows, unfinished = self._runner.position()
        untrained = unfinished | {group.group_id: group.data for group in self._buffer.finished()}
        pending = sorted(untrained.items(), key=lambda item: item[0])
        return RunState(
            step=step,
            config=cluster.config.model_dump(mode="json"),
            model=_model_config(cluster.model_folder),
            totals=totals,
            tokens_generated=cluster.meter.tokens_generated,
            busy_seconds=cluster.meter.busy_seconds,
            drops=cluster.drops.totals,
            reward_failures=dict(cluster.rewards.counters.failures),
            filter=self._filter.state_dict(),
            n_masked_tokens=self._buffer.n_masked_tokens,
            next_group=next_group,
            n_rows=n_rows,
            random=random_state(),
            data=rows.state_dict() if hasattr(rows, "state_dict") else None,
            pending=pending,
        )

    def seconds(self) -> float:
        """Of reinforcement learning, those before the run was cut off included."""
        return time.monotonic() - self._begin
