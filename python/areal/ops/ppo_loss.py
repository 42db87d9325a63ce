"""The PPO loss of packed tokens, with its gradient and its statistics in one pass."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from areal.ops._dispatch import backend_for, compiled_module, triton_kernels
from areal.ops._registration import check_tensor, cuda_stream, define_op, on_device
from areal.ops.ppo_token import PPOParameters, choice, ppo_parameters
from areal.ops.ppo_torch import PPOOptions, ppo_loss_torch

__all__ = ["STATISTICS", "PPOParameters", "ppo_loss", "ppo_parameters"]

STATISTICS = (
    "loss",
    "n_tokens",
    "clipped",
    "clipped_high",
    "clipped_low",
    "dual_clipped",
    "ratio",
    "importance_weight",
    "weight_truncated",
    "filtered",
    "kl_proximal",
    "kl_behaviour",
    "entropy",
)
"""The sums that come back with the loss, in this order (areal::PPOStatistic); the last one only if entropy was given."""

Level = Literal["token", "sequence"]


class PPOStatistics(Mapping[str, Tensor]):
    """The sums by name, float32 [] each, made when they are asked for: thirteen views would cost more than the whole loss of a short batch."""

    __slots__ = ("_names", "_results")

    def __init__(self, results: Tensor, names: tuple[str, ...]) -> None:
        self._results = results
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._results[STATISTICS.index(name) - _N_STATISTICS]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return repr(dict(self))


# Bits of the compiled op's `flags`, as in csrc/bind_ppo_loss.cpp; _WANTS_* are for this side alone.
_CISPO, _DECOUPLED, _MASK_WEIGHTS = 1, 2, 4
_SEQUENCE_RATIO, _SEQUENCE_WEIGHT, _SEQUENCE_FILTER, _SEQUENCE_MEAN = 8, 16, 32, 64
_FILTER_BY_ADVANTAGE = 128
_OF_SEQUENCES = _SEQUENCE_RATIO | _SEQUENCE_WEIGHT | _SEQUENCE_FILTER | _SEQUENCE_MEAN
_WANTS_GRADIENT, _WANTS_ENTROPY_GRADIENT = 256, 512
_FLOAT_MASK = 1024
_N_GRADIENTS = (0, 1, 1, 2)  # by the two bits of _WANTS_*

_N_STATISTICS = len(STATISTICS)
_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")
_FLOAT = (torch.float32,)
_DOUBLE = (torch.float64,)
_BACKENDS = ("torch", "cpp", "triton", "cuda")
_DOUBLE_UNFIT = tuple((name, "it takes float32") for name in _BACKENDS[1:])


def ppo_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    eps_clip: float,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    denominator: float | Tensor,
    cu_seqlens: Tensor | None = None,
    ratio_level: Level = "token",
    objective: Literal["ppo", "cispo"] = "ppo",
    decoupled: bool = True,
    behav_imp_weight_cap: float | None = None,
    behav_imp_weight_mode: Literal["truncate", "mask"] = "truncate",
    behav_imp_weight_level: Level = "token",
    behav_filter_cap: float | None = None,
    behav_filter_level: Level = "token",
    behav_filter_side: Literal["both", "advantage"] = "both",
    normalization: Literal["token", "sequence", "fixed"] = "token",
    fixed_length: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    backend: Literal["torch", "cpp", "triton", "cuda"] | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Decoupled PPO (AReaL, arXiv 2505.24298, eq. 5) and its relatives, as a loss to minimise, with sums for statistics.

        loss = -1 / denominator * sum_t m_t * w_t * min(u_t * A_t, clip(u_t, 1 - eps_clip, 1 + eps_clip_higher) * A_t)
        u = current / proximal,   w = proximal / behaviour, a constant for the gradient

    Log-probs, advantages and ``entropy`` are float32 [T] of packed tokens (float64 too: then the torch reference runs), ``loss_mask`` is
    bool or float32 [T], False or 0 where a token does not count; what such tokens hold, NaN too, has no effect. Log-ratios are clamped to +-20, with gradient 0 beyond. ``denominator``, a
    number or a 0-d tensor, is that of the whole batch, so that how a batch is cut cannot change its gradient. Only ``logprobs`` and
    ``entropy`` get gradients. Switches:

    - ``decoupled=False``: PPO against the behaviour policy: u = current / behaviour, w = 1.
    - ``eps_clip_higher``: another upper range (clip-higher of DAPO, arXiv 2503.14476); none = ``eps_clip``.
    - ``c_clip``: dual clip (arXiv 1912.09729): where A < 0, the term is at least c_clip * A.
    - ``ratio_level="sequence"``: u is the geometric mean over the loss tokens of a sequence, and so is its gradient (GSPO, arXiv 2507.18071).
    - ``objective="cispo"``: clip(u) * A * log-prob, the clipped ratio a constant (CISPO, arXiv 2506.13585); eps_clip >= 1: no lower end.
    - ``behav_imp_weight_cap``: a larger w becomes the cap (mode ``truncate``) or 0 (``mask``; the token still counts in the statistics and
      normalisation). Level ``sequence``: w is the product over the sequence's loss tokens, with its log clamped like a token's: the
      unbiased weight of a whole sequence.
    - ``behav_filter_cap``: tokens whose proximal / behaviour leaves [1/cap, cap] give no loss; the denominator stays. Level ``sequence``:
      whole sequences, by the geometric mean. Weight and filter are independent. ``behav_filter_side="advantage"``: above the range only
      tokens with a positive advantage go, below it those with a negative one: what has moved far already the way it is told to. The
      others are what pulls back a policy that went too far.
    - ``normalization``: m is 1 (``token``: DAPO), 1 / loss tokens of the sequence (``sequence``: GRPO, arXiv 2402.03300; the denominator
      then counts sequences), or 1 / ``fixed_length`` (``fixed``: Dr. GRPO, arXiv 2503.20783).
    - ``entropy``, ``entropy_coef``: adds -entropy_coef / denominator * sum_t m_t * entropy_t.

    What is of level ``sequence`` needs ``cu_seqlens``, int32 [n + 1] from 0 to T (checked on the CPU alone; on a GPU a token outside of
    all sequences does not count). The statistics are detached float32 scalars, sums over the loss tokens: loss, n_tokens, clipped (=
    clipped_high + clipped_low: where the clip cuts the gradient; CISPO: where the ratio is clipped), dual_clipped, ratio,
    importance_weight, weight_truncated, filtered, kl_proximal and kl_behaviour: KL(proximal || current) and KL(behaviour || proximal) of
    the tokens by the estimator x - 1 - log x of http://joschu.net/blog/kl-approx.html, and entropy if given. ``ValueError`` for an
    argument of another shape, dtype or device, or out of range.
    """
    tracing = torch.compiler.is_compiling()
    plan = (_plan.__wrapped__ if tracing else _plan)(  # torch.compile warns of the cache, and looks through it
        (
            eps_clip,
            eps_clip_higher,
            c_clip,
            objective,
            decoupled,
            behav_imp_weight_cap,
            behav_imp_weight_mode,
            behav_filter_cap,
            behav_filter_side,
        ),
        (ratio_level, behav_imp_weight_level, behav_filter_level),
        normalization,
        fixed_length,
        entropy_coef,
    )
    dtype = _check(logprobs, proximal_logprobs, behavior_logprobs, advantages, loss_mask, entropy)
    cu_seqlens = _check_sequences(cu_seqlens, logprobs) if plan.flags & _OF_SEQUENCES else None
    denominator = _check_denominator(denominator, logprobs.device, dtype)
    unfit = () if dtype == torch.float32 else _DOUBLE_UNFIT
    which = backend_for("ppo_loss", logprobs.device, backend, has=_BACKENDS, unfit=unfit)
    tensors = (logprobs, proximal_logprobs, behavior_logprobs, advantages, loss_mask, cu_seqlens, entropy)
    if which == "torch":
        return ppo_loss_torch(plan.options, *tensors[:4], loss_mask != 0, *tensors[5:], denominator)

    flags, divisor, scale = plan.flags, None, plan.scale
    if loss_mask.dtype is not torch.bool:
        flags |= _FLOAT_MASK
    if isinstance(denominator, Tensor):
        divisor = denominator
    else:
        scale /= denominator
    wanting: tuple[Tensor, ...] = ()
    if torch.is_grad_enabled():
        if logprobs.requires_grad:
            flags |= _WANTS_GRADIENT
            wanting = (logprobs,)
        if entropy is not None and entropy_coef and entropy.requires_grad:
            flags |= _WANTS_ENTROPY_GRADIENT
            wanting += (entropy,)
    # In plain eager mode past torch's dispatcher, which has nothing to add and costs a quarter of a short call.
    plain = Tensor is type(logprobs) is type(proximal_logprobs) is type(behavior_logprobs) is type(advantages) is type(loss_mask)
    plain = plain and (cu_seqlens is None or type(cu_seqlens) is Tensor) and (entropy is None or type(entropy) is Tensor)
    if tracing or not plain or torch._C._len_torch_dispatch_stack():
        detached = None if entropy is None else entropy.detach()
        loss, results = _op(logprobs.detach(), *tensors[1:6], detached, divisor, plan.numbers, scale, flags, which)
    else:
        loss, results = _implementation(*tensors, divisor, plan.numbers, scale, flags, which)
    if wanting:
        loss = _WithGradients.apply((loss.clone() if tracing else loss, results), *wanting)
    names = STATISTICS[:-1] if entropy is None else STATISTICS
    if tracing:
        return loss, dict(zip(names, results[-_N_STATISTICS:].unbind(), strict=False))
    return loss, PPOStatistics(results, names)


class _Plan(NamedTuple):
    """What does not change from call to call."""

    options: PPOOptions
    numbers: tuple[float, ...]
    """lower, upper, c_clip, weight_cap, filter_lower, filter_upper, entropy_coef."""
    scale: float
    """1 / fixed_length; 1 over the denominator is still to come."""
    flags: int


@functools.lru_cache(maxsize=64)
def _plan(
    token: tuple[Any, ...], levels: tuple[str, str, str], normalization: str, fixed_length: float | None, entropy_coef: float
) -> _Plan:
    for name, level in zip(("ratio_level", "behav_imp_weight_level", "behav_filter_level"), levels, strict=True):
        choice("ppo_loss", name, level, "token", "sequence")
    choice("ppo_loss", "normalization", normalization, "token", "sequence", "fixed")
    if (normalization == "fixed") != (fixed_length is not None) or (fixed_length is not None and not fixed_length > 0):
        raise ValueError(f"ppo_loss: fixed_length is {fixed_length}; normalization='fixed', and no other, needs it, above 0")
    p = ppo_parameters("ppo_loss", *token)
    ratio, weight, filtered = (level == "sequence" for level in levels)
    weight, filtered = weight and p.decoupled, filtered and token[-2] is not None  # else they have no effect
    flags = p.cispo * _CISPO | p.decoupled * _DECOUPLED | p.mask_weights * _MASK_WEIGHTS
    flags |= p.filter_by_advantage * _FILTER_BY_ADVANTAGE
    flags |= ratio * _SEQUENCE_RATIO | weight * _SEQUENCE_WEIGHT | filtered * _SEQUENCE_FILTER
    flags |= (normalization == "sequence") * _SEQUENCE_MEAN
    length = 1.0 if fixed_length is None else float(fixed_length)
    options = PPOOptions(p, ratio, weight, filtered, normalization == "sequence", length, float(entropy_coef))
    return _Plan(options, (*p[:6], float(entropy_coef)), 1.0 / length, flags)


def _check(
    logprobs: Tensor, proximal: Tensor, behavior: Tensor, advantages: Tensor, loss_mask: Tensor, entropy: Tensor | None
) -> torch.dtype:
    try:
        if (
            entropy is None
            and 1 == logprobs.dim() == proximal.dim() == behavior.dim() == advantages.dim() == loss_mask.dim()
            and logprobs.numel() == proximal.numel() == behavior.numel() == advantages.numel() == loss_mask.numel()
            and torch.float32 is logprobs.dtype is proximal.dtype is behavior.dtype is advantages.dtype
            and (loss_mask.dtype is torch.float32 or loss_mask.dtype is torch.bool)
            and (logprobs.is_cpu and proximal.is_cpu and behavior.is_cpu and advantages.is_cpu and loss_mask.is_cpu)
            and (logprobs.is_contiguous() and proximal.is_contiguous() and behavior.is_contiguous())
            and (advantages.is_contiguous() and loss_mask.is_contiguous())
        ):  # all is as it should be, on the CPU, where microseconds count; what follows says the same at length
            return torch.float32
    except AttributeError:  # no tensor
        pass
    floats = {"logprobs": logprobs, "proximal_logprobs": proximal, "behavior_logprobs": behavior, "advantages": advantages}
    if entropy is not None:
        floats["entropy"] = entropy
    dtypes = _DOUBLE if all(isinstance(t, Tensor) and t.dtype == torch.float64 for t in floats.values()) else _FLOAT
    check_tensor("ppo_loss", "logprobs", logprobs, (None,), dtypes)
    device, shape = logprobs.device, (logprobs.shape[0],)
    for name, tensor in floats.items():
        check_tensor("ppo_loss", name, tensor, shape, dtypes, device)
    check_tensor("ppo_loss", "loss_mask", loss_mask, shape, (torch.bool, torch.float32), device)
    return dtypes[0]


def _check_sequences(cu_seqlens: Tensor | None, logprobs: Tensor) -> Tensor:
    if cu_seqlens is None:
        raise ValueError("ppo_loss: cu_seqlens is None; what is of level 'sequence', and normalization='sequence', need it")
    check_tensor("ppo_loss", "cu_seqlens", cu_seqlens, (None,), (torch.int32,), logprobs.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("ppo_loss: cu_seqlens has the shape [0]; it must be [sequences + 1]")
    if not cu_seqlens.is_cuda and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != logprobs.shape[0] or any(map(operator.gt, ends, ends[1:])):
            raise ValueError(f"ppo_loss: cu_seqlens must rise from 0 to the number of tokens, {logprobs.shape[0]}")
    return cu_seqlens


def _check_denominator(denominator: float | Tensor, device: torch.device, dtype: torch.dtype) -> float | Tensor:
    """A number, or a tensor of ``dtype`` on ``device`` (it then cannot be checked without waiting for the GPU)."""
    if not isinstance(denominator, Tensor):
        if not denominator > 0:
            raise ValueError(f"ppo_loss: denominator is {denominator}; it must be above 0")
        return denominator
    if denominator.dim() != 0:
        raise ValueError(f"ppo_loss: denominator has the shape {list(denominator.shape)}; it must be a number or a tensor of shape []")
    if denominator.device != device:
        raise ValueError(f"ppo_loss: denominator is on {denominator.device}; it must be a number or on {device}, like the first argument")
    return denominator.detach().to(dtype)


class _WithGradients(torch.autograd.Function):
    """The loss as a function of tensors [T] whose gradients, one after the other, come before the statistics in ``results``."""

    @staticmethod
    def forward(ctx: Any, made: tuple[Tensor, Tensor], *wanting: Tensor) -> Tensor:
        loss, results = made
        ctx.save_for_backward(results)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (results,) = ctx.saved_tensors
        scaled = results[:-_N_STATISTICS] * grad_loss
        n_wanting = len(ctx.needs_input_grad) - 1
        return (None, scaled) if n_wanting == 1 else (None, *scaled.chunk(2))


def _implementation(
    logprobs: Tensor,
    proximal: Tensor,
    behavior: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    entropy: Tensor | None,
    denominator: Tensor | None,
    numbers: Sequence[float],
    scale: float,
    flags: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n_tokens = logprobs.shape[0]
    loss, results = _results(logprobs, n_tokens, flags, True)
    if denominator is not None and backend == "cpp":
        scale /= float(denominator)
    if backend == "triton":
        own = results[:n_tokens] if flags & _WANTS_GRADIENT else None
        of_entropy = results[-_N_STATISTICS - n_tokens : -_N_STATISTICS] if flags & _WANTS_ENTROPY_GRADIENT else None
        inputs = (logprobs, proximal, behavior, advantages, mask, cu_seqlens, entropy, denominator)
        with on_device(logprobs):
            triton_kernels("ppo_loss").ppo_loss(*inputs, own, of_entropy, loss, results[-_N_STATISTICS:], numbers, scale, flags)
        return loss, results
    gradient = results.data_ptr()
    sums = gradient + 4 * n_tokens * _N_GRADIENTS[flags >> 8 & 3]
    addresses = [
        logprobs.data_ptr(),
        proximal.data_ptr(),
        behavior.data_ptr(),
        advantages.data_ptr(),
        mask.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        0 if entropy is None else entropy.data_ptr(),
        0 if denominator is None else denominator.data_ptr(),
        gradient if flags & _WANTS_GRADIENT else 0,
        sums - 4 * n_tokens if flags & _WANTS_ENTROPY_GRADIENT else 0,
        loss.data_ptr(),
        sums,
    ]
    sizes = n_tokens, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    module = compiled_module()
    assert module is not None
    if backend == "cpp":
        module.ppo_loss(addresses, *sizes, numbers, scale, flags, torch.get_num_threads())
    else:
        stream = cuda_stream(logprobs)
        workspace = _workspace(logprobs.device, stream, module.ppo_loss_cuda_workspace())
        with on_device(logprobs):
            module.ppo_loss_cuda(addresses, *sizes, numbers, scale, flags, workspace.data_ptr(), stream)
    return loss, results


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(device: torch.device, stream: int, n: int) -> Tensor:
    """int32 [n], zero before its first use: the sums of the blocks, and the counter of blocks that are done, which every launch leaves at 0.

    One for each stream: launches on one stream come one after the other. A CUDA graph gets its own, since it may run on any stream.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = (device, stream)
    if key not in _workspaces:
        _workspaces[key] = torch.zeros(n, dtype=torch.int32, device=device)
    return _workspaces[key]


def _results(logprobs: Tensor, n_tokens: int, flags: int, real: bool) -> tuple[Tensor, Tensor]:
    """Empty: the loss [], and in one tensor the wanted gradients one after the other [0, T or 2 T], then the 13 sums."""
    loss = torch.empty_like(_SCALAR) if real and logprobs.is_cpu else logprobs.new_empty(())  # the former is quicker
    return loss, logprobs.new_empty(_N_GRADIENTS[flags >> 8 & 3] * n_tokens + _N_STATISTICS)


def _fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _results(logprobs, logprobs.shape[0], rest[-2], False)


_op = define_op(
    "ppo_loss(Tensor logprobs, Tensor proximal, Tensor behavior, Tensor advantages, Tensor mask, Tensor? cu_seqlens, Tensor? entropy, "
    "Tensor? denominator, float[] numbers, float scale, int flags, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
