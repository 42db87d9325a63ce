"""How the rows of the op benchmarks are shown: a table, the same in Markdown, JSON, and a picture of time over size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

COLUMNS = ("case", "phase", "variant", "median", "spread", "peak MiB", "rate", "x reference", "limit", "achieved", "target", "met")
COLORS = {"torch": "tab:gray", "cpp": "tab:blue", "triton": "tab:orange", "cuda": "tab:green"}
LINES = ("-", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))  # of the variants of one backend
RIVAL_COLORS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _share(row: Row, key: str) -> str:
    value = row[key]
    if value is None:
        return "-"
    return f"{value:.2f}x" if row["limit_kind"] == "rival" else f"{100 * value:.0f}%"


def _memory(row: Row) -> str:
    peak, most = row["peak_memory"], row["most_memory"]
    if peak is None:
        return "-"
    return f"{peak / 2**20:.1f}" + ("" if most is None else f" {'<=' if peak <= most else '>'} {most / 2**20:.0f}")


def _rate(row: Row) -> str:
    """Bytes or floating-point operations of the limit over the time."""
    if "limit_bytes" in row:
        return f"{row['limit_bytes'] / row['median'] / 1e9:.3g} GB/s"
    return f"{row['limit_flops'] / row['median'] / 1e12:.3g} TFLOP/s" if "limit_flops" in row else "-"


def _cells(row: Row) -> list[str]:
    if "not_run" in row:
        return [row["case"], row["phase"], row["variant"], f"not run: {row['not_run']}"]
    times = row["times_reference"]
    return [
        *(row[key] for key in ("case", "phase", "variant")),
        *(_time(row[key]) for key in ("median", "spread")),
        _memory(row),
        _rate(row),
        "-" if times is None else f"{times:.2f}x",
        "-" if row["limit"] is None else _time(row["limit"]),
        *(_share(row, key) for key in ("achieved", "target")),
        {True: "yes", False: "NO", None: "-"}[row["met"]],
    ]


def table(rows: Sequence[Row]) -> str:
    """For a terminal. What was not run has its reason in place of figures."""
    lines = [list(COLUMNS), *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines if len(line) == len(COLUMNS) or i < 3) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)).rstrip() for line in lines)


def markdown(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """One table an op, with the machine in front."""
    facts = "; ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    parts = [f"Machine: {facts}.\n"]
    for op, of_op in groupby(rows, key=lambda row: row["op"]):
        lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(_cells(row) for row in of_op)]
        parts.append(f"## {op}\n")
        parts.extend("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append("")
    return "\n".join(parts)


def write_json(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """``facts`` (machine, device, threads ...) and the rows; complete at any moment, even when the run is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({**facts, "rows": list(rows)}, indent=1) + "\n")
    os.replace(partial, path)


def write_plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """One panel an op and phase: time over size, a line a variant, the limit dashed. ``ImportError`` without matplotlib."""
    from matplotlib.figure import Figure

    panels = list(_panels(rows))
    if not panels:
        return
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 4.4 * height + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = list(figure.subplots(height, columns, squeeze=False).flat)
    for ax, (name, of_panel) in zip(axes, panels, strict=False):
        _draw(ax, of_panel)
        ax.set_title(name)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    measured: dict[str, list[Row]] = {}
    for row in rows:
        if "not_run" not in row:
            measured.setdefault(f"{row['op']}, {row['phase']}", []).append(row)
    yield from measured.items()


def _draw(ax: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import NullLocator

    labels = list(dict.fromkeys(row["case"] for row in rows))
    # Cases that share a size (other shapes of it), or a single one, are told apart by their labels instead.
    by_size = len({row["size"] for row in rows}) == len(labels) > 1
    place = {row["case"]: row["size"] if by_size else labels.index(row["case"]) for row in rows}
    rivals = iter(RIVAL_COLORS * len(rows))
    styles = {backend: iter(LINES * len(rows)) for backend in COLORS}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for i, variant in enumerate(variants):
        aside = 0.0 if by_size else 0.08 * (i - (len(variants) - 1) / 2)  # beside each other, not on one spot
        of_variant = sorted((row for row in rows if row["variant"] == variant), key=lambda row: place[row["case"]])
        x, y = [place[row["case"]] + aside for row in of_variant], [row["median"] for row in of_variant]
        quartiles = [
            [max(0.0, row["median"] - row["q1"]) for row in of_variant],
            [max(0.0, row["q3"] - row["median"]) for row in of_variant],
        ]
        backend, _, more = variant.partition(" ")
        color = COLORS.get(backend) or next(rivals)
        line = next(styles[backend]) if backend in styles else "-"
        style = {"color": color, "label": variant, "marker": "o", "markersize": 4, "capsize": 2, "alpha": 0.6 if more else 1.0}
        ax.errorbar(x, y, yerr=quartiles, linestyle=line if by_size else "none", **style)
    _draw_limit(ax, rows, place, by_size)
    _time_axis(ax)
    if by_size:
        ax.set_xscale("log", base=2)
        ax.set_xticks([place[label] for label in labels], labels, rotation=30, ha="right", fontsize=7)
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=7)
        ax.set_xlim(-0.5, len(labels) - 0.5)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)


def _draw_limit(ax: Axes, rows: Sequence[Row], place: Mapping[str, float], by_size: bool) -> None:
    limits = sorted({(place[row["case"]], row["limit"]) for row in rows if row["limit"] is not None})
    if not limits:
        return
    kind = next(row["limit_kind"] for row in rows if row["limit"] is not None)
    name = {"copy": "copy bandwidth", "products": "matrix products", "rival": "the rival / the factor", "seconds": "the target"}[kind]
    style: dict[str, Any] = {"linestyle": "--", "color": "black", "label": f"limit: {name}", "zorder": 1}
    if by_size:
        ax.plot([at for at, _ in limits], [seconds for _, seconds in limits], marker="_", **style)
    else:
        ax.hlines([seconds for _, seconds in limits], [at - 0.35 for at, _ in limits], [at + 0.35 for at, _ in limits], **style)


def _time_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 30:
        ax.set_ylim(low / 1.5, high * 1.5)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _time(seconds)))
    ax.set_ylabel("time")
