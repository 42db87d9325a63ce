"""Rollout servers killed with -9 at the worst moments of an update, while requests are in flight: a real cluster, nothing replaced by a double.

Afterwards every request must have exactly one whole answer, and every token the log-prob that the weights of its claimed version give it.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from areal.cluster import Cluster
from areal.config import GenerationConfig, GRPOConfig
from areal.inference.servers import RolloutServer
from areal.models.loading import forward_hidden, load_model
from areal.models.packed import PackedContext
from areal.packer import pack
from areal.types import Minibatch, ModelRequest, ModelResponse, Trajectory
from areal.weight_sync.stream import SendResult
from tests.rollout_servers import make_model

Moment = Literal["idle", "generating", "aborting", "mid_bucket", "before_resubmission"]
MOMENTS: tuple[Moment, ...] = ("idle", "generating", "aborting", "mid_bucket", "before_resubmission")
WIDE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Some 18 MB in float32, so that an update has many buckets of 1 MiB."""
TOLERANCE = 1e-4
_TRIES = 4


def ordeal_config(folder: Path, backend: str, python: str = "", **weight_sync: Any) -> GRPOConfig:
    make_model(folder / "model", **WIDE)
    return GRPOConfig.model_validate(
        {
            "actor": {"path": str(folder / "model"), "device": "cpu", "optimizer": {"lr": 3e-3}},
            "train_dataset": {"type": "arithmetic"},
            "rollout": {
                "backend": backend,
                "device": "cpu",
                "max_context": 256,
                "max_restarts": 1000,
                "startup_timeout": 240,
                "request_timeout": 280,
            },
            "sglang": {"python": python},
            "weight_sync": {"bucket_mb": 1, "timeout": 30, **weight_sync},
            "stats_logger": {"fileroot": str(folder), "tensorboard": False},
        }
    )


class Ordeal:
    """One cluster through many kills. ``async with Ordeal(config, seed) as ordeal: await ordeal.kill_at("aborting")``."""

    def __init__(self, config: GRPOConfig, seed: int = 0) -> None:
        self.cluster = Cluster(config)
        self.version = 0
        self._random = random.Random(seed)
        self._answers: list[ModelResponse] = []
        self._config = config
        self._watching: asyncio.Task[None] | None = None
        self._n_broken = 0
        """Servers that broke off in the middle of the buckets of the last update."""

    async def __aenter__(self) -> Ordeal:
        await self.cluster.open()
        self._watching = asyncio.create_task(self.cluster.watch())
        await self._publish(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._watching is not None
        ended_early = self._watching.done()
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self.cluster.close()
        if ended_early:
            self._watching.result()  # what ended it is the reason for everything after it

    # -- what happens ------------------------------------------------------------------------------------------------------------

    async def kill_at(self, moment: Moment) -> None:
        """One update with a server killed at that moment, requests in flight (but for ``idle``); then all servers are there again."""
        for _ in range(_TRIES):
            if await self._kill_at(moment):
                return
        raise AssertionError(f"{_TRIES} kills came before the first or after the last bucket")

    async def _kill_at(self, moment: Moment, n_requests: int = 24, seconds: float = 400) -> bool:
        """Whether the kill came at that moment."""
        async with asyncio.timeout(seconds):
            self._n_broken = 0
            n_servers = self._config.layout.n_servers
            await self._until(lambda: len(self.cluster.client.urls) == n_servers)
            requests = [self._request() for _ in range(0 if moment == "idle" else n_requests)]
            asking = [asyncio.create_task(self.cluster.client.agenerate(request)) for request in requests]
            if requests:
                await asyncio.sleep(0.3 + 0.2 * self._random.random())
            victim = self._random.choice(self.cluster.servers)
            if moment in ("idle", "generating"):
                self._kill(victim)
                await self._train_and_publish()
            else:
                with self._armed(moment, victim):
                    await self._train_and_publish()
            if moment == "idle":
                requests = [self._request() for _ in range(4)]
                asking = [asyncio.create_task(self.cluster.client.agenerate(request)) for request in requests]
            self._take(requests, await asyncio.gather(*asking))
            await self._until(lambda: len(self.cluster.client.urls) == n_servers)
            assert victim.url not in self.cluster.client.urls, "it was killed and must have been replaced"
            assert self.cluster.client.acked_version == self.version
            return moment != "mid_bucket" or self._n_broken > 0

    async def update_under_load(self, n_requests: int, n_updates: int) -> None:
        """Updates follow one another while all the requests are generating; nobody is killed."""
        requests = [self._request() for _ in range(n_requests)]
        asking = [asyncio.create_task(self.cluster.client.agenerate(request)) for request in requests]
        for _ in range(n_updates):
            await asyncio.sleep(0.1)
            await self._train_and_publish()
        self._take(requests, await asyncio.gather(*asking))

    def _take(self, requests: Sequence[ModelRequest], answers: Sequence[ModelResponse]) -> None:
        """Exactly one answer a request, and nothing of it missing or double."""
        for request, answer in zip(requests, answers, strict=True):
            assert answer.stop_reason == "length" and answer.input_tokens == request.input_ids
            lengths = {len(answer.output_tokens), len(answer.output_versions), len(answer.output_logprobs)}
            assert lengths == {request.gconfig.max_new_tokens}, "tokens were lost or came twice"
        self._answers += answers

    async def _train_and_publish(self) -> None:
        async with self.cluster.weights.changing_weights():
            await self.cluster.trainer.sft_step(self._noise())
            await self._publish(self.version + 1)
        async with asyncio.timeout(120):
            await self.cluster.wait_for_version(self.version)

    async def _publish(self, version: int) -> None:
        self.version = version
        await self.cluster.trainer.save(self._weights(version))
        await self.cluster.weights.publish(version, announce=version > 0)
        if version == 0:
            await self.cluster.weights.push()

    def _weights(self, version: int) -> Path:
        return self.cluster.run_folder / "versions" / f"{version}"

    def _request(self) -> ModelRequest:
        prompt = [self._random.randrange(4, 40) for _ in range(self._random.randrange(4, 24))]
        n = self._random.randrange(60, 180)
        return ModelRequest(prompt, GenerationConfig(max_new_tokens=n, ignore_eos=True))

    def _noise(self) -> Minibatch:
        """Random tokens: at this learning rate every step changes the model visibly."""
        ids = np.array([self._random.randrange(4, 40) for _ in range(64)])
        mask = np.arange(64) > 0
        sample = Trajectory(ids, mask, np.zeros(64, np.float32), np.where(mask, 0, -1).astype(np.int32), 0.0)
        return Minibatch([[pack([sample], [np.zeros(64, np.float32)])]], float(mask.sum()))

    # -- the kill ----------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _kill(server: RolloutServer) -> None:
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGKILL)

    @contextmanager
    def _armed(self, moment: Moment, victim: RolloutServer) -> Iterator[None]:
        """The kill happens when the update comes to that moment; the update itself is the product's."""
        client, trainer = self.cluster.client, self.cluster.trainer
        struck = False

        async def strike(after: float) -> None:
            await asyncio.sleep(after)
            self._kill(victim)

        def before(call: Callable[..., Awaitable[Any]], delay: float, only: str | None) -> Callable[..., Awaitable[Any]]:
            async def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal struck
                if not struck and (only is None or args[0] == only):  # the replacement is sent weights too
                    struck = True
                    blow = asyncio.create_task(strike(delay))
                    if not delay:
                        await blow
                    try:
                        return await call(*args, **kwargs)
                    finally:
                        await blow
                return await call(*args, **kwargs)

            return wrapped

        if moment == "aborting":
            client.interrupt = before(client.interrupt, 0.001, victim.url)  # type: ignore[method-assign]
        elif moment == "before_resubmission":
            client.resume = before(client.resume, 0.0, victim.url)  # type: ignore[method-assign]
        else:
            usual = statistics.median(times.transfer for times in self.cluster.weights.times if times.transfer)
            send = before(trainer.send_weights, usual * self._random.uniform(0.2, 0.7), None)

            async def send_weights(*args: Any, **kwargs: Any) -> SendResult:
                result = await send(*args, **kwargs)
                self._n_broken += sum("at bucket" in (outcome.error or "") for outcome in result.outcomes)
                return result

            trainer.send_weights = send_weights  # type: ignore[method-assign]
        try:
            yield
        finally:
            for owner, name in ((client, "interrupt"), (client, "resume"), (trainer, "send_weights")):
                owner.__dict__.pop(name, None)
        assert struck

    async def _until(self, condition: Callable[[], bool], seconds: float = 200) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                assert self._watching is not None and not self._watching.done(), self._watching
                await asyncio.sleep(0.02)

    # -- the proof ---------------------------------------------------------------------------------------------------------------

    def check_tokens(self) -> tuple[int, float]:
        """Every token under the weights of its claimed version: how many, and the largest |difference| of log-probs."""
        models: dict[int, Any] = {}
        worst, n_tokens = 0.0, 0
        for answer in self._answers:
            versions = answer.output_versions
            assert versions == sorted(versions), "an answer never goes back to older weights"
            ids = torch.tensor(answer.input_tokens + answer.output_tokens)
            n = answer.input_len
            found = torch.tensor(answer.output_logprobs)
            for version in sorted(set(versions)):
                if version not in models:
                    models[version] = load_model(self._weights(version), dtype=torch.float32)
                mine = torch.tensor([v == version for v in versions])
                worst = max(worst, float((_logprobs(models[version], ids)[n - 1 :] - found).abs()[mine].max()))
            n_tokens += len(versions)
        return n_tokens, worst

    @property
    def n_mixed(self) -> int:
        """Answers whose tokens come from more than one version."""
        return sum(len(set(answer.output_versions)) > 1 for answer in self._answers)

    @property
    def n_versions(self) -> int:
        """Versions that sampled some token."""
        return len({version for answer in self._answers for version in answer.output_versions})


@torch.no_grad()
def _logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of ids[1:], by a plain forward pass."""
    hidden = forward_hidden(model, ids, torch.arange(len(ids)), PackedContext([len(ids)]))
    logits = model.get_output_embeddings()(hidden[:-1]).float()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
