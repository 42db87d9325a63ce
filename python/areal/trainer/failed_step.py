"""A train step whose numbers were not finite, kept for ``areal replay-batch``: what it was computed from, written beside the run.

folder/
    replay.json      the actor's configuration, temperature, policy version, and the mini-batches with their denominators
    batch.npz        the micro-batches of all ranks: MINIBATCH.RANK.TURN.FIELD; a value head on the actor's layers
    weights/         a Hugging Face checkpoint, and in weights/adapter what adapters were trained on it. A step that is not finite is
                     skipped, so these are the weights that it was computed with
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from areal.config import ActorConfig, CriticConfig, DPOConfig
from areal.trainer.checkpoint import ADAPTER_FOLDER, write_checkpoint
from areal.trainer.mesh import RankMesh
from areal.trainer.sharding import full_tensor, local_part
from areal.types import Microbatch
from areal.weight_sync.adapter import WEIGHTS

if TYPE_CHECKING:
    from areal.trainer.engine import RankMinibatch, TrainEngine

_KNOWN = "known"
_VALUE_HEAD = "value_head"


@dataclass
class FailedMinibatch:
    """One that was skipped: its micro-batches, by rank once they were gathered."""

    denominator: float
    policy_denominator: float | None
    progress: float
    """As ``ppo_backward`` takes it."""
    ranks: list[list[Microbatch]]
    known: list[list[NDArray[np.float32] | None]]
    """Of each: the proximal log-probs [T], where they were recomputed; on preferences those of the reference."""


class NonFiniteGradients(RuntimeError):
    """Too many optimizer steps in a row had a loss or gradients with NaN or infinity."""

    def __init__(self, message: str, kind: str, minibatches: Sequence[FailedMinibatch] = (), preferences: DPOConfig | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        """ppo, sft or dpo; critic, which is not dumped."""
        self.minibatches = list(minibatches)
        """Those of the last train step that were skipped, this rank's part."""
        self.preferences = preferences


@dataclass
class FailedStep:
    """What was dumped, as ``load`` gives it back."""

    actor: ActorConfig
    temperature: float
    version: int
    kind: str
    minibatches: list[FailedMinibatch]
    preferences: DPOConfig | None = None
    weights: Path = field(default_factory=Path)
    critic: CriticConfig | None = None
    """One on the actor's layers, whose loss is a part of the step."""
    value_head: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Its parameters."""


def dump(engine: TrainEngine, error: NonFiniteGradients, folder: Path) -> str:
    """Writes ``folder``, whole or not at all; a collective. Returns what to tell about it, on all ranks; a full disk is told there too."""
    weights, adapter = engine.snapshot(merged=False), engine.adapter_snapshot()
    value_head = {}
    if engine.shared_critic is not None:
        value_head = {name: full_tensor(p).float().cpu().numpy() for name, p in engine.model.value_head.named_parameters()}
    gathered = _gather(engine, error.minibatches)
    text = ""
    if gathered is not None and weights is not None:
        step = FailedStep(engine.config, engine.temperature, engine.version, error.kind, gathered, error.preferences)
        step.critic, step.value_head = engine.shared_critic, value_head
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            write_checkpoint(partial / "weights", engine.template, weights, engine.model_dir, adapter)
            _write(step, partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            text = f"`areal replay-batch {folder}` finds where in that step it begins"
        except OSError as failure:
            shutil.rmtree(partial, ignore_errors=True)
            text = f"the step could not be dumped for replay: {failure}"
    if engine.mesh.world_size > 1:  # also so that no rank ends, and with it the others, before the files are there
        said = [text]
        dist.broadcast_object_list(said, src=0)
        text = said[0]
    return text


def _gather(engine: TrainEngine, own: list[FailedMinibatch]) -> list[FailedMinibatch] | None:
    """On rank 0 the parts of all ranks that have data of their own."""
    if engine.mesh.world_size == 1:
        return own
    parts: list[Any] | None = [None] * engine.mesh.world_size if engine.mesh.rank == 0 else None
    dist.gather_object(own, parts, dst=0)
    if parts is None:
        return None
    parts = parts[:: engine.mesh.layout.context]
    return [replace(same[0], ranks=[m.ranks[0] for m in same], known=[m.known[0] for m in same]) for same in zip(*parts, strict=True)]


def _write(step: FailedStep, folder: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {f"{_VALUE_HEAD}.{name}": parameter for name, parameter in step.value_head.items()}
    for m, minibatch in enumerate(step.minibatches):
        for r, (microbatches, of_each) in enumerate(zip(minibatch.ranks, minibatch.known, strict=True)):
            for t, (microbatch, known) in enumerate(zip(microbatches, of_each, strict=True)):
                fields = {f.name: getattr(microbatch, f.name) for f in dataclasses.fields(Microbatch)} | {_KNOWN: known}
                arrays |= {f"{m}.{r}.{t}.{name}": value for name, value in fields.items() if value is not None}
    np.savez_compressed(folder / "batch.npz", allow_pickle=False, **arrays)
    facts = {
        "kind": step.kind,
        "version": step.version,
        "temperature": step.temperature,
        "actor": step.actor.model_dump(mode="json"),
        "preferences": None if step.preferences is None else step.preferences.model_dump(mode="json"),
        "critic": None if step.critic is None else step.critic.model_dump(mode="json"),
        "minibatches": [
            {
                "denominator": m.denominator,
                "policy_denominator": m.policy_denominator,
                "progress": m.progress,
                "turns": [len(turns) for turns in m.ranks],
            }
            for m in step.minibatches
        ],
    }
    (folder / "replay.json").write_text(json.dumps(facts, indent=1) + "\n")


def load(folder: Path) -> FailedStep:
    """What ``dump`` wrote; ``FileNotFoundError``, ``ValueError`` or ``KeyError`` for anything else."""
    facts = json.loads((folder / "replay.json").read_text())
    with np.load(folder / "batch.npz") as arrays:
        minibatches = []
        for m, about in enumerate(facts["minibatches"]):
            turns = about["turns"]
            ranks = [[_read(arrays, f"{m}.{r}.{t}.") for t in range(n)] for r, n in enumerate(turns)]
            known = [[arrays.get(f"{m}.{r}.{t}.{_KNOWN}") for t in range(n)] for r, n in enumerate(turns)]
            minibatches.append(FailedMinibatch(about["denominator"], about["policy_denominator"], about["progress"], ranks, known))
        head = {name.removeprefix(f"{_VALUE_HEAD}."): arrays[name] for name in arrays if name.startswith(_VALUE_HEAD)}
    # Where the model came from is of no interest any more: it is loaded from the folder.
    actor = ActorConfig.model_validate({**facts["actor"], "path": str(folder / "weights"), "init_from_scratch": None})
    preferences = None if facts["preferences"] is None else DPOConfig.model_validate(facts["preferences"])
    critic = None if facts["critic"] is None else CriticConfig.model_validate(facts["critic"])
    weights = folder / "weights"
    return FailedStep(actor, facts["temperature"], facts["version"], facts["kind"], minibatches, preferences, weights, critic, head)


def engine_of(step: FailedStep, mesh: RankMesh) -> TrainEngine:
    """With the weights that the step was computed with, on one rank."""
    from areal.trainer.engine import TrainEngine

    actor = step.actor.model_copy(update={"backend": "fsdp:d1", "offload": False})  # neither changes loss or gradients
    engine = TrainEngine(step.weights, actor, temperature=step.temperature, mesh=mesh, critic=step.critic)
    if engine.actor.adapters is not None:
        engine.actor.adapters.load(load_file(step.weights / ADAPTER_FOLDER / WEIGHTS))
    with torch.no_grad():
        for name, values in step.value_head.items():
            local_part(engine.model.value_head.get_parameter(name)).copy_(torch.from_numpy(values))
    return engine


def _read(arrays: Any, prefix: str) -> Microbatch:
    found = {f.name: arrays.get(prefix + f.name) for f in dataclasses.fields(Microbatch)}
    return Microbatch(**{**found, "members": found["members"].tolist()})


def failed_minibatch(minibatch: RankMinibatch, known: Sequence[Tensor | None], progress: float) -> FailedMinibatch:
    """This rank's part of one, with ``known`` of each micro-batch (without what a context rank added to it)."""
    arrays = [
        None if k is None else k[: mb.n_tokens].detach().float().cpu().numpy() for mb, k in zip(minibatch.microbatches, known, strict=True)
    ]
    return FailedMinibatch(minibatch.denominator, minibatch.policy_denominator, progress, [minibatch.microbatches], [arrays])
