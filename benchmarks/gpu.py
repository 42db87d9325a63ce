"""`make bench-gpu`: build, GPU tests, the train step and all op benchmarks on a GPU, in one go and within a time budget.

Nothing is downloaded: the package is installed with --no-deps and --no-build-isolation into the Python that runs this. Each op runs in a
process of its own, since an error on the device leaves no CUDA context to go on with. Results, as far as they came, are in
benchmarks/results/ops_gpu.{json,md,png} and train_step_cuda.json; the exit status is 1 if the build, a test or a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from benchmarks.__main__ import op_names
from benchmarks.measure import RESULTS, machine
from benchmarks.op_report import markdown, write_json, write_plot

ROOT = Path(__file__).parent.parent
TESTS_SHARE = 0.45  # of what the build left
TRAIN_SHARE = 0.5  # of what the tests left
TRAIN_NEEDS = ("transformers", "pydantic", "safetensors", "aiohttp")
TEST_PROCESSES = 4  # the largest test holds some 10 GiB of the device
GRACE = 20.0  # seconds that a case begun in time may go on


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="for everything (default: 480)")
    parser.add_argument("--op", nargs="+", default=[], metavar="OP", help="these ops only")
    parser.add_argument("--quick", action="store_true", help="fewer timings")
    parser.add_argument("--no-build", action="store_true", help="take areal as it is installed")
    parser.add_argument("--no-tests", action="store_true", help="leave pytest -m gpu out")
    parser.add_argument("--no-train", action="store_true", help="leave the train step out")
    parser.add_argument("--cuda", default="AUTO", choices=("AUTO", "ON", "OFF"), help="AREAL_CUDA of the build")
    arguments = parser.parse_args(argv)
    if reason := no_gpu():
        print(f"error: bench-gpu needs a CUDA device, and {reason}", file=sys.stderr)
        return 1
    deadline = time.monotonic() + arguments.budget
    facts: dict[str, Any] = {"machine": machine(), "device": "cuda", "quick": arguments.quick}
    failures = []
    if not arguments.no_build and not build(facts, arguments.cuda, deadline - time.monotonic()):
        return 1
    if not arguments.no_tests and not run_tests(facts, TESTS_SHARE * (deadline - time.monotonic())):
        failures.append("pytest -m gpu")
    if not arguments.no_train and not arguments.op and not run_train_step(facts, TRAIN_SHARE * (deadline - time.monotonic())):
        failures.append("train_step")
    rows, failed = run_benchmarks(arguments.op or op_names(), deadline, arguments.quick)
    write_results(rows, facts)
    failures += failed
    if failures:
        print(f"error: failed: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


def no_gpu() -> str | None:
    """Why there is nothing to measure on, or None."""
    try:
        import torch
    except ModuleNotFoundError:
        return f"{sys.executable} has no torch; hint: make bench-gpu PYTHON=/path/to/python"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} of {sys.executable} finds none"


def build(facts: dict[str, Any], cuda: str, seconds: float) -> bool:
    """Installs the package, in place where it is installed in place already."""
    print("== build", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    command += [f"--config-settings=cmake.define.AREAL_CUDA={cuda}", *(["-e"] if installed_in_place() else []), "."]
    status, facts["build_seconds"] = timed(command, seconds)
    if status is None:
        print(f"error: the build took more than {seconds:.0f} s", file=sys.stderr)
    elif status:
        print(f"error: the build failed with status {status}: {' '.join(command)}", file=sys.stderr)
    return status == 0


def installed_in_place() -> bool:
    try:
        origin = distribution("areal-async").read_text("direct_url.json")
    except PackageNotFoundError:
        return False
    return bool(origin and json.loads(origin).get("dir_info", {}).get("editable"))


def run_tests(facts: dict[str, Any], seconds: float) -> bool:
    print(f"== pytest -m gpu, up to {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
        if importlib.util.find_spec("xdist") is not None:  # most of the time goes to Triton's compiler, on one core
            command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
        status, facts["test_seconds"] = timed(command, seconds, log)
        lines = log.read_text(errors="replace").splitlines()
    # All of it goes to the terminal; the closing line to the results.
    print("\n".join(lines), flush=True)
    facts["tests"] = f"stopped after {seconds:.0f} s" if status is None else (lines[-1].strip("= ") if lines else f"status {status}")
    return status == 0


def run_train_step(facts: dict[str, Any], seconds: float, device: str = "cuda") -> bool:
    """Its parts that need no run of several processes, the first ones surely; whether nothing failed."""
    if missing := [name for name in TRAIN_NEEDS if importlib.util.find_spec(name) is None]:
        facts["train_step"] = f"not run: {missing[0]} is not installed"
        print(f"== train_step {facts['train_step']}", flush=True)
        return True
    print(f"== train_step, up to {seconds:.0f} s", flush=True)
    command = [sys.executable, "-m", "benchmarks", "train_step", "--", "--device", device, "--quick", "--parts", "rival,memory,packing"]
    status, facts["train_step_seconds"] = timed(command, seconds)
    facts["train_step"] = f"stopped after {seconds:.0f} s" if status is None else f"status {status}"
    return not status


def run_benchmarks(ops: list[str], deadline: float, quick: bool, device: str = "cuda") -> tuple[list[dict[str, Any]], list[str]]:
    """Each op gets an equal share of the time that is left. The rows, and the ops that failed."""
    ops = [op for op in ops if device in devices_of(op)]
    rows: list[dict[str, Any]] = []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for i, op in enumerate(ops):
            left = deadline - time.monotonic()
            share = max(0.0, left / (len(ops) - i))
            if share < 1.0:
                rows.append(not_run(op, "the time was spent before it began"))
                continue
            result = Path(folder) / f"{op}.json"
            command = [sys.executable, "-m", "benchmarks", "--op", op, "--device", device]
            command += ["--json", str(result), "--budget", f"{share:.1f}", *(["--quick"] if quick else [])]
            status, _ = timed(command, min(share + GRACE, max(left, share)))
            found = json.loads(result.read_text()) if result.exists() else {"rows": []}
            rows += found["rows"]
            if status is None:
                rows.append(not_run(op, f"stopped: a case begun within its {share:.0f} s did not end"))
            elif status:
                failed.append(op)
                rows.append(not_run(op, found.get("error", f"ended with status {status}; its message is in the output")))
    return rows, failed


def devices_of(op: str) -> tuple[str, ...]:
    """Where an op's benchmark has cases: its DEVICES. One that cannot even be imported fails in its own process, with its message."""
    try:
        return getattr(importlib.import_module(f"benchmarks.bench_{op}"), "DEVICES", ("cpu", "cuda"))
    except ImportError:
        return ("cpu", "cuda")


def not_run(op: str, reason: str) -> dict[str, Any]:
    return {"op": op, "case": "the rest", "phase": "", "variant": "all", "not_run": " ".join(reason.split())}


def timed(command: list[str], seconds: float, log: Path | None = None) -> tuple[int | None, float]:
    """The exit status, None if it was stopped (with all its children) after ``seconds``; and how long it took."""
    start = time.monotonic()
    with contextlib.nullcontext() if log is None else open(log, "w") as output:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what a stopped command said must not be lost
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, round(time.monotonic() - start, 1)


def write_results(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    write_json(RESULTS / "ops_gpu.json", rows, facts)
    (RESULTS / "ops_gpu.md").write_text(markdown(rows, facts["machine"]))
    try:
        write_plot(RESULTS / "ops_gpu.png", rows, str(facts["machine"]["gpu"]))
    except ImportError as missing:
        print(f"no picture: {missing}", file=sys.stderr)
    print(f"results: {RESULTS / 'ops_gpu.json'}, .md, .png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
