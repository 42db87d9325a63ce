"""How a call may sample: what the request says, within what the run says."""

from __future__ import annotations

from areal.agent.openai_protocol import ApiError, Sampling
from areal.config import GenerationConfig

_MAX_REMEMBERED = 256


class SamplingRules:
    """Requests' settings on top of those of the run.

    Training takes the log-probs of all tokens at the run's temperature and of the untruncated distribution; a session for it refuses
    requests that would sample otherwise. ``max_tokens`` is capped by ``gconfig.max_new_tokens`` and by the context.

    Args:
        gconfig: settings where a request has none.
        training: False = for evaluation, every setting is honoured.
        max_context: longest prompt and answer in tokens; 0 = the server says so, by refusing.
    """

    def __init__(self, gconfig: GenerationConfig, *, training: bool = True, max_context: int = 0) -> None:
        self._gconfig = gconfig.new(n_samples=1)
        self._training = training
        self._max_context = max_context
        # The client works out a request's JSON once for each object, too.
        self._known: dict[tuple[object, ...], GenerationConfig] = {}

    def gconfig(self, sampling: Sampling, n_prompt: int) -> GenerationConfig:
        """The settings of one call. Raises ApiError (a setting that is refused, a prompt that leaves no room)."""
        base = self._gconfig
        if self._training:
            self._refuse(sampling)
        if self._max_context and n_prompt >= self._max_context:
            raise ApiError(
                400,
                f"the prompt has {n_prompt} tokens, and the context is {self._max_context} tokens (the least of rollout.max_context, the "
                "model's limit and in training actor.mb_spec.max_tokens_per_mb)",
                param="messages",
                code="context_length_exceeded",
            )
        room = self._max_context - n_prompt if self._max_context else base.max_new_tokens
        longest = min(sampling.max_tokens or base.max_new_tokens, base.max_new_tokens, room)
        key = (sampling.temperature, sampling.top_p, sampling.top_k, longest, sampling.stop)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            changes: dict[str, object] = {"max_new_tokens": longest, "min_new_tokens": min(base.min_new_tokens, longest)}
            if sampling.temperature is not None:
                changes["temperature"] = sampling.temperature
            if sampling.top_p is not None:
                changes["top_p"] = max(sampling.top_p, 1e-6)  # 0 keeps the likeliest token, as with OpenAI
            if sampling.top_k is not None:
                changes["top_k"] = max(0, sampling.top_k)  # SGLang's -1 is our 0: off
            if sampling.stop:
                changes["stop"] = [*base.stop, *(s for s in sampling.stop if s not in base.stop)]
            known = self._known[key] = base.new(**changes)
        return known

    def _refuse(self, sampling: Sampling) -> None:
        wanted = self._gconfig.temperature
        if sampling.temperature is not None and abs(sampling.temperature - wanted) > 1e-6:
            raise ApiError(
                400,
                f"temperature={sampling.temperature:g}, but this run trains at gconfig.temperature={wanted:g}: leave it out of the call, or set the key",
                param="temperature",
            )
        if sampling.top_p is not None and sampling.top_p < 1:
            raise ApiError(400, f"top_p={sampling.top_p:g}: training needs the whole distribution; leave it out of the call", param="top_p")
        if sampling.top_k is not None and sampling.top_k > 0:
            raise ApiError(400, f"top_k={sampling.top_k}: training needs the whole distribution; leave it out of the call", param="top_k")
