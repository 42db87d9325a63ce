"""Whether a rollout server holds, after an update, what the trainer sent.

Three kinds of proof, the best that a server allows:

- ``hash``: the bits of every tensor. An embedded engine tells the hash of its parameters by itself. SGLang is asked through
  ``report_hash`` (inference/sglang_plugin/), where the server was started with it in ``--custom-weight-loader``; each tensor-parallel rank
  answers with the parts that it holds, over a connection to this process that knows the question's nonce.
- ``samples``: the first rows of some small tensors, from SGLang's ``/get_weights_by_name``, for the models that have it (Llama's family).
- ``none``: nothing can be compared; what remains is the comparison of log-probs (drift.py).

The manifest, [[name, shape, dtype], ...], is of what goes over the wire: names of the Hugging Face checkpoint.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import numpy as np
import torch

from areal.inference.wire import HTTPStatusError, Wire, WireError
from areal.ops.weights_hash import tensor_key
from areal.weight_sync.addresses import local_address

LOADER = "areal_sglang_weights.report_hash"
"""What a server of SGLang must have in ``--custom-weight-loader``."""

Manifest = Sequence[tuple[str, Sequence[int], str]]
"""Name, shape and dtype (``float32``) of every tensor that was sent."""

TensorHashes = Callable[[], Awaitable[Mapping[str, int]]]
"""Gives the hash of each tensor as it was sent (``weights_hash`` of it alone); only called after a mismatch."""

Samples = Callable[[], Awaitable[Mapping[str, np.ndarray]]]
"""Gives the first rows of some tensors as they were sent, in float32."""

_MASK = 2**64 - 1
_ANSWER_LIMIT = 2**28
"""Bytes of one rank's answer: 100 a tensor."""
_ANSWERS_ON_THEIR_WAY = 10.0
"""Seconds between the end of the question and the last answer."""
_LISTED = 4
"""Names in a message."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found out about one server."""

    kind: Literal["hash", "samples", "none"]
    ok: bool
    """False: it holds something else, or did not answer. True with ``none``: nothing was compared, ``detail`` says why."""
    detail: str = ""
    """One sentence, empty where all is well."""
    unverified: tuple[str, ...] = ()
    """Tensors that could not be compared although others were, and parameters of the server that nothing fills."""


@dataclass(slots=True)
class HeldWeights:
    """What the ranks of one server hold together."""

    hashes: dict[str, int] = field(default_factory=dict)
    """Of the tensors that are all there, as ``weights_hash`` gives it for one alone."""
    unverified: dict[str, str] = field(default_factory=dict)
    """Why there is no hash, by name."""
    disagreeing: list[str] = field(default_factory=list)
    """Tensors of which two copies differ: on two ranks, or twice on one."""
    unfilled: list[str] = field(default_factory=list)
    """The server's own parameters into which nothing that was sent goes."""


async def verify_server(
    url: str,
    n_ranks: int,
    manifest: Manifest,
    expected_hash: int,
    timeout: float,
    *,
    version: int | None = None,
    tensor_hashes: TensorHashes | None = None,
    samples: Samples | None = None,
) -> Verification:
    """Compares what the server at ``url`` holds with ``expected_hash`` (``weights_hash`` of everything sent), within ``timeout`` seconds.

    The server must not be generating: SGLang lets the question wait until running requests have ended, unless it is paused.
    ``samples`` is only called for a server of SGLang that was not started with our loader.
    """
    who = f"server {url}" + (f" at version {version}" if version is not None else "")
    wire = Wire(url)
    try:
        async with asyncio.timeout(timeout):
            info = await wire.call("GET", "/model_info", timeout=None)
            if isinstance(info, dict) and info.get("engine") == "areal embedded":
                stats = await wire.call("GET", "/engine_stats", timeout=None)
                return _compare_totals(who, int(stats["hash"], 16), expected_hash)
            server = await wire.call("GET", "/server_info", timeout=None)
            if LOADER not in (server.get("custom_weight_loader") or ()):
                expected = await samples() if samples is not None else {}
                return await _compare_samples(wire, f"{who}, which was not started with --custom-weight-loader {LOADER},", expected)
            answers = await _ask(wire, server.get("tp_size") or n_ranks, server.get("pp_size") or 1, manifest)
    except (WireError, HTTPStatusError, TimeoutError) as error:
        reason = str(error) or f"no answer within {timeout:g} s (weight_sync.timeout)"
        return Verification("none", False, f"{who} did not say what weights it holds: {reason}")
    finally:
        wire.close()
        await wire.wait_closed()
    if isinstance(answers, str):
        return Verification("none", True, f"{who} cannot be verified: {answers}")
    # The trainer, which is asked for its side of a difference, has deadlines of its own.
    return await _compare(who, combine(manifest, answers), manifest, expected_hash, tensor_hashes)


class AnswerListener:
    """Takes the answers of ``report_hash`` on the address of this machine that faces the server; others' connections are ignored."""

    def __init__(self, url: str, n_answers: int) -> None:
        self.answers: dict[int, dict[str, Any]] = {}
        """By rank."""
        self.nonce = secrets.token_hex(16)
        address = urlsplit(url)
        self.host = local_address(address.hostname or "", address.port or 80)
        self.port = 0
        self._n_answers = n_answers
        self._complete = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._take, self.host, 0, limit=_ANSWER_LIMIT)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()

    async def wait(self, timeout: float) -> bool:
        """Whether all answers have come within ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._complete.wait()
        except TimeoutError:
            return False
        return True

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = json.loads(await reader.readline())
            if isinstance(answer, dict) and secrets.compare_digest(str(answer.get("nonce")).encode(), self.nonce.encode()):
                self.answers[int(answer["rank"])] = answer
        except (ValueError, KeyError, TypeError, ConnectionError):
            pass  # not an answer to this question: somebody else's connection
        finally:
            writer.close()
        if len(self.answers) >= self._n_answers:
            self._complete.set()


async def _ask(wire: Wire, n_ranks: int, n_stages: int, manifest: Manifest) -> list[dict[str, Any]] | str:
    """The answers of all ranks, or why there are none."""
    async with AnswerListener(wire.url, n_ranks * n_stages) as listener:
        rows = [[name, list(shape), dtype] for name, shape, dtype in manifest]
        question = {"nonce": listener.nonce, "host": listener.host, "port": listener.port, "manifest": rows}
        body = {
            "load_format": LOADER,
            "serialized_named_tensors": [_serialized(question)] * n_ranks,
            "flush_cache": False,
            "disable_draft_model": True,
        }
        await wire.call("POST", "/update_weights_from_tensor", body, timeout=None)
        # Each rank answers here before it answers there; what is missing now is still on its way, or could not come.
        if not await listener.wait(_ANSWERS_ON_THEIR_WAY):
            came, all_of_them = len(listener.answers), n_ranks * n_stages
            return f"{came} of {all_of_them} ranks could send their answer to {listener.host}:{listener.port} (see the server's log)"
    for rank, answer in sorted(listener.answers.items()):
        if "error" in answer:
            return f"rank {rank} could not hash its weights: {answer['error']}"
    return [listener.answers[rank] for rank in sorted(listener.answers)]


def _serialized(question: Mapping[str, Any]) -> str:
    """The question in the form of SGLang's named tensors. Plain pickle, not multiprocessing's: the bytes themselves, no shared memory."""
    data = torch.frombuffer(bytearray(json.dumps(question).encode()), dtype=torch.uint8)
    return base64.b64encode(pickle.dumps([("question", data)])).decode()


async def _compare_samples(wire: Wire, who: str, samples: Mapping[str, np.ndarray]) -> Verification:
    """First rows of tensors, by SGLang's own endpoint. It gives float32, in which every bfloat16 and float16 has its place."""
    for name, sent in samples.items():
        try:
            rows = await wire.call("POST", "/get_weights_by_name", {"name": name, "truncate_size": len(sent)}, timeout=None)
        except HTTPStatusError:
            return Verification("none", True, f"{who} cannot be verified: its model has no /get_weights_by_name")
        if not np.array_equal(np.asarray(rows, dtype=np.float32), sent):
            return Verification("samples", False, f"{who} holds other values in the first {len(sent)} rows of '{name}' than were sent")
    if not samples:
        return Verification("none", True, f"{who} cannot be verified: there are no samples to compare")
    return Verification("samples", True, f"{who} was verified by the first rows of {_listed(list(samples))} only")


def combine(manifest: Manifest, answers: Sequence[Mapping[str, Any]]) -> HeldWeights:
    """Adds up the parts that the ranks hold. The same part twice counts once, and must be the same."""
    held = HeldWeights()
    parts: defaultdict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    disagreeing = set()
    for answer in answers:
        for index, region, numel, digest in answer["parts"]:
            if parts[index].setdefault(region, (numel, int(digest, 16)))[1] != int(digest, 16):
                disagreeing.add(index)
        for index, reason in answer["unmapped"].items():
            held.unverified[manifest[int(index)][0]] = f"{reason} (rank {answer['rank']})"
        held.unfilled += [name for name in answer["unfilled"] if name not in held.unfilled]
    for index, (name, shape, dtype) in enumerate(manifest):
        if index in disagreeing:
            held.disagreeing.append(name)
        elif name not in held.unverified:
            found = sum(numel for numel, _ in parts[index].values())
            numel = torch.Size(shape).numel()
            if found != numel:
                held.unverified[name] = f"the server has {found} of its {numel} elements"
            else:
                key = tensor_key(name, shape, getattr(torch, dtype))
                held.hashes[name] = (_mix(key) + sum(digest for _, digest in parts[index].values())) & _MASK
    return held


async def _compare(who: str, held: HeldWeights, manifest: Manifest, expected_hash: int, tensor_hashes: TensorHashes | None) -> Verification:
    if held.disagreeing:
        return Verification("hash", False, f"{who} holds two different copies of {_listed(held.disagreeing)}", tuple(held.unverified))
    total = sum(held.hashes.values()) & _MASK
    gaps = _gaps(held)
    if not held.unverified and (total == expected_hash or tensor_hashes is None):
        found = _compare_totals(who, total, expected_hash)
        return Verification("hash", True, f"{who}: {gaps}", tuple(held.unfilled)) if found.ok and gaps else found
    if tensor_hashes is None:
        return Verification("none", True, f"{who}: {gaps}", (*held.unverified, *held.unfilled))
    sent = await tensor_hashes()
    wrong = [name for name, _, _ in manifest if name in held.hashes and held.hashes[name] != sent.get(name)]
    if wrong:
        name = wrong[0]
        detail = (
            f"{who} holds weights with hash {total:016x}, but {expected_hash:016x} was sent; {len(wrong)} of {len(manifest)} tensors differ: "
            f"{_listed(wrong)} ('{name}': {held.hashes[name]:016x}, sent {sent.get(name, 0):016x})"
        )
        return Verification("hash", False, detail, tuple(held.unverified))
    if not held.unverified:  # each tensor is right and the whole is not: the two sides speak of different manifests
        return _compare_totals(who, total, expected_hash)
    return Verification("hash", True, f"{who}: {gaps}; the others are right", (*held.unverified, *held.unfilled))


def _gaps(held: HeldWeights) -> str:
    """What could not be compared, and why."""
    if held.unverified:
        names = list(held.unverified)
        return f"{_listed(names)} cannot be verified ('{names[0]}': {held.unverified[names[0]]})"
    if held.unfilled:
        return f"the server's own parameters {_listed(held.unfilled)} are not filled by anything that was sent and stay as they were loaded"
    return ""


def _compare_totals(who: str, held: int, expected: int) -> Verification:
    if held == expected:
        return Verification("hash", True)
    return Verification("hash", False, f"{who} holds weights with hash {held:016x}, but {expected:016x} was sent")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:_LISTED]) + more


def _mix(word: int) -> int:
    """The finaliser of splitmix64, as in ``ops.weights_hash``."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)
