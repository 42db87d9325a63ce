"""The example configurations are whole: they load, their checks pass, and the longest sequence of their task fits."""

from pathlib import Path

import pytest

from areal.config_load import load_expr_config
from areal.tasks.arithmetic import build_tokenizer, make_problem

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_loads_and_takes_overrides(path):
    config, source = load_expr_config([str(path), "seed=3", "rollout.max_head_offpolicyness=1"])
    assert (config.seed, config.rollout.max_head_offpolicyness, source) == (3, 1, str(path))


@pytest.mark.parametrize("path", [p for p in EXAMPLES if "arithmetic" in p.stem], ids=lambda p: p.stem)
def test_longest_chain_fits(path):
    config, _ = load_expr_config([str(path)])
    dataset, model = config.train_dataset, config.actor.init_from_scratch
    tokenizer = build_tokenizer(dataset.max_terms)
    problem = make_problem(0, "train", 0, min_terms=dataset.max_terms, max_terms=dataset.max_terms)
    prompt, answer = (len(tokenizer(text)["input_ids"]) for text in (problem.prompt, problem.thinking))
    assert prompt <= dataset.max_prompt_len
    assert answer + 1 <= config.gconfig.max_new_tokens
    assert dataset.max_prompt_len + config.gconfig.max_new_tokens <= config.rollout.max_context <= model["max_position_embeddings"]


def test_there_are_three():
    assert {p.stem for p in EXAMPLES} == {"arithmetic", "arithmetic_long", "gsm8k"}
