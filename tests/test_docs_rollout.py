"""docs/rollout.md: its configurations load, its files are there, and its commands are known."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from areal.config import GRPOConfig
from areal.config_check import check_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "rollout.md").read_text()
BASE = {
    "actor": {"init_from_scratch": {"model_type": "qwen2"}},
    "train_dataset": {"type": "arithmetic"},
    "gconfig": {"n_samples": 8},
    "rollout": {"backend": "sglang:d1"},
}


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_configurations_load(block: str) -> None:
    check_config(GRPOConfig.model_validate({**BASE, **yaml.safe_load(block)}))


def test_keys_exist() -> None:
    known = subprocess.run(
        [sys.executable, "-m", "areal", "train", "--keys"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    keys = set(re.findall(r"`((?:rollout|sglang|weight_sync)\.[a-z_]+)(?=[`:=])", PAGE))
    assert len(keys) >= 10
    assert [key for key in keys if f"\n{key} = " not in known] == []


def test_files_are_there() -> None:
    files = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE))
    assert len(files) >= 8
    assert [name for name in files if not list((ROOT / "python" / "areal").rglob(name))] == []
