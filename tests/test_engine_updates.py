"""Weights that change between two decode steps: versions, K/V recompute, pauses, aborts; and deterministic mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from engine_cases import MODELS, build, eager_logprobs, requests, worst_error
from torch import Tensor

from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.request import Answer, GenerateRequest, SamplingParams

torch.set_num_threads(1)


def to_version(name: str, version: int):
    """A loader that writes the weights of ``build(name, seed=version)``."""
    new = dict(build(name, seed=version).named_parameters())

    def load(parameters: Mapping[str, Tensor]) -> int:
        for key, parameter in parameters.items():
            parameter.copy_(new[key])
        return version

    return load


def drain(engine: EmbeddedEngine) -> list[Answer]:
    answers = []
    while engine.has_work:
        answers += engine.step()
    return answers


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("through_pause", [False, True])
def test_logprobs_across_updates_equal_a_forward_under_the_claimed_version(name: str, through_pause: bool) -> None:
    engine = EmbeddedEngine(build(name), max_running_requests=8)
    for request in requests(20, answer=(20, 60)):
        engine.submit(request)
    answers = []
    for version in (1, 2, 3):
        for _ in range(15):
            answers += engine.step()
        if through_pause:
            engine.pause("retract")
        engine.update_weights(to_version(name, version), None if through_pause else "retract")
        engine.resume()
    answers += drain(engine)
    assert len(answers) == 20
    assert any(len(set(a.versions.tolist())) >= 3 for a in answers), "no answer spans three versions"
    for version in range(4):
        model = build(name, seed=version)
        for answer in answers:
            mine = answer.versions == version
            if mine.any():
                error = eager_logprobs(model, answer)[mine] - torch.from_numpy(answer.logprobs[mine])
                assert error.abs().max() < 1e-5
    for answer in answers:
        assert (np.diff(answer.versions) >= 0).all()


def test_in_place_keeps_the_kv_and_stamps_the_new_version() -> None:
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=4, update_mode="in_place")
    engine.submit(GenerateRequest([3, 4, 5, 6, 7, 8], SamplingParams(max_new_tokens=30, ignore_eos=True, sampling_seed=1)))
    for _ in range(10):
        engine.step()
    before = engine.prefill_tokens
    engine.update_weights(to_version("qwen2", 1))
    (answer,) = drain(engine)
    assert engine.prefill_tokens == before
    assert answer.versions.tolist() == [0] * 10 + [1] * 20
    old = eager_logprobs(build("qwen2"), answer)
    assert (old[:10] - torch.from_numpy(answer.logprobs[:10])).abs().max() < 1e-5
    new = eager_logprobs(build("qwen2", seed=1), answer)[10:]
    assert (new - torch.from_numpy(answer.logprobs[10:])).abs().max() > 1e-3, "kept K/V cannot give the new weights' log-probs"


def test_a_failed_update_changes_nothing() -> None:
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=4)
    for request in requests(4, answer=(20, 30)):
        engine.submit(request)
    engine.step()

    def fail(parameters: Mapping[str, Tensor]) -> int:
        raise TimeoutError("no such version")

    with pytest.raises(TimeoutError):
        engine.update_weights(fail)
    answers = drain(engine)
    assert engine.version == 0 and worst_error(build("qwen2"), answers) < 1e-5
    assert all((a.versions == 0).all() for a in answers)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_holds_everything_and_loses_nothing(mode) -> None:
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=4)
    wanted = requests(10, answer=(5, 30))
    reference = [a.output_ids.tolist() for a in engine.generate(wanted)]
    got = {}
    for request in wanted:
        engine.submit(request)
    for _ in range(7):
        got |= {a.request.rid: a for a in engine.step()}
    engine.pause(mode)
    assert not engine.has_work and engine.step() == []
    engine.resume()
    got |= {a.request.rid: a for a in drain(engine)}
    assert [got[r.rid].output_ids.tolist() for r in wanted] == reference


def test_abort_gives_back_what_there_is() -> None:
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=4)
    for request in requests(8, group=1, answer=(30, 40)):
        engine.submit(request)
    for _ in range(5):
        assert engine.step() == []
    assert engine.abort("2") == 1
    (aborted,) = engine.step()
    assert aborted.request.rid == "2" and aborted.finish_reason["type"] == "abort" and len(aborted.output_ids) == 5
    engine.pause("abort")
    rest = engine.step()
    assert sorted(a.request.rid for a in rest) == ["0", "1", "3", "4", "5", "6", "7"]
    lengths = sorted(len(a.output_ids) for a in rest)  # three ran on for a step, one was admitted in it, three were waiting
    assert lengths[:3] == [0, 0, 0] and lengths[3] <= 1 and lengths[4:] == [6, 6, 6]
    assert worst_error(build("qwen2"), [aborted, *(a for a in rest if len(a.output_ids))]) < 1e-5
    engine.resume()
    assert not engine.has_work


def test_resubmitting_an_aborted_answer_goes_on_as_if_nothing_had_been() -> None:
    """The client's way through an interruption: prompt + partial answer become the next prompt."""
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=4)
    prompt = [7, 8, 9]
    engine.submit(GenerateRequest(prompt, SamplingParams(max_new_tokens=30, ignore_eos=True), rid="a"))
    for _ in range(12):
        engine.step()
    engine.abort("a")
    (first,) = engine.step()
    engine.update_weights(to_version("qwen2", 1))
    n = len(first.output_ids)
    (rest,) = engine.generate([GenerateRequest(prompt + first.output_ids.tolist(), SamplingParams(max_new_tokens=30 - n, ignore_eos=True))])
    assert (rest.versions == 1).all()
    assert worst_error(build("qwen2", seed=1), [rest]) < 1e-5


@pytest.mark.parametrize("backend", ["", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_deterministic_mode_is_bitwise_whatever_else_runs(name: str, backend: str, areal_ops: Callable[[str], None]) -> None:
    if backend:
        areal_ops(f"decode_attention={backend}")
    engine = EmbeddedEngine(build(name), max_running_requests=16, deterministic=True)
    wanted = requests(8, prompt=(1, 70), answer=(1, 80))
    alone = [engine.generate([request])[0] for request in wanted]
    crowd = engine.generate(requests(15, seed=5, prompt=(1, 100), answer=(1, 90)) + wanted + requests(15, seed=6))[15:23]
    other = EmbeddedEngine(build(name), max_running_requests=5, deterministic=True).generate(wanted[::-1])[::-1]
    for a, b, c in zip(alone, crowd, other, strict=True):
        assert a.output_ids.tolist() == b.output_ids.tolist() == c.output_ids.tolist()
        assert a.logprobs.tobytes() == b.logprobs.tobytes() == c.logprobs.tobytes()


def test_deterministic_mode_is_bitwise_across_an_update() -> None:
    def run(extra: int) -> bytes:
        engine = EmbeddedEngine(build("qwen2"), max_running_requests=16, deterministic=True)
        wanted = requests(4, answer=(40, 60))
        for request in requests(extra, seed=9, answer=(5, 90)) + wanted:
            engine.submit(request)
        answers = []
        for _ in range(20):
            answers += engine.step()
        engine.update_weights(to_version("qwen2", 1))
        answers += drain(engine)
        mine = [next(a for a in answers if a.request is request) for request in wanted]
        return b"".join(a.logprobs.tobytes() + a.versions.tobytes() for a in mine)

    assert run(0) == run(7)


def test_deterministic_mode_needs_one_thread() -> None:
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="needs one thread"):
            EmbeddedEngine(build("qwen2"), deterministic=True)
    finally:
        torch.set_num_threads(1)
