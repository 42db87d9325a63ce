"""The embedded engine in process: exact log-probs, keyed sampling, stopping, batching."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from engine_cases import EOS, MODELS, build, eager_logprobs, requests, worst_error
from op_backends import backends

from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.kv_cache import DecodeContext
from areal.inference.embedded.request import GenerateRequest, RequestError, SamplingParams
from areal.inference.embedded.selfcheck import check_engine
from areal.models.selfcheck import UnsupportedModel

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return EmbeddedEngine(build("qwen2"), max_running_requests=8)


def one(engine: EmbeddedEngine, prompt: list[int], **params):
    return engine.generate([GenerateRequest(prompt, SamplingParams(**params))])[0]


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_equal_an_eager_forward(name: str) -> None:
    engine = EmbeddedEngine(build(name), max_running_requests=8)
    answers = engine.generate(requests(24))
    assert [len(a.output_ids) for a in answers] == [a.request.params.max_new_tokens for a in answers]
    assert worst_error(build(name), answers) < 1e-5


def test_length_buckets_and_cache_growth_change_nothing() -> None:
    engine = EmbeddedEngine(build("mistral"), max_running_requests=8, max_prefill_tokens=64)
    mixed = requests(12, group=2, prompt=(1, 6), answer=(1, 20)) + requests(4, seed=1, prompt=(100, 140), answer=(60, 100))
    assert worst_error(build("mistral"), engine.generate(mixed)) < 1e-5


def test_temperature_scales_the_reported_distribution(engine: EmbeddedEngine) -> None:
    answers = engine.generate(requests(6, temperature=0.7))
    assert worst_error(build("qwen2"), answers, temperature=0.7) < 1e-5


def test_greedy_is_the_argmax_with_logprobs_at_temperature_one(engine: EmbeddedEngine) -> None:
    answer = one(engine, [5, 6, 7], temperature=0.0, max_new_tokens=12, ignore_eos=True)
    model = build("qwen2")
    ids = [5, 6, 7]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert answer.output_ids.tolist() == ids[3:]
    assert (eager_logprobs(model, answer) - torch.from_numpy(answer.logprobs)).abs().max() < 1e-5


def test_an_answer_is_keyed_by_its_seed_whatever_else_runs(engine: EmbeddedEngine) -> None:
    wanted = requests(9)
    alone = [engine.generate([request])[0].output_ids.tolist() for request in wanted]
    together = [a.output_ids.tolist() for a in engine.generate(wanted + requests(20, seed=3))[:9]]
    assert alone == together
    unseeded = SamplingParams(max_new_tokens=30, ignore_eos=True)
    first, second = (engine.generate([GenerateRequest([3, 4], unseeded)])[0].output_ids.tolist() for _ in range(2))
    assert first != second


def test_samples_follow_the_distribution(engine: EmbeddedEngine) -> None:
    """4,000 first tokens against the model's own probabilities: Pearson's chi-square, 60 degrees of freedom."""
    n = 4000
    prompt = [9, 8, 7]
    answers = engine.generate(
        [GenerateRequest(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True, sampling_seed=i)) for i in range(n)]
    )
    counts = np.bincount([a.output_ids[0] for a in answers], minlength=61)
    model = build("qwen2")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = n * torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 120  # p < 1e-5


def test_top_k_and_top_p_cut_the_tail_and_report_untruncated_logprobs(engine: EmbeddedEngine) -> None:
    model = build("qwen2")
    prompt = [9, 8, 7]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    order = logprobs.argsort(descending=True).tolist()
    for params, allowed in ({"top_k": 3}, 3), ({"top_p": 0.4}, int((logprobs[order].exp().cumsum(0) < 0.4).sum()) + 1):
        seeds = range(300)
        answers = engine.generate(
            [GenerateRequest(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True, sampling_seed=s, **params)) for s in seeds]
        )
        drawn = {int(a.output_ids[0]) for a in answers}
        assert drawn == set(order[:allowed])
        assert all(abs(a.logprobs[0] - logprobs[a.output_ids[0]]) < 1e-5 for a in answers)


def test_stop_tokens_end_an_answer_and_min_new_tokens_hold_them_back(engine: EmbeddedEngine) -> None:
    free = one(engine, [5, 6], max_new_tokens=40, sampling_seed=1, ignore_eos=True).output_ids.tolist()
    stop = free[10]
    first = free.index(stop)
    stopped = one(engine, [5, 6], max_new_tokens=40, sampling_seed=1, ignore_eos=True, stop_token_ids=(stop,))
    assert stopped.output_ids.tolist() == free[: first + 1]
    assert stopped.finish_reason == {"type": "stop", "matched": stop}
    held = one(engine, [5, 6], max_new_tokens=40, min_new_tokens=20, sampling_seed=1, ignore_eos=True, stop_token_ids=(stop,))
    assert stop not in held.output_ids[:20]
    assert (eager_logprobs(build("qwen2"), held) - torch.from_numpy(held.logprobs)).abs().max() < 1e-5


def test_end_of_sequence_stops_unless_ignored(engine: EmbeddedEngine) -> None:
    answers = engine.generate([GenerateRequest([2, 3], SamplingParams(max_new_tokens=150, sampling_seed=s)) for s in range(40)])
    ended = [a for a in answers if a.finish_reason["type"] == "stop"]
    assert ended and all(a.output_ids[-1] == EOS and EOS not in a.output_ids[:-1] for a in ended)
    assert all(a.finish_reason == {"type": "length", "length": 150} for a in answers if a not in ended)


def test_a_prompt_shared_by_many_is_prefilled_once() -> None:
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=8)
    prompt = list(range(2, 32))
    engine.generate([GenerateRequest(prompt, SamplingParams(max_new_tokens=4)) for _ in range(8)])
    assert engine.prefill_tokens == len(prompt) - 1


def test_a_later_sample_copies_the_prompt_of_a_running_one_unless_the_weights_changed_in_place() -> None:
    engine = EmbeddedEngine(build("qwen2"), max_running_requests=8)
    prompt = list(range(2, 32))
    new = build("qwen2", seed=1)
    answers = []
    for turn in range(3):
        engine.submit(GenerateRequest(prompt, SamplingParams(max_new_tokens=40, ignore_eos=True, sampling_seed=turn)))
        for _ in range(5):
            engine.step()
        assert engine.prefill_tokens == (29 if turn < 2 else 58)
        if turn == 1:

            def load(parameters: Mapping[str, torch.Tensor]) -> int:
                for name, parameter in new.named_parameters():
                    parameters[name].copy_(parameter)
                return 1

            engine.update_weights(load, "in_place")
    while engine.has_work:
        answers += engine.step()
    last = next(a for a in answers if a.request.params.sampling_seed == 2)
    assert (last.versions == 1).all() and last.cached_tokens == 0
    assert worst_error(build("qwen2", seed=1), [last]) < 1e-5


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], {}, "the prompt is empty"),
        ([3] * 250, {"max_new_tokens": 100}, "250 tokens and max_new_tokens is 100"),
        ([3, 61], {}, "token id 61 is outside of the vocabulary of 61"),
        ([-1], {}, "token id -1"),
        ([3], {"stop": ("x",)}, "need a tokenizer"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(engine: EmbeddedEngine, prompt: list[int], params: dict, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        engine.submit(GenerateRequest(prompt, SamplingParams(**params)))
    assert not engine.has_work


@pytest.mark.parametrize(
    "params",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -2}, {"min_new_tokens": 200}],
)
def test_sampling_parameters_are_checked(params: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(params))):
        SamplingParams(**params)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="model's own limit is 256"):
        EmbeddedEngine(build("qwen2"), max_context=1000)
    with pytest.raises(ValueError, match="at least 1"):
        EmbeddedEngine(build("qwen2"), max_running_requests=0)
    with pytest.raises(ValueError, match="needs device cpu"):
        EmbeddedEngine(build("qwen2"), device="cuda", deterministic=True)


def test_models_that_would_be_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="rope type 'dynamic'"):
        EmbeddedEngine(model)
    check_engine(build("mistral").config)
    attend = DecodeContext.attend
    monkeypatch.setattr(DecodeContext, "attend", lambda self, i, q, k, v, spec: attend(self, i, q, k, v, type(spec)(spec.scaling)))
    with pytest.raises(UnsupportedModel, match="generated tokens differ"):
        check_engine(build("mistral").config)


def test_without_the_compiled_op(areal_ops: Callable[[str], None]) -> None:
    areal_ops("decode_attention=torch")
    for name in "qwen2", "mistral", "gpt_neox":
        engine = EmbeddedEngine(build(name), max_running_requests=8)
        assert not engine._cache.compiled
        mixed = requests(12, group=2) + requests(4, seed=1, prompt=(100, 140), answer=(60, 100))
        assert worst_error(build(name), engine.generate(mixed)) < 1e-5


@pytest.mark.parametrize(("backend", "device"), backends("triton"))
@pytest.mark.parametrize("name", ["qwen2-window", "gemma2"])
def test_with_the_kernels_of_a_gpu(on_backend: tuple[str, str], name: str, areal_ops: Callable[[str], None]) -> None:
    backend, device = on_backend
    areal_ops(f"decode_attention={backend}")
    engine = EmbeddedEngine(build(name).to(device), max_running_requests=4, device=device)
    assert engine._cache.compiled
    answers = engine.generate(requests(5, prompt=(1, 12), answer=(1, 12)))
    assert worst_error(build(name), answers) < (1e-5 if device == "cpu" else 1e-4)
