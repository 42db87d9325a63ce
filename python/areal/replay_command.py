"""``areal replay-batch``: a train step that was not finite, computed again alone, and where in it that begins."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from areal.trainer.diagnosis import Diagnosis
    from areal.trainer.failed_step import FailedStep

_EXIT_FOUND = 1


def add_replay(commands: argparse._SubParsersAction[Any]) -> None:
    """The arguments of the command; nothing heavy is imported for them."""
    replay = commands.add_parser(
        "replay-batch",
        help="compute a train step again that was not finite",
        description="Compute a dumped train step again, alone, and say where its first NaN or infinity is; exit code 1 where there is one.",
    )
    replay.add_argument("step", metavar="STEP", help="the folder that the run named, e.g. runs/NAME/TRIAL/replay/step_000007, or the run's")
    replay.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    replay.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="CPU threads")
    replay.add_argument("--json", action="store_true", help="for scripts")


def replay_folder(path: Path) -> Path:
    """The dumped step that ``path`` means: its folder, a file in it, or the last one of a run."""
    from areal.config import ConfigError

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


def run_replay(args: argparse.Namespace) -> int:
    """Prints what was found, the place where it begins first; 1 where something is not finite, 0 where all is."""
    from areal.config import ConfigError
    from areal.config_check import check_device

    check_device("--device", args.device)
    if args.threads < 1:
        raise ConfigError(f"--threads={args.threads} is no number of threads", "give 1 or more")
    folder = replay_folder(Path(args.step))
    import torch
    from transformers.utils.logging import disable_progress_bar

    from areal.trainer.failed_step import load

    try:
        step = load(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the dumped step '{folder}' cannot be read: {error}", "it may have been written by another version") from error
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    on_gpu = args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu or args.device == "cuda" else "cpu" if args.device == "auto" else args.device)
    result = _diagnose(step, device)
    if args.json:
        print(json.dumps({"step": str(folder), **asdict(result)}, indent=2))
        return _EXIT_FOUND if result.findings else 0
    for finding in result.findings:
        print(f"{finding.where}: {finding.what}")
    if not result.findings:
        numbers = "; ".join(f"loss {a:g}, norm of the gradient {b:g}" for a, b in zip(result.losses, result.grad_norms, strict=True))
        print(f"everything is finite on {device}: {numbers}")
    return _EXIT_FOUND if result.findings else 0


def _diagnose(step: FailedStep, device: torch.device) -> Diagnosis:
    """On one rank in this process."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file

    from areal.config import TrainerLayout
    from areal.models.value_head import value_head_parameters
    from areal.trainer.checkpoint import ADAPTER_FOLDER
    from areal.trainer.diagnosis import diagnose
    from areal.trainer.engine import TrainEngine
    from areal.trainer.mesh import RankMesh
    from areal.trainer.sharding import local_part
    from areal.weight_sync.adapter import WEIGHTS

    lora = None if step.kind == "critic" else step.actor.lora  # a critic has no adapters
    # One rank, whatever the layout was: it changes neither loss nor gradients.
    actor = step.actor.model_copy(update={"backend": "fsdp:d1", "lora": lora, "offload": False})
    critic = None if step.critic is None else step.critic.model_copy(update={"path": "", "shared": True})
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory(prefix="areal-") as scratch:
        if actor.dtype != "float32":
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=f"file://{scratch}/store", rank=0, world_size=1)
        try:
            mesh = RankMesh(device, 0, TrainerLayout(1))
            engine = TrainEngine(step.weights, actor, temperature=step.temperature, mesh=mesh, critic=critic)
            if engine.actor.adapters is not None:
                engine.actor.adapters.load(load_file(step.weights / ADAPTER_FOLDER / WEIGHTS))
            with torch.no_grad():
                for name, parameter in value_head_parameters(engine.model).items():
                    local_part(parameter).copy_(torch.from_numpy(step.value_head[name]))
            return diagnose(engine, step)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
