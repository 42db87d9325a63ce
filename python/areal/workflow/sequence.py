"""The token sequence of an episode: it only ever grows, by what the policy samples and by what its environment says."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from areal.config import GenerationConfig
from areal.types import ModelRequest, ModelResponse
from areal.workflow.base import EpisodeDropped, GenerationEngine


class TokenSequence:
    """Tokens with what ``to_trajectory`` wants of each.

    Args:
        max_context: tokens it may have at most, those of its answers included; 0 = no bound here.
    """

    __slots__ = ("ids", "logprobs", "loss_mask", "max_context", "n_prompt", "truncated", "versions")

    def __init__(self, prompt_ids: Sequence[int], max_context: int = 0) -> None:
        self.ids = list(prompt_ids)
        self.n_prompt = len(self.ids)
        self.loss_mask = [False] * self.n_prompt
        self.logprobs = [0.0] * self.n_prompt
        self.versions = [-1] * self.n_prompt
        self.max_context = max_context
        self.truncated = False
        """An answer in it was cut off by its length, as the stop reason said."""
        if self.room == 0:
            raise EpisodeDropped("prompt_too_long", f"a prompt of {self.n_prompt} tokens leaves no room in max_context={max_context}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def room(self) -> int | None:
        """Tokens it may still get; None = any number."""
        return max(0, self.max_context - len(self.ids)) if self.max_context else None

    async def generate(self, engine: GenerationEngine, gconfig: GenerationConfig) -> ModelResponse:
        """An answer to all tokens so far, of ``gconfig.max_new_tokens`` or what room there is. It is not appended yet."""
        room = self.room
        if room is not None and room < gconfig.max_new_tokens:
            gconfig = shorter(gconfig, room)
        return await engine.agenerate(ModelRequest(self.ids.copy(), gconfig))

    def append_answer(self, response: ModelResponse, n: int | None = None) -> None:
        """What the policy sampled, with loss: the first ``n`` tokens of it, None = all, and then whether its length cut it off."""
        tokens = response.output_tokens[:n]
        self.ids += tokens
        self.loss_mask += [True] * len(tokens)
        self.logprobs += response.output_logprobs[:n]
        self.versions += response.output_versions[:n]
        if n is None:
            self.truncated |= response.stop_reason == "length"

    def append_reply(self, ids: Sequence[int]) -> bool:
        """What the environment says, without loss. False, and nothing appended, when no token of an answer would fit behind it."""
        room = self.room
        if room is not None and len(ids) >= room:
            return False
        self.ids += ids
        self.loss_mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.versions += [-1] * len(ids)
        return True

    def to_dict(self, reward: float) -> dict[str, Any]:
        """What a workflow returns; flat arrays."""
        return {
            "input_ids": np.array(self.ids, dtype=np.int64),
            "loss_mask": np.array(self.loss_mask, dtype=bool),
            "logprobs": np.array(self.logprobs, dtype=np.float32),
            "versions": np.array(self.versions, dtype=np.int32),
            "rewards": np.float64(reward),
            "truncated": self.truncated,
        }


def shorter(gconfig: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    return gconfig.new(max_new_tokens=max_new_tokens, min_new_tokens=min(gconfig.min_new_tokens, max_new_tokens))


def tokens_to_stop(tokens: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> int | None:
    """How many tokens the text needs until one of ``stops`` is whole; None where none is.

    A server ends an answer there, the token that completed the string included. It does not when the string began before an interruption
    and ended behind it: it looks only at what it sampled itself. Cutting there gives what would have been sampled.
    """

    def holds(n: int) -> bool:
        text = decode(tokens[:n])
        return any(stop in text for stop in stops)

    if not stops or not holds(len(tokens)):
        return None
    n = len(tokens)
    if holds(n - 1):  # the rare case, and the only one that needs more than a look at both ends
        n = bisect_left(range(n), True, key=holds)
    return n
