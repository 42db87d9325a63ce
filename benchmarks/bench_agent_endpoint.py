"""What a call costs that goes through the agents' endpoint instead of straight to the engine: latency added, at one call and at many.

Conversations of several turns with a chat template, as an agent has them: each call sends all messages so far and takes over the tokens of
the turn before. The engine answers at once with 32 tokens, so what is timed is the endpoint: HTTP, JSON, template, tokens, recording. The
variants take turns: straight to the engine; a bare aiohttp client; the openai client, whose own work is in its row too. Client and
endpoint share one event loop and one core, as in a run: calls at once wait for one another, and the
CPU time of a call, the client's included, says what each costs. With --server the engine is an embedded server on a tiny random model.

    python -m benchmarks agent_endpoint -- [--rounds 20] [--turns 6] [--at-once 1,16] [--server]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson

from areal.agent.chat import Chat
from areal.agent.endpoint import AgentEndpoint
from areal.agent.http_clients import http_clients
from areal.agent.sampling import SamplingRules
from areal.agent.session import Session
from areal.config import GenerationConfig, RolloutConfig
from areal.inference.client import RolloutClient
from areal.launcher.local import ChildProcess, free_port
from areal.models.loading import create_model
from areal.tasks.characters import byte_tokenizer
from areal.types import ModelRequest, ModelResponse
from benchmarks.measure import report

N_OUTPUT = 32
WARM_UP = 3  # rounds
VARIANTS = ("straight", "endpoint", "endpoint, openai client")
GCONFIG = GenerationConfig(max_new_tokens=N_OUTPUT, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
Ask = Callable[[list[dict[str, Any]]], Awaitable[str]]


class InstantEngine:
    """Answers at once, with other text every time."""

    def __init__(self, tokenizer: Any) -> None:
        self._random = random.Random(0)
        self._letters = tokenizer("abcdefghijklmnopqrstuvwxyz ")["input_ids"]

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        tokens = self._random.choices(self._letters, k=N_OUTPUT)
        return ModelResponse(request.input_ids, tokens, [-1.0] * N_OUTPUT, [0] * N_OUTPUT, "length")

    def get_version(self) -> int:
        return 0


@contextlib.asynccontextmanager
async def embedded(folder: Path, tokenizer: Any) -> AsyncIterator[RolloutClient]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = {"model_type": "qwen2", "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": None}
    create_model({**config, **sizes, **special}, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = free_port()
    argv = ["-m", "areal.inference.embedded.server", "--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    process = ChildProcess("rollout 0", argv, folder / "log", {"OMP_NUM_THREADS": "1"})
    client = RolloutClient(RolloutConfig(max_restarts=0), [f"http://127.0.0.1:{port}"], [process])
    try:
        async with asyncio.timeout(120), aiohttp.ClientSession() as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"http://127.0.0.1:{port}/health"):
                        break
                await asyncio.sleep(0.1)
        yield client
    finally:
        await client.close()
        process.terminate()


async def conversation(ask: Ask, turns: int, seconds: list[list[float]]) -> None:
    """Appends the time of every call to the list of its turn."""
    messages = [{"role": "system", "content": "You are a careful assistant. " * 20}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn}: " + "what follows from this? " * 8})
        begin = time.perf_counter()
        text = await ask(messages)
        seconds[turn].append(time.perf_counter() - begin)
        messages.append({"role": "assistant", "content": text})


def make_prompts(chat: Chat, turns: int) -> dict[int, list[int]]:
    """Prompts as long as those of ``conversation``, by the number of messages."""
    prompts: dict[int, list[int]] = {}

    async def ask(messages: list[dict[str, Any]]) -> str:
        prompts[len(messages)] = chat.encode_all(chat.render(messages, None, {}))
        return "x" * N_OUTPUT

    for _ in conversation(ask, turns, [[] for _ in range(turns)]).__await__():
        pass
    return prompts


def straight(engine: Any, chat: Chat, prompts: dict[int, list[int]]) -> Ask:
    """The engine alone, on prompts made before."""

    async def ask(messages: list[dict[str, Any]]) -> str:
        response = await engine.agenerate(ModelRequest(prompts[len(messages)], GCONFIG))
        return str(chat.decode(response.output_tokens))

    return ask


def by_aiohttp(http: aiohttp.ClientSession, url: str, key: str) -> Ask:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    async def ask(messages: list[dict[str, Any]]) -> str:
        async with http.post(f"{url}/chat/completions", data=orjson.dumps({"model": "m", "messages": messages}), headers=headers) as answer:
            return str(orjson.loads(await answer.read())["choices"][0]["message"]["content"])

    return ask


def by_openai(url: str, key: str) -> Ask:
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key=key, http_client=http_clients().asynchronous)

    async def ask(messages: list[dict[str, Any]]) -> str:
        answer = await client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
        return answer.choices[0].message.content or ""

    return ask


async def measure(engine: Any, chat: Chat, at_once: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    prompts = make_prompts(chat, arguments.turns)
    endpoint = AgentEndpoint()
    url = await endpoint.url()
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(arguments.turns)] for name in VARIANTS}
    cpu: dict[str, list[float]] = {name: [] for name in VARIANTS}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for turn in range(arguments.rounds + WARM_UP):
            for name in VARIANTS:
                taken: list[list[float]] = [[] for _ in range(arguments.turns)]
                with contextlib.ExitStack() as sessions:
                    keys = [sessions.enter_context(endpoint.open(Session(engine, chat, SamplingRules(GCONFIG)))) for _ in range(at_once)]
                    match name:
                        case "straight":
                            asks = [straight(engine, chat, prompts)] * at_once
                        case "endpoint":
                            asks = [by_aiohttp(http, url, key) for key in keys]
                        case _:
                            asks = [by_openai(url, key) for key in keys]
                    begin = time.process_time()
                    await asyncio.gather(*(conversation(ask, arguments.turns, taken) for ask in asks))
                    used = time.process_time() - begin
                if turn >= WARM_UP:
                    cpu[name].append(used / at_once / arguments.turns)
                    for kept, new in zip(seconds[name], taken, strict=True):
                        kept += new
    await endpoint.close()
    await http_clients().aclose()
    return [row(at_once, name, seconds) | {"CPU ms a call": float(np.median(cpu[name]) * 1e3)} for name in VARIANTS]


def row(at_once: int, name: str, seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    all_ms = np.concatenate(seconds[name]) * 1e3
    return {
        "calls at once": at_once,
        "variant": name,
        "p50 ms": float(np.median(all_ms)),
        "p90 ms": float(np.quantile(all_ms, 0.9)),
        "first turn p50": float(np.median(seconds[name][0]) * 1e3),
        "last turn p50": float(np.median(seconds[name][-1]) * 1e3),
        "added p50 ms": float(np.median(all_ms) - np.median(np.concatenate(seconds["straight"])) * 1e3),
    }


async def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    chat = Chat(tokenizer)
    rows = []
    with tempfile.TemporaryDirectory(prefix="areal-bench-") as name:
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(embedded(Path(name), tokenizer)) if arguments.server else None
            engine = server or InstantEngine(tokenizer)
            for at_once in map(int, arguments.at_once.split(",")):
                rows += await measure(engine, chat, at_once, arguments)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks agent_endpoint", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--turns", type=int, default=6, help="calls of a conversation")
    parser.add_argument("--at-once", default="1,16", metavar="N,N", help="conversations at the same time")
    parser.add_argument("--server", action="store_true", help="an embedded server instead of an engine that answers at once")
    arguments = parser.parse_args(argv)
    rows = asyncio.run(run(arguments))
    report("agent_endpoint", rows, rounds=arguments.rounds, turns=arguments.turns, server=arguments.server)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
