"""From hidden states to logits and log-probabilities: the output head of a model, with what it does besides a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from areal.models.attention import PackedContext
from areal.models.loading import forward_hidden
from areal.models.prefix import SharedTokens

# Config keys with which heads scale their logits: Cohere multiplies, Falcon-H1 too, Granite divides.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"  # Gemma


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap)."""

    projection: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary], in the dtype of the model."""
        logits = self.projection(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def head_of(model: PreTrainedModel) -> Head:
    """The model's head. ``models.selfcheck`` finds heads that do something else."""
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear output head (it is a {type(projection).__name__}); use another model")
    config = model.config.get_text_config()
    scale = 1.0
    for key in _MULTIPLIERS:
        scale *= 1.0 if (value := getattr(config, key, None)) is None else float(value)
    for key in _DIVISORS:
        scale /= 1.0 if (value := getattr(config, key, None)) is None else float(value)
    return Head(projection, scale, getattr(config, _SOFTCAP, None))


def packed_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Sequence[int],
    temperature: float = 1.0,
    *,
    rows: Tensor | None = None,
    chunk_tokens: int = 0,
    shared: SharedTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of packed sequences, float32 [T] each, in nats, of softmax(logits / temperature).

    ``logprobs[t]`` is that of token t given those before it in its sequence, ``entropy[t]`` (without gradient) that of the distribution
    it came from; both are 0 where a sequence starts. ``rows`` (int64 indices into T) restricts the head to these tokens, the others are
    0. With ``chunk_tokens`` > 0 the logits of at most so many tokens exist at a time, in backward too, where they are computed again.
    ``shared`` says which tokens are the same in several sequences (see ``prefix``); the result does not depend on it.

    Shapes: ids and positions int64 [T]; ``lengths`` sum to T.
    """
    context = PackedContext(lengths, shared)
    if shared is None:
        hidden = forward_hidden(model, input_ids, position_ids, context)
    else:
        hidden = forward_hidden(model, input_ids[shared.computed], position_ids[shared.computed], context)
    if rows is None:
        starts = torch.zeros(len(input_ids), dtype=torch.bool)
        starts[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        rows = (~starts).nonzero().squeeze(1).to(input_ids.device)
    zeros = torch.zeros(len(input_ids), dtype=torch.float32, device=hidden.device)
    if not len(rows):
        # Every parameter takes part, with a gradient of 0: sharded ranks reduce the same gradients whatever their tokens are.
        nothing = head_of(model).logits(hidden[:1]).float().sum() * 0.0
        return zeros + nothing, zeros
    before = rows - 1 if shared is None else shared.token_of[rows - 1]
    logprobs, entropy = _score(head_of(model), hidden.index_select(0, before), input_ids.index_select(0, rows), temperature, chunk_tokens)
    return zeros.index_copy(0, rows, logprobs), zeros.index_copy(0, rows, entropy)


def _score(head: Head, hidden: Tensor, targets: Tensor, temperature: float, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    if chunk_tokens <= 0 or len(targets) <= chunk_tokens:
        return _score_chunk(head, hidden, targets, temperature)
    scores = []
    for hidden_chunk, target_chunk in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            scores.append(checkpoint(_score_chunk, head, hidden_chunk, target_chunk, temperature, use_reentrant=False))
        else:
            scores.append(_score_chunk(head, hidden_chunk, target_chunk, temperature))
    logprobs, entropy = zip(*scores, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _score_chunk(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden).float()
    log_p = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    with torch.no_grad():
        # exp(-inf) * -inf would be NaN where a logit is -inf.
        entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), entropy
