"""The trainer's ranks as processes, and ``TrainerHandle``, by which the controller calls all of them as one.

Every call goes to all ranks in the same order, because the ranks meet in collectives. When one rank dies or fails, the others would
wait for it there: they are killed at once, and the call raises with the name and the last log lines of the one that went first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from areal.config import DPOConfig, GRPOConfig, OptimizerConfig
from areal.packer import attention_cost
from areal.trainer.rpc import Link, WorkerDied, WorkerFailed, WorkerTimeout
from areal.types import Microbatch, Minibatch, TrainBatch
from areal.weight_sync.stream import SendResult, Target

__all__ = ["CheckpointFailed", "TrainerHandle", "WorkerDied", "WorkerFailed", "WorkerTimeout"]

_PUBLISH_TIMEOUT = 300.0
_SAVE_TIMEOUT = 3600.0
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_TOP_PAD_": str(64 << 20)}
"""glibc: keep freed activations instead of giving them back and faulting them in again, 8,000 times a step of the demo (20 ms)."""


class CheckpointFailed(OSError):
    """A checkpoint could not be written; training goes on."""


class TrainerHandle:
    """All ranks of the trainer. ``await TrainerHandle.start(...)``; methods may be called from one event loop only."""

    sequence_cost: tuple[float, float]
    """By which the ranks get like shares of a batch, as of ``plan_microbatches``."""

    def __init__(self, config: GRPOConfig, run_folder: Path) -> None:
        self.layout = config.trainer_layout
        self.world_size = self.layout.world_size
        self.shm_name = f"{os.getpid()}-{secrets.token_hex(4)}"
        """The shared memory segment that ``publish`` writes to."""
        self._config = config
        self._run_folder = run_folder
        self._order = asyncio.Lock()
        self._manifest: list[tuple[str, tuple[int, ...], str]] | None = None
        self._links: list[Link] = []
        self._failure: BaseException | None = None
        self._saves: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._rendezvous = tempfile.TemporaryDirectory(prefix="areal-")

    @property
    def n_data_ranks(self) -> int:
        """Ranks that get micro-batches of their own."""
        return self.layout.data

    @classmethod
    async def start(cls, config: GRPOConfig, model_folder: Path, run_folder: Path) -> Self:
        """Starts the ranks of ``actor.backend`` on the model of ``model_folder``; their logs go to ``run_folder/logs``."""
        self = cls(config, run_folder)
        try:
            for rank in range(self.world_size):
                self._links.append(self._start_rank(rank))
            arguments = {
                "config": config,
                "model_folder": model_folder,
                "run_folder": run_folder,
                "rendezvous": str(Path(self._rendezvous.name) / "store"),
                "shm_name": self.shm_name,
            }
            await self._call_all("init", config.actor.step_timeout, lambda rank: {**arguments, "rank": rank})
            self.sequence_cost = attention_cost(json.loads((model_folder / "config.json").read_text(encoding="utf-8")))
        except BaseException:
            await self.close()
            raise
        return self

    def _start_rank(self, rank: int) -> Link:
        threads = str(self._config.actor.threads)
        env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        env |= {key: value for key, value in _MALLOC.items() if key not in os.environ}
        if sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))  # all ranks are on this machine
        name = f"trainer {rank}"
        return Link(name, ["-m", "areal.trainer.rank"], self._run_folder / "logs" / f"trainer-{rank}.log", env, self._on_event)

    # -- calls ------------------------------------------------------------------------------------------------------------------

    async def train_step(self, batch: TrainBatch) -> dict[str, Any]:
        """One PPO step; the statistics of ``TrainEngine.train_step``."""

        def part(rank: int) -> dict[str, Any]:
            index = rank // self.layout.context
            cuts = {"minibatches": batch.minibatches, "critic": batch.critic_minibatches}
            return {name: [(m.ranks[index], m.denominator, m.policy_denominator) for m in cut] for name, cut in cuts.items()}

        return await self._call_all("train_step", self._config.actor.step_timeout, part)

    async def score(self, batch: TrainBatch, logprobs: bool = False) -> dict[str, Any]:
        """What reference and critic say of the batch, and with ``logprobs`` the actor: ``ref_logprobs``, ``values``, ``logprobs``.

        Each is ``packer.PerMicrobatch``, of the batch's mini-batches; values of the critic's where it has its own. Also rank 0's spans.
        """

        def part(rank: int) -> dict[str, Any]:
            index = rank // self.layout.context
            cuts = {"minibatches": batch.minibatches, "critic": batch.critic_minibatches}
            return {name: [minibatch.ranks[index] for minibatch in cut] for name, cut in cuts.items()} | {"logprobs": logprobs}

        answers = await self._call_each("score", self._config.actor.step_timeout, part)
        by_data_rank = answers[:: self.layout.context]
        names = [name for name in answers[0] if name != "spans"]
        result = {name: list(zip(*(answer[name] for answer in by_data_rank), strict=True)) for name in names}
        return {**result, "spans": answers[0]["spans"]}

    async def start_from_actor(self) -> None:
        """Reference and critic that have no path of their own take the actor's weights as they are now."""
        await self._call_all("start_from_actor", _PUBLISH_TIMEOUT, lambda rank: {})

    async def sft_step(self, minibatch: Minibatch, lr_scale: float = 1.0) -> dict[str, Any]:
        """One supervised step at ``lr_scale`` times the configured rates; the statistics of ``TrainEngine.sft_step``."""

        def part(rank: int) -> dict[str, Any]:
            return {"minibatch": (minibatch.ranks[rank // self.layout.context], minibatch.denominator), "lr_scale": lr_scale}

        return await self._call_all("sft_step", self._config.actor.step_timeout, part)

    async def dpo_step(self, minibatch: Minibatch, config: DPOConfig, lr_scale: float = 1.0) -> dict[str, Any]:
        """One step on preferences; the statistics of ``TrainEngine.dpo_step``."""

        def part(rank: int) -> dict[str, Any]:
            mine = minibatch.ranks[rank // self.layout.context], minibatch.denominator
            return {"minibatch": mine, "config": config, "lr_scale": lr_scale}

        return await self._call_all("dpo_step", self._config.actor.step_timeout, part)

    async def logprobs(self, microbatch: Microbatch) -> NDArray[np.float32]:
        """Log-probs [T] of the loss tokens under the current weights, 0 elsewhere; every rank computes all of it."""
        return await self._call_all("logprobs", self._config.actor.step_timeout, lambda rank: {"microbatch": microbatch})

    async def set_optimizer(self, config: OptimizerConfig) -> None:
        """A new optimizer with empty state."""
        await self._call_all("set_optimizer", _PUBLISH_TIMEOUT, lambda rank: {"config": config})

    async def publish(self, version: int) -> tuple[int, int]:
        """Writes the weights, as policy ``version``, to the shared memory segment; returns (version, hash). Waits for no reader."""
        return version, await self._call_all("publish", _PUBLISH_TIMEOUT, lambda rank: {"version": version})

    async def send_weights(self, version: int, targets: Sequence[Target], want_hash: bool = False) -> SendResult:
        """Brings the weights, as policy ``version``, to rollout servers by the configured transport; they must not be generating.

        A server that fails is an ``Outcome`` with an error; what is raised is the trainer's own fault.
        """
        sync = self._config.weight_sync
        # Every server has its own deadline; the sum of them is reached only when all hang one after the other.
        limit = _PUBLISH_TIMEOUT + sync.timeout * (1 + len(targets))
        arguments = {"version": version, "targets": list(targets), "want_hash": want_hash}
        return await self._call_all("send_weights", limit, lambda rank: arguments)

    async def write_weights(self, version: int, want_hash: bool = False) -> SendResult:
        """Writes the weights, as policy ``version``, where servers will read them (transport ``disk``); nobody is waited for.

        A disk that is full is an ``Outcome`` with an error.
        """
        return await self.send_weights(version, (), want_hash)

    async def manifest(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype (``float32``) of every tensor that goes over the wire; asked for once."""
        if self._manifest is None:
            self._manifest = await self._call_all("manifest", _PUBLISH_TIMEOUT, lambda rank: {})
        return self._manifest

    async def tensor_hashes(self) -> dict[str, int]:
        """The hash of each tensor alone, as it would be sent now; for finding out where two sides differ."""
        return await self._call_all("tensor_hashes", _PUBLISH_TIMEOUT, lambda rank: {})

    async def sample_tensors(self, turn: int) -> dict[str, Any]:
        """The first rows of some tensors, float32, as they would be sent now; of others at another ``turn``."""
        return await self._call_all("sample_tensors", _PUBLISH_TIMEOUT, lambda rank: {"turn": turn})

    async def save(self, folder: Path) -> dict[str, Any]:
        """Writes a Hugging Face checkpoint; returns {"spans": [["checkpoint", start, end]]} when it is whole.

        The weights are those of the moment of the call; other calls go on while the files are written. ``CheckpointFailed``.
        """
        await self._begin_save("save", folder)
        done = await self._wait_for_save(folder)
        return {"spans": [["checkpoint", done["begin"], done["end"]]]}

    async def copy_state(self, folder: Path) -> None:
        """Copies all that training depends on and begins to write it into ``folder``; training may go on, and ``state_written`` waits."""
        await self._begin_save("copy_state", folder)

    async def state_written(self, folder: Path) -> dict[str, Any]:
        """After ``copy_state``: {"begin", "end", "files": path -> (bytes, digest)} when every rank has written and synced its files.

        ``CheckpointFailed``.
        """
        return await self._wait_for_save(folder)

    async def restore(self, folder: Path) -> None:
        """The state of a whole recover checkpoint, whatever number of ranks wrote it."""
        await self._call_all("restore", _SAVE_TIMEOUT, lambda rank: {"folder": folder})

    async def _begin_save(self, method: str, folder: Path) -> None:
        key = str(folder)
        if key in self._saves:
            raise ValueError(f"the checkpoint {folder} is already being written")
        self._saves[key] = asyncio.get_running_loop().create_future()
        try:
            await self._call_all(method, _SAVE_TIMEOUT, lambda rank: {"folder": folder})
        except BaseException:
            del self._saves[key]
            raise

    async def _wait_for_save(self, folder: Path) -> dict[str, Any]:
        done = self._saves[str(folder)]
        dying = asyncio.create_task(self._links[0].died())
        both: set[asyncio.Future[Any]] = {done, dying}
        try:
            await asyncio.wait(both, timeout=_SAVE_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        finally:
            dying.cancel()
            del self._saves[str(folder)]
        if not done.done():
            if self._links[0].process.poll() is not None:
                raise await self._links[0].died()
            raise WorkerTimeout(f"the controller waited {_SAVE_TIMEOUT:g} s for trainer 0 to write the checkpoint {folder}")
        result = done.result()
        if result["error"] is not None:
            raise CheckpointFailed(result["error"])
        return result

    async def died(self) -> WorkerDied:
        """Returns when a rank has died, with what to say about it; for a task that watches beside the loop."""
        watching = [asyncio.create_task(link.died()) for link in self._links]
        try:
            await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in watching:
                task.cancel()
        if isinstance(self._failure, WorkerDied):
            return self._failure
        # Ranks that were killed because of another one say nothing about the reason.
        dead = [link for link in self._links if link.process.poll() is not None] or self._links
        return await min(dead, key=lambda link: link.was_killed).died()

    async def close(self) -> None:
        """Ends the ranks, after checkpoints that are being written. May be called twice."""
        grace = _SAVE_TIMEOUT if self._saves else 20.0
        await asyncio.gather(*(link.close(grace) for link in self._links))
        self._links = []
        from areal.weight_sync.shm import unlink_stale

        unlink_stale(self.shm_name)
        self._rendezvous.cleanup()

    def _on_event(self, name: str, payload: Any) -> None:
        assert name == "saved"
        if (future := self._saves.get(payload["folder"])) is not None and not future.done():
            future.set_result(payload)

    async def _call_all(self, method: str, timeout: float, arguments: Callable[[int], dict[str, Any]]) -> Any:
        """Calls every rank and returns what rank 0 answers. After an error no rank is left alive."""
        return (await self._call_each(method, timeout, arguments))[0]

    async def _call_each(self, method: str, timeout: float, arguments: Callable[[int], dict[str, Any]]) -> list[Any]:
        """Calls every rank and returns what each answers."""
        async with self._order:
            if not self._links:
                raise RuntimeError(f"the trainer was closed; '{method}' cannot be called any more")
            if self._failure is not None:
                raise self._failure
            tasks = [asyncio.create_task(link.call(method, timeout, **arguments(rank))) for rank, link in enumerate(self._links)]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                errors = [error for t in tasks if t.done() and (error := t.exception()) is not None]
                if errors:
                    raise await self._explain(errors)
                return [task.result() for task in tasks]
            finally:
                for task in tasks:
                    task.cancel()

    async def _explain(self, errors: list[BaseException]) -> BaseException:
        """Kills all ranks; a death is the reason for the collectives that failed elsewhere, perhaps a moment before it was seen."""
        died = next((e for e in errors if isinstance(e, WorkerDied)), None)
        if died is None and len(self._links) > 1:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    died = await self.died()
        for link in self._links:
            link.kill()
        self._failure = died or next((e for e in errors if isinstance(e, WorkerFailed)), errors[0])
        return self._failure
