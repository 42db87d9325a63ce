"""Whether rollout servers and trainer compute the same model: log-probs of the same tokens under the same weights, by both.

Every train step compares them on tokens that the current version sampled. Where generation runs ahead there are none, so now and then
a few short answers are generated for the comparison alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from areal.cluster import Cluster
from areal.inference.client import RequestRejected
from areal.packer import pack
from areal.types import Group, ModelRequest, ModelResponse, Trajectory

PROBE_EVERY = 20
"""Train steps without a comparison before a probe is made; it costs some 30 decode steps."""
ENOUGH_TOKENS = 64
"""Fewer are no comparison worth the name: often they are nothing but ends of sequences."""
_N_PROMPTS = 8
_MAX_NEW_TOKENS = 32


class DriftProbe:
    """Makes a probe when the train steps before gave no comparison."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._steps_without = 0

    async def complete(self, row: dict[str, Any], groups: Sequence[Group], version: int) -> None:
        """Replaces the ``logprob_drift_*`` of ``row`` by a probe's when one is due.

        Trainer and servers must be on their way to ``version``, and no train step may begin before this returns.
        """
        if row["logprob_drift_tokens"] >= ENOUGH_TOKENS:
            self._steps_without = 0
            return
        self._steps_without += 1
        if self._steps_without >= PROBE_EVERY:
            self._steps_without = 0
            row |= await self._measure(groups, version)

    async def _measure(self, groups: Sequence[Group], version: int) -> dict[str, float | int | None]:
        """|engine - trainer| over the tokens that ``version`` sampled."""
        cluster, gconfig = self._cluster, self._cluster.config.gconfig
        short = gconfig.new(n_samples=1, max_new_tokens=min(_MAX_NEW_TOKENS, gconfig.max_new_tokens), min_new_tokens=0)
        capacity = cluster.config.actor.mb_spec.max_tokens_per_mb
        prompts, total = [], 0
        for group in groups[:_N_PROMPTS]:
            first = group.trajectories[0]
            prompt = first.input_ids[: int(first.loss_mask.argmax())].tolist()
            total += len(prompt) + short.max_new_tokens
            if total > capacity:
                break
            prompts.append(prompt)
        if not prompts:
            return {}
        await cluster.wait_for_version(version)
        try:
            answers = await asyncio.gather(*(cluster.client.agenerate(ModelRequest(prompt, short)) for prompt in prompts))
        except (RequestRejected, TimeoutError) as error:  # a measurement that fails is no reason to end the run
            cluster.display.note(f"the log-probs of both sides could not be compared: {error}")
            return {}
        samples = [_sample(answer) for answer in answers]
        microbatch = pack(samples, [np.zeros(len(s), np.float32) for s in samples])
        logprobs = await cluster.trainer.logprobs(microbatch)
        same = microbatch.loss_mask & (microbatch.versions == version)
        difference = np.abs(logprobs - microbatch.logprobs)[same]
        if not difference.size:
            return {}
        return {
            "logprob_drift_mean": float(difference.mean()),
            "logprob_drift_max": float(difference.max()),
            "logprob_drift_tokens": difference.size,
        }


def _sample(answer: ModelResponse) -> Trajectory:
    n = answer.input_len
    versions = np.array([-1] * n + answer.output_versions, np.int32)
    logprobs = np.array([0.0] * n + answer.output_logprobs, np.float32)
    return Trajectory(np.array(answer.input_tokens + answer.output_tokens), versions >= 0, logprobs, versions, 0.0)
