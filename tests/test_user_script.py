"""areal from a user's own script: own rows, own workflow in AReaL's form, own reward function; real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from areal import PPOTrainer, RLVRWorkflow, SFTTrainer
from areal.config import ConfigError
from areal.config_load import load_expr_config

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    str(ROOT / "examples" / "arithmetic.yaml"),
    "total_train_steps=3",
    "rollout.consumer_batch_size=4",
    "gconfig.n_samples=4",
    "actor.ppo_n_minibatches=1",
    "evaluator.n_prompts=8",
    "stats_logger.tensorboard=false",
]
ROWS = [{"question": f"a{i}b+{j}=", "answer": f"#{(i + j) % 10}"} for i in range(5) for j in range(5)]
SCRIPT = """
import sys
import uuid

import torch

from areal import AsyncRewardWrapper, GRPOConfig, ModelRequest, PPOTrainer, RolloutWorkflow, load_expr_config


def reward_fn(prompt, completions, prompt_ids, completion_ids, answer, **row):
    assert prompt == row["question"]
    return float(len(completion_ids))


class Workflow(RolloutWorkflow):
    def __init__(self, reward_fn, gconfig, tokenizer):
        self.tokenizer = tokenizer
        self.gconfig = gconfig.new_with_stop_and_pad_token_ids(tokenizer)
        self.reward_fn = AsyncRewardWrapper(reward_fn)

    async def arun_episode(self, engine, data):
        ids = self.tokenizer.encode(data["question"], add_special_tokens=False)
        request = ModelRequest(rid=uuid.uuid4().hex, input_ids=ids, gconfig=self.gconfig.new(n_samples=1), tokenizer=self.tokenizer)
        answer = await engine.agenerate(request)
        text = self.tokenizer.decode(answer.output_tokens)
        reward = await self.reward_fn(data["question"], text, answer.input_tokens, answer.output_tokens, **data)
        n_prompt = answer.input_len
        result = {
            "input_ids": torch.tensor(answer.input_tokens + answer.output_tokens, dtype=torch.int32),
            "loss_mask": torch.tensor([0] * n_prompt + [1] * answer.output_len, dtype=torch.int32),
            "logprobs": torch.tensor([0.0] * n_prompt + answer.output_logprobs, dtype=torch.float32),
            "versions": torch.tensor([-1] * n_prompt + answer.output_versions, dtype=torch.int32),
            "attention_mask": torch.ones(n_prompt + answer.output_len, dtype=torch.bool),
            "rewards": torch.tensor(reward, dtype=torch.float32),
        }
        return {key: value.unsqueeze(0) for key, value in result.items()}


if __name__ == "__main__":
    config, _ = load_expr_config(sys.argv[1:], GRPOConfig)
    rows = ROWS
    with PPOTrainer(config, train_dataset=rows, valid_dataset=rows[:8]) as trainer:
        kwargs = dict(reward_fn=reward_fn, gconfig=config.gconfig, tokenizer=trainer.tokenizer)
        trainer.train(workflow=Workflow, workflow_kwargs=kwargs)
"""


def test_own_rows_workflow_and_reward(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("ROWS", repr([*ROWS, "not a row"])))
    words = [*SMALL, f"stats_logger.fileroot={tmp_path}", "warmup=null", "stats_logger.dump_trajectories=true"]
    words += [
        "evaluator.gconfig.max_new_tokens=1",
        "rollout.max_head_offpolicyness=0",
        "total_train_steps=9",
        "train_dataset.shuffle=false",
    ]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "arithmetic" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train_steps"] == 9 and summary["length_after"] == 1.0  # evaluator.gconfig
    assert summary["dropped"] == {"malformed_row": 1}  # 36 prompts of an epoch of 26 rows
    samples = [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
    assert len(samples) == 9 * 4 * 4 and {s["prompt"] for s in samples} <= {row["question"] for row in ROWS}
    assert all(s["reward"] == sum(s["loss_mask"]) for s in samples)


def test_supervised_training_on_own_rows(tmp_path: Path) -> None:
    words = [f"stats_logger.fileroot={tmp_path}", "warmup.total_steps=4", "warmup.stop_at_accuracy=null", "train_dataset.type=given"]
    config, _ = load_expr_config([*SMALL, "actor.path=.", "actor.init_from_scratch=null", *words])
    from areal.models.loading import create_model
    from areal.tasks.arithmetic import build_tokenizer

    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = create_model({"model_type": "qwen2", "vocab_size": len(tokenizer), "max_position_embeddings": 128, **sizes}, seed=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = config.new(actor=config.actor.new(path=str(tmp_path / "model")))
    with SFTTrainer(config, train_dataset=ROWS) as trainer:
        result = trainer.train()
    assert (result.steps, result.dropped) == (4, {}) and (trainer.run_folder / "checkpoints" / "final" / "config.json").is_file()


def test_a_trainer_that_was_not_entered_says_so(tmp_path: Path) -> None:
    config, _ = load_expr_config([*SMALL, f"stats_logger.fileroot={tmp_path}"])
    with pytest.raises(RuntimeError, match=r"this PPOTrainer is new; enter it first: with PPOTrainer\(config\)"):
        PPOTrainer(config).train()


def test_an_impossible_config_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config, _ = load_expr_config([*SMALL, f"stats_logger.fileroot={tmp_path}"])
    with (
        pytest.raises(ConfigError, match=r"actor\.ppo_n_minibatches=3"),
        PPOTrainer(config.new(actor=config.actor.new(ppo_n_minibatches=3))),
    ):
        pass
    given = config.new(train_dataset=config.train_dataset.new(type="given"))
    with pytest.raises(ConfigError, match="no rows were given"), PPOTrainer(given):
        pass
    assert not list(tmp_path.iterdir())


def test_names_in_place_of_objects_as_areals_scripts_give_them(tmp_path: Path) -> None:
    from areal.config import GenerationConfig
    from areal.tasks.arithmetic import arithmetic_reward, build_tokenizer

    build_tokenizer().save_pretrained(tmp_path)
    workflow = RLVRWorkflow("areal.tasks.arithmetic.arithmetic_reward", GenerationConfig(), tokenizer=str(tmp_path))
    assert workflow.reward_fn is arithmetic_reward and workflow.tokenizer.decode(workflow.tokenizer("a7=")["input_ids"]) == "a7="
    with pytest.raises(ConfigError, match=r"reward_fn=.no\.such."):
        RLVRWorkflow("no.such", GenerationConfig())


REWARD = """
def reward(prompt, completions, prompt_ids, completion_ids, **row):
    return float(len(completion_ids) % 2)
"""


def test_the_command_finds_a_reward_function_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text(REWARD)
    code = "import sys; del sys.path[0]; from areal.cli import main; sys.exit(main())"  # as the installed script does
    words = [*SMALL, f"stats_logger.fileroot={tmp_path / 'runs'}", "warmup=null", "total_train_steps=1"]

    def train(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "train", *words, f"reward_fn={name}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path)

    refused = train("my_rewards:reward")
    assert refused.returncode == 2 and "reward_fn='my_rewards:reward' cannot be imported" in refused.stderr
    assert not (tmp_path / "runs").exists()
    done = train("my_reward:reward")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(Path(done.stdout.split()[-1]).read_text())["train_steps"] == 1
