"""Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, equation 16) over packed sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from areal.ops._dispatch import backend_for, compiled_module
from areal.ops._registration import check_tensor, cuda_stream, define_op, on_device

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    backend: Literal["cpp", "cuda", "torch"] | None = None,
    *,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both like ``rewards``, of n sequences packed one after another.

        delta_t = rewards_t + gamma * values_{t+1} - values_t
        advantages_t = delta_t + gamma * lam * advantages_{t+1}
        returns_t = advantages_t + values_t

    Behind its last token a sequence has the advantage 0 and the value ``bootstrap`` [n], or 0 without it (it ended, it was not cut off).

    ``rewards`` and ``values`` are float [T] of one dtype (``cpp`` and ``cuda`` take float32, the reference every one), ``cu_seqlens`` is
    int32 [n + 1], rising from 0 to T; sequences may be empty. On a GPU nothing is read back, so there ``cu_seqlens`` is not checked.
    The results are targets of training: they carry no gradient. ``ValueError`` for other shapes, dtypes or devices.
    """
    check_tensor("gae", "rewards", rewards, (None,), _FLOATS)
    check_tensor("gae", "values", values, (len(rewards),), (rewards.dtype,), rewards.device)
    check_tensor("gae", "cu_seqlens", cu_seqlens, (None,), (torch.int32,), rewards.device)
    if len(cu_seqlens) == 0:
        raise ValueError("gae: cu_seqlens is empty; it must have one entry more than there are sequences")
    if bootstrap is not None:
        check_tensor("gae", "bootstrap", bootstrap, (len(cu_seqlens) - 1,), (rewards.dtype,), rewards.device)
        bootstrap = bootstrap.detach()
    return _op(rewards.detach(), values.detach(), cu_seqlens, gamma, lam, bootstrap, backend)


def _run(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, bootstrap: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    unfit = () if rewards.dtype == torch.float32 else tuple((name, f"it takes float32, not {rewards.dtype}") for name in ("cpp", "cuda"))
    match backend_for("gae", rewards.device, backend, has=("cpp", "cuda", "torch"), unfit=unfit):
        case "cpp":
            return _cpp(rewards, values, cu_seqlens, gamma, lam, bootstrap)
        case "cuda":
            return _cuda(rewards, values, cu_seqlens, gamma, lam, bootstrap)
        case _:
            return _torch(rewards, values, cu_seqlens, gamma, lam, bootstrap)


def _fake(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, bootstrap: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


_op = define_op(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, float gamma, float lam, Tensor? bootstrap, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def _cpp(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, bootstrap: Tensor | None, instruction_set: str = ""
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    module = compiled_module()
    assert module is not None
    addresses = _addresses(rewards, values, cu_seqlens, bootstrap, advantages, returns)
    module.gae(addresses, len(cu_seqlens) - 1, len(rewards), gamma, lam, torch.get_num_threads(), instruction_set)
    return advantages, returns


def _cuda(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, bootstrap: Tensor | None) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    module = compiled_module()
    assert module is not None
    n_tiles = -(-len(rewards) // module.gae_cuda_tile)
    workspace = rewards.new_empty(2 * n_tiles)
    addresses = _addresses(rewards, values, cu_seqlens, bootstrap, advantages, returns)
    with on_device(rewards):
        module.gae_cuda(addresses, len(cu_seqlens) - 1, len(rewards), gamma, lam, workspace.data_ptr(), cuda_stream(rewards))
    return advantages, returns


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _torch(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence as log2(longest sequence) doublings: after step s the map from advantage t + 2^s to advantage t is (decay, sum)."""
    total, begins, ends = len(rewards), cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    longest = total
    if not cu_seqlens.is_cuda:
        lengths = ends - begins
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (lengths < 0).any():
            raise ValueError(f"gae: cu_seqlens must rise from 0 to the {total} tokens")
        longest = int(lengths.max()) if len(lengths) else 0
    if total == 0:
        return torch.empty_like(rewards), torch.empty_like(rewards)
    last = torch.where(ends > begins, ends - 1, total)  # empty sequences write to a place of no token
    is_last = torch.zeros(total + 1, dtype=torch.bool, device=rewards.device).index_fill_(0, last, True)[:total]
    next_values = torch.cat([values[1:], values.new_zeros(2)])
    next_values.scatter_(0, last, torch.zeros_like(last, dtype=values.dtype) if bootstrap is None else bootstrap)
    sums = rewards + gamma * next_values[:total] - values
    decays = torch.full_like(sums, gamma * lam).masked_fill_(is_last, 0.0)
    step = 1
    while step < longest:
        # Where the decay is 0 a sequence has ended: what comes then must not matter, be it infinite.
        joined = torch.where(decays[:-step] == 0, 0.0, decays[:-step] * sums[step:])
        sums = torch.cat([sums[:-step] + joined, sums[-step:]])
        decays = torch.cat([decays[:-step] * decays[step:], decays[-step:]])
        step *= 2
    return sums, sums + values
