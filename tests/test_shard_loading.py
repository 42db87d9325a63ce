"""Shards filled from the files of a checkpoint: the right values, and no rank that holds a whole model."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_worlds
from safetensors.torch import load_file, save_file
from test_gather import MIXTRAL, resident
from test_models import small_model
from trainer_setup import MODEL

from areal.models.loading import create_model, empty_model, load_model, save_model
from areal.trainer.mesh import RankMesh, TrainerLayout
from areal.trainer.model import RankModel
from areal.trainer.shard_loading import persistent_buffers
from areal.trainer.sharding import full_tensor

pytestmark = pytest.mark.timeout(300)

BIG = {
    **MODEL, "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 2048, "vocab_size": 4000, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "vocab_size": 40, "pad_token_id": 0,
}  # fmt: skip
MODELS = ["tied", "untied", "bfloat16", "files", "experts", "buffers", "gemma3", "prefix", "other-names"]
WHOLE = {"prefix": "it has no tensor 'model.embed_tokens.weight'"}
"""Those that transformers has to load, and why."""


def save(name, folder):
    match name:
        case "gemma3":
            model = small_model("gemma3_text")  # its embeddings have a scale that is a buffer
        case "other-names":
            model = small_model("gpt_neox")  # its head is called embed_out on the disk
        case "experts":
            model = create_model(MIXTRAL, seed=0)  # three tensors an expert become two a layer
        case "buffers":
            model = create_model(DEEPSEEK, seed=0)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("correction_bias"):
                    buffer.copy_(torch.arange(4.0))
        case _:
            model = create_model({**MODEL, "tie_word_embeddings": name != "untied"}, seed=0)
    if name == "bfloat16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder / name, max_shard_size=20_000 if name == "files" else "1GB")
    if name == "prefix":
        file = folder / name / "model.safetensors"
        save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file, {"format": "pt"})


def load(folder, name, layout, rank):
    records = []
    logger = logging.getLogger("areal.trainer.shard_loading")
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    model = RankModel(folder / name, RankMesh(torch.device("cpu"), rank, layout), torch.bfloat16)
    logger.removeHandler(handler)
    weights = {n: full_tensor(p) for n, p in model.model.named_parameters()}
    tied = model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
    save_model(model.template, weights | persistent_buffers(model.model), folder / f"{name}-{dist.get_world_size()}-{rank}")
    return weights, dict(model.model.named_buffers()), tied, records


def peak_of_loading(folder, layout, rank):
    """Bytes that this rank's memory grew by, at most, and those of its shard."""
    mesh = RankMesh(torch.device("cpu"), rank, layout)
    RankModel(folder / "tied", mesh, torch.bfloat16)  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = resident("VmRSS")
    model = RankModel(folder / "big", mesh, torch.bfloat16)
    peak = resident("VmHWM") - before
    return peak, sum(p.to_local().nbytes for p in model.model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    for name in MODELS:
        save(name, folder)
    create_model(BIG, seed=0).to(torch.bfloat16).save_pretrained(folder / "big")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    layouts = {1: TrainerLayout(1), 2: TrainerLayout(2)}
    jobs = {n: [partial(load, folder, name, layout) for name in MODELS] for n, layout in layouts.items()}
    jobs[2].append(partial(peak_of_loading, folder, layouts[2]))
    return run_worlds(jobs, folder)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_shards_together_are_what_transformers_loads(results, folder, name, world_size):
    expected = load_model(folder / name, dtype=torch.float32)
    for rank, (weights, buffers, tied, records) in enumerate(results[world_size][MODELS.index(name)]):
        parameters = dict(expected.named_parameters())
        assert weights.keys() == parameters.keys()
        assert all(torch.equal(weights[n], p) for n, p in parameters.items())
        assert buffers.keys() == dict(expected.named_buffers()).keys()
        assert all(torch.equal(buffers[n], b) for n, b in expected.named_buffers()), "inv_freq is in no checkpoint"
        assert tied == (expected.get_output_embeddings().weight is expected.get_input_embeddings().weight)
        assert [WHOLE[name] in record for record in records] == ([True] if name in WHOLE else [])
        if not rank:
            again = load_model(folder / f"{name}-{world_size}-0", dtype=torch.float32)
            assert all(torch.equal(p, q.bfloat16()) for p, q in zip(again.bfloat16().parameters(), parameters.values(), strict=True))


def test_no_rank_holds_a_whole_model(results):
    for peak, shard in results[2][-1]:
        print(peak / shard)
        assert shard > 48 << 20
        assert peak < shard + (16 << 20), f"{peak >> 20} MiB for a shard of {shard >> 20} MiB"


def test_lacking_weights_are_not_made_up(folder, tmp_path):
    create_model({**MODEL, "tie_word_embeddings": False}, seed=0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="has no tensor 'lm_head.weight'"):
        load_model(tmp_path, dtype=torch.float32)


def test_model_without_memory(folder):
    model = empty_model(folder / "tied", dtype=torch.float32)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.nn.Linear(2, 2).weight.is_meta, "only inside"
    assert model.generation_config.to_dict() == json.loads((folder / "tied" / "generation_config.json").read_text()) | {
        k: v for k, v in model.generation_config.to_dict().items() if v is None or k == "transformers_version"
    }
