"""eta = 0 with ``deterministic: true`` is bit for bit the synchronous algorithm.

The rival below is that algorithm written out: generate, score, train, one after the other in one process, with neither controller nor
runner, buffer, staleness, client, server or shared memory. Its only parts of areal are the engine, the trainer and the pure functions.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from areal.algo.advantage import compute_advantages
from areal.config import GRPOConfig
from areal.config_load import load_expr_config
from areal.data import load_dataset
from areal.inference.embedded.engine import EmbeddedEngine
from areal.inference.embedded.request import GenerateRequest, SamplingParams
from areal.packer import make_train_batch
from areal.trainer.engine import RankMinibatch, TrainEngine
from areal.types import Group, Trajectory
from tests.rewards import share_of_even_ids
from tests.runs import ROOT, TINY, TrainRun

N_STEPS = 5
OVERRIDES = [
    "deterministic=true",
    f"total_train_steps={N_STEPS}",
    "rollout.max_head_offpolicyness=0",
    "rollout.consumer_batch_size=6",
    "gconfig.n_samples=4",
    "actor.ppo_n_minibatches=2",
    "actor.optimizer.muon_lr=0.01",
    "reward_fn=tests.rewards:share_of_even_ids",
    "evaluator.n_prompts=0",
]


def sampling_seed(config: GRPOConfig, row: dict, sample: int) -> int:
    """The documented key of an answer's randomness: (seed, prompt, epoch, sample, call)."""
    key = f"{config.seed}/{row['prompt_id']}/{row['epoch']}/{sample}/0"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def synchronous_training(config: GRPOConfig, model_folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    engine = EmbeddedEngine(model_folder, max_running_requests=config.rollout.max_running_requests, max_context=96, deterministic=True)
    trainer = TrainEngine(model_folder, config.actor)
    rows = load_dataset(config.train_dataset, config.seed, "train")
    n_samples, gconfig = config.gconfig.n_samples, config.gconfig
    for step in range(N_STEPS):
        trainer.version = step
        batch = [next(rows) for _ in range(config.rollout.consumer_batch_size)]
        requests = [
            GenerateRequest(
                tokenizer(row["prompt"])["input_ids"],
                SamplingParams(max_new_tokens=gconfig.max_new_tokens, sampling_seed=sampling_seed(config, row, sample)),
            )
            for row in batch
            for sample in range(n_samples)
        ]
        answers = engine.generate(requests)
        groups = []
        for g, row in enumerate(batch):
            trajectories = []
            for request, answer in list(zip(requests, answers, strict=True))[g * n_samples : (g + 1) * n_samples]:
                n = len(request.input_ids)
                ids = np.concatenate([request.input_ids, answer.output_ids])
                logprobs = np.concatenate([np.zeros(n), answer.logprobs]).astype(np.float32)
                versions = np.concatenate([np.full(n, -1), answer.versions]).astype(np.int32)
                reward = share_of_even_ids("", "", request.input_ids, answer.output_ids.tolist())
                trajectories.append(Trajectory(ids, versions >= 0, logprobs, versions, reward))
            groups.append(Group(g, row, trajectories))
        train_batch = make_train_batch(
            groups,
            compute_advantages(groups, config.actor, config.gconfig.max_new_tokens),
            n_minibatches=config.actor.ppo_n_minibatches,
            max_tokens_per_mb=config.actor.mb_spec.max_tokens_per_mb,
            world_size=1,
        )
        trainer.train_step([RankMinibatch(m.ranks[0], m.denominator) for m in train_batch.minibatches])
        weights = trainer.weights()
        assert weights is not None

        def load(parameters, version=step + 1, new=weights):  # type: ignore[no-untyped-def]
            for name, parameter in parameters.items():
                parameter.copy_(new[name])
            return version

        engine.update_weights(load)
    weights = trainer.weights()
    assert weights is not None
    return weights


@pytest.mark.timeout(240)
def test_eta_zero_is_bit_for_bit_the_synchronous_run(tmp_path: Path) -> None:
    run = TrainRun(tmp_path, *OVERRIDES)
    summary = run.summary()
    assert summary["train_steps"] == N_STEPS
    assert summary["max_staleness_trained"] == 0

    config, _ = load_expr_config(["--config", str(ROOT / "examples/arithmetic.yaml"), *TINY, *OVERRIDES])
    expected = synchronous_training(config, run.folder / "init")
    trained = load_file(run.folder / "checkpoints" / "final" / "model.safetensors")
    start = load_file(run.folder / "init" / "model.safetensors")
    assert set(trained) == set(expected)
    for name, tensor in trained.items():
        assert torch.equal(tensor, expected[name]), f"{name} differs by {(tensor - expected[name]).abs().max()}"
    moved = sum(not torch.equal(trained[name], start[name]) for name in trained)
    assert moved == len(trained), "training must have changed the weights"
