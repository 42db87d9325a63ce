"""Steps that are not finite: skipped on all ranks alike, dumped when there are too many, and found again by ``areal replay-batch``."""

import asyncio
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dpo import make_pairs
from test_trainer_engine import make_engine, rank_part
from trainer_setup import make_batch, make_config, save_small_model

from areal.cli import main
from areal.config import CriticConfig, DPOConfig, RefConfig
from areal.models.value_head import value_head_parameters
from areal.preferences import make_dpo_batch
from areal.trainer.critic import value_backward
from areal.trainer.diagnosis import diagnose
from areal.trainer.engine import NonFiniteGradients, RankMinibatch, TrainEngine
from areal.trainer.failed_step import dump, failed_minibatch, load
from areal.trainer.inputs import to_device
from areal.trainer.step_stats import StepStats
from areal.trainer.worker import TrainerHandle, WorkerFailed

pytestmark = pytest.mark.timeout(240)
torch.set_num_threads(1)


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "model").mkdir()
    return save_small_model(tmp_path / "model")


def dumped(engine, batch, folder, **step):
    """Takes the step, which must fail, and dumps it."""
    with pytest.raises(NonFiniteGradients) as caught:
        engine.sft_step(rank_part(batch)[0]) if step.get("kind") == "sft" else engine.train_step(rank_part(batch))
    said = dump(engine, caught.value, folder)
    assert f"`areal replay-batch {folder}`" in said
    return folder


def findings(folder, capsys):
    capsys.readouterr()
    code = main(["replay-batch", str(folder), "--device", "cpu", "--threads", "1", "--json"])
    return code, json.loads(capsys.readouterr().out)


# -- from the run to the finding, in real processes ----------------------------------------------------------------------------------


def test_two_ranks_end_together_and_the_dumped_batch_names_the_poisoned_number(model_folder, tmp_path, capsys):
    batch = make_batch(n_minibatches=2, capacity=80, world_size=2)
    poisoned = batch.minibatches[1].ranks[1][1]
    sequence = 1
    begin, end = poisoned.cu_seqlens[sequence : sequence + 2]
    token = int(end) - 1
    poisoned.advantages[token] = np.nan

    async def run():
        config = make_config(model_folder, tmp_path, backend="fsdp:d2", max_nonfinite_steps=1)
        handle = await TrainerHandle.start(config, model_folder, tmp_path / "run")
        try:
            stats = await handle.train_step(batch)
            assert stats["skipped_nonfinite"] == 1, "the first mini-batch is stepped, the second is not"
            both = make_batch(n_minibatches=2, capacity=80, world_size=2)
            for minibatch in both.minibatches:
                minibatch.ranks[1][1].advantages[:] = np.inf
            batch.minibatches = [both.minibatches[0], batch.minibatches[1]]
            await handle.train_step(batch)
        finally:
            await handle.close()

    with pytest.raises(WorkerFailed, match=r"max_nonfinite_steps=1.*areal replay-batch") as caught:
        asyncio.run(run())
    folder = tmp_path / "run" / "replay" / "step_000001"
    assert str(folder) in str(caught.value)
    assert sorted(f.name for f in folder.iterdir()) == ["batch.npz", "replay.json", "weights"]
    assert [f.name for f in folder.parent.iterdir()] == ["step_000001"], "nothing half-written is left"

    # The run's folder means its last dumped step.
    code, told = findings(tmp_path / "run", capsys)
    assert code == 1
    where = "mini-batch 1, rank 1, micro-batch 1"
    of_second = [f["what"] for f in told["findings"] if f["where"] == where]
    place = f"sequence {sequence}, token {token - begin}"
    assert of_second[0] == f"advantages (handed in) of {place}: nan, 1 in all"
    assert of_second[-1] == f"alone not finite: sequence {sequence}"
    assert {f["where"] for f in told["findings"]} == {where, "mini-batch 0, rank 1, micro-batch 1"}


# -- what is found ------------------------------------------------------------------------------------------------------------------


def test_poisoned_weight_is_named_and_the_module_that_it_breaks(model_folder, tmp_path, capsys):
    file = model_folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][3, 5] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine, max_nonfinite_steps=0)
    folder = dumped(engine, make_batch(), tmp_path / "replay" / "step")
    assert main(["replay-batch", str(folder), "--device", "cpu", "--threads", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"weights: {name}: 1 of {48 * 32} values are not finite"
    assert lines[1] == "mini-batch 0, rank 0, micro-batch 0: the output of model.layers.1.mlp.down_proj, sequence 0, token 0"


def test_overflow_of_finite_numbers_is_found_by_taking_the_sequences_apart(model_folder, tmp_path, capsys):
    batch = make_batch(capacity=200)
    microbatch = batch.minibatches[0].ranks[0][1]
    sequence = 3
    token = int(microbatch.cu_seqlens[sequence + 1]) - 1
    microbatch.advantages[token] = 3e38
    microbatch.logprobs[token] = -9.0  # their product with the weight proximal / behaviour is too large
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine, max_nonfinite_steps=0)
    code, told = findings(dumped(engine, batch, tmp_path / "replay" / "step"), capsys)
    assert code == 1
    assert {f["where"] for f in told["findings"]} == {"mini-batch 0, rank 0, micro-batch 1"}
    texts = [f["what"] for f in told["findings"]]
    assert any(text.startswith("the loss is ") for text in texts)
    assert texts[-1] == f"alone not finite: sequence {sequence}"


def test_finite_step_is_reproduced_with_its_loss_and_proximal_policy(model_folder, tmp_path, capsys):
    batch = make_batch(n_minibatches=2, capacity=150)
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine)
    engine.version = 4
    second = batch.minibatches[1]
    proximal = [engine.logprobs(mb).numpy() + np.float32(0.1) * mb.loss_mask for mb in second.ranks[0]]
    stats, minibatch = StepStats(engine.device), rank_part(batch)[1]
    for mb, known in zip(second.ranks[0], proximal, strict=True):
        engine.backward(to_device(mb, engine.device, 4), torch.from_numpy(known), 0.5, minibatch, stats)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.model.parameters()]))
    error = NonFiniteGradients("", "ppo", [failed_minibatch(minibatch, [torch.from_numpy(known) for known in proximal], 0.5)])
    dump(engine, error, tmp_path / "step")
    assert load(tmp_path / "step").version == 4
    code, told = findings(tmp_path / "step", capsys)
    assert (code, told["findings"]) == (0, [])
    assert told["losses"] == pytest.approx([float(stats.minibatch_loss)], rel=1e-6)
    assert told["grad_norms"] == pytest.approx([norm], rel=1e-6)


def test_gradient_that_breaks_behind_finite_outputs(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine, max_nonfinite_steps=0)
    mlp = engine.model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight.mul_(1e36)
        mlp.down_proj.weight.mul_(1e-36)
    batch = make_batch(capacity=200)
    for microbatch in batch.minibatches[0].ranks[0]:
        microbatch.advantages *= 1e12
    folder = dumped(engine, batch, tmp_path / "step")
    first = diagnose(engine, load(folder)).findings[0]
    assert first.where == "mini-batch 0, rank 0, micro-batch 0"
    assert first.what == "the gradients of 1 parameters, first of model.layers.1.mlp.down_proj.weight"


def test_norm_of_the_gradient_that_breaks_alone(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine, max_nonfinite_steps=0)
    batch = make_batch(capacity=200)
    for microbatch in batch.minibatches[0].ranks[0]:
        microbatch.advantages *= 1e25
    folder = dumped(engine, batch, tmp_path / "step")
    (only,) = diagnose(engine, load(folder)).findings
    assert only.where == "mini-batch 0"
    assert "every micro-batch is finite, but not their sum" in only.what
    assert only.what.endswith("norm of the gradient inf")


def test_supervised_step(model_folder, tmp_path, capsys):
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine, max_nonfinite_steps=0)
    with torch.no_grad():
        engine.model.model.layers[0].self_attn.k_proj.bias[0] = float("inf")
    folder = dumped(engine, make_batch(), tmp_path / "step", kind="sft")
    code, told = findings(folder, capsys)
    assert code == 1
    assert told["findings"][0]["what"].startswith("model.layers.0.self_attn.k_proj.bias: 1 of 16")
    assert told["findings"][1]["what"].startswith("the output of model.layers.0.self_attn.k_proj")


def test_pairs_of_preferences_stay_together(model_folder, tmp_path, capsys):
    engine = make_engine(model_folder, tmp_path, cls=lambda *a, **k: TrainEngine(*a, **k, ref=RefConfig()), max_nonfinite_steps=0)
    batch = make_dpo_batch(make_pairs(4), 4096, 1)
    good = engine.dpo_step(RankMinibatch(batch.ranks[0], batch.denominator), DPOConfig(beta=0.5))
    engine.reference.model.model.norm.weight.data[0] = float("nan")  # as the weights of a run do not show it
    with pytest.raises(NonFiniteGradients) as caught:
        engine.dpo_step(RankMinibatch(batch.ranks[0], batch.denominator), DPOConfig(beta=0.5))
    dump(engine, caught.value, tmp_path / "step")
    code, told = findings(tmp_path / "step", capsys)
    assert code == 1
    texts = [f["what"] for f in told["findings"]]
    assert texts[0].startswith("reference log-prob (handed in) of sequence 0, ")
    assert texts[-1] == "alone not finite: sequence 0, 2, 4, 6"
    assert np.isfinite(good["loss"])


def values_and_returns(batch, poison=None):
    """Filled in; ``poison`` is the return of a loss token of sequence 1 in the last micro-batch."""
    rng = np.random.default_rng(3)
    for mb in (mb for m in batch.minibatches for turns in m.ranks for mb in turns):
        mb.values, mb.returns = (np.where(mb.loss_mask, rng.standard_normal(mb.n_tokens), 0).astype(np.float32) for _ in range(2))
    if poison is not None:
        last = batch.minibatches[-1].ranks[0][-1]
        last.returns[int(last.cu_seqlens[2]) - 1] = poison
    return batch


def with_critic(model_folder, tmp_path, **critic):
    engine = make_engine(
        model_folder,
        tmp_path,
        cls=lambda *a, **k: TrainEngine(*a, **k, critic=CriticConfig(**critic)),
        max_nonfinite_steps=0,
        reward_norm=None,
    )
    with torch.no_grad():  # a head that says something, and layers that are not the actor's
        for p in value_head_parameters((engine.critic.model if engine.critic else engine.actor).model).values():
            p.add_(torch.arange(p.numel()).view_as(p) / 10)
        if engine.critic:
            engine.critic.model.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    return engine


@pytest.mark.parametrize("tied", [True, False])
def test_critic_of_its_own_is_dumped_with_its_layers(tmp_path, capsys, tied):
    (tmp_path / "model").mkdir()
    model_folder = save_small_model(tmp_path / "model", tie_word_embeddings=tied)
    engine = with_critic(model_folder, tmp_path, eps_clip=0.3)
    good, bad = values_and_returns(make_batch()), values_and_returns(make_batch(n_minibatches=2, capacity=120), poison=np.nan)
    with pytest.raises(NonFiniteGradients, match="optimizer steps of the critic") as caught:
        engine.train_step(rank_part(good), rank_part(bad))
    assert dump(engine, caught.value, tmp_path / "step").endswith("begins")
    code, told = findings(tmp_path / "step", capsys)
    assert code == 1 and len(told["losses"]) == 1, "of two mini-batches the second was skipped"
    texts = [f["what"] for f in told["findings"]]
    assert texts[0].startswith("returns (handed in) of sequence 1, ") and texts[-1] == "alone not finite: sequence 1"

    # Without the poison the same numbers come out.
    minibatch, stats = rank_part(values_and_returns(make_batch(capacity=120)))[0], StepStats(engine.device)
    for mb in minibatch.microbatches:
        value_backward(engine.critic.model, engine.critic.config, to_device(mb, engine.device, 0), minibatch.denominator, stats)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.critic.model.model.parameters() if p.grad is not None]))
    error = NonFiniteGradients("", "critic", [failed_minibatch(minibatch, [None] * len(minibatch.microbatches))])
    dump(engine, error, tmp_path / "finite")
    code, told = findings(tmp_path / "finite", capsys)
    assert (code, told["findings"]) == (0, [])
    assert told["losses"] == pytest.approx([float(stats.minibatch_loss)], rel=1e-5)
    assert told["grad_norms"] == pytest.approx([norm], rel=1e-5)


def test_critic_on_two_ranks(model_folder, tmp_path, capsys):
    config = make_config(model_folder, tmp_path, backend="fsdp:d2", max_nonfinite_steps=0, reward_norm=None).new(critic=CriticConfig())
    batch = values_and_returns(make_batch(capacity=80, world_size=2), poison=np.nan)
    batch.critic_minibatches = batch.minibatches

    async def run():
        handle = await TrainerHandle.start(config, model_folder, tmp_path / "run")
        try:
            await handle.train_step(batch)
        finally:
            await handle.close()

    with pytest.raises(WorkerFailed, match=r"steps of the critic.*areal replay-batch .*critic_000001"):
        asyncio.run(run())
    step = load(tmp_path / "run" / "replay" / "critic_000001")
    assert [len(turns) for turns in step.minibatches[0].ranks] == [len(turns) for turns in batch.minibatches[0].ranks]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load_file(step.weights / "model.safetensors")[name], load_file(model_folder / "model.safetensors")[name])
    code, told = findings(tmp_path / "run", capsys)
    last = len(batch.minibatches[0].ranks[0]) - 1
    assert code == 1 and {f["where"] for f in told["findings"]} == {f"mini-batch 0, rank 0, micro-batch {last}"}


def test_value_head_on_the_actors_layers_is_dumped_with_them(model_folder, tmp_path, capsys):
    engine = with_critic(model_folder, tmp_path, shared=True)
    with pytest.raises(NonFiniteGradients) as caught:
        engine.train_step(rank_part(values_and_returns(make_batch(capacity=200), poison=np.inf)))
    dump(engine, caught.value, tmp_path / "step")
    step = load(tmp_path / "step")
    assert step.critic.shared and set(step.value_head) == {"value_head.weight", "value_head.bias"}
    np.testing.assert_array_equal(step.value_head["value_head.weight"], engine.model.value_head.weight.detach().numpy())
    code, told = findings(tmp_path / "step", capsys)
    assert code == 1
    assert [f["what"] for f in told["findings"]][-1] == "alone not finite: sequence 1"


# -- what else can go wrong ---------------------------------------------------------------------------------------------------------


def test_place_that_cannot_be_written_is_told_and_does_not_hide_the_reason(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine, max_nonfinite_steps=0)
    batch = make_batch()
    batch.minibatches[0].ranks[0][0].advantages[:] = np.nan
    (tmp_path / "replay").write_text("in the way")
    with pytest.raises(NonFiniteGradients) as caught:
        engine.train_step(rank_part(batch))
    assert "could not be dumped" in dump(engine, caught.value, tmp_path / "replay" / "step")
    assert (tmp_path / "replay").read_text() == "in the way"


def test_folder_without_a_dumped_step(tmp_path, capsys):
    assert main(["replay-batch", str(tmp_path)]) == 2
    assert "holds no dumped train step" in capsys.readouterr().err
    (tmp_path / "replay.json").write_text("{}")
    assert main(["replay-batch", str(tmp_path / "replay.json"), "--device", "cpu"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_loss_that_is_not_finite_with_finite_gradients_skips_the_step(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, cls=TrainEngine)
    (minibatch,) = rank_part(make_batch())
    x = to_device(minibatch.microbatches[0], engine.device, 0)
    before = engine.snapshot()
    for loss, finite in ((torch.tensor(float("inf")), False), (torch.tensor(0.5), True)):
        engine.backward(x, None, 0.0, minibatch, StepStats(engine.device))
        step = engine.actor.optimizer_step(1.0, loss)
        assert (step.finite, np.isfinite(step.grad_norm)) == (finite, True)
        assert all(torch.equal(before[n], w) for n, w in engine.weights().items()) != finite
