"""Several attempts at one prompt: an answer that earns nothing is told so, and the model goes on from the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from areal.chat import ChatTemplateError
from areal.config import ConfigError, GenerationConfig
from areal.reward import AsyncRewardWrapper
from areal.types import ModelResponse
from areal.workflow.base import EpisodeDropped, GenerationEngine, import_object, reward_callable
from areal.workflow.prompt import Prompt, PromptEncoder, Reply
from areal.workflow.sequence import TokenSequence
from areal.workflow.user_code import CallFailed, call, check_sendable

FEEDBACK = "That answer was not accepted. Look for the mistake, and give a new answer in the same form."


class MultiTurnWorkflow:
    """Generates and scores; while the score is not positive and turns are left, appends feedback and generates again.

    The episode is one sequence, with loss on the answers. Its reward is the last score * ``turn_discount`` ** (turns - 1). It ends early
    when an answer was cut off by its length, when the feedback is None, and when no further answer fits into ``max_context``.

    Args:
        reward_fn, gconfig, tokenizer, enable_thinking, max_prompt_len, reward_timeout: see ``RLVRWorkflow``. In the second turn the
            reward's ``prompt`` is everything before that turn's answer. ``gconfig.max_new_tokens`` bounds the answer of a turn.
        max_turns: answers at most.
        turn_discount: what a turn more leaves of the reward.
        feedback: text, which is a user's message in a chat, or a chat message; or ``fn(prompt, completion, reward, turn, **row)`` that
            returns one of these or None, or its import path as package.module:name. ``turn`` counts from 1. An async function runs on
            the event loop, any other in a reward worker; one that fails drops the group, cause feedback_failed.
        feedback_timeout: seconds for a feedback function; None = that of the reward service.
        max_context: tokens of the whole sequence at most; 0 = no bound here.
    """

    def __init__(
        self,
        reward_fn: Callable[..., Any] | str,
        gconfig: GenerationConfig,
        tokenizer: Any = None,
        max_turns: int = 3,
        turn_discount: float = 0.9,
        feedback: Reply | Callable[..., Any] = FEEDBACK,
        enable_thinking: bool | None = None,
        max_prompt_len: int | None = None,
        max_context: int = 0,
        reward_timeout: float | None = None,
        feedback_timeout: float | None = None,
    ) -> None:
        if max_turns < 1:
            raise ConfigError(f"max_turns={max_turns} of MultiTurnWorkflow leaves no turn", "give 1 or more")
        if not 0 < turn_discount <= 1:
            raise ConfigError(f"turn_discount={turn_discount} of MultiTurnWorkflow is not a discount", "give a number above 0, at most 1")
        self.gconfig, self.max_turns, self.turn_discount, self.max_context = gconfig.new(n_samples=1), max_turns, turn_discount, max_context
        self._prompts = PromptEncoder(tokenizer, max_prompt_len, enable_thinking=enable_thinking)
        if self._prompts.tokenizer is None:
            raise ConfigError("MultiTurnWorkflow has no tokenizer for its feedback", "give tokenizer=")
        self._feedback = _import_path(feedback)
        self._feedback_timeout = feedback_timeout
        if callable(self._feedback):
            check_sendable("the feedback function of MultiTurnWorkflow", self._feedback)
        else:
            self._check_feedback(self._feedback)
        self._reward = AsyncRewardWrapper(reward_callable(reward_fn, reward_timeout), reward_timeout)

    def _check_feedback(self, feedback: Reply) -> None:
        tokenizer = self._prompts.tokenizer
        for is_chat in {False, bool(tokenizer.chat_template)}:
            try:
                ids = self._prompts.reply(feedback, [], is_chat=is_chat)
            except Exception as error:  # tokenizers raises bare Exception
                raise ConfigError(
                    f"the feedback of MultiTurnWorkflow cannot be tokenized ({error})", "set feedback to another text"
                ) from error
            if not ids:
                raise ConfigError("the feedback of MultiTurnWorkflow is empty", "give a text, or max_turns=1")
            # Some tokenizers leave out what they have no token for.
            lost = set(feedback) - set(tokenizer.decode(ids)) - set(" \t\n") if isinstance(feedback, str) and feedback.isascii() else set()
            if lost:
                raise ConfigError(
                    f"the tokenizer has no tokens for {''.join(sorted(lost))!r} in the feedback of MultiTurnWorkflow",
                    "set workflow_kwargs.feedback to a text of its characters",
                )

    async def arun_episode(self, engine: GenerationEngine, data: dict[str, Any]) -> dict[str, Any]:
        """The dict of ``to_trajectory``, flat numpy arrays.

        Raises:
            EpisodeDropped: no prompt in the row, or too long a one; no feedback could be had.
            RewardFailure: an answer could not be scored.
        """
        prompt = self._prompts.encode(data)
        sequence = TokenSequence(prompt.ids, self.max_context)
        for turn in range(1, self.max_turns + 1):
            text = prompt.text if turn == 1 else self._prompts.decode(sequence.ids)
            response = await sequence.generate(engine, self.gconfig)
            sequence.append_answer(response)
            completion = self._prompts.decode(response.output_tokens)
            score = await self._reward(text, completion, response.input_tokens, response.output_tokens, **data)
            if score > 0 or turn == self.max_turns or response.stop_reason != "stop":
                break
            feedback = await self._reply(prompt, response, text, completion, score, turn, data)
            if feedback is None or not sequence.append_reply(feedback):
                break
        return sequence.to_dict(score * self.turn_discount ** (turn - 1))

    async def _reply(
        self, prompt: Prompt, response: ModelResponse, text: str, completion: str, score: float, turn: int, data: Mapping[str, Any]
    ) -> list[int] | None:
        """The feedback's tokens."""
        reply = self._feedback
        try:
            if callable(reply):
                row = {key: value for key, value in data.items() if key not in ("prompt", "completion", "reward", "turn")}
                reply = await call(reply, (text, completion, score, turn), row, self._feedback_timeout)
            return None if reply is None else self._prompts.reply(reply, response.output_tokens, is_chat=prompt.is_chat)
        except (CallFailed, ChatTemplateError) as error:
            raise EpisodeDropped("feedback_failed", str(error)) from error


def _import_path(feedback: Any) -> Any:
    """``package.module:name`` is a path, whatever else there is in it; any other text is the feedback itself."""
    if (
        isinstance(feedback, str)
        and feedback.count(":") == 1
        and all(part.isidentifier() for part in feedback.replace(":", ".").split("."))
    ):
        return import_object("feedback", feedback)
    return feedback
