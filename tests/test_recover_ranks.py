"""The ranks' side of recover checkpoints over gloo, in real processes: the same state on any number of ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_trainer_engine import rank_part
from trainer_setup import make_batch, make_config, save_small_model

from areal.config import CriticConfig, OptimizerConfig
from areal.recover_files import Files
from areal.trainer.engine import TrainEngine
from areal.trainer.inputs import to_device
from areal.trainer.mesh import RankMesh
from areal.trainer.recover import OtherModel, StateWriter, counters, restore, state_tensors
from areal.trainer.sharding import full_tensor

pytestmark = pytest.mark.timeout(360)

CASES = {
    "adamw": {"optimizer": {"lr": 1e-3, "warmup_steps": 10}},
    "muon": {"optimizer": {"type": "muon", "lr": 1e-3, "muon_lr": 1e-3}},
    "bfloat16": {"optimizer": {"lr": 1e-3}, "dtype": "bfloat16"},
    "critic": {"optimizer": {"lr": 1e-3}},
    "lora": {"optimizer": {"lr": 1e-3}, "lora": {"rank": 2}},
}
BACKENDS = {1: "fsdp:d1", 2: "fsdp:d2", 4: "fsdp:d4r2"}
RUNS = {
    (0, 1): ["adamw", "critic"],
    (0, 2): list(CASES),
    (1, 2): ["adamw", "critic"],
    (2, 1): list(CASES),
    (2, 2): ["adamw"],
    (2, 4): ["adamw", "muon"],
}
"""What is tried by n ranks that start, or go on from what m ranks left: (m, n)."""
RESTORED = [(m, n, name) for (m, n), names in RUNS.items() if m for name in names]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "areal.trainer.engine", "areal.trainer.recover", "test_recover_ranks"])


def full_state(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: full_tensor(t).clone() for name, t in state_tensors(engine.models).items()}


def step(engine: TrainEngine, number: int) -> None:
    mesh = engine.mesh
    engine.version = number
    parts = rank_part(make_batch(n_minibatches=2, capacity=130, world_size=mesh.world_size, seed=number), mesh.rank)
    if engine.critic is None:
        engine.train_step(parts)
        return
    for part in parts:
        for microbatch in part.microbatches:
            microbatch.values, microbatch.returns = np.zeros_like(microbatch.advantages), microbatch.advantages
    engine.train_step(parts, parts)


def make_engine(folder: Path, name: str, mesh: RankMesh) -> TrainEngine:
    config = make_config(folder / "model", folder, backend=BACKENDS[mesh.world_size], **CASES[name])
    critic = CriticConfig(optimizer=OptimizerConfig(lr=2e-3)) if name == "critic" else None
    return TrainEngine(folder / "model", config.actor, temperature=0.9, mesh=mesh, critic=critic, seed=mesh.world_size)


def write(engine: TrainEngine, folder: Path) -> Files:
    """What rank 0 was told; training goes on meanwhile."""
    told: list[Any] = []
    folder.mkdir(parents=True, exist_ok=True)
    writer = StateWriter(engine.mesh, lambda *answer: told.append(answer))
    writer.start(folder, engine)
    step(engine, 7)
    writer.wait()
    if engine.mesh.rank:
        return {}
    assert told[0][1] is None, told
    return told[0][2]


def run_case(folder: Path, name: str, mesh: RankMesh, restored_from: int) -> dict[str, Any]:
    """Two steps from the start, or the state that ``restored_from`` ranks left after theirs; then a checkpoint, and one more step."""
    engine = make_engine(folder, name, mesh)
    if restored_from:
        torch.manual_seed(mesh.rank + 100)
        before = to_device(make_batch(capacity=130).minibatches[0].ranks[0][0], mesh.device, 0)
        engine.actor.frozen_logprobs([before], 1.0)
        restore(folder / f"{name}-{restored_from}", engine)
    else:
        torch.manual_seed(mesh.rank + 1)
        step(engine, 0)
        step(engine, 1)
    state, draw = full_state(engine), float(torch.rand(1, generator=None))
    result = {"state": state, "counters": counters(engine), "draw": draw}
    if not restored_from:
        torch.manual_seed(mesh.rank + 1)
    target = folder / (f"{name}-{mesh.world_size}" if not restored_from else f"{name}-{restored_from}-{mesh.world_size}")
    result["files"] = write(engine, target)
    again = make_engine(folder, name, mesh)
    restore(target, again)
    step(again, 7)
    result["next"], other = full_state(engine), full_state(again)
    result["went_on"] = {name: torch.equal(tensor, other[name]) for name, tensor in result["next"].items()}
    return result


def run_rank(folder: Path, rank: int, world_size: int, restored_from: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    run = f"{restored_from}-{world_size}"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{run}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    results = {}
    for name in RUNS[restored_from, world_size]:
        config = make_config(folder / "model", folder, backend=BACKENDS[world_size])
        results[name] = run_case(folder, name, RankMesh(torch.device("cpu"), rank, config.trainer_layout), restored_from)
    torch.save(results, folder / f"result{run}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_all(folder: Path, *runs: tuple[int, int]) -> None:
    processes = [PROCESSES.Process(target=run_rank, args=(folder, rank, n, m)) for m, n in runs for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0] * len(processes)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    (folder / "model").mkdir()
    save_small_model(folder / "model")
    run_all(folder, (0, 1), (0, 2))
    run_all(folder, (1, 2), (2, 1), (2, 2))
    run_all(folder, (2, 4))
    return folder


def load(folder: Path, restored_from: int, world_size: int, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"result{restored_from}-{world_size}-{rank}.pt")


@pytest.mark.parametrize(("saved", "restored", "name"), RESTORED)
def test_models_and_optimizers_are_bit_for_bit_what_was_saved(results: Path, saved: int, restored: int, name: str) -> None:
    before, after = load(results, 0, saved)[name], load(results, saved, restored)[name]
    counted = {"actor/train_steps": 2, "actor/nonfinite_in_a_row": 0, "version": 1}
    if name == "critic":
        counted |= {"critic/train_steps": 2, "critic/nonfinite_in_a_row": 0}
    assert before["counters"] == after["counters"] == counted
    assert before["state"].keys() == after["state"].keys()
    slots = {key.rpartition("/")[2] for key in before["state"] if "/optimizer/" in key}
    assert slots == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if name == "muon" else set())
    assert name != "lora" or all(".lora_" in key for key in before["state"])
    assert {key.partition("/")[0] for key in before["state"]} == ({"actor", "critic"} if name == "critic" else {"actor"})
    for key, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][key]), key
        assert "/model/" in key or "step" in key or tensor.abs().sum() > 0, key


@pytest.mark.parametrize(("saved", "restored"), RUNS)
def test_training_goes_on_bit_for_bit(results: Path, saved: int, restored: int) -> None:
    """The step taken while the checkpoint was written is the step taken by an engine that was restored from it."""
    for name, result in load(results, saved, restored).items():
        assert all(result["went_on"].values()), (name, [key for key, same in result["went_on"].items() if not same])


def test_another_number_of_ranks_trains_on_alike(results: Path) -> None:
    want = load(results, 0, 2)["adamw"]["next"]
    for saved, restored in ((2, 1), (2, 4)):
        for key, tensor in load(results, saved, restored)["adamw"]["next"].items():
            if "/model/" in key:
                torch.testing.assert_close(tensor, want[key], rtol=1e-4, atol=1e-6)


def test_random_numbers_go_on_where_the_ranks_are_the_same(results: Path) -> None:
    for rank in range(2):
        draws = [load(results, *run, rank)["adamw"]["draw"] for run in ((0, 2), (2, 2), (1, 2))]
        assert draws[0] == draws[1] != draws[2]


def test_every_file_is_counted(results: Path) -> None:
    for world_size in (1, 2):
        folder = results / f"adamw-{world_size}"
        on_disk = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        assert {path: size for path, (size, _) in load(results, 0, world_size)["adamw"]["files"].items()} == on_disk
        assert json.loads((folder / "rank_0000.json").read_text())["world_size"] == world_size


def test_another_model_is_refused_by_name(results: Path, tmp_path: Path) -> None:
    for change, what in (
        ({"num_hidden_layers": 3}, r"'actor/model/model.layers.2\S+' has no place there and the shape .* here; give actor.path"),
        ({"hidden_size": 64}, r"has the shape \(40, 32\) there and the shape \(40, 64\) here"),
    ):
        save_small_model(tmp_path, **change)
        config = make_config(tmp_path, tmp_path, optimizer={"lr": 1e-3})
        engine = TrainEngine(tmp_path, config.actor)
        start = {name: t.clone() for name, t in full_state(engine).items()}
        with pytest.raises(OtherModel, match=what):
            restore(results / "adamw-2", engine)
        assert all(torch.equal(t, start[name]) for name, t in full_state(engine).items())
