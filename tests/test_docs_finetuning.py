"""docs/finetuning.md: its configurations load, and the keys that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from areal.config import GRPOConfig
from areal.config_load import all_keys

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text()
BASE = {"actor": {"path": "model"}, "train_dataset": {"path": "rows.jsonl"}}


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_configurations_load(block: str) -> None:
    tree = yaml.safe_load(block)
    GRPOConfig.model_validate({**BASE, **tree, "actor": {**BASE["actor"], **tree.get("actor", {})}})


def test_keys_exist() -> None:
    known = {key for key, _ in all_keys()}
    named = set(re.findall(r"`((?:actor|warmup|dpo|ref|saver|weight_sync|train_dataset)\.[a-z_.]+)(?=[`:= ])", PAGE))
    named |= {f"train_dataset.{key}" for key in re.findall(r"train_dataset\.(\w+)=", PAGE)}
    named -= {"warmup.jsonl"}  # a file
    assert len(named) > 6
    assert {key for key in named if not any(k == key or k.startswith(f"{key}.") for k in known)} == set()
