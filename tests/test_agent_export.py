"""Turns to sequences, and what each is rewarded with; settings of a call within those of the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from areal.agent.export import export
from areal.agent.openai_protocol import ApiError, Sampling
from areal.agent.sampling import SamplingRules
from areal.agent.session import Turn
from areal.config import GenerationConfig
from areal.reward import RewardFailure
from areal.types import ModelResponse
from areal.workflow.base import to_trajectories


def make_turn(name: str, call: int, prompt: list[int], output: list[int], parent: Turn | None = None, reason: str = "stop") -> Turn:
    logprobs = [-token / 100 for token in output]
    response = ModelResponse(prompt, output, logprobs, [call] * len(output), reason)  # type: ignore[arg-type]
    return Turn(name, call, response, parent, f"text of {name}")


def tree() -> list[Turn]:
    """a - b - d, and c beside b; e alone."""
    a = make_turn("a", 0, [1, 2], [3, 4])
    b = make_turn("b", 1, [*a.ids, 5], [6], a, "length")
    c = make_turn("c", 2, [*a.ids, 7], [8, 9], a)
    d = make_turn("d", 3, [*b.ids, 10], [11], b)
    return [a, b, c, d, make_turn("e", 4, [20], [21])]


def test_chains_and_branches() -> None:
    sequences = export(tree(), 1.0)
    assert [s["input_ids"].tolist() for s in sequences] == [[1, 2, 3, 4, 7, 8, 9], [1, 2, 3, 4, 5, 6, 10, 11], [20, 21]]
    assert [np.flatnonzero(s["loss_mask"]).tolist() for s in sequences] == [[2, 3, 5, 6], [5, 7], [1]]
    assert sequences[1]["versions"].tolist() == [-1, -1, 0, 0, -1, 1, -1, 3]
    assert sequences[1]["logprobs"].tolist() == pytest.approx([0, 0, 0, 0, 0, -0.06, 0, -0.11])
    assert [s["truncated"] for s in sequences] == [False, True, False] and sequences[-1]["final_answer"] == "text of e"
    assert [t.reward for t in to_trajectories(sequences)] == [1.0, 1.0, 1.0]


def test_one_sequence_a_turn() -> None:
    sequences = export(tree(), 1.0, style="individual")
    assert [s["input_ids"].tolist() for s in sequences] == [turn.ids for turn in tree()]
    assert [int(s["loss_mask"].sum()) for s in sequences] == [2, 1, 2, 1, 1]
    assert [s["truncated"] for s in sequences] == [False, True, False, False, False]
    assert len(to_trajectories(sequences)) == 5


@pytest.mark.parametrize(
    ("reward", "discount", "individual", "concat"),
    [
        (1.0, 1.0, [1, 1, 1, 1, 1], [1, 1, 1]),
        (True, 0.5, [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], [1 / 16, 1 / 8, 1]),
        ({"b": 1.0, "e": np.float32(2)}, 1.0, [3, 3, 2, 2, 2], [3, 3, 2]),
        ({"b": 1.0, "e": 2}, 0.0, [0, 1, 0, 0, 2], [0, 1, 2]),
    ],
)
def test_rewards_of_turns(reward: Any, discount: float, individual: list[float], concat: list[float]) -> None:
    assert [s["rewards"] for s in export(tree(), reward, style="individual", turn_discount=discount)] == pytest.approx(individual)
    assert [s["rewards"] for s in export(tree(), reward, turn_discount=discount)] == pytest.approx(concat)


def test_choices_of_one_call_share_what_comes_behind() -> None:
    first = [make_turn("x", 0, [1], [2]), make_turn("x:1", 0, [1], [3])]
    turns = [*first, make_turn("y", 1, [1, 3, 4], [5], first[1])]
    rewards = [s["rewards"] for s in export(turns, {"x:1": 1.0, "y": 4.0}, style="individual", turn_discount=0.5)]
    assert rewards == [2.0, 3.0, 4.0]
    before = make_turn("w", 0, [9], [9])
    later = [make_turn("x", 1, [1], [2]), make_turn("x:1", 1, [1], [3])]
    assert [s["rewards"] for s in export([before, *later], {"x": 1.0, "x:1": 3.0})] == [2.0, 1.0, 3.0]


@pytest.mark.parametrize("reward", ["right", float("nan"), {}, {"a": None}, {"zz": 1.0}, [1.0, 2.0]])
def test_what_is_no_reward_is_a_failure(reward: Any) -> None:
    with pytest.raises(RewardFailure) as failure:
        export(tree(), reward)
    assert failure.value.cause == "reward_bad_value"


def test_an_empty_output_gives_no_sequence() -> None:
    turns = [make_turn("a", 0, [1], []), make_turn("b", 1, [2], [3])]
    for style in ("concat", "individual"):
        assert len(export(turns, 1.0, style=style)) == 1  # type: ignore[arg-type]


def test_settings_of_a_call() -> None:
    run = GenerationConfig(n_samples=4, max_new_tokens=100, min_new_tokens=8, temperature=0.7, stop=["X"])
    training, evaluation = SamplingRules(run, max_context=60), SamplingRules(run, training=False)
    assert training.gconfig(Sampling(), 10).new() == run.new(n_samples=1, max_new_tokens=50)
    assert training.gconfig(Sampling(temperature=0.7, top_p=1, top_k=-1, max_tokens=5, stop=("Y", "X")), 10) == run.new(
        n_samples=1, max_new_tokens=5, min_new_tokens=5, top_p=1, top_k=0, stop=["X", "Y"]
    )
    assert training.gconfig(Sampling(max_tokens=7), 9) is training.gconfig(Sampling(max_tokens=7), 10), "its JSON is made once"
    for refused in (Sampling(temperature=1.0), Sampling(top_p=0.9), Sampling(top_k=1)):
        with pytest.raises(ApiError):
            training.gconfig(refused, 1)
        evaluation.gconfig(refused, 1)
    assert evaluation.gconfig(Sampling(temperature=0.0, top_p=0.0, top_k=9), 10**6).top_p == pytest.approx(1e-6)
    assert training.gconfig(Sampling(), 59).max_new_tokens == 1
    with pytest.raises(ApiError, match=r"60 tokens.*60 tokens \(the least of rollout.max_context") as error:
        training.gconfig(Sampling(), 60)
    assert error.value.code == "context_length_exceeded"
