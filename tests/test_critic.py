"""One rank in this process: what critic and reference model say of a batch, and how the critic learns."""

import asyncio

import numpy as np
import pytest
import torch
from torch import nn
from trainer_setup import MODEL, make_config, make_groups, save_small_model
from transformers import AutoModelForCausalLM

from areal.algo.advantage import compute_advantages
from areal.config import CriticConfig, OptimizerConfig, RefConfig
from areal.models.heads import packed_logprobs
from areal.models.loading import create_model, load_model
from areal.packer import fill, make_train_batch
from areal.train_batch import prepare_batch
from areal.trainer.engine import NonFiniteGradients, RankMinibatch, TrainEngine

torch.set_num_threads(1)
NO_NORM = {"reward_norm": None}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


class OneRank:
    """What ``prepare_batch`` asks of the trainer, from an engine in this process."""

    n_data_ranks, sequence_cost = 1, (1.0, 0.0)

    def __init__(self, engine):
        self.engine = engine

    async def score(self, batch, logprobs=False):
        cuts = [[m.ranks[0] for m in cut] for cut in (batch.minibatches, batch.critic_minibatches)]
        scored = self.engine.score(*cuts, logprobs)
        return {name: found if name == "spans" else [[part] for part in found] for name, found in scored.items()}


def rank_part(minibatches, rank=0):
    return [RankMinibatch(m.ranks[rank], m.denominator) for m in minibatches]


def make_engine(model_folder, tmp_path, critic=None, ref=None, *, cls=TrainEngine, **actor):
    config = make_config(model_folder, tmp_path, **NO_NORM, **actor)
    config = config.new(critic=critic and CriticConfig(**critic), ref=RefConfig(**(ref or {})))
    engine = cls(config.actor.path, config.actor, temperature=0.8, critic=config.critic, ref=config.ref if config.uses_ref else None)
    return config, engine


def prepare(config, engine, groups):
    return asyncio.run(prepare_batch(config, OneRank(engine), groups, groups))


def give_value_head(model, seed=0):
    """A head that says something, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.value_head.weight.copy_(torch.randn(model.value_head.weight.shape, generator=generator))
        model.value_head.bias.fill_(0.3)


def reference_values(model_folder, groups, seed=0):
    """In float64, a sample at a time, from the definition: the head on the state before each token. Also the model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager").eval()
    model.value_head = nn.Linear(model.config.hidden_size, 1)
    give_value_head(model, seed)
    model.value_head.double()
    values = []
    for t in (t for g in groups for t in g.trajectories):
        states = model.base_model(input_ids=torch.from_numpy(t.input_ids)[None], use_cache=False).last_hidden_state[0]
        values.append(torch.cat([torch.zeros(1), model.value_head(states[:-1]).squeeze(-1)]))
    return model, values


def samples_of(groups):
    return [t for g in groups for t in g.trajectories]


def mask_some(groups):
    """Tokens of a tool in the middle of some answers."""
    for t in samples_of(groups)[::3]:
        t.loss_mask[-4:-2] = False
    return groups


@pytest.mark.parametrize("critic", [{"eps_clip": 0.2}, {"shared": True}, {"mb_spec": {"max_tokens_per_mb": 50}, "ppo_n_minibatches": 3}])
def test_values_are_those_of_the_states_before_the_tokens(model_folder, tmp_path, critic):
    groups = mask_some(make_groups())
    config, engine = make_engine(model_folder, tmp_path, critic, mb_spec={"max_tokens_per_mb": 130}, ppo_n_minibatches=2)
    give_value_head((engine.critic.model if engine.critic else engine.actor).model)
    batch = prepare(config, engine, groups).batch
    _, expected = reference_values(model_folder, groups)
    cut = batch.critic_minibatches or batch.minibatches
    assert len(cut) == (critic.get("ppo_n_minibatches", 1) if batch.critic_minibatches else 2)
    seen = 0
    for mb in (mb for m in cut for mb in m.ranks[0]):
        places = zip(mb.members, mb.cu_seqlens[:-1], mb.cu_seqlens[1:], strict=True)
        for i, begin, end in places:
            mask, seen = mb.loss_mask[begin:end], seen + 1
            np.testing.assert_array_equal(mb.input_ids[begin:end], samples_of(groups)[i].input_ids)
            np.testing.assert_allclose(mb.values[begin:end][mask], expected[i].detach().numpy()[mask], rtol=1e-4, atol=1e-5)
            assert (mb.returns[begin:end][~mask] == 0).all()
    assert seen == len(expected)
    if batch.critic_minibatches:
        assert batch.minibatches[0].ranks[0][0].values is None


def reference_value_gradients(model_folder, groups, old, returns, eps, coef=1.0):
    """The clipped value loss over all loss tokens, as a loop over samples in float64, and its gradients by autograd."""
    model, values = reference_values(model_folder, groups)
    total, n = torch.zeros((), dtype=torch.float64), 0
    for t, v, o, r in zip(samples_of(groups), values, old, returns, strict=True):
        mask, o, r = torch.from_numpy(t.loss_mask), torch.from_numpy(o).double(), torch.from_numpy(r).double()
        errors = (v - r) ** 2
        if eps is not None:
            errors = torch.maximum(errors, (torch.clamp(v, o - eps, o + eps) - r) ** 2)
        total, n = total + 0.5 * errors[mask].sum(), n + int(mask.sum())
    (coef * total / n).backward()
    return float(total.detach() / n), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def random_targets(model_folder, groups, spread=0.5):
    """Old values and returns around the values."""
    rng = np.random.default_rng(5)
    values = [v.detach().numpy() for v in reference_values(model_folder, groups)[1]]
    return tuple([(v + spread * rng.standard_normal(len(v))).astype(np.float32) for v in values] for _ in range(2))


def relative_difference(gradients, others):
    total = sum(float((gradients[n].double() - others[n].double()).norm() ** 2) for n in others)
    return (total / sum(float(g.double().norm() ** 2) for g in others.values())) ** 0.5


class Recording(TrainEngine):
    """Keeps the gradients before clipping of every optimizer step of every model."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients = {name: [] for name in self.models}
        for name, model in self.models.items():
            self._record(name, model)

    def _record(self, name, model):
        step = model.optimizer_step

        def recorded(*args):
            self.gradients[name].append({n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None})
            return step(*args)

        model.optimizer_step = recorded


def filled_batch(groups, old, returns, capacity=4096, n_minibatches=1):
    """A batch with these values and returns, and advantages that are the returns."""
    batch = make_train_batch(groups, None, n_minibatches=n_minibatches, max_tokens_per_mb=capacity, world_size=1)
    for name, per_sample in (("values", old), ("returns", returns), ("advantages", returns)):
        fill(batch.minibatches, name, per_sample)
    return batch


@pytest.mark.parametrize("eps", [0.2, None])
@pytest.mark.parametrize("capacity", [60, 4096])
def test_gradient_of_the_value_loss(model_folder, tmp_path, eps, capacity):
    groups = mask_some(make_groups())
    old, returns = random_targets(model_folder, groups)
    loss, expected = reference_value_gradients(model_folder, groups, old, returns, eps)
    _, engine = make_engine(model_folder, tmp_path, {"eps_clip": eps}, cls=Recording)
    give_value_head(engine.critic.model.model)
    batch = filled_batch(groups, old, returns, capacity)
    stats = engine.train_step(rank_part(batch.minibatches), rank_part(batch.minibatches))
    (got,) = engine.gradients["critic"]
    assert set(got) == set(expected) and "value_head.bias" in got
    assert relative_difference(got, expected) < 1e-5
    assert stats["value_loss"] == pytest.approx(loss, rel=1e-5)
    assert (0.2 < stats["value_clip_fraction"] < 0.8) if eps else stats["value_clip_fraction"] == 0


def test_shared_layers_get_both_gradients(model_folder, tmp_path):
    groups = mask_some(make_groups())
    old, returns = random_targets(model_folder, groups)
    batch = filled_batch(groups, old, returns, 130)
    _, of_values = reference_value_gradients(model_folder, groups, old, returns, 0.2, coef=0.25)
    _, policy = make_engine(model_folder, tmp_path, cls=Recording)
    _, both = make_engine(model_folder, tmp_path, {"shared": True, "loss_coef": 0.25, "eps_clip": 0.2}, cls=Recording)
    give_value_head(both.model)
    plain = policy.train_step(rank_part(batch.minibatches))
    stats = both.train_step(rank_part(batch.minibatches))
    of_policy = policy.gradients["actor"][0]
    expected = {n: g + of_policy.get(n, 0) for n, g in of_values.items()}
    assert relative_difference(both.gradients["actor"][0], expected) < 1e-5
    assert stats["loss"] == pytest.approx(plain["loss"], rel=1e-6) and stats["value_loss"] > 0 and "critic_grad_norm" not in stats


def test_the_policy_goes_out_without_its_value_head(model_folder, tmp_path):
    _, plain = make_engine(model_folder, tmp_path)
    _, shared = make_engine(model_folder, tmp_path, {"shared": True})
    assert shared.gatherer.manifest() == plain.gatherer.manifest() and list(shared.weights()) == list(plain.weights())
    assert shared.gatherer.bucket_plan(1 << 20) == plain.gatherer.bucket_plan(1 << 20)
    assert any("value_head" in n for n, _ in shared.models["actor"].model.named_parameters())


def test_a_checkpoint_holds_what_cannot_be_loaded_again(model_folder, tmp_path):
    config, path = make_config(model_folder, tmp_path, kl_ctl=0.1, **NO_NORM), str(model_folder)

    def names(ref, warms_up, critic=None):
        return list(TrainEngine(model_folder, config.actor, critic=critic, ref=ref, warms_up=warms_up).models)

    assert names(RefConfig(), False) == names(RefConfig(path=path), True) == ["actor"]
    assert names(RefConfig(), True, CriticConfig()) == ["actor", "critic", "ref"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_critic_has_no_output_head(tmp_path, tied):
    folder = save_small_model(tmp_path, tie_word_embeddings=tied)
    _, engine = make_engine(folder, tmp_path, {})
    names = [n for n, _ in engine.models["critic"].model.named_parameters()]
    assert not any("lm_head" in n for n in names) and {"value_head.weight", "value_head.bias", "model.embed_tokens.weight"} <= set(names)


def test_reference_log_probs(model_folder, tmp_path):
    other = tmp_path / "other"
    create_model(MODEL, seed=9).save_pretrained(other)
    groups = mask_some(make_groups())
    keys = {"kl_ctl": 0.1, "ppo_n_minibatches": 2, "mb_spec": {"max_tokens_per_mb": 130}}
    config, engine = make_engine(model_folder, tmp_path, ref={"path": str(other)}, **keys)
    assert engine.critic is None and not any(p.requires_grad for p in engine.reference.model.parameters())
    prepared = prepare(config, engine, groups)
    model = load_model(other, dtype=torch.float64)
    for mb in (mb for m in prepared.batch.minibatches for mb in m.ranks[0]):
        assert mb.values is None and mb.returns is None
        lengths = np.diff(mb.cu_seqlens).tolist()
        with torch.no_grad():
            expected = packed_logprobs(model, torch.from_numpy(mb.input_ids), torch.from_numpy(mb.position_ids), lengths, 0.8)[0].numpy()
        np.testing.assert_allclose(mb.ref_logprobs[mb.loss_mask], expected[mb.loss_mask], atol=1e-5)
    assert prepared.row == {}


def test_kl_in_the_reward_is_that_of_the_policy_before_the_step(model_folder, tmp_path):
    """Reference and actor are the same: no KL, although the behaviour log-probs are others; after a step there is some."""
    groups = make_groups()
    keys = {"kl_ctl": 0.5, "kl_in": "reward", "kl_estimator": "k1", "ppo_n_minibatches": 2, "optimizer": {"lr": 1e-2}}
    config, engine = make_engine(model_folder, tmp_path, **keys)
    prepared = prepare(config, engine, groups)
    assert prepared.row["kl_reward"] == pytest.approx(0, abs=1e-7)
    assert all(mb.ref_logprobs is None for m in prepared.batch.minibatches for mb in m.ranks[0])
    engine.train_step(rank_part(prepared.batch.minibatches))
    moved = prepare(config, engine, groups)
    assert abs(moved.row["kl_reward"]) > 1e-3
    sampled = config.new(actor=config.actor.new(use_decoupled_loss=False, recompute_logprob=False))
    of_behaviour = prepare(sampled, engine, groups)
    ref = torch.cat([torch.from_numpy(x) for x in collected(config, engine, groups)])
    mask = torch.cat([torch.from_numpy(t.loss_mask) for t in samples_of(groups)])
    behaviour = torch.cat([torch.from_numpy(t.logprobs) for t in samples_of(groups)])
    assert of_behaviour.row["kl_reward"] == pytest.approx(float((behaviour - ref)[mask].mean()), rel=1e-4)


def test_log_probs_of_the_score_are_not_computed_again(model_folder, tmp_path):
    groups = make_groups()
    keys = {"kl_ctl": 0.5, "kl_in": "reward", "ppo_n_minibatches": 2, "optimizer": {"lr": 1e-2}}
    config, engine = make_engine(model_folder, tmp_path, cls=Recording, **keys)
    _, other = make_engine(model_folder, tmp_path, cls=Recording, **keys)
    batch = prepare(config, engine, groups).batch
    assert [mb.proximal_logprobs is None for m in batch.minibatches for mb in m.ranks[0]] == [True, False]
    passes, compute = [], engine.actor.frozen_logprobs
    engine.actor.frozen_logprobs = lambda *args: passes.append(1) or compute(*args)
    stats = engine.train_step(rank_part(batch.minibatches))
    assert not passes
    batch.minibatches[1].ranks[0][0].proximal_logprobs = None
    expected = other.train_step(rank_part(batch.minibatches))
    for first, second in zip(engine.gradients["actor"], other.gradients["actor"], strict=True):
        assert relative_difference(first, second) < 1e-7
    assert stats["kl_proximal"] == pytest.approx(expected["kl_proximal"], abs=1e-9)


def collected(config, engine, groups):
    """The reference model's log-probs by sample, by way of the loss."""
    batch = prepare(config.new(actor=config.actor.new(kl_in="loss")), engine, groups).batch
    found = {}
    for mb in (mb for m in batch.minibatches for mb in m.ranks[0]):
        found |= dict(zip(mb.members, np.split(mb.ref_logprobs, mb.cu_seqlens[1:-1]), strict=True))
    return [found[i] for i in range(len(found))]


def test_both_start_from_the_actor_after_a_warm_up(model_folder, tmp_path):
    _, engine = make_engine(model_folder, tmp_path, {}, kl_ctl=0.1, optimizer={"lr": 1e-2})
    groups = make_groups()
    batch = make_train_batch(groups, None, n_minibatches=1, max_tokens_per_mb=4096, world_size=1)
    for _ in range(3):
        engine.sft_step(rank_part(batch.minibatches)[0])
    actor = {n: p.detach() for n, p in engine.model.named_parameters()}
    others = [engine.reference.model, engine.critic.model.model]
    for model in others:
        assert not all(torch.equal(p, actor[n]) for n, p in model.named_parameters() if n in actor)
    engine.start_from_actor()
    for model in others:
        assert all(torch.equal(p, actor[n]) for n, p in model.named_parameters() if n in actor)
    # and they do not move with it
    engine.sft_step(rank_part(batch.minibatches)[0])
    assert not torch.equal(others[0].model.embed_tokens.weight, engine.model.model.embed_tokens.weight)


def test_models_with_a_path_keep_their_weights(model_folder, tmp_path):
    other = tmp_path / "other"
    create_model(MODEL, seed=9).save_pretrained(other)
    _, engine = make_engine(model_folder, tmp_path, {"path": str(other)}, ref={"path": str(other)}, kl_ctl=0.1)
    engine.start_from_actor()
    weight = load_model(other, dtype=torch.float32).model.embed_tokens.weight
    for model in (engine.reference.model, engine.critic.model.model):
        assert torch.equal(model.model.embed_tokens.weight, weight)


@pytest.mark.parametrize("shared", [False, True])
def test_a_critic_learns(model_folder, tmp_path, shared):
    """The reward is a function of the prompt, which the first token says: values explain what returns there will be."""
    groups = make_groups(n_groups=12, n_samples=2)
    for g in groups:
        for t in g.trajectories:
            t.input_ids[:3] = 5 if g.group_id % 2 else 6
            t.reward = 1.0 if g.group_id % 2 else -1.0
    critic = {"shared": True, "loss_coef": 1.0} if shared else {"optimizer": {"lr": 3e-3}}
    critic["eps_clip"] = None
    config, engine = make_engine(model_folder, tmp_path, critic, optimizer={"lr": 3e-3})
    explained = []
    for _ in range(12):
        prepared = prepare(config, engine, groups)
        explained.append(prepared.row["explained_variance"])
        engine.train_step(rank_part(prepared.batch.minibatches), rank_part(prepared.batch.critic_minibatches))
    assert explained[0] == pytest.approx(0, abs=1e-6), "the head starts from zeros"
    assert explained[-1] > 0.8, explained
    assert prepared.row["return_mean"] == pytest.approx(
        np.mean(np.concatenate([t.reward * t.loss_mask[t.loss_mask] for g in groups for t in g.trajectories])), abs=1e-5
    )


def test_without_critic_and_reference_the_ranks_are_not_asked(model_folder, tmp_path):
    class Silent:
        n_data_ranks, sequence_cost = 2, (1.0, 0.0)  # and no score

    groups, config = make_groups(), make_config(model_folder, tmp_path, ppo_n_minibatches=2)
    batch, row, spans = asyncio.run(prepare_batch(config, Silent(), groups, groups))
    assert (row, spans, batch.critic_minibatches, batch.n_samples) == ({}, [], [], 24)
    advantages = compute_advantages(groups, config.actor, 40)
    expected = make_train_batch(groups, advantages, n_minibatches=2, max_tokens_per_mb=16384, world_size=2)
    for m, n in zip(batch.minibatches, expected.minibatches, strict=True):
        for mb, other in zip((mb for rank in m.ranks for mb in rank), (mb for rank in n.ranks for mb in rank), strict=True):
            np.testing.assert_array_equal(mb.advantages, other.advantages)
            np.testing.assert_array_equal(mb.input_ids, other.input_ids)
            assert mb.ref_logprobs is mb.values is mb.returns is None


def test_advantages_fall_as_the_critic_learns_what_comes(model_folder, tmp_path):
    """With gamma = lambda = 1 an advantage is the return minus the value: the two always add up."""
    groups = make_groups()
    config, engine = make_engine(model_folder, tmp_path, {})
    give_value_head(engine.critic.model.model)
    batch = prepare(config, engine, groups).batch
    (actors,), (critics,) = (batch.minibatches[0].ranks[0], batch.critic_minibatches[0].ranks[0])
    mask = actors.loss_mask
    np.testing.assert_allclose((actors.advantages + critics.values)[mask], critics.returns[mask], rtol=1e-5, atol=1e-5)


def test_a_critic_without_targets_says_what_is_missing(model_folder, tmp_path):
    _, engine = make_engine(model_folder, tmp_path, {})
    batch = make_train_batch(make_groups(), None, n_minibatches=1, max_tokens_per_mb=4096, world_size=1)
    with pytest.raises(ValueError, match="call score first"):
        engine.train_step(rank_part(batch.minibatches), rank_part(batch.minibatches))


def test_non_finite_gradients_of_the_critic_end_the_run(model_folder, tmp_path):
    groups = make_groups()
    _, engine = make_engine(model_folder, tmp_path, {}, max_nonfinite_steps=1)
    bad = [np.full(len(t), np.inf, np.float32) for t in samples_of(groups)]
    batch = filled_batch(groups, [np.zeros(len(t), np.float32) for t in samples_of(groups)], bad)
    fill(batch.minibatches, "advantages", [np.zeros(len(t), np.float32) for t in samples_of(groups)])
    before = {n: p.clone() for n, p in engine.critic.model.model.named_parameters()}
    stats = engine.train_step(rank_part(batch.minibatches), rank_part(batch.minibatches))
    assert (stats["critic_skipped_nonfinite"], stats["critic_grad_norm"], stats["skipped_nonfinite"]) == (1, None, 0)
    assert all(torch.equal(p, before[n]) for n, p in engine.critic.model.model.named_parameters())
    with pytest.raises(NonFiniteGradients, match=r"2 optimizer steps of the critic.*critic.optimizer.lr"):
        engine.train_step(rank_part(batch.minibatches), rank_part(batch.minibatches))


def test_a_critic_has_a_warm_up_of_its_own(model_folder, tmp_path):
    groups = make_groups()
    critic = {"optimizer": OptimizerConfig(lr=1e-3, warmup_steps=4, eps=1e-8, betas=(0.0, 0.0)).model_dump(), "eps_clip": None}
    config, engine = make_engine(model_folder, tmp_path, critic)
    give_value_head(engine.critic.model.model)
    bias, moves = engine.critic.model.model.value_head.bias, []
    for _ in range(2):
        batch = prepare(config, engine, groups).batch
        before = bias.item()
        engine.train_step(rank_part(batch.minibatches), rank_part(batch.critic_minibatches))
        moves.append(abs(bias.item() - before))
    assert moves[0] == pytest.approx(1e-3 / 4, rel=0.01) and moves[1] == pytest.approx(1e-3 / 2, rel=0.01)
