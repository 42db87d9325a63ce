"""Many generations through many weight updates, and the proof of which weights sampled each of their tokens."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from areal.config import GenerationConfig
from areal.inference.client import RolloutClient
from areal.types import ModelRequest, ModelResponse

FIRST_TOKEN, LAST_TOKEN = 3, 12
_PREFIX = [3, 4, 5, 6, 7, 8, 9, 10] * 6


def some_requests(n: int, seed: int = 0, longest: int = 90) -> list[ModelRequest]:
    """Few prompts with a long common beginning, so that a prefix cache has something to be wrong about; half of them may end early."""
    draw = random.Random(seed)
    prompts = [_PREFIX + [draw.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(draw.randint(1, 6))] for _ in range(16)]
    return [
        ModelRequest(draw.choice(prompts), GenerationConfig(max_new_tokens=draw.randint(longest // 3, longest), ignore_eos=i % 2 == 0))
        for i in range(n)
    ]


async def generate_through_updates(
    client: RolloutClient, update: Callable[[int], Awaitable[None]], n_in_flight: int, n_updates: int, rest: float
) -> list[ModelResponse]:
    """Keeps ``n_in_flight`` requests going until ``update`` was called with 1 .. n_updates, ``rest`` seconds apart, and all have ended."""
    responses: list[ModelResponse] = []
    is_over = False

    async def work(index: int) -> None:
        requests = some_requests(1000, seed=index)
        while not is_over:
            request = requests.pop()
            response = await client.agenerate(request)
            n_tokens = request.gconfig.max_new_tokens
            assert response.output_len == n_tokens if response.stop_reason == "length" else response.output_len <= n_tokens
            responses.append(response)

    workers = [asyncio.ensure_future(work(index)) for index in range(n_in_flight)]
    try:
        for version in range(1, n_updates + 1):
            await asyncio.sleep(rest)
            await update(version)
        await asyncio.sleep(rest)
    finally:
        is_over = True
        await asyncio.gather(*workers)
    return responses


def prove(responses: Sequence[ModelResponse], models: Sequence[Path], eos: int, tolerance: float = 1e-4) -> dict[str, float]:
    """Every token's log-prob, recomputed under the weights of its version v, those of ``models[v % len(models)]``.

    Returns how many generations hold tokens of several versions, the largest error, and the median error had the version been wrong.
    """
    plain = [AutoModelForCausalLM.from_pretrained(m, attn_implementation="eager").eval() for m in models]
    worst, wrong = 0.0, []
    for response in responses:
        tokens = torch.tensor([response.input_tokens + response.output_tokens])
        with torch.no_grad():
            table = torch.stack([torch.log_softmax(model(tokens).logits[0].float(), -1) for model in plain])
        picked = table[:, response.input_len - 1 : -1].gather(2, tokens[0, response.input_len :].view(1, -1, 1).expand(len(plain), -1, 1))[
            ..., 0
        ]
        versions = torch.tensor(response.output_versions)
        assert response.output_versions == sorted(response.output_versions)
        said = torch.tensor(response.output_logprobs)
        rows = torch.arange(len(said))
        errors = (picked[versions % len(plain), rows] - said).abs()
        wrong.append((picked[(versions + 1) % len(plain), rows] - said).abs())
        worst = max(worst, float(errors.max()))
        assert errors.max() < tolerance, (response.output_versions, errors.tolist())
        if response.stop_reason == "stop":  # an end is an end, also where it was sampled while the server was being stopped
            assert response.output_tokens[-1] == eos and eos not in response.output_tokens[:-1]
    return {
        "n_mixed": sum(len(set(r.output_versions)) > 1 for r in responses),
        "worst": worst,
        "wrong": float(torch.cat(wrong).median()),
    }


async def update_from_disk(client: RolloutClient, url: str, models: Sequence[Path], version: int) -> float:
    """One update of one server; returns the seconds that it stood still without those of the loading."""
    begin = time.monotonic()
    await client.interrupt(url)
    loading = time.monotonic()
    await client.update_from_disk(url, models[version % len(models)], version)
    loaded = time.monotonic()
    await client.resume(url, version)
    return time.monotonic() - begin - (loaded - loading)
