"""Adapters alone to an embedded server, by shared memory and by files, all of them real processes; and a run that trains them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from runs import TrainRun
from safetensors.torch import load_file
from trainer_setup import make_batch, make_config

from areal.config_check_supervised import check_sft_config
from areal.config_load import load_expr_config
from areal.sft import SFTTrainer
from areal.trainer.worker import TrainerHandle
from tests.rollout_servers import Server, make_model
from tests.weight_transports import get, post

pytestmark = pytest.mark.timeout(300)
LORA = {"rank": 4, "alpha": 8.0, "sync": "adapter"}
PROMPT = [3, 17, 25, 8, 30, 12]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


def trainer_logprobs(trainer: TrainerHandle, answer: dict[str, Any]) -> Any:
    """Of the answer's tokens, under the trainer's weights."""
    from areal.packer import pack
    from areal.types import Trajectory

    tokens = [token for _, token, *_ in answer["meta_info"]["output_token_logprobs"]]
    ids = np.array([*PROMPT, *tokens], np.int64)
    mask = np.arange(len(ids)) >= len(PROMPT)
    sample = Trajectory(ids, mask, np.zeros(len(ids), np.float32), np.where(mask, 0, -1).astype(np.int32), 0.0)
    return trainer.logprobs(pack([sample], [np.zeros(len(ids), np.float32)]))


def generate(url: str) -> dict[str, Any]:
    sampling = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True}
    return post(url, "/generate", {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True})


@pytest.mark.parametrize("transport", ["shm", "disk"])
def test_adapters_alone(transport: str, model: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "other", seed=7)
    servers = [Server(folder, tmp_path / f"{i}.log", f"rollout {i}") for i, folder in enumerate((model, tmp_path / "other"))]

    async def scenario() -> None:
        config = make_config(model, tmp_path, backend="fsdp:d2", lora=LORA, optimizer={"lr": 2e-2}).new(
            weight_sync={"transport": transport}
        )
        trainer = await TrainerHandle.start(config, model, tmp_path)
        try:
            manifest = await trainer.manifest()
            assert manifest and all(".lora_" in name and dtype == "float32" for name, _, dtype in manifest)
            for version in (1, 2):
                await trainer.train_step(make_batch(world_size=2, seed=version))
                if transport == "shm":
                    _, digest = await trainer.publish(version)
                    path, body = "/update_weights_from_shm", {"name": trainer.shm_name, "version": version}
                else:
                    written = await trainer.write_weights(version, want_hash=True)
                    (outcome,), digest = written.outcomes, written.hash
                    assert outcome.error is None and digest is not None
                    path, body = "/update_weights_from_disk", {"model_path": outcome.url, "weight_version": str(version)}
                    files = {f.name: f.stat().st_size for f in Path(outcome.url).iterdir()}
                    assert set(files) == {"adapter_model.safetensors", "adapter_config.json", "areal_adapter.json"}
                    assert files["adapter_model.safetensors"] < 0.5 * (model / "model.safetensors").stat().st_size
                post(servers[0].wait().url, path, body)
                stats = get(servers[0].url, "/engine_stats")
                assert (stats["version"], stats["hash"]) == (version, f"{digest:016x}")
                answer = await asyncio.to_thread(generate, servers[0].url)
                logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
                np.testing.assert_allclose(logprobs, (await trainer_logprobs(trainer, answer))[len(PROMPT) :], atol=1e-5)
            with pytest.raises(HTTPError) as refused:
                post(servers[1].wait().url, path, body)
            assert "belongs to weights of the hash" in refused.value.read().decode()
            assert get(servers[1].url, "/engine_stats")["version"] == 0
        finally:
            await trainer.close()

    try:
        asyncio.run(scenario())
    finally:
        for server in servers:
            server.process.kill()


def test_a_run(tmp_path: Path) -> None:
    """Reinforcement learning of adapters, with the KL to the model at the start: both sides agree on the log-probs after every update."""
    keys = ["actor.lora={rank: 8, alpha: 16}", "actor.lora.sync=adapter", "actor.kl_ctl=0.01", "actor.optimizer.type=adamw"]
    run = TrainRun(tmp_path, *keys, "actor.optimizer.lr=1e-2", "total_train_steps=3", "saver.every_steps=2")
    assert run.summary()["train_steps"] == 3
    rows = run.metrics()
    drifts = [row["logprob_drift_max"] for row in rows if row["logprob_drift_max"] is not None]
    assert drifts and max(drifts) < 1e-4
    for name in ("step_000002", "final"):
        assert (run.folder / "checkpoints" / name / "adapter" / "adapter_model.safetensors").is_file()


def test_adapters_learn(tmp_path: Path) -> None:
    """What a model that has learned a little does not know yet, adapters alone teach it."""
    path = str(Path(__file__).parents[1] / "examples" / "sft.yaml")

    def learn(trial: str, *words: str) -> tuple[Path, list[float]]:
        config, _ = load_expr_config([path, f"stats_logger.fileroot={tmp_path}", f"trial_name={trial}", *words], check=check_sft_config)
        with SFTTrainer(config) as trainer:
            trainer.train()
        rows = (trainer.run_folder / "warmup.jsonl").read_text().splitlines()
        return trainer.run_folder / "checkpoints" / "final", [json.loads(row)["loss"] for row in rows]

    start, whole = learn("whole", "warmup.total_steps=60", "warmup.lr_end=0.3")
    lora = ["actor.lora={rank: 16, alpha: 32}", "warmup.optimizer.type=adamw", "warmup.optimizer.lr=5e-3", "warmup.total_steps=60"]
    final, adapters = learn("adapters", f"actor.path={start}", "actor.init_from_scratch=null", *lora)
    assert adapters[0] == pytest.approx(np.mean(whole[-5:]), rel=0.3)
    assert np.mean(adapters[-5:]) < 0.85 * adapters[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (start, final))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.1.mlp.up_proj.weight"], after["model.layers.1.mlp.up_proj.weight"])
