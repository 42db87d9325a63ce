"""flatten_weights and unflatten_weights on the shapes of real models, against moving as many bytes. The rival casts and concatenates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from areal.ops import flatten_weights, unflatten_weights
from benchmarks.op_bench import Bytes, Case

TARGET = {"cpu": 0.8, "cuda": 0.85}
CAT = "torch.cat"


@dataclass(frozen=True)
class Model:
    """A Qwen2."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv: int
    vocabulary: int
    tied: bool

    def shapes(self) -> list[tuple[int, ...]]:
        h, i, kv = self.hidden, self.intermediate, self.kv
        layer: list[tuple[int, ...]] = [(h, h), (h,), (kv, h), (kv,), (kv, h), (kv,), (h, h), (i, h), (i, h), (h, i), (h,), (h,)]
        ends: list[tuple[int, ...]] = [(self.vocabulary, h)] * (1 if self.tied else 2) + [(h,)]
        return ends[:1] + layer * self.layers + ends[1:]

    def weights(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        return {f"{i}": torch.randn(shape, device=device, dtype=dtype) for i, shape in enumerate(self.shapes())}


TINY = Model("tiny", 4, 256, 1024, 64, 4096, True)
HALF_B = Model("Qwen2 0.5B", 24, 896, 4864, 128, 151936, True)  # a bucket of 0.92 GiB
SEVEN_B = Model("Qwen2 7B", 28, 3584, 18944, 512, 152064, False)
MODELS = {"cpu": (TINY, HALF_B), "cuda": (SEVEN_B, HALF_B)}  # what has a target first: time may run out


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    names = [b for b in backends if b in {"cpu": ("torch", "cpp"), "cuda": ("torch", "cuda")}[device]]
    for model in MODELS[device]:
        for dtype in (torch.bfloat16, torch.float32):
            weights = model.weights(dtype, device)
            yield flatten_case(model, weights, names, device)
            yield unflatten_case(model, weights, names, device)
            del weights


def flatten_case(model: Model, weights: dict[str, Tensor], names: Sequence[str], device: str) -> Case:
    """Into memory of its own for every variant, or one would be checked against what another one wrote."""
    _, layout = flatten_weights(weights)
    buckets = {name: torch.zeros(layout.nbytes, dtype=torch.uint8, device=device) for name in names}
    variants: dict[str, Callable[[], object]] = {b: partial(flatten, weights, buckets[b], b) for b in names}
    variants[CAT] = partial(concatenate, weights)
    moved = layout.nbytes + sum(t.nbytes for t in weights.values())
    return Case(_label(model, weights, "to"), moved, variants, None, "torch", Bytes(moved), TARGET[device], "flatten")


def unflatten_case(model: Model, weights: dict[str, Tensor], names: Sequence[str], device: str) -> Case:
    bucket, layout = flatten_weights(weights)
    into = {name: {key: torch.zeros_like(t) for key, t in weights.items()} for name in names}
    variants: dict[str, Callable[[], object]] = {b: partial(unflatten_weights, bucket, layout, into[b], b) for b in names}
    moved = layout.nbytes + sum(t.nbytes for t in weights.values())
    return Case(_label(model, weights, "from"), moved, variants, None, "torch", Bytes(moved), TARGET[device], "unflatten")


def _label(model: Model, weights: dict[str, Tensor], way: str) -> str:
    return f"{model.name}, {len(weights)} tensors, {str(weights['0'].dtype).removeprefix('torch.')} {way} bfloat16"


def flatten(weights: dict[str, Tensor], bucket: Tensor, backend: str) -> Tensor:
    return flatten_weights(weights, bucket, backend=backend)[0]


def concatenate(weights: dict[str, Tensor]) -> Tensor:
    """As inference servers' bucketed updates do. All tensors of these models fill whole lines, so there are no gaps between them."""
    return torch.cat([tensor.to(torch.bfloat16).view(-1) for tensor in weights.values()]).view(torch.uint8)
