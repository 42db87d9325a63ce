"""``areal train`` with other workflows than one answer to one prompt, a filter, and shaped rewards; all by the config alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import ROOT, TrainRun
from scripted_engine import ScriptedEngine

from areal.config import GRPOConfig
from areal.config_load import load_expr_config
from areal.reward import RewardService
from areal.tasks.arithmetic import build_tokenizer
from areal.types import Trajectory
from areal.workflow import ToolWorkflow, to_trajectory
from areal.workflow.build import build_workflow

SHORT = ["total_train_steps=2", "evaluator.n_prompts=4", "stats_logger.tensorboard=false", "stats_logger.dump_trajectories=true"]
ENV = {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT / 'tests'}"}


def _finished(folder: Path, *overrides: str) -> tuple[TrainRun, dict[str, Any], list[dict[str, Any]]]:
    run = TrainRun(folder, *SHORT, *overrides, env=ENV)
    summary = run.summary()
    return run, summary, [json.loads(line) for line in (run.folder / "trajectories.jsonl").read_text().splitlines()]


def test_dynamic_filter(tmp_path: Path) -> None:
    """A random model almost never answers right: nearly all groups are alike, and the bound on waste is what fills the batches."""
    run, summary, samples = _finished(
        tmp_path,
        "rollout.dynamic_filter=mixed",
        "rollout.dynamic_filter_max_waste=2",
        "reward_fn=rewards:first_id_is_even",
        "rollout.max_head_offpolicyness=1",
    )
    rows = run.metrics()
    assert len(rows) == summary["train_steps"] == 2 and summary["dropped"] == {}
    groups: dict[int, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample["group_id"], []).append(sample["reward"])
    alike = [len(set(rewards)) == 1 for rewards in groups.values()]
    assert len(groups) == 2 * 4 and sum(alike) <= summary["filter_passed"]
    assert summary["filtered"] > 0 and rows[-1]["filtered"] <= summary["filtered"] <= 2 * (len(groups) + 4 + 4 * 1)
    assert all(row["staleness_max"] <= 1 for row in rows)
    assert "filtered" in run.stderr


def test_multi_turn(tmp_path: Path) -> None:
    run, summary, samples = _finished(
        tmp_path,
        "workflow=areal:MultiTurnWorkflow",
        "workflow_kwargs={max_turns: 3, turn_discount: 0.5, feedback: '=#'}",
        "reward_fn=rewards:minus_one",
        "gconfig.stop_token_ids=[2, 3, 4, 5, 6]",
        "actor.overlong_reward_penalty=true",
        "actor.overlong_tokens=8",
        "actor.mask_truncated=true",
    )
    assert summary["train_steps"] == 2 and summary["dropped"] == {}
    turns = [int((np.diff(np.array(s["loss_mask"], int)) == 1).sum()) for s in samples]
    assert max(turns) == 3 and all(len(s["input_ids"]) <= 96 for s in samples)  # rollout.max_context of the example
    assert {s["reward"] for s in samples} <= {-1.0, -0.5, -0.25}
    assert all(s["reward"] == -(0.5 ** (n - 1)) for s, n in zip(samples, turns, strict=True))
    assert all(s["truncated"] or n == 3 or len(s["input_ids"]) >= 93 for s, n in zip(samples, turns, strict=True))
    n_truncated = sum(s["truncated"] for s in samples)
    assert summary["truncated_masked"] == n_truncated > 0
    kept = sum(sum(s["loss_mask"]) for s in samples if not s["truncated"])
    assert summary["tokens_trained"] == kept == sum(row["tokens_trained"] for row in run.metrics())


def test_tools(tmp_path: Path) -> None:
    """Everything of it can be said in a config; on a server it runs in test_tool_workflow.py."""
    arguments = {"tools": ["environments:next_digit", "python"], "format": "digit_format:DigitFormat", "max_calls": 2}
    config, _ = load_expr_config(
        [str(ROOT / "examples/arithmetic.yaml"), "workflow=areal:ToolWorkflow", f"workflow_kwargs={json.dumps(arguments)}"], GRPOConfig
    )
    workflow = build_workflow(config, build_tokenizer())
    assert isinstance(workflow, ToolWorkflow) and list(workflow.tools) == ["next_digit", "python"]
    assert (workflow.max_calls, workflow.max_context, workflow.gconfig.stop) == (2, 96, ["0", "2", "4", "6", "8"])
    engine = ScriptedEngine([*build_tokenizer().encode("a4")], [*build_tokenizer().encode("#3")])

    async def main() -> Trajectory:
        async with RewardService():
            return to_trajectory(await workflow.arun_episode(engine, {"prompt": "a7=", "answer": "3"}))

    t = asyncio.run(main())
    assert t.reward == 1.0 and t.input_ids.tolist() == build_tokenizer().encode("a7=a45#3")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("workflow=areal:MultiTurnWorkflow", ["error: the tokenizer has no tokens for ", "set workflow_kwargs.feedback"]),
        ("workflow_kwargs.max_turns=2", ["got an unexpected keyword argument 'max_turns'", "correct workflow_kwargs"]),
    ],
)
def test_mistakes_are_one_sentence_before_servers_start(tmp_path: Path, word: str, said: list[str]) -> None:
    run = TrainRun(tmp_path, *SHORT, word, env=ENV)
    assert run.finish() != 0
    assert all(words in run.stderr for words in said)
    assert "Traceback" not in run.stderr and not list(run.folder.rglob("rollout_0.log"))
