"""``areal score`` as a command: real workers, malformed lines, interruption, bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from areal.cli import main
from areal.reward.score_command import run_score

LINES = [
    b'{"completion": "#### 72", "answer": "It is 72.\\n#### 72", "id": 1, "extra": {"a": [1, null]}}',
    b'{"completion": "\\\\boxed{73}", "answer": "72", "score": 1.0, "failure": "of an earlier run"}',
    b"{not json",
    b"",
    b"[1]",
    b'{"completion": "5"}',
    b'{"answer": "5"}',
    b'{"completion": ["5"], "answer": "5"}',
    b'{"completion": "5", "answer": ""}',
    b'{"completion": "\xff5", "answer": "5"}',
    b'{"completion": "\\ud800 \xe2\x88\x9a 5", "answer": 5}',
    b'{"completion": "\\\\boxed{2^{2^{2^{100}}}}", "answer": "5"}',
    b'{"completion": "\\\\boxed{x+1}", "solution": "so \\\\boxed{1+x}"}',
    b"[" * 100000,
]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_and_failures_in_the_order_of_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b"\n".join(LINES))
    assert main(["score", "math", str(file), "--out", str(out), "--workers", "2", "--timeout", "0.3"]) == 0
    rows = _rows(out)
    assert [row.get("score") for row in rows] == [1.0, 0.0, *[None] * 7, 1.0, 0.0, 1.0, None]
    assert rows[0] == {**json.loads(LINES[0]), "score": 1.0}
    assert rows[1] == {"completion": "\\boxed{73}", "answer": "72", "score": 0.0}
    assert rows[2]["input"] == "{not json" and rows[3]["input"] == "[1]" and rows[9]["completion"] == "\ud800 √ 5"
    for row in [*rows[2:9], rows[12]]:
        assert row["failure"]["cause"] == "malformed_row"
    messages = [row["failure"]["message"] for row in rows[2:9]]
    for said, wanted in zip(
        messages, ["line 3", "not list", "no 'answer'", "'completion'", "'completion'", "no 'answer'", "utf-8"], strict=True
    ):
        assert wanted in said
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "13 rows in " in printed.err and "mean score 0.6000 of 5 scored; failures: 8 malformed_row" in printed.err
    assert "\033" not in printed.err and "scoring" not in printed.err  # no bar: not a terminal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_reference_that_fails_is_a_failure_row_and_in_place_works(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    endless = "(" * 200 + "1" + ")" * 200
    rows = [{"text": "\\boxed{x+1}", "answer": endless}, {"text": "\\boxed{3}", "answer": "3"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    summary = run_score("math", file, file, workers=1, timeout=0.2, completion_key="text")
    assert (summary.rows, summary.scored, summary.failures) == (2, 1, {"reward_raised": 1})
    failed, right = _rows(file)
    assert "the reference answer" in failed["failure"]["message"] and right["score"] == 1.0


def test_an_empty_file_gives_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    summary = run_score("math", tmp_path / "in.jsonl", tmp_path / "out.jsonl", workers=1)
    assert "0 rows" in str(summary) and "none scored" in str(summary)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["math", "missing.jsonl", "--out", "o"], "FILE missing.jsonl cannot be read (No such file or directory)"),
        (["math", ".", "--out", "o"], "FILE . cannot be read (Is a directory)"),
        (["math", "in.jsonl", "--out", "no/o"], "--out no/o cannot be written (No such file or directory)"),
        (["math", "in.jsonl", "--out", "."], "--out . cannot be written (Is a directory)"),
        (["math", "in.jsonl.part", "--out", "in.jsonl"], "by way of FILE in.jsonl.part"),
        (["math", "in.jsonl", "--out", "o", "--workers", "0"], "--workers 0"),
        (["math", "in.jsonl", "--out", "o", "--timeout", "-1"], "--timeout -1"),
        (["math", "in.jsonl", "--out", "o", "--timeout", "nan"], "--timeout nan"),
        (["math", "in.jsonl", "--out", "o", "--isolation", "rlimit"], "--isolation rlimit is for code"),
        (["math", "in.jsonl"], "--out"),
        (["poetry", "in.jsonl", "--out", "o"], "poetry"),
    ],
)
def test_mistakes_end_in_one_sentence(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in.jsonl", "in.jsonl.part"):
        (tmp_path / name).write_text('{"completion": "5", "answer": "5"}\n')
    with pytest.raises(SystemExit) if "--out" not in words or "poetry" in words else contextlib.nullcontext():
        assert main(["score", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and len(printed.err.splitlines()) == 2
    assert (tmp_path / "in.jsonl.part").stat().st_size and not (tmp_path / "o").exists()


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "areal", "score", *map(str, words)]


def _descendants(pid: int) -> set[int]:
    children = {int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()}
    return children.union(*map(_descendants, children))


def test_an_interrupted_run_leaves_neither_output_nor_processes(tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    row = json.dumps({"completion": "\\boxed{2^{2^{2^{100}}}}", "answer": "5"}) + "\n"
    file.write_text('{"completion": "5", "answer": "5"}\n' + row * 10)
    process = subprocess.Popen(_command("math", file, "--out", out, "--timeout", "60", "--workers", "2"), stderr=subprocess.PIPE, text=True)
    started: set[int] = set()
    for _ in range(600):
        if len(started := _descendants(process.pid)) == 4:  # two workers, and math-verify for each
            break
        time.sleep(0.05)
    assert len(started) == 4
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "interrupted\n"
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in started):
            return
        time.sleep(0.1)
    pytest.fail("processes outlived the command")


def test_reading_waits_for_the_oldest_row_in_flight(tmp_path: Path) -> None:
    fifo, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(fifo)
    process = subprocess.Popen(_command("math", fifo, "--out", out, "--timeout", "3"), stderr=subprocess.PIPE, text=True)
    rows = json.dumps({"completion": "\\boxed{2^{2^{2^{100}}}}", "answer": "5"}).encode() + b"\n"
    rows += b"".join(json.dumps({"completion": f"#### {i}", "answer": "4999", "fill": "." * 100}).encode() + b"\n" for i in range(5000))
    sent, most = 0, 0
    with fifo.open("wb", buffering=0) as pipe:
        os.set_blocking(pipe.fileno(), False)
        last = time.monotonic()
        while sent < len(rows):
            try:
                sent += os.write(pipe.fileno(), rows[sent : sent + 4096])
                last = time.monotonic()
            except BlockingIOError:
                if time.monotonic() - last > 1.0 and not most:
                    most = sent
                assert time.monotonic() - last < 60.0
                time.sleep(0.01)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "5001 rows" in err, err
    assert 0 < most < 0.5 * len(rows)  # 1024 rows and what a pipe holds
    scores = [row["score"] for row in _rows(out)]
    assert scores == [0.0] * 5000 + [1.0]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_shows_a_bar(no_color: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"completion": "5", "answer": "5"}\n' * 3000)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color, "COLUMNS": "100"}
    process = subprocess.Popen(_command("math", file, "--out", tmp_path / "out"), stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
        while data := os.read(ours, 1 << 16):
            shown += data
    os.close(ours)
    assert process.communicate(timeout=30)[0].decode() == f"{tmp_path / 'out'}\n"
    assert b"scoring" in shown and b" rows, 0 failed" in shown and b"mean score 1.0000 of 3000" in shown
    assert (re.search(rb"\x1b\[[0-9;]*(?:3|9)[0-7]m", shown) is None) == bool(no_color)


GOOD, BAD = "```python\ndef add(a, b):\n    return a + b\n```", "```python\ndef add(a, b):\n    return a - b\n```"
ASSERTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
CASES = [{"stdin": "2 3\n", "stdout": "5\n"}, {"stdin": "1 1\n", "stdout": "2"}]
READS = "a, b = map(int, input().split())\nprint(a + b)"


def test_code_against_test_programs_and_stdin_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"completion": GOOD, "tests": ASSERTS, "id": 1},
        {"completion": BAD, "tests": ASSERTS},
        {"completion": READS, "tests": CASES},
        {"completion": READS.replace("+", "*"), "tests": CASES},
        {"completion": "while True: pass", "tests": ASSERTS},
        {"completion": "import sys\nsys.exit(0)", "tests": ASSERTS},
        {"completion": GOOD},
        {"completion": GOOD, "tests": ""},
        {"completion": GOOD, "tests": "assert ("},
        {"completion": GOOD, "tests": [{"stdin": "1"}]},
        {"completion": GOOD, "tests": ASSERTS},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["score", "code", str(file), "--out", str(out), "--workers", "2", "--timeout", "1"]) == 0
    scored = _rows(out)
    assert [row.get("score") for row in scored] == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, None, None, None, None, 1.0]
    assert scored[0] == {**rows[0], "score": 1.0}
    assert [row["failure"]["cause"] for row in scored[6:10]] == ["malformed_row"] * 2 + ["reward_raised"] * 2
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "programs are run at the isolation level " in printed.err and "failures: 2 malformed_row, 2 reward_raised" in printed.err
