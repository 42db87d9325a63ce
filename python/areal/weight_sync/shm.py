"""Weights through shared memory, on one machine: one publisher, any number of readers.

The segment is a file in /dev/shm: header, manifest (names, shapes, dtypes; of adapters also what they are added to), and two buffers. The publisher always writes the buffer
that is not the newest, so it never waits for a reader, and a reader has the time between two publications to copy. Invariants:

- A buffer's sequence number is odd while it is written. A reader copies into memory of its own, and what it copied counts only if the
  number did not change meanwhile and the copy has the hash that was published. The hash alone would do: torn reads are caught on any
  memory model and without atomics. Only then are parameters touched.
- The publisher holds a file lock as long as it lives, and the kernel drops it even after kill -9: a segment without a lock is stale,
  anybody may remove it (``unlink_stale``), and a reader that waits for it fails at once.
- A segment gets its name when it is complete, so readers see all of it or nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import struct
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from areal.ops.weights_hash import HashedCopy, check_plain, copy_and_hash, tensor_key
from areal.weight_sync.adapter import AdapterInfo

_DIRECTORY = Path("/dev/shm")
_PREFIX = "areal-"
_MAGIC = 0x324D4853_41455241  # "AREASHM2"
_PAGE = 4096
_ALIGN = 64
# The header, in 64-bit words: magic, bytes of a buffer, bytes of the manifest, newest buffer (0 none, else 1 + index), publisher's pid;
# then per buffer, a cache line each: sequence number, version, hash, check of these three.
_BUFFER_BYTES, _MANIFEST_BYTES, _NEWEST, _PID = 1, 2, 3, 4
_SLOTS = (16, 24)
_POLL_SECONDS = 0.0005
_LIVENESS_SECONDS = 0.1
_TAKE_OVER_SECONDS = 1.0
_MAX_MISMATCHES = 3

Manifest = Sequence[tuple[str, Sequence[int], torch.dtype]]


class PublisherGone(ConnectionError):
    """The process that published the weights no longer lives."""


class WeightSyncError(RuntimeError):
    """Weights in shared memory are not what their header says."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes from the start of a buffer
    key: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """This tensor in ``buffer`` (uint8, one whole buffer)."""
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


def _path(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise ValueError(f"'{name}' cannot name a shared memory segment; use letters, digits, '.', '_' and '-'")
    return _DIRECTORY / f"{_PREFIX}{name}"


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _lay_out(manifest: Manifest) -> tuple[list[_Entry], int]:
    entries, offset = [], 0
    for name, shape, dtype in manifest:
        entry = _Entry(name, tuple(shape), dtype, offset, tensor_key(name, shape, dtype))
        entries.append(entry)
        offset = _round_up(offset + entry.nbytes, _ALIGN)
    if len({entry.name for entry in entries}) != len(entries):
        raise ValueError("a weight manifest names a tensor twice")
    return entries, max(_round_up(offset, _PAGE), _PAGE)


def _check(sequence: int, version: int, digest: int) -> int:
    return int.from_bytes(hashlib.blake2b(struct.pack("<3Q", sequence, version, digest), digest_size=8).digest(), "little")


def _check_tensors(side: str, entries: list[_Entry], tensors: Mapping[str, Tensor], *, same_dtype: bool) -> None:
    names = {entry.name for entry in entries}
    for problem, difference in (("lacks", names - set(tensors)), ("has the unknown tensor", set(tensors) - names)):
        if difference:
            raise ValueError(f"{side} {problem} '{min(difference)}'" + (f" and {len(difference) - 1} more" if len(difference) > 1 else ""))
    for entry in entries:
        tensor = tensors[entry.name]
        check_plain(entry.name, tensor)
        if tuple(tensor.shape) != entry.shape or (same_dtype and tensor.dtype != entry.dtype):
            raise ValueError(
                f"{side}: '{entry.name}' is {tensor.dtype} {list(tensor.shape)}, the manifest says {entry.dtype} {list(entry.shape)}"
            )


def _is_stale(descriptor: int, lock: int = fcntl.LOCK_SH) -> bool:
    """Whether nobody holds the publisher's lock; on true, ``lock`` is held by this descriptor."""
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def unlink_stale(name: str | None = None) -> list[str]:
    """Removes the segment ``name``, or all of areal's, where the publisher is dead; returns the names removed.

    Readers that have it open keep their mapping; live publishers' segments and other users' are left alone.
    """
    paths = [_path(name)] if name is not None else sorted(_DIRECTORY.glob(f"{_PREFIX}*"))
    removed = []
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            # Under the exclusive lock nobody else removes it, so the path cannot become another publisher's between the two calls.
            if _is_stale(descriptor, fcntl.LOCK_EX) and _is_at(path, descriptor):
                path.unlink()
                removed.append(path.name.removeprefix(_PREFIX))
        finally:
            os.close(descriptor)
    return removed


def _remove_own(path: Path, descriptor: int, owner: int) -> None:
    """Ends a publisher: its file goes, unless another has the name by now, and its lock."""
    if os.getpid() != owner:
        return  # a forked child that ends is not the end of the publisher
    if _is_at(path, descriptor):
        path.unlink()
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do: the mapping has a duplicate of the descriptor
    os.close(descriptor)


def _link(descriptor: int, path: Path) -> None:
    """Gives an unnamed file its name, which must be free."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Only with a folder descriptor does os.link follow the link in /proc.
        os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _create(path: Path, size: int, header: bytes) -> tuple[int, mmap.mmap]:
    """A locked, complete segment under its name: descriptor and mapping."""
    descriptor = os.open(_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            os.posix_fallocate(descriptor, 0, size)  # now, or a full /dev/shm kills the process at the first write
        except OSError as error:
            free = os.statvfs(_DIRECTORY).f_bavail * os.statvfs(_DIRECTORY).f_frsize
            raise OSError(
                error.errno,
                f"{_DIRECTORY} has {free >> 20} MiB free, two copies of the weights need {size >> 20} MiB; enlarge it (docker: --shm-size)",
            ) from error
        os.pwrite(descriptor, header, 0)
        mapping = mmap.mmap(descriptor, size)
        deadline = time.monotonic() + _TAKE_OVER_SECONDS
        while True:
            try:
                _link(descriptor, path)
                return descriptor, mapping
            except FileExistsError:
                # A reader's look at a dead publisher's lock lasts microseconds and may stand in the way of the removal.
                if not unlink_stale(path.name.removeprefix(_PREFIX)) and time.monotonic() > deadline:
                    raise FileExistsError(f"shared memory {path} belongs to a live publisher; is another run using this name?") from None
                time.sleep(_POLL_SECONDS)
    except BaseException:
        os.close(descriptor)
        raise


class ShmPublisher:
    """The trainer's end: makes the segment ``name`` for the tensors of ``manifest`` (name, shape, dtype), and removes it on close.

    Needs twice the size of the weights in /dev/shm. ``OSError`` when that is not there, ``FileExistsError`` when a live publisher has the
    name. Segments that dead publishers left behind are removed first.
    """

    def __init__(self, name: str, manifest: Manifest, adapter: AdapterInfo | None = None) -> None:
        """``adapter``: the tensors are the factors of adapters."""
        self.name = name
        path = _path(name)
        unlink_stale()
        self._entries, buffer_bytes = _lay_out(manifest)
        rows = [[e.name, e.shape, str(e.dtype).removeprefix("torch.")] for e in self._entries]
        text = json.dumps({"tensors": rows, "adapter": None if adapter is None else adapter.as_dict()}).encode()
        data_start = _round_up(_PAGE + len(text), _PAGE)
        words = struct.pack("<5Q", _MAGIC, buffer_bytes, len(text), 0, os.getpid())
        descriptor, self._mapping = _create(path, data_start + 2 * buffer_bytes, words.ljust(_PAGE, b"\0") + text)
        self._words = memoryview(self._mapping)[:_PAGE].cast("Q")
        self._buffers = [
            torch.frombuffer(self._mapping, dtype=torch.uint8, offset=data_start + i * buffer_bytes, count=buffer_bytes) for i in (0, 1)
        ]
        self._version = 0
        self._finalizer = weakref.finalize(self, _remove_own, path, descriptor, os.getpid())

    def publish(self, tensors: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]], version: int) -> int:
        """Makes ``tensors`` (cast to the manifest's dtypes) the newest weights and returns their hash. Never waits for readers.

        They may come in parts, each of which is copied before the next one is asked for. ``ValueError`` if names or shapes are not the
        manifest's, or ``version`` is lower than the last one; nothing is published then.
        """
        parts = [tensors] if isinstance(tensors, Mapping) else tensors
        if not self._finalizer.alive:
            raise ValueError(f"publisher '{self.name}' is closed")
        if version < self._version:
            raise ValueError(f"publisher '{self.name}' has published version {self._version}; {version} would go back")
        index = 1 if self._words[_NEWEST] == 1 else 0
        slot, buffer = _SLOTS[index], self._buffers[index]
        writing = (self._words[slot] + 1) | 1
        self._words[slot] = writing
        digest = self._copy_parts(parts, buffer)
        self._words[slot + 1], self._words[slot + 2] = version, digest
        self._words[slot + 3] = _check(writing + 1, version, digest)
        self._words[slot] = writing + 1
        self._words[_NEWEST] = index + 1
        self._version = version
        return digest

    def _copy_parts(self, parts: Iterable[Mapping[str, Tensor]], buffer: Tensor) -> int:
        """The hash of what is in ``buffer`` now; it is a sum, so that of all parts is the sum of theirs."""
        entries = {entry.name: entry for entry in self._entries}
        digest = 0
        for tensors in parts:
            here = [entries.pop(name) for name in tensors if name in entries]
            _check_tensors(f"publisher '{self.name}'", here, tensors, same_dtype=False)
            with torch.no_grad():
                digest += copy_and_hash(HashedCopy(e.key, tensors[e.name].detach(), e.view(buffer)) for e in here)
        if entries:
            _check_tensors(f"publisher '{self.name}'", list(entries.values()), {}, same_dtype=False)
        return digest & (2**64 - 1)

    def close(self) -> None:
        """Removes the segment's name; readers that have it open can go on reading. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ShmReader:
    """A rollout server's end. Holds one copy of the weights as staging memory. ``FileNotFoundError`` if nobody publishes ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.torn_reads = 0
        """Copies thrown away because the publisher wrote meanwhile."""
        try:
            self._descriptor = os.open(_path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no shared memory {_path(name)}: its publisher has not started, or has ended") from error
        self._closer = weakref.finalize(self, os.close, self._descriptor)
        mapping = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        self._words = memoryview(mapping)[:_PAGE].cast("Q")
        if self._words[0] != _MAGIC:
            raise WeightSyncError(f"{_path(name)} is no weight segment of this version of areal")
        buffer_bytes, text_bytes = self._words[_BUFFER_BYTES], self._words[_MANIFEST_BYTES]
        text = json.loads(mapping[_PAGE : _PAGE + text_bytes])
        self._entries, _ = _lay_out([(name, shape, getattr(torch, dtype)) for name, shape, dtype in text["tensors"]])
        self.adapter = None if text["adapter"] is None else AdapterInfo(**text["adapter"])
        """What the tensors are, if they are the factors of adapters."""
        data_start = _round_up(_PAGE + text_bytes, _PAGE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # right: it is only read
            self._buffers = [
                torch.frombuffer(mapping, dtype=torch.uint8, offset=data_start + i * buffer_bytes, count=buffer_bytes) for i in (0, 1)
            ]
        self._staging = torch.empty(buffer_bytes, dtype=torch.uint8)

    @property
    def manifest(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor."""
        return [(e.name, e.shape, e.dtype) for e in self._entries]

    def latest_version(self) -> int:
        """The newest complete version, -1 before the first."""
        newest = self._words[_NEWEST]
        return self._words[_SLOTS[newest - 1] + 1] if newest else -1

    def fetch(self, min_version: int, timeout: float) -> tuple[int, int]:
        """Copies the newest weights, at least ``min_version``, into staging memory; returns their version and hash, which the copy has.

        No parameter is touched, so it may run beside generation (the copying releases the GIL). Waits up to ``timeout`` seconds:
        ``TimeoutError``; ``PublisherGone`` if there is nothing to wait for; ``WeightSyncError`` if the bytes never match their hash.
        """
        start = time.monotonic()
        looked = start
        mismatches = 0
        while True:
            snapshot = self._stable_header(min_version)
            if snapshot is not None:
                index, sequence, version, digest = snapshot
                copies = (HashedCopy(e.key, e.view(self._buffers[index]), e.view(self._staging)) for e in self._entries)
                if copy_and_hash(copies) == digest:
                    return version, digest
                self.torn_reads += 1
                mismatches = mismatches + 1 if self._words[_SLOTS[index]] == sequence else 0
                if mismatches == _MAX_MISMATCHES:
                    raise WeightSyncError(f"version {version} in shared memory '{self.name}' does not have its hash {digest:016x}")
            now = time.monotonic()
            if now - start > timeout:
                raise TimeoutError(f"{self._waiting_for(min_version)} for {timeout:.1f} s ({self.torn_reads} torn reads so far)")
            if snapshot is None:
                if now - looked > _LIVENESS_SECONDS:
                    looked = now
                    self._check_publisher(min_version)
                time.sleep(_POLL_SECONDS)

    def apply(self, params: Mapping[str, Tensor]) -> None:
        """Copies what ``fetch`` got into ``params`` (the manifest's names, shapes and dtypes, any device), else ``ValueError``."""
        _check_tensors(f"reader of '{self.name}'", self._entries, params, same_dtype=True)
        with torch.no_grad():
            for entry in self._entries:
                params[entry.name].copy_(entry.view(self._staging))

    def tensors(self) -> dict[str, Tensor]:
        """What ``fetch`` got, by name, in staging memory: good until the next ``fetch``."""
        return {entry.name: entry.view(self._staging) for entry in self._entries}

    def read_into(self, params: Mapping[str, Tensor], min_version: int, timeout: float) -> tuple[int, int]:
        """``fetch`` and ``apply``: version and hash of what ``params`` hold now. On any error they are untouched."""
        _check_tensors(f"reader of '{self.name}'", self._entries, params, same_dtype=True)
        found = self.fetch(min_version, timeout)
        self.apply(params)
        return found

    def close(self) -> None:
        """Lets go of the segment. May be called twice."""
        self._closer()
        self._buffers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stable_header(self, min_version: int) -> tuple[int, int, int, int] | None:
        """Index, sequence, version and hash of the newest buffer, unless there is none, it is too old, or it is being written."""
        newest = self._words[_NEWEST]
        if newest == 0:
            return None
        slot = _SLOTS[newest - 1]
        sequence, version, digest, check = self._words[slot : slot + 4]
        if sequence % 2 or check != _check(sequence, version, digest) or version < min_version:
            return None
        return newest - 1, sequence, version, digest

    def _waiting_for(self, min_version: int) -> str:
        return (
            f"the reader of shared memory '{self.name}' waited on publisher {self._words[_PID]} for version {min_version} "
            f"(newest is {self.latest_version()})"
        )

    def _check_publisher(self, min_version: int) -> None:
        if not _is_stale(self._descriptor):
            return
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        if self._stable_header(min_version) is None:  # not published just before the end either
            raise PublisherGone(f"{self._waiting_for(min_version)}, which has ended")
