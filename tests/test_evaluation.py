"""Evaluation: its figures against enumeration, failures, episodes of any form, a real server, and a run that trains meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from areal.config import GenerationConfig, GRPOConfig
from areal.config_load import build_config
from areal.evaluation import EpisodeResult, EpisodeSlots, Evaluation, evaluate
from areal.evaluation_scores import answer_class, majority_at_k, pass_at_k, summarize
from areal.inference.client import RolloutClient
from areal.tasks.arithmetic import build_tokenizer
from areal.types import ModelRequest
from areal.workflow import EpisodeDropped, RLVRWorkflow
from tests.rollout_servers import Server, make_model
from tests.runs import TrainRun


def config_with(**evaluator: Any) -> GRPOConfig:
    tree = {
        "actor": {"init_from_scratch": {"model_type": "qwen2"}},
        "train_dataset": {"type": "arithmetic"},
        "rollout": {"max_running_requests": 8, "backend": "embedded:d2"},
        "evaluator": evaluator,
    }
    return build_config(tree, GRPOConfig)


# -- the figures -----------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for n in range(1, 8):
        for n_right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * n_right + [False] * (n - n_right), k))
            assert pass_at_k(n, n_right, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))), abs=1e-15)
    by_factors = 1 - math.prod(1 - 1000 / i for i in range(100_000 - 3 + 1, 100_000 + 1))  # the form of the paper's own program
    assert pass_at_k(100_000, 3, 1000) == pytest.approx(by_factors, rel=1e-9)


def votes(text: str) -> list[EpisodeResult]:
    """``"a+ b-"``: an answer a that was right, an answer b that was not."""
    return [EpisodeResult({}, i, reward=float(word[1] == "+"), final_answer=word[0]) for i, word in enumerate(text.split())]


@pytest.mark.parametrize(
    ("samples", "k", "value"),
    [
        ("a+ a+ b- c-", 4, 1.0),
        ("b- a+ b- c-", 4, 0.0),
        ("a+ b- a+ b-", 4, 1 / 2),  # a tie: either may win
        ("b- b- a+ a+", 4, 1 / 2),  # whoever was seen first
        ("a+ b- c-", 3, 1 / 3),
        ("a+ a- a- b+", 4, 1 / 3),  # one answer, judged differently
        ("a+ a+ b- b- b- c-", 3, 1 / 2),  # two blocks
        ("a+ a+ b- b- b-", 3, 1.0),  # the last two are no block
    ],
)
def test_majority(samples: str, k: int, value: float) -> None:
    assert majority_at_k(votes(samples), k) == pytest.approx(value)


def test_majority_is_what_fair_draws_give() -> None:
    for words in itertools.product(("a+", "b-", "c-"), repeat=5):
        episodes = votes(" ".join(words))
        counts = {answer: [e for e in episodes if e.final_answer == answer] for answer in "abc"}
        winners = [e for e in counts.values() if len(e) == max(map(len, counts.values()))]
        assert majority_at_k(episodes, 5) == pytest.approx(sum(w[0].right for w in winners) / len(winners))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1}, or rather, reduced, and after some more thought about it: \boxed{\frac{1}{2}}.", "1/2"),
        (r"\boxed{3} and \boxed{unfinished", "3"),
        ("1 + 2 = 3\n#### 1,234,567\nbye", "1234567"),
        ("#### 1\n#### $2.50", "5/2"),
        ("The answer is 0.5.", "1/2"),
        ("a7,b*8=6#6", "6"),
        ("a7,b*8=7#6 ", "6"),
        ("```python\nreturn a[0]\n```", "```python return a[0] ```"),
        ("so it is  red", "so it is red"),
        (r"\boxed{50\%}", "50%"),
        (r"\boxed{x^2 + 1}", "x^2 + 1"),
        ("0", "0"),
        ("", ""),
    ],
)
def test_answer_class(text: str, answer: str) -> None:
    assert answer_class(text) == answer


def test_a_prompt_with_failed_samples_weighs_as_much_as_the_others() -> None:
    lost = EpisodeResult({}, 0, "reward_timeout")
    result = summarize([votes("a+ a+ b- b-"), [lost, lost, *votes("b- b-")], [lost] * 4, [lost, *votes("a+ a+ a+")]], 4, 1.0, [])
    assert (result.n_prompts, result.n_prompts_scored, result.n_scored, result.failures) == (4, 3, 9, {"reward_timeout": 7})
    assert result.accuracy == result.pass_at_k["1"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert result.pass_at_k["2"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert result.pass_at_k["4"] == 1.0 and result.majority_at_k == {"4": 0.5}  # of the first prompt alone
    assert result.too_few_samples == {"4": 2}


def test_k_are_powers_of_two_and_all_samples() -> None:
    assert list(summarize([votes("a+ " * 6)], 6, 1.0, []).pass_at_k) == ["1", "2", "4", "6"]
    one = summarize([votes("a+"), votes("a-")], 1, 1.0, [])
    assert one.pass_at_k == {"1": 0.5} and one.majority_at_k == {} and one.too_few_samples == {}


def test_nothing_scored() -> None:
    result = summarize([[EpisodeResult({}, 0, "reward_error")]], 1, 1.0, [])
    assert result == Evaluation(None, None, None, 0, {"reward_error": 1}, n_prompts=1, seconds=1.0)


# -- episodes of any form --------------------------------------------------------------------------------------------------------


def sequence(n_prompt: int, n_answer: int, reward: float, version: int = 0, **more: Any) -> dict[str, Any]:
    n = n_prompt + n_answer
    mask = [0] * n_prompt + [1] * n_answer
    versions = [-1] * n_prompt + [version] * n_answer
    return {
        "input_ids": list(range(2, 2 + n)),
        "loss_mask": mask,
        "logprobs": [-0.5 * m for m in mask],
        "versions": versions,
        "rewards": reward,
        **more,
    }


class Played:
    """Plays the episode that the row names; knows how many play at the same time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.running, self.most, self.started = seconds, 0, 0, 0

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
        self.running, self.started = self.running + 1, self.started + 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
            return await self._play(data["play"])
        finally:
            self.running -= 1

    async def _play(self, what: str) -> Any:
        match what:
            case "two turns":  # the episode's reward is the last one's
                return [sequence(3, 4, 0.0, version=2, truncated=True), sequence(5, 2, 1.0, version=4, final_answer="x")]
            case "wrong":
                return sequence(3, 2, -5.0, version=3)
            case "lost":
                raise EpisodeDropped("no_tool", "there was none")
            case "raises":
                raise KeyError("answer")
            case "hangs":
                await asyncio.sleep(60)
        return None


def play(rows: list[str], workflow: Played | None = None, config: GRPOConfig | None = None, **how: Any) -> Evaluation:
    async def run() -> Evaluation:
        client = RolloutClient()
        how.setdefault("slots", EpisodeSlots(config or config_with()))
        how.setdefault("episode_timeout", 30.0)
        data = [{"prompt_id": f"p/{i}", "play": what} for i, what in enumerate(rows)]
        try:
            return await evaluate(client, workflow or Played(), data, seed=0, **how)
        finally:
            await client.close()

    return asyncio.run(run())


def test_episodes_of_several_sequences_and_failures() -> None:
    ended: list[EpisodeResult] = []
    result = play(["two turns", "lost", "wrong", "raises", "hangs", "none"], episode_timeout=0.3, on_episode=ended.append)
    assert result.failures == {"no_tool": 1, "workflow_raised": 1, "episode_timeout": 1, "workflow_none": 1}
    assert (result.n_scored, result.n_prompts, result.n_prompts_scored) == (2, 6, 2)
    assert (result.accuracy, result.reward) == (0.5, -2.0), "right is a reward above 0, of the last sequence"
    assert (result.length, result.length_max) == ((6 + 2) / 2, 6), "all sequences of an episode count"
    assert result.truncated == 0.5, "any sequence of it"
    assert (result.version_min, result.version_max) == (2, 4)
    assert len(ended) == 6 and [e.failure for e in ended][-1] == "episode_timeout"
    assert {e.row["play"]: e.final_answer for e in ended if not e.failure} == {"two turns": "x", "wrong": "[5, 6]"}


def test_text_is_that_of_the_last_answer() -> None:
    tokenizer = build_tokenizer()
    texts: list[tuple[str, str]] = []

    class Turns:
        async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
            ids = tokenizer("a7b*8=#5no#6")["input_ids"] + [tokenizer.eos_token_id, tokenizer.pad_token_id]
            mask = [0] * 6 + [1] * 2 + [0] * 2 + [1] * 3 + [0]
            return {**sequence(6, 8, 1.0), "input_ids": ids, "loss_mask": mask}

    result = play(["one"], Turns(), tokenizer=tokenizer, on_episode=lambda e: texts.append((e.prompt, e.completion)), n_samples=3)  # type: ignore[arg-type]
    assert texts == [("a7b*8=#5no", "#6")] * 3 and result.majority_at_k == {"3": 1.0}
    (shown,) = result.samples
    assert shown.prompt == "a7b*8=" and shown.answer.startswith("#5no#6")


def test_places_bound_what_is_in_flight_and_more_can_be_given() -> None:
    config = config_with(max_concurrent=3)
    slots, workflow = EpisodeSlots(config), Played(seconds=0.02)
    slots.share()
    play(["wrong"] * 20, workflow, slots=slots)
    assert workflow.most == 3
    by_default, all_of_them = EpisodeSlots(config_with()), EpisodeSlots(config)
    by_default.share()
    assert by_default.limit == 2 * 8 // 4 and all_of_them.limit > 2 * 8

    async def widened_meanwhile() -> int:
        slots, workflow, client = EpisodeSlots(config), Played(seconds=0.2), RolloutClient()
        slots.share()
        rows = [{"play": "wrong", "prompt_id": str(i)} for i in range(20)]
        running = asyncio.create_task(evaluate(client, workflow, rows, seed=0, slots=slots, episode_timeout=9))
        while not workflow.running:
            await asyncio.sleep(0)
        slots.have_all()
        await running
        await client.close()
        return workflow.most

    assert asyncio.run(widened_meanwhile()) == 20


# -- on real servers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, max_position_embeddings=128)
    server = Server(folder, folder / "log", "rollout 0", "--max-running-requests", "16", "--deterministic").wait()
    yield server
    server.process.kill()


async def short_answers_are_right(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return float(len(completion_ids) < 16)


def test_four_samples_of_a_prompt_on_a_real_server(server: Server) -> None:
    tokenizer = build_tokenizer()
    gconfig = GenerationConfig(max_new_tokens=24, n_samples=4)
    workflow = RLVRWorkflow(short_answers_are_right, gconfig, tokenizer)
    rows = [{"prompt": f"a{i % 10}b*8c-3=", "prompt_id": f"valid/{i}", "epoch": 0} for i in range(12)]

    async def run(n_samples: int) -> tuple[Evaluation, dict[tuple[str, int], EpisodeResult]]:
        ended: dict[tuple[str, int], EpisodeResult] = {}
        client = RolloutClient(urls=[server.url])
        result = await evaluate(
            client,
            workflow,
            rows,
            seed=7,
            slots=EpisodeSlots(config_with()),
            episode_timeout=60,
            n_samples=n_samples,
            tokenizer=tokenizer,
            on_episode=lambda e: ended.update({(e.row["prompt_id"], e.sample): e}),
        )
        await client.close()
        return result, ended

    result, ended = asyncio.run(run(4))
    once, ended_once = asyncio.run(run(1))
    assert (result.n_prompts, result.n_prompts_scored, result.n_scored, result.n_samples, result.failures) == (12, 12, 48, 4, {})
    right = {row["prompt_id"]: [ended[row["prompt_id"], s].reward for s in range(4)] for row in rows}
    assert result.accuracy == pytest.approx(sum(map(sum, right.values())) / 48)
    assert result.pass_at_k["4"] == pytest.approx(sum(map(any, right.values())) / 12) and list(result.pass_at_k) == ["1", "2", "4"]
    assert result.length_max == max(e.length for e in ended.values()) <= 24
    cut = [e for e in ended.values() if e.truncated]
    assert result.truncated == pytest.approx(len(cut) / 48) and {e.length for e in cut} <= {24}
    assert (result.version_min, result.version_max) == (0, 0)
    assert len({e.completion for e in ended.values()}) > 30, "every sample has random numbers of its own"
    assert once.pass_at_k == {"1": once.accuracy} and all(ended[key].completion == e.completion for key, e in ended_once.items())


class OneAnswer:
    """Answers once, and says what the answer is."""

    def __init__(self, gconfig: GenerationConfig, tokenizer: Any) -> None:
        self.gconfig, self.tokenizer = gconfig.new(ignore_eos=True), tokenizer

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, Any]:
        prompt = self.tokenizer(data["prompt"])["input_ids"]
        answer = await engine.agenerate(ModelRequest(prompt, self.gconfig))
        return {
            "input_ids": answer.input_tokens + answer.output_tokens,
            "loss_mask": [0] * answer.input_len + [1] * answer.output_len,
            "logprobs": [0.0] * answer.input_len + answer.output_logprobs,
            "versions": [-1] * answer.input_len + answer.output_versions,
            "rewards": float(answer.output_tokens[0] % 2),
            "truncated": answer.stop_reason == "length",
            "final_answer": "even" if answer.output_tokens[0] % 2 == 0 else "odd",
        }


@pytest.mark.timeout(180)
def test_training_goes_on_during_a_long_evaluation(tmp_path: Path) -> None:
    """One episode at a time, more of them than the run has time for: the rest follows when training is over, with all places."""
    run = TrainRun(
        tmp_path,
        "workflow=tests.test_evaluation:OneAnswer",
        "total_train_steps=8",
        "evaluator.every_steps=1",
        "evaluator.n_prompts=40",
        "evaluator.max_concurrent=1",
        "evaluator.gconfig.n_samples=4",
    )
    summary = run.summary()
    rows = [json.loads(line) for line in (run.folder / "evaluations.jsonl").read_text().splitlines()]
    spans = [json.loads(line) for line in (run.folder / "timeline.jsonl").read_text().splitlines()]
    by_name = {row["when"]: row for row in rows}
    assert all(row["n_scored"] == 160 and row["failures"] == {} and row["truncated"] == 1.0 for row in rows)
    first = by_name["step 1"]
    assert first["step"] == 1 and first["version_min"] <= 1 and first["version_max"] >= 4, "new weights came meanwhile"
    assert set(first["pass_at_k"]) == {"1", "2", "4"} and set(first["majority_at_k"]) == {"4"}
    begin, end = [(s["start"], s["end"]) for s in spans if s["kind"] == "evaluation"][1]
    inside = [s for s in spans if s["kind"] == "training" and begin < s["start"] and s["end"] < end]
    assert len(inside) >= 3, "train steps went on"
    assert summary["dropped"]["evaluation_skipped"] == 7 - (len(rows) - 2), "skipped, not piled up"
    assert summary["train_steps"] == 8 and summary["max_staleness_trained"] <= 2
    assert by_name["after"]["version_min"] == by_name["after"]["version_max"] == 8
    assert summary["pass_at_k_after"]["4"] == pytest.approx(by_name["after"]["pass_at_k"]["4"], abs=1e-4)
    assert summary["truncated_after"] == 1.0
    assert "pass@4" in run.stderr and "majority@4" in run.stderr and "no evaluation at step" in run.stderr
