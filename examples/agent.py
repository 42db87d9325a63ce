"""An agent that knows nothing of areal: the calculator task (calculator.py) as a loop around the ``openai`` client.

    pip install openai;  python examples/agent.py [key=value ...]

Its ``base_url`` leads to the model in training. What it is answered is recorded there token by token, with log-probs and versions, and
its return value is the reward.
"""

from __future__ import annotations

import re
from typing import Any

from calculator import calculate, draw_problem, reward
from openai import AsyncOpenAI
from tiny import load_config, make_rows

from areal import PPOTrainer

MAX_CALLS = 4


class CalculatorAgent:
    async def run(self, data: dict[str, Any], base_url: str, http_client: Any, api_key: str) -> float:
        client = AsyncOpenAI(base_url=base_url, http_client=http_client, api_key=api_key, max_retries=0)
        messages: list[Any] = [{"role": "user", "content": data["prompt"]}]
        for _ in range(MAX_CALLS):
            reply = await client.chat.completions.create(model="policy", messages=messages, stop=["]"])
            text = reply.choices[0].message.content or ""
            call = re.search(r"\[(-?\d+)([-+*])(\d+)$", text)
            if call is None:
                return reward("", text, [], [], data["answer"])
            result = calculate(int(call[1]), call[2], int(call[3]))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": str(result)}]
        return 0.0


def main() -> None:
    config = load_config("calculator", "0123456789+-*=[]#")
    train, held_out = make_rows(20_000, 512, draw_problem)
    with PPOTrainer(config.new(experiment_name="agent"), train_dataset=train, valid_dataset=held_out) as trainer:
        trainer.train(workflow=CalculatorAgent())
        print(trainer.run_folder / "summary.json")


if __name__ == "__main__":  # workers import this file
    main()
