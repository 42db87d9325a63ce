"""Optimizers: AdamW, or Muon on the matrices of the layers with AdamW on everything else. Both work on sharded parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from areal.config import OptimizerConfig
from areal.models.loading import decoder_layers

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(Optimizer):
    """Momentum, orthogonalised (https://kellerjordan.github.io/posts/muon/); the arithmetic of ``torch.optim.Muon``.

    Matrices of one shape are iterated together, which takes half of the time on a small model. Parameters must be 2-D; sharded ones
    are gathered for the iteration, and every rank keeps its own part of the momentum and of the result.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if bad := [tuple(p.shape) for p in group["params"] if p.ndim != 2]:
                raise ValueError(f"Muon takes matrices only, not a parameter of shape {bad[0]}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = self._momentum(parameter, group["momentum"])
                    by_shape[direction.shape].append((parameter, direction))
            for shape, members in by_shape.items():
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                directions = orthogonalise(torch.stack([direction for _, direction in members]))
                for (parameter, _), direction in zip(members, directions, strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(_as_sharded(direction.to(parameter.dtype), parameter), alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The whole matrix to orthogonalise (Nesterov momentum)."""
        grad = parameter.grad
        assert grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1.0 - momentum)
        direction = grad.lerp(buffer, momentum)
        return direction.full_tensor() if isinstance(direction, DTensor) else direction


def _as_sharded(full: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return full
    replicated = DTensor.from_local(full, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements)  # takes this rank's part, nothing is sent


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U V^T of each U S V^T: [n, a, b] -> bfloat16 [n, a, b], by a quintic Newton-Schulz iteration."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class PolicyOptimizer:
    """The optimizers of one model behind one ``step``; rates are those of the config times a factor."""

    def __init__(self, model: PreTrainedModel, config: OptimizerConfig) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        matrices: list[nn.Parameter] = []
        if config.type == "muon":
            inside = {id(p) for p in decoder_layers(model).parameters()}
            matrices = [p for p in parameters if p.ndim == 2 and id(p) in inside]
        others = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in others]
        self._optimizers: list[tuple[Optimizer, float]] = []
        if matrices:
            self._optimizers.append((Muon(matrices, config.muon_lr, config.weight_decay), config.muon_lr))
        if rest:
            groups = [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},  # scales and biases are not pulled to zero
            ]
            adamw = AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
            self._optimizers.append((adamw, config.lr))
        self._owners = {p: optimizer for optimizer, _ in self._optimizers for group in optimizer.param_groups for p in group["params"]}

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered of a parameter, by name: empty before its first step, and nothing of a frozen one. It may be changed."""
        owner = self._owners.get(parameter)
        return {} if owner is None else owner.state[parameter]

    def step(self, lr_scale: float) -> None:
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * lr_scale
            optimizer.step()
