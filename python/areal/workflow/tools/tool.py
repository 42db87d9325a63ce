"""A tool, and what the model is told of the result of a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal.config import ConfigError
from areal.workflow.base import EpisodeDropped
from areal.workflow.user_code import CallFailed, call, check_sendable


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    An async function runs on the controller's event loop, any other in a reward worker: it must be importable there, and keeps nothing
    from call to call. What it returns is told to the model as text, other values than strings as JSON. What it raises, and that it took
    too long (a worker is killed then), are told as text too: that is the environment's answer. Only a call whose worker died, or that
    raised one of ``faults``, drops the group, cause tool_failed.
    """

    name: str
    function: Callable[..., Any]
    """Called with the call's arguments by their names."""
    description: str = ""
    """Told to the model by the chat template; empty = the function's docstring."""
    parameters: Mapping[str, Any] | None = None
    """JSON schema of the arguments; None = from the function's type hints and the Args of its docstring."""
    timeout: float | None = None
    """Seconds a call may take; None = that of the workflow."""
    faults: tuple[str, ...] = ()
    """Names of exceptions that are no answer to the model: what it was to be answered with could not be asked (a data base that is down)."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigError(f"the function of the tool '{self.name}' is a {type(self.function).__name__}", "give something to call")
        check_sendable(f"the tool '{self.name}'", self.function)

    def schema(self) -> dict[str, Any]:
        """In the form that chat templates take.

        Raises:
            ConfigError: no ``parameters``, and the function does not say them.
        """
        description, parameters = self.description, self.parameters
        if parameters is None:
            from transformers.utils import DocstringParsingException, TypeHintParsingException, get_json_schema

            try:
                told = get_json_schema(self.function)["function"]
            except (DocstringParsingException, TypeHintParsingException, TypeError) as error:
                raise ConfigError(
                    f"the arguments of the tool '{self.name}' are not known ({error})",
                    "give Tool(parameters=...), or type hints and a docstring with Args",
                ) from error
            description, parameters = description or told["description"], told["parameters"]
        elif not description:
            description = (self.function.__doc__ or "").strip()
        return {"type": "function", "function": {"name": self.name, "description": description, "parameters": dict(parameters)}}

    async def result(self, arguments: Mapping[str, Any], timeout: float | None = None) -> str:
        """What the model is told.

        Raises:
            EpisodeDropped: the process that ran it died, or it raised one of its ``faults``.
        """
        seconds = self.timeout if self.timeout is not None else timeout
        try:
            value = await call(self.function, (), arguments, seconds)
        except CallFailed as failure:
            if failure.kind == "died" or str(failure).partition(":")[0] in self.faults:
                raise EpisodeDropped("tool_failed", f"the tool '{self.name}': {failure}") from failure
            return f"Error: {failure}"
        try:
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            return f"Error: {type(error).__name__}: {error}"


def by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Raises ConfigError for two of the same name."""
    named: dict[str, Tool] = {}
    for tool in tools:
        if tool.name in named:
            raise ConfigError(f"tools has two of the name '{tool.name}'", "give each tool a name of its own")
        named[tool.name] = tool
    return named
