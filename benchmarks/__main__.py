"""Benchmarks of the ops and of the whole system.

Ops (`--op`): each bench_<op>.py is checked against the op's reference, then timed against its rivals and its limit. System benchmarks are
called by name and take their own options after `--`: `python -m benchmarks engine -- --rounds 3`. With neither, everything runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

SYSTEM = (
    "agent_endpoint",
    "async_vs_sync",
    "code_reward",
    "engine",
    "evaluation",
    "interruption",
    "math_reward",
    "reward_latency",
    "train_step",
    "weight_sync",
)
DEFAULT_BACKENDS = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton", "cuda")}


def op_names() -> list[str]:
    """The modules bench_<op>.py of this folder, without the system benchmarks."""
    names = {path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")}
    return sorted(names - set(SYSTEM))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"system benchmark ({', '.join(SYSTEM)}) or op")
    parser.add_argument("--list", action="store_true", help="print all names and end")
    ops = parser.add_argument_group("ops")
    ops.add_argument("--op", nargs="+", default=[], metavar="OP", help=f"all, or: {', '.join(op_names())}")
    ops.add_argument("--backends", metavar="A,B", help="of torch, cpp, triton, cuda (default: torch,cpp; on cuda torch,triton,cuda)")
    ops.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are (default: cpu)")
    ops.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    ops.add_argument("--quick", action="store_true", help="fewer timings: a look, not a figure to quote")
    ops.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case later than this; what is left out is said")
    ops.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    ops.add_argument("--plot", type=Path, metavar="FILE", help="draw time over size (PNG, SVG, PDF)")
    return parser


def run_ops(names: list[str], arguments: argparse.Namespace) -> int:
    """Runs the op benchmarks, prints a table an op, writes the files as far as it came; the exit status."""
    import torch

    from benchmarks.measure import machine
    from benchmarks.op_bench import Settings, WrongResult, run_op
    from benchmarks.op_report import table, write_json, write_plot
    from benchmarks.op_timing import FULL, QUICK

    torch.set_num_threads(arguments.threads)
    backends = tuple(arguments.backends.split(",")) if arguments.backends else DEFAULT_BACKENDS[arguments.device]
    deadline = None if arguments.budget is None else time.monotonic() + arguments.budget
    settings = Settings(arguments.device, backends, QUICK if arguments.quick else FULL, deadline)
    facts: dict[str, Any] = {"machine": machine(), "device": arguments.device, "threads": arguments.threads, "quick": arguments.quick}
    rows: list[dict[str, Any]] = []
    error = None
    for name in names:
        start, first = time.perf_counter(), len(rows)
        try:
            for of_case in run_op(name, importlib.import_module(f"benchmarks.bench_{name}").cases, settings):
                rows += of_case
                print(f"{name}: {of_case[0]['case']}, {of_case[0]['phase']}", file=sys.stderr, flush=True)
                if arguments.json:
                    write_json(arguments.json, rows, facts)
        except WrongResult as wrong:
            error = str(wrong)
        print(f"== {name} ({time.perf_counter() - start:.1f} s)\n{table(rows[first:])}\n", flush=True)
        if error is not None:
            break
    if arguments.json:
        write_json(arguments.json, rows, facts | ({} if error is None else {"error": error}))
    if arguments.plot:
        threads = f", {arguments.threads} thread{'s' if arguments.threads > 1 else ''}" if arguments.device == "cpu" else ""
        try:
            write_plot(arguments.plot, rows, f"{facts['machine']['gpu' if arguments.device == 'cuda' else 'cpu']}{threads}")
        except ImportError as missing:
            print(f"no picture: {missing}", file=sys.stderr)
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
    return 0 if error is None else 1


def run_system(name: str, argv: list[str]) -> None:
    print(f"== {name}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    importlib.import_module(f"benchmarks.bench_{name}").main(argv)
    print(f"== {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    known = [*op_names(), *SYSTEM]
    for name in [*arguments.names, *(op for op in arguments.op if op != "all")]:
        if name not in known or (name in arguments.op and name in SYSTEM):
            parser.error(f"there is no benchmark '{name}'; there are the ops {', '.join(op_names())} and the system's {', '.join(SYSTEM)}")
    for backend in (arguments.backends or "torch").split(","):
        if backend not in ("torch", "cpp", "triton", "cuda"):
            parser.error(f"there is no backend '{backend}'; there are torch, cpp, triton, cuda")
    if arguments.threads < 1:
        parser.error("--threads is at least 1")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA device")


def main(argv: list[str]) -> int:
    argv, passed_on = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join([*op_names(), *SYSTEM]))
        return 0
    _check(parser, arguments)
    everything = not arguments.names and not arguments.op
    system = list(SYSTEM) if everything else [name for name in arguments.names if name in SYSTEM]
    ops = [name for name in arguments.names if name not in SYSTEM] + arguments.op
    status = 0
    if ops or everything:
        status = run_ops(op_names() if everything or "all" in ops else list(dict.fromkeys(ops)), arguments)
    for name in system:
        run_system(name, passed_on)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
