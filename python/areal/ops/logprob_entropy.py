"""Log-probability of a target and entropy of softmax(logits / temperature), row by row, in one pass over the logits.

    x = logits / temperature,   p = softmax(x),   logprob = log p[target],   entropy H = -sum_j p_j log p_j
    d logits_j = (g_logprob (1[j = target] - p_j) - g_entropy p_j (log p_j + H)) / temperature

Nothing of the size of the logits is made in the forward pass; it keeps the logits and two numbers a row, from which the backward pass
computes the probabilities again. So each pass reads the logits once, and backward writes the gradient once.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from areal.ops._dispatch import backend_for, compiled_module, triton_kernels
from areal.ops._registration import check_tensor, cuda_stream, define_op, on_device

Backend = Literal["torch", "cpp", "triton", "cuda"]

_OP = "logprob_entropy"
_BACKENDS = ("torch", "cpp", "triton", "cuda")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The numbers by which csrc/bind_logprob_entropy.cpp knows them.
_ELEMENT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_UNFIT: dict[torch.dtype, tuple[tuple[str, str], ...]] = {
    torch.float16: (("cpp", "it takes float32 and bfloat16 logits"),),
    torch.float64: tuple((name, "only torch takes float64 logits") for name in ("cpp", "triton", "cuda")),
}


def logprob_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, backend: Backend | None = None, inplace_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target, and the entropy of each row, in nats. Both are differentiable, once.

    An element at -inf has p = 0: it adds nothing to the entropy, and its gradient is 0 unless it is the target, whose log-probability is
    then -inf and whose gradient is g_logprob / temperature, as the formula says. A row that holds NaN or +inf, or only -inf, gives NaN.

    Args:
        logits: [T, V] contiguous, float32, bfloat16 or float16; all arithmetic is float32. float64 goes to ``torch`` (and results in float64).
        targets: int64 [T], each in [0, V). One outside is a ``ValueError`` of ``cpp``; on a GPU, where a check would have to wait for the
            device, its log-probability is NaN (``torch``: an assertion on the device).
        temperature: above 0.
        backend: ``torch`` (the reference), ``cpp`` (CPU), ``triton`` or ``cuda``; None = the fastest that can run.
        inplace_backward: lets the backward pass write the gradient over the logits, which saves a tensor of their size. What else needs
            the logits in its own backward pass must then run before; what comes after, a second backward pass through this op included,
            is refused by autograd ("modified by an inplace operation"). The logits themselves must not be read after it, and must be
            the result of another operation. ``torch``, and ``torch.compile``, take no notice of it.

    Returns:
        logprobs, entropy: float32 [T] each

    Raises:
        ValueError: an argument of another shape, dtype, device or layout, or of a value that cannot be; the text names it.
        BackendUnavailable: a backend was asked for that cannot run here.
    """
    _check(logits, targets, temperature)
    which = backend_for(_OP, logits.device, backend, has=_BACKENDS, unfit=_UNFIT.get(logits.dtype, ()))
    if which == "torch":
        return _torch(logits, targets, temperature)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        logprobs, entropy, _ = _forward_op(logits, targets, temperature, which)
        return logprobs, entropy
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if inplace and (logits.is_leaf or (logits._base is not None and logits._base.is_leaf)):
        raise ValueError(
            f"{_OP}: inplace_backward=True would overwrite logits, which is a leaf, or a view of one: its gradient would be itself"
        )
    return _LogprobEntropy.apply(logits, targets, temperature, which, inplace)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, backend: str, inplace: bool) -> tuple[Tensor, Tensor]:
        logprobs, entropy, statistics = _forward_op(logits, targets, temperature, backend)
        ctx.save_for_backward(logits, targets, entropy, statistics)
        ctx.options = temperature, backend, inplace
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, targets, entropy, statistics = ctx.saved_tensors  # autograd refuses logits that were changed since
        temperature, backend, inplace = ctx.options
        grads = grad_logprobs.contiguous(), grad_entropy.contiguous()
        if not inplace:
            return _backward_op(logits, targets, entropy, statistics, *grads, temperature, backend), None, None, None, None
        logits = logits.detach()
        _backward_inplace_op(logits, targets, entropy, statistics, *grads, temperature, backend)
        torch.autograd.graph.increment_version(logits)
        return logits, None, None, None, None


def _check(logits: Tensor, targets: Tensor, temperature: float) -> None:
    check_tensor(_OP, "logits", logits, (None, None), _DTYPES)
    check_tensor(_OP, "targets", targets, (logits.shape[0],), (torch.int64,), logits.device)
    if logits.shape[1] == 0:
        raise ValueError(f"{_OP}: logits has the shape {list(logits.shape)}; it needs at least one column")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{_OP}: temperature is {temperature}; it must be a finite number above 0")


def _torch(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    x = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:  # like the kernels, differences before the division: large logits over a temperature would lose digits
        x = (x - x.detach().amax(-1, keepdim=True)) / temperature
    log_p = torch.log_softmax(x, dim=-1)
    # 0 * -inf would be NaN, in the gradient too; exp(-1000) is 0.
    entropy = -(log_p.exp() * log_p.clamp(min=-1000.0)).sum(-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def _forward(logits: Tensor, targets: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy, and float32 [2, T]: the largest logit of each row and the log of its sum of exp((logit - largest) / temperature)."""
    logprobs, entropy, statistics = _forward_fake(logits, targets, temperature, backend)
    rows, n = logits.shape
    if rows == 0:
        return logprobs, entropy, statistics
    if backend == "triton":
        kernels = triton_kernels(_OP)
        block, num_warps = kernels.block_of(n)
        with on_device(logits):
            kernels.logprob_entropy_kernel[(rows,)](
                logits, targets, logprobs, entropy, *statistics, n, 1.0 / temperature, BLOCK=block, num_warps=num_warps
            )
        return logprobs, entropy, statistics
    addresses = _addresses(logits, targets, logprobs, entropy, statistics)
    module = compiled_module()
    assert module is not None
    if backend == "cuda":
        with on_device(logits):
            module.logprob_entropy_cuda(addresses, (rows, n), _ELEMENT[logits.dtype], 1.0 / temperature, cuda_stream(logits))
    else:
        module.logprob_entropy(addresses, (rows, n), _ELEMENT[logits.dtype], 1.0 / temperature, torch.get_num_threads())
    return logprobs, entropy, statistics


def _forward_fake(logits: Tensor, targets: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    logprobs, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return logprobs, entropy, logits.new_empty((2, rows), dtype=torch.float32)


def _backward_into(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    statistics: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    temperature: float,
    backend: str,
) -> None:
    rows, n = logits.shape
    if rows == 0:
        return
    if backend == "triton":
        kernels = triton_kernels(_OP)
        block, num_warps = kernels.block_of(n)
        with on_device(logits):
            kernels.gradient_kernel[(rows,)](
                logits,
                targets,
                entropy,
                *statistics,
                grad_logprobs,
                grad_entropy,
                out,
                n,
                1.0 / temperature,
                BLOCK=block,
                num_warps=num_warps,
            )
        return
    addresses = _addresses(logits, targets, None, entropy, statistics)
    gradients = grad_logprobs.data_ptr(), grad_entropy.data_ptr(), out.data_ptr()
    module = compiled_module()
    assert module is not None
    element, inverse = _ELEMENT[logits.dtype], 1.0 / temperature
    if backend == "cuda":
        with on_device(logits):
            module.logprob_entropy_gradient_cuda(addresses, gradients, (rows, n), element, inverse, cuda_stream(logits))
    else:
        module.logprob_entropy_gradient(addresses, gradients, (rows, n), element, inverse, torch.get_num_threads())


def _backward(logits: Tensor, *arguments: Any) -> Tensor:
    out = torch.empty_like(logits)
    _backward_into(out, logits, *arguments)
    return out


def _backward_inplace(logits: Tensor, *arguments: Any) -> None:
    _backward_into(logits, logits, *arguments)


def _addresses(logits: Tensor, targets: Tensor, logprobs: Tensor | None, entropy: Tensor, statistics: Tensor) -> tuple[int, ...]:
    largest = statistics.data_ptr()
    log_sum = largest + statistics.stride(0) * statistics.element_size()
    return logits.data_ptr(), targets.data_ptr(), 0 if logprobs is None else logprobs.data_ptr(), entropy.data_ptr(), largest, log_sum


_ARGUMENTS = "Tensor targets, Tensor entropy, Tensor statistics, Tensor grad_logprobs, Tensor grad_entropy, float temperature, str backend"
_forward_op = define_op(
    "logprob_entropy(Tensor logits, Tensor targets, float temperature, str backend) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = define_op(
    f"logprob_entropy_backward(Tensor logits, {_ARGUMENTS}) -> Tensor", _backward, lambda logits, *_: torch.empty_like(logits)
)
_backward_inplace_op = define_op(f"logprob_entropy_backward_(Tensor(a!) logits, {_ARGUMENTS}) -> ()", _backward_inplace, lambda *_: None)
