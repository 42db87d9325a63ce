"""One batch on 1, 2 and 4 ranks, in every layout: the same loss, gradients, statistics, steps and weights, and those of the definition."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_worlds
from test_models import small_model
from test_trainer_engine import relative_difference
from test_trainer_ranks import FullGradients
from torch.distributed.tensor import DTensor
from trainer_setup import make_batch, make_config, make_groups
from transformers import AutoModelForCausalLM

from areal.config_trainer import parse_trainer_backend
from areal.models import selfcheck
from areal.models.attention import AttentionSpec, PackedContext
from areal.models.ulysses import ContextPart, UlyssesContext, slice_sizes
from areal.packer import _fill_up, pack
from areal.trainer.engine import RankMinibatch
from areal.trainer.mesh import RankMesh
from areal.trainer.sharding import full_tensor

pytestmark = pytest.mark.timeout(300)

TEMPERATURE, CAP = 0.9, 1.5
MODELS = ["qwen2", "qwen3", "llama", "gemma", "gemma2", "gemma3_text", "mistral", "gpt_oss"]
IN_EVERY_LAYOUT = ["qwen2", "gemma2", "gpt_oss"]
"""Tied; a head that does more than a product, and windows; attention sinks and experts."""
LAYOUTS = {1: ["d1"], 2: ["d2", "d1c2"], 4: ["d4", "d4r2", "d2c2", "d1c4"]}
JOBS = {
    size: [(name, layout, {}) for layout in layouts for name in (MODELS if layout in ("d1", "d2") else IN_EVERY_LAYOUT)]
    for size, layouts in LAYOUTS.items()
}
JOBS[1].append(("qwen2", "d1", {"capacity": 60}))
JOBS[2] += [("qwen2", "d2", {"offload": True}), ("llama", "d2", {"idle": True}), ("gemma2", "d2", {"idle": True})]
JOBS[4] += [
    ("qwen2", "d4r4", {}),
    ("qwen2", "d2r2c2", {}),
    ("qwen2", "d2c2", {"capacity": 60, "fill_up": True}),
    ("qwen2", "d2c2", {"gradient_checkpointing": True}),
]
MUON = {"optimizer": {"type": "muon", "lr": 1e-3, "muon_lr": 1e-3}}
BFLOAT16 = {"dtype": "bfloat16", "optimizer": {"lr": 1e-6, "weight_decay": 0.0}, "same_cut": True}
ROUNDED = {size: [("qwen2", layout, options) for layout in LAYOUTS[size] for options in (MUON, BFLOAT16)] for size in LAYOUTS}
"""What has too few digits for the equality of the others."""


def run_layout(folder, name, layout, rank, capacity=200, fill_up=False, idle=False, same_cut=False, **actor):
    """A supervised step at a rate of 0, a train step of two mini-batches and a supervised one; what this rank knows of it.

    ``idle``: one data rank has all, the others have nothing to learn from. ``same_cut``: into the micro-batches that 4 ranks would have.
    """
    selfcheck.check_model = lambda config: None  # test_selfcheck has these models; here it would take half of the time
    config = make_config(folder / name, folder, backend=f"fsdp:{layout}", behav_imp_weight_cap=CAP, behav_filter_cap=None, **actor)
    mesh = RankMesh(torch.device("cpu"), rank, parse_trainer_backend(config.actor.backend))
    engine = FullGradients(folder / name, config.actor, temperature=TEMPERATURE, mesh=mesh)
    n_ranks = 4 if same_cut else 1 if idle else mesh.layout.data
    batch = make_batch(n_minibatches=2, capacity=capacity, world_size=n_ranks)
    if fill_up:
        for minibatch in batch.minibatches:
            for microbatches in minibatch.ranks:
                microbatches.append(_fill_up())
    parts = [RankMinibatch(part_of(mesh, m.ranks), m.denominator) for m in batch.minibatches]
    begun = engine.snapshot()
    result = {"supervised": (engine.sft_step(parts[0], 0.0)["loss"], engine.full.pop()), "loss": engine.losses.pop()}
    assert all(torch.equal(w, begun[n]) for n, w in (engine.snapshot() or {}).items())
    engine.set_optimizer(config.actor.optimizer)
    masters = {n: full_tensor(p).clone() for n, p in engine.model.named_parameters()}
    stats = engine.train_step(parts)
    moved = {n: full_tensor(p) - masters[n] for n, p in engine.model.named_parameters()}
    engine.sft_step(parts[1])
    samples = make_groups(1, 3, seed=5)[0].trajectories
    whole = pack(samples, [t.logprobs for t in samples])
    result |= {"gradients": engine.full, "stats": stats, "logprobs": engine.logprobs(whole), "weights": engine.snapshot(), "published": {}}
    result |= {"losses": engine.losses, "moved": moved, "begun": begun}
    for part in engine.gatherer.parts(4096):
        result["published"] |= {n: w.clone() for n, w in part.items()}
    result["tied"] = engine.model.get_output_embeddings().weight is engine.model.get_input_embeddings().weight
    result["shards"] = {p.to_local().numel() / max(1, p.numel()) for p in engine.model.parameters() if isinstance(p, DTensor)}
    return result if rank == 0 else {"logprobs": result["logprobs"], "published": result["published"]}


def part_of(mesh, ranks):
    """The micro-batches of this rank's data index, of those for as many ranks or more, or for one of which all others have copies without loss."""
    if len(ranks) >= mesh.layout.data:
        return [mb for microbatches in ranks[mesh.data_index :: mesh.layout.data] for mb in microbatches]
    return ranks[0] if mesh.data_index == 0 else [_fill_up() for _ in ranks[0]]


# -- attention alone ------------------------------------------------------------------------------------------------------------

ATTENTION = [(4, 2, 4, 4), (4, 4, 4, 5), (12, 6, 4, 4), (8, 1, 3, 3), (12, 3, 2, 2)]
"""Heads, K/V heads, head size of K and of V."""
LENGTHS = [5, 1, 9, 3]


def attention_inputs(heads, kv_heads, d, d_v):
    g = torch.Generator().manual_seed(heads)
    shapes = (18, heads, d), (18, kv_heads, d), (18, kv_heads, d_v), (heads,), (18, heads, d_v)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def attend(context, q, k, v, sinks, g):
    inputs = [x.requires_grad_() for x in (q, k, v, sinks)]
    out = context.attend(0, q, k, v, AttentionSpec(0.4, sliding_window=4, sinks=sinks))
    return [out.detach(), *torch.autograd.grad(out, inputs, g)]


def run_attention(shape, rank):
    sizes = slice_sizes(18, dist.get_world_size())
    part = ContextPart(dist.group.WORLD, rank, sizes, torch.zeros(0))
    q, k, v, sinks, g = attention_inputs(*shape)
    q, k, v, g = (x[part.begin : part.end].clone() for x in (q, k, v, g))
    return attend(UlyssesContext(PackedContext(LENGTHS), part), q, k, v, sinks, g)


# -- the tests ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for name in MODELS:
        small_model(name, scale=2.0).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    jobs = {size: [partial(run_layout, folder, name, layout, **options) for name, layout, options in jobs] for size, jobs in JOBS.items()}
    for size, others in ROUNDED.items():
        jobs[size] += [partial(run_layout, folder, name, layout, **options) for name, layout, options in others]
    jobs[4] += [partial(run_attention, shape) for shape in ATTENTION if shape[0] % 4 == 0]
    jobs[2] += [partial(run_attention, shape) for shape in ATTENTION]
    return run_worlds(jobs, folder)


def result_of(results, job):
    size = next(size for size in JOBS if job in JOBS[size] + ROUNDED[size])
    return results[size][(JOBS[size] + ROUNDED[size]).index(job)]


ALL_JOBS = [job for jobs in JOBS.values() for job in jobs]
DERIVED = [job for job in ALL_JOBS if job[1:] != ("d1", {})]


def job_id(job):
    return "-".join([job[0], job[1], *job[2]])


def expected_gradients(folder, name):
    """Of the first mini-batch, in float64, by Hugging Face's eager attention, a sequence at a time."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64, **eager).eval()
    batch = make_batch(n_minibatches=2, capacity=10**6)
    (microbatch,) = batch.minibatches[0].ranks[0]
    loss = torch.zeros((), dtype=torch.float64)
    for begin, end in zip(microbatch.cu_seqlens[:-1], microbatch.cu_seqlens[1:], strict=True):
        ids, mask, behaviour, advantages = (
            torch.from_numpy(x[begin:end]) for x in (microbatch.input_ids, microbatch.loss_mask, microbatch.logprobs, microbatch.advantages)
        )
        log_p = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0, :-1].double() / TEMPERATURE, -1)
        current = log_p.gather(1, ids[1:, None])[:, 0][mask[1:]]
        proximal = current.detach()
        weight = (proximal - behaviour[mask].double()).exp().clamp(max=CAP)
        ratio, advantage = (current - proximal).exp(), advantages[mask].double()
        loss = loss - (weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()
    (loss / batch.minibatches[0].denominator).backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_eager_attention_and_float64_losses(results, folder, name):
    expected = expected_gradients(folder, name)
    for layout in ["d1", "d2"]:
        gradients = result_of(results, (name, layout, {}))[0]["gradients"][0]
        assert gradients.keys() == expected.keys()
        assert max(relative_difference({n: gradients[n]}, {n: e}) for n, e in expected.items()) < 1e-5


@pytest.mark.parametrize("job", DERIVED, ids=job_id)
def test_every_layout_has_the_gradients_of_one_rank(results, job):
    one, other = result_of(results, (job[0], "d1", {}))[0], result_of(results, job)[0]
    (first, *later), (other_first, *other_later) = one["gradients"], other["gradients"]
    assert other_first.keys() == first.keys()
    assert max(relative_difference({n: other_first[n]}, {n: g}) for n, g in first.items()) < 1e-6
    for mine, theirs in zip(later, other_later, strict=True):
        assert relative_difference(theirs, mine) < 3e-6  # of parameters that differ in their last bits already


@pytest.mark.parametrize("job", DERIVED, ids=job_id)
def test_every_layout_has_the_loss_of_one_rank_and_both_of_a_supervised_step(results, job):
    one, other = result_of(results, (job[0], "d1", {}))[0], result_of(results, job)[0]
    assert other["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
    (loss, gradients), (other_loss, others) = one["supervised"], other["supervised"]
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(others, gradients) < 1e-6
    # Those of the router of a random mixture are a thousandth of the others, from terms that cancel: 4e-6; its last keys 1.1e-6.
    worst = max(relative_difference({n: others[n]}, {n: g}) for n, g in gradients.items() if "router" not in n)
    assert worst < (2e-6 if job[0] == "gpt_oss" else 1e-6)


@pytest.mark.parametrize("job", DERIVED, ids=job_id)
def test_every_layout_takes_the_steps_of_one_rank(results, job):
    one, other = result_of(results, (job[0], "d1", {}))[0], result_of(results, job)[0]
    for key, value in one["stats"].items():
        if key == "logprob_drift":
            assert other["stats"][key] == pytest.approx(value, rel=1e-4, abs=1e-6)
        elif key not in ("spans", "meters"):
            assert other["stats"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert other["stats"]["grad_norm"] == pytest.approx(one["stats"]["grad_norm"], rel=1e-6)
    assert other["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=3e-5)


@pytest.mark.parametrize("job", DERIVED, ids=job_id)
def test_every_layout_publishes_its_weights_once_and_knows_all_logprobs(results, job):
    ranks = result_of(results, job)
    assert all(not rank["published"] for rank in ranks[1:])
    assert ranks[0]["published"].keys() == ranks[0]["weights"].keys()
    assert all(torch.equal(ranks[0]["published"][n], w) for n, w in ranks[0]["weights"].items())
    for rank in ranks:
        assert torch.equal(rank["logprobs"], ranks[0]["logprobs"])
    one = result_of(results, (job[0], "d1", {}))[0]
    torch.testing.assert_close(ranks[0]["logprobs"], one["logprobs"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("world_size", "shape"), [(n, shape) for n in (2, 4) for shape in ATTENTION if shape[0] % n == 0], ids=str)
def test_attention_of_slices(results, world_size, shape):
    shapes = [s for s in ATTENTION if s[0] % world_size == 0]
    ranks = results[world_size][len(JOBS[world_size]) + len(ROUNDED[world_size]) + shapes.index(shape)]
    out, q, k, v, sinks = attend(PackedContext(LENGTHS), *attention_inputs(*shape))
    for index, whole in enumerate((out, q, k, v)):
        torch.testing.assert_close(torch.cat([rank[index] for rank in ranks]), whole)
    torch.testing.assert_close(sum(rank[4] for rank in ranks), sinks)


def test_replicas_hold_whole_copies(results):
    assert all(share >= 0.25 for share in result_of(results, ("qwen2", "d4", {}))[0]["shards"])
    assert result_of(results, ("qwen2", "d4r4", {}))[0]["shards"] == {1.0}
    assert 0.5 in result_of(results, ("qwen2", "d4r2", {}))[0]["shards"]


def test_tied_weights_stay_one(results):
    for job in ALL_JOBS:
        assert result_of(results, job)[0]["tied"] == (job[0] in ("gemma", "gemma2", "gemma3_text", "qwen2"))


@pytest.mark.parametrize("layout", ["d2", "d1c2", "d4", "d4r2", "d2c2", "d1c4"])
def test_muon_in_every_layout(results, layout):
    one, other = (result_of(results, ("qwen2", which, MUON))[0] for which in ("d1", layout))
    assert max(relative_difference({n: other["gradients"][0][n]}, {n: g}) for n, g in one["gradients"][0].items()) < 1e-6
    assert relative_difference(other["weights"], one["weights"]) < 1e-3  # bfloat16 iterations
    assert relative_difference(other["moved"], one["moved"]) < 0.02


@pytest.mark.parametrize("layout", ["d2", "d1c2", "d4", "d4r2", "d2c2", "d1c4"])
def test_bfloat16_is_summed_in_float32_in_every_layout(results, layout):
    """Where micro-batches are the same, only the sums over them and over ranks could differ; context ranks round parts of each."""
    one, other = (result_of(results, ("qwen2", which, BFLOAT16))[0] for which in ("d1", layout))
    worst = max(relative_difference({n: other["gradients"][0][n]}, {n: g}) for n, g in one["gradients"][0].items())
    assert worst < (0.03 if "c" in layout else 1e-6)
    exact = result_of(results, ("qwen2", "d1", {}))[0]["gradients"][0]
    assert 1e-4 < relative_difference(other["gradients"][0], exact) < 0.05


@pytest.mark.parametrize("layout", ["d1", "d2", "d4r2", "d2c2"])
def test_bfloat16_loses_no_small_updates(results, layout):
    """Two steps of Adam at a rate of 1e-6, far below the digits of most weights in bfloat16, in which none of these would move."""
    result = result_of(results, ("qwen2", layout, BFLOAT16))[0]
    for name, moved in result["moved"].items():
        if "bias" not in name:
            assert 5e-7 < moved.abs().median() < 2.5e-6, name
    same = [(result["weights"][n] == w).float().mean() for n, w in result["begun"].items() if "bias" not in n]
    assert min(same) > 0.9


def test_heads_that_ranks_cannot_share():
    part = ContextPart(None, 0, [1, 1, 1], torch.zeros(0))
    q = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match="4 attention heads cannot be shared by 3 context ranks"):
        UlyssesContext(PackedContext([3]), part).attend(0, q, q, q, AttentionSpec(1.0))
