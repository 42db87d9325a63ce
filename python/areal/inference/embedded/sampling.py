"""Sampling keyed by (seed, position): the same uniform number whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
_MASK = (1 << 64) - 1
_MIX_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), elementwise."""
    x = x + _GOLDEN
    x = (x ^ (x >> _S30)) * _MIX_1
    x = (x ^ (x >> _S27)) * _MIX_2
    return x ^ (x >> _S31)


def sequence_key(seed: int) -> int:
    """The key of a sequence's random numbers. Seeds count modulo 2^64."""
    return int(splitmix64(np.array([seed & _MASK], dtype=np.uint64))[0])


def keyed_uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) per (sequence key, position in the answer); 53 random bits each."""
    bits = splitmix64(keys ^ positions.view(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of_sample(seed: int, sample: int) -> int:
    """Seed of sample ``sample`` of a request for several; sample 0 keeps the request's own seed."""
    return seed if sample == 0 else sequence_key(sequence_key(seed) + sample)


def sample_tokens(
    logits_RV: Tensor,
    uniforms_R: Tensor,
    *,
    temperature_R: Tensor | None = None,
    top_p_R: Tensor | None = None,
    top_k_R: Tensor | None = None,
    banned_RV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token a row by the inverse of the cumulative distribution, in float64.

    Args:
        logits_RV: float [R, V].
        uniforms_R: float64 [R], in [0, 1).
        temperature_R: float32 [R]; 0 takes the likeliest token. None = 1 everywhere.
        top_p_R, top_k_R: float64 and int64 [R]; None = off everywhere. A token is kept while the mass before it is below top_p and its
            rank is below top_k (0 = off).
        banned_RV: bool [R, V], tokens that may not be drawn.

    Returns:
        ids int64 [R] and log-probs float32 [R]: log_softmax(logits / temperature) over the whole vocabulary, whatever was cut off.
    """
    logits = logits_RV.float()
    greedy = None
    if temperature_R is not None:
        greedy = temperature_R == 0
        logits = logits / torch.where(greedy, 1.0, temperature_R).unsqueeze(1)
    logprobs = torch.log_softmax(logits, dim=-1)
    mass = logprobs.exp()
    if banned_RV is not None:
        mass = mass.masked_fill(banned_RV, 0.0)
    if top_p_R is not None or top_k_R is not None:
        mass = _truncate(mass, top_p_R, top_k_R)
    cumulative = torch.cumsum(mass, dim=-1, dtype=torch.float64)
    threshold = uniforms_R.unsqueeze(1) * cumulative[:, -1:]
    # right=True: the first entry above the threshold, which is never a token without mass.
    ids = torch.searchsorted(cumulative, threshold, right=True)
    if greedy is not None:
        ids = torch.where(greedy.unsqueeze(1), mass.argmax(dim=-1, keepdim=True), ids)
    return ids.squeeze(1), logprobs.gather(1, ids).squeeze(1)


def _truncate(mass: Tensor, top_p: Tensor | None, top_k: Tensor | None) -> Tensor:
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_p is not None:
        before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
        keep &= before < top_p.unsqueeze(1) * ordered.sum(dim=-1, keepdim=True, dtype=torch.float64)
    if top_k is not None:
        rank = torch.arange(mass.shape[1], device=mass.device)
        keep &= (rank < top_k.unsqueeze(1)) | (top_k.unsqueeze(1) == 0)
    keep[:, 0] = True
    return torch.zeros_like(mass).scatter(1, order, ordered * keep)
