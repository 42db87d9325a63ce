"""What a train step costs: time and peak memory of its phases, and its model FLOPs beside what the device does in a matrix product."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from areal.models.loading import decoder_layers
from areal.trainer.inputs import Inputs

PHASES = ("recompute", "forward", "backward", "optimizer")
"""Recompute: forward passes without gradients (proximal log-probs, reference, values). What is none of these is "other"."""

_PEAK_SECONDS = 0.2
_MOST_SIDE = {"cpu": 2048, "cuda": 8192}


class PhaseMeter:
    """Seconds and peak memory of each phase. A phase within another takes its time away from it, so that their sum is the whole time.

    On a GPU times are those of the stream, between events that are read once, at the end; the host does not wait before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Callable[[], float] = (
            functools.partial(_cuda_peak, device) if device.type == "cuda" else _ResidentPeak.of_this_process()
        )
        self._open = ["other"]
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._peaks = dict.fromkeys((*PHASES, "other"), 0.0)
        self._take_memory(None)
        self._begin = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._close_part()
        self._open.append(name)
        try:
            yield
        finally:
            self._close_part()
            self._open.pop()

    def _close_part(self) -> None:
        self._marks.append((self._open[-1], self._now()))
        self._take_memory(self._open[-1])

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _take_memory(self, name: str | None) -> None:
        peak = self._memory()
        if name is not None:
            self._peaks[name] = max(self._peaks[name], peak)

    def result(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds, and peak bytes (0 where nothing can be told), of the phases and "other" so far; waits for the device."""
        self._close_part()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = dict.fromkeys((*PHASES, "other"), 0.0)
        last = self._begin
        for name, mark in self._marks:
            seconds[name] += _between(last, mark)
            last = mark
        return seconds, dict(self._peaks)


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1e3


def _cuda_peak(device: torch.device) -> float:
    """Largest memory that torch's allocator has given out since the last call, bytes."""
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class _ResidentPeak:
    """Peak resident memory since the last call, bytes; 0 where Linux does not let a process reset it (or it is not Linux)."""

    _FIELD = b"VmHWM:"

    def __init__(self) -> None:
        self._works = True
        try:
            self._status = os.open("/proc/self/status", os.O_RDONLY)
            self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY)
        except OSError:
            self._works = False

    @staticmethod
    @functools.cache
    def of_this_process() -> _ResidentPeak:
        return _ResidentPeak()

    def __call__(self) -> float:
        if not self._works:
            return 0.0
        try:
            text = os.pread(self._status, 8192, 0)
            os.write(self._clear, b"5")
        except OSError:  # a sandbox that shows the file and forbids its use
            self._works = False
            return 0.0
        begin = text.find(self._FIELD)
        return 0.0 if begin < 0 else 1024.0 * int(text[begin + len(self._FIELD) :].split(None, 1)[0])


# -- model FLOPs ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Attention:
    width: int
    """heads * (head size of queries and keys + that of values)."""
    window: int | None


class ModelFlops:
    """Floating point operations of a model, as of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B), attention causal.

    Forward, of a micro-batch of which U tokens are computed (prompts that sequences share once) and R are loss tokens:

        2 * N * U  +  2 * hidden * vocabulary * R  +  sum over layers and sequences of 2 * heads * (d_qk + d_v) * sum_t min(t, window)

    where t is the place of a computed token in its sequence, from 1, and N the entries of the matrices of all layers, of experts those
    that a token uses. Backward: the same for the gradients of the inputs, and the first two terms, of weights that are trained, for those
    of the weights: 3 times forward for a whole model. Activations that gradient checkpointing computes again are not counted, norms,
    softmax and the optimizer neither.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        used = _experts_used(config)
        self._weights = self._trained = 0.0
        for name, p in decoder_layers(model).named_parameters():
            if p.ndim >= 2:
                part = p.numel() * (used if p.ndim == 3 or ".experts." in name else 1.0)
                self._weights += part
                self._trained += part if p.requires_grad else 0.0
        head = getattr(model.get_output_embeddings(), "weight", None)  # None: a value model, which has one column in its place
        self._head = 0.0 if head is None else float(head.numel())
        self._head_trained = self._head if head is not None and head.requires_grad else 0.0
        self._attention = _attention_of(config)

    def forward(self, lengths: Sequence[int], n_computed: int, n_rows: int, copied: Sequence[int] = ()) -> float:
        """``copied``: of each sequence the first tokens that are computed in another one, if any are."""
        return 2.0 * (self._weights * n_computed + self._head * n_rows) + self._scores(lengths, copied)

    def training(self, lengths: Sequence[int], n_computed: int, n_rows: int, copied: Sequence[int] = ()) -> float:
        """Forward and backward."""
        of_weights = 2.0 * (self._trained * n_computed + self._head_trained * n_rows)
        # Backward has 4 products for the 2 of attention: the gradients of q, k, v and of the weights.
        return 2.0 * self.forward(lengths, n_computed, n_rows, copied) + of_weights + self._scores(lengths, copied)

    def of(self, x: Inputs, *, training: bool, head: bool = True) -> float:
        """``head``: whether log-probs are computed."""
        count, n_rows = self.training if training else self.forward, len(x.rows) if head else 0
        if x.shared is None:
            return count(x.lengths, len(x.input_ids), n_rows)
        return count(x.lengths, len(x.shared.computed), n_rows, x.shared.copied)

    def _scores(self, lengths: Sequence[int], copied: Sequence[int]) -> float:
        windows = {a.window for a in self._attention}
        pairs = {w: float(sum(_pairs(n, w) for n in lengths) - sum(_pairs(n, w) for n in copied)) for w in windows}
        return sum(2.0 * a.width * pairs[a.window] for a in self._attention)


def _pairs(length: int, window: int | None) -> int:
    """Pairs of query and key within the causal mask."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def _experts_used(config: PretrainedConfig) -> float:
    """The share of a mixture's experts that a token goes through; 1 for dense models."""
    n = next((v for k in ("num_experts", "num_local_experts", "n_routed_experts") if (v := getattr(config, k, None))), None)
    return 1.0 if n is None else getattr(config, "num_experts_per_tok", n) / n


def _attention_of(config: PretrainedConfig) -> list[_Attention]:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_queries = getattr(config, "qk_head_dim", None) or size
    of_values = getattr(config, "v_head_dim", None) or size
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    return [_Attention(heads * (of_queries + of_values), window if kind in (None, "sliding_attention") else None) for kind in kinds]


# -- the device -------------------------------------------------------------------------------------------------------------------


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of some tenths of a second; measured once in a process."""
    return _matmul_peak(device, dtype, torch.get_num_threads())


@functools.cache
def _matmul_peak(device: torch.device, dtype: torch.dtype, n_threads: int) -> float:
    generator = torch.Generator(device).manual_seed(0)  # leaves the state of the others alone
    side = 128
    while True:
        side *= 2
        a, b = (torch.randn(side, side, dtype=torch.float32, device=device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        _product_seconds(a, b, out)  # the first one chooses its kernel
        seconds = [_product_seconds(a, b, out)]
        if side >= _MOST_SIDE.get(device.type, 2048) or 8 * seconds[0] > _PEAK_SECONDS / 3:
            break
    deadline = time.perf_counter() + _PEAK_SECONDS / 2
    while time.perf_counter() < deadline:
        seconds.append(_product_seconds(a, b, out))
    return 2.0 * side**3 / min(seconds)


def _product_seconds(a: Tensor, b: Tensor, out: Tensor) -> float:
    if a.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(a, b, out=out)
        end.record()
        torch.cuda.synchronize(a.device)
        return max(begin.elapsed_time(end) / 1e3, 1e-9)
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    return max(time.perf_counter() - start, 1e-9)
