"""``areal replay-batch``: a train step that was not finite, computed again alone, and where in it that begins."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from areal.config import ConfigError, TrainerLayout
from areal.config_check import check_device

EXIT_FOUND = 1


def replay_folder(path: Path) -> Path:
    """The dumped step that ``path`` means: its folder, a file in it, or the last one of a run."""
    path = path.expanduser()
    folder = path.parent if path.is_file() else path
    if (folder / "replay.json").is_file():
        return folder
    within = folder if folder.name == "replay" else folder / "replay"
    steps = sorted(within.glob("*/replay.json"), key=lambda file: file.stat().st_mtime)
    if not steps:
        raise ConfigError(
            f"'{path}' holds no dumped train step",
            "give the folder that the run named when it ended, e.g. runs/NAME/TRIAL/replay/step_000007",
        )
    return steps[-1].parent


def run_replay(path: Path, *, device: str, threads: int, as_json: bool) -> int:
    """Prints what was found, the place where it begins first; 1 where something is not finite, 0 where all is."""
    check_device("--device", device)
    folder = replay_folder(path)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from areal.trainer.diagnosis import diagnose
    from areal.trainer.engine import TrainEngine
    from areal.trainer.failed_step import load
    from areal.trainer.mesh import RankMesh

    try:
        step = load(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the dumped step '{folder}' cannot be read: {error}", "it may have been written by another version") from error
    disable_progress_bar()
    torch.set_num_threads(threads)
    where = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)
    # Adapters are merged into the weights, and nothing else of the configuration changes loss and gradients.
    actor = step.actor.model_copy(update={"backend": "fsdp:d1", "lora": None, "offload": False})
    with tempfile.TemporaryDirectory(prefix="areal-") as scratch:
        if actor.dtype != "float32":
            torch.distributed.init_process_group(
                "nccl" if where.type == "cuda" else "gloo", init_method=f"file://{scratch}/store", rank=0, world_size=1
            )
        try:
            engine = TrainEngine(step.weights, actor, temperature=step.temperature, mesh=RankMesh(where, 0, TrainerLayout(1)))
            result = diagnose(engine, step)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    if as_json:
        print(json.dumps({"step": str(folder), **asdict(result)}, indent=2))
        return EXIT_FOUND if result.findings else 0
    for finding in result.findings:
        print(f"{finding.where}: {finding.what}")
    if not result.findings:
        numbers = "; ".join(f"loss {a:g}, norm of the gradient {b:g}" for a, b in zip(result.losses, result.grad_norms, strict=True))
        print(f"everything is finite on {where}: {numbers}")
    return EXIT_FOUND if result.findings else 0
