"""Every consumed batch as JSONL, one sample a line (``stats_logger.dump_trajectories``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from areal.types import Group


class TrajectoryLog:
    """Lines of ``step, group_id, sample, prompt, answer, reward, truncated, input_ids, loss_mask, versions, logprobs``."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self._file = path.open("ab")
        self._tokenizer = tokenizer

    def write(self, groups: Sequence[Group], step: int) -> None:
        for group in groups:
            for sample, t in ((i, t) for i, members in enumerate(group.episodes()) for t in members):
                first = int(t.loss_mask.argmax()) if t.loss_mask.any() else len(t)
                row = {
                    "step": step,
                    "group_id": group.group_id,
                    "sample": sample,
                    "prompt": self._tokenizer.decode(t.input_ids[:first].tolist()),
                    "answer": self._tokenizer.decode(t.input_ids[first:].tolist()),
                    "reward": t.reward,
                    "truncated": t.truncated,
                    "input_ids": t.input_ids,
                    "loss_mask": t.loss_mask,
                    "versions": t.versions,
                    "logprobs": t.logprobs,
                }
                self._file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
