"""Recover checkpoints on the disk: whole under their name or not there at all, checked before they are trusted, tidied up.

<run folder>/recover/step_000040/
    checksums.json   every other file with its size and digest
    state.json       what the controller knows;  rows.pickle, of `areal train`: prompts that were read and not trained on yet
    rank_0000.json   a rank's random numbers and counters
    models/          parameters and optimizers, by torch.distributed.checkpoint

A checkpoint is written as ``step_000040.partial-<pid>`` and renamed when all of it is synced. What a killed run left under such a name is
never taken, and removed at the next start. One whose content is not what ``checksums.json`` says becomes ``step_000040.damaged``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

CHECKSUMS = "checksums.json"
_NAME = re.compile(r"step_(\d{6,})")
_PARTIAL = ".partial-"
_READERS = 8
_LOGS = ("metrics.jsonl", "warmup.jsonl", "evaluations.jsonl", "timeline.jsonl", "trajectories.jsonl")

Files = dict[str, tuple[int, str]]
"""Path within the checkpoint -> bytes, and ``file_digest``."""


def recover_folder(run_folder: Path) -> Path:
    return run_folder / "recover"


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def file_digest(path: Path) -> str:
    """BLAKE2b of 16 bytes, as hex digits; the lock of the interpreter is free meanwhile."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _digest).hexdigest()


def _digest(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


# -- writing ----------------------------------------------------------------------------------------------------------------------


def begin_checkpoint(run_folder: Path, step: int) -> Path:
    """An empty folder to write into, without a name that anybody would take."""
    partial = recover_folder(run_folder) / f"{checkpoint_name(step)}{_PARTIAL}{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_checkpoint(partial: Path, files: Files, own: Mapping[str, bytes]) -> Path:
    """Adds the controller's ``own`` files and the checksums to what the ranks wrote (and synced), and gives the folder its name."""
    for name, content in own.items():
        _write_synced(partial / name, content)
    known = {name: list(entry) for name, entry in files.items()}
    known |= {name: [len(content), _digest(content).hexdigest()] for name, content in own.items()}
    _write_synced(partial / CHECKSUMS, json.dumps({"files": known}, indent=1).encode())
    for folder in {(partial / name).parent for name in known} | {partial}:
        sync(folder)
    final = partial.with_name(partial.name.partition(_PARTIAL)[0])
    if final.exists():  # written again by a run that went on from before it
        remove(final)
    partial.rename(final)
    sync(final.parent)
    return final


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_logs(run_folder: Path) -> None:
    """What the run wrote down so far outlives a power failure, as the checkpoint that refers to it does."""
    for name in _LOGS:
        with suppress(FileNotFoundError):
            sync(run_folder / name)


def remove(folder: Path) -> None:
    """First the name, then the files: nobody finds half a checkpoint."""
    doomed = folder
    if _PARTIAL not in folder.name:
        doomed = folder.with_name(f"{folder.name}{_PARTIAL}removed-{os.getpid()}")
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def keep_newest(run_folder: Path, n: int) -> None:
    """Removes all recover checkpoints but the newest ``n``."""
    for folder in checkpoints(run_folder)[n:]:
        remove(folder)


# -- reading ----------------------------------------------------------------------------------------------------------------------


def checkpoints(run_folder: Path) -> list[Path]:
    """Those that have their name, the newest first."""
    folder = recover_folder(run_folder)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def what_is_wrong(folder: Path) -> str:
    """Reads every byte of a checkpoint and compares it with its checksums; empty when all is well."""
    try:
        files = {name: (int(size), str(digest)) for name, (size, digest) in json.loads((folder / CHECKSUMS).read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    with ThreadPoolExecutor(_READERS, "checksums") as readers:
        found = readers.map(lambda item: _wrong_file(folder / item[0], item[0], *item[1]), files.items())
        return next((wrong for wrong in found if wrong), "")


def _wrong_file(path: Path, name: str, size: int, digest: str) -> str:
    try:
        if (actual := path.stat().st_size) != size:
            return f"{name} has {actual} bytes instead of {size}"
        return "" if file_digest(path) == digest else f"{name} has other bytes than were written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def set_aside(folder: Path) -> None:
    """A damaged checkpoint keeps its files under another name, which nobody takes."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


# -- the files of a run that goes on --------------------------------------------------------------------------------------------------


def cut_back(run_folder: Path, step: int, *, of_warmup: bool = False) -> list[str]:
    """Takes a run's files back to the moment after ``step`` train steps, so that what it writes from there on stands there once.

    Rows of later steps go, and so does a last line that was cut off; half-written checkpoints, and Hugging Face checkpoints of later
    steps, which came from weights that this run will not have. ``of_warmup``: the steps are those of warmup.jsonl. Returns the names of the
    Hugging Face checkpoints that went.
    """
    _cut(run_folder / "metrics.jsonl", lambda row: row["step"] <= step)
    _cut(run_folder / "evaluations.jsonl", lambda row: row["step"] <= step and row["when"] != "after")
    _cut(run_folder / "trajectories.jsonl", lambda row: row["step"] < step)  # numbered by the version that was trained
    _cut(run_folder / "warmup.jsonl", (lambda row: row["step"] <= step) if of_warmup else None)
    _cut(run_folder / "timeline.jsonl", None)
    (run_folder / "summary.json").unlink(missing_ok=True)
    later = []
    for folder in [*run_folder.glob("recover/*"), *run_folder.glob("checkpoints/*")]:
        if _PARTIAL in folder.name:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.parent.name == "checkpoints" and _NAME.fullmatch(folder.name) and step_of(folder) > step:
            remove(folder)
            later.append(folder.name)
    return sorted(later)


def _cut(path: Path, keep: Callable[[dict[str, Any]], bool] | None) -> None:
    """Cuts the file before its first row that is not to be kept, or that is no whole line."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or (keep is not None and not _is_kept(line, keep)):
                break
            end += len(line)
    os.truncate(path, end)


def _is_kept(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(orjson.loads(line))
    except (orjson.JSONDecodeError, KeyError, TypeError):  # what a failing file system made of a row
        return False


def what_is_done(run_folder: Path, step: int) -> set[str]:
    """Which of "checkpoint" and "evaluation" the run did at that step, before it was cut off."""
    done = {"checkpoint"} if (run_folder / "checkpoints" / checkpoint_name(step)).is_dir() else set()
    evaluations = run_folder / "evaluations.jsonl"
    if evaluations.is_file() and any(orjson.loads(line)["when"] == f"step {step}" for line in evaluations.read_bytes().splitlines()):
        done.add("evaluation")
    return done
