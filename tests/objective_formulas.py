"""The policy's losses as their papers write them: one sequence at a time, float64, on whole logits. Nothing here calls ``areal``.

A formula takes a ``Sequence`` and gives the sum of its tokens' objective, to be maximised, with its normalisation by length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sequence:
    """The loss tokens of one sequence, [n] each."""

    theta: Tensor
    """Log-probs of the current policy, differentiable."""
    entropy: Tensor
    """Differentiable."""
    proximal: Tensor
    behavior: Tensor
    ref: Tensor
    advantages: Tensor
    age: Tensor
    """Versions between the one that sampled it and the step's."""
    progress: float
    """Optimizer steps of this train step that are taken, as a share."""

    def __len__(self) -> int:
        return len(self.theta)

    @property
    def weight(self) -> Tensor:
        """proximal / behaviour: a constant."""
        return (self.proximal - self.behavior).exp()

    @property
    def ratio(self) -> Tensor:
        return (self.theta - self.proximal).exp()


def surrogate(ratio: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """PPO (arXiv 1707.06347), eq. 7."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def ppo(s: Sequence) -> Tensor:
    """AReaL (arXiv 2505.24298), eq. 5."""
    return (s.weight * surrogate(s.ratio, s.advantages)).sum()


def naive(s: Sequence) -> Tensor:
    return surrogate((s.theta - s.behavior).exp(), s.advantages).sum()


def dual_clip(s: Sequence) -> Tensor:
    """arXiv 1912.09729, eq. 5, with c = 1.1."""
    clipped = surrogate(s.ratio, s.advantages)
    return (s.weight * torch.where(s.advantages < 0, torch.maximum(clipped, 1.1 * s.advantages), clipped)).sum()


def grpo(s: Sequence, beta: float = 0.04) -> Tensor:
    """arXiv 2402.03300, eq. 3 and 4."""
    kl = (s.ref - s.theta).exp() - (s.ref - s.theta) - 1
    return (s.weight * surrogate(s.ratio, s.advantages) - beta * kl).sum() / len(s)


def dr_grpo(s: Sequence, longest: float = 56) -> Tensor:
    """arXiv 2503.20783, section 3.2, with a constant in place of the length."""
    return ppo(s) / longest


def dapo(s: Sequence) -> Tensor:
    """arXiv 2503.14476, eq. 8."""
    return (s.weight * surrogate(s.ratio, s.advantages, 0.2, 0.28)).sum()


def gspo(s: Sequence) -> Tensor:
    """arXiv 2507.18071, eq. 5 and 7."""
    ratio = (s.theta - s.proximal).mean().exp()
    return (s.weight * surrogate(ratio, s.advantages, 3e-4, 4e-4)).mean()


def cispo(s: Sequence, high: float = 0.28) -> Tensor:
    """arXiv 2506.13585, eq. 4 and 5, without a lower end."""
    return (s.weight * s.ratio.detach().clamp(max=1 + high) * s.advantages * s.theta).sum()


def tis(s: Sequence, cap: float = 2.0) -> Tensor:
    return (s.weight.clamp(max=cap) * surrogate(s.ratio, s.advantages)).sum()


def mis_token(s: Sequence, cap: float = 2.0) -> Tensor:
    return torch.where(s.weight > cap, 0.0, s.weight * surrogate(s.ratio, s.advantages)).sum()


def tis_sequence(s: Sequence, cap: float = 2.0) -> Tensor:
    return s.weight.prod().clamp(max=cap) * surrogate(s.ratio, s.advantages).sum()


def mis_sequence(s: Sequence, cap: float = 2.0) -> Tensor:
    weight = float(s.weight.prod())
    return (weight if weight <= cap else 0.0) * surrogate(s.ratio, s.advantages).sum()


def filter_moved(s: Sequence, cap: float = 1.05) -> Tensor:
    """What has moved far already the way its advantage points gives no loss."""
    moved = torch.where(s.advantages > 0, s.weight, 1 / s.weight)
    kept = (moved <= cap) | (s.advantages == 0)
    return (s.weight * surrogate(s.ratio, s.advantages))[kept].sum()


def filter_token(s: Sequence, cap: float = 1.3) -> Tensor:
    kept = (s.weight <= cap) & (s.weight >= 1 / cap)
    return (s.weight * surrogate(s.ratio, s.advantages))[kept].sum()


def filter_sequence(s: Sequence, cap: float = 1.1) -> Tensor:
    mean = float((s.proximal - s.behavior).mean().exp())
    return ppo(s) if 1 / cap <= mean <= cap else 0.0 * s.theta.sum()


def loglinear(s: Sequence) -> Tensor:
    """The proximal policy lies on the way from behaviour to current, age / (age + progress) of it; at the start it is the current one."""
    theta = s.theta.detach()
    if s.progress == 0:
        proximal = theta
    else:
        share = s.age / (s.age + s.progress)
        proximal = (1 - share) * s.behavior + share * theta
    weight = (proximal - s.behavior).exp()
    return (weight * surrogate((s.theta - proximal).exp(), s.advantages)).sum()


def entropy(s: Sequence, coefficient: float = 0.02) -> Tensor:
    return ppo(s) + coefficient * s.entropy.sum()


def kl_k1(s: Sequence, beta: float = 0.3) -> Tensor:
    """The gradient of KL(theta || ref) = E[log(theta / ref)] is E[log(theta / ref) * d(log theta)]."""
    return ppo(s) - beta * ((s.theta - s.ref).detach() * s.theta).sum()


def kl_k2(s: Sequence, beta: float = 0.3) -> Tensor:
    return ppo(s) - beta * ((s.theta - s.ref) ** 2 / 2).sum()


def kl_k3(s: Sequence, beta: float = 0.3) -> Tensor:
    return ppo(s) - beta * ((s.ref - s.theta).exp() - 1 + s.theta - s.ref).sum()
