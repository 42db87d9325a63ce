"""A process that scores answers: frames in, frames out, one score at a time.

Kept light on purpose (no numpy, no torch): it starts in a blink and is killed without a thought when a score hangs.
A frame is a little-endian uint32 length and what is in it: to the worker a pickle, from it an answer of plain numbers and text, so that
what a scored program does to this process cannot reach the parent. The parent's first frame tells where modules are found; the worker
answers READY, then once for every (function, args, kwargs). The byte before such a pickle says with ASKS_LOADED that an answer more,
LOADED, is wanted once the pickle is read: reading the first one imports the function's module, which may take longer than a score; and
with WANTS_JSON that the value is no score, but whatever JSON can say.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import socket
import struct
import sys
import time
from typing import Any, BinaryIO

FRAME_HEADER = struct.Struct("<I")
MAX_REQUEST = 2**32 - 2
MAX_ANSWER = 1 << 16
_ANSWER = struct.Struct("<Bdd")  # status, score, seconds; then text, UTF-8

OK, RAISED, BAD_VALUE, LOADED, READY = 0, 1, 2, 3, 4
ASKS_LOADED, WANTS_JSON = 1, 2
MAX_JSON = 60_000


class BadScore(ValueError):
    """A reward function returned something that is not a finite number."""


def check_score(value: object) -> float:
    """The score as a float.

    Raises:
        BadScore: not a number (strings included), NaN or infinite.
    """
    if isinstance(value, (str, bytes)) or not hasattr(type(value), "__float__"):
        raise BadScore(f"a reward must be a finite number, got {type(value).__name__} {str(value)[:80]!r}")
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:  # arrays of several elements
        raise BadScore(f"a reward must be one finite number, got {type(value).__name__}: {error}") from error
    if not math.isfinite(score):
        raise BadScore(f"a reward must be a finite number, got {score}")
    return score


def as_json(value: object) -> str:
    """What JSON does not know is there as its text.

    Raises:
        BadScore: longer than MAX_JSON bytes.
    """
    text = json.dumps(value, default=str)
    if len(text) > MAX_JSON:
        raise BadScore(f"a function's value must have at most {MAX_JSON} bytes as JSON, got {len(text)}")
    return text


def encode_frame(payload: bytes) -> bytes:
    return FRAME_HEADER.pack(len(payload)) + payload


def encode_answer(status: int, value: float | str = 0.0, seconds: float = 0.0) -> bytes:
    """A frame; ``value`` is the score, a value as JSON, or what went wrong."""
    text = value.encode(errors="replace")[: MAX_ANSWER - _ANSWER.size] if isinstance(value, str) else b""
    return encode_frame(_ANSWER.pack(status, 0.0 if isinstance(value, str) else value, seconds) + text)


def decode_answer(payload: bytes) -> tuple[int, float, str, float]:
    """Status, score, text, seconds.

    Raises:
        ValueError: it is no answer.
    """
    if len(payload) < _ANSWER.size or payload[0] > READY:
        raise ValueError("not an answer of a reward worker")
    status, score, seconds = _ANSWER.unpack_from(payload)
    return status, score, payload[_ANSWER.size :].decode(errors="replace"), seconds


def describe_error(error: BaseException) -> str:
    """One line: type, text, and where in the user's file it happened."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
    return f"{type(error).__name__}: {str(error)[:300]}{where}"


def _score(connection: socket.socket, payload: bytes) -> tuple[int, float | str]:
    try:
        function, args, kwargs = pickle.loads(memoryview(payload)[1:])
        if payload[0] & ASKS_LOADED:
            connection.sendall(encode_answer(LOADED))
        value = function(*args, **kwargs)
        return OK, as_json(value) if payload[0] & WANTS_JSON else check_score(value)
    except BadScore as error:
        return BAD_VALUE, str(error)
    except BaseException as error:  # boundary to the user's code: whatever it raises, sys.exit included, is one failed score
        return RAISED, describe_error(error)


def _read_frame(stream: BinaryIO) -> bytes | None:
    header = stream.read(FRAME_HEADER.size)
    if len(header) < FRAME_HEADER.size:
        return None
    return stream.read(FRAME_HEADER.unpack(header)[0])


def _prepare(preparation: dict[str, Any]) -> None:
    """Find the parent's modules, its main script included (functions defined there pickle as __main__.name)."""
    import multiprocessing.spawn

    from areal.launcher.local import IMPORTING_MAIN_VARIABLE

    os.environ[IMPORTING_MAIN_VARIABLE] = "1"
    multiprocessing.spawn.prepare(preparation)
    del os.environ[IMPORTING_MAIN_VARIABLE]


def main(fd: int) -> None:
    from areal.launcher.local import die_with_parent

    die_with_parent()
    connection = socket.socket(fileno=fd)
    stream = connection.makefile("rb")
    first = _read_frame(stream)
    if first is None:
        return
    _prepare(pickle.loads(first))
    connection.sendall(encode_answer(READY))
    while (payload := _read_frame(stream)) is not None:
        begin = time.perf_counter()
        status, value = _score(connection, payload)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a full disk, or closed: the score counts all the same
            sys.stdout.flush()
        try:
            connection.sendall(encode_answer(status, value, time.perf_counter() - begin))
        except (BrokenPipeError, ConnectionResetError):  # the controller is gone
            return
