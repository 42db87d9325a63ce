"""Doctor: what is missing is named with a way out; tried where that can be done for real, in processes with less than usual."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from areal import doctor
from areal.doctor import TRAIN_PACKAGES
from tests.sglang_servers import fake_sglang


def in_shell(prefix: str, check: str) -> dict[str, str]:
    """One check in a process that a shell has restricted first."""
    code = f"import json; from dataclasses import asdict; from areal import doctor; print(json.dumps(asdict(doctor.{check}())))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    script = f"{prefix}; exec '{sys.executable}' -c '{code}'"
    out = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True, timeout=100, env=environment)
    return json.loads(out.stdout)


def test_few_file_descriptors() -> None:
    finding = in_shell("ulimit -S -n 256", "check_files")
    assert (finding["state"], finding["text"]) == ("problem", "256 open files a process")
    assert "ulimit -n 4096" in finding["hint"]
    assert "hard limit" in in_shell("ulimit -n 256", "check_files")["hint"]
    assert in_shell("ulimit -S -n 5000 || ulimit -S -n $(ulimit -H -n)", "check_files")["name"] == "file descriptors"


def test_shared_memory_is_given_back() -> None:
    before = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()
    assert doctor.check_shared_memory().state == "ok"
    if before:
        assert not {p.name for p in set(Path("/dev/shm").iterdir()) - before if p.name.startswith("psm_")}


def test_ports_and_disk() -> None:
    assert doctor.check_ports().state == "ok"
    assert "loopback works" in doctor.check_ports().text
    assert doctor.check_disk().state == "ok"
    assert "cores" in doctor.check_cpu().text


def test_no_gpu_is_no_problem_and_a_hidden_one_is() -> None:
    finding = in_shell("export CUDA_VISIBLE_DEVICES=", "check_cuda")
    assert finding["state"] == ("optional" if doctor.installed_gpus() == 0 else "problem")
    assert finding["hint"]


def test_untested_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda package: "2.99.1")
    finding = doctor.check_torch()
    assert finding.state == "problem" and "torch>=2.11,<2.14" in finding.hint
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    assert doctor.check_torch().text == "not installed"
    assert "pip install '.[train]'" in doctor.check_train_packages().hint
    assert doctor.check_flash_attn().state == doctor.check_triton().state == "optional"


def test_sglang_is_looked_for_where_a_run_would_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AREAL_SGLANG_PYTHON", raising=False)
    if importlib.util.find_spec("sglang") is None:
        finding = doctor.check_sglang()
        assert finding.state == "optional" and "make sglang-env" in finding.hint
    fake_sglang(tmp_path / ".venv-sglang", "0.5.14")
    other = fake_sglang(tmp_path / "other", "0.7.0")
    if importlib.util.find_spec("sglang") is None:
        assert doctor.check_sglang().text == f"0.5.14 in {tmp_path}/.venv-sglang/bin/python"
    monkeypatch.setenv("AREAL_SGLANG_PYTHON", str(other))
    finding = doctor.check_sglang()
    assert (finding.state, finding.text) == ("optional", f"0.7.0 in {other}") and "tested: 0.5.14" in finding.hint


@pytest.mark.gpu
def test_gpus_are_named() -> None:
    finding = doctor.check_cuda()
    assert finding.state == "ok" and "GiB" in finding.text


def test_sizes() -> None:
    assert [doctor._size(n) for n in (5, 64 << 20, 3 << 29, 200 << 30)] == ["5 bytes", "64 MiB", "1.5 GiB", "200 GiB"]


def test_packages_looked_for_are_those_that_training_installs() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=]", line)[0].lower() for line in project["optional-dependencies"]["train"]}
    assert {name.lower() for name in TRAIN_PACKAGES} == wanted
