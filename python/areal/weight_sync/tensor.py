"""Weights by reference: the trainer says where a bucket lies, and a server on the same machine or GPU copies from there.

On the CPU the buckets are anonymous shared memory (memfd), which the server maps read-only by its path under /proc; it has no name in
/dev/shm, so nothing is left when either side is killed. On a GPU they are CUDA IPC handles, with the device as a UUID, because the two
sides may number their devices differently.

What is sent is what SGLang's /update_weights_from_tensor takes: a pickle of ``{"flattened_tensor": uint8 tensor, "metadata": [...]}``,
made of nothing that SGLang's ``SafeUnpickler`` refuses and of no class of SGLang. (torch's own sharing of CPU tensors would not do: with
the strategy file_descriptor the server dies, and with file_system a daemon owns names in /dev/shm.)
"""

from __future__ import annotations

import base64
import functools
import io
import mmap
import os
import pickle
import queue
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from areal.weight_sync.addresses import is_here
from areal.weight_sync.calls import CallFailed, post
from areal.weight_sync.stream import BucketPlan, Outcome, Target

PATH = "/update_weights_from_tensor"
_DEVICE = 6
"""Where the device stands in the arguments of torch's ``rebuild_cuda_tensor``."""


# -- the sender ------------------------------------------------------------------------------------------------------------------


class TensorSender:
    """The trainer's end.

    Args:
        device: where the buckets are gathered.
        timeout: seconds that a server may take for one update, all buckets together.
        flush_cache: the servers forget their prefix caches with the last bucket; must be false where requests wait inside of a server
            (``rollout.update_mode: retract``), since SGLang dies of it.

    Two buffers; one thread a server, so that one that hangs holds up the others no longer than the deadline.
    """

    def __init__(self, device: torch.device | str, *, timeout: float, flush_cache: bool = True) -> None:
        self._device = torch.device(device)
        self._timeout = timeout
        self._flush_cache = flush_cache
        self._buffers: list[_Buffer] = []
        self._lanes: list[_Lane] = []
        self._changed = threading.Condition()

    def begin(self, version: int, buckets: Sequence[BucketPlan], targets: Sequence[Target]) -> None:
        for bucket in buckets:
            _check_alignment(bucket)
        self._end_lanes()  # of an update that was given up
        largest = max(bucket.nbytes for bucket in buckets)
        if not self._buffers or self._buffers[0].nbytes < largest:
            self.close()
            self._buffers = [_Buffer(largest, self._device) for _ in range(2)]
        update = _Update(version, len(buckets), self._timeout, self._flush_cache)
        self._lanes = [_Lane(target, update, self._changed) for target in targets]

    def buffer(self, bucket: BucketPlan) -> Tensor:
        with self._changed:
            # Without a limit: the lanes have one, and every lane lets go of its buckets then.
            self._changed.wait_for(lambda: any(buffer.users == 0 for buffer in self._buffers))
            free = next(buffer for buffer in self._buffers if buffer.users == 0)
            free.users = 1  # whoever fills it
        return free.data[: bucket.nbytes]

    def send(self, bucket: BucketPlan, data: Tensor) -> None:
        start = data.untyped_storage().data_ptr()
        buffer = next(buffer for buffer in self._buffers if buffer.data.untyped_storage().data_ptr() == start)
        filled = None
        if data.is_cuda:
            filled = torch.cuda.Event()
            filled.record()
        with self._changed:
            buffer.users += len(self._lanes) - 1
            self._changed.notify_all()
        for lane in self._lanes:
            lane.put(_Job(bucket, buffer, filled))

    def finish(self, digest: int | None = None) -> list[Outcome]:
        self._end_lanes()
        return [lane.outcome for lane in self._lanes]

    def close(self) -> None:
        self._end_lanes()
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def _end_lanes(self) -> None:
        for lane in self._lanes:
            lane.end()
        for buffer in self._buffers:
            buffer.users = 0


class _Buffer:
    """Memory for a bucket that other processes can open."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.users = 0
        """Who still fills or reads it: it is free at 0."""
        self._descriptor = -1
        self._handle: tuple[Any, ...] = ()
        if device.type == "cuda":
            self.data = torch.empty(nbytes, dtype=torch.uint8, device=device)
            # One handle for good: torch would make the storage's owner one link longer with each. The handle's event is that of now, so
            # the sender waits for its writes before it tells a server. That the server has read is known by its answer: before that it
            # lets go of the memory, and torch then waits for what its stream still does there.
            rebuild, arguments = reductions.reduce_tensor(self.data)
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = (rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :]))
            return
        self._descriptor = os.memfd_create("areal-bucket", os.MFD_CLOEXEC)
        os.posix_fallocate(self._descriptor, 0, nbytes)  # now, or a lack of memory kills the process at the first write
        self.data = torch.frombuffer(mmap.mmap(self._descriptor, nbytes), dtype=torch.uint8)

    def reduce(self) -> tuple[Any, ...]:
        """(function, arguments) that make the tensor in another process."""
        if self._handle:
            return self._handle
        opener = functools.partial(torch.from_file, shared=False, size=self.nbytes, dtype=torch.uint8)
        return opener, (f"/proc/{os.getpid()}/fd/{self._descriptor}",)

    def close(self) -> None:
        self.data = torch.empty(0, dtype=torch.uint8)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True, slots=True)
class _Update:
    """What all servers of one update are told."""

    version: int
    n_buckets: int
    timeout: float
    flush_cache: bool


@dataclass(frozen=True, slots=True)
class _Job:
    bucket: BucketPlan
    buffer: _Buffer
    filled: torch.cuda.Event | None


class _Lane:
    """One server during one update, and the thread that talks to it."""

    def __init__(self, target: Target, update: _Update, changed: threading.Condition) -> None:
        self.outcome = Outcome(target.url, None)
        self._target, self._update, self._changed = target, update, changed
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._seconds_used = 0.0
        if not is_here(target.url):
            self.outcome.error = f"{target.url} is on another machine, where the trainer's memory cannot be opened; use weight_sync.transport: broadcast or disk"
        self._thread = threading.Thread(target=self._run, name=f"weights to {target.url}", daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        self._jobs.put(job)

    def end(self) -> None:
        """Returns when everything is sent, or has failed; when the server's time is over at the latest."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self.outcome.error is None:
                try:
                    self._send(job)
                except Exception as error:  # thread boundary: an error of this server must not end the others
                    reason = str(error) if isinstance(error, CallFailed) else repr(error)
                    self.outcome.error = self._sentence(job.bucket, reason)
            with self._changed:
                job.buffer.users -= 1
                self._changed.notify_all()

    def _send(self, job: _Job) -> None:
        if job.filled is not None:
            job.filled.synchronize()
        is_last = job.bucket.index == self._update.n_buckets - 1
        body: dict[str, Any] = {
            "serialized_named_tensors": [serialize(job.bucket, job.buffer)] * self._target.n_ranks,
            "load_format": "flattened_bucket",
            # Only the last one: SGLang flushes its cache with nothing running or not at all, and dies of the latter.
            "flush_cache": is_last and self._update.flush_cache,
        }
        if is_last:
            body["weight_version"] = str(self._update.version)
        start = time.monotonic()
        try:
            post(self._target.url, PATH, body, self._update.timeout - self._seconds_used)
        finally:
            self._seconds_used += time.monotonic() - start

    def _sentence(self, bucket: BucketPlan, reason: str) -> str:
        where = f"at bucket {bucket.index + 1} of {self._update.n_buckets} (from parameter '{bucket.tensors[0].name}' on)"
        if self._seconds_used >= self._update.timeout:
            reason += f"; it kept the trainer waiting for {self._update.timeout:g} s (weight_sync.timeout)"
        return f"{self._target.url} did not get weights {self._update.version} {where}: {reason}"


def serialize(bucket: BucketPlan, buffer: _Buffer) -> str:
    """The bucket for one tensor-parallel rank, base64."""
    metadata = [
        SimpleNamespace(
            name=spec.name,
            shape=spec.shape,
            dtype=spec.dtype,
            start_idx=spec.offset,
            end_idx=spec.offset + spec.nbytes,
            numel=spec.nbytes,
        )
        for spec in bucket.tensors
    ]
    out = io.BytesIO()
    _Pickler(out, 4).dump({"flattened_tensor": buffer, "metadata": metadata})
    return base64.b64encode(out.getvalue()).decode()


class _Pickler(pickle.Pickler):
    """Buffers become tensors of the process that reads them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _Buffer):
            return obj.reduce()
        if obj is torch.from_file:
            return "from_file"  # of the module torch; else it would become a getattr, which a strict reader refuses
        return NotImplemented


def _check_alignment(bucket: BucketPlan) -> None:
    for spec in bucket.tensors:
        if spec.offset % spec.dtype.itemsize:
            raise ValueError(f"bucket {bucket.index}: '{spec.name}' ({spec.dtype}) begins at byte {spec.offset}, which no view of it can")


# -- the embedded engine's end ---------------------------------------------------------------------------------------------------


def deserialize(text: str) -> dict[str, Tensor]:
    """Views, by name, of the memory that a ``TensorSender`` filled. Nothing else can be made by such a body: ``ValueError``."""
    try:
        content = _Unpickler(io.BytesIO(base64.b64decode(text, validate=True))).load()
        flat, metadata = content["flattened_tensor"], content["metadata"]
        if not isinstance(flat, Tensor) or flat.dtype != torch.uint8:
            raise ValueError(f"flattened_tensor is a {type(flat).__name__}")
        views = {}
        for entry in metadata:
            raw = flat[entry.start_idx : entry.end_idx]
            views[entry.name] = raw.view(entry.dtype).view(entry.shape)
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"serialized_named_tensors is no bucket of shared memory: {error}") from error
    return views


class _Unpickler(pickle.Unpickler):
    """Knows what ``_Pickler`` writes, and maps memory instead of calling what it is told to."""

    _NAMES: ClassVar = {
        ("functools", "partial"): functools.partial,
        ("types", "SimpleNamespace"): SimpleNamespace,
        ("torch", "Size"): torch.Size,
        ("torch", "Tensor"): Tensor,
        ("torch.storage", "TypedStorage"): torch.storage.TypedStorage,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "from_file"):
            return _map_memory
        if (module, name) == ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"):
            return _rebuild_cuda_tensor
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in self._NAMES:
            return self._NAMES[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _map_memory(path: str, *, shared: bool, size: int, dtype: torch.dtype) -> Tensor:
    """Anonymous shared memory of another process, for reading."""
    if not re.fullmatch(r"/proc/\d+/fd/\d+", path) or not os.readlink(path).startswith("/memfd:areal-bucket"):
        raise ValueError(f"{path} is no bucket's memory")
    return torch.from_file(path, shared=False, size=size, dtype=torch.uint8)


def _rebuild_cuda_tensor(*arguments: Any) -> Tensor:
    device = arguments[_DEVICE]
    if isinstance(device, str):
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        if device not in uuids:
            raise ValueError(f"the weights lie on GPU {device}, which this server does not see")
        device = uuids.index(device)
    here = (*arguments[:_DEVICE], device, *arguments[_DEVICE + 1 :])
    return reductions.rebuild_cuda_tensor(*here)
