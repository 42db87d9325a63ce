"""The embedded engine on one core against transformers' continuous batching, in the same run; and through HTTP.

Workload: the demo's model (qwen2, hidden 96, 2 layers), groups of 8 answers to one prompt of 8 to 20 tokens, answers of 16 to 64 tokens,
log-probs included, at most 64 sequences at once. The rounds of the variants take turns. ``tokens/s`` is by the wall clock, ``per core
second`` by CPU time (of all threads; through HTTP that of the server's process), which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import torch

from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.request import Answer, GenerateRequest, SamplingParams
from areal.launcher.local import ChildProcess, free_port
from areal.models.attention import PackedContext
from areal.models.heads import head_of
from areal.models.loading import create_model, forward_hidden
from benchmarks.measure import report

MODEL: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 30,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rope_theta": 500.0,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 2,
}
SLOTS = 64
GROUP = 8


def workload(n: int, seed: int) -> list[GenerateRequest]:
    rng = random.Random(seed)
    requests, prompt = [], []
    for i in range(n):
        if i % GROUP == 0:
            prompt = [rng.randrange(3, 30) for _ in range(rng.randint(8, 20))]
        params = SamplingParams(max_new_tokens=rng.randint(16, 64), ignore_eos=True, sampling_seed=seed * n + i)
        requests.append(GenerateRequest(prompt, params))
    return requests


def check(answers: list[Answer]) -> None:
    """The log-probs are those of a packed forward pass."""
    model = create_model(MODEL, seed=0)
    for answer in answers:
        ids = torch.tensor(answer.request.input_ids + answer.output_ids.tolist())
        with torch.no_grad():
            hidden = forward_hidden(model, ids, torch.arange(len(ids)), PackedContext([len(ids)]))
            logprobs = torch.log_softmax(head_of(model).logits(hidden), -1)
        n = len(answer.request.input_ids)
        error = logprobs[n - 1 : -1].gather(1, ids[n:, None]).squeeze(1) - torch.from_numpy(answer.logprobs)
        assert error.abs().max() < 1e-5, f"log-probs are off by {error.abs().max()}"


class Rival:
    """transformers' ContinuousBatchingManager, with log-probs; page sizes of 16 to 256 and SDPA or eager differ little, async batching fails on the CPU."""

    def __init__(self) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        model = create_model(MODEL, seed=0)
        model.set_attn_implementation("sdpa")
        generation = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64, eos_token_id=-1, pad_token_id=2
        )
        config = ContinuousBatchingConfig(
            page_size=128, num_blocks=256, max_batch_tokens=256, max_requests_per_batch=SLOTS, return_logprobs=True, use_cuda_graph=False
        )
        self._manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
        self._manager.start()

    def __call__(self, requests: list[GenerateRequest]) -> int:
        for request in requests:
            self._manager.add_request(request.input_ids, max_new_tokens=request.params.max_new_tokens, eos_token_id=-1)
        n_tokens = 0
        for _ in requests:
            result = self._manager.get_result(timeout=60)
            assert result is not None and result.error is None, result
            assert len(result.generated_tokens) == len(result.logprobs)
            n_tokens += len(result.generated_tokens)
        return n_tokens

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)


class Http:
    """The server in a process of its own, one request per answer over kept-alive connections, as the rollout client sends them."""

    def __init__(self, folder: Path, concurrency: int) -> None:
        create_model(MODEL, seed=0).save_pretrained(folder)
        self._concurrency = concurrency
        self._url = f"http://127.0.0.1:{(port := free_port())}"
        argv = ["-m", "areal.inference.embedded.server", "--model", str(folder), "--port", str(port), "--max-running-requests", str(SLOTS)]
        self.process = ChildProcess("server", argv, folder / "server.log")
        asyncio.run(self._ready())

    async def _ready(self) -> None:
        deadline = time.monotonic() + 90
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline and self.process.poll() is None:
                try:
                    async with session.get(self._url + "/health"):
                        return
                except aiohttp.ClientError:
                    await asyncio.sleep(0.1)
        raise RuntimeError(self.process.describe_death(20))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __call__(self, requests: list[GenerateRequest]) -> int:
        return asyncio.run(self._serve(requests))

    async def _serve(self, requests: list[GenerateRequest]) -> int:
        gate = asyncio.Semaphore(self._concurrency)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(request: GenerateRequest) -> int:
                params = request.params
                sampling = {"max_new_tokens": params.max_new_tokens, "ignore_eos": True, "sampling_seed": params.sampling_seed}
                body = orjson.dumps({"input_ids": request.input_ids, "sampling_params": sampling, "return_logprob": True})
                async with gate, session.post(self._url + "/generate", data=body) as response:
                    content = orjson.loads(await response.read())
                return len(content["meta_info"]["output_token_logprobs"])

            return sum(await asyncio.gather(*map(one, requests)))


def measure(run: Callable[[list[GenerateRequest]], int], n: int, seed: int, cpu: Callable[[], float]) -> tuple[float, float]:
    """Tokens per second of wall clock and of CPU time."""
    requests = workload(n, seed)
    wall, busy = time.perf_counter(), cpu()
    n_tokens = run(requests)
    return n_tokens / (time.perf_counter() - wall), n_tokens / max(cpu() - busy, 1e-9)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench engine", description=__doc__)
    parser.add_argument("--requests", type=int, default=1024, help="answers per round of the engine (the rival gets a quarter)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    engine = EmbeddedEngine(create_model(MODEL, seed=0), max_running_requests=SLOTS)
    check(engine.generate(workload(64, 0)))
    rival = Rival()
    with tempfile.TemporaryDirectory() as folder:
        http = Http(Path(folder), 2 * SLOTS)
        variants: dict[str, tuple[Callable[[list[GenerateRequest]], int], int, Callable[[], float]]] = {
            "areal, in process": (lambda r: sum(len(a.output_ids) for a in engine.generate(r)), arguments.requests, time.process_time),
            "areal, through HTTP": (http, arguments.requests, http.cpu_seconds),
            "transformers continuous batching": (rival, arguments.requests // 4, time.process_time),
        }
        speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for turn in range(arguments.rounds + 1):
            for name, (run, n, cpu) in variants.items():
                speed = measure(run, n, turn, cpu)
                if turn:  # the first round warms up
                    speeds[name].append(speed)
        http.process.terminate()
    rival.close()
    theirs = max(wall for wall, _ in speeds["transformers continuous batching"])
    rows = [
        {
            "what": name,
            "tokens/s best": round(max(wall for wall, _ in pairs)),
            "median": round(statistics.median(wall for wall, _ in pairs)),
            "per core second": round(max(core for _, core in pairs)),
            "times rival": round(max(wall for wall, _ in pairs) / theirs, 2),
        }
        for name, pairs in speeds.items()
    ]
    report("engine", rows, slots=SLOTS, requests=arguments.requests, rounds=arguments.rounds)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
