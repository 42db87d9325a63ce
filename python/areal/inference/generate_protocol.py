"""The body of SGLang's POST /generate, there and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


def take_answer(answer: Any, sent_version: int, done: PartialAnswer, url: str) -> StopReason:
    """Appends an answer's tokens to ``done``; a server that stamps no versions gets ``sent_version``, the one it had at the request.

    Raises:
        RequestRejected: it is a refusal.
        ProtocolError: it is not an answer.
    """
    try:
        meta = answer["meta_info"]
        tokens = answer["output_ids"]
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or ()]
        versions = meta.get("output_token_versions") or [sent_version] * len(tokens)
        finish = meta["finish_reason"]
        reason = finish["type"]
    except (KeyError, TypeError, IndexError) as error:
        raise ProtocolError(f"{url} gave an answer that is not of the /generate protocol ({type(error).__name__}: {error})") from error
    if reason == "abort" and finish.get("status_code") not in (None, 500, 503):
        raise RequestRejected(f"{url} refused the request: {finish.get('message', finish)}")
    if not len(tokens) == len(logprobs) == len(versions):
        raise ProtocolError(f"{url} gave {len(tokens)} tokens with {len(logprobs)} log-probs and {len(versions)} versions")
    done.tokens += tokens
    done.logprobs += logprobs
    done.versions += versions
    if reason not in ("stop", "length", "abort"):
        raise ProtocolError(f"{url} gave the unknown finish reason {reason!r}")
    return reason
