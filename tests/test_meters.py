"""Time, memory and FLOPs of a train step, measured for real and counted in another way."""

import time

import numpy as np
import pytest
import torch
from test_trainer_engine import make_engine, rank_part
from torch.utils.flop_counter import FlopCounterMode
from trainer_setup import MODEL, make_batch, save_small_model

from areal.metrics import RunTotals, meter_row
from areal.models.attention import PackedContext
from areal.models.loading import create_model, forward_hidden
from areal.trainer.engine import TrainEngine
from areal.trainer.inputs import to_device
from areal.trainer.meters import PHASES, ModelFlops, PhaseMeter, _pairs, matmul_peak

torch.set_num_threads(1)
CPU = torch.device("cpu")
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
"""Entries of q, k and v, o, and the three matrices of the feed-forward part in ``MODEL``."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


def attention_flops(lengths):
    """Forward: two layers of four heads of eight, a product for the scores and one for the result, of every pair that is seen."""
    return 2 * sum(2 * 2 * 4 * 8 for n in lengths for query in range(n) for key in range(query + 1))


def test_flops_are_the_formula_written_out():
    flops = ModelFlops(create_model(MODEL, seed=0))
    forward = 2 * 2 * LAYER * 30 + 2 * 32 * 40 * 11 + attention_flops([20, 17])
    assert flops.forward([20, 17], n_computed=30, n_rows=11) == forward
    assert flops.training([20, 17], n_computed=30, n_rows=11) == 3 * forward


def test_attention_of_a_prompt_is_counted_where_it_is_computed():
    flops = ModelFlops(create_model(MODEL, seed=0))
    whole = flops.forward([20, 17], n_computed=30, n_rows=11)
    assert flops.forward([20, 17], 30, 11, copied=[0, 7]) == whole - attention_flops([7])
    (mb,) = make_batch(capacity=4096).minibatches[0].ranks[0]
    x = to_device(mb, CPU, 0)
    bounds = zip(mb.cu_seqlens, mb.cu_seqlens[1:], strict=False)
    prompts = [int(mb.loss_mask[a:b].argmax()) for a, b in bounds]
    assert sum(x.shared.copied) == mb.n_tokens - len(x.shared.computed) > 0
    assert all(copied in (0, n) for copied, n in zip(x.shared.copied, prompts, strict=True))
    assert flops.of(x, training=False) - flops.of(x, training=False, head=False) == 2 * 32 * 40 * len(x.rows)


def test_flops_are_those_that_torch_counts():
    model, n = create_model({**MODEL, "sliding_window": None}, seed=0), 24
    flops = ModelFlops(model)
    ids = torch.arange(n) + 2
    with FlopCounterMode(display=False) as counter:
        forward_hidden(model, ids, torch.arange(n), PackedContext([n])).sum().backward()
    # Whole squares are computed, of which the causal half is counted. Of the first layer too the gradient of the input is needed.
    squares = 3 * 2 * 2 * 2 * 4 * 8 * n * n
    assert counter.get_total_flops() == flops.training([n], n, 0) - 3 * attention_flops([n]) + squares


def test_frozen_weights_have_no_gradient_to_compute():
    model = create_model(MODEL, seed=0)
    model.requires_grad_(False)
    flops = ModelFlops(model)
    products = 2 * 2 * LAYER * 30 + 2 * 32 * 40 * 11
    assert flops.training([30], 30, 11) == 2 * products + 3 * attention_flops([30])


def test_experts_count_as_far_as_a_token_uses_them():
    config = {
        **MODEL, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    flops = ModelFlops(create_model(config, seed=0))
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    assert flops.forward([], 1, 0) == 2 * 2 * (attention + 8 * 32 + 2 * 3 * 32 * 16)


@pytest.mark.parametrize(("length", "window"), [(9, None), (9, 4), (4, 4), (3, 4), (1, 1)])
def test_pairs_of_a_window(length, window):
    seen = sum(1 for q in range(length) for k in range(q + 1) if window is None or q - k < window)
    assert _pairs(length, window) == seen


def test_phases_within_others_and_the_rest_are_the_whole_time():
    meter = PhaseMeter(CPU)
    begin = time.perf_counter()
    with meter.phase("forward"):
        time.sleep(0.05)
        with meter.phase("backward"):
            time.sleep(0.1)
        time.sleep(0.02)
    time.sleep(0.03)
    seconds, _ = meter.result()
    total = time.perf_counter() - begin
    assert sum(seconds.values()) == pytest.approx(total, abs=0.02)
    assert seconds["backward"] >= 0.1 and seconds["forward"] >= 0.07 and seconds["other"] >= 0.03
    assert seconds["optimizer"] == seconds["recompute"] == 0
    assert seconds["forward"] < total - 0.12, "the phase within it is not its own"


def test_peak_memory_is_that_of_the_phase():
    meter = PhaseMeter(CPU)
    with meter.phase("optimizer"):
        pass
    with meter.phase("forward"):
        held = torch.ones(200 << 20, dtype=torch.uint8)
        del held
    with meter.phase("backward"):
        pass
    _, peaks = meter.result()
    if not any(peaks.values()):
        pytest.skip("no /proc/self/clear_refs here")
    for phase in ("optimizer", "backward"):
        assert 190 << 20 < peaks["forward"] - peaks[phase] < 230 << 20, peaks


def test_peak_of_the_device_is_measured_once_and_quickly():
    state = torch.get_rng_state()
    begin = time.perf_counter()
    peak = matmul_peak(CPU, torch.float32)
    assert time.perf_counter() - begin < 5, "0.3 s where nothing else runs"
    assert 1e8 < peak < 1e14
    begin = time.perf_counter()
    assert matmul_peak(CPU, torch.float32) == peak
    assert time.perf_counter() - begin < 0.05
    assert torch.equal(torch.get_rng_state(), state)


def test_meters_of_a_step(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine)
    batch = make_batch(n_minibatches=2, capacity=150)
    engine.train_step(rank_part(batch))
    begin = time.perf_counter()
    stats = engine.train_step(rank_part(batch))
    wall = time.perf_counter() - begin
    meters = stats["meters"]
    assert set(meters["seconds"]) == {*PHASES, "other"} == set(meters["peak_mb"])
    assert all(meters["seconds"][phase] > 0 for phase in PHASES)
    assert 0.5 * wall < sum(meters["seconds"].values()) <= wall

    expected = 0.0
    for index, minibatch in enumerate(batch.minibatches):
        for mb in minibatch.ranks[0]:
            lengths = np.diff(mb.cu_seqlens).tolist()
            prompts = {
                mb.input_ids[a : a + int(mb.loss_mask[a:b].argmax())].tobytes()
                for a, b in zip(mb.cu_seqlens, mb.cu_seqlens[1:], strict=False)
            }
            shared = int((~mb.loss_mask).sum()) - sum(len(p) // 8 for p in prompts)
            is_shared = shared >= 0.05 * mb.n_tokens
            computed = mb.n_tokens - (shared if is_shared else 0)
            of_prompts = [int(mb.loss_mask[a:b].argmax()) for a, b in zip(mb.cu_seqlens, mb.cu_seqlens[1:], strict=False)]
            again = attention_flops(of_prompts) - attention_flops([len(p) // 8 for p in prompts]) if is_shared else 0
            forward = 4 * LAYER * computed + 2 * 32 * 40 * int(mb.loss_mask.sum()) + attention_flops(lengths) - again
            expected += forward * (3 if index == 0 else 4)
    assert meters["model_flops"] == expected

    row = meter_row(meters, 2 * wall)
    assert sum(row[f"{phase}_seconds"] for phase in (*PHASES, "other")) == pytest.approx(2 * wall)
    assert row["mfu"] == pytest.approx(expected / (2 * wall) / meters["peak_flops_per_s"])
    assert row["model_flops_per_s"] == pytest.approx(expected / (2 * wall))


def test_totals_of_a_run():
    totals = RunTotals()
    shared = {"staleness_max": 0, "tokens_trained": 1, "forward_peak_mb": None}
    totals.add_step({**shared, "mfu": 0.2, "forward_seconds": 1.0, "other_seconds": 0.0, "skipped_nonfinite": 1})
    totals.add_step({**shared, "mfu": 0.5, "forward_seconds": 1.5, "other_seconds": 0.5, "forward_peak_mb": 7.0})
    assert totals.mfu == pytest.approx((0.2 * 1 + 0.5 * 2) / 3)
    assert totals.train_seconds == {"forward": 2.5, "other": 0.5}
    assert totals.peak_mb == {"forward": 7.0}
    assert totals.skipped_nonfinite == 1
