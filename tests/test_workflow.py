"""RLVR, AReaL-style workflows, and the check of what a workflow returns."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from scripted_engine import ScriptedEngine

from areal.config import GenerationConfig
from areal.reward import AsyncRewardWrapper, RewardService
from areal.tasks.arithmetic import arithmetic_reward, build_tokenizer
from areal.types import ModelRequest, Trajectory
from areal.workflow import EpisodeDropped, RLVRWorkflow, RolloutWorkflow, TrajectoryError, to_trajectories, to_trajectory

GOOD: dict[str, Any] = {
    "input_ids": [5, 6, 7, 8],
    "loss_mask": [0, 0, 1, 1],
    "logprobs": [0.0, 0.0, -0.5, -1.0],
    "versions": [-1, -1, 3, 4],
    "rewards": 1.0,
}


def _check(t: Trajectory) -> None:
    assert t.input_ids.tolist() == [5, 6, 7, 8] and t.input_ids.dtype == np.int64
    assert t.loss_mask.tolist() == [False, False, True, True] and t.loss_mask.dtype == np.bool_
    assert t.logprobs.tolist() == [0, 0, -0.5, -1.0] and t.logprobs.dtype == np.float32
    assert t.versions.tolist() == [-1, -1, 3, 4] and t.versions.dtype == np.int32
    assert t.reward == 1.0 and t.oldest_version == 3


def test_flat_batched_torch_numpy_and_padded() -> None:
    _check(to_trajectory(GOOD))
    _check(to_trajectory({key: np.asarray(value) for key, value in GOOD.items()}))
    flat = {key: torch.tensor(value) for key, value in GOOD.items()}
    _check(to_trajectory(flat))
    batched = {key: value.unsqueeze(0) for key, value in flat.items()}
    _check(to_trajectory({**batched, "attention_mask": torch.ones(1, 4, dtype=torch.bool), "extra": "ignored"}))
    padded = {key: torch.nn.functional.pad(batched[key], (0, 3)) for key in ("input_ids", "loss_mask", "logprobs", "versions")}
    _check(to_trajectory({**padded, "rewards": torch.tensor([1.0]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0]])}))
    with_gradient = {**flat, "logprobs": flat["logprobs"].clone().requires_grad_()}
    _check(to_trajectory(with_gradient))
    _check(to_trajectory(to_trajectory(GOOD)))


def test_an_episode_of_several_sequences() -> None:
    short = {key: value[1:] for key, value in GOOD.items() if key != "rewards"}
    a, b = to_trajectories([GOOD, {**short, "rewards": 0.5, "truncated": True, "final_answer": "3"}])
    _check(a)
    assert not a.truncated and a.final_answer is None
    assert (len(b), b.reward, b.truncated, b.final_answer) == (3, 0.5, True, "3")
    padded = {key: torch.tensor([GOOD[key], [*short[key], 0]]) for key in short}
    batched = {**padded, "rewards": torch.tensor([1.0, 0.5]), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    a, b = to_trajectories({**batched, "final_answer": "3"})
    _check(a)
    assert len(b) == 3 and b.reward == 0.5 and b.final_answer == "3"
    (only,) = to_trajectories(GOOD)
    _check(only)
    with pytest.raises(TrajectoryError, match=r"'rewards' has shape \[1\], its input_ids hold 2"):
        to_trajectories({**batched, "rewards": [1.0]})
    with pytest.raises(TrajectoryError, match="empty list"):
        to_trajectories([])
    with pytest.raises(TrajectoryError, match="final_answer is a int"):
        to_trajectories({**GOOD, "final_answer": 3})


def test_log_probs_outside_of_the_loss_are_cleared() -> None:
    _check(to_trajectory({**GOOD, "logprobs": [float("nan"), 3.0, -0.5, -1.0]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "'input_ids' is not an array of numbers"),
        ({"loss_mask": [0, 0, 1]}, "differ in length"),
        ({"loss_mask": [0, 0, 0, 0]}, "all zero"),
        ({"loss_mask": [1, 0, 0, 0]}, "first token"),
        ({"versions": [-1, -1, -1, 4]}, "version -1"),
        ({"logprobs": [0, 0, float("nan"), -1]}, "log-prob"),
        ({"logprobs": [0, 0, 0.5, -1]}, "positive"),
        ({"rewards": [1.0, 0.0]}, "returns a list of dicts"),
        ({"rewards": float("nan")}, "finite"),
        ({"rewards": "1.0"}, "not an array of numbers"),
        ({"input_ids": [[1, 2, 3, 4], [1, 2, 3, 4]]}, r"shape \[2, 4\]"),
        ({"attention_mask": [1, 1]}, "attention_mask has 2 entries"),
        ({"input_ids": [[1], [2, 3]]}, "not an array"),
        ({"input_ids": [-100, 6, 7, 8]}, "negative token"),
    ],
)
def test_wrong_results_are_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message) as caught:
        to_trajectory({**GOOD, **change})
    assert "\n" not in str(caught.value)


def test_missing_key_and_wrong_type() -> None:
    with pytest.raises(TrajectoryError, match="has no 'versions'"):
        to_trajectory({key: value for key, value in GOOD.items() if key != "versions"})
    with pytest.raises(TrajectoryError, match="not tuple"):
        to_trajectory(("no",))  # type: ignore[arg-type]


def test_rlvr_scores_an_answer() -> None:
    tokenizer = build_tokenizer()

    async def main() -> None:
        async with RewardService():
            workflow = RLVRWorkflow(arithmetic_reward, GenerationConfig(n_samples=4, max_new_tokens=9), tokenizer)
            assert isinstance(workflow, RolloutWorkflow)
            answer = [*tokenizer.encode("#3"), tokenizer.eos_token_id]
            engine = ScriptedEngine(answer, answer[:1] * 2)
            row = {"prompt": "a7b*8c-3=", "answer": "3", "prompt_id": "x", "completions": "a column in the reward's way"}
            t = to_trajectory(await workflow.arun_episode(engine, row))
            prompt = tokenizer.encode(row["prompt"])
            assert t.input_ids.tolist() == prompt + answer and t.reward == 1.0
            assert t.loss_mask.tolist() == [False] * 9 + [True] * 3
            assert t.versions.tolist() == [-1] * 9 + [2] * 3 and t.logprobs[9:].tolist() == [-0.25] * 3
            assert engine.requests[0].gconfig.n_samples == 1 and engine.requests[0].gconfig.max_new_tokens == 9
            assert to_trajectory(await workflow.arun_episode(engine, row)).reward == 0.0

    asyncio.run(main())


async def _prompts(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return float(len(prompt_ids))


def test_rlvr_prompt_forms_and_malformed_rows() -> None:
    tokenizer = build_tokenizer()

    async def main() -> None:
        workflow = RLVRWorkflow(_prompts, GenerationConfig(), tokenizer, max_prompt_len=6)

        async def length(row: dict[str, Any]) -> float:
            return to_trajectory(await workflow.arun_episode(ScriptedEngine([3]), row)).reward

        async with RewardService():
            assert await length({"prompt": "a7="}) == 3
            assert await length({"input_ids": [3, 4, 5, 6]}) == 4
            assert await length({"messages": [{"role": "user", "content": "a7b="}]}) == 4  # no template: the contents
            bad: list[dict[str, Any]] = [{}, {"prompt": ""}, {"prompt": 7}, {"input_ids": []}, {"input_ids": ["a"]}, {"messages": ["hm"]}]
            for row in bad:
                with pytest.raises(EpisodeDropped) as caught:
                    await length(row)
                assert caught.value.cause == "malformed_row", row
            with pytest.raises(EpisodeDropped, match="7 tokens") as caught:
                await length({"prompt": "a7b*8c="})
            assert caught.value.cause == "prompt_too_long"

    asyncio.run(main())


class ArealWorkflow(RolloutWorkflow):
    """Written as for AReaL, two turns."""

    def __init__(self, reward_fn: Any, gconfig: GenerationConfig, tokenizer: Any) -> None:
        self.async_reward_fn = AsyncRewardWrapper(reward_fn, timeout_seconds=5, max_workers=2)
        self.gconfig = gconfig
        self.tokenizer = tokenizer

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, torch.Tensor]:
        seq = self.tokenizer.encode(data["prompt"])
        loss_mask, logprobs, versions = [0] * len(seq), [0.0] * len(seq), [-1] * len(seq)
        for _ in range(2):
            req = ModelRequest(rid="turn", input_ids=seq, gconfig=self.gconfig.new(n_samples=1), tokenizer=self.tokenizer)
            resp = await engine.agenerate(req)
            assert resp.input_len == len(seq) and resp.output_len == len(resp.output_tokens)
            reward = await self.async_reward_fn(
                self.tokenizer.decode(seq),
                self.tokenizer.decode(resp.output_tokens),
                resp.input_tokens,
                resp.output_tokens,
                **{"answer": "3"},
            )
            seq = seq + resp.output_tokens
            loss_mask += [1] * resp.output_len
            logprobs += resp.output_logprobs
            versions += resp.output_versions
        res = {
            "input_ids": torch.tensor(seq, dtype=torch.int32),
            "loss_mask": torch.tensor(loss_mask, dtype=torch.int32),
            "logprobs": torch.tensor(logprobs, dtype=torch.float32),
            "versions": torch.tensor(versions, dtype=torch.int32),
            "attention_mask": torch.ones(len(seq), dtype=torch.bool),
            "rewards": torch.tensor(reward, dtype=torch.float32),
        }
        return {k: v.unsqueeze(0) for k, v in res.items()}


def test_workflow_written_for_areal() -> None:
    tokenizer = build_tokenizer()

    async def main() -> None:
        async with RewardService():
            workflow = ArealWorkflow(arithmetic_reward, GenerationConfig(n_samples=8), tokenizer)
            result = await workflow.arun_episode(ScriptedEngine(tokenizer.encode("#4"), tokenizer.encode("#3")), {"prompt": "a7="})
            t = to_trajectory(result)
            assert len(t) == 7 and t.loss_mask.tolist() == [False] * 3 + [True] * 4 and t.reward == 1.0

    asyncio.run(main())
