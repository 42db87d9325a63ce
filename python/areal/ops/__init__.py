"""Kernels for training language models by reinforcement learning, one module an op: plain functions on torch tensors.

Needs torch and numpy, nothing else of the package.
"""

from areal.ops._dispatch import BackendUnavailable
from areal.ops.decode_attention import decode_attention
from areal.ops.flatten_weights import flatten_weights, unflatten_weights
from areal.ops.gae import gae
from areal.ops.linear_logprob_entropy import linear_logprob_entropy
from areal.ops.linear_ppo_loss import LinearPPOLoss, linear_ppo_loss
from areal.ops.logprob_entropy import logprob_entropy
from areal.ops.normalize_advantages import normalize_advantages
from areal.ops.pack import Packed, pack, unpack, unpack_ragged
from areal.ops.plan_microbatches import plan_microbatches
from areal.ops.ppo_loss import ppo_loss
from areal.ops.weights_hash import weights_hash
from areal.ops.weights_layout import WeightsLayout

__all__ = [
    "BackendUnavailable",
    "LinearPPOLoss",
    "Packed",
    "WeightsLayout",
    "decode_attention",
    "flatten_weights",
    "gae",
    "linear_logprob_entropy",
    "linear_ppo_loss",
    "logprob_entropy",
    "normalize_advantages",
    "pack",
    "plan_microbatches",
    "ppo_loss",
    "unflatten_weights",
    "unpack",
    "unpack_ragged",
    "weights_hash",
]
