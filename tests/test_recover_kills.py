"""Kills between any two file operations of writing, tidying up and going on: what has a name is whole, and nothing else is left."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from test_recover import lines, make, model, read, root, write

from areal.models.loading import load_model, meta_template
from areal.recover import find_resumable, go_on
from areal.recover_files import checkpoints, cut_back, keep_newest, what_is_wrong
from areal.recover_train import TrainState
from areal.run_folder import keep_last, run_folder_of
from areal.trainer.checkpoint import write_checkpoint

__all__ = ["model", "root"]

_FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.scandir", "shutil.rmtree"}


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Runs ``work`` in a process that is killed before its file operation ``number``; whether it got so far."""
    pid = os.fork()
    if not pid:
        left = number

        def count(event: str, _: Any) -> None:
            nonlocal left
            if event in _FILE_OPERATIONS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_kill_between_any_two_file_operations_leaves_whole_checkpoints(root: Path) -> None:
    """Writing one, and removing the oldest; then going on from what is left, killed at every moment as well."""
    config = make(root)
    folder = run_folder_of(config)
    for step in (2, 4):
        write(config, step)
    lines(folder / "metrics.jsonl", [{"step": n} for n in range(1, 8)])

    def work() -> None:
        write(config, 6)
        keep_newest(folder, 2)

    shutil.copytree(folder, root / "before")
    found_steps = []
    for number in itertools.count():
        shutil.rmtree(folder)
        shutil.copytree(root / "before", folder)
        if not killed_at(number, work):
            break
        assert all(what_is_wrong(path) == "" for path in checkpoints(folder)), number
        found = find_resumable(config, TrainState)
        assert found is not None and not found.notes
        killed_at(number % 12, lambda found=found: go_on(found, folder))
        found = find_resumable(config, TrainState)
        assert found is not None and not found.notes
        go_on(found, folder)
        assert all(path in checkpoints(folder) for path in (folder / "recover").iterdir()), number
        assert [row["step"] for row in read(folder / "metrics.jsonl")] == list(range(1, found.step + 1))
        found_steps.append(found.step)
    assert found_steps == sorted(found_steps) and {4, 6} == set(found_steps) and len(found_steps) > 20
    assert [path.name for path in checkpoints(folder)] == ["step_000006", "step_000004"]


def test_a_hugging_face_checkpoint_that_replaces_another_is_whole_or_not_there(root: Path) -> None:
    """Over the one of the same name; what a kill leaves beside it is removed when the run goes on."""
    old = load_model(root / "model", dtype=torch.float32)
    template, name = meta_template(old, torch.float32), "model.embed_tokens.weight"
    weights = {n: p.detach() for n, p in old.named_parameters()}
    folder = root / "run" / "checkpoints" / "final"
    write_checkpoint(folder, template, weights, root / "model")
    shutil.copytree(root / "run", root / "before")
    files = {path.name for path in folder.iterdir()}
    new = {**weights, name: weights[name] + 1}
    seen = []
    for number in itertools.count():
        shutil.rmtree(root / "run")
        shutil.copytree(root / "before", root / "run")
        was_killed = killed_at(number, lambda: write_checkpoint(folder, template, new, root / "model"))
        if folder.is_dir():
            assert {path.name for path in folder.iterdir()} == files, number
            there = load_file(folder / "model.safetensors")[name]
            seen.append("new" if torch.equal(there, new[name]) else "old" if torch.equal(there, weights[name]) else "neither")
        else:
            seen.append("none")
        cut_back(root / "run", 0)
        assert [path for path in folder.parent.iterdir() if path != folder] == [], number
        if not was_killed:
            break
    assert "neither" not in seen and seen[-1] == "new" and seen.count("old") > 10 and seen.count("none") == 1
    assert seen == sorted(seen, key=["old", "none", "new"].index)


def test_a_kill_while_old_hugging_face_checkpoints_are_removed_leaves_no_half_of_one(tmp_path: Path) -> None:
    for number in itertools.count():
        for step in range(4):
            (tmp_path / "checkpoints" / f"step_00000{step}").mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "model.safetensors"):
                (tmp_path / "checkpoints" / f"step_00000{step}" / name).write_bytes(b"x")

        def work(of_a_resumed_run: bool = bool(number % 2)) -> None:
            cut_back(tmp_path, 1) if of_a_resumed_run else keep_last(tmp_path / "checkpoints", 2)

        was_killed = killed_at(number // 2, work)
        for folder in (tmp_path / "checkpoints").iterdir():
            assert "partial" in folder.name or len(list(folder.iterdir())) == 2, (number, folder)
        if not was_killed and number % 2:
            break
        cut_back(tmp_path, 3)
        assert not [f for f in (tmp_path / "checkpoints").iterdir() if "partial" in f.name]
    assert number > 8
