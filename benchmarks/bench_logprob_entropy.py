"""logprob_entropy reads the logits once forward, and reads and writes as much once backward; the limit is a copy of as many bytes on a GPU.

On the CPU the target is a factor over plain PyTorch. The rivals, eager and through torch.compile, are the formula as one writes it down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from areal.ops import logprob_entropy
from benchmarks.op_bench import Bytes, Case, Rival

# (T, V, dtype); on a GPU what has a target first: time may run out
SHAPES = {
    "cpu": [(64, 32768, torch.float32), (512, 32768, torch.float32), (512, 32768, torch.bfloat16)],
    "cuda": [(16384, 151936, torch.bfloat16), (4096, 151936, torch.bfloat16), (1024, 151936, torch.bfloat16)],
}
SHARE = {"cuda": 0.85}
FACTOR = 2.0

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    for rows, n, dtype in SHAPES[device]:
        logits = torch.randn(rows, n, device=device, dtype=dtype) * 3
        targets = torch.randint(0, n, (rows,), device=device)
        for phase in ("forward", "backward", "forward+backward"):
            yield case(phase, logits, targets, functions(phase, device, backends))


def functions(phase: str, device: str, backends: Sequence[str]) -> dict[str, Function]:
    found: dict[str, Function] = {b: partial(logprob_entropy, backend=b) for b in backends if device == "cpu" or b != "cpp"}
    if phase == "backward" and device == "cuda":
        return found  # the graphs of all would not fit into memory at once
    found["eager"] = eager
    if device == "cuda":
        found["torch.compile"] = torch.compile(eager)
    return found


def eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def case(phase: str, logits: Tensor, targets: Tensor, found: dict[str, Function]) -> Case:
    rows, n = logits.shape
    gradients = torch.randn(rows, device=logits.device), torch.randn(rows, device=logits.device)
    variants: dict[str, Callable[[], object]]
    match phase:
        case "forward":
            variants = {name: partial(forward, f, logits, targets) for name, f in found.items()}
        case "backward":
            variants = {name: Backward(f, logits, targets, gradients) for name, f in found.items()}
        case _:
            variants = {name: partial(both, f, logits, targets, gradients) for name, f in found.items()}
    moved = logits.nbytes * {"forward": 1, "backward": 2, "forward+backward": 3}[phase]
    share = SHARE.get(logits.device.type)
    limit = Rival("eager", FACTOR) if share is None else Bytes(moved)
    name = str(logits.dtype).removeprefix("torch.")
    return Case(f"T {rows} V {n} {name}", rows * n, variants, partial(check, logits.dtype), "torch", limit, share or FACTOR, phase)


@torch.no_grad()
def forward(function: Function, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return function(logits, targets)


def both(function: Function, logits: Tensor, targets: Tensor, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(function(leaf, targets), leaf, gradients)


class Backward:
    """The backward pass alone, of a forward pass that is done in the first call, which is not timed."""

    def __init__(self, function: Function, logits: Tensor, targets: Tensor, gradients: tuple[Tensor, Tensor]) -> None:
        self.arguments = function, logits, targets
        self.gradients = gradients
        self.graph: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        if self.graph is None:
            function, logits, targets = self.arguments
            leaf = logits.detach().requires_grad_()
            self.graph = leaf, function(leaf, targets)
        leaf, results = self.graph
        return torch.autograd.grad(results, leaf, self.gradients, retain_graph=True)


def check(dtype: torch.dtype, result: object, expected: object) -> None:
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-4  # of the gradient; log-probs and entropies are float32
    torch.testing.assert_close(result, expected, rtol=rounding, atol=2e-5)
