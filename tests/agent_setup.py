"""What the tests of agents share: a tiny random model whose tokenizer has a chat template, and a client that keeps what the engine gave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from chat_templates import byte_tokenizer
from rollout_servers import TINY

from areal.agent import AgentWorkflow
from areal.inference.client import RolloutClient, Route
from areal.types import ModelRequest, ModelResponse


def make_chat_model(folder: Path, template: str = "qwen2.5") -> Any:
    """Returns the tokenizer."""
    from areal.models.loading import create_model

    tokenizer = byte_tokenizer(template)
    special = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    create_model({**special, **TINY, "bos_token_id": None}, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


class Recorder(RolloutClient):
    """A client that keeps every answer, copied, by the route of its episode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: dict[int, list[ModelResponse]] = {}

    async def agenerate(self, request: ModelRequest, *, sampling_seed: int | None = None, route: Route | None = None) -> ModelResponse:
        answer = await super().agenerate(request, sampling_seed=sampling_seed, route=route)
        copied = ModelResponse(
            list(answer.input_tokens),
            list(answer.output_tokens),
            list(answer.output_logprobs),
            list(answer.output_versions),
            answer.stop_reason,
        )
        self.given.setdefault(id(route), []).append(copied)
        return answer


@contextlib.asynccontextmanager
async def closing(client: RolloutClient, *workflows: AgentWorkflow) -> AsyncIterator[None]:
    """Closes all of it, and sees to it that nothing is left."""
    try:
        yield
    finally:
        for workflow in workflows:
            await workflow.aclose()
        await client.close()
        async with asyncio.timeout(10):
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0.01)


def check_recorded(sequences: list[Any], given: list[ModelResponse]) -> int:
    """Every token that the engine gave is in exactly one sequence with loss, where it was, with its log-prob and version; the others have none.

    Returns the tokens trained on.
    """
    n_found = np.zeros(len(given), dtype=int)
    for sequence in sequences:
        ids, covered = sequence.input_ids.tolist(), np.zeros(len(sequence.input_ids), dtype=bool)
        for i, answer in enumerate(given):
            begin, end = answer.input_len, answer.input_len + answer.output_len
            if ids[:end] == answer.input_tokens + answer.output_tokens and sequence.loss_mask[begin:end].all():
                if not np.array_equal(sequence.logprobs[begin:end], np.float32(answer.output_logprobs)):
                    continue  # the same tokens, sampled twice
                assert sequence.versions[begin:end].tolist() == answer.output_versions
                covered[begin:end] = True
                n_found[i] += 1
        assert np.array_equal(covered, sequence.loss_mask)
    assert (n_found == 1).all(), n_found
    return sum(int(sequence.loss_mask.sum()) for sequence in sequences)
