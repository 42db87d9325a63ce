"""Scores of an HTTP service: ``areal reward-server``, or one that a user has.

Who waits on whom: a call waits for one of ``max_in_flight`` places, then for the service, ``timeout`` seconds in all tries together. A
service that is full (429, 503) or away (no connection) is asked again until then, less and less often.
"""

from __future__ import annotations

import asyncio
import random
import re
import weakref
from typing import Any

from areal.inference.wire import AnswerTooLong, HTTPStatusError, Wire, WireError
from areal.reward.address import SCHEMES, service_address
from areal.reward.process import RewardFailure, RewardServiceError
from areal.reward.service import current_service
from areal.reward.worker import BadScore, check_score

_AGAIN = (429, 502, 503, 504)
_NOT_THERE = (401, 403, 404, 405)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_LONGEST_RETRY_AFTER = 10.0
_LONGEST_ANSWER = 1 << 20  # bytes: a service that never ends its answer must not fill the controller's memory


class HTTPReward:
    """An async reward function that POSTs its arguments and the row's columns as one JSON object.

    Answers that count: ``{"score": x}``, ``{"reward": x}``, a bare number, and ``{"failure": {"cause": ..., "message": ...}}``. Connections are
    kept open, and closed with the reward service of the loop, or by ``close``.

    Args:
        url: of the function, e.g. ``http://127.0.0.1:30100/score``.
        timeout: seconds a score may take, waiting and all tries included.
        max_in_flight: calls at once in one event loop; further ones wait.

    Raises:
        ValueError: not an address.
    """

    keeps_deadline = True
    """Ends by itself after ``timeout``, with a better reason than whoever would cancel it."""

    def __init__(self, url: str, timeout: float = 15.0, max_in_flight: int = 256) -> None:
        self.url = url
        self.timeout = timeout
        self.max_in_flight = max_in_flight
        self._scored_once = False
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Wire, asyncio.Semaphore]] = weakref.WeakKeyDictionary()
        service_address(url)

    async def __call__(self, prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
        """
        Raises:
            RewardFailure: reward_timeout, reward_unreachable (no answer), reward_refused (an HTTP status), reward_bad_value, reward_unsendable
                (the row is not JSON), or the cause that the service names.
            RewardServiceError: there is no such service at this address (401, 403, 404, 405), and never was.
        """
        body = {**row, "prompt": prompt, "completions": completions, "prompt_ids": prompt_ids, "completion_ids": completion_ids}
        wire, places = self._of_this_loop()
        async with places:
            return await self._ask(wire, body)

    def _of_this_loop(self) -> tuple[Wire, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        known = self._loops.get(loop)
        if known is None:
            known = self._loops[loop] = (Wire(self.url, SCHEMES, _LONGEST_ANSWER), asyncio.Semaphore(self.max_in_flight))
            if (service := current_service()) is not None:
                service.at_close(self.close)
        return known

    async def close(self) -> None:
        """Closes this loop's connections."""
        known = self._loops.pop(asyncio.get_running_loop(), None)
        if known is not None:
            known[0].close()
            await known[0].wait_closed()

    async def _ask(self, wire: Wire, body: dict[str, Any]) -> float:
        loop = asyncio.get_running_loop()
        deadline, pause, tries = loop.time() + self.timeout, _FIRST_PAUSE, 0
        cause, why = "reward_timeout", ""
        while True:
            wait = 0.0
            tries += 1
            try:
                answer = await wire.call("POST", "", body, timeout=max(0.0, deadline - loop.time()))
            except TimeoutError:
                raise self._too_late("reward_timeout", why, tries) from None
            except TypeError as error:
                raise RewardFailure("reward_unsendable", f"the row is not JSON: {error}") from error
            except HTTPStatusError as error:
                if error.status not in _AGAIN:
                    raise self._refused(error) from error
                cause, why = "reward_timeout", str(error)
                wait = min(_LONGEST_RETRY_AFTER, error.retry_after or 0.0)
            except AnswerTooLong as error:
                raise RewardFailure("reward_bad_value", str(error)) from error
            except WireError as error:
                cause, why = "reward_unreachable", str(error)
            else:
                score = self._read(answer)
                self._scored_once = True
                return score
            wait = max(wait, pause) * random.uniform(1.0, 1.5)  # not all callers at the same moment
            pause = min(_LONGEST_PAUSE, 2 * pause)
            if loop.time() + wait >= deadline:
                raise self._too_late(cause, why, tries)
            await asyncio.sleep(wait)

    def _too_late(self, cause: str, why: str, tries: int) -> RewardFailure:
        told = f"; asked {tries} times, and before the last time: {why}" if why and tries > 1 else f": {why}" if why else ""
        return RewardFailure(cause, f"{self.url} gave no score within {self.timeout:g} s{told}")

    def _refused(self, error: HTTPStatusError) -> Exception:
        if error.status in _NOT_THERE and not self._scored_once:
            return RewardServiceError(f"{self.url} is not the address of a reward service ({error}); look at reward_fn")
        return RewardFailure("reward_refused", f"{self.url}: {error}")

    def _read(self, answer: Any) -> float:
        if isinstance(answer, dict):
            if isinstance(failure := answer.get("failure"), dict):
                cause = str(failure.get("cause", ""))
                raise RewardFailure(
                    cause if re.fullmatch(r"[a-z0-9_]{1,40}", cause) else "reward_failed", str(failure.get("message", ""))[:500]
                )
            answer = next((answer[key] for key in ("score", "reward") if key in answer), answer)
        try:
            return check_score(answer)
        except BadScore as error:
            raise RewardFailure("reward_bad_value", f"{self.url}: {error}") from error
