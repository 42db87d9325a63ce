"""One rank in this process: what a train step computes."""

import copy

import numpy as np
import pytest
import torch
from trainer_setup import make_batch, make_config, make_groups, save_small_model

from areal.config import CriticConfig, OptimizerConfig, RefConfig
from areal.models import heads
from areal.models.heads import packed_logprobs
from areal.models.loading import load_model
from areal.ops import linear_ppo_loss, ppo_loss
from areal.trainer.engine import NonFiniteGradients, RankMinibatch, TrainEngine
from areal.trainer.optimizer import Muon, PolicyOptimizer, orthogonalise

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


class RecordingEngine(TrainEngine):
    """Keeps the gradients before clipping of every optimizer step."""

    def _optimizer_step(self, lr_scale, stats):
        self.gradients = [*getattr(self, "gradients", []), {n: p.grad.clone() for n, p in self.model.named_parameters()}]
        super()._optimizer_step(lr_scale, stats)


def make_engine(model_folder, tmp_path, cls=RecordingEngine, temperature=0.8, **actor):
    return cls(model_folder, make_config(model_folder, tmp_path, **actor).actor, temperature=temperature)


def rank_part(batch, rank=0):
    return [RankMinibatch(m.ranks[rank], m.denominator) for m in batch.minibatches]


def relative_difference(gradients, others):
    total = sum(float((gradients[n] - others[n]).double().norm() ** 2) for n in others)
    return (total / sum(float(g.double().norm() ** 2) for g in others.values())) ** 0.5


def reference_step(model_folder, groups, batch_of, *, temperature, lr, steps_eps=1e-5, clip=1.0):
    """PPO in float64, one sample at a time, gathered from the definition: returns gradients and parameters after each mini-batch."""
    model = load_model(model_folder, dtype=torch.float64)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
        eps=steps_eps,
    )

    def score(sample):
        ids = torch.from_numpy(sample.input_ids)
        return packed_logprobs(model, ids, torch.arange(len(ids)), [len(ids)], temperature)[0].double()

    with torch.no_grad():
        proximal = {id(t): score(t) for g in groups for t in g.trajectories}
    gradients = []
    for members, advantages, denominator in batch_of:
        model.zero_grad()
        for sample, advantage in zip(members, advantages, strict=True):
            behavior, mask = (torch.from_numpy(x) for x in (sample.logprobs.astype(np.float64), sample.loss_mask))
            loss, _ = ppo_loss(
                score(sample),
                proximal[id(sample)],
                behavior,
                torch.from_numpy(advantage).double(),
                mask,
                eps_clip=0.2,
                denominator=denominator,
            )
            loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return gradients, {n: p.detach() for n, p in model.named_parameters()}


def test_step_against_a_float64_reference(model_folder, tmp_path):
    groups = make_groups()
    rng = np.random.default_rng(1)
    advantages = [[(t.loss_mask * np.float32(rng.standard_normal())).astype(np.float32) for t in g.trajectories] for g in groups]
    minibatches = []
    for part in (slice(0, 3), slice(3, 6)):
        members = [t for g in groups[part] for t in g.trajectories]
        minibatches.append((members, [a for g in advantages[part] for a in g], float(sum(t.loss_mask.sum() for t in members))))
    expected, parameters = reference_step(model_folder, groups, minibatches, temperature=0.8, lr=1e-3)

    engine = make_engine(model_folder, tmp_path, behav_filter_cap=None)
    stats = engine.train_step(rank_part(make_batch(groups, n_minibatches=2, capacity=100)))
    for got, want in zip(engine.gradients, expected, strict=True):
        assert relative_difference(got, want) < 1e-5
    for name, weight in engine.weights().items():
        torch.testing.assert_close(weight.double(), parameters[name], rtol=0, atol=3e-6)
    assert stats["n_tokens"] == sum(int(t.loss_mask.sum()) for g in groups for t in g.trajectories)


@pytest.mark.parametrize("capacity", [40, 150, 100_000])
def test_cut_does_not_change_the_gradient(model_folder, tmp_path, capacity):
    whole, cut = make_engine(model_folder, tmp_path), make_engine(model_folder, tmp_path)
    whole.train_step(rank_part(make_batch(capacity=4096)))
    cut.train_step(rank_part(make_batch(capacity=capacity)))
    assert relative_difference(cut.gradients[0], whole.gradients[0]) < 1e-6


def test_all_masked_microbatches_change_nothing(model_folder, tmp_path):
    from areal.packer import _fill_up

    plain, filled = make_engine(model_folder, tmp_path), make_engine(model_folder, tmp_path)
    batch = make_batch()
    plain.train_step(rank_part(batch))
    batch.minibatches[0].ranks[0].append(_fill_up())
    filled.train_step(rank_part(batch))
    assert relative_difference(filled.gradients[0], plain.gradients[0]) < 1e-7


def test_gradient_checkpointing_changes_nothing(model_folder, tmp_path):
    plain, checkpointing = make_engine(model_folder, tmp_path), make_engine(model_folder, tmp_path, gradient_checkpointing=True)
    plain.train_step(rank_part(make_batch()))
    calls = []
    checkpointing.model.base_model.layers[0].self_attn.register_forward_hook(lambda *a: calls.append(1))
    checkpointing.train_step(rank_part(make_batch()))
    assert len(calls) == 2, "the layer must run again in backward"
    assert relative_difference(checkpointing.gradients[0], plain.gradients[0]) < 1e-7


def test_gradient_checkpointing_leaves_the_head_alone(model_folder, tmp_path, monkeypatch):
    """Around the head it would double its products, which make the gradients in the forward pass already."""
    engine = make_engine(model_folder, tmp_path, gradient_checkpointing=True)
    batch = make_batch(capacity=100)
    calls = []
    monkeypatch.setattr(heads, "linear_ppo_loss", lambda *a, **k: calls.append(1) or linear_ppo_loss(*a, **k))
    engine.train_step(rank_part(batch))
    assert len(calls) == len(batch.minibatches[0].ranks[0]) > 1


def test_first_minibatch_is_on_policy_and_the_drift_is_measured(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, temperature=1.0)
    groups = make_groups(version=3)
    batch = make_batch(groups)
    microbatch = batch.minibatches[0].ranks[0][0]
    microbatch.logprobs = engine.logprobs(microbatch).numpy()
    moved = int(microbatch.loss_mask.nonzero()[0][5])
    microbatch.logprobs[moved] -= 0.25
    microbatch.versions[microbatch.loss_mask] = 2
    microbatch.versions[[moved, moved + 1]] = 3
    engine.version = 3
    stats = engine.train_step(rank_part(batch))
    assert stats["ratio_mean"] == 1.0
    assert stats["clip_fraction"] == 0
    assert stats["logprob_drift"]["n"] == 2
    assert stats["logprob_drift"]["max_abs"] == pytest.approx(0.25, abs=1e-5)
    assert stats["logprob_drift"]["mean_abs"] == pytest.approx(0.125, abs=1e-5)
    engine.version = 7
    assert engine.train_step(rank_part(batch))["logprob_drift"] == {"mean_abs": None, "max_abs": None, "n": 0}


def test_naive_ppo_without_recompute_uses_the_behaviour_policy(model_folder, tmp_path):
    naive = make_engine(model_folder, tmp_path, use_decoupled_loss=False, recompute_logprob=False)
    stats = naive.train_step(rank_part(make_batch(n_minibatches=2)))
    assert stats["ratio_mean"] != 1.0
    assert stats["importance_weight_mean"] == 1.0
    assert [kind for kind, _, _ in stats["spans"]] == ["training"]


def test_nonfinite_steps_are_skipped_counted_and_end_the_run(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, max_nonfinite_steps=1)
    good, bad = make_batch(n_minibatches=2), make_batch(n_minibatches=2)
    bad.minibatches[1].ranks[0][0].advantages[:] = np.nan
    before = engine.snapshot()
    only_bad = copy.deepcopy(bad)
    only_bad.minibatches = only_bad.minibatches[1:]
    stats = engine.train_step(rank_part(only_bad))
    assert stats["skipped_nonfinite"] == 1
    assert stats["grad_norm"] is None
    assert all(torch.equal(before[n], w) for n, w in engine.weights().items())

    stats = engine.train_step(rank_part(bad))  # its first mini-batch is good, so the count starts again
    assert stats["skipped_nonfinite"] == 1
    assert all(w.isfinite().all() for w in engine.weights().values())
    with pytest.raises(NonFiniteGradients, match="max_nonfinite_steps=1"):
        engine.train_step(rank_part(only_bad))
    engine.train_step(rank_part(good))


def test_sft_overfits(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path)
    engine.set_optimizer(OptimizerConfig(type="muon", muon_lr=0.02, lr=3e-3))
    minibatch = rank_part(make_batch(make_groups(2, 2)))[0]
    losses = [engine.sft_step(minibatch, 1.0)["loss"] for _ in range(60)]
    assert losses[0] == pytest.approx(np.log(40), rel=0.1)
    assert losses[-1] < 0.3 * losses[0]


def test_sft_gradient_is_that_of_the_token_mean(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path)
    batch = make_batch(capacity=60)
    engine.sft_step(rank_part(batch)[0], 1.0)
    model = load_model(model_folder, dtype=torch.float64)
    losses = []
    for sample in [t for g in make_groups() for t in g.trajectories]:
        ids = torch.from_numpy(sample.input_ids)
        log_p = torch.log_softmax(model(ids[None], attention_context=packed_context(len(ids))).logits[0, :-1], -1)
        losses.append(-log_p.gather(1, ids[1:, None])[torch.from_numpy(sample.loss_mask[1:]), 0])
    torch.cat(losses).mean().backward()
    assert relative_difference(engine.gradients[0], {n: p.grad for n, p in model.named_parameters()}) < 1e-5


def packed_context(n):
    from areal.models.attention import PackedContext

    return PackedContext([n])


# -- optimizers -----------------------------------------------------------------------------------------------------------------


def test_warmup_of_the_rate(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, optimizer={"lr": 1e-3, "warmup_steps": 4})
    assert [engine.train_step(rank_part(make_batch()))["lr_scale"] for _ in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_orthogonalise(shape):
    u, _, v = torch.linalg.svd(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    results = orthogonalise(u @ torch.diag(torch.linspace(0.1, 1, min(shape))) @ v).float()
    singular = torch.linalg.svdvals(results)
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    assert torch.cosine_similarity(results.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_muon_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((16, 16), (16, 16), (32, 16), (8, 16))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [(ours, Muon(ours, 0.02, 0.1)), (theirs, torch.optim.Muon(theirs, 0.02, 0.1, momentum=0.95))]
    for _ in range(5):
        grads = [torch.randn(p.shape, generator=generator) for p in start]
        for parameters, optimizer in optimizers:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() / (q - s).norm() < 0.01  # bfloat16 iterations


def test_muon_takes_the_matrices_of_the_layers_only(model_folder, tmp_path):
    model = load_model(model_folder, dtype=torch.float32)
    muon, adamw = (o for o, _ in PolicyOptimizer(model, OptimizerConfig(type="muon"))._optimizers)
    names = {id(p): n for n, p in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    of_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert of_muon == {n for n in names.values() if "layers" in n and "proj.weight" in n}
    assert of_muon | of_adamw == set(names.values())
    assert not of_muon & of_adamw


def test_bad_matrix_for_muon():
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)


def test_paths_of_other_models_begin_at_home_too(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(model_folder.parent))
    at_home = f"~/{model_folder.name}"
    engine = make_engine(
        model_folder,
        tmp_path,
        cls=lambda *a, **k: TrainEngine(*a, **k, ref=RefConfig(path=at_home), critic=CriticConfig(path=at_home)),
    )
    assert engine.reference is not None and engine.critic is not None
