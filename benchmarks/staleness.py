"""The paper's central claim, in small: final accuracy over eta, naive PPO against the decoupled objective.

Every run takes the same number of train steps from the same warmed-up model of its seed, on the arithmetic task, and differs in
``rollout.max_head_offpolicyness`` and in the objective alone. Room for (eta + 1) batches in flight lets generation run ahead as far as eta
allows; what the age of the trained tokens then was is reported beside it. Runs that are in the results file are not run again.

    python -m benchmarks.staleness [--etas 0,1,2,4,8,16] [--variants naive,decoupled] [--seeds 3] [--steps 80] [--rate 1e-3] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_async_vs_sync import areal_train
from benchmarks.measure import RESULTS, machine

CONFIG = "examples/arithmetic.yaml"
UNFILTERED = "actor.behav_filter_cap=null"  # the decoupled objective of the paper, with nothing around it
VARIANTS: dict[str, list[str]] = {
    "naive": ["actor.use_decoupled_loss=false", "actor.recompute_logprob=false"],
    "decoupled": [],
    "unfiltered": [UNFILTERED],
    "unfiltered_cap5": [UNFILTERED, "actor.behav_imp_weight_cap=5"],
    "unfiltered_mask5": [UNFILTERED, "actor.behav_imp_weight_cap=5", "actor.behav_imp_weight_mode=mask"],
    "filter_at_2": ["actor.behav_filter_cap=2"],
    "filter_both_sides": ["actor.behav_filter_cap=2", "actor.behav_filter_side=both"],
    "loglinear": ["actor.prox_logp_method=loglinear"],
}
"""The overrides that make each objective."""


def warmed_up_model(seed: int, cache: Path) -> Path:
    """The model of a seed after supervised warm-up, made once."""
    folder = cache / f"staleness-{seed}"
    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory() as scratch:
            run = areal_train(CONFIG, [f"seed={seed}", "total_train_steps=1", "evaluator.n_prompts=0"], Path(scratch), 3600)
            folder.parent.mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / "final").rename(folder)
    return folder


def run_once(variant: str, eta: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training run: accuracy on held-out prompts before and after, and how old its tokens were."""
    model = warmed_up_model(seed, args.cache)
    overrides = [
        f"seed={seed}",
        "warmup=null",
        "actor.init_from_scratch=null",
        f"actor.path={model}",
        f"total_train_steps={args.steps}",
        f"rollout.max_head_offpolicyness={eta}",
        f"rollout.max_concurrent_rollouts={32 * (eta + 1)}",
        f"actor.ppo_n_minibatches={args.minibatches}",
        f"actor.optimizer.muon_lr={args.rate}",
        "evaluator.n_prompts=1024",
        *VARIANTS[variant],
        *args.override,
    ]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        run = areal_train(CONFIG, overrides, Path(scratch), 3600)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
    late = rows[len(rows) // 2 :]
    means = (
        "staleness_mean",
        "importance_weight_mean",
        "kl_behaviour",
        "clip_fraction",
        "filtered_fraction",
        "truncated_fraction",
        "entropy",
    )
    return {
        **key_of(variant, eta, seed, args),
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "lowest_reward": min(statistics.mean(r["reward"] for r in rows[i : i + 10]) for i in range(0, len(rows) - 9, 5)),
        **{name: mean([r.get(name) for r in late]) for name in means},
        "staleness_max": summary["max_staleness_trained"],
        "dropped": summary["dropped"],
        "seconds": time.monotonic() - begin,
    }


def mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None


def key_of(variant: str, eta: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    settings = {"steps": args.steps, "rate": args.rate, "minibatches": args.minibatches, "override": args.override}
    return {"variant": variant, "eta": eta, "seed": seed, **settings}


def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs asked for, seed by seed, so that what is there early has every eta; kept in the results file as they come."""
    kept = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    wanted = []
    for seed in range(args.seeds):
        for eta in args.etas:
            for variant in args.variants:
                key = key_of(variant, eta, seed, args)
                wanted.append(key)
                if any(key.items() <= row.items() for row in kept):
                    continue
                row = run_once(variant, eta, seed, args)
                kept.append(row)
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({"machine": machine(), "rows": kept}, indent=1) + "\n")
                print(
                    f"seed {seed} eta {eta:2} {variant:16} {row['accuracy_before']:.3f} -> {row['accuracy_after']:.3f}, tokens "
                    f"{row['staleness_mean']:.1f} versions old, {row['seconds']:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return [row for key in wanted for row in kept if key.items() <= row.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of each variant and eta."""
    lines = ["| objective | eta | age of tokens | accuracy, mean +- std over seeds | lowest | seeds |", "|---|---|---|---|---|---|"]
    for variant in dict.fromkeys(r["variant"] for r in rows):
        for eta in dict.fromkeys(r["eta"] for r in rows):
            of = [r for r in rows if r["variant"] == variant and r["eta"] == eta]
            if of:
                values = [r["accuracy_after"] for r in of]
                age = statistics.mean(r["staleness_mean"] for r in of)
                spread = statistics.pstdev(values)
                lines.append(
                    f"| {variant} | {eta} | {age:.1f} | {statistics.mean(values):.3f} +- {spread:.3f} | {min(values):.3f} | {len(of)} |"
                )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    etas = sorted({r["eta"] for r in rows})
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    for index, variant in enumerate(variants):
        shift = 0.06 * (index - (len(variants) - 1) / 2)
        of = {eta: [r["accuracy_after"] for r in rows if r["variant"] == variant and r["eta"] == eta] for eta in etas}
        places = [etas.index(eta) + shift for eta, values in of.items() if values]
        values = [v for v in of.values() if v]
        spread = [statistics.pstdev(v) for v in values]
        line = axes.errorbar(
            places, [statistics.mean(v) for v in values], yerr=spread, marker="o", capsize=3, label=variant.replace("_", ", ")
        )
        for place, points in zip(places, values, strict=True):
            axes.plot([place] * len(points), points, ".", color=line.lines[0].get_color(), alpha=0.4, markersize=5)
    axes.set_xticks(range(len(etas)), [str(eta) for eta in etas])
    axes.set_xlabel("eta (largest age of a token, in versions)")
    axes.set_ylabel("accuracy on held-out prompts")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--etas", default="0,1,2,4,8,16", type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--variants", default="naive,decoupled", type=lambda s: s.split(","), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=1e-3, help="of Muon (actor.optimizer.muon_lr)")
    parser.add_argument("--minibatches", type=int, default=2, help="actor.ppo_n_minibatches")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="further settings of every run")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "areal-bench-models", help="where warmed-up models are kept"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "staleness.json")
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args(argv)
    for variant in args.variants:
        if variant not in VARIANTS:
            parser.error(f"there is no variant '{variant}'; there are {', '.join(VARIANTS)}")
    rows = bench(args)
    print(table(rows))
    if args.plot:
        plot(rows, args.plot, f"arithmetic, {args.steps} steps, Muon at {args.rate:g}, {args.minibatches} mini-batches, {args.seeds} seeds")


if __name__ == "__main__":
    main()
