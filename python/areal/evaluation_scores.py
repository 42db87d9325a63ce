"""What an evaluation says about its scored episodes: pass@1, pass@k, majority@k, length, truncation. Pure functions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal.reward.answers import final_answer, plain_number


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    prompt: str
    answer: str
    reward: float


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """One episode of an evaluation: scored, or failed by the cause in ``failure``, and then nothing else is known of it."""

    row: dict[str, Any]
    """Of the data set."""
    sample: int
    failure: str = ""
    message: str = ""
    """What is known of the failure."""
    reward: float = math.nan
    length: int = 0
    """Generated tokens, of all its sequences."""
    truncated: bool = False
    final_answer: str | None = None
    """Equal answers have equal strings; None where nobody needs it."""
    version_min: int = 0
    version_max: int = 0
    """The oldest and the newest policy that sampled a token of it."""
    prompt: str = ""
    completion: str = ""
    """The last answer in it, and all that stands before it, without special tokens."""

    @property
    def right(self) -> bool:
        return self.reward > 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of scored episodes; "right" means a reward above 0.

    An episode that failed is in ``failures`` by its cause and nowhere else: a failure is not a wrong answer. Every mean is one over
    prompts, of the mean over their scored samples, so that a prompt of which some samples failed weighs as much as the others. A mean
    is None when nothing was scored. A prompt with fewer than k scored samples is left out of the figures for k, and counted in
    ``too_few_samples``.
    """

    accuracy: float | None
    """pass@1: the share of right answers."""
    length: float | None
    """Mean number of generated tokens of an episode."""
    reward: float | None
    n_scored: int
    """Episodes; the prompts they belong to are ``n_prompts_scored`` of ``n_prompts``."""
    failures: dict[str, int] = field(default_factory=dict)
    samples: list[SampleAnswer] = field(default_factory=list)
    n_prompts: int = 0
    n_prompts_scored: int = 0
    n_samples: int = 1
    """Wanted of each prompt."""
    length_max: int | None = None
    truncated: float | None = None
    """Share of episodes with an answer that ended by its length limit."""
    pass_at_k: dict[str, float] = field(default_factory=dict)
    """By k: 1, 2, 4, ... and n_samples."""
    majority_at_k: dict[str, float] = field(default_factory=dict)
    """By k, from 3 on: of one or two answers it is pass@1."""
    too_few_samples: dict[str, int] = field(default_factory=dict)
    """By k, prompts with at least one but fewer than k scored samples; no entry where there are none."""
    version_min: int | None = None
    version_max: int | None = None
    """The oldest and the newest policy that sampled a token: training may go on meanwhile."""
    seconds: float = 0.0


def summarize(prompts: Sequence[Sequence[EpisodeResult]], n_samples: int, seconds: float, samples: list[SampleAnswer]) -> Evaluation:
    """The figures of all episodes, prompt by prompt."""
    scored = [[episode for episode in episodes if not episode.failure] for episodes in prompts]
    scored = [episodes for episodes in scored if episodes]
    flat = [episode for episodes in scored for episode in episodes]
    failures = Counter(episode.failure for episodes in prompts for episode in episodes if episode.failure)

    def mean(of: Callable[[EpisodeResult], float]) -> float | None:
        return _mean([_mean([float(of(e)) for e in episodes]) for episodes in scored]) if scored else None

    ks = _ks(n_samples)
    enough = {k: [episodes for episodes in scored if len(episodes) >= k] for k in ks}
    return Evaluation(
        accuracy=mean(lambda e: e.right),
        length=mean(lambda e: e.length),
        reward=mean(lambda e: e.reward),
        n_scored=len(flat),
        failures=dict(failures),
        samples=samples,
        n_prompts=len(prompts),
        n_prompts_scored=len(scored),
        n_samples=n_samples,
        length_max=max((e.length for e in flat), default=None),
        truncated=mean(lambda e: e.truncated),
        pass_at_k={str(k): _mean([pass_at_k(len(p), sum(e.right for e in p), k) for p in enough[k]]) for k in ks if enough[k]},
        majority_at_k={str(k): _mean([majority_at_k(p, k) for p in enough[k]]) for k in ks if k > 2 and enough[k]},
        too_few_samples={str(k): n for k in ks if (n := len(scored) - len(enough[k]))},
        version_min=min((e.version_min for e in flat), default=None),
        version_max=max((e.version_max for e in flat), default=None),
        seconds=seconds,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _ks(n_samples: int) -> list[int]:
    """1, 2, 4, ... and n_samples."""
    return sorted({n_samples, *(2**i for i in range(n_samples.bit_length()))})


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """Probability that one of k of the n samples is right, when they are drawn without replacement.

    1 - C(n - n_right, k) / C(n, k): the unbiased estimator of Chen et al. 2021, arXiv 2107.03374, section 2.1.
    """
    return 1.0 - math.comb(n - n_right, k) / math.comb(n, k)


def majority_at_k(episodes: Sequence[EpisodeResult], k: int) -> float:
    """How often the most frequent final answer of k samples is right: the mean over the blocks of k, one after the other.

    Ties are broken fairly: this is the expectation over a winner that is drawn among the most frequent answers. Where samples with the
    same answer differ in being right, the answer is worth their mean.
    """
    return _mean([_vote(episodes[start : start + k]) for start in range(0, len(episodes) - k + 1, k)])


def _vote(episodes: Sequence[EpisodeResult]) -> float:
    answers: dict[str | None, list[float]] = {}
    for episode in episodes:
        answers.setdefault(episode.final_answer, []).append(float(episode.right))
    most = max(map(len, answers.values()))
    return _mean([_mean(right) for right in answers.values() if len(right) == most])


def answer_class(text: str) -> str:
    """A string that equal answers share, without symbolic mathematics: 1/2 and 0.5 are one, 2x and x + x are two.

    The word behind a ``#`` that ends the text, else its final answer as the math scorer finds it; else, and of code that marks no answer,
    the text. Of a number the value, without unit.
    """
    if (word := re.search(r"(?<!#)#\s*([^\s#]+)\s*$", text)) is not None:
        answer = word[1]
    elif "```" in text and not any(mark in text for mark in ("\\boxed", "####")):
        answer = text
    else:
        answer = final_answer(text) or text
    number = plain_number(answer)
    return " ".join(answer.split()) if number is None else f"{number.value}{'%' if number.percent else ''}"
