"""A generated task with chains of thought of widely varying length: labelled chains of digit operations modulo 10.

    prompt           a7b*8c-3=            start with 7, times 8, minus 3
    thinking answer  a7,b*8=6,c-3=3#3     every step written out
    direct answer    #3                   the result alone

Both kinds of answer are demonstrated equally often, so a model that imitates them thinks half of the time; what reinforcement
learning has to find out is that thinking pays. Every problem is a function of (seed, stream, index). One prompt in
``HELD_OUT_SHARE`` (by its hash, so whatever the seed) is held out: it never appears in a training stream.

Importing this module is cheap (reward workers do): no torch, no transformers.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

LABELS = string.ascii_lowercase + string.ascii_uppercase + "αβγδεζηθικλμ"
"""The label of term i is LABELS[i]: 64 terms at most."""
SYMBOLS = string.digits + "+-*=,#"
PAD, EOS = "<pad>", "<eos>"
HELD_OUT_SHARE = 10
THINKING_PREFIX = LABELS[0]
"""What every thinking answer begins with, and no direct one does."""

Stream = Literal["train", "demonstrations", "valid"]
Spread = Literal["uniform", "log_uniform"]
_MAX_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    prompt: str
    thinking: str
    direct: str
    answer: str
    terms: int


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the evaluation; a property of its text alone."""
    return int.from_bytes(blake2b(prompt.encode(), digest_size=8).digest(), "little") % HELD_OUT_SHARE == 0


def make_problem(seed: int, stream: Stream, index: int, *, min_terms: int = 3, max_terms: int = 8, spread: Spread = "uniform") -> Problem:
    """Problem number ``index`` of a stream; 'valid' holds only held-out prompts, the others none.

    Raises:
        ValueError: no label for ``max_terms`` terms, or the range of terms has (almost) no prompt of the wanted kind.
    """
    if not 1 <= min_terms <= max_terms <= len(LABELS):
        raise ValueError(f"chains have 1 to {len(LABELS)} terms, but min_terms={min_terms} and max_terms={max_terms}")
    draw = random.Random(f"{seed}/{stream}/{index}")
    for _ in range(_MAX_DRAWS):
        problem = _draw_problem(draw, _draw_terms(draw, min_terms, max_terms, spread))
        if is_held_out(problem.prompt) == (stream == "valid"):
            return problem
    raise ValueError(f"no '{stream}' prompt among {_MAX_DRAWS} chains of {min_terms} to {max_terms} terms")


def _draw_terms(draw: random.Random, low: int, high: int, spread: Spread) -> int:
    if spread == "uniform":
        return draw.randint(low, high)
    return min(high, int(low * ((high + 1) / low) ** draw.random()))


def _draw_problem(draw: random.Random, terms: int) -> Problem:
    value = draw.randrange(10)
    prompt = thinking = f"{LABELS[0]}{value}"
    for label in LABELS[1:terms]:
        operation, digit = draw.choice("+-*"), draw.randrange(10)
        match operation:
            case "+":
                value = (value + digit) % 10
            case "-":
                value = (value - digit) % 10
            case _:
                value = value * digit % 10
        prompt += f"{label}{operation}{digit}"
        thinking += f",{label}{operation}{digit}={value}"
    direct = f"#{value}"
    return Problem(prompt + "=", thinking + direct, direct, str(value), terms)


@dataclass(frozen=True)
class ArithmeticRows:
    """The rows of one stream, generated as they are asked for: a source for ``data.PromptDataset``.

    Rows have ``prompt_id, prompt, answer, terms``; those of 'demonstrations' also ``completion``, thinking on even indices and
    direct on odd ones.
    """

    seed: int
    stream: Stream
    min_terms: int = 3
    max_terms: int = 8
    spread: Spread = "uniform"
    size: int | None = None
    """Rows; None = without end."""

    def __post_init__(self) -> None:
        self[0]  # the ranges are wrong now, not at the first step

    def __getitem__(self, index: int) -> dict[str, Any]:
        problem = make_problem(self.seed, self.stream, index, min_terms=self.min_terms, max_terms=self.max_terms, spread=self.spread)
        row = {
            "prompt_id": f"arithmetic/{self.seed}/{self.stream}/{index}",
            "prompt": problem.prompt,
            "answer": problem.answer,
            "terms": problem.terms,
        }
        if self.stream == "demonstrations":
            row["completion"] = problem.direct if index % 2 else problem.thinking
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = 0
        while self.size is None or index < self.size:
            yield self[index]
            index += 1


def arithmetic_reward(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], answer: str, **row: Any) -> float:
    """1.0 when what follows the last '#' is exactly the row's ``answer``, else 0.0."""
    _, mark, result = completions.removesuffix(EOS).rpartition("#")
    return float(bool(mark) and result == answer)


@lru_cache
def vocabulary(max_terms: int = 26) -> tuple[str, ...]:
    """Tokens in the order of their ids; one character each. The lower-case labels are always in it."""
    return (PAD, EOS, *SYMBOLS, *LABELS[: max(26, max_terms)])


def build_tokenizer(max_terms: int = 26) -> Any:
    """A ``PreTrainedTokenizerFast`` with a token for every character of the task (44 tokens up to 26 terms).

    It adds no special token by itself; a character that is not in the vocabulary is an error, never an unknown token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary(max_terms))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False)
