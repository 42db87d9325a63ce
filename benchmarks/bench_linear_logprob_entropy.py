"""linear_logprob_entropy: the limit is its bare matrix products, one forward, four with the backward pass, which makes the logits again.

The rivals hold whole logits: the formula as one writes it down, eager and through torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from areal.ops import linear_logprob_entropy
from benchmarks.op_bench import Case, Products

# (T, H, V, dtype); on a GPU what has a target first: time may run out
SHAPES = {
    "cpu": [(2048, 256, 32768, torch.float32), (2048, 256, 32768, torch.bfloat16)],
    "cuda": [(16384, 4096, 151936, torch.bfloat16), (4096, 4096, 151936, torch.bfloat16)],
}
PRODUCTS = {"forward": 1, "forward+backward": 4}


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor


Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def make_inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> Inputs:
    """Logits of standard deviation 1."""
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype) * width**-0.5
    return Inputs(hidden, weight, torch.randint(0, vocabulary, (tokens,), device=device))


def label_of(inputs: Inputs) -> str:
    tokens, width = inputs.hidden.shape
    return f"T {tokens} H {width} V {len(inputs.weight)} {str(inputs.hidden.dtype).removeprefix('torch.')}"


def bare_products(inputs: Inputs, n: int) -> Products:
    """n of: the logits, d(hidden), d(weight), the logits again."""
    (tokens, width), vocabulary = inputs.hidden.shape, len(inputs.weight)
    logits = (tokens, width, vocabulary)
    shapes = logits, (tokens, vocabulary, width), (vocabulary, tokens, width), logits
    return Products(shapes[:n], inputs.hidden.dtype)


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    for shape in SHAPES[device]:
        inputs = make_inputs(*shape, device)
        found: dict[str, Function] = {b: partial(linear_logprob_entropy, backend=b) for b in backends if device == "cpu" or b != "cpp"}
        found["eager"] = eager
        if device == "cuda":
            found["torch.compile"] = torch.compile(eager)
        weights = torch.randn(2, shape[0], device=device)
        for phase, products in PRODUCTS.items():
            run = forward if phase == "forward" else partial(both, weights)
            variants: dict[str, Callable[[], object]] = {name: partial(run, f, inputs) for name, f in found.items()}
            limit = bare_products(inputs, products)
            yield Case(label_of(inputs), shape[0] * shape[2], variants, partial(check, shape[3]), "torch", limit, None, phase)


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def forward(function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    return function(*inputs)


def both(weights: Tensor, function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    hidden, weight = (x.detach().requires_grad_() for x in inputs[:2])
    return torch.autograd.grad(function(hidden, weight, inputs.targets), (hidden, weight), (weights[0], weights[1]))


def check(dtype: torch.dtype, result: object, expected: object) -> None:
    """By norm: single elements of a 16-bit gradient are rounded."""
    assert isinstance(result, tuple)
    assert isinstance(expected, tuple)
    for got, want in zip(result, expected, strict=True):
        error = float((got.float() - want.float()).norm() / want.float().norm())
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"differs by {error:.2g} of its norm"
