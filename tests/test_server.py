"""The embedded engine's server: a real process, real sockets, SGLang's protocol."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import build, eager_logprobs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from areal.inference.embedded.request import Answer, GenerateRequest
from areal.launcher.local import ChildProcess, free_port
from areal.ops.weights_hash import weights_hash
from areal.weight_sync.shm import ShmPublisher

torch.set_num_threads(1)
_CHARACTERS = ["<pad>", "<eos>", *"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"]


class Server:
    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        argv = ["-m", "areal.inference.embedded.server", "--model", str(folder), "--port", str(self.port), *options]
        self.process = ChildProcess("server", argv, folder / "server.log")
        deadline = time.monotonic() + 90
        while True:
            try:
                self.get("/health", as_json=False)
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None and time.monotonic() < deadline, self.process.describe_death(30)
                time.sleep(0.1)

    def get(self, path: str, as_json: bool = True) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            body = response.read()
        return json.loads(body) if as_json else body

    def post(self, path: str, content: Any = None, timeout: float = 60) -> Any:
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, method="POST")
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.loads(response.read())

    def refusal(self, path: str, content: Any) -> str:
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post(path, content)
        assert caught.value.code == 400
        return json.loads(caught.value.read())["message"]

    def wait_for(self, **wanted: int) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while True:
            stats = self.get("/engine_stats")
            if all(stats[key] == value for key, value in wanted.items()):
                return stats
            assert time.monotonic() < deadline, f"waited for {wanted}, got {stats}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("qwen2").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(_CHARACTERS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path):
    server = Server(folder, "--max-running-requests", "8")
    yield server
    server.process.terminate()


def as_answer(prompt: list[int], content: dict[str, Any]) -> Answer:
    meta = content["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == content["output_ids"]
    logprobs = torch.tensor([logprob for logprob, _, _ in meta["output_token_logprobs"]]).numpy()
    ids, versions = torch.tensor(content["output_ids"]).numpy(), torch.tensor(meta["output_token_versions"]).numpy()
    return Answer(GenerateRequest(prompt), ids, logprobs, versions, meta["finish_reason"])


def test_generate(server: Server) -> None:
    sampling = {"max_new_tokens": 12, "sampling_seed": 5, "ignore_eos": True}
    content = server.post(
        "/generate", {"input_ids": [3, 4, 5], "sampling_params": sampling, "return_logprob": True, "rid": "x", "unknown": 1}
    )
    answer = as_answer([3, 4, 5], content)
    assert (eager_logprobs(build("qwen2"), answer) - torch.from_numpy(answer.logprobs)).abs().max() < 1e-5
    meta = content["meta_info"]
    assert meta["id"] == "x" and meta["prompt_tokens"] == 3 and meta["completion_tokens"] == 12
    assert meta["finish_reason"] == {"type": "length", "length": 12} and meta["weight_version"] == "0"
    assert content["text"] == "".join(_CHARACTERS[i] for i in content["output_ids"] if i > 1)


def test_without_a_length_an_answer_may_fill_the_context(folder: Path) -> None:
    server = Server(folder, "--max-context", "32")
    try:
        content = server.post("/generate", {"input_ids": [3, 4, 5], "sampling_params": {"ignore_eos": True}})
        assert content["meta_info"]["completion_tokens"] == 29
        assert "exceed the context of 32" in server.refusal("/generate", {"input_ids": list(range(3, 12)) * 4})
    finally:
        server.process.terminate()


def test_several_prompts_and_several_samples(server: Server) -> None:
    sampling = {"max_new_tokens": 6, "sampling_seed": 1, "n": 3, "ignore_eos": True}
    contents = server.post("/generate", {"input_ids": [[3, 4], [5, 6, 7]], "sampling_params": sampling})
    assert [c["meta_info"]["prompt_tokens"] for c in contents] == [2, 2, 2, 3, 3, 3]
    assert len({tuple(c["output_ids"]) for c in contents}) == 6
    assert "output_token_logprobs" not in contents[0]["meta_info"]
    (single,) = server.post("/generate", {"input_ids": [[3, 4]], "sampling_params": {**sampling, "n": 1}})
    assert single["output_ids"] == contents[0]["output_ids"]


def test_text_and_stop_strings(server: Server) -> None:
    free = server.post("/generate", {"text": "ab1", "sampling_params": {"max_new_tokens": 40, "sampling_seed": 2, "ignore_eos": True}})
    assert free["meta_info"]["prompt_tokens"] == 3
    stop = free["text"][10:12]
    sampling = {"max_new_tokens": 40, "sampling_seed": 2, "ignore_eos": True, "stop": [stop]}
    stopped = server.post("/generate", {"text": "ab1", "sampling_params": sampling})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    n = len(stopped["output_ids"])
    assert stopped["output_ids"] == free["output_ids"][:n]


def test_streaming_sends_growing_answers(server: Server) -> None:
    body = {"input_ids": [3, 4], "stream": True, "sampling_params": {"max_new_tokens": 9, "sampling_seed": 3, "ignore_eos": True}}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/generate", data=json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = [line[6:] for line in response.read().decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    parts = [json.loads(event) for event in events]
    assert [len(part["output_ids"]) for part in parts] == list(range(1, 10))
    assert parts[-1]["meta_info"]["finish_reason"]["type"] == "length" and parts[0]["meta_info"]["finish_reason"] is None
    del body["stream"]
    assert server.post("/generate", body)["output_ids"] == parts[-1]["output_ids"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        ({}, "either input_ids or text"),
        ({"input_ids": []}, "not empty"),
        ({"input_ids": [1, "a"]}, "list of token ids"),
        ({"input_ids": [3, 61]}, "vocabulary"),
        ({"input_ids": [3] * 300}, "exceed the context of 256"),
        ({"input_ids": [3], "sampling_params": {"temperature": "hot"}}, "temperature must be a number"),
        ({"input_ids": [3], "sampling_params": {"max_new_tokens": 2.5}}, "max_new_tokens must be an integer"),
        ({"input_ids": [3], "sampling_params": {"top_p": 2}}, "top_p is 2"),
        ({"input_ids": [3], "sampling_params": {"frequency_penalty": 0.5}}, "frequency_penalty is 0.5, which the embedded"),
        ({"input_ids": [3], "sampling_params": {"tempreature": 1}}, "unknown field 'tempreature'"),
        ({"input_ids": [3], "return_logprob": True, "logprob_start_len": 0}, "logprob_start_len is 0, which"),
        ({"input_ids": [3], "sampling_params": {"n": 0}}, "n is 0"),
        ({"input_ids": [3], "rid": 7}, "rid must be a string"),
        ({"input_ids": [3], "sampling_params": {"stop_token_ids": [2**63]}}, "no 64-bit number"),
        ({"input_ids": [3], "sampling_params": {"top_k": 2**63}}, "no 64-bit number"),
    ],
)
def test_bad_requests_get_a_sentence(server: Server, content: Any, sentence: str) -> None:
    assert sentence in server.refusal("/generate", content)
    assert server.post("/generate", {"input_ids": [3], "sampling_params": {"max_new_tokens": 1}})  # the engine lives on


def background(server: Server, content: dict[str, Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(server.post("/generate", content)))
    thread.start()
    return thread, results


LONG = {"input_ids": [3, 4, 5], "return_logprob": True, "sampling_params": {"max_new_tokens": 250, "ignore_eos": True}}


def test_pause_abort_continue(server: Server) -> None:
    server.post("/pause_generation", {"mode": "retract"})
    thread, results = background(server, {**LONG, "rid": "mine"})
    server.wait_for(waiting=1)
    assert server.post("/abort_request", {"rid": "other"})["aborted"] == 0
    assert server.post("/abort_request", {"rid": "mine"})["aborted"] == 1
    thread.join(20)
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort" and results[0]["output_ids"] == []
    thread, results = background(server, LONG)
    server.wait_for(waiting=1)
    server.post("/continue_generation")
    thread.join(20)
    assert len(results[0]["output_ids"]) == 250
    assert "mode is 'stop'" in server.refusal("/pause_generation", {"mode": "stop"})
    assert "give rid" in server.refusal("/abort_request", {})


def test_a_client_that_vanishes_aborts_its_request(server: Server) -> None:
    server.post("/pause_generation", {"mode": "in_place"})  # so that it cannot end before the client goes
    body = json.dumps(LONG).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        server.wait_for(waiting=1)
    server.wait_for(waiting=0, running=0)
    server.post("/continue_generation")


def test_weights_from_shared_memory_reach_running_requests(folder: Path) -> None:
    server = Server(folder, "--max-running-requests", "8")
    model = build("qwen2", seed=1)
    tensors = dict(model.named_parameters())
    name = f"test-{os.getpid()}"
    try:
        assert server.get("/engine_stats")["hash"] == f"{weights_hash(dict(build('qwen2').named_parameters())):016x}"
        with ShmPublisher(name, [(k, tuple(t.shape), t.dtype) for k, t in tensors.items()]) as publisher:
            waiting = [background(server, LONG) for _ in range(6)]
            while server.get("/engine_stats")["tokens_generated"] < 100:
                pass
            digest = publisher.publish(tensors, 7)
            reply = server.post("/update_weights_from_shm", {"name": name, "version": 7, "mode": "retract"})
        assert reply["success"] and reply["version"] == 7 and reply["hash"] == f"{digest:016x}"
        for thread, results in waiting:
            thread.join(30)
            answer = as_answer(LONG["input_ids"], results[0])
            assert set(answer.versions.tolist()) == {0, 7}
            for version, reference in (0, build("qwen2")), (7, model):
                mine = answer.versions == version
                assert (eager_logprobs(reference, answer)[mine] - torch.from_numpy(answer.logprobs[mine])).abs().max() < 1e-5
        stats = server.get("/engine_stats")
        assert stats["version"] == 7 and stats["hash"] == f"{digest:016x}" and stats["tokens_generated"] == 1500
        assert server.get("/model_info")["weight_version"] == "7"
        assert "not updated" in server.refusal("/update_weights_from_shm", {"name": "nobody", "version": 1})
    finally:
        server.process.terminate()


def test_weights_from_disk_and_stats(folder: Path, tmp_path: Path) -> None:
    server = Server(folder)
    try:
        build("qwen2", seed=2).save_pretrained(tmp_path / "new")
        reply = server.post("/update_weights_from_disk", {"model_path": str(tmp_path / "new"), "weight_version": "12"})
        assert reply["version"] == 12
        assert reply["hash"] == f"{weights_hash(dict(build('qwen2', seed=2).named_parameters())):016x}"
        content = server.post("/generate", {"input_ids": [3], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}})
        assert content["meta_info"]["output_token_versions"] == [12] * 3
        build("qwen3").save_pretrained(tmp_path / "other")
        assert "not updated" in server.refusal("/update_weights_from_disk", {"model_path": str(tmp_path / "other")})
        assert "cannot be loaded" in server.refusal("/update_weights_from_disk", {"model_path": str(tmp_path / "nowhere")})
        stats = server.get("/engine_stats")
        assert stats["version"] == 12 and stats["hash"] == reply["hash"]
        kinds = [kind for kind, start, end in stats["spans"] if end >= start]
        assert kinds == ["weight_sync", "generation"] and server.get("/engine_stats")["spans"] == []
        assert 0 < stats["busy_seconds"] < 30
    finally:
        server.process.terminate()


def test_the_server_ends_with_its_parent(folder: Path) -> None:
    port = free_port()
    script = (
        "import sys,time; from pathlib import Path; from areal.launcher.local import ChildProcess;"
        f"c = ChildProcess('s', ['-m', 'areal.inference.embedded.server', '--model', {str(folder)!r}, '--port', '{port}'], Path({str(folder / 'p.log')!r}));"
        "print(c.pid, flush=True); time.sleep(120)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 90
    while not _listens(port):
        assert time.monotonic() < deadline, (folder / "p.log").read_text()
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.05)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
