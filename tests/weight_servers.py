"""Rollout servers of either kind that weights are sent to, and the question whose weights they have."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rollout_servers import Server
from sglang_servers import SGLangServer

from areal.models.loading import create_model, load_model
from areal.ops.weights_hash import weights_hash
from areal.trainer.gather import WeightGatherer
from areal.weight_sync.stream import BucketPlan, Sender, SendResult, Target, stream_weights

PROMPT = [5, 6, 7, 8, 9, 10]


def start_server(kind: str, model: Path, log: Path) -> Server | SGLangServer:
    return SGLangServer(model, log) if kind == "sglang" else Server(model, log)


def call(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def freeze(server: Server | SGLangServer) -> None:
    """All of its processes stop where they are, with their connections open."""
    os.killpg(server.process.pid, signal.SIGSTOP)


class Weights:
    """A trainer of one rank: a model whose parameters change as a whole, sent in small buckets."""

    def __init__(self, folder: Path, bucket_bytes: int) -> None:
        self.model = load_model(folder, dtype=torch.float32)
        self._gatherer = WeightGatherer(self.model, torch.float32, 0, 1)
        self.buckets = self._gatherer.bucket_plan(bucket_bytes)
        self.before: Callable[[BucketPlan], None] = lambda bucket: None
        """Called before a bucket is gathered."""

    def change(self, seed: int) -> None:
        """Other weights, far from the old ones."""
        config = self.model.config.to_dict()
        other = create_model(config, seed=seed)
        with torch.no_grad():
            for mine, new in zip(self.model.parameters(), other.parameters(), strict=True):
                mine.copy_(new)

    def send(self, sender: Sender, version: int, urls: list[str], **target: Any) -> SendResult:
        def gather(bucket: BucketPlan, out: torch.Tensor | None) -> None:
            self.before(bucket)
            self._gatherer.gather(bucket, out)

        result = stream_weights(gather, self.buckets, sender, version, [Target(url, **target) for url in urls], want_hash=True)
        assert result is not None and result.hash == weights_hash(dict(self.model.named_parameters()))
        return result

    def greedy(self, n: int = 12) -> tuple[list[int], list[float]]:
        """The tokens that these weights continue ``PROMPT`` with, and their log-probs."""
        model, tokens, logprobs = self.model, list(PROMPT), []
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            for _ in range(n):
                scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].float(), -1)
                tokens.append(int(scores.argmax()))
                logprobs.append(float(scores.max()))
        return tokens[len(PROMPT) :], logprobs

    def assert_held_by(self, url: str, version: int) -> None:
        """The server says so of its version, and generates so."""
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
        answer = call(url, "/generate", {"input_ids": PROMPT, "return_logprob": True, "sampling_params": params})
        assert answer["meta_info"]["weight_version"] == str(version)
        tokens, logprobs = self.greedy()
        rows = answer["meta_info"]["output_token_logprobs"]
        assert [row[1] for row in rows] == tokens
        torch.testing.assert_close(torch.tensor([row[0] for row in rows]), torch.tensor(logprobs), rtol=0, atol=1e-4)
