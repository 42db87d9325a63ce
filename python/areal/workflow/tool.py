"""An answer with calls in it: the model writes a call, reads its result, and writes on, in one token sequence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from areal.chat import ChatTemplateError
from areal.config import ConfigError, GenerationConfig
from areal.reward import AsyncRewardWrapper
from areal.reward.run_python import clip
from areal.reward.sandbox.limits import Isolation
from areal.workflow.base import EpisodeDropped, GenerationEngine, import_object, reward_callable
from areal.workflow.prompt import Prompt, PromptEncoder
from areal.workflow.sequence import TokenSequence, shorter, tokens_to_stop
from areal.workflow.tools import FORMATS, Tool, ToolCall, ToolFormat
from areal.workflow.tools.python import python_tool
from areal.workflow.tools.tool import by_name


class ToolWorkflow:
    """Generates; while there is a call in what was generated, makes it, appends its result and generates on. Then scores.

    The episode is one sequence, with loss on what the model wrote and none on results. The reward's ``completions`` and ``completion_ids``
    are all of it behind the prompt, calls and results included. It ends at an answer without a call, at a call beyond ``max_calls`` (which
    is not made), when an answer was cut off by its length, and when a result leaves no room in ``max_context``.

    Args:
        reward_fn, gconfig, tokenizer, enable_thinking, max_prompt_len, reward_timeout: see ``RLVRWorkflow``. ``gconfig.max_new_tokens``
            bounds what is written from one result to the next.
        tools: each a ``Tool``, a function (its name and docstring are the tool's), "python" (runs code in the sandbox) or the import path
            of one of the first two.
        format: how calls look: "hermes", "python", or an object with the members of ``ToolFormat``, its class or import path.
        max_calls: calls of an episode at most.
        tool_timeout: seconds for a call of a tool that does not say its own.
        max_result_chars: longer results are told without their middle; more than 4900 characters of a program are never told.
        max_context: tokens of the whole sequence at most; 0 = no bound here.
        isolation: of the tool "python", as in ``CodeReward``.
    """

    def __init__(
        self,
        reward_fn: Callable[..., Any] | str,
        gconfig: GenerationConfig,
        tokenizer: Any = None,
        tools: Sequence[Tool | Callable[..., Any] | str] = ("python",),
        format: ToolFormat | type | str = "hermes",
        max_calls: int = 8,
        tool_timeout: float = 10.0,
        max_result_chars: int = 4000,
        enable_thinking: bool | None = None,
        max_prompt_len: int | None = None,
        max_context: int = 0,
        reward_timeout: float | None = None,
        isolation: Isolation = "auto",
    ) -> None:
        if max_calls < 1 or not tools:
            raise ConfigError(
                f"ToolWorkflow has {len(tools)} tools and max_calls={max_calls}: nothing can be called", "give both, or RLVRWorkflow"
            )
        if max_result_chars < 1:
            raise ConfigError(f"max_result_chars={max_result_chars} of ToolWorkflow tells no result", "give 1 or more")
        if isinstance(tools, str):
            tools = (tools,)
        self.tools = by_name([_tool(tool, isolation, tool_timeout, max_result_chars) for tool in tools])
        self.format = _format(format)
        self.max_calls, self.tool_timeout, self.max_result_chars, self.max_context = max_calls, tool_timeout, max_result_chars, max_context
        stops = [stop for stop in self.format.stop if stop not in gconfig.stop]
        self.gconfig = gconfig.new(n_samples=1, stop=[*gconfig.stop, *stops])
        self._in_template = bool(getattr(self.format, "in_template", False))
        schemas = [tool.schema() for tool in self.tools.values()] if self._in_template else None
        self._prompts = PromptEncoder(tokenizer, max_prompt_len, enable_thinking=enable_thinking, tools=schemas)
        self._check_tokenizer()
        self._special = frozenset(self._prompts.tokenizer.all_special_ids)
        self._reward = AsyncRewardWrapper(reward_callable(reward_fn, reward_timeout), reward_timeout)

    def _check_tokenizer(self) -> None:
        """Whether calls can be read, and with a format of the template whether that tells the model of the tools and of results."""
        tokenizer, name = self._prompts.tokenizer, type(self.format).__name__
        if tokenizer is None:
            raise ConfigError("ToolWorkflow has no tokenizer to read calls with", "give tokenizer=")
        if not self._in_template:
            return
        if not tokenizer.chat_template:
            raise ConfigError(f"{name} needs a chat template, and the tokenizer has none", "use format: python, or one of your own")
        try:
            self._prompts.reply(self.format.render(["1"]), [], is_chat=True)
        except ChatTemplateError as error:
            raise ConfigError(f"{name} cannot be used: {error}", "use format: python, or one of your own") from error
        told = tokenizer.decode(self._prompts.encode({"messages": [{"role": "user", "content": "?"}]}).ids)
        if untold := [tool for tool in self.tools if tool not in told]:
            raise ConfigError(
                f"the chat template does not tell the model of the tool '{untold[0]}'", "use format: python, or one of your own"
            )

    async def arun_episode(self, engine: GenerationEngine, data: dict[str, Any]) -> dict[str, Any]:
        """The dict of ``to_trajectory``, flat numpy arrays.

        Raises:
            EpisodeDropped: no prompt in the row, or too long a one; a tool could not be asked (tool_failed), or its result cannot be
                tokenized (tool_result).
            RewardFailure: the answer could not be scored.
        """
        prompt = self._prompts.encode(data)
        sequence = TokenSequence(prompt.ids, self.max_context)
        n_left = self.max_calls
        while (calls := await self._write(engine, sequence)) is not None and len(calls) <= n_left:
            n_left -= len(calls)
            reply = self._reply(await self._results(calls), prompt, sequence)
            if not sequence.append_reply(reply):
                break
        answer = sequence.ids[sequence.n_prompt :]
        reward = await self._reward(prompt.text, self._prompts.decode(answer), sequence.ids[: sequence.n_prompt], answer, **data)
        return sequence.to_dict(reward)

    async def _write(self, engine: GenerationEngine, sequence: TokenSequence) -> list[ToolCall] | None:
        """Appends what the model writes until its next calls, which are returned; None when it is done, or its length ended it."""
        begin = len(sequence)
        while True:
            left = self.gconfig.max_new_tokens - (len(sequence) - begin)
            if left <= 0 or sequence.room == 0:  # behind a stop string that ended no call
                sequence.truncated = True
                return None
            gconfig = self.gconfig if left == self.gconfig.max_new_tokens else shorter(self.gconfig, left)
            response = await sequence.generate(engine, gconfig)
            n = tokens_to_stop(response.output_tokens, self.format.stop, self._decode_all)
            sequence.append_answer(response, n)
            if sequence.truncated or (self.format.stop and n is None):
                return None
            calls = self.format.parse(self._text(sequence.ids[begin:]))
            if calls or not self.format.stop:
                return calls or None

    def _decode_all(self, ids: Sequence[int]) -> str:
        return str(self._prompts.tokenizer.decode(ids, skip_special_tokens=False))

    def _text(self, ids: list[int]) -> str:
        """Without the end of the turn; the tags of calls are special tokens in some vocabularies, and stay."""
        end = len(ids)
        while end and ids[end - 1] in self._special:
            end -= 1
        return self._decode_all(ids[:end])

    async def _results(self, calls: Sequence[ToolCall]) -> list[str]:
        if len(calls) == 1:
            return [await self._result(calls[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._result(call)) for call in calls]
        except BaseExceptionGroup as errors:  # of a failure there is one, which is the episode's; the other calls were cancelled
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _result(self, call: ToolCall) -> str:
        if call.error:
            return f"Error: {call.error}"
        tool = self.tools.get(call.name)
        if tool is None:
            return f"Error: there is no tool '{call.name}'; there are {', '.join(self.tools)}"
        return clip(await tool.result(call.arguments, self.tool_timeout), self.max_result_chars)

    def _reply(self, results: Sequence[str], prompt: Prompt, sequence: TokenSequence) -> list[int]:
        reply = self.format.render(results)
        try:
            return self._prompts.reply(reply, sequence.ids, is_chat=prompt.is_chat and not isinstance(reply, str))
        except Exception as error:  # tokenizers raises bare Exception
            raise EpisodeDropped("tool_result", f"a result cannot be tokenized ({error}): {str(reply)[:80]!r}") from error


def _tool(tool: Any, isolation: Isolation, timeout: float, max_chars: int) -> Tool:
    if tool == "python":
        return python_tool(isolation, timeout, max_chars)
    if isinstance(tool, str):
        tool = import_object("tools", tool)
    return tool if isinstance(tool, Tool) else Tool(getattr(tool, "__name__", type(tool).__name__), tool)


def _format(given: Any) -> ToolFormat:
    if isinstance(given, str):
        given = FORMATS[given] if given in FORMATS else import_object("format", given)
    made = given() if isinstance(given, type) else given
    if not isinstance(made, ToolFormat):
        raise ConfigError(
            f"the format {made!r} of ToolWorkflow is none", f"give one of {', '.join(FORMATS)}, or an object with stop, parse and render"
        )
    return made
