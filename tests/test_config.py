"""Configuration: what is accepted, and that every mistake is one sentence naming the key and the way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from areal.config import ConfigError, GenerationConfig, GRPOConfig
from areal.config_check import check_config, check_machine
from areal.config_load import all_keys, build_config, dump_yaml, list_keys, load_expr_config
from areal.launcher.gpus import count_gpus

GOOD = """
experiment_name: demo
gconfig: {n_samples: 8, max_new_tokens: 64}
rollout:
  consumer_batch_size: 32
  device: cpu
actor:
  device: cpu
  init_from_scratch: {model_type: qwen2, rms_norm_eps: 1e-6, max_position_embeddings: 128}
  mb_spec: {max_tokens_per_mb: 2048}
train_dataset: {type: arithmetic, max_prompt_len: 48}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def refusal(argv: list[object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_expr_config([str(word) for word in argv], GRPOConfig)
    error = caught.value
    assert "\n" not in str(error), "one sentence, on one line"
    assert "pydantic" not in str(error) and "Traceback" not in str(error)
    return error


def test_good_file_and_overrides(good: Path) -> None:
    config, path = load_expr_config(
        [str(good), "rollout.max_head_offpolicyness=4", "gconfig.stop=[a, 'b=c']", "actor.optimizer.lr=1e-3"], GRPOConfig
    )
    assert path == str(good)
    assert config.rollout.max_head_offpolicyness == 4
    assert config.gconfig.stop == ["a", "b=c"]
    assert config.actor.optimizer.lr == 1e-3
    assert config.rollout.consumer_batch_size == 32, "untouched keys stay"
    assert config.actor.init_from_scratch == {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 128}


def test_option_of_areal_scripts(good: Path) -> None:
    for argv in (["--config", str(good), "seed=7"], [f"--config={good}", "seed=7"], ["seed=7", "--config", str(good)]):
        assert load_expr_config(argv, GRPOConfig)[0].seed == 7


def test_text_keys_keep_what_was_typed(good: Path) -> None:
    words = ["trial_name=1e-5", "train_dataset.path=007", "train_dataset.prompt_key=no", "train_dataset.answer_key='on'"]
    config, _ = load_expr_config([str(good), *words], GRPOConfig)
    assert config.trial_name == "1e-5"
    assert config.train_dataset.path == "007"
    assert (config.train_dataset.prompt_key, config.train_dataset.answer_key) == ("no", "on")


def test_override_makes_and_removes_sections(good: Path) -> None:
    config, _ = load_expr_config(
        [str(good), "warmup.total_steps=10", "evaluator.gconfig.top_p=0.9", "evaluator.gconfig.max_new_tokens=64"], GRPOConfig
    )
    assert config.warmup is not None and config.warmup.total_steps == 10
    assert config.evaluator.gconfig is not None and config.evaluator.gconfig.top_p == 0.9
    assert load_expr_config([str(good), "warmup.total_steps=10", "warmup=null"], GRPOConfig)[0].warmup is None


def test_dump_is_a_file_that_gives_the_same(good: Path, tmp_path: Path) -> None:
    config, _ = load_expr_config([str(good), "actor.c_clip=3", "warmup.forced_prefix='#'"], GRPOConfig)
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_expr_config([str(tmp_path / "again.yaml")], GRPOConfig)[0] == config


def test_the_dump_of_naive_ppo_is_accepted_again(good: Path, tmp_path: Path) -> None:
    """A dump spells out the defaults, that of behav_filter_cap among them, which naive PPO has no use for."""
    config, _ = load_expr_config([str(good), "actor.use_decoupled_loss=false", "actor.recompute_logprob=false"], GRPOConfig)
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    check_config(load_expr_config([str(tmp_path / "again.yaml")], GRPOConfig)[0])


def test_configuration_never_changes(good: Path) -> None:
    config, _ = load_expr_config([str(good)], GRPOConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    other = config.new(seed=3)
    assert (config.seed, other.seed) == (0, 3)
    with pytest.raises(ConfigError, match="has no key 'sed'"):
        config.new(sed=3)
    with pytest.raises(ValueError, match="n_samples"):
        GenerationConfig().new(n_samples=0)


UNKNOWN = {
    "rollout.max_concurent_rollouts=3": "did you mean 'rollout.max_concurrent_rollouts'?",
    "eps_clip=0.1": "did you mean 'actor.eps_clip'?",
    "gconfig.max_token=3": "did you mean 'gconfig.max_new_tokens'?",
    "actor.max_tokens_per_mb=3": "did you mean 'actor.mb_spec.max_tokens_per_mb'?",
    "actor.optimizer.momentum=1": "actor.optimizer has type, lr, ",
    "train_dataset.shufle=true": "did you mean 'train_dataset.shuffle'?",
    "xyzzy.plugh=1": "the top level has experiment_name, ",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_unknown_key(good: Path, override: str) -> None:
    error = refusal([good, override])
    assert f"unknown key '{override.partition('=')[0].removesuffix('.plugh')}'" in error.message
    assert UNKNOWN[override] in error.hint


WRONG = {
    "rollout.consumer_batch_size=many": "'rollout.consumer_batch_size' is 'many', but must be a whole number",
    "rollout.consumer_batch_size=2.5": "'rollout.consumer_batch_size' is 2.5, but must be a whole number",
    "rollout.consumer_batch_size=0": "'rollout.consumer_batch_size' is 0, but must be at least 1",
    "actor.eps_clip=0": "'actor.eps_clip' is 0, but must be greater than 0",
    "actor.optimizer.lr=.inf": "'actor.optimizer.lr' is Infinity, but must be a finite number",
    "actor.reward_bias=.nan": "'actor.reward_bias' is NaN, but must be a finite number",
    "actor.optimizer.lr=-1": "'actor.optimizer.lr' is -1, but must be greater than 0",
    "gconfig.top_p=2": "'gconfig.top_p' is 2, but must be at most 1",
    "deterministic=perhaps": "'deterministic' is 'perhaps', but must be true or false",
    "rollout.update_mode=inplace": "'rollout.update_mode' is 'inplace', but must be one of auto, abort, retract, in_place",
    "actor.optimizer.betas=[0.9, x]": "'actor.optimizer.betas[1]' is 'x', but must be a number",
    "gconfig.stop=end": "'gconfig.stop' is 'end', but must be a list",
    "gconfig.stop=[[1]]": "'gconfig.stop[0]' is a list, but must be text",
    "actor.mb_spec=100": "'actor.mb_spec' is 100, but must be a mapping of keys",
    "rollout=null": "'rollout' is empty",
    "trial_name=a/b": "'trial_name' is 'a/b', which cannot name a folder",
    "actor.init_from_scratch=[1]": "'actor.init_from_scratch' is a list, but must be a mapping of keys",
    "gconfig.min_new_tokens=100": "gconfig: min_new_tokens=100 is larger than max_new_tokens=64; lower it",
    "train_dataset.max_terms=2": "train_dataset: max_terms=2 is smaller than min_terms=3; raise it",
    "train_dataset.type=jsonl": "train_dataset: a data set of type 'jsonl' needs path",
    "actor.path=model": "give either actor.path (a model directory) or actor.init_from_scratch",
    "actor.recompute_logprob=false": "use_decoupled_loss needs recompute_logprob: true",
    "actor.adv_norm.mean_level=group": "adv_norm works on the batch",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_value(good: Path, override: str) -> None:
    assert WRONG[override] in refusal([good, override]).message


def test_evaluation_samples_as_training_does_but_for_what_it_sets(good: Path, tmp_path: Path) -> None:
    words = ["gconfig.temperature=0.9", "gconfig.stop=[x]", "gconfig.n_samples=4", "evaluator.gconfig.top_p=0.5"]
    config, _ = load_expr_config([str(good), *words])
    gconfig = config.evaluator.gconfig
    assert gconfig == config.gconfig.new(top_p=0.5, n_samples=1)
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config))
    assert load_expr_config([str(tmp_path / "resolved.yaml")])[0] == config
    assert config.new(seed=3).evaluator.gconfig == gconfig
    with pytest.raises(ConfigError, match=r"max_context=200 is shorter than the longest sequence of an evaluation, 348 tokens"):
        load_expr_config([str(good), "rollout.max_context=200", "evaluator.gconfig.max_new_tokens=300"])


CLASHES = {
    "rollout.backend=vllm:d1": ("the backend 'vllm' is not known", "use embedded:dN"),
    "rollout.backend=embedded": ("'' is not a layout of embedded", "embedded:dN"),
    "rollout.backend=embedded:d1t2": ("'d1t2' is not a layout of embedded", "embedded:dN"),
    "rollout.backend=sglang:t2": ("'t2' is not a layout of sglang", "sglang:dNtM"),
    "rollout.backend=embedded:d0": ("is not a layout", "N of 1 or more"),
    "actor.backend=fsdp:d2t2": ("'d2t2' is not a layout of fsdp", "fsdp:dNcC (C ranks share a sequence)"),
    "actor.backend=fsdp:d3r2": ("3 data-parallel ranks cannot be 2 replicas", "use fsdp:d2r2"),
    "actor.backend=megatron:d2": ("the backend 'megatron' is not known", "use fsdp:dN"),
    "actor.ppo_n_minibatches=5": ("rollout.consumer_batch_size=32 groups cannot be cut", "actor.ppo_n_minibatches=4"),
    "actor.mb_spec.max_tokens_per_mb=100": ("cannot hold the longest sequence of 112 tokens", "actor.mb_spec.max_tokens_per_mb=112"),
    "rollout.max_context=100": ("rollout.max_context=100 is shorter than the longest sequence of 112 tokens", "rollout.max_context=112"),
    "gconfig.max_new_tokens=96": ("takes 128 tokens", "lower gconfig.max_new_tokens"),
    "evaluator.gconfig.max_new_tokens=96": ("takes 128 tokens", "lower evaluator.gconfig.max_new_tokens"),
    "gconfig.top_p=0.9": ("gconfig.top_p=0.9 cuts the distribution", "evaluator.gconfig may set it"),
    "gconfig.top_k=20": ("gconfig.top_k=20 cuts the distribution", "evaluator.gconfig may set it"),
    "gconfig.temperature=0": ("nothing to learn from", "1.0"),
    "gconfig.n_samples=1": ("makes every advantage 0", "gconfig.n_samples=8"),
    "rollout.episode_timeout=1000": ("ends the run before an episode", "raise the first"),
    "actor.init_from_scratch={hidden_size: 8}": ("has no model_type", "qwen2"),
    "actor.overlong_tokens=8": ("actor.overlong_tokens=8 has no effect", "actor.overlong_reward_penalty=true"),
    "actor.overlong_penalty_factor=2": ("actor.overlong_penalty_factor=2 has no effect", "actor.overlong_reward_penalty=true"),
    "actor.overlong_reward_penalty=true": ("1 to gconfig.max_new_tokens=", "set actor.overlong_tokens="),
    "rollout.dynamic_filter=my_filter": ("rollout.dynamic_filter='my_filter' is not an import path", "package.module:name"),
    "reward_fn=my_module": ("is not an import path", "package.module:name"),
    "actor.eps_clip=1": ("actor.eps_clip=1 leaves no lower end", "actor.objective=cispo takes 1 and more"),
    "actor.behav_imp_weight_mode=mask": ("behav_imp_weight_mode=mask has no weight to mask", "set actor.behav_imp_weight_cap=2"),
    "actor.behav_imp_weight_level=sequence": ("multiplies the weights of a whole sequence", "set actor.behav_imp_weight_cap=2"),
    "actor.kl_estimator=k1": ("actor.kl_estimator=k1 has no effect with actor.kl_ctl=0", "remove actor.kl_estimator"),
    "actor.reward_scaling=0": ("actor.reward_scaling=0 makes every reward the same", "actor.reward_scaling=1"),
    "actor.device=gpu": ("actor.device='gpu' is not a device", "use auto, cpu, cuda"),
}


@pytest.mark.parametrize("override", CLASHES)
def test_keys_that_do_not_fit_together(good: Path, override: str) -> None:
    error = refusal([good, override])
    message, hint = CLASHES[override]
    assert message in error.message
    assert hint in error.hint


PAIRS = {
    ("actor.behav_filter_level=sequence", "actor.behav_filter_cap=null"): "actor.behav_filter_level=sequence has no effect",
    ("actor.behav_filter_side=both", "actor.behav_filter_cap=null"): "actor.behav_filter_side=both has no effect",
    ("deterministic=true", "rollout.threads=2"): "needs rollout.threads=1, not 2",
    ("deterministic=true", "actor.threads=2"): "needs actor.threads=1, not 2",
    ("deterministic=true", "rollout.device=cuda:0"): "runs on the CPU only",
    ("actor.backend=fsdp:d40", "gconfig.n_samples=1", "actor.reward_norm=null"): "32 samples, fewer than the 40 ranks",
    ("actor.behav_imp_weight_cap=5", "actor.use_decoupled_loss=false"): "only the decoupled loss has",
    ("actor.overlong_reward_penalty=true", "actor.overlong_tokens=1000"): "actor.overlong_tokens=1000",
    ("rollout.dynamic_filter=mixed", "gconfig.n_samples=1", "actor.reward_norm=null"): "compares the samples of a group",
    ("gconfig.n_samples=1", "actor.reward_norm.mean_level=batch"): "actor.reward_norm.std_level='group' makes every advantage 0",
    ("actor.objective=cispo", "actor.c_clip=3"): "actor.c_clip=3 has no effect with actor.objective=cispo",
    ("actor.prox_logp_method=loglinear", "actor.use_decoupled_loss=false"): "which only the decoupled loss has",
    ("actor.behav_filter_cap=5", "actor.use_decoupled_loss=false", "actor.recompute_logprob=false"): "needs the recomputed log-probs",
}


@pytest.mark.parametrize("overrides", PAIRS)
def test_overrides_that_do_not_fit_together(good: Path, overrides: tuple[str, ...]) -> None:
    assert PAIRS[overrides] in refusal([good, *overrides]).message


@pytest.mark.parametrize("override", ["=3", ".a=3", "a..b=3", "a b=3", "1a=2", "seed.=2", "-=1"])
def test_bad_override_syntax(good: Path, override: str) -> None:
    error = refusal([good, override])
    assert override in error.message


def test_other_words(good: Path, tmp_path: Path) -> None:
    assert "'seed' is not an override" in refusal([good, "seed"]).message
    assert "unknown option '--sed'" in refusal([good, "--sed"]).message
    assert "no configuration file was given" in refusal(["seed=3"]).message
    assert "no configuration file was given" in refusal([]).message
    assert "no configuration file was given" in refusal(["--config"]).message
    assert "two configuration files" in refusal([good, "--config", good]).message
    assert "reaches into 'seed'" in refusal([good, "seed=1", "seed.x=1"]).message
    assert "not valid YAML" in refusal([good, "gconfig.stop=[a"]).message
    strange = tmp_path / "a=b.yaml"
    strange.write_text(GOOD)
    assert load_expr_config([str(strange)], GRPOConfig)[0].experiment_name == "demo"


def test_missing_file(good: Path, tmp_path: Path) -> None:
    error = refusal([tmp_path / "goood.yaml"])
    assert "does not exist" in error.message
    assert error.hint == f"did you mean '{good}'?"
    assert "no folder" in refusal([tmp_path / "nowhere" / "x.yaml"]).hint
    assert "is a folder" in refusal([tmp_path]).message


BAD_YAML = {
    "a: [1, 2\nb: 3\n": "line 2",
    "rollout:\n\tdevice: cpu\n": "line 2",
    "seed: 1\nseed: 2\n": "the key 'seed' is given twice",
    "rollout: {device: cpu, device: cpu}\n": "the key 'device' is given twice",
    "": "is empty",
    "# nothing\n": "is empty",
    "- a\n- b\n": "holds a list",
    "just words\n": "holds the text 'just words'",
    "seed: !!python/object/apply:os.system ['false']\n": "not valid YAML",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    error = refusal([path])
    assert "bad.yaml" in error.message
    assert BAD_YAML[text] in error.message


def test_tabs_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "tab.yaml").write_text("rollout:\n\tdevice: cpu\n")
    assert "spaces, not tabs" in refusal([tmp_path / "tab.yaml"]).hint
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    assert "cannot be read" in refusal([tmp_path / "bytes.yaml"]).message


def test_missing_sections_and_several_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("seed: 1\n")
    error = refusal([path])
    assert "'actor' is missing" in error.message
    assert "also wrong: train_dataset" in error.hint
    path.write_text("sed: 1\nactr: {}\n")
    error = refusal([path])
    assert "unknown key 'sed'" in error.message and "did you mean 'seed'?" in error.hint


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c))
)
def test_any_value_in_any_section_is_a_sentence(value: object) -> None:
    tree = yaml.safe_load(GOOD)
    for key in ("rollout", "actor", "gconfig", "warmup", "seed"):
        try:
            build_config({**tree, key: value}, GRPOConfig)
        except ConfigError as error:
            assert error.message


def test_every_key_has_a_meaning() -> None:
    without = [key for key, field in all_keys() if not field.description and not hasattr(field.annotation, "model_fields")]
    sections = {key.rpartition(".")[0] for key, _ in all_keys()}
    assert [key for key in without if key not in sections] == []
    assert "rollout.max_head_offpolicyness = 2  # eta: " in list_keys()


def test_machine_lacks_files(good: Path, tmp_path: Path) -> None:
    config, _ = load_expr_config([str(good)], GRPOConfig)
    check_machine(config)
    missing = config.new(train_dataset={"type": "jsonl", "path": str(tmp_path / "rows.jsonl"), "max_prompt_len": 48})
    with pytest.raises(ConfigError, match=r"train_dataset.path: there is no file .*rows.jsonl"):
        check_machine(missing)
    folder = tmp_path / "model"
    actor = {"path": str(folder), "device": "cpu"}
    with pytest.raises(ConfigError, match=r"actor.path: there is no folder .*model"):
        check_machine(config.new(actor=actor))
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"has no config.json"):
        check_machine(config.new(actor=actor))
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        check_machine(config.new(actor=actor))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 100}))
    with pytest.raises(ConfigError, match=r"takes 100 tokens .* is 112"):
        check_machine(config.new(actor=actor))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 112}))
    check_machine(config.new(actor=actor))


def test_more_ranks_than_gpus(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count itself is stood in for: no test machine has every number of GPUs."""
    words = [str(good), "actor.backend=fsdp:d4", "actor.device=auto"]
    config, _ = load_expr_config(words, GRPOConfig)
    monkeypatch.setattr("areal.config_check.count_gpus", lambda: 2)
    with pytest.raises(ConfigError, match=r"actor.backend='fsdp:d4' needs 4 GPUs, one a rank, and this machine has 2"):
        check_machine(config)
    check_machine(config.new(actor={**config.actor.model_dump(exclude_unset=True), "device": "cpu"}))
    with pytest.raises(ConfigError, match=r"rollout.device='cuda:2', but the GPUs of this machine are cuda:0 to cuda:1"):
        check_machine(config.new(actor={**config.actor.model_dump(exclude_unset=True), "device": "cpu"}, rollout={"device": "cuda:2"}))
    with pytest.raises(ConfigError, match=r"takes the GPU of this machine"):
        check_config(config.new(deterministic=True))
    monkeypatch.setattr("areal.config_check.count_gpus", lambda: 0)
    check_machine(config)
    check_config(config.new(deterministic=True))
    with pytest.raises(ConfigError, match=r"there is no GPU that torch can use"):
        check_machine(config.new(rollout={"device": "cuda"}))


def test_gpus_are_counted_as_torch_does() -> None:
    code = "from areal.launcher.gpus import count_gpus; n = count_gpus(); import sys; assert 'torch' not in sys.modules; print(n)"
    without_torch = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout)
    import torch

    assert without_torch == torch.cuda.device_count() == count_gpus()
