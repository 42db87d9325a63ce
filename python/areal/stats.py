"""What a run writes down while it runs: ``metrics.jsonl``, ``timeline.jsonl``, TensorBoard events, and ``summary.json`` at the end.

Every file is complete up to the last step at any moment, so that a run that was killed can still be drawn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import orjson

from areal.config import GRPOConfig

if TYPE_CHECKING:
    from areal.evaluation import Evaluation


class StatsLogger:
    """The files of one run. Calls come from one thread; each is a buffered write, ``step`` flushes."""

    def __init__(self, run_dir: Path, config: GRPOConfig, last_step: int = 0) -> None:
        """``last_step``: of a run that goes on, the last train step that its files have."""
        self.run_dir = run_dir
        self.last_step = last_step
        self._metrics = (run_dir / "metrics.jsonl").open("ab")
        self._warmup = (run_dir / "warmup.jsonl").open("ab")
        self._evaluations = (run_dir / "evaluations.jsonl").open("ab")
        self._timeline = (run_dir / "timeline.jsonl").open("ab")
        self._tensorboard = _EventFile(run_dir / "tensorboard", last_step) if config.stats_logger.tensorboard else None

    def step(self, row: Mapping[str, Any]) -> None:
        """One train step: the flat row of ``metrics.py``; its ``step`` counts finished steps, from 1."""
        self.last_step = int(row["step"])
        self._write(self._metrics, row)
        self._timeline.flush()
        self._scalars("train", row)

    def warmup(self, row: Mapping[str, Any]) -> None:
        """One report of the supervised warm-up: ``step``, ``loss``, perhaps ``accuracy``."""
        self._write(self._warmup, row)
        self._scalars("warmup", row)

    def evaluation(self, when: str, result: Evaluation, step: int) -> None:
        """One evaluation; ``when`` is "before", "after" or "step N", ``step`` the last train step before it began."""
        row = {"when": when, "step": step, **dataclasses.asdict(result)}
        self._write(self._evaluations, row)
        self._scalars("evaluation", row)

    def span(self, actor: str, kind: str, start: float, end: float) -> None:
        """What ``actor`` ("rollout 0", "trainer 0", "reward", "controller") did from ``start`` to ``end``, seconds since the epoch."""
        line = {"actor": actor, "kind": kind, "start": round(start, 4), "end": round(end, 4)}
        self._timeline.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))

    def spans(self, actor: str, spans: Iterable[Sequence[Any]]) -> None:
        """Several spans of one actor, each ``[kind, start, end]``."""
        for kind, start, end in spans:
            self.span(actor, kind, start, end)

    def summary(self, totals: Mapping[str, Any]) -> Path:
        """``summary.json``, whole or not at all: the fields of ``metrics.RunTotals``."""
        path = self.run_dir / "summary.json"
        row = _rounded(totals)
        part = path.with_suffix(".json.part")
        part.write_text(json.dumps(row, indent=2) + "\n")
        os.replace(part, path)
        return path

    def _write(self, file: BinaryIO, row: Mapping[str, Any]) -> None:
        line = {"time": round(time.time(), 3), **row}
        file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
        file.flush()

    def _scalars(self, prefix: str, row: Mapping[str, Any]) -> None:
        if self._tensorboard is not None and "step" in row:
            self._tensorboard.add(int(row["step"]), {f"{prefix}/{k}": v for k, v in _flat(row) if k != "step"})

    def close(self) -> None:
        for file in (self._metrics, self._warmup, self._evaluations, self._timeline, self._tensorboard):
            if file is not None:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits behind the point, in inner dicts too."""
    return {k: round(v, 4) if isinstance(v, float) else _rounded(v) if isinstance(v, Mapping) else v for k, v in row.items()}


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """The numbers of a row; those of an inner dict as ``outer/inner``."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0):
            yield f"{prefix}{key}", float(value)


class _EventFile:
    """TensorBoard's file format by tensorboard's own record writer: without its queue, its thread, torch or TensorFlow."""

    def __init__(self, folder: Path, last_step: int = 0) -> None:
        """After ``last_step``, TensorBoard forgets the later steps of the files before this one."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._event, self._summary = Event, Summary
        self._writer = RecordWriter((folder / name).open("wb"))
        self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if last_step:
            restart = Event(wall_time=time.time(), step=last_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._writer.write(restart.SerializeToString())
        self._writer.flush()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was cut off when the run was killed is left out."""
    rows = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
    return rows
