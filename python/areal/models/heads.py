"""From hidden states to logits and log-probabilities: the output head of a model, with what it does besides a matrix product."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from areal.algo.policy_loss import KLEstimator, PPOInputs, policy_loss
from areal.models.attention import AttentionContext, PackedContext
from areal.models.loading import forward_hidden
from areal.models.prefix import SharedTokens
from areal.models.ulysses import ContextPart, UlyssesContext
from areal.models.value_head import ValueInputs, value_terms, values_of
from areal.ops import LinearPPOLoss, linear_logprob_entropy, linear_ppo_loss, logprob_entropy
from areal.ops._linear_chunks import chunk_tokens, memory_budget_for

# Config keys with which heads scale their logits: Cohere multiplies, Falcon-H1 too, Granite divides.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"  # Gemma
_LEVELS = ("ratio_level", "behav_imp_weight_level", "behav_filter_level")
"""Options of ``ppo_loss`` that are "token" or "sequence"."""


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap)."""

    projection: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_product(self) -> bool:
        """Whether log-probs at a temperature are those of hidden @ weight.T at temperature / scale."""
        return self.softcap is None and self.projection.bias is None and self.scale > 0

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
    memory_budget: int | None = None,
    shared: SharedTokens | None = None,
    part: ContextPart | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of packed sequences, float32 [T] each, in nats, of softmax(logits / temperature).

    ``logprobs[t]`` is that of token t given those before it in its sequence, ``entropy[t]`` (without gradient) that of the distribution
    it came from; both are 0 where a sequence starts. ``rows`` (int64 indices into T) restricts the head to these tokens, the others are
    0. Logits of a chunk of tokens exist at a time, ``memory_budget`` bytes of them, in backward too, where they are computed again.
    ``shared`` says which tokens are the same in several sequences (see ``prefix``), ``part`` which of them this rank computes (see
    ``ulysses``; ``rows`` are needed then); the result depends on neither.

    Shapes: ids and positions int64 [T]; ``lengths`` sum to T.
    """
    if part is not None:
        rows = part.rows
    elif rows is None:
        starts = torch.zeros(len(input_ids), dtype=torch.bool)
        starts[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        rows = (~starts).nonzero().squeeze(1).to(input_ids.device)
    hidden = _hidden_before(model, input_ids, position_ids, lengths, rows, shared, part)
    logprobs, entropy = _score(head_of(model), hidden, input_ids.index_select(0, rows), temperature, memory_budget)
    zeros = torch.zeros(len(input_ids), dtype=logprobs.dtype, device=hidden.device)
    logprobs, entropy = zeros.index_copy(0, rows, logprobs), zeros.index_copy(0, rows, entropy.detach())
    return (logprobs, entropy) if part is None else (part.whole(logprobs), part.whole(entropy))


def packed_ppo_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Sequence[int],
    temperature: float,
    inputs: PPOInputs,
    *,
    rows: Tensor,
    denominator: float,
    memory_budget: int | None = None,
    shared: SharedTokens | None = None,
    part: ContextPart | None = None,
    normalization: Literal["token", "sequence"] = "token",
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    values: ValueInputs | None = None,
    **options: Any,
) -> LinearPPOLoss:
    """The policy's loss of the loss tokens ``rows`` (ascending) of packed sequences, as ``algo.policy_loss`` defines it, with the
    ``options`` of ``ppo_loss``; log-probs and entropies are [T].

    This is where its way through the head is chosen. A plain product makes the gradients in the forward pass (``linear_ppo_loss``, three
    matrix products) where a token's gradient depends on its own log-prob alone. Else (something of level "sequence", a reference, an
    interpolated proximal policy, a head that does more) all log-probs come first and logits are made again for the gradient, four products.
    Either way only a chunk of logits exists at a time. Call ``backward`` on the loss at most once with each forward pass. With ``values``
    the loss has that of the model's value head added, and its sums are among the statistics. With ``part`` log-probs and statistics are
    those of all context ranks, and so are, with the gradients of own rows, losses of the second kind.
    """
    own = rows if part is None else part.rows
    hidden = _hidden_before(model, input_ids, position_ids, lengths, own, shared, part)
    head, targets = head_of(model), input_ids.index_select(0, own)
    zeros = torch.zeros(len(input_ids), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32, device=hidden.device)
    options |= {"denominator": denominator, "normalization": normalization}
    of_sequences = any(options.get(level) == "sequence" for level in _LEVELS)
    if of_sequences or normalization == "sequence":
        options["cu_seqlens"] = _ends_in_rows(rows, lengths)
        of_sequences |= part is not None  # whose own rows do not tell how long a sequence is
    if head.is_product and inputs.is_fused and not of_sequences:
        mask = torch.ones_like(own, dtype=torch.bool)
        options |= {"temperature": temperature / head.scale, "memory_budget": memory_budget}
        result = linear_ppo_loss(hidden, head.projection.weight, targets, *inputs.at(own)[:3], mask, **options)
        logprobs, entropy = (_whole(zeros.index_copy(0, own, x), part) for x in (result.logprobs, result.entropy))
        result = result._replace(stats=_whole_sums(result.stats, part), logprobs=logprobs, entropy=entropy)
    else:
        scores = _score(head, hidden, targets, temperature, memory_budget)
        logprobs, entropy = (_whole(zeros.index_copy(0, own, x), part) for x in scores)
        at_rows = logprobs.index_select(0, rows), entropy.index_select(0, rows)
        loss, stats = policy_loss(*at_rows, inputs.at(rows), kl_coef=kl_coef, kl_estimator=kl_estimator, **options)
        result = LinearPPOLoss(loss, stats, logprobs.detach(), entropy.detach())
    if values is not None:
        value_loss, sums = value_terms(model, hidden, own, values)
        result = result._replace(loss=result.loss + value_loss, stats={**result.stats, **_whole_sums(sums, part)})
    return result


def _ends_in_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """int32 [n + 1]: where each sequence starts among the loss tokens ``rows``, and how many those are."""
    ends = torch.tensor([0, *itertools.accumulate(lengths)], device=rows.device)
    return torch.searchsorted(rows, ends, out_int32=True)


def _whole(x: Tensor, part: ContextPart | None) -> Tensor:
    return x if part is None else part.whole(x)


def _whole_sums(sums: Mapping[str, Tensor], part: ContextPart | None) -> Mapping[str, Tensor]:
    return sums if part is None else part.whole_sums(sums)


def packed_values(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Sequence[int],
    *,
    rows: Tensor,
    shared: SharedTokens | None = None,
    part: ContextPart | None = None,
) -> Tensor:
    """What the states before the tokens ``rows`` are worth, by the model's value head: float32 [T], 0 elsewhere."""
    if part is not None:
        rows = part.rows
    values = values_of(model, _hidden_before(model, input_ids, position_ids, lengths, rows, shared, part))
    values = torch.zeros(len(input_ids), device=values.device).index_copy(0, rows, values)
    return values if part is None else part.whole(values)


def _hidden_before(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Sequence[int],
    rows: Tensor,
    shared: SharedTokens | None,
    part: ContextPart | None = None,
) -> Tensor:
    """The hidden states [len(rows), hidden] from which the tokens ``rows`` are predicted.

    Without rows too they are connected to every parameter of the body, with a gradient of 0: sharded ranks reduce the same gradients
    whatever their tokens are.
    """
    context: AttentionContext = PackedContext(lengths, shared)
    before = rows - 1
    if shared is not None:
        input_ids, position_ids, before = input_ids[shared.computed], position_ids[shared.computed], shared.token_of[before]
    if part is not None:
        context = UlyssesContext(context, part)
        input_ids, position_ids, before = input_ids[part.begin : part.end], position_ids[part.begin : part.end], before - part.begin
    return forward_hidden(model, input_ids, position_ids, context).index_select(0, before)


def _score(head: Head, hidden: Tensor, targets: Tensor, temperature: float, memory_budget: int | None) -> tuple[Tensor, Tensor]:
    if head.is_product:
        weight = head.projection.weight
        return linear_logprob_entropy(hidden, weight, targets, temperature / head.scale, memory_budget=memory_budget)
    # What such a head does besides the product is left to autograd, chunk by chunk.
    budget = memory_budget_for("packed_logprobs", hidden.device, memory_budget)
    size = chunk_tokens(len(targets), len(head.projection.weight), hidden.element_size(), budget)
    scores = []
    for hidden_chunk, target_chunk in zip(hidden.split(size), targets.split(size), strict=True):
        if torch.is_grad_enabled():
            scores.append(checkpoint(_score_chunk, head, hidden_chunk, target_chunk, temperature, use_reentrant=False))
        else:
            scores.append(_score_chunk(head, hidden_chunk, target_chunk, temperature))
    logprobs, entropy = zip(*scores, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _score_chunk(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return logprob_entropy(head.logits(hidden), targets, temperature, inplace_backward=torch.is_grad_enabled())
