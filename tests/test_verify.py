"""Verification of weights: parts of tensors against the hash of the whole, the traced loader, embedded servers, answers of others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from areal.inference.sglang import PLUGIN
from areal.ops import weights_hash
from areal.weight_sync.verify import AnswerListener, Manifest, Verification, _mix, combine, verify_server
from tests.rollout_servers import Server, make_model

sys.path.insert(0, str(PLUGIN))  # as in a server of SGLang
from areal_load_trace import Wanted, trace_load
from areal_sglang_weights import _answer, report_hash
from areal_words_hash import NotWholeWords, _sum_cpu, _sum_torch, part_hash, tensor_key

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (64, 33), (2, 3, 40), (70_001,)])
def test_the_whole_tensor_as_one_part_has_its_hash(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = random_tensor(shape, dtype)
    key = tensor_key("a.weight", shape, dtype)
    part = part_hash(key, tensor.numel(), tensor, 0, tensor.stride())
    assert (_mix(key) + part) % 2**64 == weights_hash({"a.weight": tensor})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_add_up(dim: int, dtype: torch.dtype) -> None:
    tensor = random_tensor((24, 48), dtype)
    key = tensor_key("a.weight", tensor.shape, dtype)
    total = _mix(key)
    for begin, end in [(0, 8), (8, 12), (12, tensor.shape[dim])]:
        shard = tensor.narrow(dim, begin, end - begin)
        held = torch.full((30, 60), 7, dtype=dtype)[: shard.shape[0], 2 : 2 + shard.shape[1]]  # somewhere in a fused parameter
        held.copy_(shard)
        total += part_hash(key, tensor.numel(), held, shard.storage_offset(), shard.stride())
    assert total % 2**64 == weights_hash({"a.weight": tensor})


def test_a_transposed_place_has_the_hash_of_the_tensor() -> None:
    tensor = random_tensor((16, 24), torch.bfloat16)
    key = tensor_key("a", tensor.shape, tensor.dtype)
    held = tensor.t().contiguous()
    assert (_mix(key) + part_hash(key, tensor.numel(), held, 0, (1, 24))) % 2**64 == weights_hash({"a": tensor})


def test_a_part_that_cuts_a_word_is_refused() -> None:
    tensor = random_tensor((4, 6), torch.bfloat16)
    with pytest.raises(NotWholeWords):
        part_hash(1, tensor.numel(), tensor[:, :3], 0, (6, 1))


def test_both_ways_of_summing_agree() -> None:
    words = torch.randint(-(2**62), 2**62, (5, 1000))
    starts = torch.tensor([0, 2**40, 7, 123456789, 2**61])
    for key in (0, 1, 2**63, 2**64 - 1):
        assert _sum_cpu(key, starts, words) == _sum_torch(key, starts, words) % 2**64


class Fused(nn.Module):
    """A model that keeps its weights as servers do: two fused, one sharded by columns, one padded, one twice."""

    def __init__(self, rank: int = 0, n_ranks: int = 1) -> None:
        super().__init__()
        self.rank = rank
        self.n_ranks = n_ranks
        self.gate_up = nn.Parameter(torch.randn(2 * 8 // n_ranks, 16))
        self.down = nn.Parameter(torch.randn(16, 8 // n_ranks))
        self.embed = nn.Parameter(torch.randn(16, 16))
        self.head = nn.Parameter(torch.randn(16, 16))
        self.norm = nn.Parameter(torch.randn(16))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        rows, cols = 8 // self.n_ranks, 8 // self.n_ranks
        for name, loaded in weights:
            match name:
                case "gate" | "up":
                    begin = rows * (name == "up")
                    self.gate_up.data[begin : begin + rows].copy_(loaded.narrow(0, self.rank * rows, rows))
                case "down":
                    self.down.data.copy_(loaded[:, self.rank * cols : (self.rank + 1) * cols].to(self.down.device))
                case "embed":
                    self.embed.data[len(loaded) :].copy_(torch.zeros_like(self.embed.data[len(loaded) :]))
                    for parameter in (self.embed, self.head):
                        parameter[: len(loaded)].data.copy_(loaded.to(parameter.dtype))
                        parameter[len(loaded) :].data.fill_(0)
                case "norm":
                    self.norm.data.copy_(loaded)
                case "scale":
                    self.norm.data.mul_(loaded.item())
                case "doubled":
                    self.norm.data.copy_(loaded * 2)


SHAPES = {"gate": (8, 16), "up": (8, 16), "down": (16, 8), "embed": (11, 16), "norm": (16,)}


def manifest(**more: tuple[int, ...]) -> Manifest:
    return [(name, shape, "float32") for name, shape in (SHAPES | more).items()]


def ask(model: nn.Module, wanted: Manifest, rank: int = 0) -> dict[str, object]:
    """What ``report_hash`` sends, after its way through JSON."""
    with torch.inference_mode():  # as the scheduler calls it
        return {"rank": rank, **json.loads(json.dumps(_answer(model, wanted)))}


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_traced_places_hash_to_what_was_loaded(n_ranks: int) -> None:
    ranks = [Fused(rank, n_ranks) for rank in range(n_ranks)]
    sent = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    for model in ranks:
        model.load_weights(sent.items())
    before = [{name: p.clone() for name, p in model.named_parameters()} for model in ranks]
    held = combine(manifest(), [ask(model, manifest(), rank) for rank, model in enumerate(ranks)])
    assert held.hashes == {name: weights_hash({name: tensor}) for name, tensor in sent.items()}
    assert not held.unverified and not held.disagreeing and not held.unfilled
    for model, parameters in zip(ranks, before, strict=True):
        assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())  # asking changed nothing


def test_every_element_counts() -> None:
    sent = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    model = Fused()
    model.load_weights(sent.items())
    right = combine(manifest(), [ask(model, manifest())])
    for parameter in model.parameters():
        used = 11 if parameter is model.embed or parameter is model.head else len(parameter)
        for row in range(used):
            with torch.no_grad():
                parameter[row] += 1
            found = combine(manifest(), [ask(model, manifest())])
            assert found.hashes != right.hashes or found.disagreeing
            with torch.no_grad():
                parameter[row] -= 1
            model.load_weights(sent.items())


def test_ranks_that_disagree_about_a_replicated_tensor_are_found() -> None:
    ranks = [Fused(rank, 2) for rank in range(2)]
    sent = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    for model in ranks:
        model.load_weights(sent.items())
    with torch.no_grad():
        ranks[1].norm[3] += 1
    held = combine(manifest(), [ask(model, manifest(), rank) for rank, model in enumerate(ranks)])
    assert held.disagreeing == ["norm"]


def test_what_cannot_be_traced_is_named_with_its_reason() -> None:
    model = Fused()
    wanted = manifest(scale=(1,), doubled=(16,), unknown=(3, 3))
    model.load_weights((name, torch.randn(shape)) for name, shape in SHAPES.items())
    before = model.norm.clone()
    held = combine(wanted, [ask(model, wanted)])
    assert set(held.unverified) == {"scale", "doubled", "unknown"}
    assert "computed" in held.unverified["doubled"] or "mul" in held.unverified["doubled"]
    assert held.unverified["unknown"] == "the server has 0 of its 9 elements"
    assert set(held.hashes) == set(SHAPES)
    assert torch.equal(model.norm, before)


def test_another_dtype_on_the_server_is_said() -> None:
    wanted = [(name, shape, "bfloat16" if name == "up" else dtype) for name, shape, dtype in manifest()]
    held = combine(wanted, [ask(Fused(), wanted)])
    assert held.unverified == {"up": "the server holds it as float32, not bfloat16 (rank 0)"}


def test_a_parameter_that_nothing_fills_is_named() -> None:
    wanted = [row for row in manifest() if row[0] != "norm"]
    assert combine(wanted, [ask(Fused(), wanted)]).unfilled == ["norm"]


def test_a_rank_that_holds_only_padding_of_a_parameter_lacks_nothing() -> None:
    class Padded(Fused):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            for name, loaded in weights:
                if name == "norm":
                    self.norm.data.copy_(torch.zeros_like(self.norm)) if self.rank else self.norm.data.copy_(loaded)
                else:
                    super().load_weights([(name, loaded)])

    ranks = [Padded(rank, 2) for rank in range(2)]
    for model in ranks:
        model.load_weights((name, torch.ones(shape)) for name, shape in SHAPES.items())
    held = combine(manifest(), [ask(model, manifest(), rank) for rank, model in enumerate(ranks)])
    assert set(held.hashes) == set(SHAPES) and not held.unfilled and not held.unverified


def test_a_parameter_with_new_memory_is_traced_again() -> None:
    model = Fused()
    first = combine(manifest(), [ask(model, manifest())])
    model.norm.data = torch.randn(16)
    second = combine(manifest(), [ask(model, manifest())])
    assert second.hashes["norm"] == weights_hash({"norm": model.norm.detach()}) != first.hashes["norm"]


def test_tracing_raises_only_before_the_first_tensor() -> None:
    class Broken(nn.Module):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            raise RuntimeError("nothing is loaded here")

    with pytest.raises(RuntimeError, match="nothing is loaded here"):
        trace_load(Broken(), [Wanted("a", (1,), torch.float32)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def embedded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(model, tmp_path_factory.mktemp("log") / "server.log")
    try:
        yield server.wait()
    finally:
        server.process.terminate()


def test_an_embedded_server_is_verified_by_its_own_hash(embedded: Server, model: Path) -> None:
    sent = load_file(model / "model.safetensors")
    wanted = [(name, t.shape, str(t.dtype).removeprefix("torch.")) for name, t in sent.items()]
    assert asyncio.run(verify_server(embedded.url, 1, wanted, weights_hash(sent), 30.0)) == Verification("hash", True)
    wrong = asyncio.run(verify_server(embedded.url, 1, wanted, 17, 30.0, version=5))
    assert not wrong.ok and wrong.kind == "hash"
    for said in (embedded.url, "version 5", f"{weights_hash(sent):016x}", f"{17:016x}"):
        assert said in wrong.detail


def test_a_server_that_is_gone_is_no_proof_of_anything() -> None:
    found = asyncio.run(verify_server("http://127.0.0.1:9", 1, [], 0, 5.0))
    assert (found.kind, found.ok) == ("none", False) and "http://127.0.0.1:9" in found.detail


def test_a_server_that_hangs_is_waited_for_until_the_deadline(embedded: Server) -> None:
    os.kill(embedded.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        found = asyncio.run(verify_server(embedded.url, 1, [], 0, 1.0, version=2))
        assert (found.kind, found.ok) == ("none", False) and "version 2" in found.detail and "no answer within 1 s" in found.detail
        assert time.monotonic() - start < 30
    finally:
        os.kill(embedded.process.pid, signal.SIGCONT)


async def say(listener: AnswerListener, line: bytes) -> None:
    _, writer = await asyncio.open_connection(listener.host, listener.port)
    writer.write(line)
    writer.write_eof()
    await writer.drain()
    writer.close()


def test_only_answers_with_the_nonce_are_taken() -> None:
    async def scenario() -> None:
        async with AnswerListener("http://127.0.0.1:9", 2) as listener:
            assert listener.host == "127.0.0.1"
            right = {"nonce": listener.nonce, "rank": 0}
            strangers = [
                {**right, "nonce": "0" * 32},
                {"rank": 0},
                [],
                "x",
                {**right, "rank": None},
                {**right, "nonce": 3},
                {**right, "nonce": "ä"},
            ]
            for stranger in strangers:
                await say(listener, json.dumps(stranger).encode() + b"\n")
            for line in (b"", b"\xff\xfe\n", b"GET / HTTP/1.1\r\n\r\n", json.dumps(right).encode()[:-1]):
                await say(listener, line)
            assert not await listener.wait(0.3) and not listener.answers
            await say(listener, json.dumps(right).encode() + b"\n")
            await say(listener, json.dumps(right).encode() + b"\n")  # the same rank again is not the second one
            assert not await listener.wait(0.3) and set(listener.answers) == {0}
            await say(listener, json.dumps({**right, "rank": 1}).encode() + b"\n")
            assert await listener.wait(10) and set(listener.answers) == {0, 1}

    asyncio.run(scenario())


def test_report_hash_never_raises() -> None:
    """What it is asked may be anything; an exception would end the server."""
    unanswerable = {"nonce": "1", "host": "127.0.0.1", "port": 9, "manifest": []}
    for text in (b"", b"{}", b"[]", b"\xff", json.dumps(unanswerable).encode()):
        report_hash(Fused(), [("question", torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8))])
    report_hash(Fused(), [])


@pytest.mark.parametrize("wanted", [[["norm", [16], "float33"]], [["norm", [-1], "float32"]], 3])
def test_an_error_on_the_server_is_its_answer(wanted: object) -> None:
    async def scenario() -> dict[str, object]:
        async with AnswerListener("http://127.0.0.1:9", 1) as listener:
            question = {"nonce": listener.nonce, "host": listener.host, "port": listener.port, "manifest": wanted}
            data = torch.frombuffer(bytearray(json.dumps(question).encode()), dtype=torch.uint8)
            await asyncio.to_thread(report_hash, Fused(), [("question", data)])
            assert await listener.wait(10)
            return listener.answers[0]

    assert "error" in asyncio.run(scenario())
