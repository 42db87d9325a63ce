"""linear_ppo_loss makes loss, d(hidden) and d(weight) in three matrix products: the limit is these products, bare.

The inputs are on policy, with all advantages 1: then the gradient is that of cross-entropy, and fused cross-entropies can take part. The
other rivals hold whole logits (eager, torch.compile), or recompute them in a fourth product (linear_logprob_entropy and ppo_loss).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from areal.ops import linear_logprob_entropy, linear_ppo_loss, ppo_loss
from benchmarks.bench_linear_logprob_entropy import SHAPES, Inputs, bare_products, check, eager, label_of, make_inputs
from benchmarks.op_bench import Case

SHARE = {"cuda": 1 / 1.15}
MOST_MEMORY = {"cuda": 4 * 2**30}

Gradients = tuple[Tensor, Tensor]


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    for shape in SHAPES[device]:
        inputs = make_inputs(*shape, device)
        with torch.no_grad():
            behavior = linear_logprob_entropy(*inputs)[0]
        variants: dict[str, Callable[[], object]] = {
            b: partial(fused, b, inputs, behavior) for b in backends if b != "cuda" and (device == "cpu" or b != "cpp")
        }
        variants["in two steps"] = partial(whole, linear_logprob_entropy, inputs, behavior)
        variants["eager"] = partial(whole, eager, inputs, behavior)
        if device == "cuda":
            variants["torch.compile"] = partial(whole, torch.compile(eager), inputs, behavior)
            variants["Liger"] = partial(liger, inputs)
        yield Case(
            label_of(inputs),
            shape[0] * shape[2],
            variants,
            partial(check, shape[3]),
            "torch",
            bare_products(inputs, 3),
            SHARE.get(device),
            "forward+backward",
            MOST_MEMORY.get(device),
        )


def fused(backend: str, inputs: Inputs, behavior: Tensor) -> Gradients:
    hidden, weight = leaves(inputs)
    advantages, mask = torch.ones_like(behavior), torch.ones_like(inputs.targets, dtype=torch.bool)
    result = linear_ppo_loss(
        hidden, weight, inputs.targets, None, behavior, advantages, mask, eps_clip=0.2, denominator=len(behavior), backend=backend
    )
    return torch.autograd.grad(result.loss, (hidden, weight))


def whole(score: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, behavior: Tensor) -> Gradients:
    hidden, weight = leaves(inputs)
    logprobs, _ = score(hidden, weight, inputs.targets)
    advantages, mask = torch.ones_like(behavior), torch.ones_like(inputs.targets, dtype=torch.bool)
    loss, _ = ppo_loss(logprobs, logprobs.detach(), behavior, advantages, mask, eps_clip=0.2, denominator=len(behavior))
    return torch.autograd.grad(loss, (hidden, weight))


def liger(inputs: Inputs) -> Gradients:
    """Fused linear cross-entropy of the package liger-kernel."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger-kernel is not installed")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden, weight = leaves(inputs)
    return torch.autograd.grad(LigerFusedLinearCrossEntropyLoss()(weight, hidden, inputs.targets), (hidden, weight))


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
