"""What the embedded engine takes and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INT64 = 1 << 63


class RequestError(ValueError):
    """A request that cannot be served, told in one sentence."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is sampled; names are SGLang's."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """End-of-sequence and stop tokens are not sampled before this many tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 = the likeliest token, with its log-prob at temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    """0 = off."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer (needs a tokenizer)."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sampling_seed: int | None = None
    """Same seed, weights and prompt: same answer, whatever else the engine does. None = random."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise RequestError(f"min_new_tokens is {self.min_new_tokens}; it must lie between 0 and max_new_tokens={self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}; it must be a finite number, 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        for name, value in (("top_k", self.top_k), *(("stop_token_ids", token) for token in self.stop_token_ids)):
            if not -_INT64 <= value < _INT64:
                raise RequestError(f"{name} has {value}, which is no 64-bit number")


@dataclass(slots=True)
class GenerateRequest:
    """One answer to one prompt."""

    input_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    rid: str = ""
    on_token: Callable[[Answer], None] | None = None
    """Called by the engine after every step that added a token but the last (streaming)."""


@dataclass(slots=True)
class Answer:
    """What was generated so far, or in the end; the arrays have one entry per generated token."""

    request: GenerateRequest
    output_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    """log_softmax(logits / temperature) at the sampled token, untruncated."""
    versions: NDArray[np.int64]
    """Weight version that sampled each token."""
    finish_reason: dict[str, Any] | None
    """None while it goes on, else SGLang's: {"type": "stop", "matched": id or string}, {"type": "length", "length": n} or {"type": "abort", "message": ...}."""
    cached_tokens: int = 0
    """Prompt tokens whose K/V was copied from another sequence of the same prompt."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way through the engine."""

    request: GenerateRequest
    key: int
    """Of its random numbers: ``sampling.sequence_key(seed)``."""
    stop_ids: NDArray[np.int64]
    """Tokens that end this answer."""
    prompt_key: bytes = b""
    slot: int = -1
    """Row of the running batch and of the K/V cache; -1 while waiting."""
    cached_tokens: int = 0
    version_starts: list[tuple[int, int]] = field(default_factory=list)
    """(index of the first answer token, version) of every stretch sampled by one version."""

    def mark_version(self, start: int, version: int) -> None:
        """Tokens from answer position ``start`` on are sampled by ``version``."""
        if self.version_starts and self.version_starts[-1][0] == start:
            self.version_starts.pop()
        self.version_starts.append((start, version))

    def answer(self, output_ids: NDArray[np.int64], logprobs: NDArray[np.float32], reason: dict[str, Any] | None) -> Answer:
        versions = np.empty(len(output_ids), dtype=np.int64)
        for start, version in self.version_starts:
            versions[start:] = version
        return Answer(self.request, output_ids, logprobs, versions, reason, self.cached_tokens)
