"""A tool format for a model that can nothing: every even digit is a call."""

from __future__ import annotations

from areal.workflow.tools import ToolCall


class DigitFormat:
    stop = ("0", "2", "4", "6", "8")

    def parse(self, text: str) -> list[ToolCall]:
        return [ToolCall("next_digit", {"digit": int(text[-1])})]

    def render(self, results: list[str]) -> str:
        return results[0]
