"""The body of SGLang's POST /generate, there and back: whole answers and streamed ones.

Tokens are taken from ``meta_info.output_token_logprobs``, entries of [log-prob, token id, text or null], never from text. A streamed
chunk of SGLang holds all tokens so far, or with ``--incremental-streaming-output`` only the new ones, and the last chunk of an aborted
request just its last token; in every case the last ``completion_tokens - shown`` entries are the new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from areal.config import GenerationConfig
from areal.types import StopReason


class RequestRejected(ValueError):
    """The server refuses this request, whoever sends it: too long a prompt, a bad token id, a bad field."""


class ProtocolError(RuntimeError):
    """A server answered something that is not SGLang's protocol."""


@dataclass(slots=True)
class PartialAnswer:
    """What has been generated so far, over all submissions."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def drop_last(self) -> None:
        for values in (self.tokens, self.logprobs, self.versions):
            values.pop()


@dataclass(eq=False, slots=True)
class Submission:
    """One POST /generate on its way; a request whose generation is interrupted has several, one after the other."""

    rid: str
    """New for every submission: a server may still know the one before, and SGLang refuses an id twice."""
    n_tokens: int
    """Its input and what it may still generate."""
    done: PartialAnswer
    """Where its tokens go."""
    holds_back: bool = False
    """The server may know tokens that it does not show yet: SGLang does while they could be the beginning of a stop string."""
    version: int = -1
    """Of the weights that sampled its newest token, unless the server stamps versions itself."""
    n_new: int = 0
    """Tokens that this submission has added to ``done``."""
    retractions: int = 0
    """``num_retractions`` of the newest chunk: how often the server has thrown away its KV."""
    pending: int | None = None
    """Version of the update during which this stayed in the server, while no token of it has come yet."""
    is_doubtful: bool = False
    """It went through an update unclear: nothing tells whether its next token was sampled before or after."""
    streamed: bool = False
    stamped: bool = False
    """The server says by which version each token was sampled."""
    is_lost: bool = False
    """A chunk held tokens from before and after an update, or doubtful ones: nothing of it or later is taken over, and it is to be aborted."""
    reason: StopReason | None = None
    """Why it ended; None while it goes on, and if it broke off."""

    def take(self, answer: Any, url: str) -> None:
        """Takes over the new tokens of a whole answer or a chunk.

        Raises:
            RequestRejected: it is a refusal.
            ProtocolError: it is not an answer.
        """
        try:
            self._take(answer, url)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, RequestRejected):
                raise
            raise ProtocolError(f"{url} gave an answer that is not of the /generate protocol ({type(error).__name__}: {error})") from error

    @property
    def is_clear(self) -> bool:
        """Whether the retraction of a pause now would tell its older tokens from newer ones, however late they arrive.

        Not if it has shown nothing since it was sent or since the last update: it may be waiting, and then no pause retracts it.
        """
        return bool(self.n_new) and self.pending is None and not self.holds_back

    def resumed_with(self, version: int) -> None:
        """The server, which stamps no versions, has taken other weights while this was in it, and goes on.

        A pause has made doubtful what is unclear; it is done here too, so that versions do not rest on how a server was paused.
        """
        if self.is_clear:
            self.pending = version
        else:
            self.is_doubtful = True

    def _take(self, answer: Any, url: str) -> None:
        meta, output_ids = answer["meta_info"], answer["output_ids"]
        finish = meta["finish_reason"]
        if finish is not None:
            self.reason = _stop_reason(finish, url)
        n_tokens = meta.get("completion_tokens", len(output_ids))
        n_new = n_tokens - self.n_new
        if self.is_lost or (self.streamed and self.reason == "abort"):
            self.reason = self.reason and "abort"
            return  # an aborted one does not say when its last tokens were sampled; they are sampled again, whatever they are
        # SGLang puts chunks together when its HTTP process comes too late to send the first.
        is_mixed = self.pending is not None and n_new > 1 and meta.get("num_retractions", 0) > self.retractions
        if n_new and (is_mixed or self.is_doubtful):
            self.is_lost = True
            self.reason = self.reason and "abort"
            return
        entries = (meta.get("output_token_logprobs") or [])[-n_new:] if n_new else []
        tokens = [token for _, token, *_ in entries]
        n_told = min(n_new, len(output_ids))
        if n_new != len(tokens) or tokens[n_new - n_told :] != output_ids[len(output_ids) - n_told :]:
            raise ProtocolError(f"{url} gave {n_new} new tokens of {output_ids} with the log-probs of {tokens}")
        self.done.tokens += tokens
        self.done.logprobs += [logprob for logprob, *_ in entries]
        self.done.versions += self._versions(meta, n_new)
        self.n_new = n_tokens

    def _versions(self, meta: dict[str, Any], n_new: int) -> list[int]:
        stamped = meta.get("output_token_versions")
        if stamped is not None:
            self.stamped = True
            return list(stamped[-n_new:]) if n_new else []
        retractions = meta.get("num_retractions", 0) if n_new else self.retractions
        if self.pending is not None and retractions > self.retractions:  # without an update it was for want of memory
            self.version, self.pending = self.pending, None
        self.retractions = retractions
        return [self.version] * n_new


def _stop_reason(finish: Any, url: str) -> StopReason:
    reason = finish["type"]
    if reason == "abort" and finish.get("status_code") not in (None, 500, 503):
        raise RequestRejected(f"{url} refused the request: {finish.get('message', finish)}")
    if reason not in get_args(StopReason):
        raise ProtocolError(f"{url} gave the unknown finish reason {reason!r}")
    return reason


def sampling_params(gconfig: GenerationConfig) -> dict[str, Any]:
    """SGLang's names, without what is at its default."""
    params: dict[str, Any] = {"max_new_tokens": gconfig.max_new_tokens, "temperature": gconfig.temperature}
    if gconfig.min_new_tokens:
        params["min_new_tokens"] = gconfig.min_new_tokens
    if gconfig.top_p < 1.0:
        params["top_p"] = gconfig.top_p
    if gconfig.top_k:
        params["top_k"] = gconfig.top_k
    if gconfig.stop:
        params["stop"] = gconfig.stop
    if gconfig.stop_token_ids:
        params["stop_token_ids"] = gconfig.stop_token_ids
    if gconfig.ignore_eos:
        params["ignore_eos"] = True
    return params
