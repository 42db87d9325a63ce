"""Supervised training: demonstrations to packed batches, the rate schedule, checks that run beside training."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_templates import byte_tokenizer

from areal.config import ActorConfig, ConfigError, DatasetConfig, GRPOConfig, SFTConfig
from areal.config_load import load_expr_config
from areal.data import PromptDataset, load_dataset
from areal.demonstrations import Demonstrations, demonstration_rows, load_demonstrations, make_sft_batch
from areal.sft import RateSchedule, SFTTrainer, SupervisedRun
from areal.sft_check import check_rows
from areal.tasks.arithmetic import build_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def arithmetic_config(**warmup):
    actor = ActorConfig(init_from_scratch={"model_type": "qwen2"}, mb_spec={"max_tokens_per_mb": 256})
    return GRPOConfig(actor=actor, train_dataset=DatasetConfig(type="arithmetic"), warmup=SFTConfig(**warmup))


def test_demonstrations_learn_the_answer_and_its_end_only(tokenizer):
    demonstrations = load_demonstrations(arithmetic_config(), tokenizer)
    kinds = set()
    for sample in demonstrations.batch(20):
        prompt = tokenizer.decode(sample.input_ids[~sample.loss_mask])
        answer = tokenizer.decode(sample.input_ids[sample.loss_mask])
        assert prompt.endswith("=") and prompt.startswith("a") and answer.endswith("<eos>")
        assert answer[0] in "a#" and answer.count("#") == 1
        kinds.add(answer[0])
    assert kinds == {"a", "#"}


def test_unusable_demonstrations_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [
        {"q": "a1=", "a": "#1"},
        {"q": "a2="},
        {"q": "a3=", "a": 3},
        {"q": "a b", "a": "#1"},
        {"q": "a4=", "a": "# 4"},
        {"q": "a5=", "a": "#" * 50},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{")
    dataset = DatasetConfig(path=str(path), prompt_key="q", answer_key="a", shuffle=False)
    demonstrations = Demonstrations(load_dataset(dataset, split="demonstrations"), tokenizer, max_tokens=20)
    texts = [tokenizer.decode(sample.input_ids) for sample in demonstrations.batch(2)]
    assert texts == ["a1=#1<eos>"] * 2
    assert demonstrations.dropped == {"malformed_row": 5, "too_long": 1}
    dataset = DatasetConfig(type="given", prompt_key="q", chat_template=False, shuffle=False, max_prompt_len=3)
    config = arithmetic_config(dataset=None).new(train_dataset=dataset)
    demonstrations = load_demonstrations(
        config, tokenizer, demonstration_rows(config, [{"q": "a1=", "answer": "#1"}, {"q": "a1b+1=", "answer": "#2"}])
    )
    assert [tokenizer.decode(sample.input_ids) for sample in demonstrations.batch(2)] == ["a1=#1<eos>"] * 2
    assert demonstrations.dropped == {"prompt_too_long": 1}


@pytest.mark.parametrize("template", ["qwen2.5", "llama3"])
def test_of_a_conversation_every_answer_is_learned(tmp_path, template):
    tokenizer = byte_tokenizer(template)
    said = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "Sure?"), ("assistant", "Yes. 4.")]
    messages = [{"role": role, "content": text} for role, text in said]
    rows = [{"chat": messages}, {"chat": messages[:-1]}, {"chat": messages[2:]}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = DatasetConfig(path=str(path), prompt_key="chat", shuffle=False)
    demonstrations = Demonstrations(load_dataset(dataset, split="demonstrations"), tokenizer, max_tokens=2000)
    sample, _ = demonstrations.batch(2)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == whole.rstrip("\n")
    end = tokenizer.eos_token
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == f"4{end}Yes. 4.{end}"
    assert demonstrations.dropped == {"malformed_row": 2}  # one ends with a question, one begins with an answer


def test_nothing_but_unusable_demonstrations_is_an_error_not_a_hang(tokenizer):
    rows = PromptDataset([{"prompt": "a1=", "answer": "#1"}])
    with pytest.raises(ConfigError, match=r"unusable, the last because .* 6 tokens, 4 fit"):
        Demonstrations(rows, tokenizer, max_tokens=4).next()


def test_batch_is_packed_whole_and_counted_over_all_ranks(tokenizer):
    samples = load_demonstrations(arithmetic_config(), tokenizer).batch(32)
    for world_size in (1, 2):
        batch = make_sft_batch(samples, 256, world_size)
        assert len(batch.ranks) == world_size and len({len(rank) for rank in batch.ranks}) == 1
        microbatches = [mb for rank in batch.ranks for mb in rank]
        assert batch.denominator == sum(s.loss_mask.sum() for s in samples) == sum(mb.loss_mask.sum() for mb in microbatches)
        assert max(mb.n_tokens for mb in microbatches) <= 256
        packed = sorted(tuple(mb.input_ids[a:b]) for mb in microbatches for a, b in zip(mb.cu_seqlens, mb.cu_seqlens[1:], strict=False))
        assert [seq for seq in packed if seq != (0,)] == sorted(tuple(s.input_ids) for s in samples)


def test_rates_fall_linearly_and_fall_on_in_the_cool_down():
    schedule = RateSchedule(SFTConfig(total_steps=100, lr_end=0.2, cooldown_steps=10, cooldown_lr_end=0.05))
    assert [schedule.scale(s) for s in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])
    schedule.cool_down(50)
    assert schedule.cooling and schedule.n_steps == 60
    assert [schedule.scale(s) for s in (50, 55, 60)] == pytest.approx([0.6, 0.325, 0.05])


def test_the_rates_rise_over_the_warm_up():
    config = SFTConfig(total_steps=100, lr_end=1.0, optimizer={"warmup_steps": 4})
    assert [RateSchedule(config).scale(s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cool_down_never_raises_the_rates():
    schedule = RateSchedule(SFTConfig(total_steps=100, lr_end=0.0, cooldown_steps=10, cooldown_lr_end=0.5))
    schedule.cool_down(90)
    assert [schedule.scale(s) for s in (90, 95, 99)] == pytest.approx([0.1] * 3)


class RecordingEngine:
    """Takes note of what it is asked to do; a step takes ``seconds``."""

    n_data_ranks, sequence_cost = 1, (1.0, 0.0)

    def __init__(self, seconds=0.0):
        self.scales, self.batches, self._seconds = [], [], seconds

    async def set_optimizer(self, config):
        raise AssertionError("whoever starts the loop has set it")

    async def sft_step(self, minibatch, lr_scale):
        await asyncio.sleep(self._seconds)
        self.scales.append(lr_scale)
        self.batches.append([mb.input_ids.tolist() for turns in minibatch.ranks for mb in turns])
        return {"loss": 1.0 / len(self.scales), "grad_norm": 0.5}


class RecordingCheck:
    def __init__(self, engine, accuracies, seconds=0.0):
        self.engine, self._accuracies, self._seconds = engine, iter(accuracies), seconds
        self.published_at, self.answered_at, self.numbers = [], [], []

    async def publish(self):
        self.published_at.append(len(self.engine.scales))

    async def accuracy(self, number):
        self.numbers.append(number)
        await asyncio.sleep(self._seconds)
        self.answered_at.append(len(self.engine.scales))
        return next(self._accuracies)


def run(config, tokenizer, engine, state=None, **kwargs):
    rows = []
    sft = SupervisedRun(config.warmup, engine, load_demonstrations(config, tokenizer), 256, report=rows.append, **kwargs)
    if state is not None:
        sft.load_state_dict(state)
    return asyncio.run(asyncio.wait_for(sft.run(), 30)), rows


def test_without_a_target_all_steps_are_run(tokenizer):
    engine = RecordingEngine()
    result, rows = run(arithmetic_config(total_steps=20, batch_size=4), tokenizer, engine)
    assert result.steps == len(engine.scales) == len(rows) == 20 and not result.reached and result.accuracy is None
    assert engine.scales[0] == 1.0
    assert rows[-1]["tokens"] == result.tokens > 0 and rows[-1]["loss"] == result.loss == 0.05
    assert "accuracy" not in rows[-1]


def test_stops_a_cool_down_after_the_target(tokenizer):
    engine = RecordingEngine()
    check = RecordingCheck(engine, [0.2, 0.6, 0.9])
    config = arithmetic_config(total_steps=100, batch_size=2, eval_every=10, stop_at_accuracy=0.85, cooldown_steps=15)
    result, rows = run(config, tokenizer, engine, check=check, overlap=False)
    assert check.published_at == check.answered_at == [10, 20, 30]
    assert (result.steps, result.reached, result.accuracy) == (45, True, 0.9)
    assert [row["accuracy"] for row in rows if "accuracy" in row] == [0.2, 0.6, 0.9]
    assert rows[29]["phase"] == "cool-down" and rows[28]["phase"] == "training"
    assert all(a > b for a, b in zip(engine.scales, engine.scales[1:], strict=False))


@pytest.mark.parametrize("cut", [7, 30, 36, 45])
def test_a_run_goes_on_from_any_step(tokenizer, cut):
    """Before a check, after the one that reached the target, in the cool-down, at the end: the same batches, rates and checks."""
    config = arithmetic_config(total_steps=100, batch_size=2, eval_every=10, stop_at_accuracy=0.85, cooldown_steps=15)
    answers, states = [0.2, 0.6, 0.9], {}

    async def keep(sft):
        states[sft.result.steps] = json.dumps(sft.state_dict())

    calm = RecordingEngine()
    calm_check = RecordingCheck(calm, answers)
    whole, rows = run(config, tokenizer, calm, check=calm_check, overlap=False, after_step=keep)

    state, engine = json.loads(states[cut]), RecordingEngine()
    n_checked = min(3, cut // 10)
    check = RecordingCheck(engine, answers[n_checked:])
    rest, later = run(config, tokenizer, engine, state=state, check=check, overlap=False)
    assert engine.scales == calm.scales[cut:] and engine.batches == calm.batches[cut:]
    assert check.numbers == calm_check.numbers[n_checked:]
    assert (rest.steps, rest.tokens, rest.reached, rest.accuracy) == (whole.steps, whole.tokens, True, 0.9) == (45, whole.tokens, True, 0.9)
    assert [row["phase"] for row in later] == [row["phase"] for row in rows[cut:]] and rest.seconds >= state["result"]["seconds"] > 0


def test_a_check_that_was_cut_off_is_begun_anew(tokenizer):
    config = arithmetic_config(total_steps=9, batch_size=1, eval_every=5, stop_at_accuracy=0.85)
    states = {}

    async def keep(sft):
        states[sft.result.steps] = sft.state_dict()

    engine = RecordingEngine()
    run(config, tokenizer, engine, check=RecordingCheck(engine, [0.1], seconds=60), after_step=keep)
    assert [states[step]["progress"]["checking"] for step in (4, 5, 6)] == [False, True, True]
    for cut, number in ((4, 1), (6, 2)):  # due at step 5 as ever; and at once, after step 7
        engine = RecordingEngine()
        check = RecordingCheck(engine, [0.1], seconds=0.0)
        run(config, tokenizer, engine, state=states[cut], check=check, overlap=False)
        assert check.published_at == [1] and check.numbers == [number]


def test_checks_run_beside_training_one_at_a_time(tokenizer):
    engine = RecordingEngine(seconds=0.002)
    check = RecordingCheck(engine, [0.1] * 100, seconds=0.05)
    config = arithmetic_config(total_steps=60, batch_size=1, eval_every=5, stop_at_accuracy=0.85)
    result, _ = run(config, tokenizer, engine, check=check)
    assert result.steps == 60 and not result.reached
    assert len(check.published_at) < 12
    assert all(answered > published for published, answered in zip(check.published_at, check.answered_at, strict=False))


def test_a_target_without_rollout_servers_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="stop_at_accuracy"):
        run(arithmetic_config(stop_at_accuracy=0.5), tokenizer, RecordingEngine())


def test_an_error_of_the_engine_comes_through(tokenizer):
    class DeadEngine(RecordingEngine):
        async def sft_step(self, minibatch, lr_scale):
            raise ConnectionError("trainer 0 died")

    with pytest.raises(ConnectionError, match="trainer 0 died"):
        run(arithmetic_config(batch_size=2), tokenizer, DeadEngine())


def test_check_prompts_end_with_the_forced_prefix(tokenizer):
    config = arithmetic_config(eval_samples=7)
    train = load_dataset(config.train_dataset)
    rows = check_rows(config, train, tokenizer)
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    assert [text[:-1] for text in texts] == [row["prompt"] for row in train.first(7)]
    assert all(text.endswith("=a") for text in texts) and all("prompt" not in row and "answer" in row for row in rows)
    assert np.all([isinstance(token, int) for row in rows for token in row["input_ids"]])


def real_config(tmp_path, **warmup):
    """A small instance of the demo, with real processes."""
    path = Path(__file__).parents[1] / "examples" / "arithmetic.yaml"
    config, _ = load_expr_config([str(path), f"stats_logger.fileroot={tmp_path}", "stats_logger.tensorboard=false"])
    return config.new(warmup=config.warmup.new(**warmup))


def test_sft_trainer_learns_and_leaves_a_hugging_face_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = real_config(tmp_path, total_steps=30, stop_at_accuracy=None)
    with SFTTrainer(config) as trainer:
        result = trainer.train()
    rows = [json.loads(line) for line in (trainer.run_folder / "warmup.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert len(losses) == result.steps == 30
    assert losses[0] == pytest.approx(np.log(44), abs=0.3)  # every token as likely as any other
    assert np.mean(losses[-5:]) < 0.5 * losses[0]

    final = trainer.run_folder / "checkpoints" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    sample = load_demonstrations(config, tokenizer).next()
    ids = torch.from_numpy(sample.input_ids)
    labels = torch.where(torch.from_numpy(sample.loss_mask), ids, -100)
    with torch.no_grad():
        loss = float(model(input_ids=ids[None], labels=labels[None]).loss)
    assert loss < 0.6 * losses[0]


def test_accuracy_is_checked_on_a_real_rollout_server(tmp_path):
    config = real_config(tmp_path, total_steps=8, eval_every=3, eval_samples=16, stop_at_accuracy=0.99)
    with SFTTrainer(config) as trainer:
        result = trainer.train()
    assert result.steps == 8 and not result.reached
    assert result.accuracy is not None and result.accuracy < 0.99


def test_the_command(tmp_path):
    """`areal sft` on JSONL rows, and its mistakes."""
    from tests.rollout_servers import make_model

    make_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"q": "a1b+1=", "a": "#2"}\n{"q": "a1b+2="}\n')
    keys = {"actor.init_from_scratch": "null", "actor.path": tmp_path / "model", "stats_logger.fileroot": tmp_path, "warmup.total_steps": 3}
    rows = {"type": "jsonl", "path": tmp_path / "rows.jsonl", "prompt_key": "q", "answer_key": "a"}
    words = [f"{k}={v}" for k, v in keys.items()] + [f"train_dataset.{k}={v}" for k, v in rows.items()]
    command = [sys.executable, "-m", "areal", "sft", str(EXAMPLES / "sft.yaml"), *words]
    done = subprocess.run([*command, "saver.every_steps=2"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path(done.stdout.strip()).read_text())
    assert summary["steps"] == 3 and summary["dropped"]["malformed_row"] >= 95
    assert {f.name for f in (Path(done.stdout.strip()).parent / "checkpoints").iterdir()} == {"step_000002", "final"}
    wrong = subprocess.run([*command, "warmup=null"], capture_output=True, text=True, timeout=100)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: supervised training needs its recipe under the key 'warmup'")
