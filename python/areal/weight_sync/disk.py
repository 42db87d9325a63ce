"""Weights through files: one folder a version, in the format of a Hugging Face checkpoint, on a local or a shared file system.

The trainer writes a bucket a file into ``v000012.partial``; the manifest (``model.safetensors.index.json``, with version and hash) comes
last, and then the folder gets its name ``v000012`` in one rename. Whoever finds the name finds all of it; there are no locks and no
links. One run writes into one folder. The servers are told the path of a version and read it by themselves: SGLang with its own loader,
the embedded engine tensor by tensor into its parameters (``CheckpointReader``).
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from areal.weight_sync.safetensors_file import header_bytes
from areal.weight_sync.stream import BucketPlan, Outcome, Target

INDEX = "model.safetensors.index.json"
_PARTIAL = ".partial"
_REMOVED = ".removed"
_OURS = re.compile(rf"v\d{{6,}}({re.escape(_PARTIAL)}|{re.escape(_REMOVED)})?")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
_Job = tuple[BucketPlan, int, "torch.cuda.Event | None"]
"""A bucket, the buffer that holds it, and when that is filled."""
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

    A bucket is written in a thread while the next one is gathered. Nothing raises between ``begin`` and ``finish``: what went wrong
    (a full disk) is the error of the one outcome of ``finish``, whose ``url`` is the version's path, and nothing is left of that version.
    """

    def __init__(self, folder: Path, source: Path, *, device: torch.device | str = "cpu") -> None:
        self._folder = folder
        self._source = source
        self._device = torch.device(device)
        self._buffers: list[Tensor] = []
        self._staging: Tensor | None = None
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_dir() and _OURS.fullmatch(path.name):
                _remove(path)

    def begin(self, version: int, buckets: Sequence[BucketPlan], targets: Sequence[Target] = ()) -> None:
        """``targets`` must be empty: the servers are told of a version when it is written."""
        if targets:
            raise ValueError("DiskSender: weights on the disk are sent to nobody; give no targets")
        self._end_thread()  # of an update that was given up
        self._version, self._buckets = version, list(buckets)
        self._path = version_folder(self._folder, version)
        self._partial = self._path.with_name(self._path.name + _PARTIAL)
        self._error: str | None = None
        self._reserve(max(bucket.nbytes for bucket in buckets))
        try:
            self._make_partial(sum(bucket.nbytes for bucket in buckets))
        except OSError as error:
            self._fail(error)
        self._jobs = queue.Queue()
        self._thread = threading.Thread(target=self._write_all, name=f"disk v{version}", daemon=True)
        self._thread.start()

    def buffer(self, bucket: BucketPlan) -> Tensor:
        return self._buffers[self._free.get()][: bucket.nbytes]

    def send(self, bucket: BucketPlan, data: Tensor) -> None:
        filled = None
        if data.is_cuda:
            filled = torch.cuda.Event()
            filled.record()
        start = data.untyped_storage().data_ptr()
        which = next(i for i, buffer in enumerate(self._buffers) if buffer.untyped_storage().data_ptr() == start)
        self._jobs.put((bucket, which, filled))

    def finish(self, digest: int | None = None) -> list[Outcome]:
        """``digest`` goes into the manifest."""
        self._end_thread()
        if self._error is None:
            try:
                self._complete(digest)
            except OSError as error:
                self._fail(error)
        if self._error is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        return [Outcome(str(self._path), self._error)]

    def close(self) -> None:
        self._end_thread()
        self._buffers, self._staging = [], None

    # -- the thread -------------------------------------------------------------------------------------------------------------

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            bucket, which, filled = job
            try:
                if self._error is None:
                    if filled is not None:
                        filled.synchronize()
                    self._write(bucket, self._buffers[which][: bucket.nbytes])
            except OSError as error:
                self._fail(error, bucket)
            except Exception as error:  # thread boundary: whatever it is, ``finish`` must tell it
                self._fail(OSError(f"{error!r}"), bucket)
            finally:
                self._free.put(which)

    def _write(self, bucket: BucketPlan, data: Tensor) -> None:
        if data.is_cuda:
            assert self._staging is not None
            data = self._staging[: bucket.nbytes].copy_(data)
        descriptor = os.open(self._partial / self._file_name(bucket), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _write_whole(descriptor, header_bytes(bucket.tensors))
            _write_whole(descriptor, data.numpy().data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # -- before and after -------------------------------------------------------------------------------------------------------

    def _reserve(self, nbytes: int) -> None:
        if not self._buffers or len(self._buffers[0]) < nbytes:
            self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
            self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if self._device.type == "cuda" else None
        self._free: queue.Queue[int] = queue.Queue()
        for which in range(2):
            self._free.put(which)

    def _make_partial(self, needed: int) -> None:
        if self._partial.exists():
            _remove(self._partial)
        self._partial.mkdir(parents=True)
        free = shutil.disk_usage(self._partial).free
        if free < needed:
            raise OSError(28, f"it needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free")

    def _complete(self, digest: int | None) -> None:
        for file in sorted(self._source.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copyfile(file, self._partial / file.name)
        metadata: dict[str, object] = {"total_size": sum(bucket.nbytes for bucket in self._buckets), "version": self._version}
        if digest is not None:
            metadata["hash"] = f"{digest:016x}"
        files = {spec.name: self._file_name(bucket) for bucket in self._buckets for spec in bucket.tensors}
        with (self._partial / INDEX).open("w") as manifest:
            json.dump({"metadata": metadata, "weight_map": files}, manifest)
            manifest.flush()
            os.fsync(manifest.fileno())
        _sync(self._partial)
        if self._path.exists():  # this version was written before, and is written again
            _remove(self._path)
        self._partial.rename(self._path)
        _sync(self._folder)

    def _file_name(self, bucket: BucketPlan) -> str:
        return f"model-{bucket.index + 1:05d}-of-{len(self._buckets):05d}.safetensors"

    def _fail(self, error: OSError, bucket: BucketPlan | None = None) -> None:
        where = "" if bucket is None else f", bucket {bucket.index} ('{bucket.tensors[0].name}' ...)"
        reason = error.strerror or str(error)
        self._error = f"version {self._version} could not be written to {self._folder}{where}: {reason}; free space there or change weight_sync.folder"


def _write_whole(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest[:_LARGEST_WRITE]) :]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
