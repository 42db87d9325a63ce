"""Groups that only wait for their scores make room for others: within the staleness bound, and only where scores come last."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal.buffer import TrajectoryBuffer
from areal.config import GRPOConfig
from areal.generation_slots import EpisodeSlot, GenerationSlots, GroupSlot
from areal.inference.client import RolloutClient
from areal.reward import AsyncRewardWrapper, RewardService
from areal.runner import Runner
from areal.staleness import StalenessManager
from areal.workflow.rlvr import RLVRWorkflow
from areal.workflow.sequence import TokenSequence
from tests.rollout_servers import Server, make_model

MOST, B, ETA = 2, 4, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_model(folder)


@pytest.fixture(scope="module")
def server(model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(model[0], tmp_path_factory.mktemp("logs") / "server.log")
    yield started.wait()
    started.process.terminate()


class Gate:
    """An async scorer that gives no score until it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, *args: Any, **row: Any) -> float:
        await self.open.wait()
        return 1.0


class TwoTurns:
    """Generates, has a score, and generates again."""

    def __init__(self, gate: Gate, gconfig: Any) -> None:
        self.reward, self.gconfig = AsyncRewardWrapper(gate), gconfig

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
        sequence = TokenSequence([4, 5, 6])
        first = await sequence.generate(engine, self.gconfig)
        sequence.append_answer(first)
        score = await self.reward("", "", first.input_tokens, first.output_tokens)
        sequence.append_answer(await sequence.generate(engine, self.gconfig))
        return sequence.to_dict(score)


class Running:
    def __init__(self, server: Server, make_workflow: Any, eta: int = ETA) -> None:
        rollout = {"consumer_batch_size": B, "max_head_offpolicyness": eta, "max_concurrent_rollouts": MOST}
        tree = {"actor": {"path": "x"}, "train_dataset": {"type": "arithmetic"}, "rollout": rollout}
        config = GRPOConfig.model_validate({**tree, "gconfig": {"n_samples": 2, "max_new_tokens": 6}})
        self.client = RolloutClient(config.rollout, [server.url], [server.process])
        self.staleness, self.buffer, self.gate = StalenessManager(B, eta, MOST), TrajectoryBuffer(B, eta), Gate()
        self.workflow = make_workflow(self.gate, config.gconfig)
        rows = ({"prompt": f"a{i % 10}b=", "prompt_id": i} for i in itertools.count())
        self.runner = Runner(config, self.client, self.workflow, rows, self.staleness, self.buffer)

    async def __aenter__(self) -> Running:
        self._service = await RewardService(max_concurrent=1000).__aenter__()
        self._task = asyncio.create_task(self.runner.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.client.close()
        await self._service.close()
        assert self.staleness.n_waiting == self.staleness.n_running == 0

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(30):
            while not what():
                assert self.staleness.n_running - self.staleness.n_waiting <= MOST
                await asyncio.sleep(0.005)


def test_groups_that_wait_for_scores_make_room_up_to_the_staleness_bound(server: Server, model: tuple[Path, Any]) -> None:
    async def main() -> None:
        async with Running(server, lambda gate, gconfig: RLVRWorkflow(gate, gconfig, model[1])) as run:
            bound = (ETA + 1) * B
            await run.until(lambda: run.staleness.n_waiting == bound)  # all of them have generated, though two do at a time
            await asyncio.sleep(0.2)
            assert run.staleness.n_running == run.buffer.n_unfinished == bound
            run.gate.open.set()
            await run.until(lambda: len(run.buffer) == bound)
            assert run.staleness.n_accepted == bound and run.runner.slots.scores_come_last

    asyncio.run(main())


def test_a_workflow_that_generates_after_a_score_keeps_its_groups_counted(server: Server) -> None:
    async def main() -> None:
        async with Running(server, TwoTurns, eta=1000) as run:
            await run.until(lambda: run.staleness.n_waiting > MOST)  # not yet seen what comes after the score
            run.gate.open.set()
            async with asyncio.timeout(30):
                while len(run.buffer) <= B:
                    await asyncio.sleep(0.005)
            assert not run.runner.slots.scores_come_last
            run.gate.open.clear()
            async with asyncio.timeout(30):
                while run.staleness.n_running > MOST:
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.5)
            assert run.staleness.n_running == MOST and run.staleness.n_waiting == 0  # all of them at the gate, and no further one

    asyncio.run(main())


class Counted:
    def __init__(self) -> None:
        self.waiting = self.woken = 0

    def wait_for_scores(self, n: int) -> None:
        self.waiting += n

    def wake(self) -> None:
        self.woken += 1


def test_an_episode_waits_only_while_it_does_nothing_else() -> None:
    counted = Counted()
    group = GroupSlot(GenerationSlots(counted, counted.wake), 2)
    one, two = EpisodeSlot(group), EpisodeSlot(group)
    one.generation_began()
    two.generation_began()
    one.generation_ended()
    one.score_began()
    assert counted.waiting == 0  # the other one generates
    two.generation_ended()
    two.score_began()
    assert (counted.waiting, counted.woken) == (1, 1)
    two.score_began()  # two scores of one episode
    two.score_ended()
    assert counted.waiting == 1
    one.score_ended()
    assert counted.waiting == 0  # busy until it ends
    one.end()
    assert counted.waiting == 1
    group.end()
    assert counted.waiting == 0
    two.score_ended()
    two.end()


def test_scores_beside_generation_are_no_wait_and_a_second_turn_is_remembered() -> None:
    counted = Counted()
    slots = GenerationSlots(counted, counted.wake)
    group = GroupSlot(slots, 1)
    episode = EpisodeSlot(group)
    episode.score_began()
    assert counted.waiting == 1
    episode.generation_began()  # beside it
    assert counted.waiting == 0 and slots.scores_come_last
    episode.generation_ended()
    episode.score_ended()
    episode.generation_began()  # after it
    assert not slots.scores_come_last
    episode.generation_ended()
    episode.score_began()
    assert counted.waiting == 0
