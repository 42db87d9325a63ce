"""The turns of an episode as sequences to train on, each with its reward.

``concat``: turns that extend one another are one sequence, up to a turn that nothing extends; where branches share turns, the first
one trains on them and the others have them as context, so that every sampled token is trained on exactly once. ``individual``: one
sequence a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from areal.agent.session import Turn
from areal.evaluation_scores import answer_class
from areal.reward import RewardFailure
from areal.reward.worker import BadScore, check_score

Style = Literal["concat", "individual"]


def export(turns: Sequence[Turn], reward: Any, *, style: Style = "concat", turn_discount: float = 1.0) -> list[dict[str, Any]]:
    """The dicts of ``to_trajectories``; the last one ends with the last turn.

    Args:
        turns: at least one, in the order in which they were answered.
        reward: a number, the episode's; or a dict from the ids of completions to theirs, 0 for those not in it.
        style: in ``concat`` a sequence has the reward of the first turn that it trains on.
        turn_discount: the reward of a turn is its own (a number is that of the last call), plus this times that of the next call.

    Raises:
        RewardFailure: a reward that is not a finite number, or of a completion that there is not.
    """
    rewards = turn_rewards(turns, reward, turn_discount)
    if style == "individual":
        return [_sequence([turn], {turn}, rewards[turn]) for turn in turns if turn.response.output_tokens]
    extended = {turn.parent for turn in turns}
    trained: set[Turn] = set()
    sequences = []
    for leaf in turns:
        if leaf not in extended:
            chain = _chain(leaf)
            new = [turn for turn in chain if turn not in trained]
            trained.update(new)
            if any(turn.response.output_tokens for turn in new):
                sequences.append(_sequence(chain, set(new), rewards[new[0]]))
    return sequences


def turn_rewards(turns: Sequence[Turn], reward: Any, discount: float) -> dict[Turn, float]:
    """What each turn is trained with. The choices of one call share what comes behind it; the call itself counts with their mean."""
    own = _own_rewards(turns, reward)
    calls: dict[int, list[Turn]] = {}
    for turn in turns:
        calls.setdefault(turn.call, []).append(turn)
    rewards: dict[Turn, float] = {}
    behind = 0.0
    for number in sorted(calls, reverse=True):
        for turn in calls[number]:
            rewards[turn] = own[turn] + discount * behind
        behind = sum(rewards[turn] for turn in calls[number]) / len(calls[number])
    return rewards


def _own_rewards(turns: Sequence[Turn], reward: Any) -> dict[Turn, float]:
    if not isinstance(reward, Mapping):
        score, last = _score(reward), max(turn.call for turn in turns)
        return {turn: score if turn.call == last else 0.0 for turn in turns}
    if not reward:
        raise RewardFailure("reward_bad_value", "the agent returned an empty dict of rewards; return None to drop an episode")
    ids = {turn.id for turn in turns}
    if unknown := [name for name in reward if name not in ids]:
        raise RewardFailure("reward_bad_value", f"the agent returned a reward for {unknown[0]!r}, which is not the id of a completion")
    return {turn: _score(reward.get(turn.id, 0.0)) for turn in turns}


def _score(value: Any) -> float:
    try:
        return check_score(value)
    except BadScore as error:
        raise RewardFailure("reward_bad_value", f"{error}; an agent's run returns a number, a dict of them, or None") from error


def _chain(leaf: Turn) -> list[Turn]:
    """From the first turn to this one."""
    chain = [leaf]
    while chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    return chain[::-1]


def _sequence(chain: Sequence[Turn], trained: set[Turn], reward: float) -> dict[str, Any]:
    """Prompt and output of the last turn, which hold those before; loss on the outputs of ``trained``."""
    last = chain[-1]
    ids = np.array(last.ids, dtype=np.int64)
    mask = np.zeros(len(ids), dtype=bool)
    logprobs = np.zeros(len(ids), dtype=np.float32)
    versions = np.full(len(ids), -1, dtype=np.int32)
    for turn in chain:
        begin = turn.response.input_len
        end = begin + turn.response.output_len
        versions[begin:end] = turn.response.output_versions
        if turn in trained:
            mask[begin:end] = True
            logprobs[begin:end] = turn.response.output_logprobs
    truncated = any(turn.response.stop_reason == "length" for turn in chain if turn in trained)
    return {
        "input_ids": ids,
        "loss_mask": mask,
        "logprobs": logprobs,
        "versions": versions,
        "rewards": reward,
        "truncated": truncated,
        "final_answer": answer_class(last.text),
    }
