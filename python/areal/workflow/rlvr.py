"""One prompt, one answer, one score: reinforcement learning with verifiable rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from areal.config import GenerationConfig
from areal.reward import AsyncRewardWrapper
from areal.workflow.base import GenerationEngine, reward_callable
from areal.workflow.prompt import PromptEncoder
from areal.workflow.sequence import TokenSequence


class RLVRWorkflow:
    """Generates one answer to a row's prompt and scores it.

    All keys of a row but the four of the reward's own arguments are passed on to the reward function.

    Args:
        reward_fn: ``fn(prompt, completions, prompt_ids, completion_ids, **row) -> float``, sync or async, or the import path of one, or the address of
            a service (``HTTPReward``).
        gconfig: sampling; ``n_samples`` is the runner's business.
        tokenizer, max_prompt_len: see ``PromptEncoder``.
        enable_thinking: handed to the chat template; None = the template's own default.
        reward_timeout: seconds per score; None = that of the reward service.
    """

    def __init__(
        self,
        reward_fn: Callable[..., Any] | str,
        gconfig: GenerationConfig,
        tokenizer: Any = None,
        enable_thinking: bool | None = None,
        max_prompt_len: int | None = None,
        reward_timeout: float | None = None,
    ) -> None:
        self.reward_fn: Callable[..., Any] = reward_callable(reward_fn, reward_timeout)
        self.gconfig = gconfig.new(n_samples=1)
        self._prompts = PromptEncoder(tokenizer, max_prompt_len, enable_thinking=enable_thinking)
        self._reward = AsyncRewardWrapper(self.reward_fn, reward_timeout)

    @property
    def tokenizer(self) -> Any:
        return self._prompts.tokenizer

    async def arun_episode(self, engine: GenerationEngine, data: dict[str, Any]) -> dict[str, Any]:
        """The dict of ``to_trajectory``, flat numpy arrays.

        Raises:
            EpisodeDropped: no prompt in the row, or too long a one.
            RewardFailure: the answer could not be scored.
        """
        prompt = self._prompts.encode(data)
        sequence = TokenSequence(prompt.ids)
        response = await sequence.generate(engine, self.gconfig)
        sequence.append_answer(response)
        completion = self._prompts.decode(response.output_tokens)
        reward = await self._reward(prompt.text, completion, response.input_tokens, response.output_tokens, **data)
        return sequence.to_dict(reward)
