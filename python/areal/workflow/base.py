"""What a workflow is, and how the dict it returns becomes a ``Trajectory``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from areal.config import ConfigError
from areal.inference.client import ProtocolError, ServerDied
from areal.reward import RewardServiceError
from areal.reward.address import is_service
from areal.reward.http import HTTPReward
from areal.types import ModelRequest, ModelResponse, Trajectory

FATAL = (ServerDied, ProtocolError, RewardServiceError, ConfigError)
"""What ends a run instead of one episode. A mistake in the configuration would be found again by every episode."""
_KEYS = ("input_ids", "loss_mask", "logprobs", "versions")


class TrajectoryError(ValueError):
    """A workflow returned something that is not a trajectory, told in one sentence."""


class EpisodeDropped(Exception):
    """Raised by a workflow, or about one: this episode gives no sample. ``cause`` is counted; the group goes with it."""

    def __init__(self, cause: str, message: str = "") -> None:
        super().__init__(message or cause)
        self.cause = cause


class GenerationEngine(Protocol):
    """What a workflow generates with: a ``RolloutClient``, or a handle on it made for one episode."""

    async def agenerate(self, request: ModelRequest) -> ModelResponse: ...

    def get_version(self) -> int: ...


@runtime_checkable
class RolloutWorkflow(Protocol):
    """One episode: from a row of the data set to a scored sample. Many run at the same time on one object."""

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Mapping[str, Any] | Sequence[Mapping[str, Any]] | None:
        """Generates with ``engine`` and scores.

        Returns:
            ``input_ids``, ``loss_mask``, ``logprobs``, ``versions`` of shape [L] or [1, L] and ``rewards`` of shape [] or [1], as torch
            tensors, numpy arrays or lists (see ``to_trajectory``); an episode of several sequences gives a list of such dicts, or one
            whose values have a leading dimension of N, with an ``attention_mask``. None drops the episode, and its group with it.
        """
        ...


def import_object(key: str, path: str) -> Any:
    """``package.module:name`` (or with a dot for the colon); ``ConfigError`` naming the key."""
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # boundary to the user's module, which may raise anything
        raise ConfigError(
            f"{key}='{path}' cannot be imported ({type(error).__name__}: {error})", "write package.module:name of something that can"
        ) from error


def to_trajectories(result: Any) -> list[Trajectory]:
    """All sequences of an episode: of a dict, a dict whose values have a leading dimension of N, or a list of dicts.

    Raises:
        TrajectoryError: as ``to_trajectory``; an empty list.
    """
    if isinstance(result, Mapping):
        ids = result.get("input_ids")
        shape = np.shape(_array("input_ids", ids)) if ids is not None else ()
        rows = _rows(result, shape[0]) if len(shape) == 2 and shape[0] > 1 else [result]
    elif isinstance(result, Sequence) and not isinstance(result, str):
        rows = list(result)
    else:
        rows = [result]
    if not rows:
        raise TrajectoryError("the workflow returned an empty list; return None to drop an episode")
    return [to_trajectory(row) for row in rows]


def _rows(result: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """The N sequences of values with a leading dimension of N."""
    arrays = {key: _array(key, result[key]) for key in (*_KEYS, "rewards", "attention_mask", "truncated") if result.get(key) is not None}
    for key, array in arrays.items():
        if array.ndim == 0 or len(array) != n:
            raise TrajectoryError(f"the workflow's '{key}' has shape {list(array.shape)}, its input_ids hold {n} sequences")
    rows: list[dict[str, Any]] = [{key: array[i] for key, array in arrays.items()} for i in range(n)]
    rows[-1]["final_answer"] = result.get("final_answer")
    return rows


def reward_callable(reward_fn: Callable[..., Any] | str, timeout: float | None = None) -> Callable[..., Any]:
    """The function itself, that of an import path, or the client of the service at an address; ``timeout`` is that client's, in seconds."""
    if not isinstance(reward_fn, str):
        return reward_fn
    if is_service(reward_fn):
        return HTTPReward(reward_fn) if timeout is None else HTTPReward(reward_fn, timeout)
    return import_object("reward_fn", reward_fn)  # type: ignore[no-any-return]


def to_trajectory(result: Mapping[str, Any] | Trajectory) -> Trajectory:
    """Checks what a workflow returned and brings it into the unpadded form.

    Args:
        result: per-token values are aligned with the token they describe (``logprobs[t]`` belongs to ``input_ids[t]``), versions are -1
            on tokens that no policy sampled. An ``attention_mask`` [L] marks padding, which is cut off. ``truncated`` (an answer was cut
            off by its length limit) and ``final_answer`` (a string, for majority votes) may be given. Further keys are ignored.

    Raises:
        TrajectoryError: a key is missing, shapes disagree, or a loss token has no version or no finite log-prob.
    """
    if isinstance(result, Trajectory):
        return result
    if not isinstance(result, Mapping):
        raise TrajectoryError(f"a workflow returns a dict of tensors or None, not {type(result).__name__}")
    missing = [key for key in (*_KEYS, "rewards") if key not in result]
    if missing:
        raise TrajectoryError(f"the workflow's dict has no '{missing[0]}'; it has {', '.join(map(str, result)) or 'nothing'}")
    ids, mask, logprobs, versions = (_flat(key, result[key]) for key in _KEYS)
    lengths = {key: len(value) for key, value in zip(_KEYS, (ids, mask, logprobs, versions), strict=True)}
    if len(set(lengths.values())) > 1:
        raise TrajectoryError(f"the workflow's per-token values differ in length: {lengths}")
    if result.get("attention_mask") is not None:
        keep = _flat("attention_mask", result["attention_mask"]).astype(bool)
        if len(keep) != len(ids):
            raise TrajectoryError(f"the workflow's attention_mask has {len(keep)} entries for {len(ids)} tokens")
        ids, mask, logprobs, versions = ids[keep], mask[keep], logprobs[keep], versions[keep]
    reward = np.asarray(_array("rewards", result["rewards"]), dtype=np.float64).reshape(-1)
    if reward.size != 1:
        raise TrajectoryError(
            f"a sequence has one reward, the workflow's 'rewards' has {reward.size} values; an episode of several returns a list of dicts"
        )
    if not np.isfinite(reward[0]):
        raise TrajectoryError(f"the workflow's reward is {reward[0]}; it must be finite")
    trajectory = Trajectory(
        input_ids=ids.astype(np.int64),
        loss_mask=mask.astype(bool),
        logprobs=logprobs.astype(np.float32),
        versions=versions.astype(np.int32),
        reward=float(reward[0]),
        truncated=bool(np.any(_array("truncated", result.get("truncated", False)))),
        final_answer=_final_answer(result.get("final_answer")),
    )
    _check_loss_tokens(trajectory)
    return trajectory


def _final_answer(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TrajectoryError(f"the workflow's final_answer is a {type(value).__name__}; it must be a string, or None")
    return value


def _check_loss_tokens(trajectory: Trajectory) -> None:
    mask = trajectory.loss_mask
    if not mask.any():
        raise TrajectoryError("the workflow's loss_mask is all zero: there is nothing to train on")
    if (trajectory.input_ids < 0).any():
        raise TrajectoryError("the workflow's input_ids have a negative token; cut padding off, or mark it in an attention_mask")
    if mask[0]:
        raise TrajectoryError("the first token has loss_mask 1, but nothing predicts it; shift the mask to the token it describes")
    if (trajectory.versions[mask] < 0).any():
        raise TrajectoryError("a token with loss_mask 1 has version -1; use the output_versions of the response")
    if not np.isfinite(trajectory.logprobs[mask]).all() or (trajectory.logprobs[mask] > 1e-3).any():
        raise TrajectoryError(
            "a token with loss_mask 1 has a log-prob that is positive or not finite; use the output_logprobs of the response"
        )
    trajectory.logprobs[~mask] = 0.0


def _array(key: str, value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):  # a torch tensor; torch itself need not be imported here
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TrajectoryError(f"the workflow's '{key}' is not an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TrajectoryError(f"the workflow's '{key}' is not an array of numbers but of {array.dtype}")
    return array


def _flat(key: str, value: Any) -> NDArray[Any]:
    array = _array(key, value)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1:
        raise TrajectoryError(f"the workflow's '{key}' has shape {list(array.shape)}; it must be [L] or [1, L]")
    return array
