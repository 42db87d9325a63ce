"""docs/workflows.md: each of its files trains, by the command in its first line."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import TINY

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "workflows.md").read_text(), re.MULTILINE | re.DOTALL)
FILES = {match[1]: (match[2], block) for block in BLOCKS if (match := re.match(r"# (\w+\.py):\s+areal (.*)\n", block))}


def test_three_ways_each_in_under_thirty_lines() -> None:
    assert set(FILES) == {"my_reward.py", "my_workflow.py", "my_agent.py", "my_format.py"}
    assert [name for name, (_, block) in FILES.items() if len(block.splitlines()) >= 30] == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FILES)
def test_it_trains(name: str, tmp_path: Path) -> None:
    if "openai" in FILES[name][1] and importlib.util.find_spec("openai") is None:
        pytest.skip("needs the package openai")
    command, source = FILES[name]
    (tmp_path / name).write_text(source)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    words = [*shlex.split(command), *TINY, "total_train_steps=2", "stats_logger.fileroot=runs"]
    done = subprocess.run([sys.executable, "-m", "areal", *words], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / done.stdout.strip()).read_text())
    assert summary["train_steps"] == 2 and summary["dropped"] == {}
