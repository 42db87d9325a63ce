"""gae over packed sequences of lognormal lengths. The rival is the loop over the time of a padded batch, as trainers write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from areal.ops import gae
from benchmarks.op_bench import Bytes, Case, Rival

GAMMA, LAM = 0.99, 0.95
LOOP = "loop over a padded batch"
TOKENS = {"cpu": (2**12, 2**16, 2**20), "cuda": (2**16, 2**20, 2**24)}
TARGET_T = 2**16


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    names = [b for b in backends if b in {"cpu": ("torch", "cpp"), "cuda": ("torch", "cuda")}[device]]
    for total in TOKENS[device]:
        cu_seqlens = lognormal(total).to(device)
        rewards, values = torch.randn(total, device=device), torch.randn(total, device=device)
        variants: dict[str, Callable[[], object]] = {b: partial(gae, rewards, values, cu_seqlens, GAMMA, LAM, b) for b in names}
        label = f"T {total}, {len(cu_seqlens) - 1} sequences"
        if device == "cuda":
            yield Case(label, total, variants, close, "torch", Bytes(16 * total), None)
            continue
        yield Case(label, total, variants, close, "torch", Rival("torch", 5.0), None)
        if total == TARGET_T:
            with_loop = variants | {LOOP: partial(padded_loop, rewards, values, cu_seqlens)}
            yield Case(f"{label}, against a loop", total, with_loop, close, "torch", Rival(LOOP, 100.0), None)


def lognormal(total: int) -> Tensor:
    """int32 [n + 1]: sequences of some 600 tokens in the middle, 8192 at most, that fill ``total``."""
    generator = torch.Generator().manual_seed(0)
    ends = [0]
    while ends[-1] < total:
        length = int(torch.empty(()).log_normal_(6.4, 1.0, generator=generator).clamp(1, 8192))
        ends.append(min(total, ends[-1] + length))
    return torch.tensor(ends, dtype=torch.int32)


def padded_loop(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """From packed to padded [n, longest], token by token from the end, and back."""
    begins, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    n, longest = len(lengths), int(lengths.max())
    inside = torch.arange(longest) < lengths[:, None]
    index = (begins[:, None] + torch.arange(longest)).clamp(max=len(rewards) - 1)
    rewards_nL, values_nL = rewards[index] * inside, values[index] * inside
    advantage, advantages = torch.zeros(n), torch.zeros(n, longest)
    for t in reversed(range(longest)):
        next_values = values_nL[:, t + 1] if t + 1 < longest else torch.zeros(n)
        delta = rewards_nL[:, t] + GAMMA * next_values - values_nL[:, t]
        advantage = delta + GAMMA * LAM * advantage
        advantages[:, t] = advantage
    packed = advantages[inside]
    return packed, packed + values


def close(result: object, expected: object) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
