"""One episode as the endpoint sees it: its calls, and what was sampled for each.

Invariants: a turn holds the tokens, log-probs, versions and stop reason as the engine gave them, up to the first stop string; the prompt
of a turn with a parent begins with the parent's prompt and output; after ``end`` nothing is generated or recorded. Errors that are not the
call's own (``failure``) are there for the workflow before the agent gets its answer.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field, replace

from areal.agent.chat import Chat, Reply, Said
from areal.agent.messages import chain_keys
from areal.agent.openai_answers import Answer, Choice
from areal.agent.openai_protocol import ApiError, Call
from areal.agent.sampling import SamplingRules
from areal.config import GenerationConfig
from areal.inference.client import RequestRejected
from areal.types import ModelRequest, ModelResponse
from areal.workflow.base import FATAL, GenerationEngine
from areal.workflow.sequence import tokens_to_stop


@dataclass(eq=False, slots=True)
class Turn:
    """One sampled answer and its prompt."""

    id: str
    """Of the completion, as the client knows it; ``id:1``, ``id:2`` ... are further choices of the same call."""
    call: int
    """Running number of the call in the episode."""
    response: ModelResponse
    parent: Turn | None
    """Whose tokens the prompt takes over."""
    text: str
    """What the client got as the content."""
    prompt_text: str = ""
    """The prompt, as the template renders it from scratch; of a plain completion, the text that was given."""
    n_messages: int = 0

    @property
    def ids(self) -> list[int]:
        return self.response.input_tokens + self.response.output_tokens


@dataclass(slots=True)
class _Prompt:
    ids: list[int]
    text: str
    parent: Turn | None = None
    key: bytes = b""
    """Of its messages."""


@dataclass(eq=False)
class Session:
    """Answers the calls of one episode, any number at a time, and records them.

    Args:
        engine: that of the episode.
    """

    engine: GenerationEngine
    chat: Chat
    rules: SamplingRules
    turns: list[Turn] = field(default_factory=list)
    """In the order in which their answers came."""
    failure: asyncio.Future[Exception] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """What ends the episode, or the run, whatever the agent makes of it."""
    refusal: ApiError | None = None
    """Why the newest call was refused; None = it was answered."""
    _calls: int = 0
    _by_key: dict[bytes, Turn] = field(default_factory=dict)
    """Chat turns by the conversation up to their answer."""
    _running: set[asyncio.Task[object]] = field(default_factory=set)
    _ended: bool = False

    def end(self) -> None:
        """The key is dead: calls still running are cancelled, and later ones refused."""
        self._ended = True
        for task in self._running:
            task.cancel()

    async def answer(self, call: Call) -> Answer:
        """Generates and records. Raises ApiError, and nothing else but CancelledError when the client goes away."""
        task = asyncio.current_task()
        assert task is not None
        if self._ended:
            raise _gone()
        self._running.add(task)
        try:
            answer = await self._answer(call)
            self.refusal = None
            return answer
        except ApiError as error:
            self.refusal = error
            raise
        except asyncio.CancelledError:
            if self._ended and task.uncancel() == 0:  # by ``end``, not by a client that hung up
                raise _gone() from None
            raise
        finally:
            self._running.discard(task)

    async def _answer(self, call: Call) -> Answer:
        number, self._calls = self._calls, self._calls + 1
        prompt = self._prompt(call)
        gconfig = self.rules.gconfig(call.sampling, len(prompt.ids))
        responses = [self._until_stop(r, gconfig) for r in await self._generate(ModelRequest(prompt.ids, gconfig), call.n)]
        name = f"{'chatcmpl' if call.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        choices = [self._record(call, number, prompt, response, gconfig, name, i) for i, response in enumerate(responses)]
        return Answer(name, choices, len(prompt.ids), sum(response.output_len for response in responses))

    async def _generate(self, request: ModelRequest, n: int) -> list[ModelResponse]:
        try:
            if n == 1:
                return [await self.engine.agenerate(request)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.engine.agenerate(ModelRequest(request.input_ids, request.gconfig))) for _ in range(n)]
            return [task.result() for task in tasks]
        except Exception as error:  # boundary to the engine: what is not the call's own fault must not end up with the agent
            raise self._told(error.exceptions[0] if isinstance(error, ExceptionGroup) else error) from error

    def _until_stop(self, response: ModelResponse, gconfig: GenerationConfig) -> ModelResponse:
        """Without what was sampled behind a stop string that began before an interruption (see ``tokens_to_stop``)."""
        n = tokens_to_stop(response.output_tokens, gconfig.stop, lambda ids: self.chat.decode(list(ids), skip_special=False))
        if n is None or n == response.output_len:
            return response
        tokens, logprobs, versions = response.output_tokens[:n], response.output_logprobs[:n], response.output_versions[:n]
        return replace(response, output_tokens=tokens, output_logprobs=logprobs, output_versions=versions, stop_reason="stop")

    def _told(self, error: Exception) -> ApiError:
        if isinstance(error, RequestRejected):
            code = "context_length_exceeded" if "context" in str(error) else None
            return ApiError(400, str(error), param="messages" if code else None, code=code)
        self.fail(error)
        if isinstance(error, TimeoutError):
            return ApiError(504, str(error), kind="timeout")
        return ApiError(503 if isinstance(error, FATAL) else 500, f"{type(error).__name__}: {error}", kind="server_error")

    def fail(self, error: Exception) -> None:
        """Ends the episode with this error; the first one counts."""
        if not self.failure.done():
            self.failure.set_result(error)

    # -- prompts ---------------------------------------------------------------------------------------------------------------

    def _prompt(self, call: Call) -> _Prompt:
        if call.is_chat:
            return self._chat_prompt(call)
        if isinstance(call.prompt, str):
            return self._text_prompt(call.prompt)
        ids = call.prompt or []
        earlier = [turn for turn in self.turns if len(turn.ids) < len(ids) and ids[: len(turn.ids)] == turn.ids]
        return _Prompt(ids, "", max(earlier, key=lambda turn: len(turn.ids), default=None))

    def _chat_prompt(self, call: Call) -> _Prompt:
        text = self.chat.render(call.messages, call.tools, call.template_options)
        keys = chain_keys(call.messages)
        for key in reversed(keys[:-1]):
            turn = self._by_key.get(key)
            if turn is not None:
                said = Said(turn.prompt_text, turn.n_messages, turn.ids, turn.response.stop_reason == "stop")
                ids = self.chat.extend(said, text, call.messages, call.tools, call.template_options)
                if ids is not None:
                    return _Prompt(ids, text, turn, keys[-1])
        return _Prompt(self.chat.encode_all(text), text, None, keys[-1])

    def _text_prompt(self, text: str) -> _Prompt:
        """A text that goes on where an earlier completion ended takes over its tokens, if it shows all of them."""
        best, n_best = None, 0
        for turn in self.turns:
            if turn.n_messages or not turn.prompt_text or len(turn.prompt_text) <= n_best or not text.startswith(turn.prompt_text):
                continue
            shown = turn.prompt_text + self.chat.decode(turn.response.output_tokens, skip_special=False)
            if n_best < len(shown) < len(text) and text.startswith(shown):
                best, n_best = turn, len(shown)
        if best is None:
            return _Prompt(self.chat.encode_text(text), text)
        return _Prompt(best.ids + self.chat.encode_rest(text[n_best:]), text, best)

    # -- answers ---------------------------------------------------------------------------------------------------------------

    def _record(
        self, call: Call, number: int, prompt: _Prompt, response: ModelResponse, gconfig: GenerationConfig, name: str, index: int
    ) -> Choice:
        reply: Reply = self.chat.read(response, gconfig.stop, tools=call.tools is not None)
        turn = Turn(f"{name}:{index}" if index else name, number, response, prompt.parent, reply.text, prompt.text, len(call.messages))
        self.turns.append(turn)
        if call.is_chat:
            self._by_key[chain_keys([reply.message()], prompt.key)[0]] = turn
        reason = "tool_calls" if reply.tool_calls and response.stop_reason == "stop" else response.stop_reason
        logprobs = self.chat.logprobs(response) if call.logprobs else None
        return Choice(reply.text, reason, reply.tool_calls, logprobs)


def _gone() -> ApiError:
    return ApiError(401, "this key is of an episode that has ended", code="invalid_api_key", kind="authentication_error")
