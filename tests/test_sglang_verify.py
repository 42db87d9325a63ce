"""What a real server of SGLang holds, against what it was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from areal.ops import weights_hash
from areal.weight_sync.broadcast import BroadcastSender
from areal.weight_sync.samples import sample_tensors
from areal.weight_sync.stream import BucketPlan, Target, plan_buckets, stream_weights
from areal.weight_sync.verify import LOADER, Verification, verify_server
from tests.rollout_servers import make_model
from tests.sglang_servers import SGLangServer
from tests.weight_transports import post

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    server = SGLangServer(model, log)
    try:
        yield server.wait(300)
    finally:
        server.process.terminate()


def update_from_disk(url: str, model: Path, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes ``weights`` as a checkpoint beside the model's other files and has the server load it."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    assert post(url, "/update_weights_from_disk", {"model_path": str(folder), "flush_cache": True})["success"]


def fresh(model: Path, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor) * 0.05 for name, tensor in load_file(model / "model.safetensors").items()}


def fill(weights: Mapping[str, Tensor], bucket: BucketPlan, out: Tensor | None) -> None:
    """In place of the trainer's gather."""
    assert out is not None
    for spec in bucket.tensors:
        spec.view(out).copy_(weights[spec.name])


def verify(url: str, sent: Mapping[str, Tensor], *, n_ranks: int = 1, with_tensor_hashes: bool = True) -> Verification:
    manifest = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in sent.items()]

    async def one_by_one() -> dict[str, int]:
        return {name: weights_hash({name: tensor}) for name, tensor in sent.items()}

    tensor_hashes = one_by_one if with_tensor_hashes else None
    return asyncio.run(verify_server(url, n_ranks, manifest, weights_hash(sent), 60.0, version=3, tensor_hashes=tensor_hashes))


def test_an_update_from_disk_is_verified(server: SGLangServer, model: Path, tmp_path: Path) -> None:
    sent = fresh(model, 1)
    update_from_disk(server.url, model, sent, tmp_path / "v1")
    assert verify(server.url, sent) == Verification("hash", True)


def test_one_changed_element_is_found_and_its_tensor_named(server: SGLangServer, model: Path, tmp_path: Path) -> None:
    sent = fresh(model, 2)
    wrong = {name: tensor.clone() for name, tensor in sent.items()}
    wrong["model.layers.1.self_attn.k_proj.weight"].view(torch.int32)[3, 5] ^= 1  # the last bit of one element
    update_from_disk(server.url, model, wrong, tmp_path / "v2")
    found = verify(server.url, sent)
    assert not found.ok and found.kind == "hash"
    assert "'model.layers.1.self_attn.k_proj.weight'" in found.detail and "1 of " in found.detail
    assert server.url in found.detail and "version 3" in found.detail and f"{weights_hash(sent):016x}" in found.detail
    without = verify(server.url, sent, with_tensor_hashes=False)
    assert not without.ok and f"{weights_hash(sent):016x}" in without.detail and f"{weights_hash(wrong):016x}" in without.detail


def test_a_missing_tensor_and_two_swapped_ones_are_found(server: SGLangServer, model: Path, tmp_path: Path) -> None:
    update_from_disk(server.url, model, fresh(model, 3), tmp_path / "v3")
    sent = fresh(model, 4)
    name = "model.layers.0.mlp.down_proj.weight"
    update_from_disk(server.url, model, {n: t for n, t in sent.items() if n != name}, tmp_path / "v4")
    assert f"1 of {len(sent)} tensors differ: '{name}'" in verify(server.url, sent).detail

    pair = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    swapped = {**sent, pair[0]: sent[pair[1]], pair[1]: sent[pair[0]]}
    update_from_disk(server.url, model, swapped, tmp_path / "v5")
    found = verify(server.url, sent)
    assert not found.ok and all(f"'{name}'" in found.detail for name in pair)


def test_a_broadcast_is_verified_by_the_hash_of_what_was_sent(server: SGLangServer, model: Path) -> None:
    weights = fresh(model, 7)
    buckets = plan_buckets([(name, t.shape, t.dtype) for name, t in weights.items()], 20_000)
    sender = BroadcastSender(torch.device("cpu"), timeout=100.0, flush_cache=True)
    try:
        sent = stream_weights(partial(fill, weights), buckets, sender, 7, [Target(server.url)], want_hash=True)
    finally:
        sender.close()
    assert sent is not None and sent.hash == weights_hash(weights) and [outcome.error for outcome in sent.outcomes] == [None]
    assert verify(server.url, weights) == Verification("hash", True)
    assert not verify(server.url, fresh(model, 8)).ok


def test_asking_leaves_the_server_as_it_was(server: SGLangServer, model: Path, tmp_path: Path) -> None:
    sent = fresh(model, 5)
    update_from_disk(server.url, model, sent, tmp_path / "v6")
    request = {"input_ids": [1, 2, 3], "sampling_params": {"temperature": 0, "max_new_tokens": 8}, "return_logprob": True}
    before = post(server.url, "/generate", request)["meta_info"]
    assert verify(server.url, sent).ok
    after = post(server.url, "/generate", request)["meta_info"]
    assert after["output_token_logprobs"] == before["output_token_logprobs"] and after["weight_version"] == before["weight_version"]


def test_tensors_that_the_server_does_not_know_are_named(server: SGLangServer, model: Path, tmp_path: Path) -> None:
    sent = fresh(model, 6)
    update_from_disk(server.url, model, sent, tmp_path / "v7")
    found = verify(server.url, {**sent, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    assert (found.kind, found.ok, found.unverified) == ("hash", True, ("model.layers.0.self_attn.q_norm.weight",))
    assert "'model.layers.0.self_attn.q_norm.weight' cannot be verified" in found.detail and "0 of its 16 elements" in found.detail
    without = verify(server.url, {**sent, "x.weight": torch.ones(3)}, with_tensor_hashes=False)
    assert (without.kind, without.ok) == ("none", True) and "'x.weight' cannot be verified" in without.detail
    rest = {name: tensor for name, tensor in sent.items() if name != "model.norm.weight"}
    unfilled = verify(server.url, rest)
    assert unfilled.ok and unfilled.unverified == ("model.norm.weight",) and "not filled by anything that was sent" in unfilled.detail
    narrower = verify(server.url, {**sent, "model.norm.weight": sent["model.norm.weight"].bfloat16()})
    assert "holds it as float32, not bfloat16" in narrower.detail


def test_ranks_answer_with_their_shards_and_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensor-parallel ranks on the CPU; fused experts; 3 KV heads on 2 ranks, so that heads are filled up; a vocabulary cut in the middle."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0")
    model = tmp_path / "model"
    heads = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1}
    make_model(model, model_type="qwen3_moe", tie_word_embeddings=False, **heads, **experts)
    # SGLang rebuilds the tokenizer of all but a few models, to which ours does not submit.
    server = SGLangServer(model, tmp_path / "server.log", n_ranks=2, skip_tokenizer_init=True)
    try:
        server.wait(300)
        sent = fresh(model, 1)
        update_from_disk(server.url, model, sent, tmp_path / "v1")
        assert verify(server.url, sent, n_ranks=2) == Verification("hash", True)
        for name in (
            "model.layers.1.mlp.experts.3.down_proj.weight",
            "model.layers.0.self_attn.v_proj.weight",
            "model.norm.weight",
        ):
            wrong = {**sent, name: sent[name].clone()}
            wrong[name].view(-1)[-1] += 1.0  # the last element: of a sharded tensor, the last rank's
            update_from_disk(server.url, model, wrong, tmp_path / name)
            assert f"1 of {len(sent)} tensors differ: '{name}'" in verify(server.url, sent, n_ranks=2).detail
    finally:
        server.process.terminate()


def test_a_server_without_our_loader_is_verified_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As somebody else may have started it, for ``rollout.urls``."""
    monkeypatch.setattr("areal.inference.sglang._WEIGHT_LOADERS", ())
    model = tmp_path / "model"
    make_model(model, model_type="llama")
    server = SGLangServer(model, tmp_path / "server.log", skip_tokenizer_init=True)
    try:
        server.wait(300)
        weights = fresh(model, 1)
        update_from_disk(server.url, model, weights, tmp_path / "v1")
        buckets = plan_buckets([(name, t.shape, t.dtype) for name, t in weights.items()], 30_000)

        def verify(samples: Mapping[str, np.ndarray]) -> Verification:
            async def give() -> Mapping[str, np.ndarray]:
                return samples

            return asyncio.run(verify_server(server.url, 1, [], weights_hash(weights), 60.0, samples=give))

        tried = set()
        for turn in range(6):
            samples = sample_tensors(partial(fill, weights), buckets, turn, torch.device("cpu"))
            right = verify(samples)
            assert (right.kind, right.ok) == ("samples", True) and "first rows of " in right.detail
            name = list(samples)[-1]
            wrong = verify({**samples, name: samples[name] + 1})
            assert (wrong.kind, wrong.ok) == ("samples", False) and name in wrong.detail
            tried |= set(samples)
        assert len(tried) > 8
        for nothing in ({}, {"unknown.weight": np.ones(2, np.float32)}):
            found = verify(nothing)
            assert (found.kind, found.ok) == ("none", True) and LOADER in found.detail
    finally:
        server.process.terminate()
