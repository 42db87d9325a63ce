"""``areal report RUN``: one picture of a run, from what it wrote down.

Top: the result. Middle: reward, length, staleness, speed, how busy each side was, and how far apart engine and trainer are.
Bottom: who was doing what, over the whole run and over a few seconds of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter
from numpy.typing import NDArray

from areal.config import ConfigError, drift_bound
from areal.report_timeline import Timeline, draw_detail, draw_overview, label_busy, legend_patches, load_timeline, within
from areal.stats import read_jsonl

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#a1a1aa",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececef",
    "xtick.color": "#52525b",
    "ytick.color": "#52525b",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
BLUE, ORANGE, RED, GREY = "#4a86c5", "#e98b3a", "#c2413b", "#a1a1aa"
ZOOM_STEPS = 6
"""Train steps that the zoomed timeline shows."""


@dataclass
class Run:
    """What a run wrote down."""

    folder: Path
    metrics: list[dict[str, Any]]
    warmup: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    timeline: Timeline | None

    def column(self, key: str) -> NDArray[np.float64]:
        """A metric over the train steps; NaN where it was not known."""
        return np.array([np.nan if row.get(key) is None else float(row[key]) for row in self.metrics])

    def setting(self, *path: str) -> Any:
        node: Any = self.config
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node


def load_run(folder: Path) -> Run:
    """Reads a run's folder, finished or not; raises ``ConfigError`` when it is none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"'{folder}' is not the folder of a run: it has no metrics.jsonl", "give the folder that `areal train` names at its end"
        )
    metrics = read_jsonl(path)
    if not metrics:
        raise ConfigError(f"the run '{folder}' has not finished a train step yet, so there is nothing to draw", "try again later")
    rows = {name: read_jsonl(f) if (f := folder / f"{name}.jsonl").is_file() else [] for name in ("warmup", "evaluations", "timeline")}
    summary, config = folder / "summary.json", folder / "config.yaml"
    run = Run(
        folder=folder,
        metrics=metrics,
        warmup=rows["warmup"],
        evaluations=rows["evaluations"],
        summary=json.loads(summary.read_text()) if summary.is_file() else {},
        config=yaml.safe_load(config.read_text()) or {} if config.is_file() else {},
        timeline=load_timeline(rows["timeline"]),
    )
    if run.timeline is not None:
        run.timeline.phases = _phases(run, run.timeline)
    return run


def _phases(run: Run, timeline: Timeline) -> list[tuple[str, float, float]]:
    """Warm-up, reinforcement learning and what lies before, between and after."""
    begin, end = _rl_window(run, timeline)
    phases = [("reinforcement learning", begin, end)]
    if run.warmup:
        warm_end = min(run.warmup[-1]["time"] - timeline.origin, begin)
        phases = [("warm-up", 0.0, warm_end), ("evaluation", warm_end, begin), *phases]
    elif begin > 0:
        phases = [("evaluation", 0.0, begin), *phases]
    if timeline.end > end:
        phases.append(("evaluation", end, timeline.end))
    return phases


def _rl_window(run: Run, timeline: Timeline) -> tuple[float, float]:
    first, last = run.metrics[0], run.metrics[-1]
    begin = first["time"] - timeline.origin - (first.get("step_seconds") or 0.0)
    return max(0.0, begin), min(timeline.end, last["time"] - timeline.origin)


def draw_report(folder: Path, out: Path | None = None) -> list[Path]:
    """Draws ``report.png`` into ``out`` (default: the run's folder) and returns the paths of the pictures."""
    run = load_run(folder)
    target = out or folder
    target.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        figure = _figure(run)
        path = target / "report.png"
        FigureCanvasAgg(figure).print_png(str(path))
    return [path]


@dataclass
class _Page:
    """A figure that is filled from top to bottom; inches."""

    figure: Figure
    height: float
    below: float
    """Where the next row may start, from the top."""

    def row(self, height: float, gap: float, columns: int = 1) -> list[Axes]:
        """Axes side by side, ``gap`` below what is there."""
        self.below += gap + height
        left, right, between = 0.07, 0.935, 0.055
        width = (right - left - between * (columns - 1)) / columns
        bottom = 1 - self.below / self.height
        return [self.figure.add_axes((left + i * (width + between), bottom, width, height / self.height)) for i in range(columns)]


def _figure(run: Run) -> Figure:
    timeline, panel_height, gap = run.timeline, 2.3, 0.9
    zoom = _zoom_window(run, _rl_window(run, timeline)) if timeline else (0.0, 0.0)
    overview = 0.55 * len(timeline.lanes) + 0.2 if timeline else 0.0
    detail = 0.6 * len(within(timeline, zoom).lanes) + 0.2 if timeline else 0.0
    height = 1.35 + 2 * panel_height + gap + ((1.25 + overview) + (1.1 + detail) + 1.1 if timeline else 0.7)
    page = _Page(Figure(figsize=(15, height), dpi=110, facecolor="white"), height, below=1.35 - gap)
    _header(page.figure, run, height)
    for panels in ((_reward, _length, _staleness), (_speed, _busy, _drift)):
        for axes, draw in zip(page.row(panel_height, gap, columns=3), panels, strict=True):
            draw(axes, run)
            axes.set_xlabel("train step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            first, last = run.column("step")[[0, -1]]
            start = 0 if first <= 1 else first  # evaluations before the first step stand at 0
            axes.set_xlim(start - 0.01 * (last - start) - 0.1, last + 0.01 * (last - start) + 0.1)
    if timeline is not None:
        _timelines(page, timeline, run, zoom, (overview, detail))
    return page.figure


def _timelines(page: _Page, timeline: Timeline, run: Run, zoom: tuple[float, float], heights: tuple[float, float]) -> None:
    (whole,) = page.row(heights[0], gap=1.25)
    draw_overview(whole, timeline, (0.0, timeline.end), zoom)
    whole.set_title("Who was doing what: the whole run (the height of a colour is its share of the time)", pad=20)
    scale, unit = next(
        (s, u) for limit, s, u in ((600, 1, "seconds"), (7200, 60, "minutes"), (np.inf, 3600, "hours")) if timeline.end <= limit
    )
    whole.xaxis.set_major_locator(MultipleLocator(scale * _round_step(timeline.end / scale / 8)))
    whole.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
    whole.set_xlabel(f"{unit} since the start")
    (few,) = page.row(heights[1], gap=1.1)
    draw_detail(few, timeline, zoom, [(row["time"] - timeline.origin, int(row["step"])) for row in run.metrics])
    label_busy(few, timeline, zoom)
    few.set_title(f"The same, close up: the {zoom[1] - zoom[0]:.2g} seconds in the frame above", pad=12)
    few.set_xlabel("seconds since the start     (▼ = new weights reach a rollout server; its running answers go on under them)")
    for axes in (whole, few):
        axes.grid(axis="y", visible=False)
    page.figure.legend(
        handles=legend_patches(timeline), loc="lower center", ncols=8, fontsize=10, handlelength=1.4, bbox_to_anchor=(0.5, 0.002)
    )


def _round_step(value: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``value``."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-9)))
    return float(next(power * m for m in (1, 2, 5, 10) if power * m >= value * 0.999))


def _zoom_window(run: Run, rl: tuple[float, float]) -> tuple[float, float]:
    """A few steps around the middle of reinforcement learning."""
    seconds = run.column("step_seconds")
    typical = float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else (rl[1] - rl[0]) / len(run.metrics)
    width = min(max(ZOOM_STEPS * typical, 1e-3), rl[1] - rl[0])
    middle = (rl[0] + rl[1]) / 2
    return middle - width / 2, middle + width / 2


def _header(figure: Figure, run: Run, height: float) -> None:
    name = "/".join(str(v) for k in ("experiment_name", "trial_name") if (v := run.setting(k))) or run.folder.name
    figure.text(0.02, 1 - 0.42 / height, f"areal  ·  {name}", fontsize=17, fontweight="bold", va="center")
    summary, parts = run.summary, []
    for label, key, form in (("held-out accuracy", "accuracy", "{:.1%}"), ("answer length", "length", "{:.1f}")):
        values = [summary.get(f"{key}_{when}") for when in ("before", "after")]
        if all(v is not None for v in values):
            parts.append(f"{label} {form.format(values[0])} → {form.format(values[1])}")
    parts.append(f"{len(run.metrics)} train steps" + (f" in {summary['seconds_rl']:.0f} s" if summary.get("seconds_rl") else ""))
    if summary.get("seconds_warmup"):
        parts.append(f"warm-up {summary['seconds_warmup']:.0f} s")
    if np.isfinite(oldest := run.column("staleness_max")).any():
        parts.append(
            f"oldest token trained on: {np.nanmax(oldest):.0f} versions (bound {run.setting('rollout', 'max_head_offpolicyness')})"
        )
    if dropped := sum((summary.get("dropped") or {}).values()):
        parts.append(f"{dropped} dropped")
    if not summary:
        parts.append("the run has not finished")
    figure.text(0.02, 1 - 0.78 / height, "     ".join(parts), fontsize=11, color="#3f3f46", va="center")


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving average over about a tenth of the steps, NaN left out."""
    width = max(1, len(values) // 10)
    known = np.isfinite(values)
    kernel = np.ones(width)
    sums = np.convolve(np.where(known, values, 0.0), kernel, "same")
    counts = np.convolve(known.astype(float), kernel, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _curve(axes: Axes, run: Run, key: str, color: str, label: str, scale: float = 1.0) -> bool:
    """One metric: every step thin, the moving average thick; False when the run never measured it."""
    steps, values = run.column("step"), scale * run.column(key)
    if not np.isfinite(values).any():
        return False
    if len(values) < 20:
        axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3, label=label)
        return True
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _smooth(values), color=color, linewidth=2, label=label)
    return True


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def _reward(axes: Axes, run: Run) -> None:
    reward, accuracy = run.column("reward"), run.column("accuracy")
    if np.allclose(reward, accuracy, equal_nan=True):
        axes.set_title("Accuracy")
        _curve(axes, run, "accuracy", BLUE, "training batches")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _held_out(axes, run, "accuracy", "{:.0%}")
    else:
        axes.set_title("Reward")
        _curve(axes, run, "reward", BLUE, "training batches")
        _held_out(axes, run, "reward", "{:.2f}")
    _legend(axes, loc="best")


def _length(axes: Axes, run: Run) -> None:
    axes.set_title("Answer length in tokens")
    _curve(axes, run, "length", BLUE, "mean of training batches")
    axes.plot(run.column("step"), run.column("length_max"), color=GREY, linewidth=0.9, label="longest")
    _held_out(axes, run, "length", "{:.0f}")
    axes.set_ylim(bottom=0)
    _legend(axes, loc="best")


def _held_out(axes: Axes, run: Run, key: str, form: str) -> None:
    """Evaluations on held-out prompts, each with its value."""
    points = [(row["step"], row[key]) for row in run.evaluations if row.get(key) is not None]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), "D", color=ORANGE, markersize=7, label="held-out prompts", zorder=5, clip_on=False)
    for index, (step, value) in enumerate(points):
        last = index == len(points) - 1 and len(points) > 1
        offset, ha, va = ((4, 8), "right", "bottom") if last else ((8, -3), "left", "top")
        axes.annotate(form.format(value), (step, value), offset, textcoords="offset points", ha=ha, va=va, fontsize=9)


def _staleness(axes: Axes, run: Run) -> None:
    axes.set_title("Staleness of trained tokens, in versions")
    _curve(axes, run, "staleness_mean", BLUE, "mean")
    axes.plot(run.column("step"), run.column("staleness_max"), "o", color=ORANGE, markersize=3, label="oldest token")
    eta = run.setting("rollout", "max_head_offpolicyness")
    top = np.nanmax(np.append(run.column("staleness_max"), eta or 0))
    if eta is not None:
        axes.axhline(eta, color=RED, linewidth=1.2, linestyle=(0, (4, 3)), label=f"bound (eta = {eta})")
    axes.set_ylim(-0.08 * max(1, top), 1.45 * max(1, top))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, loc="upper right", ncols=3, columnspacing=1.2, handlelength=1.5)


def _speed(axes: Axes, run: Run) -> None:
    axes.set_title("Tokens per second")
    _curve(axes, run, "gen_tokens_per_s", BLUE, "generated")
    _curve(axes, run, "train_tokens_per_s", ORANGE, "trained on")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"))
    axes.set_ylim(bottom=0)
    _legend(axes, loc="best", ncols=2)


def _busy(axes: Axes, run: Run) -> None:
    axes.set_title("How busy each side is")
    _curve(axes, run, "rollout_busy", BLUE, "rollout servers")
    _curve(axes, run, "trainer_busy", ORANGE, "trainer")
    _curve(axes, run, "mfu", RED, "model FLOPs of the trainer's peak (MFU)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.05)
    _legend(axes, loc="best", ncols=2)


def _drift(axes: Axes, run: Run) -> None:
    axes.set_title("Log-prob difference, engine and trainer")
    shown = False
    for key, color, label in (("logprob_drift_max", ORANGE, "largest"), ("logprob_drift_mean", BLUE, "mean")):
        values = run.column(key)
        positive = np.where(values > 0, values, np.nan)
        if np.isfinite(positive).any():
            axes.plot(run.column("step"), positive, color=color, linewidth=1.3, marker=".", markersize=4, label=label)
            shown = True
    bound = drift_bound(
        run.setting("stats_logger", "logprob_drift_bound"), run.setting("actor", "dtype") or "", run.setting("rollout", "update_mode") or ""
    )
    if not shown:
        axes.text(
            0.5, 0.5, "no trained token was of the current version", transform=axes.transAxes, ha="center", va="center", color="#71717a"
        )
        return
    axes.set_yscale("log")
    if np.isfinite(bound):
        axes.axhline(bound, color=RED, linewidth=1.2, linestyle=(0, (4, 3)), label=f"bound {bound:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 3, high * 12)
    _legend(axes, loc="upper right", ncols=3, columnspacing=1.2, handlelength=1.5)
