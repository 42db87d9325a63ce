"""``areal eval`` and ``areal serve`` on a real, tiny, untrained model: real processes, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from areal.cli import main
from areal.config import ConfigError, GRPOConfig
from areal.config_load import build_config, dump_yaml
from areal.eval_command import Watcher, run_eval
from areal.evaluation import EpisodeResult
from areal.evaluation_scores import answer_class
from areal.launcher.local import free_port
from areal.models.loading import create_model
from areal.tasks.arithmetic import arithmetic_reward, build_tokenizer
from areal.workflow import EpisodeDropped, RLVRWorkflow


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its config and one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    special = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    model = create_model({"model_type": "qwen2", "max_position_embeddings": 64, **sizes, **special}, seed=0, dtype=torch.float32)
    checkpoint = folder / "checkpoints" / "final"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    tree = {
        "gconfig": {"n_samples": 4, "max_new_tokens": 16},
        # It was trained on GPUs: an evaluation needs none.
        "actor": {"init_from_scratch": {"model_type": "qwen2"}, "backend": "fsdp:d2", "device": "cuda"},
        "rollout": {"device": "cpu", "startup_timeout": 100},
        "train_dataset": {"type": "arithmetic", "max_prompt_len": 40},
        "evaluator": {"n_prompts": 24},
    }
    (folder / "config.yaml").write_text(dump_yaml(build_config(tree, GRPOConfig)))
    return folder


def children_of(folder: Path) -> list[int]:
    """Processes that still name the folder on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # ended meanwhile
        if "areal.inference.embedded.server" in words and any(str(folder) in word for word in words):
            found.append(int(process.name))
    return found


def test_checkpoint_of_a_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The config is found above the checkpoint; what is printed is JSON."""
    assert main(["eval", str(run_folder / "checkpoints" / "final"), "evaluator.n_prompts=20"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["n_scored"] == 20 and result["failures"] == {}
    assert 0 <= result["accuracy"] <= 1 and 0 < result["length"] <= 16
    assert set(result["samples"][0]) == {"prompt", "answer", "reward"}
    assert children_of(run_folder) == []


def test_a_runs_own_workflow_with_samples_into_a_file(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The workflow that the config names plays, and every line of the file can be scored again from what it holds."""
    out = tmp_path / "episodes.jsonl"
    words = ["evaluator.n_prompts=6", "evaluator.gconfig.n_samples=4", "workflow=tests.test_eval_command:Confident"]
    assert main(["eval", str(run_folder / "checkpoints" / "final"), "--out", str(out), *words]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["n_prompts"], result["n_samples"], result["n_scored"], result["failures"]) == (6, 4, 20, {"not_confident": 4})
    assert list(result["pass_at_k"]) == ["1", "2", "4"] and "\x1b" not in captured.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({(line["prompt_id"], line["sample"]) for line in lines}) == len(lines) == 24
    scored = [line for line in lines if "failure" not in line]
    assert {line["failure"]["cause"] for line in lines if line not in scored} == {"not_confident"} and len(scored) == 20
    for line in scored:
        assert line["reward"] == arithmetic_reward(line["prompt"], line["completion"], [], [], line["answer"])
        assert line["final_answer"] == answer_class(line["completion"]) and 0 < line["length"] <= 16
    assert result["accuracy"] == pytest.approx(sum(line["reward"] for line in scored) / 20)
    assert result["truncated"] == pytest.approx(sum(line["truncated"] for line in scored) / 20)


class Confident(RLVRWorkflow):
    """Gives up on one prompt."""

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
        result = await super().arun_episode(engine, data)
        if data["prompt_id"].endswith("3"):
            raise EpisodeDropped("not_confident")
        return result


def test_a_file_that_cannot_be_written_is_told_before_anything_starts(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    assert main(["eval", str(run_folder / "checkpoints" / "final"), "--out", str(run_folder / "no" / "file")]) == 2
    assert "error: --out: the file" in capsys.readouterr().err and time.monotonic() - begin < 15


@pytest.mark.parametrize("no_color", [True, False])
def test_progress_on_a_terminal(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Watcher(3, None) as watcher:
            watcher(EpisodeResult({}, 0, reward=1.0))
            watcher(EpisodeResult({}, 1, reward=0.0))
            watcher(EpisodeResult({}, 2, "reward_timeout"))
    seen = ""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to any more
        while part := os.read(master, 100_000).decode():
            seen += part
    os.close(master)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "3/3" in plain and "50.0% right, 1 failed" in plain
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-8]", seen)) != no_color


def test_samples_that_would_all_be_the_same_are_refused(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluator.gconfig.n_samples=4", "evaluator.gconfig.temperature=0"]
    assert main(["eval", str(run_folder / "checkpoints" / "final"), *words]) == 2
    assert "gconfig.temperature=0 gives the same answer all gconfig.n_samples=4 times" in capsys.readouterr().err


def test_nothing_to_evaluate_on(run_folder: Path) -> None:
    tree = {"actor": {"path": str(run_folder)}, "train_dataset": {"type": "arithmetic"}, "evaluator": {"n_prompts": 0}}
    with pytest.raises(ConfigError, match=r"no held-out prompts .*set valid_dataset"):
        run_eval(build_config(tree, GRPOConfig))


def test_server_that_cannot_start_is_a_sentence(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    build_tokenizer().save_pretrained(broken)
    (broken / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 64}')
    assert main(["eval", str(broken), "--config", str(run_folder / "config.yaml")]) == 1
    error = capsys.readouterr().err
    assert "error: a rollout server died while starting: rollout 0" in error
    assert "Traceback" not in error.partition("its log")[0]


def test_server_that_dies_is_a_sentence_at_once(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from areal import eval_command
    from areal.evaluation import evaluate

    async def kill_first(client: Any, *args: Any, **kwargs: Any) -> Any:
        for server in client._router.live():
            os.kill(server.process.pid, signal.SIGKILL)
        return await evaluate(client, *args, **kwargs)

    monkeypatch.setattr(eval_command, "evaluate", kill_first)
    begin = time.monotonic()
    assert main(["eval", str(run_folder / "checkpoints" / "final")]) == 1
    error = capsys.readouterr().err
    assert "error: no rollout server is alive" in error and "SIGKILL" in error and "Traceback" not in error
    assert time.monotonic() - begin < 60  # not rollout.startup_timeout later
    assert not children_of(run_folder)


def test_serve_answers_and_ends_on_ctrl_c(run_folder: Path, tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    words = ["serve", str(run_folder / "checkpoints" / "final"), "--port", str(port), "--threads", "1", "--device", "cpu"]
    log_path = tmp_path / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "areal", *words], stdout=log, stderr=log, env=environment)
    try:
        ask(f"http://127.0.0.1:{port}/health", None, process, log_path)
        body = {"text": "a7b*8=", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        answer = json.loads(ask(f"http://127.0.0.1:{port}/generate", body, process, log_path))
        assert len(answer["output_ids"]) == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def ask(url: str, body: dict[str, Any] | None, process: subprocess.Popen[bytes], log: Path) -> bytes:
    """GET or POST, as soon as the server listens."""
    deadline = time.monotonic() + 90
    data = None if body is None else json.dumps(body).encode()
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=20) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            pytest.fail(f"{url}: {error.code} {error.read()!r}")
        except urllib.error.URLError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
