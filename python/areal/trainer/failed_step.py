"""A train step whose numbers were not finite, kept for ``areal replay-batch``: what it was computed from, written beside the run.

folder/
    replay.json      the configuration of actor and critic, temperature, policy version, and the mini-batches with their denominators
    batch.npz        the micro-batches of all ranks: MINIBATCH.RANK.TURN.FIELD; the value head of a critic: value_head.NAME
    weights/         a Hugging Face checkpoint. A step that is not finite is skipped, so these are the weights that it was computed with;
                     where it was the critic's they are those of its layers
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
from torch import Tensor

from areal.config import ActorConfig, CriticConfig, DPOConfig
from areal.models.value_head import value_head_parameters
from areal.trainer.checkpoint import write_checkpoint
from areal.trainer.shard_loading import persistent_buffers
from areal.trainer.sharding import full_tensor
from areal.types import Microbatch

if TYPE_CHECKING:
    from areal.trainer.engine import RankMinibatch, TrainEngine
    from areal.trainer.model import RankModel

_KNOWN = "known"


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
        """ppo, sft, dpo, or critic: one with layers of its own."""
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
    critic: CriticConfig | None = None
    value_head: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Its parameters by name, where there is a critic on the layers of ``weights``."""
    weights: Path = field(default_factory=Path)


def dump(engine: TrainEngine, error: NonFiniteGradients, folder: Path) -> str:
    """Writes ``folder``, whole or not at all; a collective. Returns what to tell about it, on all ranks; a full disk is told there too."""
    critic = engine.critic if error.kind == "critic" else None
    model, source = (engine.actor, engine.model_dir) if critic is None else (critic.model, critic.model_dir)
    weights = engine.snapshot() if critic is None else _layers(critic.model)
    head = {name: full_tensor(p).float().cpu().numpy() for name, p in value_head_parameters(model.model).items()}
    gathered = _gather(engine, error.minibatches)
    text = ""
    if gathered is not None and weights is not None:
        critic_config = engine.shared_critic if critic is None else critic.config
        step = FailedStep(engine.config, engine.temperature, engine.version, error.kind, gathered, error.preferences, critic_config, head)
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            write_checkpoint(partial / "weights", model.template, weights, source)
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


def _layers(model: RankModel) -> dict[str, Tensor] | None:
    """All weights of a value model, whole, and zeros for the head that it lost; a collective, None on ranks other than 0."""
    weights = {}
    for name, weight in model.weights():
        if model.mesh.rank == 0:
            weights[name] = weight.detach().to("cpu", model.dtype, copy=True)
    if model.mesh.rank != 0:
        return None
    weights |= {name: b.detach().to("cpu", copy=True) for name, b in persistent_buffers(model.model).items()}
    lost = {name: p for name, p in model.template.named_parameters() if name not in weights}
    return weights | {name: torch.zeros(p.shape, dtype=model.dtype) for name, p in lost.items()}


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
    arrays: dict[str, NDArray[Any]] = dict(step.value_head)
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
        head = {name: arrays[name] for name in arrays.files if name.startswith("value_head.")}
    # Where the model came from is of no interest any more: it is loaded from the folder.
    actor = ActorConfig.model_validate({**facts["actor"], "path": str(folder / "weights"), "init_from_scratch": None})
    preferences = None if facts["preferences"] is None else DPOConfig.model_validate(facts["preferences"])
    critic = None if facts["critic"] is None else CriticConfig.model_validate(facts["critic"])
    temperature, version, kind = (facts[key] for key in ("temperature", "version", "kind"))
    return FailedStep(actor, temperature, version, kind, minibatches, preferences, critic, head, folder / "weights")


def _read(arrays: Any, prefix: str) -> Microbatch:
    found = {f.name: arrays.get(prefix + f.name) for f in dataclasses.fields(Microbatch)}
    return Microbatch(**{**found, "members": found["members"].tolist()})


def failed_minibatch(minibatch: RankMinibatch, known: Sequence[Tensor | None], progress: float = 0.0) -> FailedMinibatch:
    """This rank's part of one, with ``known`` of each micro-batch (without what a context rank added to it)."""
    arrays = [
        None if k is None else k[: mb.n_tokens].detach().float().cpu().numpy() for mb, k in zip(minibatch.microbatches, known, strict=True)
    ]
    return FailedMinibatch(minibatch.denominator, minibatch.policy_denominator, progress, [minibatch.microbatches], [arrays])
