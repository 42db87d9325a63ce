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

from areal.config import CriticConfig, OptimizerConfig, RefConfig
from areal.config_trainer import parse_trainer_backend
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
RUNS = {
    ("", "d1"): ["adamw", "critic"],
    ("", "d2"): list(CASES),
    ("d1", "d2"): ["adamw", "critic"],
    ("d2", "d1"): list(CASES),
    ("d2", "d2"): ["adamw"],
    ("d2", "d1c2"): ["adamw", "muon", "bfloat16"],
    ("d2", "d4r2"): ["adamw", "muon"],
    ("d2-d1c2", "d2c2"): ["adamw"],
}
"""What is tried by a layout that starts, or goes on from what another one left: (left by, layout)."""
LEFT_BY = {"d1": ("", "d1"), "d2": ("", "d2"), "d2-d1c2": ("d2", "d1c2")}
"""The run that left it."""
RESTORED = [(m, n, name) for (m, n), names in RUNS.items() if m for name in names]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "areal.trainer.engine", "areal.trainer.recover", "test_recover_ranks"])


def full_state(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: full_tensor(t).clone() for name, t in state_tensors(engine.models).items()}


def step(engine: TrainEngine, number: int) -> None:
    mesh = engine.mesh
    engine.version = number
    parts = rank_part(make_batch(n_minibatches=2, capacity=130, world_size=mesh.layout.data, seed=number), mesh.data_index)
    if engine.critic is None:
        engine.train_step(parts)
        return
    for part in parts:
        for microbatch in part.microbatches:
            microbatch.values, microbatch.returns = np.zeros_like(microbatch.advantages), microbatch.advantages
    engine.train_step(parts, parts)


def make_engine(folder: Path, name: str, mesh: RankMesh) -> TrainEngine:
    config = make_config(folder / "model", folder, **CASES[name])
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


def run_case(folder: Path, name: str, mesh: RankMesh, layout: str, restored_from: str) -> dict[str, Any]:
    """Two steps from the start, or the state that ``restored_from`` left after its own; then a checkpoint, and one more step."""
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
    target = folder / (f"{name}-{layout}" if not restored_from else f"{name}-{restored_from}-{layout}")
    result["files"] = write(engine, target)
    again = make_engine(folder, name, mesh)
    restore(target, again)
    step(again, 7)
    result["next"], other = full_state(engine), full_state(again)
    result["went_on"] = {name: torch.equal(tensor, other[name]) for name, tensor in result["next"].items()}
    return result


def run_rank(folder: Path, rank: int, layout: str, restored_from: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    run, parsed = f"{restored_from}-{layout}", parse_trainer_backend(f"fsdp:{layout}")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{run}", rank=rank, world_size=parsed.world_size, timeout=timedelta(seconds=60)
    )
    mesh = RankMesh(torch.device("cpu"), rank, parsed)
    results = {name: run_case(folder, name, mesh, layout, restored_from) for name in RUNS[restored_from, layout]}
    torch.save(results, folder / f"result{run}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_all(folder: Path, *runs: tuple[str, str]) -> None:
    sizes = {n: parse_trainer_backend(f"fsdp:{n}").world_size for _, n in runs}
    processes = [PROCESSES.Process(target=run_rank, args=(folder, rank, n, m)) for m, n in runs for rank in range(sizes[n])]
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
    run_all(folder, ("", "d1"), ("", "d2"))
    run_all(folder, ("d1", "d2"), ("d2", "d1"), ("d2", "d2"), ("d2", "d1c2"))
    run_all(folder, ("d2", "d4r2"), ("d2-d1c2", "d2c2"))
    return folder


def load(folder: Path, restored_from: str, layout: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"result{restored_from}-{layout}-{rank}.pt")


@pytest.mark.parametrize(("saved", "restored", "name"), RESTORED)
def test_models_and_optimizers_are_bit_for_bit_what_was_saved(results: Path, saved: str, restored: str, name: str) -> None:
    before, after = load(results, *LEFT_BY[saved])[name], load(results, saved, restored)[name]
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
def test_training_goes_on_bit_for_bit(results: Path, saved: str, restored: str) -> None:
    """The step taken while the checkpoint was written is the step taken by an engine that was restored from it."""
    for name, result in load(results, saved, restored).items():
        assert all(result["went_on"].values()), (name, [key for key, same in result["went_on"].items() if not same])


def test_another_number_of_ranks_trains_on_alike(results: Path) -> None:
    want = load(results, "", "d2")["adamw"]["next"]
    for saved, restored in (("d2", "d1"), ("d2", "d1c2"), ("d2", "d4r2"), ("d2-d1c2", "d2c2")):
        for key, tensor in load(results, saved, restored)["adamw"]["next"].items():
            if "/model/" in key:
                torch.testing.assert_close(tensor, want[key], rtol=1e-4, atol=1e-6)


def test_random_numbers_go_on_where_the_ranks_are_the_same(results: Path) -> None:
    for rank in range(2):
        draws = [load(results, *run, rank)["adamw"]["draw"] for run in (("", "d2"), ("d2", "d2"), ("d1", "d2"))]
        assert draws[0] == draws[1] != draws[2]


def test_every_file_is_counted(results: Path) -> None:
    for world_size in (1, 2):
        folder = results / f"adamw-d{world_size}"
        on_disk = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        assert {path: size for path, (size, _) in load(results, "", f"d{world_size}")["adamw"]["files"].items()} == on_disk
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
            restore(results / "adamw-d2", engine)
        assert all(torch.equal(t, start[name]) for name, t in full_state(engine).items())


def test_a_reference_that_is_not_wanted_any_more_is_left_out(results: Path, tmp_path: Path) -> None:
    config = make_config(results / "model", tmp_path, optimizer={"lr": 1e-3})
    engine = TrainEngine(results / "model", config.actor, ref=RefConfig(), warms_up=True)
    step(engine, 0)
    state = full_state(engine)
    assert {key.partition("/")[0] for key in state} == {"actor", "ref"}
    write(engine, tmp_path / "saved")
    without = TrainEngine(results / "model", config.actor)
    restore(tmp_path / "saved", without)
    for key, tensor in full_state(without).items():
        assert torch.equal(tensor, state[key]), key
    (tmp_path / "again").mkdir()
    write(without, tmp_path / "again")
    with pytest.raises(OtherModel, match=r"'ref/model/\S+' has no place there"):
        restore(tmp_path / "again", engine)
