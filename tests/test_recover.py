"""Recover checkpoints as files: which one is taken, what is refused, and what a run's own files look like afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from rollout_servers import make_model

from areal.config import ConfigError, GRPOConfig
from areal.data import load_dataset
from areal.metrics import RunTotals
from areal.random_state import random_state, set_random_state
from areal.recover import find_resumable, go_on
from areal.recover_files import begin_checkpoint, checkpoints, file_digest, finish_checkpoint, keep_newest, what_is_done, what_is_wrong
from areal.recover_train import TrainState
from areal.run_folder import run_folder_of


def make(root: Path, **changes: Any) -> GRPOConfig:
    tree: dict[str, Any] = {
        "actor": {"path": str(root / "model")},
        "train_dataset": {"type": "arithmetic"},
        "recover": {"every_steps": 1},
        "stats_logger": {"fileroot": str(root / "runs")},
    }
    for key, value in changes.items():
        node = tree
        *sections, name = key.split("__")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return GRPOConfig.model_validate(tree)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    make_model(folder)
    return folder


@pytest.fixture
def root(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


def state(config: GRPOConfig, step: int, **changes: Any) -> TrainState:
    model = json.loads((Path(config.actor.path) / "config.json").read_text())
    model = {k: v for k, v in model.items() if k not in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")}
    return TrainState(
        **{  # type: ignore[arg-type]
            "step": step,
            "config": config.model_dump(mode="json"),
            "model": model,
            "totals": {"train_steps": step},
            "tokens_generated": 100 * step,
            "busy_seconds": 1.5,
            "drops": {"reward_timeout": 2},
            "reward_failures": {},
            "filter": {"n_filtered": 0, "n_passed": 0, "credit": 1.0},
            "n_masked_tokens": 0,
            "next_group": 4 * step,
            "n_rows": 4 * step,
            "random": random_state(),
            "data": None,
            "pending": [(3, {"prompt": "x", "prompt_id": "p"})],
            **changes,
        }
    )


def write(config: GRPOConfig, step: int, **changes: Any) -> Path:
    """A whole checkpoint; the ranks' part of it is one file."""
    partial = begin_checkpoint(run_folder_of(config), step)
    (partial / "models").mkdir()
    (partial / "models" / "__0_0.distcp").write_bytes(os.urandom(5000))
    files = {"models/__0_0.distcp": (5000, file_digest(partial / "models" / "__0_0.distcp"))}
    return finish_checkpoint(partial, files, state(config, step, **changes).files())


def test_the_newest_whole_checkpoint_comes_back_as_it_was(root: Path) -> None:
    config = make(root)
    for step in (2, 10, 9):
        write(config, step)
    half = begin_checkpoint(run_folder_of(config), 11)
    (half / "models").mkdir()
    found = find_resumable(config, TrainState)
    assert found is not None and found == state(config, 10, random=found.random)
    assert found.folder.name == "step_000010" and found.notes == []
    keep_newest(run_folder_of(config), 2)
    assert [p.name for p in checkpoints(run_folder_of(config))] == ["step_000010", "step_000009"]
    go_on(found, run_folder_of(config))
    assert sorted(p.name for p in half.parent.iterdir()) == ["step_000009", "step_000010"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "a flipped byte of the models": (lambda f: flip(f / "models/__0_0.distcp"), "models/__0_0.distcp has other bytes than were written"),
    "a flipped byte of the state": (lambda f: flip(f / "state.json"), "state.json has other bytes than were written"),
    "a file cut short": (lambda f: os.truncate(f / "models/__0_0.distcp", 4999), "models/__0_0.distcp has 4999 bytes instead of 5000"),
    "a file that is gone": (lambda f: (f / "rows.pickle").unlink(), "rows.pickle is missing"),
    "no checksums": (lambda f: (f / "checksums.json").unlink(), "checksums.json cannot be read"),
    "half of the checksums": (lambda f: os.truncate(f / "checksums.json", 40), "checksums.json cannot be read"),
    "other checksums": (lambda f: (f / "checksums.json").write_text('{"files": [1]}'), "checksums.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_one_before_is_taken(root: Path, damage: str) -> None:
    config = make(root)
    write(config, 3)
    newest = write(config, 4)
    assert what_is_wrong(newest) == ""
    do, sentence = DAMAGE[damage]
    do(newest)
    found = find_resumable(config, TrainState)
    assert found is not None and found.step == 3
    assert (
        len(found.notes) == 1
        and found.notes[0].startswith("the recover checkpoint step_000004 is damaged: ")
        and sentence in found.notes[0]
    )
    go_on(found, run_folder_of(config))
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step_000003", "step_000004.damaged"]

    do(found.folder)
    with pytest.raises(
        ConfigError, match="no recover checkpoint of .* can be used; the recover checkpoint step_000003 .* recover.mode=off"
    ):
        find_resumable(config, TrainState)


def test_when_a_run_starts_anew(root: Path) -> None:
    config = make(root)
    assert find_resumable(config, TrainState) is None
    with pytest.raises(ConfigError, match=r"recover.mode=required, but there is no recover checkpoint in .*set recover.mode=auto"):
        find_resumable(make(root, recover__mode="required"), TrainState)
    write(config, 100)
    assert find_resumable(make(root, recover__mode="off"), TrainState) is None
    assert find_resumable(config, TrainState) is not None, "it has all its steps, but was cut off before its end"
    (run_folder_of(config) / "summary.json").write_text('{"train_steps": 100}')
    assert find_resumable(config, TrainState) is None
    assert find_resumable(make(root, total_train_steps=101), TrainState) is not None
    with pytest.raises(ConfigError, match=r"the run in .* has finished \(raise total_train_steps"):
        find_resumable(make(root, recover__mode="required"), TrainState)


def test_what_may_not_change(root: Path) -> None:
    write(make(root), 5)
    refused = {
        "seed": (1, "seed is 1, but the run that would go on in .* has 0"),
        "train_dataset__max_terms": (9, "train_dataset.max_terms is 9, .* has 8"),
        "actor__optimizer": ({"type": "muon"}, 'actor.optimizer.type is "muon", .* has "adamw"'),
        "actor__lora": ({}, 'actor.lora is "given", .* has null'),
        "critic": ({}, 'critic is "given", .* has null'),
        "total_train_steps": (4, "total_train_steps=4, but the run in .* has done 5 steps"),
    }
    for key, (value, sentence) in refused.items():
        with pytest.raises(ConfigError, match=f"{sentence}.*trial_name.*recover.mode=off"):
            find_resumable(make(root, **{key: value}), TrainState)
    make_model(root / "other", hidden_size=64)
    with pytest.raises(ConfigError, match=r"actor.path=.*/other is another model than .*: hidden_size is 64 instead of 32"):
        find_resumable(make(root, actor__path=str(root / "other")), TrainState)
    shutil.copytree(root / "model", root / "moved")
    may = {"actor__path": str(root / "moved"), "actor__optimizer": {"lr": 1e-3}, "actor__backend": "fsdp:d4", "total_train_steps": 500}
    may |= {"rollout__max_head_offpolicyness": 7, "rollout__consumer_batch_size": 8, "actor__dtype": "bfloat16"}
    assert find_resumable(make(root, **may), TrainState) is not None


def test_a_reference_that_the_warm_up_made_is_needed_again(root: Path) -> None:
    warm = {"warmup": {"total_steps": 4}, "actor__kl_ctl": 0.1}
    write(make(root), 5)
    assert find_resumable(make(root, actor__kl_ctl=0.1), TrainState) is not None, "it is the starting model"
    with pytest.raises(ConfigError, match="warmup is given, but the run that would go on in .* began without one.*set ref.path"):
        find_resumable(make(root, **warm), TrainState)
    write(make(root, warmup=warm["warmup"]), 6)
    with pytest.raises(
        ConfigError, match=r"actor.kl_ctl=0.1 needs the reference model that the warm-up made, .* did not keep one.*ref.path"
    ):
        find_resumable(make(root, **warm), TrainState)
    assert find_resumable(make(root, **warm, ref__path="/somewhere"), TrainState) is not None
    write(make(root, **warm), 7)
    assert find_resumable(make(root, **warm), TrainState) is not None
    assert find_resumable(make(root), TrainState) is not None, "without a reference from here on"
    with pytest.raises(ConfigError, match="warmup is null, but the run that would go on in .* began with one"):
        find_resumable(make(root, actor__kl_ctl=0.1), TrainState)


def test_a_running_run_is_left_alone(root: Path) -> None:
    config = make(root)
    write(config, 1)
    script = f"""
import time
from pathlib import Path
from areal.run_folder import run_lock
with run_lock(Path({str(run_folder_of(config))!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None and running.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="a run that is going on writes to"):
            find_resumable(config, TrainState)
    finally:
        running.kill()
        running.wait()


def test_rows_that_cannot_be_pickled_are_told(root: Path) -> None:
    with pytest.raises(OSError, match="rows of train_dataset cannot be pickled"):
        state(make(root), 1, pending=[(0, {"f": lambda: None})]).files()


def test_a_state_of_other_fields_is_told(root: Path) -> None:
    config = make(root)
    own = state(config, 1).files()
    plain = json.loads(own["state.json"])
    for step, (name, changed) in enumerate(
        {"flux": plain | {"flux": 1}, "command": {key: value for key, value in plain.items() if key != "command"}}.items(), 1
    ):
        partial = begin_checkpoint(run_folder_of(config), step)
        finish_checkpoint(partial, {}, {**own, "state.json": json.dumps(changed).encode()})
        with pytest.raises(ConfigError, match=rf"step_00000{step} cannot be read here .*{name}.*go on with the areal"):
            find_resumable(config, TrainState)


def lines(path: Path, rows: list[dict[str, Any]], torn: bytes = b"") -> None:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows) + torn)


def read(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_the_files_of_a_run_go_back_to_the_step(root: Path) -> None:
    config = make(root)
    write(config, 4)
    folder = run_folder_of(config)
    lines(folder / "metrics.jsonl", [{"step": n} for n in range(1, 7)], b'{"step": 7, "rew')
    lines(folder / "trajectories.jsonl", [{"step": n // 2} for n in range(12)])
    evaluations = [
        {"when": "before", "step": 0},
        {"when": "step 4", "step": 4},
        {"when": "after", "step": 4},
        {"when": "step 6", "step": 6},
    ]
    lines(folder / "evaluations.jsonl", evaluations)
    lines(folder / "timeline.jsonl", [{"kind": "x"}] * 3, b'{"ki')
    (folder / "summary.json").write_text('{"train_steps": 4}')
    for name in ("step_000002", "step_000004", "step_000006", "step_000004.partial-7", "final"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    found = find_resumable(config.new(total_train_steps=20), TrainState)
    assert found is not None
    for _ in range(2):  # also after a kill right behind it
        found.notes = []
        go_on(found, folder)
        assert read(folder / "metrics.jsonl") == [{"step": n} for n in range(1, 5)]
        assert read(folder / "trajectories.jsonl") == [{"step": n // 2} for n in range(8)]
        assert read(folder / "evaluations.jsonl") == evaluations[:2]
        assert read(folder / "timeline.jsonl") == [{"kind": "x"}] * 3
        assert not (folder / "summary.json").exists()
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["final", "step_000002", "step_000004"]
        assert what_is_done(folder, 4) == {"checkpoint", "evaluation"} and what_is_done(folder, 3) == set()
    go_on(replace(found, step=3, notes=(notes := [])), folder)
    assert notes == ["removed checkpoints of later steps: step_000004"]


def test_a_data_set_is_placed_by_its_state_or_by_reading_on(root: Path) -> None:
    config = make(root)
    rows = load_dataset(config.train_dataset, 0)
    for _ in range(5):
        next(rows)
    saved = state(config, 1, data=pickle.loads(pickle.dumps(rows.state_dict())), n_rows=5)
    want = next(rows)
    again = load_dataset(config.train_dataset, 0)
    saved.place(again)
    assert next(again) == want
    plain = iter([{"prompt": str(n)} for n in range(8)])
    replace(saved, data=None).place(plain)
    assert next(plain) == {"prompt": "5"}
    with pytest.raises(ConfigError, match="train_dataset ended after 3 rows, but the run that goes on has read 5"):
        replace(saved, data=None).place(iter([{}] * 3))
    with pytest.raises(ConfigError, match="had seed 0 when its state was saved and has 1 now"):
        saved.place(load_dataset(config.train_dataset, 1))


def test_random_numbers_of_every_kind_go_on() -> None:
    import random

    import numpy as np
    import torch

    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    draw()
    saved = json.loads(json.dumps(random_state()))
    want = [draw() for _ in range(3)]
    draw()
    set_random_state(saved)
    assert [draw() for _ in range(3)] == want


def test_totals_come_back_whole() -> None:
    totals = RunTotals(accuracy_before=0.5, train_steps=4, dropped={"x": 1}, pass_at_k_before={"2": 0.25})
    assert RunTotals(**json.loads(json.dumps(totals.__dict__))) == totals


def test_groups_that_were_not_trained_on_are_generated_again_under_their_numbers() -> None:
    from areal.buffer import TrajectoryBuffer
    from areal.runner import Runner
    from areal.staleness import StalenessManager

    class Client:
        acked_version = 3

    config = GRPOConfig.model_validate({"actor": {"path": "x"}, "train_dataset": {"type": "arithmetic"}})
    begun: list[tuple[int, str, int]] = []

    class Recording(Runner):
        async def _run_group(self, group_id: int, row: dict[str, Any], version: int) -> None:
            begun.append((group_id, row["prompt_id"], version))

    async def main() -> None:
        staleness, buffer = StalenessManager(batch_size=2, eta=1, max_concurrent=100), TrajectoryBuffer(2, 1)
        rows = iter([{"prompt_id": f"new {n}"} for n in range(9)])
        runner = Recording(config, Client(), None, rows, staleness, buffer)  # type: ignore[arg-type]
        staleness.resume(3, len(buffer))
        runner.resume(9, 9, [(6, {"prompt_id": "six"}), (8, {"prompt_id": "eight"})])
        assert runner.position() == (9, 9, {6: {"prompt_id": "six"}, 8: {"prompt_id": "eight"}})
        async with asyncio.TaskGroup() as groups:
            runner._admit(groups)
        assert begun == [(6, "six", 3), (8, "eight", 3), (9, "new 0", 3), (10, "new 1", 3)], "capacity is (eta + i + 1) * B - i * B"
        assert runner.position()[:2] == (11, 11)
        assert list(runner.position()[2]) == [6, 8, 9, 10]

    asyncio.run(main())
