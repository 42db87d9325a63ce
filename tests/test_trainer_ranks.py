"""Two ranks over gloo, in real processes, against one: the same gradients and the same weights."""

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trainer_engine import RecordingEngine, rank_part, relative_difference
from trainer_setup import make_batch, make_config, save_small_model

from areal.models.loading import load_model
from areal.ops.weights_hash import weights_hash
from areal.trainer.checkpoint import write_checkpoint
from areal.trainer.engine import RankMinibatch
from areal.trainer.mesh import RankMesh
from areal.trainer.sharding import full_tensor
from areal.trainer.step_stats import StepStats

pytestmark = pytest.mark.timeout(240)

MUON = {"optimizer": {"type": "muon", "lr": 1e-3, "muon_lr": 1e-3}}
CASES = {
    "tied": ({}, {}),
    "untied": ({"tie_word_embeddings": False}, {}),
    "muon": ({}, MUON),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "bfloat16": ({}, {"dtype": "bfloat16"}),
}


class FullGradients(RecordingEngine):
    """Also the loss of every optimizer step, over all ranks."""

    def _optimizer_step(self, lr_scale, stats):
        loss = stats.minibatch_loss * self.mesh.counts
        if self.mesh.world_size > 1:
            dist.all_reduce(loss)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        self.full = [*getattr(self, "full", []), {n: full_tensor(p.grad).clone() for n, p in self.model.named_parameters()}]
        super()._optimizer_step(lr_scale, stats)


def run_case(folder, name, rank, world_size):
    """Two train steps of two mini-batches and one supervised step; what rank 0 saw."""
    _, actor = CASES[name]
    config = make_config(folder / name, folder, backend=f"fsdp:d{world_size}", **actor)
    engine = FullGradients(folder / name, config.actor, temperature=0.9, mesh=RankMesh(torch.device("cpu"), rank, config.trainer_layout))
    stats = []
    for step in range(2):
        engine.version = step
        stats.append(engine.train_step(rank_part(make_batch(n_minibatches=2, capacity=130, world_size=world_size, seed=step), rank)))
    stats.append(engine.sft_step(rank_part(make_batch(capacity=130, world_size=world_size), rank)[0], 0.5))
    weights = engine.snapshot()
    if rank == 0 and world_size == 2:
        write_checkpoint(folder / f"{name}-saved", engine.template, weights, folder / name)
    result = {"full": list(engine.full), "stats": stats, "weights": weights}
    return result | {"lost": [lose(engine, rank, lost_on) for lost_on in (world_size - 1, None)]}


def lose(engine, rank, lost_on):
    """An optimizer step whose loss is not finite on one rank, while all gradients are: was it taken, and is anything changed?"""
    before = engine.snapshot()
    microbatch = make_batch(capacity=130, world_size=engine.mesh.world_size).minibatches[0].ranks[rank][0]
    engine.backward(engine._put(microbatch), None, 0.0, RankMinibatch([microbatch], 100.0), StepStats(engine.device))
    step = engine.actor.optimizer_step(1.0, torch.tensor(float("nan") if rank == lost_on else 0.5))
    after = engine.snapshot()
    return step.finite, rank != 0 or all(torch.equal(before[n], w) for n, w in after.items())


def run_rank(folder, rank, world_size):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    results = {name: run_case(folder, name, rank, world_size) for name in CASES}
    if rank == 0:
        torch.save(results, folder / f"ranks{world_size}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, (model, _) in CASES.items():
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
    return folder, *(torch.load(folder / f"ranks{n}.pt", weights_only=False) for n in (1, 2))


@pytest.mark.parametrize("name", ["tied", "untied", "checkpointing"])
def test_gradients_of_two_ranks_are_those_of_one(results, name):
    _, one, two = results
    assert len(one[name]["full"]) == len(two[name]["full"]) == 5
    # The later ones come after optimizer steps, which would not see a stale unsharded root.
    for first, second in zip(one[name]["full"], two[name]["full"], strict=True):
        assert relative_difference(second, first) < 1e-6
    for n, weight in one[name]["weights"].items():
        torch.testing.assert_close(two[name]["weights"][n], weight, rtol=0, atol=3e-5)


def test_loss_of_one_rank_skips_the_step_of_all(results):
    for result in results[1:]:
        assert result["tied"]["lost"] == [(False, True), (True, False)]


def test_muon_of_two_ranks_is_that_of_one(results):
    _, one, two = results
    assert relative_difference(two["muon"]["full"][0], one["muon"]["full"][0]) < 1e-6
    assert relative_difference(two["muon"]["weights"], one["muon"]["weights"]) < 1e-3  # bfloat16 iterations


def test_bfloat16_keeps_float32_masters(results):
    _, one, two = results
    for case in (one, two):
        assert all(g.dtype == torch.float32 for g in case["bfloat16"]["full"][0].values())
        assert all(w.dtype == torch.bfloat16 for w in case["bfloat16"]["weights"].values())
        assert 1e-4 < relative_difference(case["bfloat16"]["full"][0], one["tied"]["full"][0]) < 0.05
    assert two["bfloat16"]["stats"][0]["ratio_mean"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", ["tied", "untied", "checkpointing"])
def test_statistics_cover_all_ranks(results, name):
    _, one, two = results
    for first, second in zip(one[name]["stats"], two[name]["stats"], strict=True):
        for key, value in first.items():
            if key == "logprob_drift":
                assert second[key]["n"] == value["n"]
                if value["n"]:
                    assert second[key]["max_abs"] == pytest.approx(value["max_abs"], rel=1e-4, abs=1e-6)
                    assert second[key]["mean_abs"] == pytest.approx(value["mean_abs"], rel=1e-4, abs=1e-6)
            elif key not in ("spans", "meters"):
                assert second[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_of_two_ranks(results, name):
    folder, _, two = results
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    loaded = load_model(Path(folder) / f"{name}-saved", dtype=dtype)
    assert weights_hash(dict(loaded.named_parameters())) == weights_hash(two[name]["weights"])
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (name != "untied")
