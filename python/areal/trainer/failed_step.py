"""A train step whose numbers were not finite, kept for ``areal replay-batch``: what it was computed from, written beside the run.

folder/
    replay.json      the actor's configuration, temperature, policy version, and the mini-batches with their denominators
    batch.npz        the micro-batches of all ranks: MINIBATCH.RANK.TURN.FIELD
    weights/         a Hugging Face checkpoint. A step that is not finite is skipped, so these are the weights that it was computed with
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from areal.config import ActorConfig
from areal.trainer.checkpoint import write_checkpoint
from areal.types import Microbatch

if TYPE_CHECKING:
    from areal.trainer.engine import TrainEngine

_PROXIMAL = "proximal"


@dataclass
class FailedMinibatch:
    """One that was skipped: its micro-batches, by rank once they were gathered."""

    denominator: float
    ranks: list[list[Microbatch]]
    proximal: list[list[NDArray[np.float32] | None]]
    """The proximal log-probs [T] of each; None: those of the weights themselves."""


class NonFiniteGradients(RuntimeError):
    """Too many optimizer steps in a row had a loss or gradients with NaN or infinity."""

    def __init__(self, message: str, kind: Literal["ppo", "sft"], minibatches: list[FailedMinibatch]) -> None:
        super().__init__(message)
        self.kind = kind
        self.minibatches = minibatches
        """Those of the last train step that were skipped, this rank's part."""


@dataclass
class FailedStep:
    """What was dumped, as ``load`` gives it back."""

    actor: ActorConfig
    temperature: float
    version: int
    kind: Literal["ppo", "sft"]
    minibatches: list[FailedMinibatch]
    weights: Path = field(default_factory=Path)


def dump(engine: TrainEngine, error: NonFiniteGradients, folder: Path) -> str:
    """Writes ``folder``, whole or not at all; a collective. Returns what to tell about it, on all ranks; a full disk is told there too."""
    weights = engine.snapshot()
    gathered = _gather(engine, error.minibatches)
    text = ""
    if gathered is not None and weights is not None:
        step = FailedStep(engine.config, engine.temperature, engine.version, error.kind, gathered)
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            write_checkpoint(partial / "weights", engine.template, weights, engine.model_dir)
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
    return [
        FailedMinibatch(same[0].denominator, [m.ranks[0] for m in same], [m.proximal[0] for m in same]) for same in zip(*parts, strict=True)
    ]


def _write(step: FailedStep, folder: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for m, minibatch in enumerate(step.minibatches):
        for r, (microbatches, proximal) in enumerate(zip(minibatch.ranks, minibatch.proximal, strict=True)):
            for t, (microbatch, known) in enumerate(zip(microbatches, proximal, strict=True)):
                fields = {f.name: getattr(microbatch, f.name) for f in dataclasses.fields(Microbatch)} | {_PROXIMAL: known}
                arrays |= {f"{m}.{r}.{t}.{name}": value for name, value in fields.items() if value is not None}
    np.savez_compressed(folder / "batch.npz", allow_pickle=False, **arrays)
    facts = {
        "kind": step.kind,
        "version": step.version,
        "temperature": step.temperature,
        "actor": step.actor.model_dump(mode="json"),
        "minibatches": [{"denominator": m.denominator, "turns": [len(turns) for turns in m.ranks]} for m in step.minibatches],
    }
    (folder / "replay.json").write_text(json.dumps(facts, indent=1) + "\n")


def load(folder: Path) -> FailedStep:
    """What ``dump`` wrote; ``FileNotFoundError``, ``ValueError`` or ``KeyError`` for anything else."""
    facts = json.loads((folder / "replay.json").read_text())
    with np.load(folder / "batch.npz") as arrays:
        minibatches = []
        for m, about in enumerate(facts["minibatches"]):
            ranks = [[_read(arrays, f"{m}.{r}.{t}.") for t in range(n)] for r, n in enumerate(about["turns"])]
            proximal = [[_optional(arrays, f"{m}.{r}.{t}.{_PROXIMAL}") for t in range(n)] for r, n in enumerate(about["turns"])]
            minibatches.append(FailedMinibatch(about["denominator"], ranks, proximal))
    # Where the model came from is of no interest any more: it is loaded from the folder.
    actor = ActorConfig.model_validate({**facts["actor"], "path": str(folder / "weights"), "init_from_scratch": None})
    return FailedStep(actor, facts["temperature"], facts["version"], facts["kind"], minibatches, folder / "weights")


def _read(arrays: Any, prefix: str) -> Microbatch:
    return Microbatch(**{f.name: _optional(arrays, prefix + f.name) for f in dataclasses.fields(Microbatch)})


def _optional(arrays: Any, name: str) -> NDArray[Any] | None:
    return arrays.get(name, None)


def as_numpy(proximal: Sequence[Any]) -> list[NDArray[np.float32] | None]:
    """Tensors of a device, or None."""
    return [None if p is None else p.detach().float().cpu().numpy() for p in proximal]
