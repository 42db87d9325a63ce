"""`make bench-gpu` as far as it goes without a GPU: its processes, its budget, and collecting the GPU tests on a bare machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parent.parent
TINY = """
import os, torch
from benchmarks.op_bench import Case
def cases(device, backends):
    yield Case("one", 1, {"torch": lambda: torch.zeros(3), "cpp": lambda: torch.zeros(3)}, None, "torch", None, None)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_sentence_says_so() -> None:
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: bench-gpu needs a CUDA device") and len(run.stderr.splitlines()) == 1


def test_an_op_that_crashes_or_is_wrong_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("bench_*", "results", "__pycache__"))
    (tmp_path / "benchmarks" / "bench_crashing.py").write_text(TINY + "    os.abort()\n")
    wrong = '    yield Case("two", 2, {"torch": lambda: torch.zeros(3), "cpp": lambda: torch.ones(3)}, None, "torch", None, None)\n'
    (tmp_path / "benchmarks" / "bench_wrong.py").write_text(TINY + wrong)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    rows, failed = gpu.run_benchmarks(["crashing", "wrong"], time.monotonic() + 100, quick=True, device="cpu")
    assert failed == ["crashing", "wrong"]
    assert [(row["op"], row["case"]) for row in rows if "not_run" not in row] == [(op, "one") for op in failed for _ in range(2)]
    reasons = {row["op"]: row["not_run"] for row in rows if "not_run" in row}
    assert "ended with status -6" in reasons["crashing"] and "the result of 'cpp' is not that of 'torch'" in reasons["wrong"]


def test_what_the_budget_leaves_out_is_said() -> None:
    rows, failed = gpu.run_benchmarks(["weights_hash"], time.monotonic() - 1, quick=True, device="cpu")
    assert not failed and [row["not_run"] for row in rows] == ["the time was spent before it began"]


def test_a_command_stopped_in_time_takes_its_children_along(tmp_path: Path) -> None:
    started = time.monotonic()
    status, seconds = gpu.timed(["bash", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], 1.0)
    assert status is None and seconds < 10 and time.monotonic() - started < 10
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} outlived its parent")


def test_gpu_tests_are_collected_where_the_trainers_packages_are_missing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('aiohttp', 'pydantic'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    files = ["tests/test_weights_hash.py", "tests/test_wire.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    run = subprocess.run([*command, "-m", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_weights_hash.py::" in run.stdout and "aiohttp is not installed" in run.stdout
    # Anywhere else a package that is not there stays an error.
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "No module named 'aiohttp'" in run.stdout
