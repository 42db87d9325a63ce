"""Kernels for training language models by reinforcement learning, one module an op: plain functions on torch tensors.

Needs torch and numpy, nothing else of the package.
"""

from areal.ops._dispatch import BackendUnavailable
from areal.ops.decode_attention import decode_attention
from areal.ops.logprob_entropy import logprob_entropy
from areal.ops.plan_microbatches import plan_microbatches
from areal.ops.weights_hash import weights_hash

__all__ = [
    "BackendUnavailable",
    "decode_attention",
    "logprob_entropy",
    "plan_microbatches",
    "weights_hash",
]
