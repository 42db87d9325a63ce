"""Critic, shared value head and reference model on two ranks over gloo, in real processes, against one."""

import multiprocessing
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_critic import NO_NORM, rank_part, samples_of
from trainer_setup import MODEL, make_config, make_groups, save_small_model

from areal.config import CriticConfig, RefConfig
from areal.models.loading import create_model
from areal.packer import collect, fill, make_train_batch
from areal.trainer.engine import TrainEngine
from areal.trainer.mesh import RankMesh
from areal.trainer.sharding import full_tensor

pytestmark = pytest.mark.timeout(240)

CASES = {
    "own": ({}, {"ppo_n_minibatches": 2}, {}),
    "shared": ({}, {"shared": True}, {}),
    "untied": ({"tie_word_embeddings": False}, {"gradient_checkpointing": True}, {}),
    "context": ({}, {}, {}),
    "context_shared": ({}, {"shared": True}, {}),
    "bfloat16": ({}, {}, {"dtype": "bfloat16"}),
    "bfloat16_shared": ({}, {"shared": True}, {"dtype": "bfloat16"}),
}


def relative_difference(gradients, others):
    total = sum(float((gradients[n] - others[n]).double().norm() ** 2) for n in others)
    return (total / sum(float(g.double().norm() ** 2) for g in others.values())) ** 0.5


def record(model, seen):
    step = model.optimizer_step

    def recorded(*args):
        seen.append({n: full_tensor(p.grad).clone() for n, p in model.model.named_parameters() if p.grad is not None})
        return step(*args)

    model.optimizer_step = recorded


def run_case(folder, name, rank, world_size):
    """Three times score and step; what rank 0 saw, and this rank's scores."""
    _, critic, actor = CASES[name]
    actor = {"kl_ctl": 0.1, "kl_in": "reward", "optimizer": {"lr": 1e-3}, **actor}
    backend = f"fsdp:d1c{world_size}" if "context" in name else f"fsdp:d{world_size}"  # two ranks share sequences
    config = make_config(folder / name, folder, backend=backend, **NO_NORM, **actor)
    critic = CriticConfig(**critic, **({} if critic.get("shared") else {"optimizer": {"lr": 1e-3}}))
    mesh = RankMesh(torch.device("cpu"), rank, config.trainer_layout)
    engine = TrainEngine(folder / name, config.actor, temperature=0.9, mesh=mesh, critic=critic, ref=RefConfig(path=str(folder / "other")))
    index = mesh.data_index
    seen, scores, stats = {n: [] for n in engine.models}, [], []
    for key, model in engine.models.items():
        record(model, seen[key])
    groups, rng = make_groups(), np.random.default_rng(4)
    for _ in range(3):
        # 5 groups of unequal lengths: ranks have different numbers of samples, and one may be filled up.
        batch, of_critic = (
            make_train_batch(groups, None, n_minibatches=n, max_tokens_per_mb=capacity, world_size=mesh.layout.data)
            for n, capacity in ((1, 130), (critic.ppo_n_minibatches, 90))
        )
        cuts = {"actor": batch.minibatches, "critic": of_critic.minibatches}
        cut = cuts["actor" if critic.shared else "critic"]
        scored = engine.score(*([m.ranks[index] for m in c] for c in cuts.values()), logprobs=True)
        scores.append({n: scored[n] for n in ("values", "ref_logprobs", "logprobs")})
        for field, where in (("values", cut), ("returns", cut), ("advantages", batch.minibatches)):
            fill(where, field, [rng.standard_normal(len(t)).astype(np.float32) for t in samples_of(groups)])
        stats.append(engine.train_step(rank_part(batch.minibatches, index), [] if critic.shared else rank_part(cut, index)))
        if len(stats) == 1:
            engine.start_from_actor()
    return {"seen": seen, "stats": stats, "weights": engine.snapshot()}, scores, (batch.minibatches, cut)


def run_rank(folder, rank, world_size):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    results = {}
    for name in CASES:
        first, scores, (of_actor, of_critic) = run_case(folder, name, rank, world_size)
        everyone = [None] * world_size
        dist.all_gather_object(everyone, scores)
        everyone = everyone[: len(of_actor[0].ranks)]  # context ranks say the same
        first["scores"] = [
            {
                key: collect(of_critic if key == "values" else of_actor, list(zip(*(r[step][key] for r in everyone), strict=True)))
                for key in scores[step]
            }
            for step in range(3)
        ]
        results[name] = first
    if rank == 0:
        torch.save(results, folder / f"ranks{world_size}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, (model, _, _) in CASES.items():
        (folder / name).mkdir()
        save_small_model(folder / name, **model)
    create_model(MODEL, seed=9).save_pretrained(folder / "other")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(folder, rank, n)) for n in (1, 2) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    return tuple(torch.load(folder / f"ranks{n}.pt", weights_only=False) for n in (1, 2))


@pytest.mark.parametrize("name", ["own", "shared", "untied", "context", "context_shared"])
def test_gradients_of_two_ranks_are_those_of_one(results, name):
    one, two = (r[name] for r in results)
    for model, steps in one["seen"].items():
        assert len(steps) == len(two["seen"][model]) == (6 if (name, model) == ("own", "critic") else 3)
        # The later ones come after optimizer steps, which would not see a stale unsharded root.
        for first, second in zip(steps, two["seen"][model], strict=True):
            assert set(first) == set(second)
            assert relative_difference(second, first) < 1e-6
        is_critic = model == "critic" or "shared" in name
        assert ("value_head.bias" in steps[0]) == is_critic
    for n, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][n], weight, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", CASES)
def test_scores_of_two_ranks_are_those_of_one(results, name):
    one, two = (r[name]["scores"] for r in results)
    tolerance = {"rtol": 0, "atol": 0.1 if "bfloat16" in name else 5e-5}
    for step, (first, second) in enumerate(zip(one, two, strict=True)):
        for key, samples in first.items():
            assert len(samples) == len(second[key]) == 24
            for a, b in zip(samples, second[key], strict=True):
                np.testing.assert_allclose(b, a, **tolerance)
        assert all((v == 0).all() for v in first["values"]) == (step == 0), "the head starts from zeros, and learns"
    for first, later in zip(one[0]["ref_logprobs"], one[2]["ref_logprobs"], strict=True):
        np.testing.assert_array_equal(first, later, "the reference does not move")
    assert any((a != b).any() for a, b in zip(one[0]["logprobs"], one[2]["logprobs"], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_statistics_cover_all_ranks(results, name):
    one, two = (r[name]["stats"] for r in results)
    keys = ["loss", "value_loss", "value_clip_fraction"] + (["critic_grad_norm"] if "shared" not in name else [])
    for first, second in zip(one, two, strict=True):
        for key in keys:
            assert second[key] == pytest.approx(first[key], rel=0.1 if "bfloat16" in name else 1e-3, abs=1e-6), key


def test_values_are_not_rounded_with_the_layers(results):
    """The value head computes in float32 when the layers are in bfloat16: values would have two digits."""
    for name in ("bfloat16", "bfloat16_shared"):
        for result in results:
            values = np.concatenate(result[name]["scores"][2]["values"])
            assert (values != torch.from_numpy(values).bfloat16().float().numpy()).mean() > 0.5
            gradients = result[name]["seen"]["actor" if "shared" in name else "critic"][0]
            assert gradients["value_head.weight"].dtype == torch.float32
