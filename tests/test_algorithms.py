"""docs/algorithms.md and examples/algorithms: every algorithm's keys exist, fit together, start and train."""

from __future__ import annotations

import asyncio
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import TrainRun
from test_critic import OneRank
from trainer_setup import make_groups

from areal.config import GRPOConfig
from areal.config_load import all_keys, load_expr_config
from areal.models.loading import create_model
from areal.train_batch import prepare_batch
from areal.trainer.engine import RankMinibatch, TrainEngine

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "algorithms.md").read_text()
EXAMPLES = sorted((ROOT / "examples" / "algorithms").glob("*.yaml"))


def load(path: Path, *overrides: str) -> GRPOConfig:
    return load_expr_config([str(path), *overrides])[0]


def test_every_row_has_its_file() -> None:
    assert {path.stem for path in EXAMPLES} == set(re.findall(r"\((?:\.\./)examples/algorithms/(\w+)\.yaml\)", PAGE))


def test_files_of_the_page_exist() -> None:
    files = set(re.findall(r"\((\.\./[^)]+)\)", PAGE)) | {f"../{name}" for name in re.findall(r"`(tests/\w+\.py)`", PAGE)}
    assert len(files) >= 14 and [name for name in files if not (ROOT / "docs" / name.partition("#")[0]).is_file()] == []


def test_keys_of_the_page_exist() -> None:
    known = {key for key, _ in all_keys()}
    keys = set(re.findall(r"`((?:actor|critic|rollout|gconfig|ref)\.[a-z_.]+)(?=[`:=])", PAGE))
    assert len(keys) >= 8 and keys - known == set()
    short = set(re.findall(r"`([a-z_]+): [^`]*`", PAGE))
    assert len(short) >= 15 and {key for key in short if f"actor.{key}" not in known} <= {"critic", "dynamic_filter"}


@pytest.mark.parametrize(("name", "row"), re.findall(r"\| \[.*examples/algorithms/(\w+)\.yaml\)(.*)", PAGE))
def test_files_have_the_keys_of_their_row(name: str, row: str) -> None:
    """Those behind a semicolon are a variant."""
    config, cells = load(ROOT / "examples" / "algorithms" / f"{name}.yaml"), row.split("|")
    claimed = dict(item for text in re.findall(r"`(\w+: [^`]*)`", cells[-2].partition(";")[0]) for item in yaml.safe_load(text).items())
    assert claimed
    for key, value in claimed.items():
        owner = {"critic": config, "dynamic_filter": config.rollout}.get(key, config.actor)
        actual = getattr(owner, key)
        if isinstance(value, dict):
            assert actual is not None and {k: getattr(actual, k) for k in value} == value, key
        else:
            assert actual == value, key
    if name not in ("gspo", "cispo", "dapo"):
        assert (config.actor.eps_clip, config.actor.eps_clip_higher) == (0.2, None), "nothing else is changed silently"
    assert (config.critic is None) == (name != "ppo") and (config.actor.kl_ctl > 0) == ("kl_ctl" in claimed)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_blocks_of_the_page_load(block: str) -> None:
    base = yaml.safe_load((ROOT / "examples" / "algorithms" / "tis.yaml").read_text())
    tree = yaml.safe_load(block)
    GRPOConfig.model_validate({**base, **tree, "actor": {**base["actor"], **tree.get("actor", {})}})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_files_differ_in_the_algorithm_alone(path: Path) -> None:
    """A comparison of two of them compares algorithms."""
    assert load(path).trial_name == path.stem
    texts = [other.read_text().partition("actor:\n") for other in (path, ROOT / "examples" / "algorithms" / "rloo.yaml")]
    for marker in ("  # As in examples/arithmetic.yaml.", "warmup:"):
        ends = [text[2].partition(marker)[2] for text in texts]
        of_algorithm = r"\ncritic:\n(  .*\n)+"
        assert re.sub(of_algorithm, "", ends[0]) == ends[1]
    before = [re.sub(r"(?s)^.*?\n\n|trial_name: \w+|  dynamic_filter: mixed\n", "", text[0], count=0) for text in texts]
    assert before[0] == before[1]


def make_engine(config: GRPOConfig, folder: Path) -> TrainEngine:
    model = {**(config.actor.init_from_scratch or {}), "vocab_size": 44, "pad_token_id": 0, "eos_token_id": 1}
    create_model(model, seed=0).save_pretrained(folder)
    return TrainEngine(
        folder, config.actor, temperature=config.gconfig.temperature, critic=config.critic, ref=config.ref if config.uses_ref else None
    )


def parts(minibatches: list[Any]) -> list[RankMinibatch]:
    return [RankMinibatch(m.ranks[0], m.denominator, m.policy_denominator) for m in minibatches]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_takes_train_steps(path: Path, tmp_path: Path) -> None:
    """On a random model and answers that are two versions old, by the way that a run takes: scored, given advantages, packed, trained on."""
    config = load(path)
    engine = make_engine(config, tmp_path)
    before = engine.snapshot()
    for version in (2, 3):
        engine.version = version
        groups = make_groups(4, 4, seed=version, version=version - 2)
        prepared = asyncio.run(prepare_batch(config, OneRank(engine), groups, groups))
        stats = engine.train_step(parts(prepared.batch.minibatches), parts(prepared.batch.critic_minibatches))
        assert stats["skipped_nonfinite"] == 0 and stats["grad_norm"] > 0
    after = engine.snapshot()
    assert before is not None and after is not None
    assert all(weight.isfinite().all() for weight in after.values()) and any(not torch.equal(before[n], after[n]) for n in after)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_a_whole_run(name: str, tmp_path: Path) -> None:
    overrides = ["total_train_steps=3", "evaluator.n_prompts=0", "actor.loss_normalization=fixed"]
    overrides = overrides[:2] if name == "grpo" else overrides
    run = TrainRun(tmp_path, *overrides, config=f"examples/algorithms/{name}.yaml")
    assert run.summary()["train_steps"] == 3
    rows = run.metrics()
    for row in rows:
        assert row["skipped_nonfinite"] == 0 and row["entropy"] > 0 and row["ratio_mean"] > 0
        assert ("kl_ref" in row) == (name == "grpo")
    if name == "grpo":
        assert all(row["kl_ref"] >= 0 for row in rows)
        assert all(later["kl_ref"] > first["kl_ref"] for first, later in itertools.pairwise(rows[::2]))
