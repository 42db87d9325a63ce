"""Adapters on one rank: what is trained, what leaves the trainer, and what peft makes of it."""

import itertools
import json

import pytest
import torch
from test_trainer_engine import rank_part, relative_difference
from trainer_setup import make_batch, make_config, save_small_model

from areal.config import ConfigError, DPOConfig, LoraConfig, RefConfig
from areal.config_check import check_config
from areal.inference.embedded.adapter import EngineAdapter
from areal.models.heads import packed_logprobs
from areal.models.loading import load_model
from areal.models.lora import base_parameters, pairs_by_weight
from areal.ops.weights_hash import weights_hash
from areal.trainer.checkpoint import write_checkpoint
from areal.trainer.engine import TrainEngine
from areal.weight_sync.adapter import AdapterInfo, read_adapter
from areal.weight_sync.stream import hash_tensors

torch.set_num_threads(1)
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


def make_engine(folder, tmp_path, **actor):
    lora = actor.pop("lora", LORA)
    return TrainEngine(folder, make_config(folder, tmp_path, lora=lora, **actor).actor, temperature=0.8)


def trained(folder, tmp_path, steps=2, **actor):
    """An engine whose adapters have moved, and one of its micro-batches."""
    engine = make_engine(folder, tmp_path, **{"optimizer": {"lr": 1e-2}, **actor})
    batch = make_batch()
    for _ in range(steps):
        engine.train_step(rank_part(batch))
    return engine, batch.minibatches[0].ranks[0][0]


def logprobs_of(model, engine, microbatch):
    x = engine._put(microbatch)
    with torch.no_grad():
        return packed_logprobs(model, x.input_ids, x.position_ids, x.lengths, 0.8, rows=x.rows)[0]


def test_only_adapters_are_trained(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path)
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    for _ in range(2):  # B is zero at first, so A moves only in the second step
        engine.train_step(rank_part(make_batch()))
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(before[name], parameter) == (".lora_" not in name), name
    (optimizer, _), *others = engine.actor._optimizer._optimizers
    assert not others
    stated = {id(p) for p in optimizer.state}
    assert stated == {id(p) for n, p in engine.model.named_parameters() if ".lora_" in n}
    # 7 linear layers in each of 2 layers; the head, which is the embedding too, has none.
    assert len(engine.actor.adapters.pairs) == 14 and len(stated) == 28


@pytest.mark.parametrize(("lora", "products"), [(LORA, 2), (None, 3)])
def test_a_frozen_head_costs_two_products_and_gets_no_gradient(tmp_path, monkeypatch, lora, products):
    folder = save_small_model(tmp_path / "untied", tie_word_embeddings=False, vocab_size=211)
    engine = make_engine(folder, tmp_path, lora=lora)
    counted, has_gradient = [], {}

    def counting(plain):
        def product(*factors, **options):
            counted.append(any(211 in x.shape for x in factors))
            return plain(*factors, **options)

        return product

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counting(getattr(torch, name)))
    step = engine.actor.optimizer_step

    def optimizer_step(*arguments):
        has_gradient.update({n: p.grad is not None for n, p in engine.model.named_parameters()})
        return step(*arguments)

    engine.actor.optimizer_step = optimizer_step
    engine.train_step(rank_part(make_batch()))
    assert sum(counted) == products
    assert has_gradient["lm_head.weight"] == (lora is None)
    assert all(has == (".lora_" in name or lora is None) for name, has in has_gradient.items())


def test_gradients_are_those_of_peft_in_float64(model_folder, tmp_path):
    import peft

    engine, _ = trained(model_folder, tmp_path)
    gradients, parameters = {}, {}

    def keep(*arguments):
        gradients.update({n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None})
        parameters.update({n: p.detach().clone() for n, p in engine.model.named_parameters()})
        return engine.actor.__class__.optimizer_step(engine.actor, *arguments)

    engine.actor.optimizer_step = keep
    batch = make_batch(capacity=100)
    engine.sft_step(rank_part(batch)[0])

    model = load_model(model_folder, dtype=torch.float64)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    peft.inject_adapter_in_model(config, model)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    for microbatch in batch.minibatches[0].ranks[0]:
        x = engine._put(microbatch)
        logprobs, _ = packed_logprobs(model, x.input_ids, x.position_ids, x.lengths, 1.0)
        (-logprobs[x.rows].sum() / batch.minibatches[0].denominator).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert relative_difference(gradients, expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_merged_is_adapted_and_goes_by_the_names_of_the_base(tmp_path, tied):
    folder = save_small_model(tmp_path / "model", tie_word_embeddings=tied)
    engine, microbatch = trained(folder, tmp_path)
    adapted, base = engine.logprobs(microbatch), load_model(folder, dtype=torch.float32)
    assert (adapted - logprobs_of(base, engine, microbatch)).abs().max() > 1e-3
    weights = engine.snapshot()
    assert weights.keys() == dict(base.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(weights[name])
    torch.testing.assert_close(logprobs_of(base, engine, microbatch), adapted, rtol=0, atol=1e-5)
    # What streams to servers, bucket by bucket, and what shared memory gets, are the same bits.
    gatherer = engine.gatherer
    streamed = hash_tensors(gatherer.gather, gatherer.bucket_plan(20_000), torch.device("cpu"))
    assert sum(streamed.values()) & (2**64 - 1) == weights_hash(weights)
    parts = {name: tensor.clone() for part in gatherer.parts(20_000) for name, tensor in part.items()}
    assert weights_hash(parts) == weights_hash(weights)
    engine.use_checkpoint_names()
    assert {t.name for bucket in engine.gatherer.bucket_plan(1 << 30) for t in bucket.tensors} == set(weights)


def test_without_adapters_it_is_the_model_that_it_was(model_folder, tmp_path):
    engine, microbatch = trained(model_folder, tmp_path)
    adapted = engine.logprobs(microbatch)
    base = TrainEngine(model_folder, make_config(model_folder, tmp_path).actor, temperature=0.8).logprobs(microbatch)
    with engine.actor.without_adapters():
        assert torch.equal(engine.logprobs(microbatch), base)
    assert torch.equal(engine.logprobs(microbatch), adapted)
    assert all(p.requires_grad == (".lora_" in n) for n, p in engine.model.named_parameters())


def test_a_reference_after_a_warm_up_is_what_the_warm_up_made(model_folder, tmp_path):
    config = make_config(model_folder, tmp_path, lora=LORA, optimizer={"lr": 1e-2}).actor
    without, warmed = (TrainEngine(model_folder, config, ref=RefConfig(), warms_up=warms_up) for warms_up in (False, True))
    assert without.reference is None and warmed.reference is not None
    batch = make_batch()
    microbatch = batch.minibatches[0].ranks[0][0]
    for engine in (without, warmed):
        start = engine.logprobs(microbatch)
        for _ in range(3):
            engine.sft_step(rank_part(batch)[0])
        engine.start_from_actor()
        expected = start if engine is without else engine.logprobs(microbatch)
        found = torch.from_numpy(engine.score([[microbatch]], [], False)["ref_logprobs"][0][0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (engine.logprobs(microbatch) - start).abs().max() > 1e-2


def test_the_start_of_the_adapters_is_the_seeds(model_folder, tmp_path):
    config = make_config(model_folder, tmp_path, lora=LORA).actor
    first, again, other = (TrainEngine(model_folder, config, seed=seed).actor.adapters.parameters for seed in (3, 3, 4))
    for name, factor in first.items():
        assert torch.equal(factor, again[name])
        assert torch.equal(factor, other[name]) == (".lora_B." in name) == (not factor.any())


def test_both_forms_of_a_checkpoint_load_and_agree(model_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    engine, microbatch = trained(model_folder, tmp_path)
    adapted = engine.logprobs(microbatch)
    folder = tmp_path / "saved"
    write_checkpoint(folder, engine.template, engine.snapshot(), model_folder, engine.adapter_snapshot())
    torch.testing.assert_close(logprobs_of(load_model(folder, dtype=torch.float32), engine, microbatch), adapted, rtol=0, atol=1e-5)
    description = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == str(model_folder.absolute())
    plain = AutoModelForCausalLM.from_pretrained(description["base_model_name_or_path"], dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(plain, str(folder / "adapter")).eval()
    assert not [m for m in peft_model.state_dict() if "lora" in m and not peft_model.state_dict()[m].any()], "a factor was not loaded"
    ids, cu, mask = microbatch.input_ids, microbatch.cu_seqlens, microbatch.loss_mask
    for begin, end in itertools.pairwise(cu):
        sequence = torch.from_numpy(ids[begin:end])
        with torch.no_grad():
            log_p = torch.log_softmax(peft_model(input_ids=sequence[None]).logits[0] / 0.8, -1)
        got = log_p[:-1].gather(1, sequence[1:, None])[:, 0]
        trained_on = torch.from_numpy(mask[begin + 1 : end])
        torch.testing.assert_close(got[trained_on], adapted[begin + 1 : end][trained_on], rtol=0, atol=1e-5)


@pytest.mark.parametrize("actor", [{"gradient_checkpointing": True}, {"optimizer": {"type": "muon", "muon_lr": 1e-2}}])
def test_goes_with(model_folder, tmp_path, actor):
    plain = make_engine(model_folder, tmp_path)
    other = make_engine(model_folder, tmp_path, **actor)
    for engine in (plain, other):
        engine.train_step(rank_part(make_batch()))
        engine.train_step(rank_part(make_batch()))
    if "optimizer" not in actor:
        assert weights_hash(plain.snapshot()) == weights_hash(other.snapshot())
    assert all(w.isfinite().all() for w in other.snapshot().values())
    assert weights_hash(other.snapshot()) != weights_hash(dict(load_model(model_folder, dtype=torch.float32).named_parameters()))


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (["lm_head"], "'lm_head' is the output head, which stays as it is; Qwen2ForCausalLM has down_proj, gate_proj, "),
        (["q_proj", "query"], "'query' is not the name of linear layers; Qwen2ForCausalLM has"),
        (["self_attn"], "'self_attn' is not the name of linear layers"),
    ],
)
def test_wrong_targets(model_folder, tmp_path, targets, sentence):
    with pytest.raises(ValueError, match=rf"actor\.lora\.target_modules: {sentence}"):
        make_engine(model_folder, tmp_path, lora={"target_modules": targets})


@pytest.mark.parametrize(
    ("rollout", "sync", "lora", "sentence"),
    [
        ({"backend": "sglang:d1"}, {}, {"sync": "adapter"}, "sync=adapter needs the embedded engine"),
        ({}, {"transport": "broadcast"}, {"sync": "adapter"}, "works by shared memory or files, and the transport is broadcast"),
        ({}, {}, {"target_modules": []}, "target_modules is empty"),
        ({}, {"transport": "disk"}, {"sync": "adapter"}, None),
        ({"backend": "sglang:d1"}, {}, {}, None),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(model_folder, tmp_path, rollout, sync, lora, sentence):
    config = make_config(model_folder, tmp_path, lora=lora, mb_spec={"max_tokens_per_mb": 2048})
    config = config.new(rollout=config.rollout.new(**rollout), weight_sync=sync)
    if sentence is None:
        return check_config(config)
    with pytest.raises(ConfigError, match=sentence):
        check_config(config)


def test_preferences_are_for_another_command(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="dpo is the recipe of another command"):
        check_config(make_config(model_folder, tmp_path).new(dpo=DPOConfig()))


# -- an adapter in the embedded engine ----------------------------------------------------------------------------------------------


def some_adapter(parameters, seed, names=("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"), rank=3):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in names:
        n_out, n_in = parameters[f"{name}.weight"].shape
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n_out, rank, generator=generator)
    return factors


def test_an_engine_takes_one_adapter_after_the_other(model_folder):
    model = load_model(model_folder, dtype=torch.float32)
    parameters = {n: p.data for n, p in model.named_parameters()}
    base = {n: p.clone() for n, p in parameters.items()}
    base_hash = f"{weights_hash(parameters):016x}"
    adapter = EngineAdapter()
    adapter.forget(base_hash)
    info = AdapterInfo({"r": 3, "lora_alpha": 6.0}, base_hash)
    for seed, names in (
        (0, ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")),
        (1, ("model.layers.0.self_attn.q_proj",)),
    ):
        factors = some_adapter(parameters, seed, names)
        adapter.take(parameters, factors, info)
        assert adapter.hash == f"{weights_hash(factors):016x}"
        products = {n: 2.0 * pair.up.double() @ pair.down.double() for n, pair in pairs_by_weight(factors).items()}
        for name, weight in parameters.items():
            torch.testing.assert_close(weight.double(), base[name].double() + products.get(name, 0.0), rtol=0, atol=1e-5)
    untouched = weights_hash(parameters)
    wrong = {name.replace("q_proj", "x_proj"): t for name, t in factors.items()}
    misfit = {name: t[:, :-1] if "lora_A" in name else t for name, t in factors.items()}
    half = {name: t for name, t in factors.items() if "lora_A" in name}
    for bad, of, sentence in (
        (factors, AdapterInfo(info.config, "0" * 16), "belongs to weights of the hash 0000000000000000"),
        (wrong, info, "x_proj.weight', which the model has not"),
        (misfit, info, "does not have its shape"),
        (half, info, "only one of the two factors"),
        ({"model.embed_tokens.weight": torch.zeros(1)}, info, "no factor of a plain LoRA adapter"),
    ):
        with pytest.raises(ValueError, match=sentence):
            adapter.take(parameters, bad, of)
    assert weights_hash(parameters) == untouched


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("use_rslora", True), ("bias", "all"), ("peft_type", "LOHA")])
def test_other_kinds_of_adapters_are_refused(model_folder, tmp_path, key, value):
    engine, _ = trained(model_folder, tmp_path, steps=1)
    engine.adapter_snapshot().write(tmp_path / "adapter")
    factors, info = read_adapter(tmp_path / "adapter")
    assert len(factors) == 28 and info.scale == 2.0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"{key}="):
        read_adapter(tmp_path / "adapter")


def test_names(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path, lora={"target_modules": ["v_proj"], "rank": 2})
    assert base_parameters(engine.model).keys() == dict(load_model(model_folder, dtype=torch.float32).named_parameters()).keys()
    assert set(engine.actor.adapters.parameters) == {
        f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"
    }
    assert engine.actor.adapters.scale == LoraConfig().alpha / 2
