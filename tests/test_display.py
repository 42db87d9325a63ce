"""The display, drawn into a string: what must be seen is there, at every width, and nothing breaks on what is unknown."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from areal.config import GRPOConfig
from areal.config_load import build_config
from areal.display import Display, shorten
from areal.display_panel import RunPanel, bar, clock, count, sparkline
from areal.evaluation import Evaluation, SampleAnswer

ROW: dict[str, Any] = {
    "step": 7, "version": 6, "reward": 0.8125, "accuracy": 0.81, "length": 26.4, "length_max": 47, "staleness_mean": 0.91, "staleness_max": 2,
    "tokens_generated": 8000, "tokens_trained": 7600, "gen_tokens_per_s": 28_444.0, "train_tokens_per_s": 27_111.0, "rollout_busy": 0.93,
    "trainer_busy": 0.71, "mfu": 0.38, "loss": -0.0123, "grad_norm": 0.42, "clip_fraction": 0.013, "entropy": 0.3, "logprob_drift_max": 2.4e-6,
    "buffer_groups": 11, "inflight_groups": 64, "dropped": {}, "skipped_nonfinite": 0,
}  # fmt: skip

Make = Callable[..., tuple[Display, io.StringIO]]


@pytest.fixture
def make() -> Make:
    def build(terminal: bool = False, width: int = 100) -> tuple[Display, io.StringIO]:
        tree = {
            "experiment_name": "arithmetic",
            "total_train_steps": 80,
            "actor": {"init_from_scratch": {"model_type": "qwen2"}},
            "train_dataset": {"type": "arithmetic"},
            "warmup": {"total_steps": 1400},
        }
        file = io.StringIO()
        console = Console(
            file=file, force_terminal=terminal, width=width, height=40, color_system=None, legacy_windows=False, _environ={"TERM": "xterm"}
        )
        return Display(build_config(tree, GRPOConfig), Path("runs/x"), console), file

    return build


def panel(display: Display, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(RunPanel(display.state))
    return file.getvalue()


def test_one_line_a_step_without_a_terminal(make: Make) -> None:
    display, file = make(width=80)
    with display:
        display.step(ROW)
        display.step({**ROW, "step": 8, "dropped": {"reward_timeout": 2, "reward_error": 1}, "skipped_nonfinite": 1})
    lines = file.getvalue().splitlines()
    assert len(lines) == 2, "never wrapped: a log is read by line"
    for text in (
        "step 7/80",
        "reward 0.812",
        "accuracy 81%",
        "length 26.4",
        "max 2/2",
        "28.4k tok/s 93% busy",
        "27.1k tok/s 71% busy",
        "2.4e-06",
    ):
        assert text in lines[0]
    assert "dropped 3" in lines[1] and "non-finite 1" in lines[1]
    assert "\x1b" not in file.getvalue()


def test_warmup_lines_are_few(make: Make) -> None:
    display, file = make()
    for step in range(0, 1400, 10):
        display.warmup({"step": step, "loss": 1.0, **({"accuracy": 0.5} if step % 700 == 0 else {})})
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert "warm-up 700/1400" in lines[1] and "accuracy 50%" in lines[1]


@pytest.mark.parametrize("width", [20, 40, 60, 87, 88, 100, 200])
def test_panel_fits(make: Make, width: int) -> None:
    display, _ = make(terminal=True)
    display.warmup({"step": 70, "loss": 1.23, "accuracy": 0.4})
    assert max(len(line) for line in panel(display, width).splitlines()) <= width
    display.step(ROW)
    display.step({**ROW, "dropped": {"prompt_too_long": 3}, "skipped_nonfinite": 2})
    lines = panel(display, width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert len(lines) <= 18, "fits a small terminal"


def test_panel_tells_what_matters(make: Make) -> None:
    display, _ = make(terminal=True)
    display.phase("starting 1 rollout server")
    assert "starting 1 rollout server" in panel(display, 100)
    display.warmup({"step": 700, "loss": 1.234, "accuracy": 0.42})
    text = panel(display, 100)
    assert "warm-up 700/1400" in text and "1.234" in text and "42%" in text
    display.warmup({"step": 760, "total_steps": 900, "phase": "cool-down", "loss": 1.1, "tokens_per_s": 12_345.0, "lr_scale": 0.25})
    text = panel(display, 100)
    assert "cooling down 760/900" in text and "42%" in text and "12.3k tok/s" in text and "25% of the first" in text
    display.step(ROW)
    text = panel(display, 100)
    for part in (
        "arithmetic/trial",
        "7/80",
        "0.812",
        "81%",
        "26.4",
        "max 47",
        "28.4k tok/s",
        "93% busy",
        "27.1k tok/s",
        "71% busy, MFU 38%",
    ):
        assert part in text
    for part in ("0.91 max 2 of 2 allowed", "64 in flight, 11 ready", "2.4e-06 under 1e-04"):
        assert part in text
    assert "dropped" not in text and "non-finite" not in text
    display.step({**ROW, "dropped": {"prompt_too_long": 3, "reward_error": 0}, "skipped_nonfinite": 2})
    text = panel(display, 100)
    assert "3 prompt too long" in text and "reward error" not in text and "non-finite numbers: 2" in text


def test_unknown_values_are_dashes(make: Make) -> None:
    display, file = make()
    display.step({"step": 1})
    display.step({**dict.fromkeys(ROW), "step": 2, "loss": math.nan, "reward": math.inf})
    assert "reward –" in file.getvalue()
    assert "not measured yet" in panel(display, 100)


def test_drift_warns_once_and_recovers(make: Make) -> None:
    display, file = make()
    for step, drift in enumerate([1e-6, 3e-4, 4e-4, None, 1e-6, 5e-4], 1):
        display.step({**ROW, "step": step, "logprob_drift_max": drift})
    text = file.getvalue()
    assert text.count("may not compute the same model") == 2
    assert text.count("agree again") == 1
    assert "logprob_drift_bound=1e-04" in text
    assert "OVER 1e-04" in panel(display, 100)


def test_live_panel_goes_and_results_stay(make: Make) -> None:
    display, file = make(terminal=True)
    with display:
        display.step(ROW)
        display.note("rollout 0 died and is being replaced")
        totals = {"accuracy_before": 0.61, "accuracy_after": 0.973, "length_before": 17.2, "length_after": 33.1, "train_steps": 80, "seconds_rl": 22.0,
                  "seconds_total": 71.0, "seconds_warmup": 42.0, "max_staleness_trained": 2, "tokens_generated": 651_234, "tokens_trained": 612_345,
                  "dropped": {"reward_error": 2}, "truncated_before": 0.25, "truncated_after": 0.0, "pass_at_k_before": {"1": 0.61, "4": 0.805},
                  "pass_at_k_after": {"1": 0.973, "4": 0.99}}  # fmt: skip
        display.finish(totals, [SampleAnswer("a7b*8=", "a7,b*8=6#6", 1.0), {"prompt": "[bold]x", "answer": "y" * 900, "reward": 0.0}])
        display.close()
    text = file.getvalue()
    for part in (
        "rollout 0 died",
        "61.0%",
        "97.3%",
        "+36.3",
        "17.2",
        "33.1",
        "+15.9",
        "a7,b*8=6#6",
        "[bold]x",
        "500 characters",
        "2 reward error",
        "runs/x",
        "pass@4",
        "80.5%",
        "+18.5",
        "answers cut off",
        "-25.0",
    ):
        assert part in text
    assert "majority" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor comes back"


def test_finish_without_evaluation(make: Make) -> None:
    display, file = make()
    display.finish({"accuracy_before": None, "accuracy_after": 0.5, "train_steps": 3, "dropped": {}}, [])
    assert "50.0%" in file.getvalue() and "dropped nothing" in file.getvalue()


def test_evaluation_lines(make: Make) -> None:
    display, file = make()
    figures: dict[str, Any] = {
        "n_prompts": 512,
        "n_prompts_scored": 510,
        "length_max": 40,
        "truncated": 0.125,
        "version_min": 0,
        "version_max": 0,
    }
    display.evaluation("before", Evaluation(0.61, 17.2, 0.61, 510, {"reward_timeout": 2}, **figures))
    display.evaluation("step 10", Evaluation(None, None, None, 0, {"reward_error": 512}))
    by_k = {"pass_at_k": {"1": 0.61, "2": 0.7, "4": 0.8}, "majority_at_k": {"4": 0.65}}
    display.evaluation(
        "step 20", Evaluation(0.61, 17.2, 0.61, 2040, **{**figures, **by_k, "n_samples": 4, "version_min": 19, "version_max": 23})
    )
    first, second, third = file.getvalue().splitlines()
    tail = "mean length 17.2 tokens, longest 40, 12% cut off"
    assert f"before: accuracy 61.0% on 510 of 512 held-out prompts, {tail}; 2 reward timeout" in first
    assert "step 20: accuracy 61.0%, pass@4 80.0%, majority@4 65.0% on 510 of 512 held-out prompts, 4 samples each, mean" in third
    assert third.endswith(f"{tail}, by versions 19 to 23")
    assert "step 10: no held-out answer could be scored; 512 reward error" in second


def test_small_parts() -> None:
    assert [count(v) for v in (0, 999, 1234, 5.6e6, None, math.nan)] == ["0", "999", "1.2k", "5.6M", "–", "–"]
    assert [clock(s) for s in (-1, 0, 59.9, 61, 3661)] == ["0:00", "0:00", "0:59", "1:01", "1:01:01"]
    assert [len(bar(p, 10, "")) for p in (-1, 0, 0.13, 0.999, 1, 7, None)] == [10] * 7
    assert bar(1, 4, "").plain == "████" and bar(0, 4, "").plain == "····"
    assert sparkline([], 8) == sparkline([1.0], 8) == ""
    assert sparkline([1.0, 1.0], 8) == "▁▁"
    assert sparkline(list(range(100)), 8) == "▁▂▃▄▅▆▇█"


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert shorten("a\x1b[2Jb\x07\nc") == "a�[2Jb�\nc" and len(shorten("x" * 5000)) < 450
