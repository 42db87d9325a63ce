"""The frame of the op benchmarks, run for real on tiny cases."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from areal.ops._dispatch import BackendUnavailable
from benchmarks.__main__ import SYSTEM, main, make_parser, op_names, run_ops
from benchmarks.bench_decode_attention import close as close_attention
from benchmarks.op_bench import Bytes, Case, Products, Rival, Seconds, Settings, run_op
from benchmarks.op_report import markdown, table, write_plot
from benchmarks.op_timing import LONGEST_LEAD, QUICK, peak_memory, time_interleaved, writes_before

SETTINGS = Settings(effort=QUICK)
FIGURES = {
    "size",
    "is_reference",
    "median",
    "best",
    "spread",
    "timings",
    "peak_memory",
    "times_reference",
    "limit",
    "achieved",
    "target",
    "met",
}


def sum_case(n: int = 4096, *, limit: Any = None, target: float | None = None, check: Any = None, **more: Callable[[], object]) -> Case:
    x = torch.randn(n)
    variants: dict[str, Callable[[], object]] = {"torch": x.sum, "cpp": lambda: x.view(-1, 8).sum(0).sum(), **more}
    return Case(f"n {n}", n, variants, check, "torch", limit, target)


def rows_of(*cases: Case, settings: Settings = SETTINGS) -> list[dict[str, Any]]:
    return [row for rows in run_op("tiny", lambda device, backends: iter(cases), settings) for row in rows]


def arguments(tmp_path: Path, *argv: str) -> argparse.Namespace:
    return make_parser().parse_args(["--quick", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"), *argv])


def install(monkeypatch: pytest.MonkeyPatch, cases: Callable[[str, Sequence[str]], Iterator[Case]]) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.bench_tiny", SimpleNamespace(cases=cases))  # type: ignore[misc]


def test_table_json_and_picture_of_a_correct_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
        assert device == "cpu" and list(backends) == ["torch", "cpp"]
        for n in (2**10, 2**12):
            yield sum_case(n, limit=Rival("torch", 0.001))

    install(monkeypatch, cases)
    assert run_ops(["tiny"], arguments(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "n 1024" in printed and "n 4096" in printed and "yes" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["threads"] == 1 and "error" not in written
    assert [(row["op"], row["case"], row["variant"]) for row in written["rows"]] == [
        ("tiny", f"n {n}", variant) for n in (1024, 4096) for variant in ("torch", "cpp")
    ]
    assert all(row.keys() >= FIGURES for row in written["rows"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_a_wrong_variant_ends_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
        yield sum_case(1024)
        yield sum_case(2048, rival=lambda: torch.tensor(1e9))
        raise AssertionError("the run went on")

    install(monkeypatch, cases)
    assert run_ops(["tiny", "tiny"], arguments(tmp_path)) == 1
    assert "error: tiny, n 2048, forward: the result of 'rival' is not that of 'torch'" in capsys.readouterr().err
    written = json.loads((tmp_path / "out.json").read_text())
    assert {row["case"] for row in written["rows"]} == {"n 1024"} and "'rival'" in written["error"]


def test_what_cannot_run_is_a_row_with_its_reason() -> None:
    def raising(error: Exception) -> Callable[[], object]:
        def call() -> object:
            raise error

        return call

    case = sum_case(
        cuda=raising(BackendUnavailable("areal._C was built without CUDA")),
        liger=raising(ModuleNotFoundError("No module named 'liger_kernel'")),
        eager=raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB.")),
    )
    rows = rows_of(case, settings=Settings(backends=("torch", "cpp", "triton", "cuda"), effort=QUICK))
    reasons = {row["variant"]: row["not_run"] for row in rows if "not_run" in row}
    assert reasons.keys() == {"cuda", "liger", "eager", "triton"}
    assert "without CUDA" in reasons["cuda"] and "liger_kernel" in reasons["liger"] and "out of memory" in reasons["eager"]
    assert "no such variant" in reasons["triton"]
    assert "not run: areal._C was built without CUDA" in table(rows) and "not run: No module" in markdown(rows, {"cpu": "x"})


def test_nothing_is_timed_without_a_reference_to_check_it() -> None:
    case = sum_case()

    def missing() -> object:
        raise BackendUnavailable("no torch today")

    case.variants["torch"] = missing
    rows = rows_of(case)
    assert ["not_run" in row for row in rows] == [True, True] and "unchecked" in rows[1]["not_run"]
    case.reference = "nobody"
    with pytest.raises(ValueError, match="reference 'nobody' is not among"):
        rows_of(case)


def test_the_reference_checks_even_where_it_is_not_asked_for() -> None:
    rows = rows_of(sum_case(), settings=Settings(backends=("cpp",), effort=QUICK))
    assert [row["variant"] for row in rows] == ["cpp"] and rows[0]["times_reference"] is None
    rows = rows_of(sum_case(limit=Rival("torch", 2.0)), settings=Settings(backends=("cpp",), effort=QUICK))
    assert [row["variant"] for row in rows] == ["torch", "cpp"]  # the limit is its time


def test_shares_of_measured_limits() -> None:
    left, right = torch.randn(64, 96), torch.randn(96, 32)
    products = {"torch": lambda: left @ right, "cpp": lambda: left @ right}
    shape = ((64, 96, 32),)
    by_products, _ = reversed(rows_of(Case("mm", 1, products, None, "torch", Products(shape, torch.float32), 0.01)))
    assert 0.05 < by_products["achieved"] < 5 and by_products["met"] and by_products["limit_flops"] == 2 * 64 * 96 * 32

    source, target = torch.randn(2**22), torch.empty(2**22)
    copies = {"torch": lambda: target.copy_(source), "cpp": lambda: target.copy_(source), "cpp avx2": lambda: target.copy_(source)}
    case = Case("copy", 1, copies, None, "torch", Bytes(2 * source.nbytes), 1e9)
    by_bytes = {row["variant"]: row for row in rows_of(case)}
    assert all(0.05 < row["achieved"] < 20 for row in by_bytes.values())
    # The target is for what users get: neither the reference nor a forced instruction set.
    assert {name: row["met"] for name, row in by_bytes.items()} == {"torch": None, "cpp": False, "cpp avx2": None}


def test_targets_over_a_rival_and_a_fixed_time() -> None:
    slow = sum_case(limit=Rival("slow", 5.0), slow=lambda: (time.sleep(0.003), torch.zeros(()))[1], check=lambda *_: None)
    cpp = next(row for row in rows_of(slow) if row["variant"] == "cpp")
    rival = next(row for row in rows_of(slow) if row["variant"] == "slow")
    assert cpp["achieved"] > 5 and cpp["target"] == 5.0 and cpp["met"] and rival["met"] is None
    assert rival["limit"] == pytest.approx(rival["median"] / 5)
    fixed = rows_of(sum_case(limit=Seconds(1e-9), target=1.0))[1]
    assert fixed["limit"] == 1e-9 and fixed["met"] is False


def test_no_case_begins_after_the_deadline() -> None:
    rows = rows_of(sum_case(1024), sum_case(2048), settings=Settings(effort=QUICK, deadline=time.monotonic() - 1))
    assert len(rows) == 1 and rows[0]["case"] == "from n 1024 on" and "time was spent" in rows[0]["not_run"]
    assert "no cases" in rows_of()[0]["not_run"]


def test_a_check_without_memory_is_a_row_and_the_next_case_runs() -> None:
    def check(result: object, expected: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30 GiB.")

    rows = rows_of(sum_case(64, check=check), sum_case(128))
    assert rows[0]["not_run"] == "out of memory: CUDA out of memory" and rows[0]["case"] == "n 64"
    assert [row["case"] for row in rows[1:]] == ["n 128"] * 2


def test_the_device_is_busy_while_a_call_is_enqueued() -> None:
    assert writes_before(1e-6, 150e-6) == 1
    assert writes_before(2e-3, 150e-6) * 150e-6 >= 2e-3
    assert writes_before(5.0, 150e-6) * 150e-6 <= LONGEST_LEAD + 150e-6


def test_small_averages_are_not_close_to_zero() -> None:
    average = torch.randn(8, 4, 128).mul(0.01).bfloat16()  # what attention over thousands of random values gives
    close_attention(average, average)
    with pytest.raises(AssertionError, match="of a head's norm"):
        close_attention(torch.zeros_like(average), average)


def test_calls_take_turns_and_slow_ones_fewer() -> None:
    order: list[str] = []
    calls = {"fast": lambda: order.append("fast"), "slow": lambda: (time.sleep(0.02), order.append("slow"))}
    times = time_interleaved(calls, "cpu", QUICK)
    assert 3 <= len(times["slow"]) < 10 < len(times["fast"])
    assert min(times["slow"]) >= 0.02 and max(times["fast"]) < 0.01
    measured = order[order.index("slow") :]
    middle = len(measured) // 2
    assert "slow" in measured[:middle] and "slow" in measured[middle:]


def test_peak_memory_of_a_call() -> None:
    def call() -> None:
        torch.ones(2**22).mul_(2).sum()  # 16 MiB

    call()
    peak = peak_memory(call, "cpu")
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 15 * 2**20 < peak < 20 * 2**20
    assert (peak_memory(lambda: None, "cpu") or 0) < 2**20


def test_memory_is_held_against_its_bound() -> None:
    case = sum_case(2**20)
    case.most_memory = 2**50
    rows = rows_of(case)
    if rows[0]["peak_memory"] is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert f"<= {2**30}" in table(rows)
    assert "> 0" in table([row | {"most_memory": 0, "peak_memory": 2**20} for row in rows])


def test_pictures_of_one_size_and_of_nothing(tmp_path: Path) -> None:
    write_plot(tmp_path / "one.png", rows_of(sum_case(limit=Seconds(1e-6)), sum_case(check=None)), "one size twice")
    assert (tmp_path / "one.png").stat().st_size > 10_000
    write_plot(tmp_path / "none.png", [], "nothing")
    assert not (tmp_path / "none.png").exists()


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [*op_names(), *SYSTEM] and "weights_hash" in op_names()
    for argv, message in {
        ("--op", "nope"): "no benchmark 'nope'",
        ("nope",): "no benchmark 'nope'",
        ("--op", "engine"): "no benchmark 'engine'",
        ("--op", "weights_hash", "--backends", "cpp,gpu"): "no backend 'gpu'",
        ("--threads", "0"): "--threads is at least 1",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(list(argv))
        assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--op", "weights_hash", "--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_clock_limit_and_memory_on_a_gpu() -> None:
    source = torch.zeros(2**28, dtype=torch.int8, device="cuda")
    target = torch.zeros_like(source)
    variants = {"torch": lambda: target.copy_(source), "cuda": lambda: target.copy_(source)}
    case = Case("copy", 1, variants, None, "torch", Bytes(2 * source.nbytes), 0.5)
    settings = Settings(device="cuda", backends=("torch", "cuda"), effort=QUICK)
    cuda = rows_of(case, settings=settings)[1]
    assert 0.5 < cuda["achieved"] < 1.5 and cuda["met"] and cuda["peak_memory"] == 0
    assert peak_memory(lambda: source + 1, "cuda") == source.nbytes
    # Events measure the device, not Python: a tiny kernel takes microseconds, although its launch takes longer.
    x = torch.zeros(64, device="cuda")
    (seconds,) = time_interleaved({"tiny": lambda: x.add_(1)}, "cuda", QUICK).values()
    assert min(seconds) < 50e-6
