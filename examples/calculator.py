"""A tool in the middle of an answer: a tiny model that cannot multiply learns to use a calculator.

    python examples/calculator.py [key=value ...]

    prompt      47*83-19=
    answers     #3882                            out of its head: practically never right
                [47*83]3901[3901-19]3882#3882    what stands behind a ] comes from the calculator, and is not trained on

Both kinds are demonstrated equally often; reinforcement learning finds out that the calculator pays.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from tiny import load_config, make_rows

from areal import GenerationConfig, PPOTrainer
from areal.workflow.tool import ToolWorkflow
from areal.workflow.tools import Tool, ToolCall

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculate(left: int, sign: str, right: int) -> int:
    """One operation on two whole numbers."""
    return OPERATIONS[sign](left, right)


class Brackets:
    """The language of calls: ``[47*83]``, and the result behind it."""

    stop = ("]",)

    def parse(self, text: str) -> list[ToolCall] | None:
        found = re.search(r"\[(-?\d+)([-+*])(\d+)\]$", text)
        return [ToolCall("calculate", {"left": int(found[1]), "sign": found[2], "right": int(found[3])})] if found else None

    def render(self, results: Sequence[str]) -> str:
        return results[0]


def reward(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], answer: str, **row: Any) -> float:
    """1.0 when what follows the last # is the result."""
    _, mark, result = completions.rpartition("#")
    return float(bool(mark) and result == answer)


def draw_problem(numbers: random.Random, index: int) -> dict[str, Any]:
    value = numbers.randint(10, 99)
    prompt, steps = str(value), list[str]()
    for sign in (numbers.choice("*+-"), *numbers.choice(("", "+", "-"))):
        operand = numbers.randint(10, 99)
        result = calculate(value, sign, operand)
        steps += [f"[{value}{sign}{operand}]", str(result)]
        prompt, value = f"{prompt}{sign}{operand}", result
    completion = [f"#{value}"] if index % 2 else [*steps, f"#{value}"]  # every second text is the calculator's
    return {"prompt": f"{prompt}=", "completion": completion, "answer": str(value)}


def make_workflow(gconfig: GenerationConfig, tokenizer: Any) -> ToolWorkflow:
    return ToolWorkflow(reward, gconfig, tokenizer, tools=[Tool("calculate", calculate)], format=Brackets(), max_calls=4)


def main() -> None:
    config = load_config("calculator", "0123456789+-*=[]#")
    train, held_out = make_rows(20_000, 512, draw_problem)
    with PPOTrainer(config, train_dataset=train, valid_dataset=held_out) as trainer:
        trainer.train(workflow=make_workflow(config.gconfig, trainer.tokenizer))
        print(trainer.run_folder / "summary.json")


if __name__ == "__main__":  # workers import this file
    main()
