"""Where in a dumped train step the first number is that is not finite: inputs, weights, modules forward, log-probs, loss, gradients."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from areal.trainer.critic import value_backward
from areal.trainer.dpo import dpo_backward
from areal.trainer.engine import RankMinibatch, TrainEngine
from areal.trainer.failed_step import FailedMinibatch, FailedStep
from areal.trainer.inputs import Inputs, to_device
from areal.trainer.sft import sft_backward
from areal.trainer.sharding import full_tensor
from areal.trainer.step_stats import StepStats
from areal.types import Microbatch


@dataclass(frozen=True, slots=True)
class Finding:
    where: str
    """"weights", or "mini-batch 0, rank 1, micro-batch 2"."""
    what: str


@dataclass
class Diagnosis:
    findings: list[Finding] = field(default_factory=list)
    """In the order of the computation, so the first is where it begins. Empty: everything is finite."""
    losses: list[float] = field(default_factory=list)
    """Of each mini-batch."""
    grad_norms: list[float] = field(default_factory=list)


def diagnose(engine: TrainEngine, step: FailedStep) -> Diagnosis:
    """Computes the mini-batches of ``step`` again, micro-batch by micro-batch, with the weights that ``engine`` has; it makes no step.

    Where a critic is concerned ``engine`` has it on its actor's layers, which are the critic's own if it was that which failed.
    """
    result = Diagnosis()
    engine.version = step.version
    for name, p in engine.model.named_parameters():
        if bad := _count_bad(full_tensor(p)):
            result.findings.append(Finding("weights", f"{name}: {bad} of {p.numel()} values are not finite"))
    for m, minibatch in enumerate(step.minibatches):
        before = len(result.findings)
        total_loss = 0.0
        for r, turns in enumerate(minibatch.ranks):
            for t, microbatch in enumerate(turns):
                where = f"mini-batch {m}, rank {r}, micro-batch {t}"
                one = _Replay(engine, step, minibatch, microbatch, minibatch.known[r][t])
                result.findings += [Finding(where, what) for what in one.findings()]
                total_loss += one.loss
        result.losses.append(total_loss)
        result.grad_norms.append(_grad_norm(engine, step, minibatch))
        if len(result.findings) == before and not np.isfinite([total_loss, result.grad_norms[-1]]).all():
            what = f"every micro-batch is finite, but not their sum: loss {total_loss:g}, norm of the gradient {result.grad_norms[-1]:g}"
            result.findings.append(Finding(f"mini-batch {m}", what))
    return result


class _Replay:
    """One micro-batch, forward and backward, watched."""

    def __init__(
        self, engine: TrainEngine, step: FailedStep, minibatch: FailedMinibatch, microbatch: Microbatch, known: NDArray[np.float32] | None
    ) -> None:
        self._engine, self._step, self._minibatch = engine, step, minibatch
        self._microbatch, self._known = microbatch, known
        self.loss = 0.0

    def findings(self) -> list[str]:
        found = self._bad_inputs()
        x = to_device(self._microbatch, self._engine.device, self._engine.version)
        with _watched(self._engine.model, x) as seen:
            self.loss, bad_gradients = self._run(x, self._known)
        is_bad = bool(seen or bad_gradients) or not np.isfinite(self.loss)
        if not is_bad:
            return found
        found += seen.forward[:1]
        if not seen.forward:
            actor = self._engine.actor
            of_values = self._step.kind == "critic"
            scores = actor.frozen_values([x]) if of_values else actor.frozen_logprobs([x], self._engine.temperature)
            if (token := _first_bad(scores[0])) is not None:
                found.append(f"{'value' if of_values else 'log-prob'} of {_place(x.lengths, token)}")
        if not np.isfinite(self.loss):
            found.append(f"the loss is {self.loss:g}")
        if bad_gradients:
            found += seen.backward[:1]
            found.append(f"the gradients of {len(bad_gradients)} parameters, first of {bad_gradients[0]}")
        culprits = self._bad_sequences()
        told = ", ".join(map(str, culprits[:20])) + (", ..." if len(culprits) > 20 else "")
        found.append(f"alone not finite: sequence {told}" if culprits else "no sequence of it alone is not finite")
        return found

    def _run(self, x: Inputs, known: NDArray[np.float32] | None) -> tuple[float, list[str]]:
        """The loss, and the parameters whose gradients are not finite."""
        stats = StepStats(self._engine.device)
        _backward(self._engine, self._step, self._minibatch, x, known, stats)
        bad = [n for n, p in self._engine.model.named_parameters() if p.grad is not None and _count_bad(full_tensor(p.grad))]
        self._engine.model.zero_grad(set_to_none=True)
        return float(stats.minibatch_loss), bad

    def _bad_inputs(self) -> list[str]:
        fields = {f.name: getattr(self._microbatch, f.name) for f in dataclasses.fields(self._microbatch)} | {
            self._name_of_known: self._known
        }
        lengths = np.diff(self._microbatch.cu_seqlens).tolist()
        found = []
        for name, values in fields.items():
            if isinstance(values, np.ndarray) and values.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
                first = int((~finite).argmax())
                found.append(f"{name} (handed in) of {_place(lengths, first)}: {values[first]}, {int((~finite).sum())} in all")
        return found

    @property
    def _name_of_known(self) -> str:
        return "reference log-prob" if self._step.kind == "dpo" else "proximal log-prob"

    def _bad_sequences(self) -> list[int]:
        """Of pairs, which mean something together only, the first ones."""
        width = 2 if self._step.kind == "dpo" and len(self._microbatch.cu_seqlens) > 2 else 1
        bounds = self._microbatch.cu_seqlens[::width].tolist()
        bad = []
        for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
            alone = _cut(self._microbatch, begin, end)
            known = None if self._known is None else self._known[begin:end]
            loss, gradients = self._run(to_device(alone, self._engine.device, self._engine.version), known)
            if gradients or not np.isfinite(loss):
                bad.append(s * width)
        return bad


def _backward(
    engine: TrainEngine, step: FailedStep, minibatch: FailedMinibatch, x: Inputs, known: NDArray[np.float32] | None, stats: StepStats
) -> None:
    tensor = None if known is None else torch.from_numpy(known).to(engine.device)
    if step.kind == "critic":
        assert engine.shared_critic is not None
        value_backward(engine.actor, engine.shared_critic, x, minibatch.denominator, stats)
    elif step.kind == "sft":
        sft_backward(engine.actor, x, minibatch.denominator, stats)
    elif step.kind == "dpo":
        assert step.preferences is not None and tensor is not None
        dpo_backward(engine.actor, step.preferences, x, tensor, minibatch.denominator, stats)
    else:
        engine.backward(x, tensor, minibatch.progress, RankMinibatch([], minibatch.denominator, minibatch.policy_denominator), stats)


def _grad_norm(engine: TrainEngine, step: FailedStep, minibatch: FailedMinibatch) -> float:
    stats = StepStats(engine.device)
    for turns, of_each in zip(minibatch.ranks, minibatch.known, strict=True):
        for microbatch, known in zip(turns, of_each, strict=True):
            _backward(engine, step, minibatch, to_device(microbatch, engine.device, engine.version), known, stats)
    gradients = [full_tensor(p.grad) for p in engine.model.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    engine.model.zero_grad(set_to_none=True)
    return norm


def _cut(microbatch: Microbatch, begin: int, end: int) -> Microbatch:
    """Its sequences from token ``begin`` to ``end`` as a micro-batch."""
    n = microbatch.n_tokens
    parts: dict[str, Any] = {}
    for f in dataclasses.fields(microbatch):
        value = getattr(microbatch, f.name)
        is_of_tokens = isinstance(value, np.ndarray) and len(value) == n and f.name != "cu_seqlens"
        parts[f.name] = value[begin:end] if is_of_tokens else value
    cu_seqlens = microbatch.cu_seqlens
    parts["cu_seqlens"] = (cu_seqlens[(cu_seqlens >= begin) & (cu_seqlens <= end)] - begin).astype(np.int32)
    return Microbatch(**parts)


# -- modules ------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What was not finite, in the order in which it was computed."""

    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.forward or self.backward)


@contextmanager
def _watched(model: nn.Module, x: Inputs) -> Iterator[_Seen]:
    """Looks at what goes into every module, what comes out of it, and at the gradient of that."""
    seen, handles = _Seen(), []

    def look(what: str, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if (row := _first_bad(tensor)) is not None:
                seen.forward.append(f"{what}{_row_place(x, tensor, row)}")
                return

    def look_back(what: str, gradient: Tensor) -> None:
        if (row := _first_bad(gradient)) is not None:
            seen.backward.append(f"{what}{_row_place(x, gradient, row)}")

    def watch(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            look(f"what goes into {name}", _tensors([*arguments, *keywords.values()]))

        def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            outputs = _tensors(output)
            look(f"the output of {name}", outputs)
            for tensor in outputs:
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: look_back(f"the gradient of the output of {name}", gradient))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        watch(name or "the model", module)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    """Those of floating point in a module's arguments or result."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _count_bad(tensor: Tensor) -> int:
    return int((~tensor.detach().isfinite()).sum())


def _first_bad(tensor: Tensor) -> int | None:
    """The first token of [1, T, ...] or [T, ...] that has a value which is not finite."""
    finite = tensor.detach().isfinite()
    if bool(finite.all()):
        return None
    rows = finite[0] if finite.dim() > 2 and len(finite) == 1 else finite
    rows = rows.flatten(1).all(1) if rows.dim() > 1 else rows.view(-1)
    return int((~rows).nonzero()[0])


def _row_place(x: Inputs, tensor: Tensor, row: int) -> str:
    """The token behind a row of a module's tensor; nothing where its rows are not tokens."""
    n = tensor.shape[1] if tensor.dim() > 2 and len(tensor) == 1 else len(tensor) if tensor.dim() else 1
    if x.shared is not None and n == len(x.shared.computed):
        row = int(x.shared.computed[row])
    elif n != len(x.input_ids):
        return ""
    return f", {_place(x.lengths, row)}"


def _place(lengths: Sequence[int], token: int) -> str:
    for sequence, length in enumerate(lengths):
        if token < length:
            return f"sequence {sequence}, token {token}"
        token -= length
    return f"token {token} behind the last sequence"
