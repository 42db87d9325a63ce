"""The folder of a run and the model it starts from.

fileroot/experiment_name/trial_name/
    config.yaml      the resolved configuration
    init/            the starting model, when it is made from scratch
    logs/            one file a process
    metrics.jsonl    one row a train step;  timeline.jsonl, tensorboard/, trajectories.jsonl
    checkpoints/     Hugging Face checkpoints;  final/ is the result
    recover/         what a run that is cut off goes on from (recover_files.py)
    replay/          a train step that was not finite, for areal replay-batch
    summary.json     written last
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from areal.config import ConfigError, GRPOConfig
from areal.recover_files import remove

_LOCK = ".running"
_LOOKS = 10


def create_run_folder(config: GRPOConfig) -> Path:
    """A new, empty folder; an earlier run of the same name is kept beside it with a number behind its name."""
    folder = run_folder_of(config)
    refuse_running(folder)
    try:
        if folder.exists() and any(folder.iterdir()):
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(aside)
        (folder / "logs").mkdir(parents=True)
        write_config(config, folder)
    except OSError as error:
        raise ConfigError(
            f"the run's folder {folder} cannot be written ({error.strerror})", "set stats_logger.fileroot to a folder where it can"
        ) from error
    return folder


def run_folder_of(config: GRPOConfig) -> Path:
    return (Path(config.stats_logger.fileroot).expanduser() / config.experiment_name / config.trial_name).absolute()


def refuse_running(folder: Path) -> None:
    if _is_running(folder):
        raise ConfigError(f"a run that is going on writes to {folder}", "give this one another trial_name")


def write_config(config: GRPOConfig, folder: Path) -> None:
    """``config.yaml``: the configuration as it is in force from now on."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Marks the folder as that of a run that is going on, until this process ends, in whatever way.

    ``ConfigError`` where another one did that since ``refuse_running`` was asked.
    """
    with (folder / _LOCK).open("wb") as file:
        with suppress(OSError):  # a file system without locks
            if not _takes_lock(file):
                raise ConfigError(f"a run that is going on writes to {folder}", "give this one another trial_name")
        yield


def _takes_lock(file: BinaryIO) -> bool:
    """Those who only look hold a lock too, for a moment."""
    for _ in range(_LOOKS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def _is_running(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        pass
    return False


def prepare_model(config: GRPOConfig, run_folder: Path) -> Path:
    """The folder of the starting model: ``actor.path``, or one made from random weights and the task's tokenizer."""
    if config.actor.path:
        path = Path(config.actor.path).expanduser()
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"actor.path={config.actor.path} is not a Hugging Face model folder (it has no config.json); give the path of one"
            )
        return path
    folder = run_folder / "init"
    if (folder / "tokenizer_config.json").is_file():  # of the run that goes on
        return folder
    from transformers.utils.logging import disable_progress_bar

    from areal.models.loading import create_model
    from areal.tasks.arithmetic import build_tokenizer

    if config.train_dataset.type != "arithmetic":
        raise ConfigError(
            "actor.init_from_scratch needs a data set that brings its tokenizer (train_dataset.type=arithmetic); give actor.path instead"
        )
    tokenizer = build_tokenizer(config.train_dataset.max_terms)
    special = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    disable_progress_bar()  # it would draw over the display
    model = create_model({**special, **(config.actor.init_from_scratch or {})}, seed=config.seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_config(config: GRPOConfig) -> Mapping[str, Any]:
    """The Hugging Face config of the actor; empty where it cannot be read."""
    if config.actor.init_from_scratch is not None:
        return config.actor.init_from_scratch
    try:
        tree = json.loads((Path(config.actor.path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def load_tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without tokenizer files
            raise ValueError("its vocabulary is empty")
        return tokenizer
    except Exception as error:  # transformers and tokenizers raise whatever their parsers raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"actor.path={model_folder} has no tokenizer that can be loaded ({first_line})",
            "put tokenizer.json and tokenizer_config.json there",
        ) from error


def keep_last(checkpoints: Path, n: int) -> None:
    """Removes all step checkpoints but the last ``n``; one that cannot be removed stays."""
    for folder in sorted(f for f in checkpoints.glob("step_*") if f.name.removeprefix("step_").isdigit())[:-n]:
        with suppress(OSError):
            remove(folder)
