"""Weights through files: one folder a version, in the format of a Hugging Face checkpoint, on a local or a shared file system.

The trainer writes a bucket a file into ``v000012.partial``; the manifest (``model.safetensors.index.json``, with version and hash) comes
last, and then the folder gets its name ``v000012`` in one rename. Whoever finds the name finds all of it; there are no locks and no
links. One run writes into one folder. The servers are told the path of a version and read it by themselves: SGLang with its own loader,
the embedded engine tensor by tensor into its parameters (``CheckpointReader``). Adapters alone make a folder as peft writes it.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from areal.weight_sync.adapter import INFO, WEIGHTS, AdapterInfo
from areal.weight_sync.safetensors_file import header_bytes
from areal.weight_sync.stream import BucketPlan, Outcome, Target

INDEX = "model.safetensors.index.json"
_PARTIAL = ".partial"
_REMOVED = ".removed"
_OURS = re.compile(rf"v\d{{6,}}({re.escape(_PARTIAL)}|{re.escape(_REMOVED)})?")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
_LARGEST_WRITE = 1 << 30  # Linux writes at most 2 GiB a call


def version_folder(folder: Path, version: int) -> Path:
    """Where version ``version`` is, once it is whole."""
    return folder / f"v{version:06d}"


def remove_old(folder: Path, keep_from: int) -> list[int]:
    """Removes the versions below ``keep_from``; returns them. For when every live server has moved on to a newer one."""
    removed = []
    for path in sorted(folder.glob("v*")):
        if re.fullmatch(r"v\d{6,}", path.name) and int(path.name[1:]) < keep_from:
            _remove(path)
            removed.append(int(path.name[1:]))
    return removed


def _remove(path: Path) -> None:
    """First the name, then the files: nobody finds half a version."""
    doomed = path if path.name.endswith((_PARTIAL, _REMOVED)) else path.with_name(path.name + _REMOVED)
    if doomed != path:
        path.rename(doomed)
    shutil.rmtree(doomed)


class DiskSender:
    """The trainer's end: writes versions into ``folder``, which belongs to this run alone; what earlier runs left there is removed.

    Args:
        folder: for the versions; made if it is missing.
        source: the model's folder, for the config, the tokenizer and other small files that go into each version.
        device: where the buckets are gathered.
        timeout: seconds that the file system may keep the trainer waiting during one update.
        adapter: what is written are the factors of adapters, in one bucket.

    A bucket is written in a thread while the next one is gathered. Nothing raises between ``begin`` and ``finish``: what went wrong
    (a full disk, a file server that hangs) is the error of the one outcome of ``finish``, whose ``url`` is the version's path.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        *,
        device: torch.device | str = "cpu",
        timeout: float = 120.0,
        adapter: AdapterInfo | None = None,
    ) -> None:
        self._folder = folder
        self._source = source
        self._device = torch.device(device)
        self._timeout = timeout
        self._adapter = adapter
        self._buffers: list[_Buffer] = []
        self._writer: _Writer | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_dir() and _OURS.fullmatch(path.name):
                _remove(path)

    def begin(self, version: int, buckets: Sequence[BucketPlan], targets: Sequence[Target] = ()) -> None:
        """``targets`` must be empty: the servers are told of a version when it is written."""
        if targets:
            raise ValueError("DiskSender: weights on the disk are sent to nobody; give no targets")
        self._drop_unfinished()
        largest = max(bucket.nbytes for bucket in buckets)
        if not self._buffers or self._buffers[0].data.nbytes < largest:
            self._buffers = [_Buffer(largest, self._device) for _ in range(2)]
        self._error: str | None = None
        self._seconds_left = self._timeout
        self._free: queue.Queue[_Buffer] = queue.Queue()
        for buffer in self._buffers:
            self._free.put(buffer)
        self._version = version
        self._writer = _Writer(version_folder(self._folder, version), self._source, version, buckets, self._free, self._adapter)

    def buffer(self, bucket: BucketPlan) -> Tensor:
        start = time.monotonic()
        try:
            self._current = self._free.get(timeout=max(self._seconds_left, 0.0))
        except queue.Empty:
            self._give_up(f"at bucket {bucket.index + 1}")
            self._current = _Buffer(bucket.nbytes, self._device)  # what hangs may still read the others
            self._free.put(self._current)
        self._seconds_left -= time.monotonic() - start
        return self._current.data[: bucket.nbytes]

    def send(self, bucket: BucketPlan, data: Tensor) -> None:
        if self._writer is None:  # given up
            self._free.put(self._current)
            return
        filled = None
        if data.is_cuda:
            filled = torch.cuda.Event()
            filled.record()
        self._writer.jobs.put(_Job(bucket, self._current, filled))

    def finish(self, digest: int | None = None) -> list[Outcome]:
        """``digest`` goes into the manifest."""
        if self._writer is not None:
            writer = self._writer
            writer.jobs.put(_End(digest))
            if writer.ended(max(self._seconds_left, 0.0)):
                self._error = writer.error
                self._writer = None
            else:
                self._give_up("at its end")
        return [Outcome(str(version_folder(self._folder, self._version)), self._error)]

    def close(self) -> None:
        self._drop_unfinished()
        self._buffers = []

    def _drop_unfinished(self) -> None:
        """An update that never came to ``finish``, because the trainer failed in the middle."""
        if self._writer is not None:
            self._writer.is_given_up = True
            self._writer.jobs.put(_End(None))
            self._writer.ended(self._timeout)
            self._writer = None

    def _give_up(self, where: str) -> None:
        """Leaves the writer's thread to itself, with its buffers; it removes what it wrote as soon as it can."""
        if self._writer is not None:
            self._writer.is_given_up = True
            self._writer.jobs.put(_End(None))
            self._writer = None
            self._error = (
                f"version {self._version} was not written to {self._folder}: {where} the file system had kept the trainer waiting "
                f"for {self._timeout:g} s (weight_sync.timeout)"
            )
        self._buffers = []


class _Buffer:
    """Memory for a bucket, with a copy on the CPU where it is on a GPU."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.data = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if device.type == "cuda" else self.data

    def bytes_of(self, bucket: BucketPlan) -> memoryview:
        data = self._staging[: bucket.nbytes]
        if self.data.is_cuda:
            data.copy_(self.data[: bucket.nbytes])
        return data.numpy().data


@dataclass(frozen=True, slots=True)
class _Job:
    bucket: BucketPlan
    buffer: _Buffer
    filled: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class _End:
    digest: int | None


class _Writer:
    """The thread that writes one version: everything that may wait for a file system is done here."""

    def __init__(
        self,
        path: Path,
        source: Path,
        version: int,
        buckets: Sequence[BucketPlan],
        free: queue.Queue[_Buffer],
        adapter: AdapterInfo | None,
    ) -> None:
        self.jobs: queue.Queue[_Job | _End] = queue.Queue()
        self.error: str | None = None
        self.is_given_up = False
        self._path, self._source, self._version, self._buckets = path, source, version, buckets
        self._partial = path.with_name(path.name + _PARTIAL)
        self._free = free
        self._adapter = adapter
        self._thread = threading.Thread(target=self._run, name=f"disk v{version}", daemon=True)
        self._thread.start()

    def ended(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._try(self._prepare)
        # Another thread waits for the disk, which is then busy from the first bucket on.
        with ThreadPoolExecutor(1, "disk sync") as syncer:
            synced: list[tuple[BucketPlan, Future[None]]] = []
            while isinstance(job := self.jobs.get(), _Job):
                self._try(partial(self._write, job, syncer, synced), job.bucket)
                self._free.put(job.buffer)
            for bucket, future in synced:
                self._try(future.result, bucket)
        self._try(partial(self._complete, job.digest))
        if self.error is not None or self.is_given_up:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _try(self, step: Callable[[], None], bucket: BucketPlan | None = None) -> None:
        """Does a step, unless an earlier one has failed."""
        if self.error is not None or self.is_given_up:
            return
        try:
            step()
        except Exception as error:  # thread boundary: whatever it is, ``finish`` must tell it
            where = (
                ""
                if bucket is None
                else f" at bucket {bucket.index + 1} of {len(self._buckets)} (from parameter '{bucket.tensors[0].name}' on)"
            )
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else repr(error)
            self.error = f"version {self._version} was not written to {self._path.parent}{where}: {reason}; free space there or change weight_sync.folder"

    def _prepare(self) -> None:
        if self._partial.exists():
            _remove(self._partial)
        self._partial.mkdir(parents=True)
        free, needed = shutil.disk_usage(self._partial).free, sum(bucket.nbytes for bucket in self._buckets)
        if free < needed:
            raise OSError(f"it needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free")

    def _write(self, job: _Job, syncer: ThreadPoolExecutor, synced: list[tuple[BucketPlan, Future[None]]]) -> None:
        if job.filled is not None:
            job.filled.synchronize()
        path = self._partial / self._file_name(job.bucket)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _write_whole(descriptor, header_bytes(job.bucket.tensors))
            _write_whole(descriptor, job.buffer.bytes_of(job.bucket))
        except BaseException:
            os.close(descriptor)
            raise
        # Not fsync, which is slower by a file's dates.
        synced.append((job.bucket, syncer.submit(_sync_and_close, descriptor, os.fdatasync)))

    def _complete(self, digest: int | None) -> None:
        metadata: dict[str, object] = {"total_size": sum(bucket.nbytes for bucket in self._buckets), "version": self._version}
        if digest is not None:
            metadata["hash"] = f"{digest:016x}"
        if self._adapter is None:
            for file in sorted(self._source.iterdir()):
                if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
                    shutil.copyfile(file, self._partial / file.name)
            files = {spec.name: self._file_name(bucket) for bucket in self._buckets for spec in bucket.tensors}
            last = self._partial / INDEX
            last.write_text(json.dumps({"metadata": metadata, "weight_map": files}))
        else:
            self._adapter.write_config(self._partial)
            last = self._partial / INFO
            last.write_text(json.dumps(metadata | self._adapter.as_dict()))
        _sync(last)
        _sync(self._partial)
        if self.is_given_up:
            return
        if self._path.exists():  # this version was written before, and is written again
            _remove(self._path)
        self._partial.rename(self._path)
        _sync(self._path.parent)

    def _file_name(self, bucket: BucketPlan) -> str:
        if self._adapter is not None:
            return WEIGHTS
        return f"model-{bucket.index + 1:05d}-of-{len(self._buckets):05d}.safetensors"


def _write_whole(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest[:_LARGEST_WRITE]) :]


def _sync(path: Path) -> None:
    _sync_and_close(os.open(path, os.O_RDONLY))


def _sync_and_close(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
