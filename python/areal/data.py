"""Prompt data sets: rows without end, in an order and from a position that are state one can save and restore.

A row is a dict with ``prompt_id`` (stable over runs and epochs), ``epoch``, one of

    prompt      text, taken as it is
    messages    chat messages, put through the tokenizer's chat template
    input_ids   token ids

and every other column of the source (``answer`` under that name, whatever ``answer_key`` says). A malformed row is dropped, logged
with its file and line, and counted in ``PromptDataset.dropped``; a file with no usable row is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np

from areal.config import ConfigError, DatasetConfig
from areal.tasks.arithmetic import ArithmeticRows, Stream

log = logging.getLogger(__name__)
_LOGGED_DROPS = 10
_PROMPT_KEYS = ("prompt", "messages", "input_ids")


class MalformedRow(ValueError):
    """A row that cannot be used; the message names its file and line (or data set and index)."""


class RowSource(Protocol):
    """Rows by index. ``size`` is None for a source without end."""

    @property
    def size(self) -> int | None: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises MalformedRow."""
        ...


class RowFormat:
    """From the columns of a source to a row."""

    def __init__(self, config: DatasetConfig) -> None:
        self.prompt_key, self.answer_key, self.chat = config.prompt_key, config.answer_key, config.chat_template

    def row(self, columns: object, where: str, prompt_id: str) -> dict[str, Any]:
        """``where`` names the row in errors."""
        if not isinstance(columns, Mapping):
            raise MalformedRow(f"{where}: a row is an object with the key '{self.prompt_key}', not {type(columns).__name__}")
        row = {str(key): value for key, value in columns.items() if key != self.prompt_key}
        if self.prompt_key not in columns:
            have = ", ".join(map(str, columns)) or "nothing"
            raise MalformedRow(f"{where}: no key '{self.prompt_key}' (it has {have}); set prompt_key")
        if self.answer_key in row:
            row["answer"] = row[self.answer_key]
        prompt = columns[self.prompt_key]
        for taken in _PROMPT_KEYS:
            row.pop(taken, None)
        row[self._kind(prompt, where)] = [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt
        row.setdefault("prompt_id", prompt_id)
        return row

    def own_row(self, columns: Mapping[str, Any], where: str, prompt_id: str) -> dict[str, Any]:
        """A row that was given in Python: all its columns as they are, and a prompt from ``prompt_key`` where it has none.

        A row without any prompt is not malformed: what it means is its workflow's business.
        """
        row = {"prompt_id": prompt_id, **columns}
        if self.prompt_key in columns and not any(key in columns for key in _PROMPT_KEYS):
            with contextlib.suppress(MalformedRow):
                row |= self.row(columns, where, prompt_id)
        return row

    def _kind(self, prompt: object, where: str) -> str:
        if isinstance(prompt, str) and prompt:
            return "messages" if self.chat else "prompt"
        if isinstance(prompt, list) and prompt:
            if all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in prompt):
                return "messages"
            if all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in prompt):
                return "input_ids"
        raise MalformedRow(f"{where}: '{self.prompt_key}' must be a non-empty string, chat messages or token ids")


class JsonlRows:
    """The non-blank lines of a JSONL file, parsed when they are asked for."""

    def __init__(self, config: DatasetConfig, key: str = "train_dataset") -> None:
        self.path = Path(config.path).expanduser()
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"{key}.path={config.path} cannot be read ({error.strerror})", "give the path of a JSONL file") from error
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        self._lines = numbered[: config.limit or None]
        self._format = RowFormat(config)
        if not self._lines:
            raise ConfigError(f"{key}.path={config.path} has no rows", "give a JSONL file with one object a line")

    @property
    def size(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, line = self._lines[index]
        where = f"{self.path}:{number}"
        try:
            columns = json.loads(line)
        except ValueError as error:  # bad JSON, or bytes that are not UTF-8
            raise MalformedRow(f"{where}: not JSON ({error})") from error
        return self._format.row(columns, where, f"{self.path.name}:{number}")


class SequenceRows:
    """Rows of any sequence of mappings: a list, a Hugging Face data set.

    ``own``: they were given in Python and keep their columns (see ``RowFormat.own_row``), without a format all of them as they are.
    """

    def __init__(self, rows: Sequence[Any], name: str, row_format: RowFormat | None = None, limit: int = 0, *, own: bool = False) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise ConfigError(f"the data set {name} is a {type(rows).__name__}", "give a sequence of rows, or an iterator without end")
        self._rows, self._name, self._format, self._own = rows, name, row_format, own or row_format is None
        self.size = min(len(rows), limit or len(rows))
        if not self.size:
            raise ConfigError(f"the data set {name} has no rows", "give one that has some")

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns, where, prompt_id = self._rows[index], f"{self._name}[{index}]", f"{self._name}/{index}"
        if self._format is not None and not self._own:
            return self._format.row(columns, where, prompt_id)
        if not isinstance(columns, Mapping):
            raise MalformedRow(f"{where}: a row is a dict, not {type(columns).__name__}")
        return {"prompt_id": prompt_id, **columns} if self._format is None else self._format.own_row(columns, where, prompt_id)


class PromptDataset:
    """An iterator over the rows of a source, epoch after epoch, without end.

    Epoch e has the order of ``numpy.random.default_rng([seed, e]).permutation`` (the source's own order without ``shuffle``, or
    when the source has no end). ``next`` never returns a malformed row.
    """

    def __init__(self, source: RowSource | Sequence[Any], *, seed: int = 0, shuffle: bool = True, name: str = "dataset") -> None:
        self.source = cast(RowSource, source) if hasattr(source, "size") else SequenceRows(source, name)
        self.name = name
        self.dropped: Counter[str] = Counter()
        self._seed, self._shuffle = seed, shuffle and self.source.size is not None
        self._epoch = self._position = 0
        self._order: np.ndarray | None = None
        self._dropped_in_a_row = 0
        self._last: tuple[int, str] | None = None
        """Index of the row that was given last, and its digest."""

    @property
    def size(self) -> int | None:
        """Rows of an epoch, malformed ones included; None = without end."""
        return self.source.size

    @property
    def epoch(self) -> int:
        return self._epoch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        while True:
            index, epoch = self._advance()
            if (row := self._usable(index)) is not None:
                self._last = index, _digest(row)
                return {**row, "epoch": epoch}

    def _advance(self) -> tuple[int, int]:
        """The index of the next row, and its epoch."""
        size = self.source.size
        if size is not None and self._position >= size:
            self._epoch, self._position, self._order = self._epoch + 1, 0, None
        if self._shuffle and self._order is None:
            self._order = np.random.default_rng([self._seed % 2**63, self._epoch]).permutation(cast(int, size))
        index = self._position if self._order is None else int(self._order[self._position])
        self._position += 1
        return index, self._epoch

    def _usable(self, index: int) -> dict[str, Any] | None:
        try:
            row = self.source[index]
        except MalformedRow as error:
            self.dropped["malformed_row"] += 1
            self._dropped_in_a_row += 1
            if self.dropped["malformed_row"] <= _LOGGED_DROPS:
                log.warning("row dropped: %s", error)
            if self._dropped_in_a_row >= (self.source.size or 1000):
                raise ConfigError(f"no usable row in {self.name}: {error}") from error
            return None
        self._dropped_in_a_row = 0
        return row

    def first(self, n: int) -> list[dict[str, Any]]:
        """At most ``n`` usable rows in the source's own order, for evaluation; does not move the iterator, nor count in ``dropped``."""
        rows: list[dict[str, Any]] = []
        dropped, in_a_row = self.dropped.copy(), self._dropped_in_a_row
        for index in range(n if self.source.size is None else self.source.size):
            if len(rows) == n:
                break
            if (row := self._usable(index)) is not None:
                rows.append({**row, "epoch": 0})
        self.dropped, self._dropped_in_a_row = dropped, in_a_row
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch, position, drop counts and the last row's digest: what ``load_state_dict`` needs to go on with the very next row."""
        place = {"epoch": self._epoch, "position": self._position, "last": self._last}
        return {"seed": self._seed, "size": self.size, **place, "dropped": dict(self.dropped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError when the state is of other rows: another number of them, another seed, or another one where the last was."""
        for what, now in (("size", self.size), ("seed", self._seed)):
            if state[what] != now:
                raise ConfigError(
                    f"the data set {self.name} had {what} {state[what]} when its state was saved and has {now} now",
                    f"restore the old {what}, or start without recovery",
                )
        last = state["last"]
        if last is not None and self._digest_of(last[0]) != last[1]:
            raise ConfigError(
                f"row {last[0]} of the data set {self.name} is another one than when its state was saved",
                "give the same rows, or start without recovery",
            )
        self._last = None if last is None else (last[0], last[1])
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = None
        self.dropped = Counter(state["dropped"])

    def _digest_of(self, index: int) -> str | None:
        """None for a row that is malformed."""
        try:
            return _digest(self.source[index])
        except MalformedRow:
            return None


def _digest(row: Mapping[str, Any]) -> str:
    """Of what JSON can say of it: the same in every process."""
    return hashlib.sha256(json.dumps(row, skipkeys=True, default=lambda value: type(value).__name__).encode()).hexdigest()[:16]


def load_dataset(
    config: DatasetConfig, seed: int = 0, split: Stream = "train", key: str | None = None, given: Sequence[Any] | None = None
) -> PromptDataset:
    """The data set of a config. ``split`` is the arithmetic stream; validation rows are never shuffled.

    ``given``: rows that were made in Python and stand in for those of ``config.type`` and ``config.path``.

    Raises:
        ConfigError: a file that cannot be read or has no rows, a missing extra; the sentence names ``key`` (default: from split).
    """
    key = key or {"train": "train_dataset", "valid": "valid_dataset", "demonstrations": "warmup.dataset"}[split]
    shuffle = config.shuffle and split != "valid"
    if given is not None:
        return PromptDataset(SequenceRows(given, key, RowFormat(config), config.limit, own=True), seed=seed, shuffle=shuffle, name=key)
    match config.type:
        case "arithmetic":
            return PromptDataset(_arithmetic(config, seed, split, key), seed=seed, shuffle=shuffle, name="arithmetic")
        case "jsonl":
            return PromptDataset(JsonlRows(config, key), seed=seed, shuffle=shuffle, name=config.path)
        case "given":
            raise ConfigError(f"{key}.type=given, but no rows were given", f"hand them over: PPOTrainer(config, {key}=rows)")
        case "huggingface":
            return PromptDataset(_huggingface(config, key), seed=seed, shuffle=shuffle, name=config.path)


def _arithmetic(config: DatasetConfig, seed: int, split: Stream, key: str) -> RowSource:
    try:
        return ArithmeticRows(seed, split, config.min_terms, config.max_terms, config.terms, config.limit or None)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}", "change its min_terms or max_terms") from error


def _huggingface(config: DatasetConfig, key: str) -> RowSource:
    """``path`` is a folder written by ``save_to_disk``, or a name on the hub, ``name:subset`` for a subset."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{key}.type=huggingface needs the package 'datasets'", "pip install '.[datasets]'") from error
    folder = Path(config.path).expanduser()
    try:
        if folder.is_dir():
            rows = datasets.load_from_disk(str(folder))
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[config.split]
        else:
            name, _, subset = config.path.partition(":")
            rows = datasets.load_dataset(name, subset or None, split=config.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{key}: the data set '{config.path}', split '{config.split}', cannot be loaded: {error}", "check path and split"
        ) from error
    return SequenceRows(rows, config.path, RowFormat(config), config.limit)


def encode_prompt(row: Mapping[str, Any], tokenizer: Any, **template_options: Any) -> list[int]:
    """Token ids of a row's prompt. Messages go through the chat template, or are joined by newlines if the tokenizer has none.

    ``template_options`` are variables for the template (``enable_thinking``).

    Raises:
        MalformedRow: the tokenizer or its template rejects the prompt.
    """
    if "input_ids" in row:
        return list(row["input_ids"])
    try:
        if "messages" not in row:
            return list(tokenizer(row["prompt"])["input_ids"])
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True, **template_options)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(tokenizer("\n".join(str(m["content"]) for m in row["messages"]))["input_ids"])
    except Exception as error:  # tokenizers raises bare Exception, templates raise jinja2's own: the row is at fault either way
        raise MalformedRow(f"{row.get('prompt_id', 'a row')}: its prompt cannot be tokenized ({error})") from error
