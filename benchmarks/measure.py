"""What benchmarks share: interleaved timing, the machine's description, a table on stdout and JSON in benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(variants: Mapping[str, Callable[[], object]], *, rounds: int = 9, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, the variants taking turns so that a slow spell of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Best, median, quartiles and spread (interquartile range) in seconds."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    q1, _, q3 = quartiles
    return {"best": min(seconds), "median": statistics.median(seconds), "q1": q1, "q3": q3, "spread": q3 - q1}


def machine() -> dict[str, Any]:
    """The hardware, the versions and the commit that figures belong to."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
    }


def _commit() -> str | None:
    """What git calls this tree, with "-dirty" where it was changed; None outside of a checkout."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or None


def report(name: str, rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    """``print_table`` and ``write_results``."""
    print_table(rows)
    write_results(name, rows, **extra)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """All have the same keys."""
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    print("  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)))
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def write_results(name: str, rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    """``rows`` with ``extra`` and the machine, to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **extra, "rows": rows}, indent=1) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
