"""Real rollout servers on a tiny random model, for tests."""

from __future__ import annotations

import contextlib
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from areal.launcher.local import ChildProcess, free_port

TINY = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Saves a model (``changes``: keys of its config) and the arithmetic tokenizer; returns the tokenizer."""
    from areal.models.loading import create_model
    from areal.tasks.arithmetic import build_tokenizer

    tokenizer = build_tokenizer()
    special = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    create_model({**special, **TINY, **changes}, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


class Server:
    """One embedded server process."""

    def __init__(self, model: Path, log: Path, name: str = "rollout 0", *options: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        argv = ["-m", "areal.inference.embedded.server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
        self.process = ChildProcess(name, argv, log, {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)})

    def wait(self, timeout: float = 90.0) -> Server:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(self.process.describe_death(30))
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return self
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout} s: {self.process.last_log_lines(30)}")


@contextlib.asynccontextmanager
async def aiohttp_server(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port := free_port())
    await site.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
