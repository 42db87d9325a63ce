"""Normalisation of rewards or advantages over groups, over the batch, or against the rest of a group: plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from areal.ops._registration import check_tensor

MeanLevel = Literal["group", "batch", "leave_one_out", "none"]
StdLevel = Literal["group", "batch", "none"]


def normalize_advantages(
    values: Tensor,
    group_sizes: int | Sequence[int] | None = None,
    *,
    weights: Tensor | None = None,
    mean: MeanLevel = "group",
    std: StdLevel = "group",
    eps: float = 1e-5,
) -> Tensor:
    """(values - mean) / (std + eps), like ``values`` (floating, [N]); computed in float64, on the device of ``values``, without a wait.

    Groups lie one after another: ``group_sizes`` is their common size or the size of each, None means that all are one group.
    ``weights`` [N], at least 0, say how often a value counts (loss tokens of a sample); None counts each once. The deviation is that of
    the population.

    - mean="group", std="group": GRPO (arXiv 2402.03300); std="none": Dr. GRPO (arXiv 2503.20783).
    - mean="leave_one_out": against the mean of the others of the group, RLOO (arXiv 2402.14740).
    - mean="batch", std="batch": over all values; "none" leaves that part out.

    Values that are all equal where the mean or the deviation is taken become exactly 0, whatever the rounding: such a group does not say
    which answer is better. Values of weight 0 do not count, but are normalised like the others. ``ValueError`` for sizes that do not add
    up to N, unknown levels, and tensors of other shapes.
    """
    op = "normalize_advantages"
    check_tensor(op, "values", values, (None,), (torch.float32, torch.float64, torch.bfloat16, torch.float16))
    if weights is not None:
        check_tensor(op, "weights", weights, (len(values),), (getattr(weights, "dtype", torch.float32),), values.device)
    for name, level, levels in (("mean", mean, get_args(MeanLevel)), ("std", std, get_args(StdLevel))):
        if level not in levels:
            raise ValueError(f"{op}: {name} is '{level}'; it must be one of {', '.join(levels)}")
    sizes = _group_sizes(len(values), group_sizes)
    if not len(values):
        return torch.empty_like(values)

    x = values.detach().double()
    w = torch.ones_like(x) if weights is None else weights.double()
    batch = _Moments(x[:, None], w[:, None])
    if "group" in (mean, std) or mean == "leave_one_out":
        place = _place_in_groups(sizes, x.device)
        in_group = _Moments(_spread(x, sizes, place), _spread(w, sizes, place)).of_each(sizes, place)
    else:
        in_group = batch
    centre = batch if mean == "batch" else in_group
    scale = batch if std == "batch" else in_group

    result = x if mean == "none" else x - centre.mean
    if mean == "leave_one_out":
        result = result * (centre.weight / (centre.weight - w))
    if std != "none":
        result = result / (scale.std + eps)
    if mean != "none":
        result = result.masked_fill(centre.equal, 0.0)
    if std != "none":
        result = result.masked_fill(scale.equal, 0.0)
    return result.to(values.dtype)


def _group_sizes(n: int, group_sizes: int | Sequence[int] | None) -> list[int]:
    if group_sizes is None:
        return [n]
    if isinstance(group_sizes, int):
        if group_sizes < 1 or n % group_sizes:
            raise ValueError(f"normalize_advantages: {n} values cannot be cut into groups of {group_sizes}")
        return [group_sizes] * (n // group_sizes)
    sizes = [int(size) for size in group_sizes]
    if min(sizes, default=0) < 0 or sum(sizes) != n:
        raise ValueError(f"normalize_advantages: group_sizes adds up to {sum(sizes)}, for {n} values; no size may be negative")
    return sizes


def _place_in_groups(sizes: list[int], device: torch.device) -> Tensor:
    """int64 [N]: where each value goes in a matrix [largest group, groups], flattened."""
    counts = torch.tensor(sizes)
    group = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    starts = counts.cumsum(0) - counts
    place = (torch.arange(len(group)) - starts[group]) * len(sizes) + group
    # From pageable memory the driver may wait for the stream before it copies.
    return place.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else place


def _spread(x: Tensor, sizes: list[int], place: Tensor) -> Tensor:
    """float64 [largest group, groups], a group a column, zeros where it has no more values."""
    return x.new_zeros(max(sizes) * len(sizes)).scatter(0, place, x).view(max(sizes), len(sizes))


class _Moments:
    """Of each column of ``x`` with the weights ``w`` ([n, columns]; what has the weight 0 does not count), each [columns]."""

    def __init__(self, x: Tensor, w: Tensor) -> None:
        counted = w > 0
        low = torch.where(counted, x, torch.inf).amin(0)
        high = torch.where(counted, x, -torch.inf).amax(0)
        self.equal = low >= high
        """At most one value counts, or all that do are the same."""
        self.weight = w.sum(0)
        # By selection, since a value that does not count may not be a number, and 0 * NaN is NaN.
        self.mean = torch.where(counted, x * w, 0.0).sum(0) / self.weight
        self.std = torch.where(counted, (x - self.mean).square() * w, 0.0).sum(0).div(self.weight).sqrt()

    def of_each(self, sizes: list[int], place: Tensor) -> _Moments:
        """The same for every value: [N]."""
        group = place % len(sizes)
        self.equal, self.weight, self.mean, self.std = (x[group] for x in (self.equal, self.weight, self.mean, self.std))
        return self
