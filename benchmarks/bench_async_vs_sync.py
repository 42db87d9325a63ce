"""Asynchronous training against synchronous training, on the same cores and the same task.

Three ways to run the same train steps:

    async       one core generates, one core trains, eta > 0
    eta0        the same placement with eta = 0: each side waits for the other
    sync_*      the fair rival: eta = 0, and each phase has all the cores: an engine on every core, then all cores train, by threads of one
                rank (sync_threads) or by a rank on every core (sync_ranks); the faster of the two counts

on three workloads: short answers, a long tail of answer lengths, and short answers whose reward takes a second. Every run starts from the
same warmed-up model. What counts is trained tokens a second after the first steps; the runs of a workload are interleaved.

    python -m benchmarks async_vs_sync [--workloads short,long_tail,latency] [--steps 25] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from areal.tasks.arithmetic import arithmetic_reward
from benchmarks.measure import RESULTS, report

ROOT = Path(__file__).resolve().parents[1]
SKIPPED_STEPS = 5
LATENCY_SECONDS = 1.0


async def slow_reward(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    """The task's reward behind a service that takes a second to answer."""
    await asyncio.sleep(LATENCY_SECONDS)
    return arithmetic_reward(prompt, completions, prompt_ids, completion_ids, **row)


WORKLOADS: dict[str, tuple[str, list[str]]] = {
    "short": ("examples/arithmetic.yaml", []),
    "long_tail": ("examples/arithmetic_long.yaml", []),
    # Room for the groups that wait for their scores; with eta = 0 only a batch's are ever in flight.
    "latency": (
        "examples/arithmetic.yaml",
        ["reward_fn=benchmarks.bench_async_vs_sync:slow_reward", "rollout.max_concurrent_rollouts=128"],
    ),
}


def placements(n_cores: int, eta: int) -> dict[str, list[str]]:
    half = max(1, n_cores // 2)
    split = [f"rollout.backend=embedded:d{half}", "rollout.threads=1", f"actor.threads={n_cores - half}", "actor.backend=fsdp:d1"]
    phases = [f"rollout.backend=embedded:d{n_cores}", "rollout.threads=1", "rollout.max_head_offpolicyness=0"]
    return {
        "async": [*split, f"rollout.max_head_offpolicyness={eta}"],
        "eta0": [*split, "rollout.max_head_offpolicyness=0"],
        "sync_threads": [*phases, f"actor.threads={n_cores}", "actor.backend=fsdp:d1"],
        "sync_ranks": [*phases, "actor.threads=1", f"actor.backend=fsdp:d{n_cores}"],
    }


def areal_train(config: str, overrides: Sequence[str], folder: Path, timeout: float) -> Path:
    """Runs ``areal train`` to its end; returns the run's folder."""
    command = [
        sys.executable,
        "-m",
        "areal",
        "train",
        config,
        f"stats_logger.fileroot={folder}",
        "stats_logger.tensorboard=false",
        *overrides,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, "NO_COLOR": "1"}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Path(done.stdout.strip().splitlines()[-1]).parent


def warmed_up_model(config: str, cache: Path) -> Path:
    """The workload's model after supervised warm-up, made once."""
    folder = cache / Path(config).stem
    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory() as scratch:
            run = areal_train(config, ["total_train_steps=1", "evaluator.n_prompts=0"], Path(scratch), 1800)
            folder.parent.mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / "final").rename(folder)
    return folder


def measure(config: str, overrides: Sequence[str], model: Path, steps: int) -> dict[str, float]:
    """Trained and generated tokens a second, and how busy each side was, after the first steps."""
    with tempfile.TemporaryDirectory() as scratch:
        fixed = [
            "warmup=null",
            "actor.init_from_scratch=null",
            f"actor.path={model}",
            "evaluator.n_prompts=0",
            f"total_train_steps={steps}",
        ]
        run = areal_train(config, [*fixed, *overrides], Path(scratch), 1800)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][SKIPPED_STEPS:]
        summary = json.loads((run / "summary.json").read_text())
    seconds = sum(row["step_seconds"] for row in rows)
    return {
        "tokens_per_s": sum(row["tokens_trained"] for row in rows) / seconds,
        "seconds_per_step": seconds / len(rows),
        "rollout_busy": statistics.mean(row["rollout_busy"] for row in rows),
        "trainer_busy": statistics.mean(row["trainer_busy"] for row in rows),
        "staleness_mean": statistics.mean(row["staleness_mean"] for row in rows),
        "length": statistics.mean(row["length"] for row in rows),
        "max_staleness": summary["max_staleness_trained"],
    }


def bench(workload: str, steps: int, repeats: int, eta: int, cache: Path) -> list[dict[str, Any]]:
    config, overrides = WORKLOADS[workload]
    model = warmed_up_model(config, cache)
    results: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        for name, placement in placements(os.cpu_count() or 2, eta).items():
            row = measure(config, [*overrides, *placement], model, steps)
            results.setdefault(name, []).append(row)
            print(f"{workload:10} {name:6} run {repeat}: {row['tokens_per_s']:8.0f} tokens/s", file=sys.stderr, flush=True)
    rivals = {name: statistics.median(r["tokens_per_s"] for r in rows) for name, rows in results.items()}
    table = []
    for name, rows in results.items():
        speeds = [r["tokens_per_s"] for r in rows]
        row = {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        row |= {"tokens_per_s_min": min(speeds), "tokens_per_s_max": max(speeds)}
        table.append({"workload": workload, "placement": name, **row, "async_is_faster_by": rivals["async"] / rivals[name]})
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks async_vs_sync", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eta", type=int, default=4)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "areal-bench-models", help="where warmed-up models are kept"
    )
    args = parser.parse_args(argv)
    workloads = args.workloads.split(",")
    table = [row for workload in workloads for row in bench(workload, args.steps, args.repeats, args.eta, args.cache)]
    earlier = RESULTS / "async_vs_sync.json"
    if earlier.exists():  # the workloads that were not run again
        table = [row for row in json.loads(earlier.read_text())["rows"] if row["workload"] not in workloads] + table
    report("async_vs_sync", table, steps=args.steps, repeats=args.repeats, eta=args.eta)


if __name__ == "__main__":
    main()
