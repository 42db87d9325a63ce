"""`areal sft` and `areal dpo` killed with -9 and started again: bit for bit the weights of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from areal.config import ConfigError, GRPOConfig
from areal.config_check_supervised import check_sft_config
from areal.config_load import load_expr_config
from areal.dpo import DPOTrainer
from areal.recover import find_resumable
from areal.recover_supervised import DPOState, SFTState
from areal.recover_train import TrainState
from areal.sft import SFTTrainer
from areal.stats import read_jsonl
from tests.rollout_servers import make_model
from tests.runs import ROOT, TrainRun, assert_all_gone

pytestmark = pytest.mark.timeout(400)

N_STEPS = 24
ROWS = 50
"""More are drawn: the order of a second epoch counts as well."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_model(folder / "model")
    usable = [{"prompt": f"a{i}b+1=", "answer": f"#{i + 1}", "chosen": f"#{i + 1}", "rejected": f"#{i}"} for i in range(ROWS)]
    rows = [*usable, {"prompt": "a1b+1="}]  # one that is dropped in every epoch, and the first line
    (folder / "rows.jsonl").write_text("no JSON\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(data: Path, command: str) -> list[str]:
    recipe = {
        "sft": f"warmup={{total_steps: {N_STEPS}, batch_size: 4, optimizer: {{lr: 1.0e-3, warmup_steps: 10}}}}",
        "dpo": f"dpo={{total_steps: {N_STEPS}, batch_size: 4}}",
    }
    return [
        recipe[command],
        "deterministic=true",
        f"actor.path={data / 'model'}",
        "actor.init_from_scratch=null",
        "actor.optimizer.warmup_steps=10",
        "train_dataset.type=jsonl",
        f"train_dataset.path={data / 'rows.jsonl'}",
        "train_dataset.prompt_key=prompt",
        "train_dataset.answer_key=answer",
        "recover.every_steps=1",
        "saver.every_steps=12",
    ]


LOG = {"sft": "warmup", "dpo": "metrics"}


def start(folder: Path, data: Path, command: str, *more: str) -> TrainRun:
    folder.mkdir(exist_ok=True)
    return TrainRun(folder, *words(data, command), *more, config=f"examples/{command}.yaml", command=command)


def steps(run: TrainRun, command: str) -> list[dict[str, Any]]:
    log = run.folder / f"{LOG[command]}.jsonl"
    return read_jsonl(log) if log.exists() else []


def kill_at(run: TrainRun, command: str, step: int) -> None:
    run.wait_until(lambda: len(steps(run, command)) >= step, 120)
    family = run.family()
    run.process.kill()
    assert_all_gone(family)


def digest(run: TrainRun, name: str) -> str:
    return hashlib.sha256((run.folder / "checkpoints" / name / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("command", "kills"), [("sft", (3, 11)), ("dpo", (14,))])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(data: Path, tmp_path: Path, command: str, kills: tuple[int, ...]) -> None:
    calm = start(tmp_path / "calm", data, command, "recover.every_steps=0")
    want = calm.summary()
    killed = tmp_path / "killed"
    for step in kills:
        kill_at(start(killed, data, command), command, step)
    run = start(killed, data, command)
    summary = run.summary()
    assert "the run goes on after step" in run.stderr
    for name in ("step_000012", "final"):
        assert digest(run, name) == digest(calm, name), name
    same = ("step", "loss", "grad_norm", "lr_scale", "tokens")
    assert [[row[key] for key in same] for row in steps(run, command)] == [[row[key] for key in same] for row in steps(calm, command)]
    summary["dropped"].pop("recover_skipped", None)  # where writing takes longer than a step
    for totals in (summary, want):
        del totals["seconds"], totals["seconds_total"]
    assert summary == want and want["dropped"].keys() == {"malformed_row"} and 2 <= want["dropped"]["malformed_row"] <= 4


def test_a_run_goes_on_past_its_end_on_two_ranks_and_says_what_may_not_change(data: Path, tmp_path: Path) -> None:
    run = start(tmp_path / "run", data, "dpo")
    first = run.summary()
    more = ("actor.backend=fsdp:d2", f"dpo.total_steps={N_STEPS + 4}", "actor.lora=null")
    longer = start(tmp_path / "run", data, "dpo", *more)
    summary = longer.summary()
    assert summary["steps"] == N_STEPS + 4 and summary["pairs"] == 4 * summary["steps"]
    assert summary["tokens"] > first["tokens"] and summary["seconds_total"] > first["seconds_total"]
    assert [row["step"] for row in steps(longer, "dpo")] == list(range(1, N_STEPS + 5))

    def config(*changes: str) -> Any:
        fixed = [f"stats_logger.fileroot={tmp_path / 'run'}", "experiment_name=arithmetic", "trial_name=run"]
        given = [str(ROOT / "examples" / "dpo.yaml"), *words(data, "dpo"), *more, *fixed, *changes]
        return load_expr_config(given, GRPOConfig, check=lambda config: None)[0]

    assert find_resumable(config(), DPOState) is None, "it has finished"
    wanted = f"dpo.total_steps={N_STEPS + 9}"
    found = find_resumable(config(wanted, "dpo.beta=0.3", "dpo.batch_size=8", "actor.optimizer.lr=1e-5"), DPOState)
    assert found is not None and 0 < found.step <= N_STEPS + 4
    for change, sentence in {
        "seed=7": "seed is 7, but the run",
        "train_dataset.limit=20": "train_dataset.limit is 20, but the run",
        "actor.optimizer.type=muon": 'actor.optimizer.type is "muon", but',
        "actor.lora={rank: 4}": "actor.lora is",
        "dpo.total_steps=5": "dpo.total_steps=5, but the run in .* has done [0-9]+ steps",
    }.items():
        (tmp_path / "run" / "arithmetic" / "run" / "summary.json").unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=sentence):
            find_resumable(config(wanted, change), DPOState)
    with pytest.raises(ConfigError, match="is one of `areal dpo`, not of `areal train`"):
        find_resumable(config(), TrainState)
    with pytest.raises(ConfigError, match="is one of `areal dpo`, not of `areal sft`"):
        find_resumable(config("dpo=null", "warmup={}"), SFTState)
    other = tmp_path / "other.jsonl"
    other.write_text((data / "rows.jsonl").read_text().replace('"a', '"c'))
    with (
        pytest.raises(ConfigError, match=r"row \d+ of the data set .* is another one than when its state was saved"),
        DPOTrainer(config(wanted, f"train_dataset.path={other}")),
    ):
        pass


def test_when_a_run_is_over_and_how_long_it_is() -> None:
    base: dict[str, Any] = {"actor": {"path": "model"}, "train_dataset": {"type": "arithmetic"}}
    sft, dpo = (GRPOConfig.model_validate(base | {key: {"total_steps": 20}}) for key in ("warmup", "dpo"))
    assert SFTState.is_over({"steps": 20, "reached": False}, sft) and not SFTState.is_over({"steps": 19, "reached": False}, sft)
    assert SFTState.is_over({"steps": 9, "reached": True}, sft), "it reached its accuracy"
    assert DPOState.is_over({"steps": 20, "pairs": 80}, dpo) and not DPOState.is_over({"steps": 19, "pairs": 80}, dpo)
    for summary in ({"steps": 5, "pairs": 20}, {"train_steps": 5}):
        assert SFTState.is_over(summary, sft), "another command's"
    for other in ({"steps": 5, "reached": False}, {"train_steps": 5}):
        assert DPOState.is_over(other, dpo), "another command's"
    assert TrainState.is_over({"steps": 5, "reached": False}, sft)
    common: dict[str, Any] = {"step": 18, "config": {}, "model": {}, "drops": {}, "random": {}, "rows": {}, "seconds_total": 1.0}
    for since, n_steps in ((None, 20), (12, 12 + 150)):
        progress = {"schedule": {"cooling_since": since, "cooling_from": 1.0}}
        assert SFTState(**common, result={"reached": since is not None}, progress=progress).n_steps(sft) == n_steps


def test_required_without_a_checkpoint_is_an_error_before_anything_starts(data: Path, tmp_path: Path) -> None:
    given = [str(ROOT / "examples" / "sft.yaml"), *words(data, "sft"), f"stats_logger.fileroot={tmp_path}", "recover.mode=required"]
    config, _ = load_expr_config(given, GRPOConfig, check=check_sft_config)
    with pytest.raises(ConfigError, match="recover.mode=required, but there is no recover checkpoint"), SFTTrainer(config):
        pass
