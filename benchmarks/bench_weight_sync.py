"""Time of a weight update by transport, against what the machine can do with the same bytes in the same run.

The weights are those of a Qwen2-0.5B by their shapes (fewer layers with ``--layers``); the trainer's rank is this process, which holds
float32 masters and casts them on the way. Every server is a real one, in a process of its own. The limits: for ``broadcast`` a bare gloo
broadcast between two processes, into memory that is there already; for ``shm`` and ``tensor`` two copies in memory; for ``disk`` one file
that is written, synced and read again. Rounds take turns, and a figure is the median. SGLang runs where AREAL_SGLANG_PYTHON, or .venv-sglang, has it.

On a GPU, ``--device cuda``, trainer and servers share one: ``tensor`` and ``disk`` then, since NCCL refuses two ranks on one GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from areal.inference.sglang import sglang_argv, sglang_env
from areal.launcher.local import ChildProcess, free_port
from areal.models.loading import create_model
from areal.trainer.gather import WeightGatherer
from areal.weight_sync.broadcast import BroadcastSender
from areal.weight_sync.calls import post
from areal.weight_sync.disk import DiskSender, remove_old
from areal.weight_sync.groups import Rendezvous, UpdateGroup, connect_store
from areal.weight_sync.shm import ShmPublisher, ShmReader
from areal.weight_sync.stream import Sender, Target, stream_weights
from areal.weight_sync.tensor import TensorSender
from benchmarks.measure import report, summary
from tests.sglang_python import sglang_python

QWEN2_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
QWEN2_15B = QWEN2_05B | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
SHAPES = {"0.5b": QWEN2_05B, "1.5b": QWEN2_15B}
ROOT = Path(__file__).resolve().parents[1]


class Trainer:
    """One rank's float32 parameters and how they are gathered."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, bucket_mb: int) -> None:
        self.dtype = dtype
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        self.gatherer = WeightGatherer(model, dtype, 0, 1)
        self.set_bucket(bucket_mb)

    def set_bucket(self, bucket_mb: int) -> None:
        self.bucket_mb = bucket_mb
        self.buckets = self.gatherer.bucket_plan(bucket_mb << 20)
        self.nbytes = sum(bucket.nbytes for bucket in self.buckets)


# -- what the machine can do ---------------------------------------------------------------------------------------------------------


class BareBroadcast:
    """gloo between this process and another, nothing else: one tensor in pieces of the bucket's size."""

    def __init__(self, nbytes: int, piece: int) -> None:
        self._pieces = torch.ones(nbytes, dtype=torch.uint8).split(piece)
        rendezvous = Rendezvous("127.0.0.1")
        argv = [sys.executable, "-m", "benchmarks.bench_weight_sync", "--receive", f"{rendezvous.port},{nbytes},{piece}"]
        self._process = subprocess.Popen(argv, cwd=ROOT)
        self._group = UpdateGroup(rendezvous.store, "bare", 0, 2, torch.device("cpu"), "127.0.0.1", 60.0)
        self._rendezvous = rendezvous

    def __call__(self) -> None:
        for piece in self._pieces:
            assert self._group.broadcast([piece], 60.0).wait(60.0)
        assert self._group.broadcast([torch.zeros(1)], 60.0).wait(60.0)  # when it is answered the other one has all

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def receive_bare(port: int, nbytes: int, piece: int) -> None:
    group = UpdateGroup(connect_store("127.0.0.1", port, 60.0), "bare", 1, 2, torch.device("cpu"), "127.0.0.1", 3600.0)
    pieces = torch.zeros(nbytes, dtype=torch.uint8).split(piece)
    flag = torch.zeros(1)
    while True:
        for data in [*pieces, flag]:
            group.broadcast([data], 3600.0).wait(3600.0)


class TwoCopies:
    """Into a second piece of memory and from there into a third, both of which are there already."""

    def __init__(self, trainer: Trainer) -> None:
        self._sources = list(trainer.parameters.values())
        self._middle = [torch.zeros_like(s, dtype=trainer.dtype) for s in self._sources]
        self._end = [torch.zeros_like(s, dtype=trainer.dtype) for s in self._sources]

    def __call__(self) -> None:
        for source, middle in zip(self._sources, self._middle, strict=True):
            middle.copy_(source)
        for middle, end in zip(self._middle, self._end, strict=True):
            end.copy_(middle)
        if self._sources[0].is_cuda:
            torch.cuda.synchronize()


class BareFile:
    """A new file of the same bytes: written, synced, and read into memory that is there already; then the one before it goes."""

    def __init__(self, nbytes: int, folder: Path) -> None:
        self._source = torch.ones(nbytes, dtype=torch.uint8).numpy().data
        self._target = torch.zeros(nbytes, dtype=torch.uint8).numpy().data
        self._paths = [folder / "bare 0", folder / "bare 1"]

    def __call__(self) -> None:
        path, before = self._paths
        self._paths.reverse()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        rest = self._source
        while rest:
            rest = rest[os.write(descriptor, rest[: 1 << 30]) :]
        os.fdatasync(descriptor)
        os.lseek(descriptor, 0, os.SEEK_SET)
        rest = self._target
        while rest:
            rest = rest[os.readv(descriptor, [rest[: 1 << 30]]) :]
        os.close(descriptor)
        before.unlink(missing_ok=True)


# -- the transports --------------------------------------------------------------------------------------------------------------------


class Streaming:
    """A transport whose sender has the server as its target."""

    def __init__(self, trainer: Trainer, url: str, sender: Sender) -> None:
        self._trainer, self._target, self._sender = trainer, Target(url), sender
        self._version = 0

    def __call__(self) -> None:
        self._version += 1
        result = stream_weights(self._trainer.gatherer.gather, self._trainer.buckets, self._sender, self._version, [self._target])
        assert result is not None and result.outcomes[0].error is None, result

    def close(self) -> None:
        self._sender.close()


class Disk:
    """Written and synced here, then read by the server, one after the other."""

    def __init__(self, trainer: Trainer, url: str, model: Path, folder: Path, device: str) -> None:
        self._trainer, self._url, self._folder = trainer, url, folder
        self._sender = DiskSender(folder, model, device=device, timeout=300.0)
        self._version = 0

    def __call__(self) -> None:
        self._version += 1
        result = stream_weights(self._trainer.gatherer.gather, self._trainer.buckets, self._sender, self._version)
        assert result is not None and result.outcomes[0].error is None, result
        post(self._url, "/update_weights_from_disk", {"model_path": result.outcomes[0].url, "weight_version": str(self._version)}, 300.0)
        remove_old(self._folder, self._version)

    def close(self) -> None:
        self._sender.close()


class SharedMemory:
    """The publisher here and the reader in the same process: its time is that of the update, one after the other."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        name = f"bench-{os.getpid()}"
        manifest = [(n, tuple(p.shape), trainer.dtype) for n, p in trainer.parameters.items()]
        self._publisher = ShmPublisher(name, manifest)
        self._reader = ShmReader(name)
        self._version = 0

    def __call__(self) -> None:
        self._version += 1
        digest = self._publisher.publish(self._trainer.parameters, self._version)
        assert self._reader.fetch(self._version, 60.0) == (self._version, digest)

    def close(self) -> None:
        self._reader.close()
        self._publisher.close()


# -- the servers -------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(kind: str, model: Path, dtype: str, log: Path, device: str) -> Iterator[str]:
    """A rollout server of its own, ready; its URL."""
    port = free_port()
    if kind == "embedded":
        argv = ["-m", "areal.inference.embedded.server", "--model", str(model), "--port", str(port), "--dtype", dtype, "--device", device]
        argv += ["--max-context", "512", "--max-running-requests", "4"]
        process = ChildProcess(kind, argv, log, {"OMP_NUM_THREADS": "1"})
    else:
        python = sglang_python()
        assert python is not None
        options = {"skip_server_warmup": True, "max_total_tokens": 512, "skip_tokenizer_init": True}
        argv = sglang_argv(model, port, device=device, dtype=dtype, n_ranks=1, shared_gpu=device != "cpu", options=options)
        process = ChildProcess(kind, argv, log, sglang_env(device, 1, python), python=python)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(process, url)
        yield url
    finally:
        process.kill()


def _wait_ready(process: ChildProcess, url: str) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(process.describe_death(30))
        with (
            contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError),
            urllib.request.urlopen(f"{url}/model_info", timeout=5),
        ):
            return
        time.sleep(0.3)
    raise RuntimeError(f"{process.name} is not ready: {process.last_log_lines(20)}")


def measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:  # the first one connects and touches memory
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench weight_sync", description=__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="0.5b", help="of a Qwen2 of that size")
    parser.add_argument("--layers", type=int, help="fewer layers than it has")
    parser.add_argument("--vocab", type=int, default=QWEN2_05B["vocab_size"])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: of the trainer's rank and the servers, all on one")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="on the wire and in the servers")
    parser.add_argument("--bucket-mb", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transports", nargs="+", default=["broadcast", "tensor", "disk", "shm"])
    parser.add_argument("--servers", nargs="+", default=["embedded", "sglang"])
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.receive:
        receive_bare(*map(int, arguments.receive.split(",")))
        return
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    shapes = SHAPES[arguments.shapes]
    config = shapes | {"num_hidden_layers": arguments.layers or shapes["num_hidden_layers"], "vocab_size": arguments.vocab}
    if arguments.device != "cpu":
        arguments.device = "cuda:0"
        arguments.transports = [name for name in arguments.transports if name in ("tensor", "disk")]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = create_model(config, seed=0)
        dtype = getattr(torch, arguments.dtype)
        model.to(dtype).save_pretrained(folder / "model")
        model.float().to(arguments.device)
        trainer = Trainer(model, dtype, arguments.bucket_mb[0])
        urls = {
            kind: stack.enter_context(server(kind, folder / "model", arguments.dtype, folder / f"{kind}.log", arguments.device))
            for kind in arguments.servers
            if set(arguments.transports) != {"shm"} and (kind != "sglang" or sglang_python())
        }
        rows = []
        for bucket_mb in arguments.bucket_mb:
            trainer.set_bucket(bucket_mb)
            rows += _rows(arguments, trainer, urls, folder)
    report(
        "weight_sync",
        rows,
        shapes=arguments.shapes,
        layers=config["num_hidden_layers"],
        vocab=arguments.vocab,
        device=arguments.device,
        rounds=arguments.rounds,
    )


def _rows(arguments: argparse.Namespace, trainer: Trainer, urls: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    variants: dict[str, Callable[[], object]] = {}
    limits: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if "broadcast" in arguments.transports:
            for name, piece in (("bare gloo broadcast", trainer.bucket_mb << 20), ("bare gloo broadcast, one piece", trainer.nbytes)):
                variants[name] = bare = BareBroadcast(trainer.nbytes, piece)
                stack.callback(bare.close)
            for kind, url in urls.items():
                for name, is_flat in ((f"broadcast to {kind}", False), (f"broadcast to {kind}, flat buckets", True)):
                    variants[name] = sender = Streaming(trainer, url, BroadcastSender("cpu", timeout=300.0, is_flat=is_flat))
                    limits[name] = "bare gloo broadcast"
                    stack.callback(sender.close)
        if {"shm", "tensor"} & set(arguments.transports):
            variants["two copies"] = TwoCopies(trainer)
        if "tensor" in arguments.transports:
            for kind, url in urls.items():
                variants[f"tensor to {kind}"] = by_reference = Streaming(trainer, url, TensorSender(arguments.device, timeout=300.0))
                limits[f"tensor to {kind}"] = "two copies"
                stack.callback(by_reference.close)
        if "disk" in arguments.transports:
            variants["file written, synced and read"] = BareFile(trainer.nbytes, folder)
            for kind, url in urls.items():
                variants[f"disk to {kind}"] = disk = Disk(trainer, url, folder / "model", folder / kind, arguments.device)
                limits[f"disk to {kind}"] = "file written, synced and read"
                stack.callback(disk.close)
        if "shm" in arguments.transports:
            variants["shm"] = shared = SharedMemory(trainer)
            limits["shm"] = "two copies"
            stack.callback(shared.close)
        seconds = measure(variants, arguments.rounds)
    rows = []
    for name, values in seconds.items():
        found = summary(values)
        share = f"{summary(seconds[limits[name]])['median'] / found['median']:.0%}" if name in limits else "-"
        rows.append(
            {
                "what": name,
                "MiB": trainer.nbytes >> 20,
                "bucket MiB": trainer.bucket_mb,
                "seconds": found["median"],
                "best": found["best"],
                "GB/s": trainer.nbytes / found["median"] / 1e9,
                "of the limit": share,
            }
        )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
