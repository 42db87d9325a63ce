"""How a run finds SGLang and what it tells it; nothing of SGLang runs here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rollout_servers import TINY

from areal import config_check
from areal.config import ConfigError, GRPOConfig
from areal.config_check import check_machine
from areal.inference import placement, sglang_cpu_env
from areal.inference.placement import rollout_device, shares_gpu
from areal.inference.sglang import PLUGIN, installed_version, refusal, sglang_argv, sglang_env, sglang_python
from tests.sglang_servers import fake_sglang


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def config(**rollout: Any) -> GRPOConfig:
    tree = {"actor": {"init_from_scratch": TINY, "backend": rollout.pop("actor", "fsdp:d1")}, "train_dataset": {"type": "arithmetic"}}
    return GRPOConfig.model_validate({**tree, "rollout": rollout})


def value(argv: list[str], flag: str) -> str:
    assert argv.count(flag) == 1, argv
    return argv[argv.index(flag) + 1]


def test_options_win_over_ours_and_pass_by_name(model: Path) -> None:
    options = {
        "attention-backend": "triton",
        "max_total_tokens": 99,
        "cuda_graph_bs": ["1", "2"],
        "sleep_on_idle": False,
        "enable_lora": True,
    }
    argv = sglang_argv(model, 1234, device="cpu", dtype="float32", options=options)
    assert value(argv, "--attention-backend") == "triton" and value(argv, "--max-total-tokens") == "99"
    assert argv[argv.index("--cuda-graph-bs") + 1 :][:2] == ["1", "2"]
    assert "--sleep-on-idle" not in argv and "--enable-lora" in argv
    assert "--disable-radix-cache" not in argv
    assert "--disable-radix-cache" in sglang_argv(model, 1, device="cpu", dtype="float32", keep_prefixes=False)


def test_a_users_weight_loader_does_not_take_the_place_of_ours(model: Path) -> None:
    argv = sglang_argv(model, 1, device="cpu", dtype="float32", options={"custom_weight_loader": "mine.load"})
    at = argv.index("--custom-weight-loader")
    assert argv[at + 1 : at + 3] == ["areal_sglang_weights.report_hash", "mine.load"]
    assert (PLUGIN / "areal_sglang_weights.py").is_file()


def test_the_context_holds_the_longest_sequence_to_its_last_token(model: Path) -> None:
    assert int(value(sglang_argv(model, 1, device="cpu", dtype="float32", max_context=100), "--context-length")) >= 106
    assert int(value(sglang_argv(model, 1, device="cpu", dtype="float32"), "--context-length")) >= TINY["max_position_embeddings"] + 6  # type: ignore[operator]
    (model / "config.json").write_text(json.dumps({**TINY, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))
    assert "--context-length" not in sglang_argv(model, 1, device="cpu", dtype="float32"), "SGLang works a longer limit out of it"


def test_memory_is_left_to_a_trainer_on_the_same_gpu(model: Path) -> None:
    alone = sglang_argv(model, 1, device="cuda:2", dtype="bfloat16", n_ranks=2)
    assert value(alone, "--base-gpu-id") == "2" and value(alone, "--tensor-parallel-size") == "2"
    assert "--mem-fraction-static" not in alone
    assert float(value(sglang_argv(model, 1, device="cuda:0", dtype="bfloat16", shared_gpu=True), "--mem-fraction-static")) < 0.5


@pytest.mark.parametrize(
    ("n_gpus", "layout", "expected"),
    [
        (0, {"backend": "sglang:d2"}, ["cpu", "cpu"]),
        (8, {"backend": "sglang:d2t2", "actor": "fsdp:d4"}, ["cuda:4", "cuda:6"]),
        (8, {"backend": "sglang:d2t2", "actor": "fsdp:d3"}, ["cuda:3", "cuda:5"]),
        (8, {"backend": "sglang:d2t4", "actor": "fsdp:d8", "colocate": True}, ["cuda:0", "cuda:4"]),
        (4, {"backend": "sglang:d2t2", "actor": "fsdp:d2"}, ["cuda:2", "cuda:0"]),
        (1, {"backend": "sglang:d2"}, ["cuda:0", "cuda:0"]),
        (4, {"backend": "embedded:d2", "actor": "fsdp:d3"}, ["cuda:3", "cuda:0"]),
        (4, {"backend": "sglang:d2t2", "device": "cuda:1"}, ["cuda:1", "cuda:3"]),
        (4, {"backend": "sglang:d2", "device": "cpu"}, ["cpu", "cpu"]),
    ],
)
def test_gpus_behind_those_of_the_trainer(
    monkeypatch: pytest.MonkeyPatch, n_gpus: int, layout: dict[str, Any], expected: list[str]
) -> None:
    monkeypatch.setattr(placement, "count_gpus", lambda: n_gpus)
    assert [rollout_device(config(**layout), i) for i in range(2)] == expected


def test_a_gpu_that_is_shared_needs_another_transport_than_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "count_gpus", lambda: 1)
    monkeypatch.setattr(config_check, "count_gpus", lambda: 1)
    assert shares_gpu(config(backend="sglang:d1"), 0) and not shares_gpu(config(backend="sglang:d1", device="cpu"), 0)
    with pytest.raises(ConfigError, match=r"share cuda:0 with the trainer.*rollout\.colocate=true"):
        config_check._check_transport(config(backend="sglang:d1"))
    config_check._check_transport(config(backend="sglang:d1", colocate=True))
    with pytest.raises(ConfigError, match="needs 2 GPUs for one server, and this machine has 1"):
        config_check._check_gpus(config(backend="sglang:d1t2", colocate=True))


@pytest.mark.parametrize("transport", ["broadcast", "tensor"])
def test_weights_stream_between_gpus_or_between_cpus(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    monkeypatch.setattr(placement, "count_gpus", lambda: 2)
    sync = {"weight_sync": {"transport": transport}}
    config_check._check_transport(config(backend="sglang:d1").new(**sync))
    on_cpu = config(backend="sglang:d1", device="cpu")
    with pytest.raises(ConfigError, match=f"transport={transport} does not lead from a trainer on GPUs to .* on the CPU"):
        config_check._check_transport(on_cpu.new(**sync))
    config_check._check_transport(on_cpu.new(weight_sync={"transport": "disk"}))
    trainer_on_cpu = {"actor": {"init_from_scratch": TINY, "device": "cpu"}}
    with pytest.raises(ConfigError, match=f"transport={transport} does not lead from a trainer on the CPU to .* on GPUs"):
        config_check._check_transport(config(backend="sglang:d1").new(**sync, **trainer_on_cpu))
    config_check._check_transport(on_cpu.new(**sync, **trainer_on_cpu))


def test_the_interpreter_is_looked_for_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured, named = fake_sglang(tmp_path / "a", "0.5.14"), fake_sglang(tmp_path / "b", "0.5.13")
    monkeypatch.setenv("AREAL_SGLANG_PYTHON", str(named))
    assert sglang_python(str(configured)) == str(configured), "not where its link leads"
    assert sglang_python() == str(named)
    assert installed_version(str(named)) == "0.5.13"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sglang_python("~/a/bin/python") == str(configured)


def test_no_sglang_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"actor": {"init_from_scratch": TINY}, "train_dataset": {"type": "arithmetic"}, "rollout": {"backend": "sglang:d1"}}
    without = [({"python": str(tmp_path / "no")}, r"sglang\.python: .*cannot be run"), ({"python": sys.executable}, "has no SGLang")]
    for section, words in without:
        with pytest.raises(ConfigError, match=words):
            check_machine(GRPOConfig.model_validate({**tree, "sglang": section}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AREAL_SGLANG_PYTHON", raising=False)
    with pytest.raises(ConfigError, match="make sglang-env"):
        check_machine(GRPOConfig.model_validate(tree))
    check_machine(GRPOConfig.model_validate({**tree, "rollout": {"backend": "sglang:d1", "urls": ["http://h:1"]}}))


def test_packages_of_one_environment_stay_out_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert sglang_env("cpu", 1, "/other/bin/python")["PYTHONPATH"] == str(PLUGIN)
    assert sglang_env("cpu", 1, sys.executable)["PYTHONPATH"] == f"{PLUGIN}{os.pathsep}/mine"
    assert sglang_env("cpu", 3, "/other/bin/python")["PATH"].startswith("/other/bin" + os.pathsep)


def test_ranks_on_a_cpu_are_told_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "SGLANG_CPU_OMP_THREADS_BIND"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6})
    assert sglang_env("cpu", 1, n_ranks=2)[name] == "4|5"
    assert sglang_env("cpu", 2, n_ranks=2)[name] == "4,5|6,4"
    assert name not in sglang_env("cpu", 2) and name not in sglang_env("cuda:0", 2, n_ranks=2)
    monkeypatch.setenv(name, "0|1")
    assert name not in sglang_env("cpu", 1, n_ranks=2), "the user's own"


def test_an_installation_that_fails_is_a_sentence_and_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sglang_cpu_env, "TORCH", "areal-has-no-such-package==0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for words in ("Making", "Looking at"):
        assert sglang_cpu_env.main([str(tmp_path / "v")]) == 1
        said = capfd.readouterr().err
        assert said.startswith(words) and "No matching distribution found for areal-has-no-such-package" in said
        assert "error: `" in said and "failed with exit code 1" in said


def test_an_environment_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(sglang_cpu_env, "_install", lambda python, *words: installed.append(words))
    monkeypatch.setenv("TORCH_INDEX", "http://127.0.0.1:9/torch")
    assert sglang_cpu_env.make(tmp_path / "v")
    assert installed[0] == ("--index-url", "http://127.0.0.1:9/torch", sglang_cpu_env.TORCH), "for torch alone"
    assert installed[1][:2] == ("--no-deps", "-r") and len(installed) == 2
    assert not sglang_cpu_env.make(tmp_path / "v") and len(installed) == 2
    monkeypatch.setattr(sglang_cpu_env, "TORCH", "torch==2.14.0")
    assert sglang_cpu_env.make(tmp_path / "v") and len(installed) == 4, "other pins"


def test_a_refusal_is_told_from_other_deaths() -> None:
    assert refusal("usage: x\n  [--a A]\nsglang serve: error: unrecognized arguments: --b 1\n") == "unrecognized arguments: --b 1"
    assert refusal("Traceback (most recent call last):\n  File x\nRuntimeError: out of memory\n") is None


def test_the_launch_file_needs_only_the_standard_library(tmp_path: Path) -> None:
    """It runs in SGLang's environment, and hands every word to SGLang; a starter that has died already leaves nothing behind."""
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text("import sys\nprint(__name__, *sys.argv[1:])\n")
    argv = [sys.executable, str(PLUGIN / "areal_sglang_launch.py"), "--port", "7"]
    env = {"PYTHONPATH": str(tmp_path)}
    asked = subprocess.run([argv[0], "-S", *argv[1:]], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert asked.stdout == "__main__ --port 7\n"
    orphan = subprocess.run(argv, env={**env, "AREAL_PARENT_PID": "1"}, capture_output=True, text=True, timeout=60, check=False)
    assert orphan.returncode == 1 and orphan.stdout == ""
