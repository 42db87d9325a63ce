"""Every algorithm of docs/algorithms.md: the gradient of whole train steps against its formula on whole logits in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import objective_formulas as formulas
import pytest
import torch
import yaml
from test_trainer_engine import RecordingEngine, relative_difference
from trainer_setup import make_config, make_groups, save_small_model
from transformers import AutoModelForCausalLM

from areal.algo.policy_loss import kl_penalty, loglinear_share
from areal.algo.returns import kl_estimate
from areal.config import CriticConfig
from areal.metrics import train_row
from areal.models import heads
from areal.ops import linear_ppo_loss
from areal.packer import make_train_batch
from areal.trainer.engine import RankMinibatch, TrainEngine

torch.set_num_threads(1)

ALGORITHMS = Path(__file__).parents[1] / "examples" / "algorithms"
TEMPERATURE, VERSION, LONGEST = 0.8, 5, 56
OBJECTIVE = (
    "objective", "importance_sampling_level", "loss_normalization", "entropy_coef", "kl_ctl", "kl_estimator", "kl_in", "eps_clip",
    "eps_clip_higher", "c_clip", "use_decoupled_loss", "recompute_logprob", "prox_logp_method", "behav_imp_weight_cap",
    "behav_imp_weight_mode", "behav_imp_weight_level", "behav_filter_cap", "behav_filter_level",
    "behav_filter_side",
)  # fmt: skip


def example(name: str) -> dict[str, Any]:
    """The keys of the loss in an example's file."""
    actor = yaml.safe_load((ALGORITHMS / f"{name}.yaml").read_text())["actor"]
    return {key: actor[key] for key in OBJECTIVE if key in actor}


@dataclass
class Case:
    formula: Any
    actor: dict[str, Any]
    per: str = "token"
    """What the sum is divided by the number of."""
    bites: str = "clip_fraction"
    """A statistic that is above 0: else the formula would not say much."""


CASES = {
    "grpo": Case(formulas.grpo, example("grpo"), "sequence", "kl_ref"),
    "dr_grpo": Case(formulas.dr_grpo, example("dr_grpo"), "sequence"),
    "dapo": Case(formulas.dapo, example("dapo"), bites="clip_high_fraction"),
    "gspo": Case(formulas.gspo, example("gspo"), "sequence"),
    "cispo": Case(formulas.cispo, example("cispo"), bites="clip_high_fraction"),
    "tis": Case(formulas.tis, example("tis"), bites="truncated_fraction"),
    "mis": Case(formulas.mis_sequence, example("mis"), bites="truncated_fraction"),
    "loglinear": Case(formulas.loglinear, example("loglinear")),
    "ppo": Case(formulas.ppo, {}),
    "naive": Case(formulas.naive, {"use_decoupled_loss": False, "recompute_logprob": False}),
    "dual_clip": Case(formulas.dual_clip, {"c_clip": 1.1}, bites="dual_clip_fraction"),
    "mis_token": Case(formulas.mis_token, {"behav_imp_weight_cap": 2.0, "behav_imp_weight_mode": "mask"}, bites="truncated_fraction"),
    "tis_sequence": Case(
        formulas.tis_sequence, {"behav_imp_weight_cap": 2.0, "behav_imp_weight_level": "sequence"}, bites="truncated_fraction"
    ),
    "filter_moved": Case(formulas.filter_moved, {"behav_filter_cap": 1.05}, bites="filtered_fraction"),
    "filter_token": Case(formulas.filter_token, {"behav_filter_cap": 1.3, "behav_filter_side": "both"}, bites="filtered_fraction"),
    "filter_sequence": Case(
        formulas.filter_sequence,
        {"behav_filter_cap": 1.1, "behav_filter_level": "sequence", "behav_filter_side": "both"},
        bites="filtered_fraction",
    ),
    "entropy": Case(formulas.entropy, {"entropy_coef": 0.02}),
    "k1": Case(formulas.kl_k1, {"kl_ctl": 0.3, "kl_estimator": "k1"}),
    "k2": Case(formulas.kl_k2, {"kl_ctl": 0.3, "kl_estimator": "k2"}, bites="kl_ref"),
    "k3": Case(formulas.kl_k3, {"kl_ctl": 0.3, "kl_estimator": "k3"}, bites="kl_ref"),
}


def ref_logprobs(input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """Those of a reference model, as a function of the token alone, so that no cut can mix them up."""
    return (-3.6 + 0.4 * np.sin(7.0 * input_ids + 13.0 * position_ids)).astype(np.float32)


def stale_groups() -> list[Any]:
    """Every token has an age of its own, from 0 to 3, every sequence a drift of its own; one has no loss tokens."""
    groups = make_groups(n_samples=3)
    rng = np.random.default_rng(2)
    for group in groups:
        for t in group.trajectories:
            t.logprobs[t.loss_mask] -= np.float32(0.2 * rng.random())
            t.versions[t.loss_mask] = VERSION - rng.integers(0, 4, int(t.loss_mask.sum()))
    masked = groups[1].trajectories[0]
    masked.loss_mask[:] = False
    masked.logprobs[:] = 0
    return groups


def advantages_of(groups: list[Any]) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(3)
    return [[np.where(t.loss_mask, rng.standard_normal(), 0).astype(np.float32) for t in group.trajectories] for group in groups]


def make_parts(actor: Any, capacity: int = 4096, world_size: int = 1, rank: int = 0) -> list[RankMinibatch]:
    groups = stale_groups()
    batch = make_train_batch(
        groups,
        advantages_of(groups),
        n_minibatches=2,
        max_tokens_per_mb=capacity,
        world_size=world_size,
        loss_normalization=actor.loss_normalization,
        max_new_tokens=LONGEST,
    )
    for mb in (mb for m in batch.minibatches for microbatches in m.ranks for mb in microbatches):
        mb.ref_logprobs = ref_logprobs(mb.input_ids, mb.position_ids) if actor.kl_ctl else None
    return [RankMinibatch(m.ranks[rank], m.denominator, m.policy_denominator) for m in batch.minibatches]


def run(folder: Path, actor: dict[str, Any], capacity: int = 4096) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """The gradients of both mini-batches, and the statistics."""
    config = make_config(
        folder, folder, optimizer={"lr": 0.2, "eps": 1e-2, "gradient_clipping": 1e9}, **{"behav_filter_cap": None, **actor}
    ).actor
    engine = RecordingEngine(folder, config, temperature=TEMPERATURE)
    engine.version = VERSION
    stats = engine.train_step(make_parts(config, capacity))
    return engine.gradients, stats


class Reference:
    """The same step by a formula, on Hugging Face's own forward pass, in float64, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.model.parameters() if p.dim() >= 2], "weight_decay": 0.05},
                {"params": [p for p in self.model.parameters() if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=0.2,
            betas=(0.9, 0.95),
            eps=1e-2,
        )

    def score(self, t: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(t.input_ids)
        log_p = (self.model(ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        at = torch.from_numpy(t.loss_mask[1:])
        return log_p.gather(1, ids[1:, None])[:, 0][at], -(log_p.exp() * log_p).sum(-1)[at]

    def step(self, case: Case) -> tuple[list[dict[str, torch.Tensor]], float]:
        """Gradients of both mini-batches, and the mean of their losses."""
        groups = stale_groups()
        members = [list(zip(g.trajectories, a, strict=True)) for g, a in zip(groups, advantages_of(groups), strict=True)]
        with torch.no_grad():
            proximal = {id(t): self.score(t)[0] for group in members for t, _ in group}
        gradients, losses = [], []
        for index, part in enumerate((members[:3], members[3:])):
            self.model.zero_grad()
            sequences = [self.sequence(t, a, proximal[id(t)], index / 2) for group in part for t, a in group if t.loss_mask.any()]
            n = sum(len(s) for s in sequences) if case.per == "token" else len(sequences)
            loss = -sum(case.formula(s) for s in sequences) / n
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
            self.optimizer.step()
        return gradients, sum(losses) / 2

    def sequence(self, t: Any, advantages: np.ndarray, proximal: torch.Tensor, progress: float) -> formulas.Sequence:
        theta, entropy = self.score(t)
        ref = ref_logprobs(t.input_ids, np.arange(len(t)))
        columns = (torch.from_numpy(x[t.loss_mask].astype(np.float64)) for x in (t.logprobs, ref, advantages, VERSION - t.versions))
        behavior, ref, advantages, age = columns
        return formulas.Sequence(theta, entropy, proximal, behavior, ref, advantages, age, progress)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_formula(model_folder: Path, name: str) -> None:
    case = CASES[name]
    expected, loss = Reference(model_folder).step(case)
    gradients, stats = run(model_folder, case.actor)
    for got, want in zip(gradients, expected, strict=True):
        assert relative_difference(got, want) < 1e-5
    assert stats[case.bites] > 0
    if name != "k1":  # whose formula has the gradient of another value
        assert stats["loss"] == pytest.approx(loss, rel=1e-5)
    row = train_row(stats)
    assert row["kl_proximal"] > 0 and row["loss"] == stats["loss"]
    assert ("kl_ref" in row) == ("kl_ctl" in case.actor)


@pytest.mark.parametrize("name", CASES)
def test_cut_does_not_change_the_gradient(model_folder: Path, name: str) -> None:
    whole, _ = run(model_folder, CASES[name].actor)
    cut, _ = run(model_folder, CASES[name].actor, capacity=45)
    for got, want in zip(cut, whole, strict=True):
        assert relative_difference(got, want) < 1e-6


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "loglinear", "mis"])
def test_a_head_that_is_more_than_a_product(tmp_path: Path, name: str) -> None:
    save_small_model(tmp_path, model_type="gemma2", final_logit_softcapping=5.0, head_dim=8)
    expected, _ = Reference(tmp_path).step(CASES[name])
    gradients, _ = run(tmp_path, CASES[name].actor)
    for got, want in zip(gradients, expected, strict=True):
        assert relative_difference(got, want) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_way_through_the_head(model_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Three products where a token's gradient needs its own log-prob alone."""
    calls = []
    monkeypatch.setattr(heads, "linear_ppo_loss", lambda *a, **o: calls.append(1) or linear_ppo_loss(*a, **o))
    run(model_folder, CASES[name].actor)
    needs_all = {"grpo", "k1", "k2", "k3", "gspo", "mis", "tis_sequence", "filter_sequence"}
    assert len(calls) == {"loglinear": 1}.get(name, 0 if name in needs_all else 2)


def test_loglinear_takes_no_pass_of_its_own(model_folder: Path) -> None:
    passes = {}
    for method in ("recompute", "loglinear"):
        config = make_config(model_folder, model_folder, prox_logp_method=method).actor
        engine = TrainEngine(model_folder, config, temperature=TEMPERATURE)
        engine.version = VERSION
        calls: list[int] = []
        engine.model.base_model.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        stats = engine.train_step(make_parts(config))
        passes[method] = len(calls), [kind for kind, _, _ in stats["spans"]]
    assert passes == {"recompute": (3, ["recompute", "training"]), "loglinear": (2, ["training"])}


def test_loglinear_share() -> None:
    """Of a token's own version the proximal policy is that of behaviour; the older the token, the nearer to the current one."""
    age = torch.tensor([0.0, 1.0, 3.0])
    assert loglinear_share(age, 0.5).tolist() == pytest.approx([0, 2 / 3, 6 / 7])
    assert loglinear_share(age, 1.0).tolist() == pytest.approx([0, 1 / 2, 3 / 4])


def test_kl_penaltys_over_a_whole_distribution() -> None:
    """Values and gradients summed over all tokens with their probabilities: exactly KL and its gradient, for k3 that of the other KL."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(12, generator=generator, dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    p = log_p.detach().exp()
    kl = (log_p.exp() * (log_p - ref)).sum()
    other = (ref.exp() * (ref - log_p)).sum()
    gradients = {"kl": kl, "other": other} | {k: (p * kl_penalty(log_p, ref, k)).sum() for k in ("k1", "k2", "k3")}
    gradients = {name: torch.autograd.grad(value, logits, retain_graph=True)[0] for name, value in gradients.items()}
    torch.testing.assert_close(gradients["k1"], gradients["kl"])
    torch.testing.assert_close(gradients["k2"], gradients["kl"])
    torch.testing.assert_close(gradients["k3"], gradients["other"])
    for estimator in ("k1", "k2", "k3"):
        of_rewards = kl_estimate(log_p.detach().numpy(), ref.numpy(), estimator)
        np.testing.assert_allclose(kl_penalty(log_p, ref, estimator).detach().numpy(), of_rewards, rtol=1e-12)
    for estimator in ("k1", "k3"):
        assert float((p * kl_penalty(log_p.detach(), ref, estimator)).sum()) == pytest.approx(float(kl.detach()))


def test_kl_penaltys_far_from_the_reference() -> None:
    """Where the policy does what the reference would never do the penalty pulls hardest, and everything stays finite."""
    gradients = {"k1": [20, -20, 0], "k2": [20, -20, 0], "k3": [1, 0, 0]}
    ref = torch.tensor([-300.0, -0.1, -1.0])
    for estimator in ("k1", "k2", "k3"):
        logprobs = torch.tensor([-0.1, -300.0, -1.0], requires_grad=True)
        estimates = kl_penalty(logprobs, ref, estimator)
        (gradient,) = torch.autograd.grad(estimates.sum(), logprobs)
        assert estimates.isfinite().all() and gradient.tolist() == pytest.approx(gradients[estimator]) and estimates[2] == 0
        of_rewards = kl_estimate(logprobs.detach().numpy(), ref.numpy(), estimator)
        np.testing.assert_allclose(estimates.detach().numpy(), of_rewards, rtol=1e-6)


def test_the_normalisation_is_the_policys_alone(model_folder: Path) -> None:
    """A value head on the actor's layers has its loss by loss tokens, whatever the policy's is divided by."""
    head = {}
    for normalization in ("token", "sequence", "fixed"):
        config = make_config(model_folder, model_folder, loss_normalization=normalization, reward_norm=None).actor
        engine = RecordingEngine(model_folder, config, critic=CriticConfig(shared=True))
        parts = make_parts(config)[:1]
        for mb in parts[0].microbatches:
            mb.values, mb.returns = np.zeros_like(mb.advantages), mb.advantages
        stats = engine.train_step(parts)
        head[normalization] = engine.gradients[0]["value_head.weight"], stats["value_loss"]
    gradient, loss = head["token"]
    assert loss > 0 and gradient.norm() > 0
    for other, value_loss in head.values():
        torch.testing.assert_close(other, gradient)
        assert value_loss == pytest.approx(loss)


def test_what_is_missing_is_named(model_folder: Path) -> None:
    config = make_config(model_folder, model_folder, kl_ctl=0.1, loss_normalization="sequence").actor
    engine = TrainEngine(model_folder, config)
    parts = make_parts(config)
    with pytest.raises(ValueError, match="loss_normalization=sequence needs a policy_denominator"):
        engine.train_step([part._replace(policy_denominator=None) for part in parts])
    for part in parts:
        for mb in part.microbatches:
            mb.ref_logprobs = None
    with pytest.raises(ValueError, match="kl_ctl=0.1 with kl_in=loss needs the log-probs of the reference model"):
        engine.train_step(parts)
