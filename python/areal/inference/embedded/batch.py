"""The running sequences as arrays, so that a decode step costs a handful of numpy calls however many rows it has.

Row i belongs to the sequence in K/V slot i; rows 0 .. n_rows-1 are in use, without holes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal.inference.embedded.request import Answer, Sequence

_INT_FIELDS = 6


class RunningBatch:
    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.n_rows = 0
        self.sequences: list[Sequence] = []
        self._ints = np.zeros((_INT_FIELDS, n_slots), dtype=np.int64)
        self.last_token, self.position, self.n_out, self.max_new, self.min_new, self.top_k = self._ints
        """last_token is the next one to be fed, at ``position``; so K/V below ``position`` is stored."""
        self._floats = np.zeros((2, n_slots))
        self.temperature, self.top_p = self._floats
        self.key = np.zeros(n_slots, dtype=np.uint64)
        """From the seed; see ``sampling.keyed_uniforms``."""
        self.n_filtered = 0
        """Rows whose sampling is more than a draw at temperature 1."""
        self.n_watched = 0
        """Rows that stream or have stop strings."""
        self.stop_ids = np.full((1, n_slots), -1, dtype=np.int64)
        """[most stop tokens of any row, n_slots]; -1 where a row has fewer."""
        self._rows = np.arange(n_slots)
        self.out_tokens = np.zeros((n_slots, 64), dtype=np.int64)
        self.out_logprobs = np.zeros((n_slots, 64), dtype=np.float32)

    @property
    def n_free(self) -> int:
        return self.n_slots - self.n_rows

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the next row; its K/V is to be stored for all prompt tokens but the last."""
        slot = self.n_rows
        prompt, params = sequence.request.input_ids, sequence.request.params
        self._ints[:, slot] = prompt[-1], len(prompt) - 1, 0, params.max_new_tokens, params.min_new_tokens, params.top_k
        self._floats[:, slot] = params.temperature, params.top_p
        self.key[slot] = sequence.key
        self._count(sequence, 1)
        n_stops = len(sequence.stop_ids)
        if n_stops > self.stop_ids.shape[0]:
            self.stop_ids = np.pad(self.stop_ids, ((0, n_stops - self.stop_ids.shape[0]), (0, 0)), constant_values=-1)
        self.stop_ids[:, slot] = -1
        self.stop_ids[:n_stops, slot] = sequence.stop_ids
        sequence.slot = slot
        self.sequences.append(sequence)
        self.n_rows += 1

    def advance(self, tokens: NDArray[np.int64], logprobs: NDArray[np.float32]) -> NDArray[np.intp]:
        """Records one sampled token of each of the first rows; returns those that reached a stop token or their length."""
        n = len(tokens)
        n_out = self.n_out[:n]
        if n_out.max() >= self.out_tokens.shape[1]:
            self.out_tokens = np.pad(self.out_tokens, ((0, 0), (0, self.out_tokens.shape[1])))
            self.out_logprobs = np.pad(self.out_logprobs, ((0, 0), (0, self.out_logprobs.shape[1])))
        rows = self._rows[:n]
        self.out_tokens[rows, n_out] = tokens
        self.out_logprobs[rows, n_out] = logprobs
        self.last_token[:n] = tokens
        self._ints[1:3, :n] += 1
        done = n_out >= self.max_new[:n]
        for stop in self.stop_ids[:, :n]:
            done |= stop == tokens
        return np.flatnonzero(done)

    def stored_tokens(self, slot: int) -> list[int]:
        """The tokens whose K/V is, or after a prefill will be, in the slot: all but the last one."""
        prompt = self.sequences[slot].request.input_ids
        n_out = int(self.n_out[slot])
        return prompt[:-1] if n_out == 0 else prompt + self.out_tokens[slot, : n_out - 1].tolist()

    def answer(self, slot: int, reason: dict[str, Any] | None) -> Answer:
        """What the row has generated so far, copied."""
        n = int(self.n_out[slot])
        return self.sequences[slot].answer(self.out_tokens[slot, :n].copy(), self.out_logprobs[slot, :n].copy(), reason)

    def drop(self, slots: list[int]) -> Iterator[tuple[int, int, int]]:
        """Removes rows; yields (from, to, K/V length) for every sequence that moves down to close a hole, before it moves."""
        for slot in sorted(slots, reverse=True):
            self._count(self.sequences[slot], -1)
            last = self.n_rows - 1
            if slot != last:
                yield last, slot, int(self.position[last])
                n_out = self.n_out[last]
                self._ints[:, slot] = self._ints[:, last]
                self._floats[:, slot] = self._floats[:, last]
                self.key[slot] = self.key[last]
                self.stop_ids[:, slot] = self.stop_ids[:, last]
                self.out_tokens[slot, :n_out] = self.out_tokens[last, :n_out]
                self.out_logprobs[slot, :n_out] = self.out_logprobs[last, :n_out]
                self.sequences[slot] = self.sequences[last]
                self.sequences[slot].slot = slot
            self.sequences.pop()
            self.n_rows -= 1

    def _count(self, sequence: Sequence, sign: int) -> None:
        params = sequence.request.params
        filtered = params.temperature != 1.0 or params.top_p < 1.0 or params.top_k > 0 or params.min_new_tokens > 0
        self.n_filtered += sign * filtered
        self.n_watched += sign * (bool(params.stop) or sequence.request.on_token is not None)
