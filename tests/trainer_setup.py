"""Small models and batches for the trainer's tests."""

import numpy as np

from areal.config import GRPOConfig
from areal.models.loading import create_model
from areal.packer import make_train_batch
from areal.types import Group, Trajectory

MODEL = {
    "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 40, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "max_position_embeddings": 512,
}  # fmt: skip


def save_small_model(folder, **changes):
    create_model({**MODEL, **changes}, seed=0).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_config(model_folder, fileroot, *, n_samples=4, groups=6, **actor):
    return GRPOConfig.model_validate(
        {
            "actor": {"path": str(model_folder), "optimizer": {"lr": 1e-3}, **actor},
            "gconfig": {"n_samples": n_samples, "max_new_tokens": 40},
            "rollout": {"consumer_batch_size": groups},
            "train_dataset": {"type": "arithmetic"},
            "stats_logger": {"fileroot": str(fileroot)},
        }
    )


def make_groups(n_groups=6, n_samples=4, seed=0, version=0):
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(n_groups):
        prompt = rng.integers(2, 40, rng.integers(3, 9))
        trajectories = []
        for _ in range(n_samples):
            n = int(rng.integers(1, 30))
            ids = np.concatenate([prompt, rng.integers(2, 40, n)])
            mask = np.arange(len(ids)) >= len(prompt)
            logprobs = np.where(mask, -3.6 + 0.3 * rng.standard_normal(len(ids)), 0).astype(np.float32)
            trajectories.append(Trajectory(ids, mask, logprobs, np.where(mask, version, -1).astype(np.int32), float(rng.random() < 0.5)))
        groups.append(Group(g, {}, trajectories))
    return groups


def make_batch(groups=None, *, capacity=4096, n_minibatches=1, world_size=1, seed=1):
    groups = make_groups() if groups is None else groups
    rng = np.random.default_rng(seed)
    advantages = [
        [np.where(t.loss_mask, np.float32(rng.standard_normal()), np.float32(0)).astype(np.float32) for t in g.trajectories] for g in groups
    ]
    return make_train_batch(groups, advantages, n_minibatches=n_minibatches, max_tokens_per_mb=capacity, world_size=world_size)
