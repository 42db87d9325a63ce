"""An adapter in an embedded engine: its product is added to the weights when it arrives, so that decoding costs what it did.

The weights that it was added to are kept, for the next one: adding and taking away again would not give them back bit for bit. That is a
second copy of the adapted weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from areal.models.lora import pairs_by_weight, with_product
from areal.ops.weights_hash import weights_hash
from areal.weight_sync.adapter import AdapterInfo


class EngineAdapter:
    """At most one adapter. Call it between two steps, as everything that writes weights."""

    def __init__(self) -> None:
        self._base: dict[str, Tensor] = {}
        self._base_hash = ""
        self._factors: dict[str, Tensor] = {}

    def forget(self, base_hash: str) -> None:
        """Whole weights of this hash were written over it."""
        self._base, self._factors, self._base_hash = {}, {}, base_hash

    @property
    def hash(self) -> str:
        """Of the factors, by the names of peft's files, 16 hex digits."""
        return f"{weights_hash(self._factors):016x}"

    def take(self, parameters: Mapping[str, Tensor], factors: Mapping[str, Tensor], info: AdapterInfo) -> None:
        """Adds the product of ``factors`` to the weights, in place of the adapter before; ``ValueError`` before anything is written."""
        if info.base and info.base != self._base_hash:
            raise ValueError(
                f"the adapter belongs to weights of the hash {info.base}, this engine's are {self._base_hash}; start it on the model folder "
                "that the trainer starts from, in the same dtype"
            )
        pairs = pairs_by_weight(factors)
        for name, (up, down) in pairs.items():
            if name not in parameters:
                raise ValueError(f"the adapter is for '{name}', which the model has not")
            if (up.shape[0], down.shape[1]) != tuple(parameters[name].shape) or up.shape[1] != down.shape[0]:
                raise ValueError(f"the adapter of '{name}' does not have its shape {list(parameters[name].shape)}")
        device = next(iter(parameters.values())).device
        self._factors = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in factors.items()}
        for name in self._base.keys() - pairs.keys():  # the one before had them
            parameters[name].copy_(self._base.pop(name))
        for name, pair in pairs_by_weight(self._factors).items():
            if name not in self._base:
                self._base[name] = parameters[name].clone()
            parameters[name].copy_(with_product(self._base[name], pair, info.scale))
