"""Code that is run: a tiny model writes Python functions, and what counts is whether they pass their tests, in the sandbox.

    python examples/write_code.py [key=value ...]

    prompt      x+3*2-1:                        operations to be done one after the other
    answers     def f(x):return x+3*2-1         right only where precedence agrees
                def f(x):return((x+3)*2)-1      always right

Both ways of writing are demonstrated equally often; reinforcement learning finds out which one passes. ``code_reward`` runs every answer
with the row's ``tests`` in a process of its own.
"""

from __future__ import annotations

import random
from typing import Any

from tiny import load_config, make_rows

from areal import PPOTrainer

INPUTS = range(-2, 5)


def draw_problem(numbers: random.Random, index: int) -> dict[str, Any]:
    plain = nested = "x"
    values = list(INPUTS)
    for _ in range(numbers.randint(3, 5)):
        operation, digit = numbers.choice("+-*"), numbers.randint(1, 9)
        plain += f"{operation}{digit}"
        nested = f"({nested}){operation}{digit}" if len(nested) > 1 else f"x{operation}{digit}"
        values = [value + digit if operation == "+" else value - digit if operation == "-" else value * digit for value in values]
    return {
        "prompt": f"{plain}:",
        "completion": f"def f(x):return {plain}" if index % 2 else f"def f(x):return{nested}",
        "tests": f"assert [f(x) for x in {INPUTS!r}] == {values}",
    }


def main() -> None:
    config = load_config("write_code", "def f(x):return 0123456789+-*")
    train, held_out = make_rows(20_000, 512, draw_problem)
    with PPOTrainer(config, train_dataset=train, valid_dataset=held_out) as trainer:
        trainer.train()
        print(trainer.run_folder / "summary.json")


if __name__ == "__main__":  # reward workers import this file
    main()
