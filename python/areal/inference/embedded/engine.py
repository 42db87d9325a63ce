"""The embedded engine: continuous batching over K/V slots, with weights that change between two decode steps.

One step = admit waiting sequences (prefill), decode one token for every running sequence, hand out what has finished. A sequence's
K/V always covers all its tokens but the last, which is fed in the next decode step: the same invariant after a prefill, after a
decode step, and after the K/V was recomputed under new weights. The engine has no threads and no locks: one thread calls it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Sequence_
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from areal.inference.embedded.batch import RunningBatch
from areal.inference.embedded.forward import Forward
from areal.inference.embedded.kv_cache import SHORT_PROMPT, DecodeContext, KVCache, PrefillContext, slots_and_positions
from areal.inference.embedded.request import Answer, GenerateRequest, RequestError, Sequence
from areal.inference.embedded.sampling import keyed_uniforms, sample_tokens, sequence_key
from areal.inference.embedded.scheduler import PrefillGroup, Scheduler
from areal.models.loading import load_model
from areal.models.selfcheck import check_supported

UpdateMode = Literal["retract", "in_place"]
PauseMode = Literal["abort", "retract", "in_place"]
_MIXED_TOKENS = 512
"""Prompt tokens that may ride along with a decode step."""
_MIN_ROWS = 4
"""Deterministic mode decodes at least this many rows (see kv_cache)."""


class EmbeddedEngine:
    """Generates from a Hugging Face decoder-only model on one device.

    Args:
        model: a model with areal's attention, or the directory of one.
        max_running_requests: sequences decoded at once (K/V slots).
        max_context: longest prompt + answer in tokens; 0 = the model's own limit.
        deterministic: an answer's bits depend on its prompt, seed and weights only (CPU, one thread).
        update_mode: what running sequences do with their K/V at a weight update unless the update says otherwise.
        tokenizer: needed for stop strings only.

    Raises:
        ValueError: the model is one that this engine would compute wrongly, or deterministic mode is not possible.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_running_requests: int = 64,
        max_context: int = 0,
        max_prefill_tokens: int = 8192,
        deterministic: bool = False,
        update_mode: UpdateMode = "retract",
        tokenizer: Any = None,
    ) -> None:
        if max_running_requests < 1:
            raise ValueError(f"max_running_requests is {max_running_requests}; it must be at least 1")
        self.device = torch.device(device)
        if deterministic and self.device.type != "cpu":
            raise ValueError(f"deterministic mode needs device cpu, not {device}")
        if deterministic and torch.get_num_threads() != 1:
            raise ValueError(f"deterministic mode needs one thread, not {torch.get_num_threads()}; call torch.set_num_threads(1) first")
        if not isinstance(model, PreTrainedModel):
            model = load_model(model, dtype=dtype, device=self.device)
        check_supported(model.config)
        self.model = model
        limit = getattr(model.config, "max_position_embeddings", None) or 1 << 20
        if max_context > limit:
            raise ValueError(f"max_context is {max_context}, but the model's own limit is {limit} tokens; lower it")
        self.max_context = max_context or limit
        self.deterministic = deterministic
        self.update_mode: UpdateMode = update_mode
        self.tokenizer = tokenizer
        self.version = 0
        self.paused = False
        self.tokens_generated = 0
        self.prefill_tokens = 0
        self._max_prefill_tokens = max_prefill_tokens
        self._eos_ids = _eos_ids(model)
        with torch.no_grad():
            n_slots = max(max_running_requests, _MIN_ROWS) if deterministic else max_running_requests
            self._cache = KVCache(model, n_slots, self.max_context)
            self._forward = Forward(model)
        self._batch = RunningBatch(max_running_requests)
        self._scheduler = Scheduler(max_running_requests)
        self._finished: list[Answer] = []
        self._stale_kv = False
        self._donors: dict[bytes, Sequence] = {}
        """By prompt, a running sequence whose K/V of that prompt is of the current weights."""

    # -- requests ---------------------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> None:
        """Queues a request; its answer comes out of a later ``step``. Raises RequestError if it cannot be served."""
        self.check(request)
        params = request.params
        key = sequence_key(secrets.randbits(64) if params.sampling_seed is None else params.sampling_seed)
        stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *self._eos_ids)
        prompt_key = np.asarray(request.input_ids, dtype=np.int64).tobytes()
        self._scheduler.waiting.append(Sequence(request, key, np.array(stops, dtype=np.int64), prompt_key))

    def check(self, request: GenerateRequest) -> None:
        """Raises RequestError, in one sentence, if the request cannot be served. Any thread may call it."""
        n, longest = len(request.input_ids), request.params.max_new_tokens
        if n == 0:
            raise RequestError("the prompt is empty; input_ids needs at least one token")
        if n + longest > self.max_context:
            raise RequestError(
                f"the prompt has {n} tokens and max_new_tokens is {longest}: together they exceed the context of {self.max_context} tokens"
            )
        low, high = min(request.input_ids), max(request.input_ids)
        if low < 0 or high >= self._forward.vocab_size:
            raise RequestError(f"token id {low if low < 0 else high} is outside of the vocabulary of {self._forward.vocab_size} tokens")
        if request.params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, which this model directory has not; use stop_token_ids")

    @torch.inference_mode()
    def abort(self, rid: str | None) -> int:
        """Ends the requests of this id (None: all); what they have so far comes out of the next ``step``. Returns how many."""
        reason = {"type": "abort", "message": "Aborted by request."}
        waiting = self._scheduler.remove(rid)
        slots = [s.slot for s in self._batch.sequences if rid is None or s.request.rid == rid]
        self._finished += [s.answer(np.zeros(0, np.int64), np.zeros(0, np.float32), reason) for s in waiting]
        self._finished += [self._batch.answer(slot, reason) for slot in slots]
        self._drop(slots)
        return len(waiting) + len(slots)

    def generate(self, requests: Iterable[GenerateRequest]) -> list[Answer]:
        """Serves these requests to the end, in process; results in their order. The engine must be idle."""
        order = {}
        for index, request in enumerate(requests):
            self.submit(request)
            order[id(request)] = index
        results: list[Answer | None] = [None] * len(order)
        while self.has_work:
            for finished in self.step():
                results[order[id(finished.request)]] = finished
        return [result for result in results if result is not None]

    @property
    def has_work(self) -> bool:
        """Whether a ``step`` would do anything."""
        return bool(self._finished) or (not self.paused and bool(self._batch.n_rows or self._scheduler.waiting))

    @property
    def n_running(self) -> int:
        return self._batch.n_rows

    @property
    def n_waiting(self) -> int:
        return len(self._scheduler.waiting)

    # -- interruption -----------------------------------------------------------------------------------------------------------

    def pause(self, mode: PauseMode) -> None:
        """Stops generating. abort: requests end with what they have; retract: they will recompute their K/V; in_place: they keep it."""
        if mode == "abort":
            self.abort(None)
        elif mode == "retract":
            self._stale_kv = True
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def parameters(self) -> dict[str, Tensor]:
        """The engine's weights by their Hugging Face names, tied ones once; written in place by updates."""
        return {name: parameter.data for name, parameter in self.model.named_parameters()}

    def update_weights(self, load: Callable[[Mapping[str, Tensor]], int], mode: UpdateMode | None = None) -> None:
        """Takes new weights between two decode steps.

        Args:
            load: writes into the given parameters and returns the version they now have; if it raises, it must have written nothing.
            mode: retract = running sequences recompute their K/V under the new weights; in_place = they keep it. None = the default.
        """
        with torch.inference_mode():
            self.version = load(self.parameters())
        if (mode or self.update_mode) == "retract":
            self._stale_kv = True
        else:
            self._donors.clear()
        for sequence, n_out in zip(self._batch.sequences, self._batch.n_out, strict=False):
            sequence.mark_version(int(n_out), self.version)

    # -- the step ---------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Admits, decodes one token for every running sequence, and returns the requests that ended."""
        if not self.paused:
            if self._stale_kv:
                self._recompute_kv()
            n_rows = self._batch.n_rows
            groups = self._scheduler.take(self._batch.n_free, n_rows)
            prompts = self._admit(groups)
            if n_rows and prompts and self._can_mix(prompts):
                # The prompts ride along with this step; their sequences decode from the next one on.
                self._decode(n_rows, prompts, groups)
            else:
                self._prefill(prompts)
                self._share(groups)
                if self._batch.n_rows:
                    self._decode(self._batch.n_rows)
        finished, self._finished = self._finished, []
        return finished

    def _admit(self, groups: list[PrefillGroup]) -> list[tuple[int, list[int]]]:
        """Gives every sequence a row; returns what is to be prefilled, as (slot, tokens).

        A prompt that a running sequence has too is copied from there, unless that K/V is of older weights (in_place updates).
        """
        prompts = []
        for group in groups:
            leader = group.members[0]
            tokens = leader.request.input_ids[:-1]
            donor = None if self.deterministic else self._donors.get(leader.prompt_key)
            for sequence in group.members:
                self._batch.add(sequence)
                sequence.mark_version(0, self.version)
                sequence.cached_tokens = 0 if sequence is leader and donor is None else len(tokens)
            if not tokens:
                continue
            if donor is None:
                prompts.append((leader.slot, tokens))
                self._donors[leader.prompt_key] = leader
            else:
                self._cache.copy(donor.slot, [s.slot for s in group.members], len(tokens))
                group.members.clear()  # nothing left to share
        return prompts

    def _share(self, groups: Sequence_[PrefillGroup]) -> None:
        """Copies every prefilled prompt's K/V to the other sequences of that prompt."""
        for group in groups:
            if not group.members:
                continue
            n_tokens = len(group.members[0].request.input_ids) - 1
            if n_tokens and len(group.members) > 1:
                self._cache.copy(group.members[0].slot, [s.slot for s in group.members[1:]], n_tokens)

    def _can_mix(self, prompts: list[tuple[int, list[int]]]) -> bool:
        """Whether prompts may go through the same forward pass as decoding rows: short ones; in deterministic mode none."""
        if self.deterministic or not self._cache.compiled:
            return False
        lengths = [len(tokens) for _, tokens in prompts]
        return max(lengths) <= SHORT_PROMPT and sum(lengths) <= _MIXED_TOKENS

    def _recompute_kv(self) -> None:
        stored = [(slot, self._batch.stored_tokens(slot)) for slot in range(self._batch.n_rows)]
        self._prefill([(slot, tokens) for slot, tokens in stored if tokens])
        self._stale_kv = False

    def _prefill(self, work: list[tuple[int, list[int]]]) -> None:
        """Stores the K/V of (slot, tokens) pairs, several a forward pass; in deterministic mode one."""
        while work:
            n, total = 1, len(work[0][1])
            while not self.deterministic and n < len(work) and total + len(work[n][1]) <= self._max_prefill_tokens:
                total += len(work[n][1])
                n += 1
            chunk, work = work[:n], work[n:]
            lengths = [len(tokens) for _, tokens in chunk]
            self._cache.reserve(max(lengths) + 1)
            context = PrefillContext(self._cache, [slot for slot, _ in chunk], lengths)
            ids = torch.tensor([token for _, tokens in chunk for token in tokens], device=self.device)
            self._forward.hidden(ids, context.positions, context)
            self.prefill_tokens += total

    def _decode(self, n: int, prompts: Sequence_[tuple[int, list[int]]] = (), groups: Sequence_[PrefillGroup] = ()) -> None:
        """One token for each of the first n rows; ``prompts`` are prefilled in the same forward pass, then shared in their groups."""
        batch = self._batch
        # Padding rows use free slots, at position 0.
        n_padded = max(n, _MIN_ROWS) if self.deterministic else n
        lengths = (batch.position[:n] + 1).tolist() + [1] * (n_padded - n)
        ids = torch.from_numpy(_padded(batch.last_token[:n], n_padded))
        positions = torch.from_numpy(_padded(batch.position[:n], n_padded))
        slots = None
        if prompts:
            prompt_slots, prompt_positions = slots_and_positions([slot for slot, _ in prompts], [len(tokens) for _, tokens in prompts])
            ids = torch.cat([ids, torch.tensor([token for _, tokens in prompts for token in tokens])])
            positions = torch.cat([positions, prompt_positions])
            slots = torch.cat([torch.arange(n), prompt_slots]).to(self.device)
            self.prefill_tokens += len(prompt_slots)
        self._cache.reserve(max(*lengths, *(len(tokens) for _, tokens in prompts), 1))
        positions = positions.to(self.device)
        context = DecodeContext(self._cache, positions, lengths, slots, deterministic=self.deterministic)
        hidden = self._forward.hidden(ids.to(self.device), positions, context)
        tokens, logprobs = self._sample(self._forward.logits(hidden[:n_padded])[:n])
        self._share(groups)
        self.tokens_generated += n
        done = batch.advance(tokens.cpu().numpy(), logprobs.cpu().numpy())
        self._collect(done.tolist())

    def _sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        batch, n = self._batch, logits.shape[0]
        uniforms = torch.from_numpy(keyed_uniforms(batch.key[:n], batch.n_out[:n])).to(self.device)
        if not batch.n_filtered:
            return sample_tokens(logits, uniforms)
        temperature, top_p, top_k = batch.temperature[:n], batch.top_p[:n], batch.top_k[:n]

        def on_device(array: np.ndarray, needed: bool) -> Tensor | None:
            return torch.from_numpy(array).to(self.device) if needed else None

        return sample_tokens(
            logits,
            uniforms,
            temperature_R=on_device(temperature.astype(np.float32), bool((temperature != 1.0).any())),
            top_p_R=on_device(top_p, bool((top_p < 1.0).any())),
            top_k_R=on_device(top_k, bool(top_k.any())),
            banned_RV=self._banned(logits) if (batch.n_out[:n] < batch.min_new[:n]).any() else None,
        )

    def _banned(self, logits: Tensor) -> Tensor:
        """bool [R, V]: the stop tokens of rows that are still below their min_new_tokens."""
        batch, n = self._batch, logits.shape[0]
        banned = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        for row in np.flatnonzero(batch.n_out[:n] < batch.min_new[:n]).tolist():
            ids = batch.sequences[row].stop_ids
            banned[row, torch.from_numpy(ids[(ids >= 0) & (ids < logits.shape[1])])] = True
        return banned

    def _collect(self, done: list[int]) -> None:
        """Ends the rows ``done`` and those whose text now holds a stop string."""
        reasons: dict[int, dict[str, Any]] = {}
        for slot in done:
            token = int(self._batch.last_token[slot])
            stopped = token in self._batch.sequences[slot].stop_ids
            reasons[slot] = {"type": "stop", "matched": token} if stopped else {"type": "length", "length": int(self._batch.n_out[slot])}
        if self._batch.n_watched:
            self._watch(reasons)
        if reasons:
            self._finished += [self._batch.answer(slot, reason) for slot, reason in reasons.items()]
            self._drop(list(reasons))

    def _watch(self, reasons: dict[int, dict[str, Any]]) -> None:
        for slot, sequence in enumerate(self._batch.sequences):
            params = sequence.request.params
            if params.stop and (match := self._stop_string(slot, params.stop)):
                reasons[slot] = {"type": "stop", "matched": match}
            if sequence.request.on_token and slot not in reasons:
                sequence.request.on_token(self._batch.answer(slot, None))

    def _stop_string(self, slot: int, stops: tuple[str, ...]) -> str | None:
        """The stop string that the newest token completed. Looks at a tail only: a character takes at most four tokens."""
        n_out = int(self._batch.n_out[slot])
        if n_out < self._batch.min_new[slot]:
            return None
        window = 4 * max(map(len, stops)) + 8
        text = self.tokenizer.decode(self._batch.out_tokens[slot, max(0, n_out - window) : n_out].tolist(), skip_special_tokens=False)
        return next((stop for stop in stops if stop in text), None)

    def _drop(self, slots: list[int]) -> None:
        for slot in slots:
            sequence = self._batch.sequences[slot]
            if self._donors.get(sequence.prompt_key) is sequence:
                del self._donors[sequence.prompt_key]
        for source, target, length in self._batch.drop(slots):
            self._cache.copy(source, [target], length)


def _padded(values: np.ndarray, n: int) -> np.ndarray:
    return values if len(values) == n else np.pad(values, (0, n - len(values)))


def _eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The model's end-of-sequence tokens: those of its generation config, else of its config."""
    generation = getattr(model, "generation_config", None)
    eos = generation.eos_token_id if generation is not None and generation.eos_token_id is not None else model.config.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)
