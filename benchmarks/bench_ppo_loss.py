"""ppo_loss reads four tensors and the mask and writes one gradient, forward; backward multiplies that by a number. The limit is that traffic.

The rival is decoupled PPO with the usual statistics as one writes it down in PyTorch, eager and, on a GPU, through torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from areal.ops import ppo_loss
from benchmarks.op_bench import Bytes, Case, Rival

TOKENS = {"cpu": [4096, 65536, 1 << 20], "cuda": [1 << 24, 32768, 1 << 20]}  # what has a target first: time may run out
SEQUENCE_LENGTH = 1024
FACTOR = 5.0
SHARE = 0.8
FORWARD_BYTES = 4 * 4 + 1 + 4  # a token: log-probs thrice, advantage, mask; gradient
BACKWARD_BYTES = 4 + 4

EPS_CLIP, CAP = 0.2, 2.0

Loss = Callable[..., Tensor]


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    for n in TOKENS[device]:
        x = inputs(n, device)
        for phase in ("forward", "forward+backward"):
            functions: dict[str, Loss] = {b: partial(fused, backend=b) for b in backends if device == "cpu" or b != "cpp"}
            functions["eager"] = eager
            if device == "cuda":
                functions["torch.compile"] = torch.compile(eager)
            yield case(f"T {n}", n, phase, functions, x, wanted=phase != "forward" or device == "cuda")
        cuts = torch.arange(0, n + 1, SEQUENCE_LENGTH, dtype=torch.int32, device=device)
        by_sequence: dict[str, Loss] = {
            b: partial(fused, backend=b, ratio_level="sequence", cu_seqlens=cuts) for b in backends if device == "cpu" or b != "cpp"
        }
        yield case(f"T {n} GSPO", n, "forward+backward", by_sequence, x, wanted=False)


def inputs(n: int, device: str) -> tuple[Tensor, ...]:
    proximal = -torch.rand(n, device=device) * 3
    noise = [0.2 * torch.randn(n, device=device) for _ in range(2)]
    return proximal + noise[0], proximal, proximal + noise[1], torch.randn(n, device=device), torch.rand(n, device=device) < 0.8


def fused(*x: Tensor, backend: str, **options: object) -> Tensor:
    return ppo_loss(*x, eps_clip=EPS_CLIP, behav_imp_weight_cap=CAP, denominator=float(len(x[0])), backend=backend, **options)[0]  # type: ignore[arg-type]


def eager(logprobs: Tensor, proximal: Tensor, behavior: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    log_ratio = torch.where(mask, logprobs - proximal, 0.0)
    log_weight = torch.where(mask, proximal - behavior, 0.0)
    ratio, weight = log_ratio.exp(), log_weight.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - EPS_CLIP, 1 + EPS_CLIP) * advantages
    loss = -torch.where(mask, weight.clamp(max=CAP) * torch.minimum(plain, clipped), 0.0).sum() / len(logprobs)
    with torch.no_grad():  # what a training script logs
        (mask & (clipped < plain)).sum()
        torch.where(mask, ratio, 0.0).sum()
        torch.where(mask, weight, 0.0).sum()
        (ratio - 1 - log_ratio).sum()
        (weight - 1 - log_weight).sum()
    return loss


def case(label: str, n: int, phase: str, functions: dict[str, Loss], x: tuple[Tensor, ...], *, wanted: bool) -> Case:
    call = forward if phase == "forward" else both
    variants: dict[str, Callable[[], object]] = {name: partial(call, function, x) for name, function in functions.items()}
    if x[0].is_cuda:
        moved = n * (FORWARD_BYTES + (BACKWARD_BYTES if phase != "forward" else 0))
        # A short call is launches and Python: its time is reported, and has no target.
        return Case(label, n, variants, check, "torch", Bytes(moved), SHARE if wanted and n >= 1 << 24 else None, phase)
    limit = Rival("eager", FACTOR) if wanted and n >= 1 << 16 else None
    return Case(label, n, variants, check, "torch", limit, FACTOR if limit else None, phase)


def forward(loss: Loss, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """With the gradient made, where it is made forward."""
    return (loss(x[0].detach().requires_grad_(), *x[1:]).detach(),)


def both(loss: Loss, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    logprobs = x[0].detach().requires_grad_()
    value = loss(logprobs, *x[1:])
    return value.detach(), *torch.autograd.grad(value, logprobs)


def check(result: object, expected: object) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
