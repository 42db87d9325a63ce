"""The vocabulary shared by every part: what travels between rollout, controller and trainer.

Arrays are numpy, 1-D and unpadded; L is the length of one sample (prompt + answer), T the tokens of one packed micro-batch.
Per-token fields are aligned with the token they describe: ``logprobs[t]`` is the log-probability of ``input_ids[t]`` given
``input_ids[:t]``, so entry 0 of every sequence is 0 and never a loss token.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from areal.config import GenerationConfig

StopReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class ModelRequest:
    """One generation: token ids in, token ids out."""

    input_ids: list[int]
    gconfig: GenerationConfig = field(default_factory=GenerationConfig)
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    metadata: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    """Not used: tokens go in and out. Workflows written for AReaL pass it."""


@dataclass(slots=True)
class ModelResponse:
    """The answer to a ``ModelRequest``; the three ``output_*`` lists have one entry per generated token."""

    input_tokens: list[int]
    output_tokens: list[int]
    output_logprobs: list[float]
    """Natural log, of softmax(logits / temperature), untruncated."""
    output_versions: list[int]
    """Policy version that sampled each token, stamped by the server."""
    stop_reason: StopReason
    latency: float = 0.0
    """Seconds from the first send to the last token, resubmissions included."""

    @property
    def input_len(self) -> int:
        return len(self.input_tokens)

    @property
    def output_len(self) -> int:
        return len(self.output_tokens)


@dataclass(slots=True)
class Trajectory:
    """One finished and scored sequence: mostly a whole episode, else a part of one (a turn, a branch) that is trained on by itself."""

    input_ids: NDArray[np.int64]  # [L]
    loss_mask: NDArray[np.bool_]  # [L], true on tokens to train on
    logprobs: NDArray[np.float32]  # [L], behaviour policy; 0 where loss_mask is false
    versions: NDArray[np.int32]  # [L], -1 on tokens that no policy sampled
    reward: float
    truncated: bool = False
    """An answer in it ended by its length limit, as the stop reason said."""
    final_answer: str | None = None
    """What the episode answered, in the form in which equal answers are equal strings; None = the text itself (majority votes)."""

    @property
    def oldest_version(self) -> int:
        """Version of the oldest loss token; a large number when there is none."""
        sampled = self.versions[self.loss_mask]
        return int(sampled.min()) if sampled.size else np.iinfo(np.int32).max

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True)
class Group:
    """All ``n_samples`` episodes of one prompt: the unit of admission, of batches and of group normalisation."""

    group_id: int
    """Running number of admission; unique in a run."""
    data: dict[str, Any]
    """The row of the data set."""
    trajectories: list[Trajectory]
    """Those of an episode stand together, in the order of its turns; the last one's reward is the episode's."""
    episode_sizes: list[int] | None = None
    """How many of them each episode has; None = one each."""

    @property
    def oldest_version(self) -> int:
        return min(t.oldest_version for t in self.trajectories)

    def episodes(self) -> list[list[Trajectory]]:
        """The trajectories of each episode."""
        if self.episode_sizes is None:
            return [[t] for t in self.trajectories]
        rest = iter(self.trajectories)
        return [list(islice(rest, size)) for size in self.episode_sizes]


@dataclass(slots=True)
class Microbatch:
    """Packed sequences for one forward pass of one rank; every array is [T] unless noted, and nothing is padding."""

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]  # [n + 1]
    loss_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]  # behaviour
    versions: NDArray[np.int32]
    advantages: NDArray[np.float32]
    ref_logprobs: NDArray[np.float32] | None = None
    """Of the reference model; None where the loss has no KL penalty."""
    proximal_logprobs: NDArray[np.float32] | None = None
    """Of the actor before the train step, where they are known already; None: the ranks compute them."""
    values: NDArray[np.float32] | None = None
    """The critic's before the train step: ``values[t]`` is what the state before token t is worth. None where this is not the critic's."""
    returns: NDArray[np.float32] | None = None
    """What the values should have been."""
    members: list[int] = field(default_factory=list)
    """Which samples these are, as their places in the batch."""

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True)
class TrainBatch:
    """What one train step consumes, cut for the ranks: ``minibatches[m].ranks[r]`` is a list of micro-batches.

    Every rank has the same number of micro-batches within a mini-batch (an all-masked one fills up), because the ranks
    run their collectives in lockstep.
    """

    minibatches: list[Minibatch]
    n_groups: int
    n_samples: int
    critic_minibatches: list[Minibatch] = field(default_factory=list)
    """The same samples as a critic with layers of its own gets them."""


@dataclass(slots=True)
class Minibatch:
    ranks: list[list[Microbatch]]
    denominator: float
    """Loss tokens of the whole mini-batch over all ranks: the loss is sum / denominator."""
    policy_denominator: float | None = None
    """That of the policy's loss, by ``actor.loss_normalization``; None: ``denominator``."""
