"""Keys of critic and reference model that do not fit together end in one sentence."""

import json

import pytest

from areal import SFTTrainer
from areal.config import ConfigError, GRPOConfig
from areal.config_check import check_config, check_machine
from areal.config_load import load_expr_config

BASE = ["examples/arithmetic.yaml", "warmup=null"]
CRITIC = ["critic.eps_clip=0.2", "actor.reward_norm=null"]


def check(*words):
    config, _ = load_expr_config([*BASE, *words], GRPOConfig)
    check_config(config)
    return config


@pytest.mark.parametrize(
    "words",
    [
        CRITIC,
        [*CRITIC, "critic.shared=true", "critic.loss_coef=0.1", "actor.gae_lambda=0.95"],
        [*CRITIC, "critic.ppo_n_minibatches=4", "actor.adv_norm.mean_level=batch", "actor.adv_norm.std_level=batch"],
        ["actor.kl_ctl=0.01", "actor.kl_in=reward", "ref.offload=true"],
        ["actor.kl_ctl=0.01", "critic.shared=true", "actor.reward_norm.mean_level=batch", "actor.reward_norm.std_level=batch"],
        ["actor.discount=0.99"],
        ["critic={}", "actor.reward_norm=null", "actor.gae_lambda=0.9"],
    ],
)
def test_what_fits(words):
    assert check(*words).uses_ref == any("kl_ctl" in word for word in words)


@pytest.mark.parametrize(
    ("words", "sentence", "hint"),
    [
        (["critic.eps_clip=0.2"], r"critic learns what a prompt is worth.*mean_level=group", "actor.reward_norm=null"),
        (
            ["critic.shared=true", "actor.reward_norm.mean_level=leave_one_out", "actor.reward_norm.std_level=none"],
            "mean_level=leave_one_out",
            "reward_norm=null",
        ),
        ([*CRITIC, "critic.shared=true", "critic.path=/m"], r"critic.path='/m' names others", "remove critic.path"),
        ([*CRITIC, "critic.shared=true", "critic.optimizer.lr=1e-3"], r"critic.optimizer has no effect", "set actor.optimizer"),
        ([*CRITIC, "critic.shared=true", "critic.ppo_n_minibatches=2"], r"critic.ppo_n_minibatches has no effect", "actor.ppo_n_minibatches"),
        ([*CRITIC, "critic.shared=true", "critic.gradient_checkpointing=true"], "critic.gradient_checkpointing has no effect", "actor"),
        ([*CRITIC, "critic.loss_coef=0.1"], r"critic.loss_coef=0.1 has no effect", "critic.shared=true"),
        ([*CRITIC, "critic.mb_spec.max_tokens_per_mb=20"], r"max_tokens_per_mb=20 cannot hold .* 88 tokens", "max_tokens_per_mb=88"),
        ([*CRITIC, "critic.ppo_n_minibatches=5"], r"32 groups cannot be cut into critic.ppo_n_minibatches=5", "ppo_n_minibatches=4"),
        (["actor.kl_in=reward"], r"kl_in=reward has no effect with actor.kl_ctl=0", "remove actor.kl_in"),
        (["ref.path=/m"], r"ref.\* is set", "remove ref"),
        (["actor.gae_lambda=0.9"], r"gae_lambda=0.9 has no effect without a critic", "critic="),
    ],
)  # fmt: skip
def test_what_does_not(words, sentence, hint):
    with pytest.raises(ConfigError, match=sentence) as error:
        check(*words)
    assert hint in (error.value.hint or "")


@pytest.mark.parametrize("key", ["ref", "critic"])
def test_models_must_be_there(key, tmp_path):
    words = [*CRITIC, f"{key}.path={tmp_path}/none", *(["actor.kl_ctl=0.1"] if key == "ref" else [])]
    with pytest.raises(ConfigError, match=rf"{key}.path: there is no folder"):
        check_machine(check(*words))


def test_other_tokenizers_are_refused(tmp_path):
    model = {"model_type": "qwen2", "max_position_embeddings": 4096}
    for name, vocab in (("actor", {"a": 0, "b": 1}), ("same", {"b": 1, "a": 0}), ("other", {"a": 1, "b": 0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(model))
        tokenizer = {"model": {"vocab": vocab}, "added_tokens": [{"content": "<end>", "id": 2}]}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ["actor.init_from_scratch=null", f"actor.path={tmp_path}/actor", "actor.kl_ctl=0.1"]
    check_machine(check(*words, f"ref.path={tmp_path}/same"))
    with pytest.raises(ConfigError, match=r"ref.path: the tokenizer of '.*other' has other token ids"):
        check_machine(check(*words, f"ref.path={tmp_path}/other"))


def test_supervised_training_loads_neither():
    words = ["actor.kl_ctl=0.1", "actor.kl_in=reward", *CRITIC, "warmup={total_steps: 3, stop_at_accuracy: null}"]
    config = check(*words)
    alone = SFTTrainer(config)._cluster.config
    assert config.uses_ref and not alone.uses_ref and alone.critic is None
