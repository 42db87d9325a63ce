"""An engine that answers given tokens: for the exact layout of episodes."""

from __future__ import annotations

from typing import Any

from areal.types import ModelRequest, ModelResponse

FIRST_VERSION = 2


class ScriptedEngine:
    """Call i samples its tokens with version 2 + i and log-prob -(i + 1) / 4; an answer longer than asked for is cut off, as by a server."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers = list(answers)
        self.requests: list[ModelRequest] = []

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        call = len(self.requests)
        self.requests.append(request)
        tokens = self.answers.pop(0)
        asked = request.gconfig.max_new_tokens
        reason: Any = "length" if len(tokens) > asked else "stop"
        tokens = tokens[:asked]
        n = len(tokens)
        return ModelResponse(list(request.input_ids), tokens, [-(call + 1) / 4] * n, [FIRST_VERSION + call] * n, reason)

    def get_version(self) -> int:
        return FIRST_VERSION + len(self.requests)
