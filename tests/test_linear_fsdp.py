"""The fused head under FSDP2, on one and two ranks over gloo, against whole logits in one process without sharding."""

import multiprocessing
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_trainer_engine import relative_difference
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from trainer_setup import MODEL

from areal.models.attention import PackedContext
from areal.models.heads import PPOInputs, head_of
from areal.models.loading import create_model, decoder_layers, forward_hidden
from areal.ops import linear_ppo_loss, ppo_loss
from areal.trainer.sharding import add_head_methods, full_tensor, shard_model

pytestmark = pytest.mark.timeout(200)

LENGTHS = [[90, 120, 81], [150, 40], [33, 1, 200], [170, 12]]
"""Micro-batches, most of more than one chunk of 128 tokens."""
TEMPERATURE, DENOMINATOR = 0.8, 700.0
OPTIONS = {"eps_clip": 0.2, "behav_imp_weight_cap": 2.0, "entropy_coef": 0.01}
CASES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "scaled": {"model_type": "granite", "logits_scaling": 3.0},
    "bias": {"model_type": "phi", "tie_word_embeddings": False},
    "softcap": {"model_type": "gemma2", "final_logit_softcapping": 5.0, "head_dim": 8},
    "checkpointing": {},
    "resharding": {},
}


def build(name):
    model = create_model({**MODEL, **CASES[name]}, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    if name == "checkpointing":
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        for layer in decoder_layers(model):
            layer.training = True
    return model


def microbatch(index):
    g = torch.Generator().manual_seed(index)
    lengths = LENGTHS[index]
    n = sum(lengths)
    ids, positions = torch.randint(2, 40, (n,), generator=g), torch.cat([torch.arange(k) for k in lengths])
    rows = ((positions > 0) & (torch.rand(n, generator=g) < 0.8)).nonzero()[:, 0]
    behavior = -3.5 + 0.5 * torch.randn(n, generator=g)
    return ids, positions, lengths, rows, behavior, torch.randn(n, generator=g)


def expected_gradients(name):
    model = build(name)
    for index in range(len(LENGTHS)):
        ids, positions, lengths, rows, behavior, advantages = microbatch(index)
        hidden = forward_hidden(model, ids, positions, PackedContext(lengths))[rows - 1]
        log_p = torch.log_softmax(head_of(model).logits(hidden) / TEMPERATURE, -1)
        logprobs, entropy = log_p.gather(1, ids[rows, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        proximal = logprobs.detach() - (0.05 * advantages[rows] if index % 2 else 0.0)
        everything = torch.ones_like(rows, dtype=torch.bool)
        rest = proximal, behavior[rows], advantages[rows], everything
        ppo_loss(logprobs, *rest, denominator=DENOMINATOR, entropy=entropy, backend="torch", **OPTIONS)[0].backward()
    return {n: p.grad for n, p in model.named_parameters()}


def sharded_gradients(name, rank, world_size):
    """The second of two steps, between which the weights move back and forth: a stale gathered head would show."""
    model = build(name)
    add_head_methods(model)
    shard_model(model, init_device_mesh("cpu", (world_size,)), torch.float32)
    if name == "resharding":
        model.set_reshard_after_forward(True, recurse=False)
    for step in range(2):
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.copy_(parameter * (0.5 if step == 0 else 2.0))
        model.zero_grad()
        for index in range(rank, len(LENGTHS), world_size):
            ids, positions, lengths, rows, behavior, advantages = microbatch(index)
            with torch.no_grad():  # a collective: all ranks, though half of them do not need it
                known, _ = model.packed_logprobs(ids, positions, lengths, TEMPERATURE, rows=rows, memory_budget=1)
            model.reshard()
            proximal = known - 0.05 * advantages if index % 2 else None
            result = model.packed_ppo_loss(
                ids, positions, lengths, TEMPERATURE, PPOInputs(proximal, behavior, advantages), rows=rows, denominator=DENOMINATOR, memory_budget=1, **OPTIONS
            )  # fmt: skip
            result.loss.backward()
    return {n: full_tensor(p.grad) for n, p in model.named_parameters()}


def refusals(world_size):
    """What goes wrong without a word elsewhere: the sharded weight itself, and float inputs that FSDP casts."""
    sentences = []
    model = build("tied")
    add_head_methods(model)
    mesh = init_device_mesh("cpu", (world_size,))
    shard_model(model, mesh, torch.float32)
    ids, positions, lengths, rows, behavior, advantages = microbatch(0)
    few = torch.zeros(4)
    try:
        linear_ppo_loss(torch.zeros(4, 32), model.lm_head.weight, ids[:4], None, few, few, few.bool(), eps_clip=0.2, denominator=1.0)
    except ValueError as error:
        sentences.append(str(error))
    model = build("tied")
    add_head_methods(model)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True))
    register_fsdp_forward_method(model, "packed_ppo_loss")
    assert isinstance(model, FSDPModule)
    try:
        inputs = PPOInputs(None, behavior, advantages)
        model.packed_ppo_loss(ids, positions, lengths, 1.0, inputs, rows=rows, denominator=1.0, eps_clip=0.2)
    except ValueError as error:
        sentences.append(str(error))
    return sentences


def run_rank(folder, rank, world_size):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    gradients = {name: sharded_gradients(name, rank, world_size) for name in CASES}
    sentences = refusals(world_size)
    if rank == 0:
        torch.save((gradients, sentences), folder / f"ranks{world_size}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(folder, rank, n)) for n in (1, 2) for rank in range(n)]
    for process in processes:
        process.start()
    expected = {name: expected_gradients(name) for name in CASES}
    for process in processes:
        process.join(150)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    return expected, {n: torch.load(folder / f"ranks{n}.pt", weights_only=False) for n in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_whole_logits(results, name, world_size):
    expected, ranks = results
    gradients = ranks[world_size][0][name]
    assert gradients.keys() == expected[name].keys()
    assert relative_difference(gradients, expected[name]) < 1e-6
    for parameter in expected[name]:
        if parameter.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert relative_difference({"w": gradients[parameter]}, {"w": expected[name][parameter]}) < 1e-6


@pytest.mark.parametrize(
    ("tie", "sentence"),
    [
        (lambda m: setattr(m.model.layers[1].mlp.up_proj, "weight", m.model.layers[0].mlp.up_proj.weight), "layers 0 and 1 share 'mlp.up_proj.weight'"),
        (lambda m: setattr(m.model.norm, "weight", m.model.layers[1].input_layernorm.weight), "'weight' is shared with layer 1"),
    ],
    ids=["two layers", "layer and root"],
)  # fmt: skip
def test_weights_that_would_be_untied_are_refused(tie, sentence):
    """Before anything is sharded: a parameter of two FSDP units becomes two, or ends in torch's own error."""
    model = build("untied")
    tie(model)
    with pytest.raises(ValueError, match=f"Qwen2ForCausalLM: {sentence}; train on one rank"):
        shard_model(model, None, torch.float32)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())


@pytest.mark.parametrize("world_size", [1, 2])
def test_silent_mistakes_are_refused(results, world_size):
    sharded, cast = results[1][world_size][1]
    assert "weight is a sharded DTensor" in sharded
    assert "behavior_logprobs is bfloat16; it must be float32" in cast
