"""Adapters and preferences on two ranks over gloo, in real processes, against one."""

import multiprocessing
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_trainer_engine import relative_difference
from trainer_setup import make_batch, make_config, save_small_model

from areal.config import DPOConfig, RefConfig
from areal.models.lora import is_adapter
from areal.ops.weights_hash import weights_hash
from areal.preferences import Pair, make_dpo_batch
from areal.trainer.engine import RankMinibatch, TrainEngine
from areal.trainer.mesh import RankMesh
from areal.trainer.sharding import full_tensor
from areal.types import Trajectory
from areal.weight_sync.stream import hash_tensors

pytestmark = pytest.mark.timeout(300)

LORA = {"lora": {"rank": 4, "alpha": 8.0}, "optimizer": {"lr": 5e-3}}
CASES = {
    "lora": LORA,
    "thin": {**LORA, "lora": {"rank": 1, "alpha": 2.0, "target_modules": ["q_proj", "down_proj"]}},
    "checkpointing": {**LORA, "gradient_checkpointing": True},
    "bfloat16": {**LORA, "dtype": "bfloat16"},
    "dpo": {"optimizer": {"lr": 1e-3}},
    "dpo_lora": LORA,
    "context": LORA,
    "dpo_context": {"optimizer": {"lr": 1e-3}},
    "replicas": LORA,
}
"""Of ``thin`` the second rank has no part of A."""
LAYOUTS = {"context": "fsdp:d1c2", "dpo_context": "fsdp:d1c2", "replicas": "fsdp:d2r2"}


class Recording(TrainEngine):
    """Keeps the whole gradients of every optimizer step."""

    def _optimizer_step(self, lr_scale, stats):
        gradients = {n: full_tensor(p.grad).clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.gradients = [*getattr(self, "gradients", []), gradients]
        super()._optimizer_step(lr_scale, stats)


def make_pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        prompt = rng.integers(2, 40, rng.integers(3, 9))
        answers = []
        for _ in range(2):
            ids = np.concatenate([prompt, rng.integers(2, 40, rng.integers(1, 20))])
            mask = np.arange(len(ids)) >= len(prompt)
            answers.append(Trajectory(ids, mask, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int32), 0.0))
        pairs.append(Pair(*answers))
    return pairs


def run_case(folder, name, rank, world_size):
    dpo = DPOConfig(beta=0.5, label_smoothing=0.1)
    layout = LAYOUTS.get(name, f"fsdp:d{world_size}") if world_size > 1 else "fsdp:d1"
    # The behaviour log-probs of these batches are made up: the filter would drop most tokens, and leave sums that nearly cancel.
    config = make_config(folder / "model", folder, backend=layout, behav_filter_cap=None, **CASES[name])
    mesh = RankMesh(torch.device("cpu"), rank, config.trainer_layout)
    n_data, mine = config.trainer_layout.data, mesh.data_index
    engine = Recording(folder / "model", config.actor, temperature=0.9, mesh=mesh, ref=RefConfig() if "dpo" in name else None, seed=5)
    microbatch = make_batch().minibatches[0].ranks[0][0]
    before, stats = engine.logprobs(microbatch), []
    for step in range(3):
        if "dpo" in name:  # five pairs on two ranks: one of them is filled up
            batch = make_dpo_batch(make_pairs(5, seed=step), 90, n_data)
            stats.append(engine.dpo_step(RankMinibatch(batch.ranks[mine], batch.denominator), dpo))
        else:
            batch = make_batch(n_minibatches=2, capacity=130, world_size=n_data, seed=step)
            stats.append(engine.train_step([RankMinibatch(m.ranks[mine], m.denominator) for m in batch.minibatches]))
    result = {
        "gradients": engine.gradients,
        "stats": stats,
        "weights": engine.snapshot(),
        "logprobs": (before, engine.logprobs(microbatch)),
    }
    if engine.actor.adapters is not None:
        with engine.actor.without_adapters():
            result["without"] = engine.logprobs(microbatch)
        device = torch.device("cpu") if rank == 0 else None
        streamed = hash_tensors(engine.gatherer.gather, engine.gatherer.bucket_plan(9_000), device)
        result["streamed"] = sum(streamed.values()) & (2**64 - 1)
        result["parts"] = {n: t.clone() for part in engine.gatherer.parts(9_000) for n, t in part.items()}
        result["adapter"] = engine.adapter_snapshot()
        info = engine.use_adapters_alone(9_000)
        result["base"] = info.base
        result["adapter_streamed"] = hash_tensors(engine.gatherer.gather, engine.gatherer.bucket_plan(9_000), device)
    return result


def run_rank(folder, rank, world_size):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=100))
    results = {name: run_case(folder, name, rank, world_size) for name in CASES}
    if rank == 0:
        torch.save(results, folder / f"ranks{world_size}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "model").mkdir()
    save_small_model(folder / "model")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(folder, rank, n)) for n in (1, 2) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    return [torch.load(folder / f"ranks{n}.pt", weights_only=False) for n in (1, 2)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "bfloat16"])
def test_gradients_of_two_ranks_are_those_of_one(results, name):
    one, two = results
    assert len(one[name]["gradients"]) == len(two[name]["gradients"]) == (3 if "dpo" in name else 6)
    for first, second in zip(one[name]["gradients"], two[name]["gradients"], strict=True):
        assert first.keys() == second.keys()
        assert "lora" not in CASES[name] or all(map(is_adapter, first))
        assert relative_difference(second, first) < 1e-6
    for n, weight in one[name]["weights"].items():
        torch.testing.assert_close(two[name]["weights"][n], weight, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", CASES)
def test_statistics_cover_all_ranks(results, name):
    one, two = results
    for first, second in zip(one[name]["stats"], two[name]["stats"], strict=True):
        for key in ("loss", "n_tokens", "grad_norm", *(("preference_accuracy", "margin", "chosen_reward") if "dpo" in name else ())):
            assert second[key] == pytest.approx(first[key], rel=0.02 if name == "bfloat16" else 1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", [name for name, actor in CASES.items() if "lora" in actor])
def test_what_leaves_two_ranks(results, name):
    for result in (r[name] for r in results):
        assert result["streamed"] == weights_hash(result["weights"]) == weights_hash(result["parts"])
        assert sum(result["adapter_streamed"].values()) & (2**64 - 1) == weights_hash(result["adapter"].factors)
        before, after = result["logprobs"]
        assert torch.equal(result["without"], before), "without adapters it is the model at the start"
        assert (after - before).abs().max() > 1e-3
    assert results[0][name]["base"] == results[1][name]["base"]


def test_bfloat16_adds_to_float32_adapters(results):
    for result in (r["bfloat16"] for r in results):
        assert all(g.dtype == torch.float32 for g in result["gradients"][0].values())
        assert all(f.dtype == torch.float32 for f in result["adapter"].factors.values())
        assert all(w.dtype == torch.bfloat16 for w in result["weights"].values())
        # The first step has no gradient of A, whose factor B is zero; so the last one.
        assert 1e-4 < relative_difference(result["gradients"][-1], results[0]["lora"]["gradients"][-1]) < 0.1
