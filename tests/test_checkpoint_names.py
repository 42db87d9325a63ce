"""What goes over the wire against what ``save_pretrained`` writes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from areal.config import ActorConfig, GRPOConfig
from areal.models.checkpoint_names import CheckpointNames
from areal.models.loading import create_model, load_model, meta_template
from areal.models.selfcheck import UnsupportedModel
from areal.ops import weights_hash
from areal.trainer.engine import TrainEngine
from areal.trainer.worker import TrainerHandle
from areal.weight_sync.stream import plan_buckets
from tests.test_models import ARCHITECTURES, SMALL, small_config
from tests.trainer_setup import make_config

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {name: small_config(name) for name in ARCHITECTURES} | {
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"model_type": "qwen2_moe", **SMALL, **EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "olmoe": {"model_type": "olmoe", **SMALL, **EXPERTS},
}
SAME_NAMES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "phi3")


def sent(model: PreTrainedModel, names: CheckpointNames, bucket_bytes: int) -> dict[str, Tensor]:
    """All that goes over the wire, bucket by bucket."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for bucket in plan_buckets([(name, p.shape, p.dtype) for name, p in parameters.items()], bucket_bytes):
        data = torch.cat([parameters[spec.name].detach().reshape(-1).view(torch.uint8) for spec in bucket.tensors])
        for spec in names.on_the_wire(bucket).tensors:
            assert spec.name not in tensors
            tensors[spec.name] = spec.view(data).clone()
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_bytes_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    model = create_model(MODELS[name], seed=1)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    names = CheckpointNames(meta_template(model, torch.float32))
    for bucket_bytes in (1, 10_000, 10**9):
        tensors = sent(model, names, bucket_bytes)
        assert tensors.keys() == saved.keys()
        for key, tensor in tensors.items():
            assert tensor.shape == saved[key].shape and torch.equal(tensor, saved[key])
    if name in SAME_NAMES:
        assert names.is_identity


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_loaded_checkpoint_goes_out_as_it_came(name: str, tmp_path: Path) -> None:
    create_model(MODELS[name], seed=1).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    names = CheckpointNames(meta_template(model, torch.float32))
    assert not names.is_identity
    tensors, saved = sent(model, names, 10_000), load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == saved.keys() and all(torch.equal(tensors[key], saved[key]) for key in saved)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_a_trainer_gathers_its_buckets_by_these_names(name: str, tmp_path: Path) -> None:
    create_model(MODELS[name], seed=1).save_pretrained(tmp_path)
    engine = TrainEngine(tmp_path, ActorConfig(path=str(tmp_path)))
    tensors: dict[str, Tensor] = {}
    engine.use_checkpoint_names()
    for bucket in engine.gatherer.bucket_plan(5000):
        data = torch.empty(bucket.nbytes, dtype=torch.uint8)
        engine.gatherer.gather(bucket, data)
        tensors |= {spec.name: spec.view(data) for spec in bucket.tensors}
    saved = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == saved.keys() and all(torch.equal(tensors[key], saved[key]) for key in saved)


@pytest.mark.timeout(240)
def test_two_ranks_describe_hash_and_sample_what_servers_of_sglang_get(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    create_model(MODELS["qwen3_moe"], seed=1).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    tree = make_config(folder, tmp_path, backend="fsdp:d2").model_dump()
    config = GRPOConfig.model_validate(tree | {"rollout": tree["rollout"] | {"backend": "sglang:d1"}})
    saved = load_file(folder / "model.safetensors")

    async def scenario() -> None:
        trainer = await TrainerHandle.start(config, folder, tmp_path / "run")
        try:
            manifest = await trainer.manifest()
            assert {name: tuple(shape) for name, shape, _ in manifest} == {name: tuple(t.shape) for name, t in saved.items()}
            assert await trainer.tensor_hashes() == {name: weights_hash({name: tensor}) for name, tensor in saved.items()}
            first, second = await trainer.sample_tensors(0), await trainer.sample_tensors(1)
            assert first.keys() != second.keys()
            for name, rows in (first | second).items():
                assert np.array_equal(rows, saved[name][:2].numpy())
        finally:
            await trainer.close()

    asyncio.run(scenario())


def test_a_checkpoint_that_is_not_made_of_ranges_is_refused_by_name() -> None:
    cases = {
        "scattered": WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Transpose(0, 1)]),
        "computed": WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
    }
    for said, conversion in cases.items():
        model = create_model(MODELS["qwen2"], seed=1)
        model._weight_conversions = [conversion]
        with pytest.raises(UnsupportedModel, match=f"Qwen2ForCausalLM.*mlp.*{said}"):
            CheckpointNames(model)
