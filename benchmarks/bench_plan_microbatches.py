"""plan_microbatches: time per plan, and how much of the capacity the micro-batches leave empty."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from areal.ops.plan_microbatches import plan_microbatches
from benchmarks.measure import interleaved, report, summary


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench plan_microbatches", description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="*", default=[256, 8192, 65536])
    parser.add_argument("--capacity", type=int, default=32768, help="tokens of a micro-batch")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--reference-up-to", type=int, default=8192, help="the Python reference takes seconds beyond")
    arguments = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n in arguments.sequences:
        # Answers of reasoning models: log-normal, with a long tail up to the generation limit.
        lengths = np.clip(rng.lognormal(8.0, 0.8, n), 64, min(28_672, arguments.capacity)).astype(np.int64)
        backends = ["cpp", "torch"] if n <= arguments.reference_up_to else ["cpp"]
        plans = {b: plan_microbatches(lengths, arguments.capacity, world_size=arguments.world_size, backend=b) for b in backends}
        assert all(plan == plans["cpp"] for plan in plans.values())
        totals = [[sum(int(lengths[i]) for i in mb) for mb in rank] for rank in plans["cpp"]]
        lockstep = sum(max(turn) for turn in zip(*totals, strict=True)) * arguments.world_size
        variants = {
            b: lambda b=b, lengths=lengths: plan_microbatches(lengths, arguments.capacity, world_size=arguments.world_size, backend=b)
            for b in backends
        }
        for backend, times in interleaved(variants, rounds=3, warmup=1).items():
            rows.append(
                {"sequences": n, "backend": backend, "microbatches": sum(map(len, totals)), "seconds": summary(times)["best"]}
                | {
                    "fill_%": 100 * int(lengths.sum()) / (sum(map(len, totals)) * arguments.capacity),
                    "lockstep_%": 100 * int(lengths.sum()) / lockstep,
                }
            )
    report("plan_microbatches", rows, capacity=arguments.capacity, world_size=arguments.world_size)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
