"""Weights that come in parts into an engine's parameters, and the hash of the whole when all are there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from areal.ops.weights_hash import HashedCopy, copy_and_hash, tensor_key, weights_hash


class LoadedParts:
    """Hashes while it copies: the hash is a sum, so that of all parameters is there without another pass over them."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._digest = 0

    def forget(self) -> None:
        """The parameters were written by somebody else, or the next part is the first one of an update."""
        self._names, self._digest = set(), 0

    def load(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Copies ``tensors`` into the parameters of those names; ``ValueError`` before the first copy if a shape differs."""
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(f"tensor '{name}' has shape {tuple(tensors[name].shape)}, the model's is {tuple(parameter.shape)}")
        if self._names & parameters.keys():
            self.forget()  # what came before belongs to an update that was given up
        with torch.inference_mode():
            devices = {parameter.device for parameter in parameters.values() if parameter.device.type != "cpu"}
            if devices:
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[name], non_blocking=True)
                for device in devices:
                    torch.cuda.synchronize(device)  # whoever sent them may overwrite them when this returns
                return
            copies = (HashedCopy(tensor_key(n, p.shape, p.dtype), tensors[n], p) for n, p in parameters.items())
            self._digest += copy_and_hash(copies)
        self._names |= parameters.keys()

    def hash(self, parameters: Mapping[str, Tensor]) -> str:
        """16 hex digits, of ``parameters`` as they are now; the next part is the first one of another update."""
        digest = self._digest & (2**64 - 1) if self._names == parameters.keys() else weights_hash(parameters)
        self.forget()
        return f"{digest:016x}"
