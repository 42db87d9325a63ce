"""The loss of a critic."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, eps_clip: float | None, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error with value clipping (PPO2 of OpenAI Baselines), summed over tokens and divided by ``denominator``:

        v' = old + clip(v - old, -eps_clip, eps_clip),   loss = max((v - return)^2, (v' - return)^2) / 2

    A value that has already moved ``eps_clip`` towards its return has no gradient; ``None`` clips nothing. All arguments are float [n],
    ``old_values`` and ``returns`` constants. Also returns the sums value_loss (before the division) and value_clipped (tokens without a
    gradient).
    """
    errors = (values - returns).square()
    clipped = torch.zeros_like(errors, dtype=torch.bool)
    if eps_clip is not None:
        moved = values.detach() - old_values
        held_back = (old_values + moved.clamp(-eps_clip, eps_clip) - returns).square()
        clipped = (moved.abs() > eps_clip) & (held_back > errors)
        errors = torch.where(clipped, held_back, errors)
    total = 0.5 * errors.sum()
    return total / denominator, {"value_loss": total.detach(), "value_clipped": clipped.sum().float()}
