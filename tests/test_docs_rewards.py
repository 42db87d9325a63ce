"""docs/rewards.md: its configurations load, its keys and causes exist, and its command line is taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from areal.cli import _parser
from areal.config import GRPOConfig, RewardConfig
from areal.config_check import check_config
from areal.reward.counters import ScoreCounters

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "rewards.md").read_text()
BASE = {
    "actor": {"init_from_scratch": {"model_type": "qwen2"}},
    "train_dataset": {"type": "arithmetic"},
    "gconfig": {"n_samples": 8},
}


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_configurations_load(block: str) -> None:
    check_config(GRPOConfig.model_validate({**BASE, **yaml.safe_load(block)}))


def test_keys_causes_and_metrics_exist() -> None:
    assert set(re.findall(r"`reward\.(\w+)`", PAGE)) <= set(RewardConfig.model_fields) | {"code"}
    row = ScoreCounters().read()
    source = "".join(path.read_text() for path in (ROOT / "python/areal/reward").glob("*.py"))
    named = set(re.findall(r"`(reward_\w+)`", PAGE)) - {"reward_fn"}
    assert set(row) <= named
    assert [name for name in named - set(row) if f'"{name}"' not in source] == []


def test_the_command_is_taken() -> None:
    (line,) = re.findall(r"^areal (reward-server .*?) +#", PAGE, re.MULTILINE)
    arguments = _parser().parse_args(line.split())
    assert arguments.functions == ["math", "code", "mine=my_module:reward"] and arguments.max_queue == 1024
