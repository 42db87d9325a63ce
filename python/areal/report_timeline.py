"""The timeline of a run: one lane an actor, one colour a kind of work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from numpy.typing import NDArray

Intervals = NDArray[np.float64]
"""[n, 2] starts and ends in seconds, sorted and disjoint."""

# Drawn in this order, later ones over earlier ones.
COLORS = {
    "waiting": "#e4e4e7",
    "generation": "#4a86c5",
    "training": "#e98b3a",
    "recompute": "#f4bd85",
    "scoring": "#d9a441",
    "reward": "#3f9c6b",
    "evaluation": "#5bb5b0",
    "weight_sync": "#8e3fa8",
    "checkpoint": "#7b5b45",
}
LABELS = {
    "waiting": "waiting",
    "generation": "generation",
    "training": "training",
    "recompute": "recomputing log-probs",
    "scoring": "values, reference log-probs",
    "reward": "scoring rewards",
    "evaluation": "evaluation",
    "weight_sync": "weight sync",
    "checkpoint": "writing a checkpoint",
}
_SAME = {"train": "training", "publish": "weight_sync", "warmup": "training", "weights": "weight_sync"}
_ORDER = ("rollout", "reward", "trainer", "controller")
_NEVER_IDLE = ("rollout", "trainer")  # their gaps are waiting; a reward worker without work is as it should be


@dataclass
class Timeline:
    """Spans by lane and kind, in seconds from ``origin`` (seconds since the epoch)."""

    lanes: dict[str, dict[str, Intervals]]
    origin: float
    end: float
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    """(name, start, end) of warm-up, evaluation, reinforcement learning."""


def load_timeline(rows: Iterable[Mapping[str, Any]], origin: float | None = None) -> Timeline | None:
    """Rows of ``timeline.jsonl``; None when there are none."""
    spans: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        kind = _SAME.get(row["kind"], row["kind"])
        if row["end"] > row["start"]:
            spans.setdefault(row["actor"], {}).setdefault(kind, []).append((row["start"], row["end"]))
    if not spans:
        return None
    first = min(s for kinds in spans.values() for pairs in kinds.values() for s, _ in pairs)
    last = max(e for kinds in spans.values() for pairs in kinds.values() for _, e in pairs)
    start = first if origin is None else min(origin, first)
    lanes = {
        actor: {kind: union(np.array(pairs) - start) for kind, pairs in spans[actor].items()} for actor in sorted(spans, key=_lane_key)
    }
    return Timeline(lanes, start, last - start)


def _lane_key(actor: str) -> tuple[int, list[int], str]:
    name = actor.split(maxsplit=1)[0]
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), [int(n) for n in re.findall(r"\d+", actor)], actor)


def union(spans: Intervals) -> Intervals:
    """Overlapping or touching intervals joined."""
    if len(spans) == 0:
        return np.zeros((0, 2))
    spans = spans[np.argsort(spans[:, 0])]
    ends = np.maximum.accumulate(spans[:, 1])
    starts_new = np.concatenate([[True], spans[1:, 0] > ends[:-1]])
    return np.stack([spans[starts_new, 0], ends[np.concatenate([np.flatnonzero(starts_new)[1:] - 1, [len(spans) - 1]])]], axis=1)


def clip(spans: Intervals, start: float, end: float) -> Intervals:
    """The part of the intervals inside [start, end]."""
    inside = spans[(spans[:, 1] > start) & (spans[:, 0] < end)]
    return np.clip(inside, start, end)


def covered(spans: Intervals, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds of disjoint intervals inside each bin between consecutive ``edges``."""
    if len(spans) == 0:
        return np.zeros(len(edges) - 1)
    lengths = np.concatenate([[0.0], np.cumsum(spans[:, 1] - spans[:, 0])])
    index = np.searchsorted(spans[:, 0], edges, side="right")
    before = lengths[index]
    inside = index > 0
    before[inside] -= np.maximum(0.0, spans[index[inside] - 1, 1] - edges[inside])
    return np.diff(before)


def busy(kinds: Mapping[str, Intervals]) -> Intervals:
    """When a lane did anything but wait or write a checkpoint in the background."""
    work = [spans for kind, spans in kinds.items() if kind not in ("waiting", "checkpoint")]
    return union(np.concatenate(work)) if work else np.zeros((0, 2))


def exclusive(kinds: Mapping[str, Intervals]) -> dict[str, Intervals]:
    """The same lanes without overlaps: where two kinds overlap, the one that is drawn later stays."""
    result: dict[str, Intervals] = {}
    taken = np.zeros((0, 2))
    for kind in reversed(drawing_order(kinds)):
        result[kind] = minus(kinds[kind], taken)
        taken = union(np.concatenate([taken, kinds[kind]]))
    return result


def minus(spans: Intervals, holes: Intervals) -> Intervals:
    """The part of ``spans`` outside ``holes``; both are disjoint and sorted."""
    if len(spans) == 0 or len(holes) == 0:
        return spans
    edges = np.unique(np.concatenate([spans.ravel(), holes.ravel()]))
    middle = (edges[:-1] + edges[1:]) / 2
    keep = _inside(spans, middle) & ~_inside(holes, middle)
    return union(np.stack([edges[:-1][keep], edges[1:][keep]], axis=1))


def _inside(spans: Intervals, points: NDArray[np.float64]) -> NDArray[np.bool_]:
    index = np.searchsorted(spans[:, 0], points, side="right") - 1
    return (index >= 0) & (points < spans[np.maximum(index, 0), 1])


def drawing_order(kinds: Iterable[str]) -> list[str]:
    return sorted(kinds, key=lambda kind: list(COLORS).index(kind) if kind in COLORS else len(COLORS))


def color(kind: str) -> str:
    return COLORS.get(kind, "#666666")


def within(timeline: Timeline, window: tuple[float, float]) -> Timeline:
    """The lanes that have something to show in the window."""
    lanes = {a: k for a, k in timeline.lanes.items() if a.split()[0] in _NEVER_IDLE or any(len(clip(s, *window)) for s in k.values())}
    return Timeline(lanes, timeline.origin, timeline.end, timeline.phases)


def draw_overview(axes: Axes, timeline: Timeline, window: tuple[float, float], zoom: tuple[float, float] | None) -> None:
    """The whole run: the height of a colour is its share of the time, so that no detail is lost however long the run."""
    start, end = window
    edges = np.linspace(start, end, 241)
    width = edges[1] - edges[0]
    for lane, (actor, kinds) in enumerate(timeline.lanes.items()):
        level = np.full(len(edges) - 1, lane + 0.4)  # the axis points down: work piles up from the lane's lower edge
        parts = exclusive({k: v for k, v in kinds.items() if k not in ("waiting", "checkpoint")})
        ground = COLORS["waiting"] if actor.split()[0] in _NEVER_IDLE else "#f4f4f5"
        axes.fill_between([start, end], lane - 0.4, lane + 0.4, color=ground, linewidth=0, zorder=1)
        for kind in drawing_order(parts):
            top = level - 0.8 * covered(parts[kind], edges) / width
            axes.fill_between(
                edges, np.append(level, level[-1]), np.append(top, top[-1]), step="post", color=color(kind), linewidth=0, zorder=2
            )
            level = top
        for s, e in clip(kinds.get("checkpoint", np.zeros((0, 2))), start, end):
            axes.broken_barh([(s, max(e - s, (end - start) / 400))], (lane - 0.5, 0.1), color=COLORS["checkpoint"], zorder=3)
    if zoom is not None:
        axes.axvspan(*zoom, facecolor="none", edgecolor="#18181b", linewidth=1.2, zorder=5)
    _phases(axes, timeline, window)
    _lanes(axes, timeline, window)


def draw_detail(axes: Axes, timeline: Timeline, window: tuple[float, float], steps: Sequence[tuple[float, int]]) -> None:
    """Every single span of a few seconds; ``steps`` = (end time, step) labels the training spans."""
    start, end = window
    timeline = within(timeline, window)
    thinnest = (end - start) / 500
    for lane, (actor, kinds) in enumerate(timeline.lanes.items()):
        if actor.split()[0] in _NEVER_IDLE:
            axes.broken_barh([(start, end - start)], (lane - 0.4, 0.8), color=COLORS["waiting"], linewidth=0, zorder=1)
        for z, kind in enumerate(drawing_order(kinds), 2):
            spans = clip(kinds[kind], start, end)
            bars = [(s, max(e - s, thinnest)) for s, e in spans]
            low, height = (lane - 0.5, 0.1) if kind == "checkpoint" else (lane - 0.4, 0.8)
            edge = "white" if kind in ("training", "recompute", "scoring") else "none"
            axes.broken_barh(bars, (low, height), facecolors=color(kind), edgecolors=edge, linewidth=0.8, zorder=z)
            if kind == "weight_sync" and actor.startswith("rollout"):
                axes.plot(
                    spans.mean(axis=1), np.full(len(spans), lane - 0.46), "v", color=color(kind), markersize=7, zorder=z + 10, clip_on=False
                )
        if actor.startswith("trainer"):
            _step_labels(axes, kinds.get("training", np.zeros((0, 2))), lane, window, steps)
    _lanes(axes, timeline, window)


def _step_labels(axes: Axes, training: Intervals, lane: int, window: tuple[float, float], steps: Sequence[tuple[float, int]]) -> None:
    start, end = window
    ends = np.array([t for t, _ in steps])
    for s, e in clip(training, start, end):
        index = int(np.searchsorted(ends, e - 1e-3))  # the first step that was reported after this span
        if e - s > 0.06 * (end - start) and index < len(steps) and ends[index] - e < 2 * (e - s) + 1:
            axes.text((s + e) / 2, lane, f"step {steps[index][1]}", ha="center", va="center", fontsize=9, color="#27272a", zorder=30)


def _phases(axes: Axes, timeline: Timeline, window: tuple[float, float]) -> None:
    start, end = window
    for number, (name, s, e) in enumerate(timeline.phases):
        axes.axvspan(s, e, ymin=0, ymax=1, color="#fafafa" if number % 2 else "#f0f0f2", zorder=0, linewidth=0)
        if e - s > 0.05 * (end - start):
            axes.text((s + e) / 2, -0.62, name, ha="center", va="bottom", fontsize=9, color="#52525b", style="italic", clip_on=False)


def _lanes(axes: Axes, timeline: Timeline, window: tuple[float, float]) -> None:
    names = list(timeline.lanes)
    axes.set_xlim(window)
    axes.set_ylim(len(names) - 0.45, -0.58)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def label_busy(axes: Axes, timeline: Timeline, window: tuple[float, float]) -> None:
    """At the right of each lane: the share of the window in which it worked."""
    start, end = window
    for lane, (actor, kinds) in enumerate(within(timeline, window).lanes.items()):
        if actor.startswith("controller"):
            continue
        portion = covered(busy(kinds), np.array([start, end]))[0] / max(end - start, 1e-9)
        axes.text(1.008, lane, f"{100 * portion:.0f}% busy", transform=axes.get_yaxis_transform(), va="center", fontsize=9, color="#3f3f46")


def legend_patches(timeline: Timeline) -> list[Patch]:
    used = {"waiting"}.union(*timeline.lanes.values())
    return [Patch(facecolor=color(kind), label=LABELS.get(kind, kind.replace("_", " "))) for kind in drawing_order(used)]
