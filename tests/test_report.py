"""The report: interval arithmetic against brute force, and pictures of whole, short, killed and strange runs."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal.config import ConfigError
from areal.report import draw_report, load_run
from areal.report_timeline import busy, clip, covered, exclusive, load_timeline, minus, union

pairs = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda p: (p[0], p[0] + p[1])), max_size=12)


def cells(spans: Any) -> set[int]:
    return {x for s, e in spans for x in range(int(s), int(e))}


def array(spans: Any) -> np.ndarray:
    return np.array(spans, float).reshape(-1, 2)


@given(pairs, pairs)
def test_interval_arithmetic(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    ua, ub = union(array(a)), union(array(b))
    assert cells(ua) == cells(a)
    assert (ua[1:, 0] > ua[:-1, 1]).all(), "disjoint and sorted"
    assert cells(minus(ua, ub)) == cells(a) - cells(b)
    assert cells(clip(ua, 5, 20)) == cells(a) & set(range(5, 20))
    edges = np.arange(0.0, 56.0, 7.0)
    expected = [len(cells(a) & set(range(lo, lo + 7))) for lo in range(0, 49, 7)]
    np.testing.assert_allclose(covered(ua, edges), expected, atol=1e-9)


@given(pairs, pairs, pairs)
def test_lanes_without_overlaps(generation: list[tuple[int, int]], sync: list[tuple[int, int]], waiting: list[tuple[int, int]]) -> None:
    kinds = {"generation": union(array(generation)), "weight_sync": union(array(sync)), "waiting": union(array(waiting))}
    parts = exclusive(kinds)
    assert cells(parts["weight_sync"]) == cells(sync), "drawn last, seen whole"
    assert cells(parts["generation"]) == cells(generation) - cells(sync)
    assert cells(parts["waiting"]) == cells(waiting) - cells(sync) - cells(generation)
    assert cells(busy(kinds)) == cells(generation) | cells(sync)


def test_lanes_in_reading_order() -> None:
    names = ["trainer 1", "controller", "rollout 10", "reward", "rollout 2", "trainer 0", "something else"]
    timeline = load_timeline({"actor": name, "kind": "train", "start": 5.0, "end": 6.0} for name in names)
    assert timeline is not None
    assert list(timeline.lanes) == ["rollout 2", "rollout 10", "reward", "trainer 0", "trainer 1", "controller", "something else"]
    assert timeline.origin == 5.0 and list(timeline.lanes["trainer 0"]) == ["training"]
    assert load_timeline([]) is None


def write_run(
    folder: Path, steps: int, *, rollouts: int = 1, with_timeline: bool = True, finished: bool = True, warmup: bool = True
) -> None:
    """A run as the controller writes it, with invented numbers."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    clock, metrics, spans = 1.7e9, [], []
    if warmup:
        spans.append({"actor": "trainer 0", "kind": "training", "start": clock, "end": clock + 8})
        write_lines(folder / "warmup.jsonl", [{"time": clock + t, "step": 50 * t, "loss": 1.0} for t in range(9)])
        clock += 9
    for step in range(1, steps + 1):
        begin, wait, train = clock, 0.05 * rng.random(), 0.2
        clock += wait + train
        spans.append({"actor": "trainer 0", "kind": "waiting", "start": begin, "end": begin + wait})
        spans.append({"actor": "trainer 0", "kind": "training", "start": begin + wait, "end": clock})
        for r in range(rollouts):
            spans.append({"actor": f"rollout {r}", "kind": "generation", "start": begin, "end": clock})
            spans.append({"actor": f"rollout {r}", "kind": "weight_sync", "start": clock, "end": clock + 0.01})
        spans.append({"actor": "reward", "kind": "reward", "start": begin + 0.1, "end": begin + 0.12})
        metrics.append(
            {"time": clock, "step": step, "reward": rng.random(), "accuracy": rng.random(), "length": 20.0, "length_max": 40, "staleness_mean": 0.5,
             "staleness_max": 2, "gen_tokens_per_s": 2e4, "train_tokens_per_s": 2e4, "rollout_busy": 0.9, "trainer_busy": 0.8, "step_seconds": 0.22,
             "logprob_drift_max": 1e-6 if step % 3 else None, "logprob_drift_mean": 1e-8 if step % 3 else None, "dropped": {}}
        )  # fmt: skip
    write_lines(folder / "metrics.jsonl", metrics)
    if with_timeline:
        write_lines(folder / "timeline.jsonl", spans)
    (folder / "config.yaml").write_text(
        "experiment_name: a\ntrial_name: b\nrollout: {max_head_offpolicyness: 2}\nstats_logger: {logprob_drift_bound: 1.0e-4}\n"
    )
    if finished:
        evaluations = [
            {"time": clock, "when": w, "step": s, "accuracy": a, "length": 20.0} for w, s, a in (("before", 0, 0.5), ("after", steps, 0.9))
        ]
        write_lines(folder / "evaluations.jsonl", evaluations)
        summary = {
            "accuracy_before": 0.5,
            "accuracy_after": 0.9,
            "length_before": 17.0,
            "length_after": 20.0,
            "seconds_rl": 2.0,
            "dropped": {"x": 1},
        }
        (folder / "summary.json").write_text(json.dumps(summary))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 30},
        {"steps": 30, "rollouts": 4},
        {"steps": 1},
        {"steps": 2, "warmup": False},
        {"steps": 5, "finished": False},
        {"steps": 5, "with_timeline": False},
    ],
    ids=str,
)
def test_pictures(tmp_path: Path, options: dict[str, Any]) -> None:
    run = tmp_path / "run"
    write_run(run, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (path,) = draw_report(run)
    width, height = png_size(path)
    assert path == run / "report.png" and width == 1650 and height > 700
    assert path.stat().st_size > 30_000


def test_more_servers_make_a_taller_picture(tmp_path: Path) -> None:
    heights = []
    for rollouts in (1, 4):
        write_run(tmp_path / str(rollouts), 10, rollouts=rollouts)
        heights.append(png_size(draw_report(tmp_path / str(rollouts), tmp_path / "out")[0])[1])
    assert heights[1] > heights[0] + 200


def test_values_that_were_never_known(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    rows = [{"time": 1.7e9 + i, "step": i + 1, "reward": None, "accuracy": None} for i in range(3)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_report(tmp_path)


def test_run_that_was_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    write_run(tmp_path, 10, finished=False)
    for name in ("metrics.jsonl", "timeline.jsonl"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-20])
    assert len(load_run(tmp_path).metrics) == 9
    draw_report(tmp_path)


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it has no metrics.jsonl"):
        draw_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"has not finished a train step yet"):
        draw_report(tmp_path)


def test_phases_cover_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, 10)
    timeline = load_run(tmp_path).timeline
    assert timeline is not None
    names = [name for name, _, _ in timeline.phases]
    assert names == ["warm-up", "evaluation", "reinforcement learning", "evaluation"]
    assert timeline.phases[0][1] == 0.0 and timeline.phases[-1][2] == timeline.end
    for (_, _, end), (_, begin, _) in zip(timeline.phases, timeline.phases[1:], strict=False):
        assert end == begin


def test_command_prints_the_path_and_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3)
    code = f"import sys, areal.cli; r = areal.cli.main(['report', {str(tmp_path / 'run')!r}, '--out', {str(tmp_path / 'out')!r}]); assert 'torch' not in sys.modules; sys.exit(r)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100)
    assert out.stdout == f"{tmp_path / 'out' / 'report.png'}\n"
    assert not (tmp_path / "run" / "report.png").exists()
