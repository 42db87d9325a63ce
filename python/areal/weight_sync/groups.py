"""A process group of its own for the trainer's rank 0 and the ranks of one rollout server.

The groups are made from torch's parts, not by ``init_process_group``: a group that fails is dropped here and touches neither the
trainer's own group nor another server's. The keys in the store are those that SGLang looks for (``init_custom_process_group`` in its
``srt/utils/common.py``): ``<name>``, ``<name>/`` and the device, one inside of the other.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

_POLL_SECONDS = 0.0005
_NCCL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Read by the constructor of a group of NCCL (ErrorHandlingMode in torch's ProcessGroupNCCL.hpp)."""


class Rendezvous:
    """A store on one address of this machine, where groups meet; nobody can connect through another interface."""

    def __init__(self, address: str) -> None:
        self.address = address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as bound:
            bound.bind((address, 0))
            bound.listen(128)
            self.port: int = bound.getsockname()[1]
            # The store owns the descriptor from here on; left to itself it would listen on every interface.
            self.store = TCPStore(address, self.port, is_master=True, wait_for_workers=False, master_listen_fd=bound.detach())


def connect_store(host: str, port: int, timeout: float) -> Store:
    """The receiver's way to the sender's store."""
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))


class UpdateGroup:
    """Rank 0 sends, the others receive. The constructor returns when all are connected (gloo) or at once (NCCL)."""

    def __init__(self, store: Store, name: str, rank: int, world_size: int, device: torch.device, address: str, timeout: float) -> None:
        """``address``: of this machine, towards the others (gloo). An exception says that somebody did not come in time."""
        self._device = device
        nested = PrefixStore(f"{device.type}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
        limit = timedelta(seconds=timeout)
        self._backend: Any
        if device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = limit
            # NCCL's watchdog would end this process with the first server that fails; 2: it only aborts that server's group.
            before = os.environ.get(_NCCL_ERRORS)
            os.environ[_NCCL_ERRORS] = "2"
            try:
                self._backend = ProcessGroupNCCL(nested, rank, world_size, options)
            finally:
                os.environ.pop(_NCCL_ERRORS)
                if before is not None:
                    os.environ[_NCCL_ERRORS] = before
        else:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = limit
            options._devices = [ProcessGroupGloo.create_device(hostname=address)]
            self._backend = ProcessGroupGloo(nested, rank, world_size, options)

    def broadcast(self, tensors: Iterable[Tensor], timeout: float) -> Transfer:
        """Starts sending ``tensors`` (rank 0) or receiving into them, one after the other."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        self._backend.set_timeout(timedelta(seconds=timeout))
        return Transfer([self._backend.broadcast(tensor, 0) for tensor in tensors], self._device.type == "cuda")

    def abort(self) -> None:
        """Ends transfers under way as far as the backend can; the group is of no use afterwards."""
        self._backend.abort()


class Transfer:
    """Broadcasts under way."""

    def __init__(self, works: list[Any], on_gpu: bool) -> None:
        self._works = works[::-1]  # what has not ended yet, the first one last
        self._on_gpu = on_gpu

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within ``seconds``; may be called again if not. ``RuntimeError`` if one failed."""
        deadline = time.monotonic() + seconds
        while self._works:
            if not self._has_ended(self._works[-1], max(deadline - time.monotonic(), _POLL_SECONDS)):
                return False
            self._works.pop()
        return True

    def _has_ended(self, work: Any, seconds: float) -> bool:
        if not self._on_gpu:
            try:
                work.wait(timedelta(seconds=seconds))
            except RuntimeError:
                if not work.is_completed():
                    return False
                work.wait()  # what was raised may be the time limit of a wait that the end came right after
            return True
        # NCCL's wait only makes the stream wait; the host must know, because it hands the memory on.
        deadline = time.monotonic() + seconds
        while not work.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        work.wait()
        return True
