"""Log-probs and entropies of a chunk of logits, and the gradient over the logits in place: the kernels of ``logprob_entropy``, which keep
the logits in their own dtype, or plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from areal.ops._dispatch import backend_for
from areal.ops.logprob_entropy import _UNFIT, _backward_into, _forward


def choose(op: str, hidden: Tensor, backend: str | None, has: tuple[str, ...] = ("torch", "cpp", "triton", "cuda")) -> str:
    """The backend for logits like ``hidden``."""
    unfit = tuple((name, why) for name, why in _UNFIT.get(hidden.dtype, ()) if name in has)
    return backend_for(op, hidden.device, backend, has=has, unfit=unfit)


def score(backend: str, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs [n], entropy [n] and, for ``differentiate_``, the largest logit of each row and the log of its sum of exp, [2, n]."""
    if backend != "torch":
        return _forward(logits, targets, temperature, backend)
    z = _wide(logits)
    largest = z.amax(-1)
    # A row of -inf alone gives NaN, as in the other backends.
    shifted = (z - largest.unsqueeze(1)) / temperature
    log_sum = shifted.exp().sum(-1).log()
    log_p = shifted - log_sum.unsqueeze(1)
    entropy = -(log_p.exp() * _finite(log_p)).sum(-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), entropy, torch.stack([largest, log_sum])


def differentiate_(
    backend: str,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: Tensor,
    statistics: Tensor,
    g_logprobs: Tensor,
    g_entropy: Tensor,
) -> None:
    """Overwrites logits [n, V] by (g_logprobs (onehot - p) - g_entropy p (log p + entropy)) / temperature."""
    if backend != "torch":
        _backward_into(logits, logits, targets, entropy, statistics, g_logprobs, g_entropy, temperature, backend)
        return
    largest, log_sum = statistics
    log_p = _finite((_wide(logits) - largest.unsqueeze(1)) / temperature - log_sum.unsqueeze(1))
    gradient = -log_p.exp() * (g_logprobs + g_entropy * entropy).unsqueeze(1) - log_p.exp() * log_p * g_entropy.unsqueeze(1)
    gradient.scatter_add_(1, targets.unsqueeze(1), g_logprobs.unsqueeze(1))
    logits.copy_(gradient / temperature)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _finite(log_p: Tensor) -> Tensor:
    """-inf * 0 would be NaN."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)
