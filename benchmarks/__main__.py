"""python -m benchmarks [NAME ...]: runs benchmarks/bench_NAME.py, all without a name; --list names them; what follows -- goes to them."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path


def names() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main(argv: list[str]) -> int:
    argv, passed_on = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of: " + ", ".join(names()))
    parser.add_argument("--list", action="store_true", help="print the names and end")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(names()))
        return 0
    unknown = [name for name in arguments.names if name not in names()]
    if unknown:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(names())}")
    for name in arguments.names or names():
        print(f"== {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        importlib.import_module(f"benchmarks.bench_{name}").main(passed_on)
        print(f"== {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
