"""What a periodic evaluation takes from training: train steps with none, with one that has a share of the slots, with one that has no bound.

The same short training run three ways, with an evaluation in flight all the time (a new one is due at every step):

    none        no evaluation
    share       evaluator.max_concurrent as it is by default: a quarter of the servers' slots
    unbounded   1024 episodes in flight, all of the evaluation's: they stand in the servers' queues before training's requests

on two loads: where training is the slower side (64 slots), and where generation is (16 slots). What counts is trained tokens a second
after the first steps, and the longest wait for a batch. The model is random and stays so (it earns no reward), so that answers keep
their lengths. The runs are interleaved.

    python -m benchmarks evaluation [-- --steps 15 --repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_async_vs_sync import SKIPPED_STEPS, areal_train
from benchmarks.measure import report

LOAD = ["evaluator.every_steps=1", "evaluator.n_prompts=512", "evaluator.gconfig.n_samples=2"]
VARIANTS = {
    "none": ["evaluator.n_prompts=0"],
    "share": LOAD,
    "unbounded": [*LOAD, "evaluator.max_concurrent=1024"],
}
LOADS = {
    "training": [],
    "generation": ["rollout.max_running_requests=16", "actor.ppo_n_minibatches=1"],
}
"""By the side that is the slower one."""


def measure(overrides: Sequence[str], steps: int) -> dict[str, float]:
    """Tokens a second for training and for the evaluation, and waits, after the first steps."""
    with tempfile.TemporaryDirectory() as scratch:
        run = areal_train("examples/arithmetic.yaml", ["warmup=null", f"total_train_steps={steps}", *overrides], Path(scratch), 900)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][SKIPPED_STEPS:]
    seconds = sum(row["step_seconds"] for row in rows)
    return {
        "trained_tokens_per_s": sum(row["tokens_trained"] for row in rows) / seconds,
        "generated_tokens_per_s": sum(row["tokens_generated"] for row in rows) / seconds,
        "seconds_per_step": seconds / len(rows),
        "longest_wait": max(row["wait_seconds"] for row in rows),
        "rollout_busy": statistics.mean(row["rollout_busy"] for row in rows),
        "trainer_busy": statistics.mean(row["trainer_busy"] for row in rows),
    }


def bench(load: str, steps: int, repeats: int) -> list[dict[str, Any]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats):
        for name, overrides in VARIANTS.items():
            results[name].append(row := measure([*LOADS[load], *overrides], steps))
            print(f"{load:10} {name:10} run {repeat}: {row['trained_tokens_per_s']:8.0f} tokens/s", file=sys.stderr, flush=True)
    table = []
    for name, rows in results.items():
        of_none = [row["trained_tokens_per_s"] / none["trained_tokens_per_s"] for row, none in zip(rows, results["none"], strict=True)]
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        table.append(
            {"slower_side": load, "evaluation": name, **medians, "of_none": statistics.median(of_none), "of_none_worst": min(of_none)}
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluation", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    table = [row for load in LOADS for row in bench(load, args.steps, args.repeats)]
    report("evaluation", table, steps=args.steps, repeats=args.repeats)


if __name__ == "__main__":
    main()
