"""Objectives that need all log-probs of a sequence, under FSDP2 on two ranks over gloo: the same gradients as on one."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_objectives import CASES, TEMPERATURE, VERSION, make_parts
from test_trainer_engine import relative_difference
from test_trainer_ranks import FullGradients
from trainer_setup import make_config, save_small_model

from areal.trainer.mesh import RankMesh

pytestmark = pytest.mark.timeout(240)

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "softcap": {"model_type": "gemma2", "final_logit_softcapping": 5.0, "head_dim": 8},
}
RUNS = [("grpo", "tied"), ("gspo", "tied"), ("gspo", "untied"), ("cispo", "untied"), ("dr_grpo", "tied"), ("loglinear", "tied"),
        ("mis", "untied"), ("k1", "softcap")]  # fmt: skip


def run_case(folder: Path, name: str, model: str, rank: int, world_size: int) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    actor = {**CASES[name].actor, "optimizer": {"lr": 0.2, "eps": 1e-2, "gradient_clipping": 1e9}, "backend": f"fsdp:d{world_size}"}
    config = make_config(folder / model, folder, **actor)
    engine = FullGradients(
        folder / model, config.actor, temperature=TEMPERATURE, mesh=RankMesh(torch.device("cpu"), rank, config.trainer_layout)
    )
    engine.version = VERSION
    stats = engine.train_step(make_parts(config.actor, 60, world_size, rank))
    return engine.full, stats


def run_rank(folder: Path, rank: int, world_size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    results = {run: run_case(folder, *run, rank, world_size) for run in RUNS}
    if rank == 0:
        torch.save(results, folder / f"ranks{world_size}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    folder = tmp_path_factory.mktemp("objectives")
    for name, model in MODELS.items():
        (folder / name).mkdir()
        save_small_model(folder / name, **model)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(folder, rank, n)) for n in (1, 2) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    return [torch.load(folder / f"ranks{n}.pt", weights_only=False) for n in (1, 2)]


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_gradients_of_two_ranks_are_those_of_one(results: list[dict[tuple[str, str], Any]], run: tuple[str, str]) -> None:
    (one, stats_of_one), (two, stats_of_two) = (ranks[run] for ranks in results)
    assert len(one) == len(two) == 2
    for first, second in zip(one, two, strict=True):
        assert relative_difference(second, first) < 1e-6
    for key in ("loss", "clip_fraction", "kl_ref", "entropy", "kl_proximal"):
        if key in stats_of_one:
            assert stats_of_two[key] == pytest.approx(stats_of_one[key], rel=1e-4, abs=1e-6), key
