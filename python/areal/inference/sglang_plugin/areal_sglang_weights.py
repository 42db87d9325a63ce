"""What a server of SGLang holds, hashed by the names of the checkpoint, for areal's check after a weight update.

``report_hash`` is named in ``--custom-weight-loader`` and called by POST /update_weights_from_tensor in every scheduler process. It loads
nothing: its "weights" are a question (JSON), and the answer goes over a TCP connection to whoever asked. An exception here would end the
server, so every error is an answer, and what cannot even be answered is only logged.

Runs inside the server's interpreter: torch, numpy and the standard library only.
"""

from __future__ import annotations

import json
import logging
import socket
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from areal_load_trace import Trace, Wanted, trace_load
from areal_words_hash import NotWholeWords, numel_of, part_hash, tensor_key
from torch import Tensor, nn

_logger = logging.getLogger(__name__)
_CONNECT_TIMEOUT = 10.0
_traces: weakref.WeakKeyDictionary[nn.Module, tuple[object, Trace]] = weakref.WeakKeyDictionary()


def report_hash(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Answers the question in the one tensor given: uint8, JSON with ``nonce``, ``host``, ``port`` and ``manifest`` [[name, shape, dtype]].

    The answer is one line of JSON: ``nonce``, ``rank``, ``parts`` [[index in the manifest, region, elements, hash of that part]],
    ``unmapped`` {index: why}, ``unfilled`` (parameters that no tensor of the manifest fills), ``seconds``; or ``nonce``, ``rank`` and
    ``error``. ``region`` is the same text for the same elements of the tensor, empty for all of them.
    """
    try:
        question = json.loads(bytes(named_tensors[0][1].cpu().tolist()))
        answer: dict[str, Any] = {"nonce": question["nonce"], "rank": _rank()}
        try:
            answer |= _answer(model, question["manifest"])
        except Exception as error:
            _logger.exception("areal: the weights could not be hashed")
            answer["error"] = f"{type(error).__name__}: {error}"[:500]
        with socket.create_connection((question["host"], question["port"]), timeout=_CONNECT_TIMEOUT) as connection:
            connection.sendall(json.dumps(answer).encode() + b"\n")
    except Exception:
        _logger.exception("areal: a question about the weights could not be answered")


def _answer(model: nn.Module, manifest: Sequence[Sequence[Any]]) -> dict[str, Any]:
    start = time.perf_counter()
    wanted = [Wanted(name, tuple(shape), getattr(torch, dtype)) for name, shape, dtype in manifest]
    trace = _trace(model, wanted)
    unmapped = dict(trace.unmapped)
    parts: list[list[Any]] = []
    for held in trace.held:
        tensor = wanted[held.index]
        if held.place.dtype != tensor.dtype:
            unmapped[held.index] = f"the server holds it as {_name(held.place.dtype)}, not {_name(tensor.dtype)}"
            continue
        numel = numel_of(tensor.shape)
        try:
            digest = part_hash(tensor_key(*tensor), numel, held.place, held.offset, held.strides)
        except NotWholeWords as error:
            unmapped[held.index] = str(error)
            continue
        spans = sorted((stride, size) for stride, size in zip(held.strides, held.place.shape, strict=True) if size != 1)
        region = "" if held.place.numel() == numel else json.dumps([held.offset, spans])
        parts.append([held.index, region, held.place.numel(), f"{digest:016x}"])
    return {"parts": parts, "unmapped": unmapped, "unfilled": trace.unfilled, "seconds": time.perf_counter() - start}


def _trace(model: nn.Module, wanted: list[Wanted]) -> Trace:
    """Kept from one question to the next, as long as the manifest and the memory of all parameters stay the same."""
    state = wanted, [(name, p.data_ptr(), p.shape, p.stride(), p.dtype) for name, p in model.named_parameters()]
    known = _traces.get(model)
    if known is None or known[0] != state:
        known = _traces[model] = state, trace_load(model, wanted)
    return known[1]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
