"""The command line as a stranger meets it: real processes, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from areal.cli import main

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
gconfig: {n_samples: 4, max_new_tokens: 64}
actor:
  device: cpu
  init_from_scratch: {model_type: qwen2}
  mb_spec: {max_tokens_per_mb: 2048}
rollout: {device: cpu}
train_dataset: {type: arithmetic, max_prompt_len: 48}
"""


def areal(*words: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, **(env or {})}
    argv = [sys.executable, "-m", "areal", *map(str, words)]
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=100, env=environment, cwd=cwd)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return path


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True).stdout


HEAVY = ("torch", "numpy", "pydantic", "yaml", "transformers", "rich", "matplotlib", "aiohttp")


@pytest.mark.parametrize("code", ["import areal", "import areal.cli; areal.cli._parser()"])
def test_import_loads_nothing_heavy(code: str) -> None:
    loaded = run_python(f"import sys\n{code}\nprint(*[m for m in {HEAVY} if m in sys.modules])")
    assert loaded.split() == []


def test_configuration_does_without_torch() -> None:
    code = "import sys, areal; areal.GRPOConfig; areal.load_expr_config; areal.ModelRequest; areal.GenerationConfig; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


@pytest.mark.parametrize("argv", [["-c", "import areal"], ["-m", "areal", "--help"]])
def test_starts_within_half_a_second(argv: list[str]) -> None:
    """The best of five: other programs on the machine are no fault of ours."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *argv], check=True, capture_output=True, timeout=60)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.5


def test_public_names() -> None:
    import areal

    assert areal.GenerationHyperparameters is areal.GenerationConfig
    assert set(areal.__all__) <= set(dir(areal))
    for name in areal.__all__:
        assert getattr(areal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainre'"):
        _ = areal.PPOTrainre


def test_help_and_version() -> None:
    out = areal("--help")
    assert out.returncode == 0 and out.stderr == ""
    for command in ("train", "serve", "eval", "doctor", "report"):
        assert command in out.stdout
        assert areal(command, "--help").returncode == 0
    assert areal("--version").stdout.strip() == "0.1.0"
    assert areal().stdout == out.stdout


def test_the_reward_function_is_looked_for_before_anything_starts(tmp_path):
    (tmp_path / "my_rewards.py").write_text("raise RuntimeError('this is my module')")
    words = [str(ROOT / "examples" / "arithmetic.yaml"), f"stats_logger.fileroot={tmp_path}", "reward_fn=my_rewards:score"]
    # -P as the console script, whose sys.path does not begin with the current folder
    done = subprocess.run(
        [sys.executable, "-P", "-m", "areal", "train", *words], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
    )
    assert_refused(done, "reward_fn='my_rewards:score' cannot be imported (RuntimeError: this is my module)", "package.module:name")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name != "__pycache__"] == []


def assert_refused(out: subprocess.CompletedProcess[str], message: str, hint: str) -> None:
    assert out.returncode == 2
    assert out.stdout == ""
    lines = out.stderr.splitlines()
    assert len(lines) == 2, out.stderr
    assert lines[0].startswith("error: ") and message in lines[0]
    assert lines[1].startswith("hint: ") and hint in lines[1]


def test_mistakes_are_two_lines(config: Path, tmp_path: Path) -> None:
    assert_refused(
        areal("train", config, "rollout.max_head_ofpolicyness=3"), "unknown key", "did you mean 'rollout.max_head_offpolicyness'?"
    )
    assert_refused(areal("train"), "no configuration file", "--config FILE")
    assert_refused(areal("train", tmp_path / "d.yaml"), "does not exist", "did you mean")
    assert_refused(areal("train", config, "seed"), "'seed' is not an override", "key=value")
    assert_refused(areal("train", config, "--frobnicate"), "unrecognized arguments: --frobnicate", "--help")
    assert_refused(areal("trian", config), "invalid choice: 'trian'", "--help")
    assert_refused(areal("serve", tmp_path / "nothing"), "there is no folder", "Hugging Face model")
    assert_refused(areal("eval", tmp_path / "nothing"), "there is no folder", "Hugging Face model")
    assert_refused(areal("eval"), "MODEL", "--help")
    assert_refused(areal("report", tmp_path), "no metrics.jsonl", "areal train")
    assert_refused(areal("report", tmp_path / "nothing"), "no metrics.jsonl", "areal train")


def test_eval_without_a_run_needs_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert_refused(areal("eval", tmp_path), "has the config.yaml of a run", "--config FILE")


def test_check_prints_the_whole_configuration(config: Path) -> None:
    for words in (
        [config, "seed=5", "--check"],
        [config, "--check", "seed=5"],
        ["--check", config, "seed=5"],
        ["--check", "--config", config, "seed=5"],
    ):
        out = areal("train", *words)
        assert out.returncode == 0, out.stderr
        tree = yaml.safe_load(out.stdout)
        assert tree["seed"] == 5 and tree["rollout"]["consumer_batch_size"] == 32


def test_keys_can_be_read() -> None:
    out = areal("train", "--keys")
    assert out.returncode == 0
    assert "rollout.max_head_offpolicyness = 2" in out.stdout


def test_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m areal train --keys | head -1"
    out = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, timeout=60)
    assert out.stdout == "experiment_name = areal  # First folder of the run under stats_logger.fileroot.\n"
    assert out.stderr == ""


def test_unforeseen_error_shows_its_traceback(config: Path) -> None:
    """A broken installation: the error is no sentence of ours, so the way to it must be seen."""
    code = (
        "import sys, areal.cli\n"
        "def broken(args): return 1 // 0\n"
        "areal.cli._COMMANDS['doctor'] = broken\n"
        "sys.exit(areal.cli.main(['doctor']))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert out.returncode == 1
    assert "in broken" in out.stderr and "error: unexpected ZeroDivisionError" in out.stderr


def test_missing_package_is_a_sentence() -> None:
    code = "import sys, areal.cli; sys.modules['yaml'] = None; sys.exit(areal.cli.main(['train', 'x.yaml']))"
    out = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert out.returncode == 1
    assert out.stderr.splitlines()[0] == "error: the package 'yaml' is not installed"
    assert "pip install '.[train]'" in out.stderr


def test_doctor() -> None:
    out = areal("doctor", env={"NO_COLOR": "1"})
    assert out.returncode in (0, 1), out.stderr
    for word in ("extension", "torch", "CUDA", "triton", "flash-attn", "SGLang", "shared memory", "file descriptors", "ports"):
        assert word in out.stdout
    assert "\x1b" not in out.stdout


def test_doctor_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["state"] == "ok"
    assert all(finding["hint"] for finding in found.values() if finding["state"] != "ok"), "what is missing has a way out"
    assert code == (1 if any(finding["state"] == "problem" for finding in found.values()) else 0)
