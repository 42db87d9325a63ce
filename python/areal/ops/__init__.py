"""Kernels for training language models by reinforcement learning, one module an op: plain functions on torch tensors.

Needs torch and numpy, nothing else of the package.
"""

from areal.ops._dispatch import BackendUnavailable
from areal.ops.decode_attention import decode_attention
from areal.ops.linear_logprob_entropy import linear_logprob_entropy
from areal.ops.linear_ppo_loss import LinearPPOLoss, linear_ppo_loss
from areal.ops.logprob_entropy import logprob_entropy
from areal.ops.pack import Packed, pack, unpack, unpack_ragged
from areal.ops.plan_microbatches import plan_microbatches
from areal.ops.ppo_loss import ppo_loss
from areal.ops.weights_hash import weights_hash

__all__ = [
    "BackendUnavailable",
    "LinearPPOLoss",
    "Packed",
    "decode_attention",
    "linear_logprob_entropy",
    "linear_ppo_loss",
    "logprob_entropy",
    "pack",
    "plan_microbatches",
    "ppo_loss",
    "unpack",
    "unpack_ragged",
    "weights_hash",
]
