"""The example configurations are whole: they load, their checks pass, and the longest sequence of their task fits."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rollout_servers import make_model
from runs import TrainRun

from areal.config_check_supervised import check_dpo_config, check_sft_config
from areal.config_load import load_expr_config
from areal.tasks.arithmetic import build_tokenizer, make_problem
from areal.workflow.build import reward_function

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
SCRIPTS = ("agent", "calculator", "write_code")
"""They make model and rows themselves."""


SUPERVISED = {"sft": check_sft_config, "dpo": check_dpo_config}
"""For commands of their own."""


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem in SUPERVISED], ids=lambda p: p.stem)
def test_one_without_rollouts_loads(path):
    config, _ = load_expr_config([str(path), "seed=3"], check=SUPERVISED[path.stem])
    assert config.seed == 3


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in SUPERVISED], ids=lambda p: p.stem)
def test_loads_and_takes_overrides(path):
    model = ["actor.path=made/by/the/script"] if path.stem in SCRIPTS else []
    config, source = load_expr_config([str(path), "seed=3", "rollout.max_head_offpolicyness=1", *model])
    assert (config.seed, config.rollout.max_head_offpolicyness, source) == (3, 1, str(path))
    assert callable(reward_function(config))


@pytest.mark.parametrize("path", [p for p in EXAMPLES if "arithmetic" in p.stem], ids=lambda p: p.stem)
def test_longest_chain_fits(path):
    config, _ = load_expr_config([str(path)])
    dataset, model = config.train_dataset, config.actor.init_from_scratch
    tokenizer = build_tokenizer(dataset.max_terms)
    problem = make_problem(0, "train", 0, min_terms=dataset.max_terms, max_terms=dataset.max_terms)
    prompt, answer = (len(tokenizer(text)["input_ids"]) for text in (problem.prompt, problem.thinking))
    assert prompt <= dataset.max_prompt_len
    assert answer + 1 <= config.gconfig.max_new_tokens
    assert dataset.max_prompt_len + config.gconfig.max_new_tokens <= config.rollout.max_context <= model["max_position_embeddings"]


STARTED_IN = {
    "arithmetic": "all tests of runs.TrainRun",
    "dpo": "test_dpo.py",
    "sft": "test_sft.py",
    **dict.fromkeys(("arithmetic_long", "calculator", "code", "gsm8k", "lora", "write_code"), "this file"),
}
"""Where each starts and takes steps; those of examples/algorithms do in test_algorithms.py."""


def test_there_are_these():
    assert {p.stem for p in EXAMPLES} == STARTED_IN.keys()
    assert {p.stem for p in FOLDER.glob("*.py")} == {"tiny", *SCRIPTS}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_small_one_starts(name, tmp_path):
    """The whole script with a hundredth of the warm-up: its episodes are not learned from yet, but none may be lost."""
    if name == "agent":
        pytest.importorskip("openai")
    words = ["warmup.total_steps=6", "total_train_steps=2", "evaluator.n_prompts=8", "rollout.consumer_batch_size=4", "gconfig.n_samples=2"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *words], capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / done.stdout.split()[-1]).read_text())
    assert summary["train_steps"] == 2 and summary["tokens_trained"] > 0 and summary["dropped"] == {}


def test_the_rows_of_the_small_ones_are_right(monkeypatch):
    """Half of their demonstrations earn the reward always, and no held-out prompt is trained on."""
    monkeypatch.syspath_prepend(str(FOLDER))
    calculator, write_code, tiny = (importlib.import_module(name) for name in ("calculator", "write_code", "tiny"))
    train, held_out = tiny.make_rows(300, 50, calculator.draw_problem)
    assert len(train) == 300 and len(held_out) == 50 and not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    for row in train:
        assert calculator.reward("", "".join(row["completion"]), [], [], row["answer"]) == 1.0 and eval(row["prompt"][:-1]) == int(
            row["answer"]
        )
    passed = {style: 0 for style in ("plain", "nested")}
    for row in tiny.make_rows(300, 50, write_code.draw_problem)[0]:
        try:
            exec(row["completion"] + "\n" + row["tests"], {})
        except AssertionError:
            continue
        passed["plain" if row["completion"].startswith("def f(x):return x") else "nested"] += 1
    assert passed["nested"] > 120 and 20 < passed["plain"] < 100


def make_tiny_model(folder: Path) -> None:
    """A random Qwen2 with a tokenizer of bytes and no chat template."""
    from areal.models.loading import create_model
    from areal.tasks.characters import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        **sizes,
    }
    create_model(config, seed=0).save_pretrained(folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["arithmetic_long", "lora"])
def test_one_for_a_cpu_takes_steps(name, tmp_path):
    words = ["total_train_steps=2"]
    if name == "lora":
        make_model(tmp_path / "model")
        words.append(f"actor.path={tmp_path / 'model'}")
    run = TrainRun(tmp_path, *words, config=f"examples/{name}.yaml")
    summary = run.summary()
    assert summary["train_steps"] == 2 and summary["tokens_trained"] > 0 and summary["dropped"] == {}
    assert (run.folder / "checkpoints" / "final" / "adapter").is_dir() == (name == "lora")


NUMBERS = range(1, 9)
ROWS = {
    "gsm8k": [
        {"question": f"Ann has {n} apples and buys {n} more. How many has she?", "answer": f"{n} + {n}\n#### {2 * n}"} for n in NUMBERS
    ],
    "code": [{"prompt": f"Write f(x), which adds {n} to x.", "tests": f"assert f(1) == {n + 1}"} for n in NUMBERS],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ROWS)
def test_one_for_gpus_starts_on_a_tiny_random_model(name, tmp_path):
    """The whole loop on worded problems: a random model answers none of them, and says so."""
    make_tiny_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[name]))
    overrides = {
        "actor.path": tmp_path / "model",
        "train_dataset.path": tmp_path / "rows.jsonl",
        "valid_dataset.path": tmp_path / "rows.jsonl",
        "stats_logger.fileroot": tmp_path / "runs",
        "actor.device": "cpu",
        "rollout.device": "cpu",
        "rollout.backend": "embedded:d1",
        "actor.dtype": "float32",
        "total_train_steps": 2,
        "gconfig.max_new_tokens": 8,
        "gconfig.n_samples": 2,
        "evaluator.gconfig.max_new_tokens": 8,
        "evaluator.n_prompts": 4,
        "rollout.consumer_batch_size": 4,
        "rollout.max_concurrent_rollouts": 4,
        "rollout.max_running_requests": 8,
        "reward.workers": 1,
        "reward.timeout": 60,
        "reward.isolation": "auto",
        "experiment_name": "example",
        "trial_name": "tiny",
    }
    command = [
        sys.executable,
        "-m",
        "areal",
        "train",
        str(FOLDER / f"{name}.yaml"),
        *(f"{key}={value}" for key, value in overrides.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs" / "example" / "tiny" / "summary.json").read_text())
    assert summary["train_steps"] == 2 and summary["accuracy_after"] == 0.0 and summary["tokens_trained"] > 0
