"""What one sees of a run while it runs: a live panel on a terminal, one line a step everywhere else. All of it on stderr."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from areal.config import GRPOConfig, drift_bound
from areal.display_panel import RunPanel, RunState, clock, count, filter_text, is_number, mfu_text, number, share, tiny

if TYPE_CHECKING:
    from areal.evaluation import Evaluation

_HISTORY = ("reward", "accuracy", "length", "entropy")


class Display:
    """Told about a run by the controller. Not thread-safe: all calls come from the controller's thread."""

    def __init__(self, config: GRPOConfig, run_dir: Path, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.run_dir = run_dir
        self.state = RunState(
            title=f"{config.experiment_name}/{config.trial_name}",
            total_steps=config.total_train_steps,
            eta=config.rollout.max_head_offpolicyness,
            drift_bound=drift_bound(config.stats_logger.logprob_drift_bound, config.actor.dtype, config.rollout.update_mode),
            warmup_total=config.warmup.total_steps if config.warmup else 0,
        )
        live = self.console.is_terminal and not self.console.is_dumb_terminal and self.console.encoding.startswith("utf")
        # Two redraws a second are cheap and keep the clock going while a long step runs.
        self._live = Live(RunPanel(self.state), console=self.console, refresh_per_second=2) if live else None
        self._drifting = False
        self._last_warmup_line = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self, *, keep_panel: bool = True) -> None:
        """Stops drawing; a run that was cut short leaves its last panel. Calling it twice does no harm."""
        if self._live is not None:
            self._live.transient = not keep_panel
            self._live.stop()

    def phase(self, name: str) -> None:
        """What the run is doing outside of warm-up and training: "starting servers", "evaluation before", ..."""
        self.state.enter(name)
        if self._live is None:
            self._print(name)

    def note(self, text: str, style: str = "yellow") -> None:
        """A line that stays: something the user should know about."""
        self._print(text, style)

    def warmup(self, row: Mapping[str, Any], name: str = "warm-up") -> None:
        """Progress of training without rollouts, called ``name``: ``step``, ``loss``, and ``accuracy`` where it was measured; on preferences
        ``preference_accuracy`` and ``margin``."""
        state = self.state
        state.enter("warm-up")
        state.warmup, state.warmup_name = dict(row), name
        state.remember({**row, "warmup_loss": row.get("loss")}, ("warmup_loss", "accuracy", "preference_accuracy"))
        measured = is_number(row.get("accuracy"))
        now = time.monotonic()
        if self._live is None and (measured or now - self._last_warmup_line >= 10):
            self._last_warmup_line = now
            text = f"{name} {row.get('step', 0)}/{row.get('total_steps') or state.warmup_total}  loss {number(row.get('loss'), 3)}"
            text += f"  accuracy {share(row['accuracy'])}" if measured else ""
            if "preference_accuracy" in row:
                text += f"  preferred {share(row['preference_accuracy'])}  margin {number(row.get('margin'), 3)}"
            self._print(text)

    def step(self, row: Mapping[str, Any]) -> None:
        """One train step of reinforcement learning: the row that also goes to ``metrics.jsonl``."""
        state = self.state
        if state.phase != "training":
            if not state.row:
                state.history.clear()  # what the warm-up left
            state.enter("training")
        state.row = dict(row)
        if is_number(row.get("logprob_drift_max")):
            state.drift = (row["logprob_drift_max"], row.get("step", 0))
        state.remember(row, _HISTORY)
        self._watch_drift(row)
        if self._live is None:
            self._print(step_line(row, state))

    def evaluation(self, when: str, result: Evaluation) -> None:
        """The result of an evaluation; ``when`` is "before", "after" or "step N"."""
        self._print(f"{when}: {evaluation_line(result)}", "yellow" if result.failures else "green")

    def _watch_drift(self, row: Mapping[str, Any]) -> None:
        drift, bound = row.get("logprob_drift_max"), self.state.drift_bound
        if not is_number(drift):
            return
        drifting = drift > bound
        if drifting and not self._drifting:
            self.note(
                f"step {row.get('step')}: log-probs of engine and trainer for the same version differ by {drift:.1e}, "
                f"more than stats_logger.logprob_drift_bound={bound:.0e}: both sides may not compute the same model",
                "bold red",
            )
        elif self._drifting and not drifting:
            self.note(f"step {row.get('step')}: log-probs of engine and trainer agree again ({drift:.1e})")
        self._drifting = drifting

    def finish(self, summary: Mapping[str, Any] | Any, samples: Sequence[Any] = ()) -> None:
        """The panel makes way for the before/after table and a few answers (``prompt``, ``answer``, ``reward``)."""
        self.close(keep_panel=False)
        totals = dict(summary) if isinstance(summary, Mapping) else dataclasses.asdict(summary)
        self.console.print(before_after(totals), Text(_totals_line(totals)))
        if samples:
            self.console.print(sample_answers(samples))
        self.console.print(f"run folder: {escape(str(self.run_dir))}", soft_wrap=True)

    def finish_supervised(self, line: str) -> None:
        """The panel makes way for the result of training without rollouts."""
        self.close(keep_panel=False)
        self.console.print(Text(line), soft_wrap=True)
        self.console.print(f"run folder: {escape(str(self.run_dir))}", soft_wrap=True)

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(f"{clock(time.monotonic() - self.state.started):>7}  {text}", style=style), soft_wrap=self._live is None)


def step_line(row: Mapping[str, Any], state: RunState) -> str:
    """One step as one line of text, for logs."""
    dropped = sum((row.get("dropped") or {}).values())
    parts = [
        f"step {row.get('step', 0)}/{state.total_steps}",
        f"reward {number(row.get('reward'), 3)}",
        f"accuracy {share(row.get('accuracy'))}",
        f"length {number(row.get('length'), 1)}",
        f"stale {number(row.get('staleness_mean'), 2)} max {row.get('staleness_max', '–')}/{state.eta}",
        f"gen {count(row.get('gen_tokens_per_s'))} tok/s {share(row.get('rollout_busy'))} busy",
        f"train {count(row.get('train_tokens_per_s'))} tok/s {share(row.get('trainer_busy'))} busy{mfu_text(row)}",
        f"drift {tiny(row.get('logprob_drift_max'))}",
    ]
    if dropped:
        parts.append(f"dropped {dropped}")
    if row.get("filtered") or row.get("filter_passed"):
        parts.append(filter_text(row))
    if row.get("skipped_nonfinite"):
        parts.append(f"non-finite {row['skipped_nonfinite']}")
    return "  ".join(parts)


def evaluation_line(result: Evaluation) -> str:
    """The figures of an evaluation as one line of text."""
    if result.accuracy is None or result.length is None:
        text = "no held-out answer could be scored"
    else:
        text = f"accuracy {100 * result.accuracy:.1f}%"
        for name, by_k in (("pass", result.pass_at_k), ("majority", result.majority_at_k)):
            text += "".join(f", {name}@{k} {100 * value:.1f}%" for k, value in by_k.items() if k == str(result.n_samples) != "1")
        text += f" on {result.n_prompts_scored} of {result.n_prompts} held-out prompts"
        text += f", {result.n_samples} samples each" if result.n_samples > 1 else ""
        text += f", mean length {result.length:.1f} tokens, longest {result.length_max}, {share(result.truncated)} cut off"
        if result.version_min != result.version_max:
            text += f", by versions {result.version_min} to {result.version_max}"
    return text + "".join(f"; {n} {cause.replace('_', ' ')}" for cause, n in result.failures.items())


def _before_after_lines(totals: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, float, str]]:
    """(label, before, after, factor, unit); of several samples only the figures for all of them."""
    yield "accuracy", totals.get("accuracy_before"), totals.get("accuracy_after"), 100, "%"
    for name in ("pass", "majority"):
        before, after = (totals.get(f"{name}_at_k_{when}") or {} for when in ("before", "after"))
        k = max((int(k) for k in (*before, *after)), default=1)
        if k > 1:
            yield f"{name}@{k}", before.get(str(k)), after.get(str(k)), 100, "%"
    yield "answer length, tokens", totals.get("length_before"), totals.get("length_after"), 1, ""
    if totals.get("truncated_before") or totals.get("truncated_after"):
        yield "answers cut off", totals.get("truncated_before"), totals.get("truncated_after"), 100, "%"


def before_after(totals: Mapping[str, Any]) -> Table:
    """The result of a run: accuracy and length of held-out answers, before and after."""
    table = Table(box=SIMPLE_HEAD, title="held-out prompts", title_justify="left", title_style="bold")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    for label, before, after, scale, unit in _before_after_lines(totals):
        if is_number(before) and is_number(after):
            change = f"{scale * (after - before):+.1f}"
            better = "green" if scale == 100 and label != "answers cut off" and after > before else ""
            table.add_row(label, f"{scale * before:.1f}{unit}", Text(f"{scale * after:.1f}{unit}", style=f"bold {better}"), change)
        else:
            table.add_row(label, *(f"{scale * v:.1f}{unit}" if is_number(v) else "–" for v in (before, after)), "–")
    return table


def _totals_line(totals: Mapping[str, Any]) -> str:
    parts = [f"{totals.get('train_steps', 0)} train steps in {clock(totals.get('seconds_rl') or 0)}"]
    if totals.get("seconds_warmup"):
        parts.append(f"warm-up {clock(totals['seconds_warmup'])}")
    parts.append(f"whole run {clock(totals.get('seconds_total') or 0)}")
    parts.append(f"{count(totals.get('tokens_generated'))} tokens generated, {count(totals.get('tokens_trained'))} trained")
    parts.append(f"oldest token {totals.get('max_staleness_trained')} versions")
    if is_number(totals.get("mfu")):
        parts.append(f"MFU of the train steps {share(totals['mfu'])}")
    if totals.get("skipped_nonfinite"):
        parts.append(f"{totals['skipped_nonfinite']} optimizer steps skipped, not finite")
    dropped = {k: v for k, v in (totals.get("dropped") or {}).items() if v}
    parts.append("dropped " + (", ".join(f"{v} {k.replace('_', ' ')}" for k, v in dropped.items()) if dropped else "nothing"))
    if totals.get("filtered") or totals.get("filter_passed"):
        parts.append(filter_text(totals))
    return "; ".join(parts)


def sample_answers(samples: Sequence[Any], most: int = 6) -> Table:
    """A few answers with their rewards."""
    table = Table(box=SIMPLE_HEAD, title="sample answers", title_justify="left", title_style="bold")
    table.add_column("reward", justify="right")
    table.add_column("prompt", overflow="fold", ratio=1)
    table.add_column("answer", overflow="fold", ratio=2)
    for sample in samples[:most]:
        row = sample if isinstance(sample, Mapping) else {"prompt": sample.prompt, "answer": sample.answer, "reward": sample.reward}
        style = "green" if row["reward"] > 0 else "red"
        table.add_row(Text(f"{row['reward']:g}", style=style), *(Text(shorten(row[k])) for k in ("prompt", "answer")))
    return table


def shorten(text: str, most: int = 400) -> str:
    """The beginning and the end of a long text; a model's control characters must not reach the terminal."""
    text = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} […{len(text) - most} characters…] {text[-half:]}"
