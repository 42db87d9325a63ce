"""One prompt, one answer, one score: reinforcement learning with verifiable rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from areal.config import GenerationConfig
from areal.data import MalformedRow, encode_prompt
from areal.reward import AsyncRewardWrapper
from areal.reward.address import is_service
from areal.reward.http import HTTPReward
from areal.run_folder import load_tokenizer
from areal.types import ModelRequest, ModelResponse
from areal.workflow.base import EpisodeDropped, GenerationEngine, import_object

_MAX_REMEMBERED = 4096


class PromptError(EpisodeDropped):
    """A row of the data set that gives no prompt; counted as malformed_row."""

    def __init__(self, message: str) -> None:
        super().__init__("malformed_row", message)


class RLVRWorkflow:
    """Generates one answer to a row's prompt and scores it.

    A row gives its prompt as ``input_ids`` (token ids), ``messages`` (chat, put through the tokenizer's template) or ``prompt`` (text);
    all its keys but the four of the reward's own arguments are passed on to the reward function.

    Args:
        reward_fn: ``fn(prompt, completions, prompt_ids, completion_ids, **row) -> float``, sync or async, or the import path of one, or the address of
            a service (``HTTPReward``).
        gconfig: sampling; ``n_samples`` is the runner's business.
        tokenizer: Hugging Face tokenizer or the folder of one; without one only ``input_ids`` rows work and the reward gets empty texts.
        enable_thinking: handed to the chat template; None = the template's own default.
        max_prompt_len: longer prompts (tokens) are dropped, cause prompt_too_long; None = no bound here.
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
        self.reward_fn: Callable[..., Any] = _named(reward_fn, reward_timeout) if isinstance(reward_fn, str) else reward_fn
        self.gconfig = gconfig.new(n_samples=1)
        self.tokenizer = load_tokenizer(Path(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        self.max_prompt_len = max_prompt_len
        self._template_options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._reward = AsyncRewardWrapper(self.reward_fn, reward_timeout)
        # The samples of a group have the same prompt object: (it, token ids, text) by its id.
        self._prompts: dict[int, tuple[Any, list[int], str]] = {}

    async def arun_episode(self, engine: GenerationEngine, data: dict[str, Any]) -> dict[str, Any]:
        """The dict of ``to_trajectory``, flat numpy arrays.

        Raises:
            EpisodeDropped: no prompt in the row, or too long a one.
            RewardFailure: the answer could not be scored.
        """
        prompt_ids, prompt = self._prompt(data)
        response = await engine.agenerate(ModelRequest(prompt_ids, self.gconfig))
        completion = self._decode(response.output_tokens)
        reward = await self._reward(prompt, completion, response.input_tokens, response.output_tokens, **data)
        return response_to_dict(response, reward)

    def _prompt(self, data: Mapping[str, Any]) -> tuple[list[int], str]:
        """Token ids and text; worked out once for the samples of a group."""
        for key in ("input_ids", "messages", "prompt"):
            source = data.get(key)
            if source is not None:
                break
        else:
            raise PromptError(f"a row has none of the keys input_ids, messages and prompt; it has {', '.join(map(str, data)) or 'nothing'}")
        known = self._prompts.get(id(source))
        if known is None or known[0] is not source:
            if len(self._prompts) >= _MAX_REMEMBERED:
                self._prompts.clear()
            ids = self._encode(data)
            known = self._prompts[id(source)] = (source, ids, self._decode(ids))
        if self.max_prompt_len is not None and len(known[1]) > self.max_prompt_len:
            raise EpisodeDropped(
                "prompt_too_long", f"a prompt of {len(known[1])} tokens is longer than max_prompt_len={self.max_prompt_len}"
            )
        return known[1], known[2]

    def _encode(self, data: Mapping[str, Any]) -> list[int]:
        if self.tokenizer is None and "input_ids" not in data:
            raise PromptError("a row has a text prompt, but the workflow has no tokenizer")
        try:
            ids = encode_prompt(data, self.tokenizer, **self._template_options)
        except MalformedRow as error:
            raise PromptError(str(error)) from error
        if not ids or not all(isinstance(token, int) for token in ids):
            raise PromptError(f"{data.get('prompt_id', 'a row')}: its prompt is empty or not a list of token ids")
        return ids

    def _decode(self, ids: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=True)


def _named(reward_fn: str, timeout: float | None) -> Callable[..., Any]:
    if not is_service(reward_fn):
        return import_object("reward_fn", reward_fn)  # type: ignore[no-any-return]
    return HTTPReward(reward_fn) if timeout is None else HTTPReward(reward_fn, timeout)


def response_to_dict(response: ModelResponse, reward: float) -> dict[str, Any]:
    """Prompt without loss, answer with loss."""
    n_prompt, n_answer = response.input_len, response.output_len
    mask = np.zeros(n_prompt + n_answer, dtype=bool)
    mask[n_prompt:] = True
    logprobs = np.zeros(n_prompt + n_answer, dtype=np.float32)
    logprobs[n_prompt:] = response.output_logprobs
    versions = np.full(n_prompt + n_answer, -1, dtype=np.int32)
    versions[n_prompt:] = response.output_versions
    ids = np.array(response.input_tokens + response.output_tokens, dtype=np.int64)
    return {"input_ids": ids, "loss_mask": mask, "logprobs": logprobs, "versions": versions, "rewards": np.float64(reward)}
