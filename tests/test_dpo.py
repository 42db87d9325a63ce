"""Training on preferences: the loss against its formula, rows to pairs to micro-batches, and runs that learn."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_templates import byte_tokenizer
from test_lora_ranks import Recording, make_pairs
from test_trainer_engine import packed_context, relative_difference
from trainer_setup import make_config, save_small_model

from areal.algo.loss import dpo_loss
from areal.config import ConfigError, DatasetConfig, DPOConfig, RefConfig
from areal.config_check import check_config
from areal.config_check_supervised import check_dpo_config, check_dpo_machine
from areal.config_load import load_expr_config
from areal.data import PromptDataset, load_dataset
from areal.dpo import DPOTrainer
from areal.models.loading import load_model
from areal.preferences import Preferences, make_dpo_batch
from areal.tasks.arithmetic import build_tokenizer
from areal.trainer.engine import RankMinibatch

torch.set_num_threads(1)
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_its_formula(smoothing):
    rng = np.random.default_rng(0)
    actor, reference = rng.normal(-20, 6, (2, 14))
    log_ratios = torch.tensor(actor - reference, requires_grad=True)
    loss, sums = dpo_loss(log_ratios, beta=0.3, label_smoothing=smoothing, denominator=11.0)
    loss.backward()

    ratio = actor - reference
    h = 0.3 * (ratio[0::2] - ratio[1::2])
    sigmoid = 1 / (1 + np.exp(-h))
    assert float(loss.detach()) == pytest.approx(
        -np.sum((1 - smoothing) * np.log(sigmoid) + smoothing * np.log(1 - sigmoid)) / 11, rel=1e-12
    )
    slope = -0.3 * ((1 - smoothing) * (1 - sigmoid) - smoothing * sigmoid) / 11
    np.testing.assert_allclose(log_ratios.grad[0::2], slope, rtol=1e-10)
    np.testing.assert_allclose(log_ratios.grad[1::2], -slope, rtol=1e-10)
    found = {name: float(value) for name, value in sums.items()}
    assert found == pytest.approx(
        {
            "loss": float(loss.detach()),
            "n_pairs": 7,
            "preferred": (h > 0).sum(),
            "margin": h.sum(),
            "chosen_reward": 0.3 * ratio[0::2].sum(),
            "rejected_reward": 0.3 * ratio[1::2].sum(),
        },
        rel=1e-5,
    )


def test_the_loss_is_finite_far_out():
    log_ratios = torch.tensor([-4000.0, 4000.0, 4000.0, -4000.0], requires_grad=True)
    loss, _ = dpo_loss(log_ratios, beta=1.0, denominator=2.0)
    loss.backward()
    assert float(loss.detach()) == 4000 and log_ratios.grad.tolist() == [-0.5, 0.5, 0, 0]


# -- on a rank ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


def float64_gradients(model, reference, pairs, beta, smoothing):
    """From the definition, one answer at a time, with whole logits."""

    def score(policy, sample):
        ids = torch.from_numpy(sample.input_ids)
        log_p = torch.log_softmax(policy(ids[None], attention_context=packed_context(len(ids))).logits[0, :-1], -1)
        return log_p.gather(1, ids[1:, None])[torch.from_numpy(sample.loss_mask[1:]), 0].sum()

    model.zero_grad()
    losses = []
    for pair in pairs:
        with torch.no_grad():
            known = [score(reference, sample) for sample in pair]
        chosen, rejected = (beta * (score(model, sample) - before) for sample, before in zip(pair, known, strict=True))
        h = chosen - rejected
        losses.append(-(1 - smoothing) * torch.log(torch.sigmoid(h)) - smoothing * torch.log(torch.sigmoid(-h)))
    loss = torch.stack(losses).mean()
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("capacity", [60, 130, 4096])
def test_gradients_against_float64_whatever_the_cut(model_folder, tmp_path, capacity):
    config, recipe = make_config(model_folder, tmp_path), DPOConfig(beta=2.0, label_smoothing=0.1)
    engine = Recording(model_folder, config.actor, temperature=0.5, ref=RefConfig())
    pairs = make_pairs(7)
    for _ in range(2):  # in the second step the actor is not the reference any more
        batch = make_dpo_batch(pairs, capacity, 1)
        assert batch.denominator == 7 and max(mb.n_tokens for mb in batch.ranks[0]) <= capacity
        before = engine.snapshot()
        stats = engine.dpo_step(RankMinibatch(batch.ranks[0], batch.denominator), recipe)
    model, reference = (load_model(model_folder, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    loss, gradients = float64_gradients(model, reference, pairs, 2.0, 0.1)
    assert stats["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_difference(engine.gradients[-1], gradients) < 1e-5


def test_pairs_stay_together_and_are_all_there():
    pairs = make_pairs(9)
    for world_size, capacity in ((1, 80), (2, 80), (4, 400)):
        batch = make_dpo_batch(pairs, capacity, world_size)
        assert len({len(rank) for rank in batch.ranks}) == 1
        found = []
        for microbatch in (mb for rank in batch.ranks for mb in rank):
            sequences = [tuple(microbatch.input_ids[a:b]) for a, b in itertools.pairwise(microbatch.cu_seqlens)]
            if sequences != [(0,)]:
                found += list(zip(sequences[0::2], sequences[1::2], strict=True))
        assert sorted(found) == sorted((tuple(p.chosen.input_ids), tuple(p.rejected.input_ids)) for p in pairs)


# -- rows ---------------------------------------------------------------------------------------------------------------------------


def test_rows(tmp_path):
    rows = [
        {"prompt": "a1=", "chosen": "#1", "rejected": "#2"},
        {"prompt": "a2=", "chosen": [{"role": "assistant", "content": "#2"}], "rejected": "#3"},
        {"prompt": "a3=", "chosen": "#3"},
        {"prompt": "a4=", "chosen": "#4", "rejected": "#4"},
        {"prompt": "a5=", "chosen": "#5", "rejected": [{"role": "user", "content": "#6"}]},
        {"prompt": "a6=", "chosen": "#6", "rejected": "#" * 40},
        {"prompt": "a7=", "chosen": "#" * 12, "rejected": "#" * 13},
        {"prompt": "a" * 9, "chosen": "#1", "rejected": "#2"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = build_tokenizer()
    dataset = load_dataset(DatasetConfig(path=str(path), prompt_key="prompt", chat_template=False, shuffle=False))
    preferences = Preferences(dataset, tokenizer, max_tokens=30, max_prompt_len=8)
    texts = [[tokenizer.decode(sample.input_ids) for sample in pair] for pair in preferences.pairs(3)]
    assert texts == [["a1=#1<eos>", "a1=#2<eos>"], ["a2=#2<eos>", "a2=#3<eos>"], ["a1=#1<eos>", "a1=#2<eos>"]]
    # The seventh pair fits one by one, and not together.
    assert preferences.dropped == {"malformed_row": 2, "same_answers": 1, "too_long": 2, "prompt_too_long": 1}


def test_whole_conversations(tmp_path):
    tokenizer = byte_tokenizer()
    ask = [{"role": "user", "content": "2+2?"}]
    row = {
        "messages": ask,
        "chosen": [*ask, {"role": "assistant", "content": "4"}],
        "rejected": [*ask, {"role": "assistant", "content": "5"}],
    }
    preferences = Preferences(PromptDataset([row]), tokenizer, max_tokens=500)
    chosen, rejected = preferences.pairs(1)[0]
    prompt = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    for sample, answer in ((chosen, "4"), (rejected, "5")):
        assert tokenizer.decode(sample.input_ids) == prompt + answer + "<|im_end|>"
        assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == answer + "<|im_end|>"
    other = {**row, "chosen": [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]}
    with pytest.raises(ConfigError, match="the messages of 'chosen' before its last are not those of the prompt"):
        Preferences(PromptDataset([other]), tokenizer, max_tokens=500).pairs(1)


# -- mistakes -----------------------------------------------------------------------------------------------------------------------


def example(tmp_path, *words):
    rows = f"train_dataset.path={EXAMPLES / 'preferences.jsonl'}"
    return load_expr_config([str(EXAMPLES / "dpo.yaml"), rows, f"stats_logger.fileroot={tmp_path}", *words], check=check_dpo_config)[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dpo=null"], "needs its recipe under the key 'dpo'"),
        (["train_dataset.type=arithmetic"], "has no preferences"),
        (["warmup={}"], "warmup is not a part of `areal dpo`"),
        (["dpo.batch_size=2", "actor.backend=fsdp:d4"], "dpo.batch_size=2 pairs are fewer than the 4 ranks"),
        (["actor.lora={target_modules: []}"], "target_modules is empty"),
        (["train_dataset.max_prompt_len=9000"], "does not fit into actor.mb_spec.max_tokens_per_mb=8192"),
        (["dpo.beta=0"], "dpo.beta"),
    ],
)
def test_mistakes_in_the_configuration(tmp_path, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        example(tmp_path, *words)


def test_recipe_in_a_run_of_another_command_is_told_first(tmp_path):
    with pytest.raises(ConfigError, match="dpo is the recipe of another command.*areal dpo CONFIG"):
        check_config(example(tmp_path))


def test_mistakes_on_the_machine(model_folder, tmp_path):
    with (
        pytest.raises(ConfigError, match="there is no file 'nowhere.jsonl'"),
        DPOTrainer(example(tmp_path, f"actor.path={model_folder}", "train_dataset.path=nowhere.jsonl")),
    ):
        pass
    for name, place in (("actor", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        save_small_model(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": place}}}))
    for word, sentence in (
        (f"ref.path={tmp_path}/other", "ref.path: the tokenizer of '.*other' has other token ids"),
        ("actor.backend=fsdp:d1c3", "actor.path has 4 attention heads, which 3 context ranks cannot share equally"),
        ("actor.offload=true", "actor.offload=true moves parameters out of a GPU's memory, but the trainer is on the CPU"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            check_dpo_machine(example(tmp_path, f"actor.path={tmp_path}/actor", word))
    rows = [{"prompt": "a1=", "answer": "#1"}]
    with (
        pytest.raises(ConfigError, match=r"none of the first 1 rows has 'chosen' and 'rejected' \(the first one has prompt, answer\)"),
        DPOTrainer(example(tmp_path, f"actor.path={model_folder}"), rows),
    ):
        pass


# -- runs ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random model that knows the characters of the arithmetic task."""
    from tests.rollout_servers import make_model

    folder = tmp_path_factory.mktemp("start")
    make_model(folder)
    return folder


@pytest.mark.parametrize(
    "actor", [["actor.optimizer.lr=3e-3"], ["actor.optimizer.lr=1e-2", "actor.lora={rank: 8}", "actor.backend=fsdp:d2"]]
)
def test_the_chosen_answers_gain_on_the_rejected_ones(start, tmp_path, actor):
    words = [f"actor.path={start}", "dpo.total_steps=25", "dpo.batch_size=16", "saver.every_steps=10", *actor]
    with DPOTrainer(example(tmp_path, *words)) as trainer:
        result = trainer.train()
    rows = [json.loads(line) for line in (trainer.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 26)) and result.pairs == 25 * 16
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[0]["margin"] == 0
    assert rows[0]["lr_scale"] == pytest.approx(0.2) and rows[-1]["lr_scale"] < 0.2
    assert all(0 < row["mfu"] < 2 and row["forward_seconds"] > 0 and row["recompute_seconds"] > 0 for row in rows)
    assert result.preference_accuracy > 0.9 and result.margin > 0.3 and result.loss < 0.9 * np.log(2)
    assert json.loads((trainer.run_folder / "summary.json").read_text())["steps"] == 25
    checkpoints = {f.name for f in (trainer.run_folder / "checkpoints").iterdir()}
    assert checkpoints == {"step_000010", "step_000020", "final"}
    # The checkpoint is what was trained: the model in it prefers what it should.
    final, first = (load_model(folder, dtype=torch.float32) for folder in (trainer.run_folder / "checkpoints" / "final", start))
    preferences = Preferences(load_dataset(trainer.config.train_dataset), build_tokenizer(), 8192)
    gains = [[float(score(final, s) - score(first, s)) for s in pair] for pair in preferences.pairs(20)]
    assert sum(chosen > rejected for chosen, rejected in gains) >= 18


def score(model, sample):
    ids = torch.from_numpy(sample.input_ids)
    with torch.no_grad():
        log_p = torch.log_softmax(model(ids[None], attention_context=packed_context(len(ids))).logits[0, :-1], -1)
    return log_p.gather(1, ids[1:, None])[torch.from_numpy(sample.loss_mask[1:]), 0].sum()


def test_the_command(start, tmp_path):
    command = [sys.executable, "-m", "areal", "dpo", "examples/dpo.yaml", f"actor.path={start}", f"stats_logger.fileroot={tmp_path}"]
    done = subprocess.run([*command, "dpo.total_steps=2"], cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path(done.stdout.strip()).read_text())["pairs"] == 64
    assert "2 steps in" in done.stderr and "dropped nothing" in done.stderr
    wrong = subprocess.run([*command, "dpo.beta=x"], cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=100)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: examples/dpo.yaml: 'dpo.beta' is 'x'") and "hint:" in wrong.stderr
