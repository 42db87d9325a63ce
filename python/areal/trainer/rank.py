"""The process of one trainer rank: ``python -m areal.trainer.rank --fd N``, started by ``TrainerHandle``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from areal.config import DPOConfig, GRPOConfig, OptimizerConfig
from areal.launcher.local import die_with_parent
from areal.trainer.rpc import Failure, Server
from areal.types import Microbatch

if TYPE_CHECKING:
    from areal.weight_sync.adapter import AdapterInfo
    from areal.weight_sync.stream import SendResult, Target

log = logging.getLogger("areal.trainer")


class Rank:
    """What the controller calls; every method named ``rpc_...`` is one call."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._publisher: Any = None
        self._writer: Any = None
        self._sender: Any = None
        self._states: Any = None
        self._adapter: AdapterInfo | None = None
        """What servers are told of the adapters, where these go to them alone."""

    def rpc_init(self, config: GRPOConfig, model_folder: Path, run_folder: Path, rank: int, rendezvous: str, shm_name: str) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from areal.trainer.checkpoint import CheckpointWriter
        from areal.trainer.engine import TrainEngine
        from areal.trainer.mesh import RankMesh

        disable_progress_bar()
        actor, world_size = config.actor, config.trainer_layout.world_size
        torch.set_num_threads(actor.threads)
        device = _device(actor.device, rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        offload = any(section is not None and section.offload for section in (actor, config.ref, config.critic))
        if world_size > 1 or actor.dtype != "float32" or offload:
            torch.distributed.init_process_group(
                ("cpu:gloo,cuda:nccl" if offload else "nccl") if device.type == "cuda" else "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=actor.step_timeout),
            )
            torch.distributed.barrier()  # NCCL: what some ranks send each other later needs a communicator that all of them made
        self._is_first = rank == 0
        self._config = config
        self._model_folder = model_folder
        self._run_folder = run_folder
        with self._explained():
            self._engine = TrainEngine(
                model_folder,
                actor,
                temperature=config.gconfig.temperature,
                mesh=RankMesh(device, rank, config.trainer_layout),
                critic=config.critic,
                ref=config.ref if config.uses_ref else None,
                warms_up=config.warmup is not None,
                seed=config.seed,
            )
        bucket_bytes = config.weight_sync.bucket_mb << 20
        if actor.lora is not None and actor.lora.sync == "adapter":
            self._adapter = self._engine.use_adapters_alone(bucket_bytes)
            bucket_bytes = sys.maxsize  # one file
        elif config.layout.engine == "sglang" or config.transport == "disk":
            self._engine.use_checkpoint_names()  # the embedded engine's parameters have the trainer's own names
        self._buckets = self._engine.gatherer.bucket_plan(bucket_bytes)
        if rank == 0:
            from areal.weight_sync.shm import ShmPublisher

            if config.transport == "shm":
                self._publisher = ShmPublisher(shm_name, self._engine.gatherer.manifest(), self._adapter)
            self._writer = CheckpointWriter(self._engine.template, model_folder, self._saved)
        n, trained = (sum(p.numel() for p in self._engine.model.parameters() if p.requires_grad >= least) for least in (False, True))
        name = type(self._engine.model).__name__
        log.info("rank %d of %d on %s: %s, %s parameters, %s of them trained", rank, world_size, device, name, f"{n:,}", f"{trained:,}")

    def rpc_score(self, minibatches: list[list[Microbatch]], critic: list[list[Microbatch]], logprobs: bool) -> dict[str, Any]:
        with self._explained():
            return self._engine.score(minibatches, critic, logprobs)

    def rpc_start_from_actor(self) -> None:
        self._engine.start_from_actor()

    def rpc_train_step(
        self, minibatches: list[tuple[list[Microbatch], float, float | None]], critic: list[tuple[list[Microbatch], float, float | None]]
    ) -> dict[str, Any] | None:
        from areal.trainer.engine import RankMinibatch

        with self._explained():
            stats = self._engine.train_step([RankMinibatch(*m) for m in minibatches], [RankMinibatch(*m) for m in critic])
        return stats if self._is_first else None

    def rpc_sft_step(self, minibatch: tuple[list[Microbatch], float], lr_scale: float) -> dict[str, Any] | None:
        from areal.trainer.engine import RankMinibatch

        with self._explained():
            stats = self._engine.sft_step(RankMinibatch(*minibatch), lr_scale)
        return stats if self._is_first else None

    def rpc_dpo_step(self, minibatch: tuple[list[Microbatch], float], config: DPOConfig, lr_scale: float) -> dict[str, Any] | None:
        from areal.trainer.engine import RankMinibatch

        with self._explained():
            stats = self._engine.dpo_step(RankMinibatch(*minibatch), config, lr_scale)
        return stats if self._is_first else None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A step that is not finite is dumped; where memory runs out, the error says which key to turn."""
        from areal.trainer.failed_step import NonFiniteGradients, dump
        from areal.trainer.memory import OutOfMemory, explain_out_of_memory

        try:
            yield
        except NonFiniteGradients as error:
            if not error.minibatches:
                raise
            folder = self._run_folder / "replay" / f"{'step' if error.kind == 'ppo' else error.kind}_{self._engine.version + 1:06d}"
            raise type(error)(f"{error}; {dump(self._engine, error, folder)}", error.kind) from None
        except RuntimeError as error:
            if (advice := explain_out_of_memory(error, self._config, self._model_folder)) is None:
                raise
            raise OutOfMemory(advice) from error

    def rpc_logprobs(self, microbatch: Microbatch) -> Any:
        return self._engine.logprobs(microbatch).numpy()

    def rpc_set_optimizer(self, config: OptimizerConfig) -> None:
        self._engine.set_optimizer(config)

    def rpc_publish(self, version: int) -> int | None:
        parts = self._engine.gatherer.parts(self._config.weight_sync.bucket_mb << 20)
        self._engine.version = version
        if self._is_first:
            return self._publisher.publish(parts, version)
        for _ in parts:
            pass
        return None

    def rpc_send_weights(self, version: int, targets: list[Target], want_hash: bool) -> SendResult | None:
        from areal.weight_sync.stream import stream_weights
        from areal.weight_sync.transports import make_sender

        if self._is_first and self._sender is None:
            self._sender = make_sender(self._config, self._model_folder, self._run_folder, self._engine.device, self._adapter)
        self._engine.version = version
        gatherer = self._engine.gatherer
        if self._config.layout.engine == "sglang":
            return stream_weights(gatherer.gather, self._buckets, self._sender, version, targets, want_hash)
        # The embedded engine hashes its parameters by their own names, also when they come from the files of a checkpoint.
        return stream_weights(gatherer.gather, self._buckets, self._sender, version, targets, want_hash, gatherer.as_parameters)

    def rpc_manifest(self) -> list[tuple[str, tuple[int, ...], str]]:
        return [(t.name, t.shape, str(t.dtype).removeprefix("torch.")) for bucket in self._buckets for t in bucket.tensors]

    def rpc_tensor_hashes(self) -> dict[str, int]:
        from areal.weight_sync.stream import hash_tensors

        return hash_tensors(self._engine.gatherer.gather, self._buckets, self._engine.device if self._is_first else None)

    def rpc_sample_tensors(self, turn: int) -> dict[str, Any]:
        from areal.weight_sync.samples import sample_tensors

        return sample_tensors(self._engine.gatherer.gather, self._buckets, turn, self._engine.device if self._is_first else None)

    def rpc_save(self, folder: Path) -> None:
        weights, adapter = self._engine.snapshot(), self._engine.adapter_snapshot()
        if weights is not None:
            self._writer.start(folder, weights, adapter)

    def rpc_copy_state(self, folder: Path) -> None:
        from areal.trainer.recover import StateWriter

        if self._states is None:
            self._states = StateWriter(self._engine.mesh, self._state_written)
        self._states.start(folder, self._engine)

    def rpc_restore(self, folder: Path) -> None:
        from areal.trainer.recover import restore

        restore(folder, self._engine)
        log.info("restored from %s", folder)

    def _state_written(self, folder: Path, error: str | None, files: dict[str, tuple[int, str]], begin: float, end: float) -> None:
        self._saved(folder, error, begin, end, files)

    def _saved(self, folder: Path, error: str | None, begin: float, end: float, files: Any = None) -> None:
        if error is not None:
            log.error("%s", error)
        try:
            self._server.event("saved", {"folder": str(folder), "error": error, "begin": begin, "end": end, "files": files})
        except OSError:
            pass  # the controller is gone; the main thread ends this process

    def rpc_close(self) -> None:
        import torch.distributed as dist

        if self._writer is not None:
            self._writer.wait()
        if self._states is not None:
            self._states.wait()
        if self._publisher is not None:
            self._publisher.close()
        if self._sender is not None:
            self._sender.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(name: str, rank: int) -> Any:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``: rank r is on the r-th device from there."""
    import torch

    kind, _, first = name.partition(":")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(first or 0) + rank)


def _describe(error: Exception) -> Failure:
    text = traceback.format_exc()
    log.error("%s", text)
    message = str(error) if isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("areal.") else repr(error)
    return Failure(message, text)


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True, help="the connection to the controller")
    arguments = parser.parse_args()
    os.set_inheritable(arguments.fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    server = Server(arguments.fd)
    server.serve(Rank(server), _describe)
    # Not sys.exit: a background thread or a collective that hangs must not keep a rank alive whose controller is gone.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
