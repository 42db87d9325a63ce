"""``areal score``: the completions of a JSONL file scored again, in parallel, in a file of the same rows in the same order.

Every output row is its input row and either ``score`` or ``failure: {"cause", "message"}``. A row that cannot be read is a failure as
well (``malformed_row``; a line that is no JSON object is kept as text under ``input``); blank lines are left out. Memory is bounded by the
rows in flight, so the file may have any number. Who waits on whom: reading waits for the oldest row in flight, that row for its worker,
the worker for its time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from areal.config import ConfigError
from areal.reward.math import TIME_LIMIT, math_score, reference_answer
from areal.reward.service import RewardFailure, RewardService

if TYPE_CHECKING:
    from areal.reward.code import CodeReward
    from areal.reward.sandbox.limits import Isolation

_ROWS_IN_FLIGHT = 1024
_BYTES_IN_FLIGHT = 64 << 20
_STARTING = 60.0  # seconds in which a scorer may start processes of its own
_WAITING = 10  # times the CPU time that an answer may take, on a machine that does much else
_ARGUMENTS = ("prompt", "completions", "prompt_ids", "completion_ids")

_SHOW_SECONDS = 0.1


@dataclass
class Summary:
    rows: int = 0
    scored: int = 0
    total: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        text = f"{self.rows} rows in {self.seconds:.1f} s ({self.rows / max(self.seconds, 1e-9):.0f} rows/s)"
        text += f", mean score {self.total / self.scored:.4f} of {self.scored} scored" if self.scored else ", none scored"
        failed = ", ".join(f"{n} {cause}" for cause, n in self.failures.most_common())
        return f"{text}; failures: {failed or 'none'}"


@dataclass(frozen=True)
class _InFlight:
    row: dict[str, object]
    result: asyncio.Task[float] | RewardFailure
    size: int

    @property
    def done(self) -> bool:
        return isinstance(self.result, RewardFailure) or self.result.done()


def run_score(
    kind: str,
    file: Path,
    out: Path,
    *,
    workers: int,
    timeout: float | None = None,
    completion_key: str = "completion",
    isolation: Isolation | None = None,
) -> Summary:
    """Scores ``file`` into ``out``, which appears whole or not at all.

    Args:
        kind: math or code.
        timeout: CPU seconds that one answer may take; None = the scorer's own limit.
        isolation: how programs are confined (code); None = by the strongest level that the machine has.

    Raises:
        ConfigError: a file that cannot be read or written, a setting out of range.
        RewardServiceError: no score can be had at all.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers} scores nothing", "give 1 or more")
    if timeout is not None and not 0 < timeout < math.inf:
        raise ConfigError(f"--timeout {timeout:g} is no time to score in", "give seconds above 0")
    if isolation is not None and kind != "code":
        raise ConfigError(f"--isolation {isolation} is for code", "leave it out")
    try:
        source = file.open("rb")
    except OSError as error:
        raise ConfigError(f"FILE {file} cannot be read ({error.strerror})", "give the path of a JSONL file") from error
    part = Path(f"{out}.part")
    with source:
        sink = _open_part(part, out, file)
        try:
            rows = _Rows(timeout, completion_key, _code_scorer(timeout, isolation or "auto") if kind == "code" else None)
            with sink, _progress(file) as show:
                summary = asyncio.run(_score_file(rows, source, sink, workers, show))
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)
    return summary


def _open_part(part: Path, out: Path, file: Path) -> BinaryIO:
    """Where the output grows; everything that would only fail once all is scored fails here."""
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if part.exists() and part.samefile(file):
            raise ConfigError(f"--out {out} would be written by way of FILE {file}", "give another --out")
        return part.open("wb")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror})", "give a file in a folder that exists") from error


async def _score_file(rows: _Rows, source: BinaryIO, sink: BinaryIO, workers: int, show: Callable[[int, Summary], None]) -> Summary:
    summary, begin = Summary(), time.monotonic()
    waiting: deque[_InFlight] = deque()
    in_flight = read = 0
    async with RewardService(workers=workers) as service:
        try:
            for number, line in enumerate(source, 1):
                read += len(line)
                if not line.strip():
                    continue
                waiting.append(rows.start(service, line, number))
                in_flight += len(line)
                while len(waiting) >= _ROWS_IN_FLIGHT or in_flight > _BYTES_IN_FLIGHT or (waiting and waiting[0].done):
                    in_flight -= waiting[0].size
                    await _finish(waiting[0], sink, summary)
                    waiting.popleft()
                    show(read - in_flight, summary)
            for entry in waiting:
                await _finish(entry, sink, summary)
                in_flight -= entry.size
                show(read - in_flight, summary)
        finally:
            rest = [entry.result for entry in waiting if isinstance(entry.result, asyncio.Task)]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
    summary.seconds = time.monotonic() - begin
    return summary


@dataclass(frozen=True)
class _Rows:
    """How a line becomes a call of a scorer."""

    timeout: float | None
    completion_key: str
    code: CodeReward | None  # None: the rows are math

    def start(self, service: RewardService, line: bytes, number: int) -> _InFlight:
        row: object = None
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a row is an object, not {type(row).__name__}")
            completion = row.get(self.completion_key)
            if not isinstance(completion, str):
                raise ValueError(f"no text under '{self.completion_key}'")
            score = self._code(service, completion, row) if self.code else self._math(service, completion, row)
        except (ValueError, RecursionError) as error:  # bad JSON, bytes that are not UTF-8, ten thousand brackets
            kept = row if isinstance(row, dict) else {"input": line.decode(errors="replace").rstrip("\r\n")}
            return _InFlight(kept, RewardFailure("malformed_row", f"line {number}: {error}"), len(line))
        return _InFlight(row, asyncio.ensure_future(score), len(line))

    # An answer's time is limited where it is scored, and is its own fault there; the service's limit is for scorers that hang.

    def _math(self, service: RewardService, completion: str, row: dict[str, Any]) -> Coroutine[Any, Any, float]:
        answer, solution, limit = row.get("answer"), row.get("solution"), self.timeout or TIME_LIMIT
        reference_answer(answer, solution)
        arguments = {"answer": answer, "solution": solution, "time_limit": limit}
        return service.score(math_score, (completion,), arguments, _WAITING * limit + _STARTING)

    def _code(self, service: RewardService, completion: str, row: dict[str, Any]) -> Coroutine[Any, Any, float]:
        assert self.code is not None and self.code.limits is not None
        if not row.get("tests") and not row.get("test_list"):
            raise ValueError("the row has no 'tests': the text of a test program, or a list of objects with 'stdin' and 'stdout'")
        columns = {key: value for key, value in row.items() if key not in _ARGUMENTS}
        prompt = row.get("prompt")
        arguments: tuple[Any, ...] = (prompt if isinstance(prompt, str) else "", completion, [], [])
        return service.score(self.code, arguments, columns, self.code.limits.wall_seconds + _STARTING)


def _code_scorer(timeout: float | None, isolation: Isolation) -> CodeReward:
    """Says on stderr how programs are confined.

    Raises:
        ConfigError: not as it was demanded.
        SandboxError: no way of confining them works on this machine.
    """
    from areal.reward.code import CodeReward
    from areal.reward.sandbox.levels import HINT, describe, namespaces_missing
    from areal.reward.sandbox.limits import Limits

    if isolation == "namespaces" and (reason := namespaces_missing()):
        raise ConfigError(f"--isolation namespaces: this machine does not have that level ({reason})", f"{HINT}, or leave it out")
    print(f"programs are run at the isolation level {describe(isolation)}", file=sys.stderr)
    return CodeReward(isolation, Limits() if timeout is None else Limits(cpu_seconds=timeout, wall_seconds=2 * timeout))


async def _finish(entry: _InFlight, sink: BinaryIO, summary: Summary) -> None:
    row = {key: value for key, value in entry.row.items() if key not in ("score", "failure")}  # of an earlier run
    summary.rows += 1
    try:
        if isinstance(entry.result, RewardFailure):
            raise entry.result
        row["score"] = score = await entry.result
    except RewardFailure as failure:
        row["failure"] = {"cause": failure.cause, "message": str(failure)}
        summary.failures[failure.cause] += 1
    else:
        summary.scored += 1
        summary.total += score
    try:
        text = json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only JSON's own escape can write
        text = json.dumps(row).encode()
    sink.write(text + b"\n")


@contextlib.contextmanager
def _progress(file: Path) -> Iterator[Callable[[int, Summary], None]]:
    """A bar over the bytes of the file on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    counts = TextColumn("{task.fields[rows]} rows, {task.fields[failed]} failed")
    columns = (TextColumn("scoring"), BarColumn(), TaskProgressColumn(), counts, TimeRemainingColumn())
    shown = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=file.stat().st_size or None, rows=0, failed=0)

        def show(n_bytes: int, summary: Summary) -> None:
            nonlocal shown
            if (now := time.monotonic()) - shown > _SHOW_SECONDS:
                shown = now
                progress.update(task, completed=n_bytes, rows=summary.rows, failed=summary.failures.total())

        yield show
