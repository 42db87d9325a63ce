"""What one call costs when there is next to nothing to compute: `ppo_loss` at T = 64 on the CPU.

The floor is an empty op, registered with torch.library like the real one and wrapped in an autograd.Function: no Python op with a
gradient can be called for less. The limit is the 15 microseconds that a forward call may take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from areal.ops.ppo_loss import ppo_loss
from benchmarks.op_bench import Case, Seconds

DEVICES = ("cpu",)
T = 64
FLOOR = "floor: empty op"

_library = torch.library.Library("areal_bench", "FRAGMENT")
_library.define("empty(Tensor logprobs) -> Tensor")
_library.impl("empty", lambda logprobs: logprobs.new_empty(()), "CompositeExplicitAutograd")
torch.library.register_fake("areal_bench::empty", lambda logprobs: logprobs.new_empty(()), lib=_library)
_empty = torch.ops.areal_bench.empty.default


class _EmptyOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs: Tensor) -> Tensor:
        ctx.save_for_backward(logprobs)
        return _empty(logprobs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logprobs,) = ctx.saved_tensors
        return logprobs


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    if device != "cpu":
        return
    current = torch.randn(T, requires_grad=True)
    others = (torch.randn(T), torch.randn(T), torch.randn(T), torch.ones(T, dtype=torch.bool))

    def forward(backend: str) -> Tensor:
        loss, _ = ppo_loss(current, *others, eps_clip=0.2, denominator=float(T), backend=backend)
        return loss

    def both(loss: Callable[[], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(), current)[0]

    def check(result: object, expected: object) -> None:
        if result is not FLOOR:  # the empty op computes nothing
            torch.testing.assert_close(result, expected)

    def empty() -> str:
        _EmptyOp.apply(current)
        return FLOOR

    def empty_both() -> str:
        both(lambda: _EmptyOp.apply(current))
        return FLOOR

    names = [b for b in backends if b in ("torch", "cpp")]
    one_way: dict[str, Callable[[], object]] = {b: lambda b=b: forward(b) for b in names}
    yield Case(f"T {T}", T, one_way | {FLOOR: empty}, check, "torch", Seconds(15e-6), 1.0)
    both_ways: dict[str, Callable[[], object]] = {b: lambda b=b: both(lambda: forward(b)) for b in names}
    yield Case(f"T {T}", T, both_ways | {FLOOR: empty_both}, check, "torch", None, None, "forward+backward")
