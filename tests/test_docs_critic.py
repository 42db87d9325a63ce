"""The recipes of docs/critic.md are configurations that pass the checks, and are what they are said to be."""

import re
from pathlib import Path

import yaml

from areal.config import GRPOConfig
from areal.config_check import check_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "critic.md").read_text()


def merged(tree, more):
    return {**tree, **{k: merged(tree.get(k) or {}, v) if isinstance(v, dict) else v for k, v in more.items()}}


def test_recipes_pass_the_checks():
    base = yaml.safe_load((ROOT / "examples" / "arithmetic.yaml").read_text())
    recipes = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)]
    configs = [GRPOConfig.model_validate(merged(base, recipe)) for recipe in recipes]
    for config in configs:
        check_config(config)
    assert [(c.critic is not None, c.uses_ref, c.actor.kl_in_reward) for c in configs] == [
        (True, False, False),
        (True, False, False),
        (False, True, True),
        (False, True, False),
        (False, True, True),
    ]


def test_columns_are_those_of_the_row():
    from areal.metrics import train_row

    columns = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `"))))
    stats = {
        name: 0.0
        for name in ("loss", "grad_norm", "clip_fraction", "entropy", "kl_behaviour", "importance_weight_mean", "skipped_nonfinite")
    }
    drift = {"logprob_drift": {"mean_abs": None, "max_abs": None, "n": 0}}
    of_batch = {"explained_variance", "value_mean", "return_mean", "kl_reward"}
    assert columns - of_batch == train_row(stats | drift | dict.fromkeys(columns, 0.0)).keys() & columns
