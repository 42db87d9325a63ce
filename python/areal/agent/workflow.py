"""The workflow around an agent: opens a session, runs the agent on it, exports what was recorded."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from areal.agent.chat import Chat
from areal.agent.endpoint import shared_endpoint
from areal.agent.export import Style, export
from areal.agent.http_clients import http_clients
from areal.agent.sampling import SamplingRules
from areal.agent.session import Session
from areal.config import ConfigError, GenerationConfig
from areal.reward.service import home_loop, is_async, score_watch
from areal.run_folder import load_tokenizer
from areal.threads import DaemonThreads
from areal.tool_calls import ToolCall, hermes
from areal.workflow.arguments import check_arguments
from areal.workflow.base import EpisodeDropped, GenerationEngine, import_object
from areal.workflow.user_code import begin, end, result_of

_END_SECONDS = 10.0
_THREADS = DaemonThreads()
_GIVEN = ("base_url", "http_client", "api_key")


class AgentWorkflow:
    """Runs an agent that speaks OpenAI's protocol, and trains on what was sampled for it.

    The agent is ``run(data, base_url, http_client, api_key)``, or with fewer of the last three, or ``**kwargs``. It calls ``base_url``
    with ``api_key``, as often and as many at a time as it likes, and returns its reward: a number, a dict {id of a completion: number},
    or None, which drops the episode. An async one runs on the controller's event loop, which it must not block; a sync one in a thread
    of its own, whose Python code takes turns with the controller's.

    Args:
        agent: an object with ``run``, a class of such, a function, or the import path of one.
        gconfig: sampling, where the agent's requests say nothing; ``max_new_tokens`` is an upper bound.
        tokenizer: Hugging Face tokenizer or the folder of one.
        agent_kwargs: arguments of the agent's class.
        export_style: ``concat`` = turns that extend one another are one sequence; ``individual`` = each turn is one (see ``export.py``).
        turn_discount: see ``export``.
        training: False = for evaluation: requests may set temperature, top_p and top_k.
        max_context: longest prompt + answer in tokens; 0 = the server's, which then refuses what is longer.
        enable_thinking: handed to the chat template; None = the template's own default.
        tool_parser: how tool calls are read out of an answer (``areal.agent.hermes``), or the import path of such a function.
        host, port: what the endpoint listens on; port 0 = a free one.
    """

    def __init__(
        self,
        agent: Any,
        gconfig: GenerationConfig,
        tokenizer: Any,
        *,
        agent_kwargs: Mapping[str, Any] | None = None,
        export_style: Style = "concat",
        turn_discount: float = 1.0,
        training: bool = True,
        max_context: int = 0,
        enable_thinking: bool | None = None,
        tool_parser: Callable[[str], tuple[str, list[ToolCall]]] | str = hermes,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if export_style not in get_args(Style):
            raise ConfigError(f"export_style={export_style!r} is not a style", f"use {' or '.join(get_args(Style))}")
        if not 0 <= port <= 65535:
            raise ConfigError(f"port={port} of AgentWorkflow is no port", "give one up to 65535, or 0 for a free one")
        if not 0 <= turn_discount <= 1:
            raise ConfigError(f"turn_discount={turn_discount} of AgentWorkflow is not a discount", "give a number from 0 to 1")
        parser = import_object("tool_parser", tool_parser) if isinstance(tool_parser, str) else tool_parser
        if tokenizer is None:
            raise ConfigError("AgentWorkflow has no tokenizer: messages cannot become tokens", "give tokenizer=, or set actor.path")
        if agent_kwargs is not None and not isinstance(agent_kwargs, Mapping):
            raise ConfigError(f"agent_kwargs of AgentWorkflow is a {type(agent_kwargs).__name__}", "give a mapping of arguments")
        self._run = _run_of(agent, agent_kwargs or {})
        self._on_loop = is_async(self._run)
        self._given = _accepted(self._run)
        self._style: Style = export_style
        self._discount = turn_discount
        tokenizer = load_tokenizer(Path(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._chat = Chat(tokenizer, options, parser)
        self._gconfig, self._max_context = gconfig, max_context
        self._rules = SamplingRules(gconfig, training=training, max_context=max_context)
        self._address = (host, port)

    async def arun_episode(self, engine: GenerationEngine, data: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The dicts of ``to_trajectories``, or None where the agent wants the episode dropped.

        Raises:
            EpisodeDropped: the agent made no call, or gave up over a call that was refused.
            RewardFailure: what it returned is not a reward.
            TimeoutError: a call had no answer in time, whatever the agent made of it.
            Errors that end the run (``workflow.base.FATAL``), likewise; otherwise what the agent raised.
        """
        endpoint = shared_endpoint(*self._address)
        base_url = await endpoint.url()
        session = Session(engine, self._chat, self._rules)
        with endpoint.open(session) as key:
            reward = await self._until_done(session, data, base_url, key)
        if reward is None:
            return None
        if not session.turns:
            raise EpisodeDropped("agent_made_no_call", "the agent returned a reward without a single answered call to base_url")
        return export(session.turns, reward, style=self._style, turn_discount=self._discount)

    def for_evaluation(self, gconfig: GenerationConfig | None = None) -> AgentWorkflow:
        """The same agent without training's limits on sampling; ``gconfig``: None = the same."""
        other = copy.copy(self)
        other._rules = SamplingRules(gconfig or self._gconfig, training=False, max_context=self._max_context)
        return other

    async def aclose(self) -> None:
        """Closes the endpoint, which others may share, before the event loop ends."""
        await shared_endpoint(*self._address).close()
        await http_clients().aclose()

    async def _until_done(self, session: Session, data: dict[str, Any], base_url: str, key: str) -> Any:
        """What the agent returns; a failure of the session comes first, and ends the agent."""
        agent = begin(self._agent(data, base_url, key))
        try:
            await asyncio.wait({agent, session.failure}, return_when=asyncio.FIRST_COMPLETED)
            if session.failure.done():
                raise session.failure.result()
            try:
                return result_of(agent)
            except Exception as error:  # boundary to the user's agent
                if session.refusal is None or isinstance(error, EpisodeDropped):
                    raise
                cause = "prompt_too_long" if session.refusal.code == "context_length_exceeded" else "request_rejected"
                raise EpisodeDropped(cause, f"{session.refusal} (the agent raised {type(error).__name__})") from error
        finally:
            await end(agent, _END_SECONDS, "an agent")

    async def _agent(self, data: dict[str, Any], base_url: str, key: str) -> Any:
        client = http_clients().asynchronous if self._on_loop else http_clients().synchronous
        values = {"base_url": base_url, "http_client": client, "api_key": key}
        given = {name: values[name] for name in self._given}
        if self._on_loop:
            return await self._run(data, **given)
        result = await _in_thread(lambda: self._run(data, **given))
        return await result if inspect.isawaitable(result) else result


def _run_of(agent: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    if isinstance(agent, str):
        agent = import_object("agent", agent)
    if isinstance(agent, type):
        check_arguments(agent, kwargs, "agent_kwargs")
        try:
            agent = agent(**kwargs)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the agent {agent!r} cannot be made: {error}", "correct agent_kwargs") from error
    elif kwargs:
        raise ConfigError(f"agent_kwargs were given, but the agent {agent!r} is not a class", "leave them out")
    run = getattr(agent, "run", agent)
    if not callable(run):
        raise ConfigError(
            f"the agent {agent!r} has no method run", "give an object with run(data, base_url, http_client, api_key), or that function"
        )
    return run  # type: ignore[no-any-return]


def _accepted(run: Callable[..., Any]) -> tuple[str, ...]:
    """Which of the three arguments it takes."""
    try:
        parameters = inspect.signature(run).parameters
    except (TypeError, ValueError):  # a callable of C
        return _GIVEN
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return _GIVEN
    if "base_url" not in parameters or "api_key" not in parameters:
        raise ConfigError(
            f"the agent's run takes ({', '.join(parameters)}), so it cannot call the model",
            "let it take (data, base_url, http_client, api_key)",
        )
    return tuple(name for name in _GIVEN if name in parameters)


async def _in_thread(function: Callable[[], Any]) -> Any:
    """Runs it in a thread of its own, which has the event loop to go back to for scores."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    context.run(home_loop.set, loop)
    context.run(score_watch.set, None)  # it must not be told from another thread

    def work() -> Any:
        try:
            return context.run(function)
        except StopIteration as error:  # a future cannot hold it
            raise RuntimeError(f"the agent raised StopIteration: {error}") from error
        except BaseException as error:  # boundary to the user's agent: SystemExit is its end, not the run's
            if isinstance(error, Exception):
                raise
            raise RuntimeError(f"the agent raised {error!r}") from error

    return await loop.run_in_executor(_THREADS, work)
