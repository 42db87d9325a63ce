"""Weights by broadcast: NCCL between GPUs, gloo on the CPU. Both ends.

The sender has a process group with each server (``groups.py``) and a thread for each: a server that dies, refuses or hangs fails alone,
its group is thrown away, and the next update connects anew. A bucket is gathered once and read by all threads; its memory is free when
every server has it or has failed. A server that hangs is given up when it alone has kept the sender waiting for ``timeout`` seconds, so
it can hold up the others that long and no longer.

While a server loads bucket k, the call for bucket k + 1 is already on its way; it waits there behind the first, so the order is kept.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from areal.weight_sync.addresses import local_address
from areal.weight_sync.calls import CallFailed, Task, post
from areal.weight_sync.groups import Rendezvous, Transfer, UpdateGroup, connect_store
from areal.weight_sync.stream import BucketPlan, Outcome, Target

_SLICE_SECONDS = 0.02
"""How often a transfer under way looks whether its call has failed."""
_PROBE_SECONDS = 0.003
"""In which a group of an earlier update shows that the server behind it has gone (gloo)."""
_GRACE_SECONDS = 2.0
"""A thread ends by its own deadline; one that hangs inside of the backend is left behind this much later."""
_WORDS_SECONDS = 1.0
"""For a server to say why its end of a transfer broke."""


class _Failed(RuntimeError):
    """Why a server gets no more of this update: half a sentence."""


class _Connection:
    """The group with one server; it lasts over updates."""

    def __init__(self, rendezvous: Rendezvous, target: Target, device: torch.device, timeout: float) -> None:
        """``CallFailed`` or ``RuntimeError`` if the server does not join within ``timeout`` seconds."""
        self.name = f"areal-{os.getpid()}-{secrets.token_hex(6)}"  # an attempt that failed may have left its name in use
        deadline = time.monotonic() + timeout
        body = {
            "master_address": rendezvous.address,
            "master_port": rendezvous.port,
            "rank_offset": 1,
            "world_size": 1 + target.n_ranks,
            "group_name": self.name,
            "backend": "nccl" if device.type == "cuda" else "gloo",
        }
        call = Task(self.name, lambda: post(target.url, "/init_weights_update_group", body, timeout))
        joining = Task(
            self.name,
            lambda: UpdateGroup(rendezvous.store, self.name, 0, 1 + target.n_ranks, device, rendezvous.address, timeout),
        )
        while not (joining.ended(_SLICE_SECONDS) and call.ended(_SLICE_SECONDS)):
            call.ended()  # a refusal is known at once, the group would wait for its timeout
            if time.monotonic() > deadline:
                raise _Failed(f"it did not join the process group within {timeout:.1f} s")
        self.group = joining.result()


class _Peer:
    """One server in one update, and the thread that takes it through: connect, bucket after bucket, the last answer."""

    def __init__(self, sender: BroadcastSender, target: Target, connection: _Connection | None) -> None:
        self.target = target
        self.error: str | None = None
        self.n_sent = 0
        """Buckets whose memory is not needed any more."""
        self.has_ended = False
        self._sender = sender
        self._connection = connection
        self._queue: deque[tuple[BucketPlan, Tensor]] = deque()
        self._answers: deque[tuple[BucketPlan, Task[dict[str, Any]]]] = deque()
        self._bucket: BucketPlan | None = None
        self._seconds_used = 0.0
        self._busy_since: float | None = None
        threading.Thread(target=self._run, name=f"weights to {target.url}", daemon=True).start()

    # -- the sender's thread, which holds the lock ---------------------------------------------------------------------------------------

    def put(self, bucket: BucketPlan, data: Tensor) -> None:
        self._queue.append((bucket, data))

    def seconds_left(self) -> float:
        """What is left of the time that this server may keep the sender waiting."""
        busy = 0.0 if self._busy_since is None else time.monotonic() - self._busy_since
        return self._sender.timeout - self._seconds_used - busy

    def fail(self, reason: str) -> None:
        """Only the first reason counts."""
        if self.error is None:
            where = "while it was being connected"
            if self._bucket is not None:
                first = self._bucket.tensors[0].name
                where = f"at bucket {self._bucket.index + 1} of {len(self._sender.buckets)} (from parameter '{first}' on)"
            self.error = f"{self.target.url} did not get weights {self._sender.version} {where}: {reason}"

    # -- its own thread --------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except (RuntimeError, OSError) as error:  # _Failed, CallFailed, and what torch raises when a peer is gone
            with self._sender.changed:
                self.fail(str(error))
            self._hang_up()
        with self._sender.changed:
            self.has_ended = True
            self._sender.changed.notify_all()

    def _work(self) -> None:
        with self._busy():
            is_proven = self._connection is None
            if self._connection is None:
                self._connection = self._sender.connect(self.target, self.seconds_left())
        for _ in self._sender.buckets:
            bucket, data = self._next()
            with self._busy():
                self._bucket = bucket
                self._send(bucket, data, is_proven)
                is_proven = True
            with self._sender.changed:
                self.n_sent += 1
                self._sender.changed.notify_all()
        with self._busy():
            while self._answers:
                self._check_answers(_SLICE_SECONDS)
                self._check_time()

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """What is done inside is done on this server's time."""
        with self._sender.changed:
            self._busy_since = time.monotonic()
        try:
            yield
        finally:
            with self._sender.changed:
                self._seconds_used += time.monotonic() - self._busy_since
                self._busy_since = None

    def _next(self) -> tuple[BucketPlan, Tensor]:
        with self._sender.changed:
            self._sender.changed.wait_for(lambda: self._queue or self.error or self._sender.is_closed)
            if self.error is not None or not self._queue:
                raise _Failed("the update was given up")
            return self._queue.popleft()

    def _send(self, bucket: BucketPlan, data: Tensor, is_proven: bool) -> None:
        starting = self._start(bucket, data)
        if not is_proven:
            # SGLang dies of a call that names a group it does not know, as after a restart at the same address.
            try:
                if starting.ended(_GRACE_SECONDS):  # at once: this group has been connected before
                    starting.result().wait(_PROBE_SECONDS)
            except RuntimeError:
                self._connection = self._sender.connect(self.target, self.seconds_left())
                starting = self._start(bucket, data)
        assert self._connection is not None
        body = self._sender.call_for(bucket) | {"group_name": self._connection.name}
        url, seconds = self.target.url, self.seconds_left() + _GRACE_SECONDS
        call = Task(f"bucket {bucket.index}", lambda: post(url, "/update_weights_from_distributed", body, seconds))
        self._answers.append((bucket, call))
        try:
            while not (starting.ended(_SLICE_SECONDS) and starting.result().wait(_SLICE_SECONDS)):
                self._check_answers(0.0)
                self._check_time()
        except CallFailed:
            raise
        except RuntimeError as error:
            self._check_answers(_WORDS_SECONDS)
            raise _Failed(f"the transfer broke ({_first_sentence(error)})") from error

    def _start(self, bucket: BucketPlan, data: Tensor) -> Task[Transfer]:
        """In a thread: the first broadcast of NCCL connects, and returns only when the server, which must be called for that, does so too."""
        assert self._connection is not None
        tensors = [data] if self._sender.is_flat else [spec.view(data) for spec in bucket.tensors]
        group, seconds = self._connection.group, self.seconds_left() + _GRACE_SECONDS
        return Task(f"send bucket {bucket.index}", lambda: group.broadcast(tensors, seconds))

    def _check_answers(self, timeout: float) -> None:
        """Forgets the calls that were answered; ``CallFailed`` for one that was not answered well."""
        while self._answers:
            bucket, call = self._answers[0]
            try:
                if not call.ended(timeout):
                    return
            except CallFailed:
                self._bucket = bucket
                raise
            self._answers.popleft()

    def _check_time(self) -> None:
        if self.seconds_left() <= 0:
            raise _Failed(f"it kept the trainer waiting for {self._sender.timeout:g} s (weight_sync.timeout)")

    def _hang_up(self) -> None:
        """In this thread, since the end of a group waits for transfers that hang."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._sender.forget(self.target.url, connection)
            connection.group.abort()


def _first_sentence(error: Exception) -> str:
    """Without the places in torch's sources."""
    text = str(error).splitlines()[0]
    return text.partition("] ")[2].partition(". ")[0] or text if text.startswith("[") else text


class BroadcastSender:
    """Rank 0's end (``stream.Sender``).

    Args:
        device: the trainer's.
        timeout: seconds that a server may keep the trainer waiting in one update.
        flush_cache: servers forget their prefix caches with the last bucket. Must be false where requests wait inside of a server
            (``rollout.update_mode: retract``): SGLang dies of it.
        is_flat: a bucket is one transfer, else each of its tensors is one. None = on GPUs, where it saves launches; SGLang builds
            a flat bucket by copying empty tensors together first, and on a CPU that is one copy of the weights more.
    """

    def __init__(self, device: torch.device | str, *, timeout: float, flush_cache: bool = True, is_flat: bool | None = None) -> None:
        self.timeout = timeout
        self.version = 0
        self.buckets: Sequence[BucketPlan] = ()
        self.changed = threading.Condition()
        """Guards everything that threads share, and is notified when it changes."""
        self.is_closed = False
        self._device = torch.device(device)
        self.is_flat = self._device.type == "cuda" if is_flat is None else is_flat
        self._flush_cache = flush_cache
        self._memory: list[Tensor] = []
        self._peers: list[_Peer] = []
        self._connections: dict[str, _Connection] = {}
        self._rendezvous: dict[str, Rendezvous] = {}

    # -- what stream_weights calls ---------------------------------------------------------------------------------------------------------

    def begin(self, version: int, buckets: Sequence[BucketPlan], targets: Sequence[Target]) -> None:
        """Servers that are new are being connected when it returns.

        Groups with servers that are no targets any more end, except where there is one target: that may be a server that joins, and
        says nothing of the others.
        """
        self.version, self.buckets = version, buckets
        largest = max(bucket.nbytes for bucket in buckets)
        if not self._memory or len(self._memory[0]) < largest:
            self._memory = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(2)]
        with self.changed:
            gone = set(self._connections) - {target.url for target in targets} if len(targets) > 1 else set()
            dropped = [self._connections.pop(url) for url in gone]
            self._peers = [_Peer(self, target, self._connections.get(target.url)) for target in targets]
        del dropped

    def buffer(self, bucket: BucketPlan) -> Tensor:
        self._wait(lambda peer: peer.n_sent > bucket.index - 2)
        return self._memory[bucket.index % 2][: bucket.nbytes]

    def send(self, bucket: BucketPlan, data: Tensor) -> None:
        with self.changed:
            for peer in self._peers:
                peer.put(bucket, data)
            self.changed.notify_all()

    def finish(self, digest: int | None = None) -> list[Outcome]:
        self._wait(lambda peer: peer.has_ended)
        return [Outcome(peer.target.url, peer.error) for peer in self._peers]

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
            self._connections.clear()
        self._memory = []

    def _wait(self, is_ready: Any) -> None:
        """Until every server is ready or has failed."""
        with self.changed:
            while waiting := [peer for peer in self._peers if peer.error is None and not is_ready(peer)]:
                for peer in waiting:
                    if peer.seconds_left() < -_GRACE_SECONDS:
                        peer.fail(f"it kept the trainer waiting for {self.timeout:g} s (weight_sync.timeout)")
                        self._connections.pop(peer.target.url, None)
                self.changed.notify_all()
                self.changed.wait(0.1)

    # -- what the threads of the servers call ------------------------------------------------------------------------------------------------

    def connect(self, target: Target, timeout: float) -> _Connection:
        server = urlsplit(target.url)
        address = local_address(server.hostname or "", server.port or 80)
        with self.changed:
            if address not in self._rendezvous:
                self._rendezvous[address] = Rendezvous(address)
            rendezvous = self._rendezvous[address]
        connection = _Connection(rendezvous, target, self._device, timeout)
        with self.changed:
            self._connections[target.url] = connection
        return connection

    def forget(self, url: str, connection: _Connection) -> None:
        with self.changed:
            if self._connections.get(url) is connection:
                del self._connections[url]

    def call_for(self, bucket: BucketPlan) -> dict[str, Any]:
        is_last = bucket is self.buckets[-1]
        body: dict[str, Any] = {
            "names": [spec.name for spec in bucket.tensors],
            "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in bucket.tensors],
            "shapes": [list(spec.shape) for spec in bucket.tensors],
            "load_format": "flattened_bucket" if self.is_flat else None,
            "flush_cache": is_last and self._flush_cache,
            "abort_all_requests": False,
        }
        return body | {"weight_version": str(self.version)} if is_last else body


class BroadcastReceiver:
    """A server's end: the groups it has joined, and memory for two buckets. Methods block; call them in a thread, one at a time."""

    N_BUCKETS = 2
    """What one call of ``receive`` returned is overwritten by the one after the next."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._groups: dict[str, UpdateGroup] = {}
        self._memory = deque(torch.empty(0, dtype=torch.uint8, device=self._device) for _ in range(self.N_BUCKETS))

    def join(self, name: str, address: str, port: int, rank: int, world_size: int, timeout: float) -> None:
        """Meets the others at the sender's store. ``RuntimeError`` if they do not come within ``timeout`` seconds."""
        store = connect_store(address, port, timeout)
        self._groups[name] = UpdateGroup(store, name, rank, world_size, self._device, local_address(address, port), timeout)

    def receive(self, name: str, bucket: BucketPlan, is_flat: bool, timeout: float) -> dict[str, Tensor]:
        """The bucket's tensors. ``RuntimeError`` if the sender is gone; the group ends then.

        ``is_flat``: they come as one piece, not one by one.
        """
        self._memory.rotate()
        if len(self._memory[0]) < bucket.nbytes:
            self._memory[0] = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device)
        data = self._memory[0][: bucket.nbytes]
        tensors = {spec.name: spec.view(data) for spec in bucket.tensors}
        try:
            if not self._groups[name].broadcast([data] if is_flat else tensors.values(), timeout).wait(timeout):
                raise RuntimeError(f"the sender did not send within {timeout:.1f} s")
        except RuntimeError:
            self.leave(name)
            raise
        return tensors

    def has_joined(self, name: str) -> bool:
        return name in self._groups

    def leave(self, name: str) -> None:
        if (group := self._groups.pop(name, None)) is not None:
            group.abort()
