"""Rewards for code: 1.0 when a completion's program passes all tests of its row, else 0.0 (in a sandbox; docs/rewards.md)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from areal.reward.code_extract import extract_code, programs
from areal.reward.code_tests import read_tests
from areal.reward.sandbox.client import ForkServer, fork_server
from areal.reward.sandbox.judge import Outcome, TestProgram
from areal.reward.sandbox.levels import describe_server
from areal.reward.sandbox.limits import Isolation, Limits

if TYPE_CHECKING:
    from areal.config import RewardConfig

_told: set[str] = set()


@dataclass(frozen=True)
class CodeReward:
    """A reward function ``fn(prompt, completions, prompt_ids, completion_ids, tests=..., **row)`` for a reward worker's process.

    Args:
        isolation: how programs are confined; auto takes the strongest that the machine has.
        limits: of one completion; None = the defaults, in a run with a wall time that fits ``reward.timeout``.
    """

    isolation: Isolation = "auto"
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if self.isolation not in get_args(Isolation):
            raise ValueError(f"CodeReward's isolation={self.isolation!r} is not one of {', '.join(get_args(Isolation))}")

    def __call__(
        self,
        prompt: str,
        completions: str,
        prompt_ids: list[int],
        completion_ids: list[int],
        *,
        tests: Any = None,
        **row: Any,
    ) -> float:
        """1.0 when all tests pass, else 0.0; a program that does not compile, raises or exceeds a limit has answered so.

        Raises:
            ValueError: the row has no tests, or tests that cannot be run: a fault of the data.
            SandboxError: the program could not be run: a fault of the sandbox.
        """
        return float(self.run(completions, tests, row, prompt).passed)

    def run(self, completion: str, tests: Any, row: dict[str, Any] | None = None, prompt: str = "") -> Outcome:
        """The same with its reason, and what the program printed last."""
        wanted = read_tests(tests, row or {})
        limits = self.limits or Limits()
        with fork_server(self.isolation) as server:
            _tell(server)
            if isinstance(wanted, TestProgram):
                source, *otherwise = programs(str(completion), str(prompt), wanted.expects)
                return server.run_tests(source, wanted, limits, *otherwise)
            return server.run_cases(extract_code(str(completion)), wanted, limits)

    def within(self, run: RewardConfig) -> CodeReward:
        """The one of a run: at its isolation, and with a wall time that is over before ``reward.timeout``, which would be a failure."""
        limits = self.limits or Limits(wall_seconds=min(Limits.wall_seconds, self.longest_wall_seconds(run.timeout)))
        return replace(self, isolation=self.isolation if run.isolation == "auto" else run.isolation, limits=limits)

    @staticmethod
    def longest_wall_seconds(timeout: float) -> float:
        """What a program may have of the seconds of a score: starting a fork server and ending a program take some too."""
        return timeout * 2 / 3


def _tell(server: ForkServer) -> None:
    """Once a process, in its log."""
    text = describe_server(server)
    if text not in _told:
        _told.add(text)
        print(f"code is scored at isolation level {text}", file=sys.stderr, flush=True)


code_reward = CodeReward()
