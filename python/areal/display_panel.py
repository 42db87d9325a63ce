"""The live panel: pure drawing of what the run has told so far."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"
NARROW = 88
"""Columns under which the panel has one column instead of two."""


@dataclass
class RunState:
    """What the panel shows; changed by ``Display`` only."""

    title: str
    total_steps: int
    eta: int
    drift_bound: float
    started: float = field(default_factory=time.monotonic)
    phase: str = "starting"
    phase_started: float = field(default_factory=time.monotonic)
    warmup_total: int = 0
    warmup: dict[str, Any] = field(default_factory=dict)
    warmup_name: str = "warm-up"
    row: dict[str, Any] = field(default_factory=dict)
    drift: tuple[float | None, int] = (None, 0)
    """Largest difference of the log-probs when it was last measured, and the step of that."""
    history: dict[str, list[float]] = field(default_factory=dict)

    def enter(self, phase: str) -> None:
        if phase != self.phase:
            self.phase, self.phase_started = phase, time.monotonic()

    def remember(self, row: Mapping[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            value = row.get(key)
            if is_number(value):
                self.history.setdefault(key, []).append(float(value))


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def count(value: Any) -> str:
    """1234 -> 1.2k; what is not a number -> a dash."""
    if not is_number(value):
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def number(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if is_number(value) else "–"


def share(value: Any) -> str:
    return f"{100 * value:.0f}%" if is_number(value) else "–"


def clock(seconds: float) -> str:
    hours, rest = divmod(int(max(0.0, seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def tiny(value: Any) -> str:
    return f"{value:.1e}" if is_number(value) else "–"


def mfu_text(row: Mapping[str, Any]) -> str:
    """Model FLOPs over the peak of the trainer's devices, where the row has it."""
    return f", MFU {share(row['mfu'])}" if is_number(row.get("mfu")) else ""


def filter_text(row: Mapping[str, Any]) -> str:
    """What the dynamic filter did."""
    passed = f" ({count(row['filter_passed'])} more passed, beyond dynamic_filter_max_waste)" if row.get("filter_passed") else ""
    return f"filtered {count(row.get('filtered'))} groups{passed}"


def bar(portion: Any, width: int, style: str) -> Text:
    """A bar of ``width`` cells in eighths of a cell."""
    filled = min(1.0, max(0.0, portion)) * width if is_number(portion) else 0.0
    whole, part = int(filled), int((filled - int(filled)) * 8)
    text = "█" * whole + (" ▏▎▍▌▋▊▉"[part] if part and whole < width else "")
    return Text.assemble((text, style), ("·" * (width - len(text)), "bright_black"))


def sparkline(values: Sequence[float], width: int) -> str:
    """The whole history in ``width`` characters, each the mean of its share of the steps."""
    if len(values) < 2:
        return ""
    n = min(width, len(values))
    cells = [values[i * len(values) // n : max((i + 1) * len(values) // n, i * len(values) // n + 1)] for i in range(n)]
    means = [sum(c) / len(c) for c in cells]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARKS[int((m - low) / span * (len(SPARKS) - 1) + 0.5)] for m in means)


class RunPanel:
    """Draws a ``RunState`` into whatever width there is."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(20, min(options.max_width, 120))
        state = self.state
        match state.phase:
            case "training":
                body: Any = self._training(width - 4)
            case "warm-up":
                body = self._warmup(width - 4)
            case _:
                body = Text(f"{state.phase} … {clock(time.monotonic() - state.phase_started)}", no_wrap=True, overflow="ellipsis")
        title = Text.assemble(("areal ", "bold"), (state.title, "cyan"))
        yield Panel(body, title=title, title_align="left", border_style="bright_black", width=width, padding=(0, 1))

    def _progress(self, label: str, done: int, total: int, started: float, width: int) -> Text:
        elapsed = time.monotonic() - started
        left = f", about {clock(elapsed / done * (total - done))} left" if 0 < done < total else ""
        head = Text.assemble((f"{label} ", "bold"), f"{done}/{total} ")
        tail = f" {clock(elapsed)}{left}"
        head.append_text(bar(done / max(1, total), max(5, width - len(head) - len(tail)), "green"))
        head.append(tail)
        head.no_wrap, head.overflow = True, "ellipsis"
        return head

    def _warmup(self, width: int) -> Group:
        state, row = self.state, self.state.warmup
        left, right = _grid(), _grid()
        _line(left, "loss", number(row.get("loss"), 3), sparkline(state.history.get("warmup_loss", []), 24))
        if "accuracy" in state.history:
            _line(left, "accuracy", share(state.history["accuracy"][-1]), sparkline(state.history["accuracy"], 24))
        if "preference_accuracy" in row:
            _line(left, "preferred", share(row["preference_accuracy"]), sparkline(state.history.get("preference_accuracy", []), 24))
            _line(right, "margin", number(row.get("margin"), 3), "reward of chosen - rejected answers")
        _line(right, "speed", f"{count(row.get('tokens_per_s'))} tok/s", "trained")
        _line(right, "rate", share(row.get("lr_scale")), "of the first learning rate")
        # Fewer steps remain than were planned once the accuracy is reached and the cool-down begins.
        total = int(row.get("total_steps") or state.warmup_total)
        label = f"{state.warmup_name}, cooling down" if row.get("phase") == "cool-down" else state.warmup_name
        progress = self._progress(label, int(row.get("step", 0)), total, state.phase_started, width)
        return Group(progress, _columns(left, right, width))

    def _training(self, width: int) -> Group:
        row, eta = self.state.row, self.state.eta
        progress = self._progress("step", int(row.get("step", 0)), self.state.total_steps, self.state.phase_started, width)
        return Group(progress, _columns(self._policy(row), self._system(row, eta), width), *self._warnings(row))

    def _policy(self, row: Mapping[str, Any]) -> Table:
        history = self.state.history
        table = _grid()
        _line(table, "reward", number(row.get("reward"), 3), sparkline(history.get("reward", []), 20))
        _line(table, "accuracy", share(row.get("accuracy")), sparkline(history.get("accuracy", []), 20))
        _line(
            table,
            "length",
            number(row.get("length"), 1),
            sparkline(history.get("length", []), 20) + f"  max {count(row.get('length_max'))}",
        )
        _line(table, "entropy", number(row.get("entropy"), 3), sparkline(history.get("entropy", []), 20))
        _line(
            table, "loss", number(row.get("loss"), 4), f"grad {number(row.get('grad_norm'), 2)}  clipped {share(row.get('clip_fraction'))}"
        )
        return table

    def _system(self, row: Mapping[str, Any], eta: int) -> Table:
        table = _grid()
        for label, rate, busy in (("generation", "gen_tokens_per_s", "rollout_busy"), ("training", "train_tokens_per_s", "trainer_busy")):
            _line(
                table,
                label,
                f"{count(row.get(rate))} tok/s",
                Text.assemble(bar(row.get(busy), 5, "blue"), f" {share(row.get(busy))} busy", mfu_text(row) if label == "training" else ""),
            )
        _line(table, "staleness", number(row.get("staleness_mean"), 2), f"max {row.get('staleness_max', '–')} of {eta} allowed")
        _line(table, "groups", count(row.get("inflight_groups")), f"in flight, {count(row.get('buffer_groups'))} ready")
        (drift, step), bound = self.state.drift, self.state.drift_bound
        verdict = "not measured yet" if not is_number(drift) else f"{'under' if drift <= bound else 'OVER'} {bound:.0e}, step {step}"
        style = "bold red" if is_number(drift) and drift > bound else ""
        _line(table, "drift", Text(tiny(drift), style=style), Text(verdict, style=style))
        return table

    def _warnings(self, row: Mapping[str, Any]) -> list[Text]:
        lines = []
        dropped = {k: v for k, v in (row.get("dropped") or {}).items() if v}
        if dropped:
            text = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in sorted(dropped.items(), key=lambda item: -item[1]))
            lines.append(Text.assemble(("dropped  ", "yellow"), text))
        if row.get("filtered") or row.get("filter_passed"):
            lines.append(Text(filter_text(row)))
        if row.get("skipped_nonfinite"):
            lines.append(Text(f"skipped steps with non-finite numbers: {row['skipped_nonfinite']}", style="bold red"))
        return lines


def _grid() -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bright_black", no_wrap=True, min_width=10)
    grid.add_column(justify="right", no_wrap=True, min_width=11)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    return grid


def _line(grid: Table, label: str, value: str | Text, remark: str | Text = "") -> None:
    grid.add_row(label, value if isinstance(value, Text) else Text(value, style="bold"), remark)


def _columns(left: Table, right: Table, width: int) -> Table | Group:
    if width + 4 < NARROW:
        return Group(left, right)
    table = Table.grid(expand=True, padding=(0, 2))
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(left, right)
    return table
