"""What the tests of the weight transports share: weights to send, and servers asked what they hold."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from areal.models.loading import create_model
from areal.ops.weights_hash import weights_hash
from areal.weight_sync.stream import BucketPlan, Outcome, Sender, Target, plan_buckets

PROMPT = [5, 7, 3, 9, 11, 4]


def weights_of(folder: Path, seed: int) -> dict[str, Tensor]:
    """Random weights for the model in ``folder``, other ones for every seed; float32, tied ones once."""
    config = json.loads((folder / "config.json").read_text())
    return {name: p.detach() for name, p in create_model(config, seed=seed).named_parameters()}


def plan(tensors: Mapping[str, Tensor], bucket_bytes: int) -> list[BucketPlan]:
    return plan_buckets([(name, t.shape, t.dtype) for name, t in tensors.items()], bucket_bytes)


def send(
    sender: Sender,
    tensors: Mapping[str, Tensor],
    version: int,
    urls: Sequence[str] = (),
    bucket_bytes: int = 16384,
    before: Callable[[BucketPlan], None] = lambda bucket: None,
) -> list[Outcome]:
    """One update; ``before`` is called before a bucket is sent."""
    buckets = plan(tensors, bucket_bytes)
    sender.begin(version, buckets, [Target(url) for url in urls])
    for bucket in buckets:
        data = sender.buffer(bucket)
        for spec in bucket.tensors:
            data[spec.offset : spec.offset + spec.nbytes] = tensors[spec.name].reshape(-1).view(torch.uint8)
        before(bucket)
        sender.send(bucket, data)
    return sender.finish(weights_hash(tensors))


def post(url: str, path: str, content: Any, timeout: float = 60) -> Any:
    request = urllib.request.Request(url + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.loads(response.read())


def get(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path, timeout=60) as response:
        return json.loads(response.read())


def greedy(url: str, n_tokens: int = 8) -> tuple[list[int], Tensor, str]:
    """Greedy tokens after ``PROMPT``, their log-probs, and the version that the server says it has."""
    sampling = {"temperature": 0.0, "max_new_tokens": n_tokens, "ignore_eos": True}
    answer = post(url, "/generate", {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True})
    meta = answer["meta_info"]
    return answer["output_ids"], torch.tensor([row[0] for row in meta["output_token_logprobs"]]), str(meta["weight_version"])


def logprobs(folder: Path, weights: Mapping[str, Tensor], tokens: list[int]) -> Tensor:
    """Log-probs of ``tokens`` after ``PROMPT`` under ``weights``, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def assert_serves(url: str, folder: Path, weights: Mapping[str, Tensor], version: int) -> None:
    """The server generates with ``weights`` and says that it is ``version``."""
    tokens, found, label = greedy(url)
    assert label == str(version)
    torch.testing.assert_close(found, logprobs(folder, weights, tokens), atol=1e-5, rtol=0)
