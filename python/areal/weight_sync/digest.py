"""What was sent, as far as a check needs it: the hash of all, the hash of each tensor, and a few rows of small tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from areal.ops.weights_hash import weights_hash

_SAMPLES = 8
_SAMPLE_ROWS = 2
_SAMPLE_NUMEL = 2**18
"""Elements of a sampled tensor at most: SGLang makes Python numbers of the whole tensor before it gives the first rows."""

_NOT_SAMPLED = (".k_proj.", ".v_proj.")
"""SGLang looks for them in the wrong place where a head's size is not hidden size / heads."""


@dataclass(slots=True)
class SentWeights:
    """Filled while weights are sent. Tensors are given by the names they have on the wire, each of them once."""

    hashes: dict[str, int] = field(default_factory=dict)
    """``weights_hash`` of each tensor alone."""
    samples: dict[str, Tensor] = field(default_factory=dict)
    """The first rows of small tensors: one and then another of each kind (the name without its numbers)."""
    _kinds: set[str] = field(default_factory=set)

    @property
    def hash(self) -> int:
        """``weights_hash`` of everything: it is a sum."""
        return sum(self.hashes.values()) & (2**64 - 1)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors of one bucket, as they lie in it."""
        for name, tensor in tensors.items():
            self.hashes[name] = weights_hash({name: tensor})
            kind = "".join(character for character in name if not character.isdigit())
            is_sample = 0 < tensor.numel() <= _SAMPLE_NUMEL and not any(part in name for part in _NOT_SAMPLED)
            if is_sample and kind not in self._kinds and len(self.samples) < _SAMPLES:
                self._kinds.add(kind)
                self.samples[name] = tensor[:_SAMPLE_ROWS].cpu().clone()
