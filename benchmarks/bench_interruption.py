"""How long servers stand still for a weight update, the transfer itself left out: from the first request to stop until everything goes on.

64 requests are in flight all the time; every round interrupts the server, waits until it is still, and resumes it. Tokens a second are
measured before, undisturbed, and meanwhile. For SGLang it takes the interpreter of its environment: AREAL_SGLANG_PYTHON, else .venv-sglang.

    python -m benchmarks interruption -- [--rounds 30] [--every 0.5] [--in-flight 64] [--servers embedded,sglang]
    python -m benchmarks interruption -- --device cuda --model MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from areal.config import GenerationConfig, GRPOConfig
from areal.inference.client import RolloutClient
from areal.inference.servers import start_server
from areal.types import ModelRequest
from benchmarks.measure import report
from tests.rollout_servers import make_model
from tests.sglang_python import sglang_python

VARIANTS = {
    "embedded abort": ("embedded", "abort"),
    "embedded retract": ("embedded", "retract"),
    "SGLang abort": ("sglang", "abort"),
    "SGLang retract": ("sglang", "retract"),
}


async def measure(engine: str, mode: str, folder: Path, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of interruptions and resumptions of one server, and its tokens a second."""
    in_flight, device = arguments.in_flight, arguments.device
    config = GRPOConfig.model_validate(
        {
            "actor": {"path": str(model), "device": device, "dtype": "float32" if device == "cpu" else "bfloat16"},
            "train_dataset": {"type": "arithmetic"},
            "rollout": {
                "backend": f"{engine}:d1", "device": device, "update_mode": mode, "max_running_requests": in_flight, "max_context": 2048,
                "startup_timeout": 300, "request_timeout": 600,
            },
            "sglang": {"python": sglang_python() if engine == "sglang" else ""},
        }
    )  # fmt: skip
    server = await start_server(config, model, folder / f"{engine}-{mode}", 0)
    client = RolloutClient(config.rollout, update_mode=config.update_mode, interrupt_timeout=60)
    client.add_server(server.url, server.process)
    ended = False

    async def ask() -> int:
        n = 0
        while not ended:
            prompt = [random.randrange(4, 40) for _ in range(16)]
            answer = await client.agenerate(
                ModelRequest(prompt, GenerationConfig(max_new_tokens=random.randrange(200, 600), ignore_eos=True))
            )
            n += answer.output_len
        return n

    async def count() -> tuple[float, int]:
        return time.perf_counter(), (await client.engine_stats())[server.url]["tokens_generated"]

    asking = [asyncio.create_task(ask()) for _ in range(in_flight)]
    await asyncio.sleep(arguments.settle)
    marks = [await count()]
    await asyncio.sleep(arguments.settle)
    marks.append(await count())
    stop, go = [], []
    for version in range(1, arguments.rounds + 1):
        begin = time.perf_counter()
        await client.interrupt(server.url)
        still = time.perf_counter()
        await client.resume(server.url, version)
        stop.append(still - begin)
        go.append(time.perf_counter() - still)
        await asyncio.sleep(arguments.every)
    marks.append(await count())
    ended = True
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await client.close()
    server.process.terminate()
    both = np.array(stop) + np.array(go)
    return {
        "interrupt p50 ms": 1e3 * float(np.percentile(stop, 50)),
        "interrupt p99 ms": 1e3 * float(np.percentile(stop, 99)),
        "resume p50 ms": 1e3 * float(np.percentile(go, 50)),
        "pause to resumed p50 ms": 1e3 * float(np.percentile(both, 50)),
        "pause to resumed p99 ms": 1e3 * float(np.percentile(both, 99)),
        "tokens/s undisturbed": (marks[1][1] - marks[0][1]) / (marks[1][0] - marks[0][0]),
        "tokens/s meanwhile": (marks[2][1] - marks[1][1]) / (marks[2][0] - marks[1][0]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks interruption", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--every", type=float, default=0.5, metavar="SECONDS", help="between an interruption's end and the next one")
    parser.add_argument(
        "--settle", type=float, default=10.0, metavar="SECONDS", help="before anything is measured, and of the undisturbed rate"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:N")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: a tiny random model")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--servers", default="embedded,sglang")
    arguments = parser.parse_args(argv)
    engines = arguments.servers.split(",")
    if "sglang" in engines and sglang_python() is None:
        print("SGLang is left out: `make sglang-env` installs it")
        engines.remove("sglang")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="areal-bench-") as name:
        folder = Path(name)
        model = arguments.model or folder / "model"
        if arguments.model is None:
            make_model(model)
        for variant, (engine, mode) in VARIANTS.items():
            if engine in engines:
                rows.append({"server": variant, **asyncio.run(measure(engine, mode, folder, model, arguments))})
    report("interruption", rows, rounds=arguments.rounds, every=arguments.every, in_flight=arguments.in_flight, device=arguments.device)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
