"""A head of one value a token on the body of a language model, beside its own head or instead of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from areal.algo.value_loss import value_loss

_NAME = "value_head"


class ValueInputs(NamedTuple):
    """What the value loss of packed tokens needs besides their values; float32 [T], looked at in the loss tokens only."""

    old_values: Tensor
    """Those before the train step, around which values are clipped."""
    returns: Tensor
    denominator: float
    """Loss tokens of the whole mini-batch over all ranks."""
    eps_clip: float | None
    coef: float
    """The loss times this is added to the policy's."""


def add_value_head(model: PreTrainedModel, *, keep_lm_head: bool) -> None:
    """Adds ``model.value_head``, float32 [1, hidden] with a bias, from zeros: every state is worth 0 at first, on every rank.

    Without ``keep_lm_head`` the model loses its own head (a tied one stays, as the embedding); it gives no logits any more.
    """
    setattr(model, _NAME, nn.Linear(model.config.get_text_config().hidden_size, 1))
    nn.init.zeros_(model.value_head.weight)
    nn.init.zeros_(model.value_head.bias)
    if not keep_lm_head:
        model.set_output_embeddings(nn.Identity())


def values_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[n, hidden] -> float32 [n], in float32 whatever the dtype of the body: bfloat16 has two digits."""
    return model.value_head(hidden.float()).squeeze(-1)


def value_terms(model: PreTrainedModel, hidden: Tensor, rows: Tensor, inputs: ValueInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """``value_loss`` of the loss tokens ``rows``, whose states are ``hidden`` [len(rows), hidden], times ``inputs.coef``; its sums."""
    old, returns = inputs.old_values.index_select(0, rows), inputs.returns.index_select(0, rows)
    loss, sums = value_loss(values_of(model, hidden), old, returns, eps_clip=inputs.eps_clip, denominator=inputs.denominator)
    return inputs.coef * loss, sums


def policy_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are the policy's: all but those of the value head, which rollout servers and checkpoints of the policy lack."""
    return {name: p for name, p in model.named_parameters() if not name.startswith(f"{_NAME}.")}


def value_head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the value head, by name; none where the model has no such head."""
    return {name: p for name, p in model.named_parameters() if name.startswith(f"{_NAME}.")}
