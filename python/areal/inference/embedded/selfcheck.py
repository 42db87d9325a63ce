"""Does generation over K/V slots compute what a packed forward pass does, for this architecture? ``models.selfcheck`` has the other half."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.request import Answer, GenerateRequest, SamplingParams
from areal.models.heads import packed_logprobs
from areal.models.loading import model_from_config
from areal.models.selfcheck import UnsupportedModel, check_model, small_config

_PROMPTS = (1, 30, 30, 12)
_NEW_TOKENS = (60, 20, 45, 3)
"""Longer than the small instance's window and original rope length."""
_TOLERANCE = 2e-3
"""In nats."""


def check_engine(config: PretrainedConfig) -> None:
    """``UnsupportedModel`` if training or generation would compute this architecture wrongly, found out on a small random instance."""
    check_model(config)
    try:
        worst = _worst_error(config)
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UnsupportedModel(
            f"model type '{config.model_type}' is not supported: generation cannot be tried out, a small random instance fails with {error!r}"
        ) from error
    if not worst < _TOLERANCE:  # NaN is wrong too
        raise UnsupportedModel(
            f"model type '{config.model_type}' is not supported: on a small random instance the log-probs of generated tokens differ from "
            f"those of a forward pass by {worst:.2g}"
        )


def _worst_error(config: PretrainedConfig) -> float:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_from_config(small_config(config), dtype=torch.float32)
        for parameter in model.parameters():  # with a fresh model's small weights no mistake shows
            parameter.add_(0.08 * torch.randn_like(parameter))
        engine = EmbeddedEngine(model, max_running_requests=3)
        room = engine.max_context
        prompts = [torch.randint(1, model.config.vocab_size, (min(n, room // 2),)).tolist() for n in _PROMPTS]
    lengths = [min(n, room - len(prompt)) for n, prompt in zip(_NEW_TOKENS, prompts, strict=True)]
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, sampling_seed=seed) for seed, n in enumerate(lengths)]
    answers = engine.generate(map(GenerateRequest, prompts, params))
    return max(_error(model, answer) for answer in answers)


@torch.no_grad()
def _error(model: PreTrainedModel, answer: Answer) -> float:
    ids = torch.tensor(answer.request.input_ids + answer.output_ids.tolist())
    expected, _ = packed_logprobs(model, ids, torch.arange(len(ids)), [len(ids)])
    return float((expected[len(answer.request.input_ids) :] - torch.from_numpy(answer.logprobs)).abs().max())
