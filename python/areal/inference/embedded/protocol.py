"""SGLang's native JSON, to requests and back. Fields that SGLang has and this engine lacks are refused unless they are neutral."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from areal.inference.embedded.request import Answer, GenerateRequest, RequestError, SamplingParams
from areal.inference.embedded.sampling import seed_of_sample

_DEFAULT_LENGTH = 128
_NUMBERS = {"max_new_tokens": int, "min_new_tokens": int, "temperature": float, "top_p": float, "top_k": int, "sampling_seed": int}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_p": (0, None),
    "stop_regex": (None, []),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "logit_bias": (None, {}),
    "custom_params": (None, {}),
    "no_stop_trim": (False,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1, None),
}


_NEUTRAL_OUTSIDE: dict[str, tuple[Any, ...]] = {
    "logprob_start_len": (None, -1),
    "top_logprobs_num": (None, 0),
    "token_ids_logprob": (None, []),
    "return_hidden_states": (None, False),
    "input_embeds": (None,),
    "image_data": (None, []),
    "audio_data": (None, []),
    "video_data": (None, []),
    "lora_path": (None,),
    "custom_logit_processor": (None,),
}


@dataclass(slots=True)
class GenerateCall:
    """One POST /generate: ``requests`` holds n samples of the first prompt, then of the next."""

    requests: list[GenerateRequest]
    is_list: bool
    """Answered with a list: several prompts, or n > 1."""
    return_logprob: bool
    stream: bool
    skip_special_tokens: bool


def parse_generate(body: Any, tokenizer: Any, max_context: int = 1 << 30) -> GenerateCall:
    """Raises RequestError naming the field. Without max_new_tokens an answer may have SGLang's 128, or what the context leaves."""
    if not isinstance(body, dict):
        raise RequestError("the body of /generate must be a JSON object")
    for name, values in _NEUTRAL_OUTSIDE.items():
        if body.get(name) not in values:
            raise RequestError(f"{name} is {str(body[name])[:80]}, which the embedded engine does not support; leave it out")
    prompts, is_batch = _prompts(body, tokenizer)
    sampling = body.get("sampling_params") or {}
    per_prompt = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    if len(per_prompt) != len(prompts):
        raise RequestError(f"sampling_params has {len(per_prompt)} entries for {len(prompts)} prompts")
    rids = _rids(body.get("rid"), len(prompts))
    requests: list[GenerateRequest] = []
    n_samples = 1
    for prompt, fields, rid in zip(prompts, per_prompt, rids, strict=True):
        params, n_samples = parse_sampling(fields)
        seed = params.pop("sampling_seed", None)
        params.setdefault("max_new_tokens", max(1, params.get("min_new_tokens", 0), min(_DEFAULT_LENGTH, max_context - len(prompt))))
        for sample in range(n_samples):
            keyed = SamplingParams(**params, sampling_seed=None if seed is None else seed_of_sample(seed, sample))
            requests.append(GenerateRequest(prompt, keyed, rid))
    return GenerateCall(
        requests,
        is_batch or n_samples > 1,
        bool(body.get("return_logprob", False)),
        bool(body.get("stream", False)),
        bool(per_prompt[0].get("skip_special_tokens", True)),
    )


def parse_sampling(fields: Any) -> tuple[dict[str, Any], int]:
    """(arguments of SamplingParams, n)."""
    if not isinstance(fields, dict):
        raise RequestError(f"sampling_params must be an object, not {type(fields).__name__}")
    params: dict[str, Any] = {}
    n_samples = 1
    for name, value in fields.items():
        if name in _NUMBERS:
            if value is not None:
                params[name] = _number(name, value, _NUMBERS[name])
        elif name == "n":
            n_samples = _number(name, value, int)
            if n_samples < 1:
                raise RequestError(f"sampling_params.n is {n_samples}; it must be at least 1")
        elif name == "stop":
            strings = [value] if isinstance(value, str) else value or []
            params["stop"] = tuple(_each(name, strings, str))
        elif name == "stop_token_ids":
            params["stop_token_ids"] = tuple(_each(name, value or [], int))
        elif name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(value, bool):
                raise RequestError(f"sampling_params.{name} must be true or false, not {value!r}")
            if name == "ignore_eos":
                params[name] = value
        elif name not in _NEUTRAL:
            raise RequestError(f"sampling_params has the unknown field '{name}'")
        elif value not in _NEUTRAL[name]:
            raise RequestError(f"sampling_params.{name} is {value!r}, which the embedded engine does not support; leave it out")
    if params.get("top_k") == -1:
        params["top_k"] = 0
    return params, n_samples


def answer_json(answer: Answer, call: GenerateCall, tokenizer: Any, weight_version: str, latency: float) -> dict[str, Any]:
    """SGLang's answer to one sample, plus ``meta_info.output_token_versions``."""
    ids = answer.output_ids.tolist()
    meta = {
        "id": answer.request.rid,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(answer.request.input_ids),
        "completion_tokens": len(ids),
        "cached_tokens": answer.cached_tokens,
        "output_token_versions": answer.versions.tolist(),
        "weight_version": weight_version,
        "e2e_latency": latency,
    }
    if call.return_logprob:
        meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in zip(answer.logprobs.tolist(), ids, strict=True)]
    return {"text": _text(answer, ids, call, tokenizer), "output_ids": ids, "meta_info": meta}


def _text(answer: Answer, ids: list[int], call: GenerateCall, tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    reason = answer.finish_reason
    matched = reason.get("matched") if reason else None
    if isinstance(matched, int) and matched in answer.request.params.stop_token_ids:
        ids = ids[:-1]
    text = tokenizer.decode(ids, skip_special_tokens=call.skip_special_tokens)
    return text[: text.find(matched)] if isinstance(matched, str) and matched in text else text


def _prompts(body: dict[str, Any], tokenizer: Any) -> tuple[list[list[int]], bool]:
    """(token ids of every prompt, whether a list of prompts was given)."""
    ids, text = body.get("input_ids"), body.get("text")
    if (ids is None) == (text is None):
        raise RequestError("give either input_ids or text")
    if text is not None:
        texts = [text] if isinstance(text, str) else text
        if tokenizer is None:
            raise RequestError("this model directory has no tokenizer; give input_ids instead of text")
        return [tokenizer.encode(t) for t in _each("text", texts, str)], not isinstance(text, str)
    if not isinstance(ids, list) or not ids:
        raise RequestError("input_ids must be a list of token ids, or a list of such lists, and not empty")
    is_batch = isinstance(ids[0], list)
    prompts = ids if is_batch else [ids]
    for prompt in prompts:
        if not isinstance(prompt, list) or not set(map(type, prompt)) <= {int}:
            raise RequestError("input_ids must be a list of token ids, or a list of such lists")
    return prompts, is_batch


def _rids(rid: Any, n_prompts: int) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(n_prompts)]
    rids = rid if isinstance(rid, list) else [rid] * n_prompts
    if len(rids) != n_prompts or not all(isinstance(r, str) for r in rids):
        raise RequestError(f"rid must be a string, or a list of {n_prompts} strings")
    return rids


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise RequestError(f"sampling_params.{name} must be {'a number' if kind is float else 'an integer'}, not {value!r}")
    return kind(value)


def _each(name: str, values: Any, kind: type) -> list[Any]:
    if not isinstance(values, list | tuple) or not all(type(v) is kind for v in values):
        raise RequestError(f"{name} must be a list of {'strings' if kind is str else 'integers'}, not {values!r}")
    return list(values)
