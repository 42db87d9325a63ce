"""The estimate of the trainer's memory: against what processes really take, and what it says."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer_setup import MODEL, make_config, save_small_model

from areal.cli import main
from areal.config import ConfigError
from areal.inference import placement
from areal.inference.sglang import taken_of_trainer_gpu
from areal.models.loading import create_model
from areal.tasks.arithmetic import build_tokenizer
from areal.trainer import memory
from areal.trainer.activations import saved_bytes_per_token
from areal.trainer.memory import advice, check_memory, estimate_memory, explain_out_of_memory, memory_available

pytestmark = pytest.mark.timeout(240)
MANY_TOKENS = {"hidden_size": 64, "num_hidden_layers": 8, "intermediate_size": 192, "vocab_size": 4000}
MANY_PARAMETERS = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 80000, "tie_word_embeddings": False}
HUGE = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 29568,
    "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip

MEASURE = """
import json, sys
import numpy as np, torch
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from areal.packer import pack
from areal.trainer.engine import RankMinibatch, TrainEngine
from areal.trainer.memory import estimate_memory
from areal.types import Trajectory
from trainer_setup import make_config
torch.set_num_threads(1)
folder, tokens, actor = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
config = make_config(folder, folder, n_samples=2, groups=tokens // 128, mb_spec={"max_tokens_per_mb": tokens}, **actor)
update = {"gconfig": {"max_new_tokens": 48}, "train_dataset": {"max_prompt_len": 16}}
config = config.model_copy(update={key: getattr(config, key).model_copy(update=value) for key, value in update.items()})
if actor.get("dtype") == "bfloat16":
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store{actor}", rank=0, world_size=1)
engine, mask = TrainEngine(folder, config.actor), np.arange(64) >= 16
rng, per_token = np.random.default_rng(0), np.full(64, -8.0, np.float32)
samples = [Trajectory(rng.integers(2, 4000, 64), mask, per_token, np.where(mask, 0, -1).astype(np.int32), 1.0) for _ in range(tokens // 64)]
step = [RankMinibatch([pack(samples, [per_token] * len(samples))], 48.0 * len(samples))]
peaks = [engine.train_step(step)["meters"]["peak_mb"].values() for _ in range(2)]
print(json.dumps([max(p or 0 for p in peaks[-1]), estimate_memory(config, folder, "cpu").total / 2**20]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, changes in {"many_tokens": MANY_TOKENS, "many_parameters": MANY_PARAMETERS}.items():
        create_model({**MODEL, **changes}, seed=0).save_pretrained(root / name)
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_estimate_is_near_the_measured_peak(folders):
    cases = [("many_tokens", 4096, {}), ("many_parameters", 128, {})]
    argv = [[sys.executable, "-c", MEASURE, str(folders / n), str(t), json.dumps(a), str(Path(__file__).parent)] for n, t, a in cases]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for words in argv]
    for case, process in zip(cases, running, strict=True):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err[-2000:]
        measured, estimated = json.loads(out)
        if not measured:
            pytest.skip("no /proc/self/clear_refs here")
        assert estimated > 700, "libraries alone must not make it right"
        assert measured / estimated == pytest.approx(1.0, abs=memory.ERROR), case


def test_saved_bytes_are_those_of_a_real_forward_pass():
    from areal.models.attention import PackedContext
    from areal.models.loading import forward_hidden, model_from_config

    model = create_model(MODEL, seed=0)
    n, storages = 64, {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t
        return t

    owned = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward_hidden(model, torch.arange(n) % 40, torch.arange(n), PackedContext([n]))
    real = sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in owned)
    with torch.device("meta"):
        template = model_from_config(model.config, dtype=torch.float32)
    assert saved_bytes_per_token(template, score_width=n) * n == pytest.approx(real, rel=0.2)


def sized(tmp_path, changes=None, **actor):
    """A configuration with the config.json of a model that need not be there."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MODEL, **(changes or {}), "architectures": ["Qwen2ForCausalLM"]}))
    return make_config(folder, tmp_path, **actor), folder


def test_parts_are_what_they_are_made_of(tmp_path):
    config, folder = sized(tmp_path)
    one = estimate_memory(config, folder, "cpu")
    n = sum(p.numel() for p in create_model(MODEL, seed=0).parameters())
    assert (one.parameters, one.gradients, one.optimizer) == (4 * n, 4 * n, 8 * n)
    assert one.gathered == 0
    four = estimate_memory(sized(tmp_path, backend="fsdp:d4")[0], folder, "cpu")
    assert four.fixed == one.fixed / 4
    assert four.gathered > 0
    replicas = estimate_memory(sized(tmp_path, backend="fsdp:d4r2")[0], folder, "cpu")
    assert replicas.fixed == one.fixed / 2
    checkpointing = estimate_memory(sized(tmp_path, {"num_hidden_layers": 12}, gradient_checkpointing=True)[0], folder, "cpu")
    whole = estimate_memory(sized(tmp_path, {"num_hidden_layers": 12})[0], folder, "cpu")
    assert checkpointing.activations < 0.25 * whole.activations
    offloaded = estimate_memory(sized(tmp_path, offload=True)[0], folder, "cuda")
    assert offloaded.fixed == 0
    shorter = estimate_memory(sized(tmp_path, mb_spec={"max_tokens_per_mb": 256})[0], folder, "cpu")
    longer = estimate_memory(sized(tmp_path, mb_spec={"max_tokens_per_mb": 512})[0], folder, "cpu")
    assert longer.activations == 2 * shorter.activations
    assert "activations" in longer.describe() or "base" in longer.describe()


def test_other_models_are_counted_as_they_are(tmp_path):
    """Critic and reference have sizes, adapters (none), micro-batches and places of their own."""
    config, folder = sized(tmp_path)
    n = sum(p.numel() for p in create_model(MODEL, seed=0).parameters())
    alone = estimate_memory(config, folder, "cuda")

    def others(**sections):
        return estimate_memory(config.new(**sections), folder, "cuda").other_models

    adapters = config.actor.new(lora={"rank": 2}, kl_ctl=0.1)
    assert others(critic={}) == 16 * n == others(critic={}, actor=adapters)
    assert others(critic={"offload": True}) == 0 == others(critic={"shared": True})
    assert others(actor=config.actor.new(kl_ctl=0.1)) == 4 * n
    assert others(actor=config.actor.new(kl_ctl=0.1, offload=True)) == 4 * n, "ref.offload is another key"
    assert others(actor=config.actor.new(kl_ctl=0.1), ref={"offload": True}) == 0 == others(actor=adapters)
    larger = tmp_path / "larger"
    larger.mkdir()
    changes = {**MODEL, "hidden_size": 64, "tie_word_embeddings": False}
    (larger / "config.json").write_text(json.dumps({**changes, "architectures": ["Qwen2ForCausalLM"]}))
    n_larger = sum(p.numel() for p in create_model(changes, seed=0).parameters())
    assert others(actor=adapters, ref={"path": str(larger)}) == 4 * n_larger
    assert others(critic={"path": str(larger)}) == 16 * (n_larger - 64 * 40), "a critic has no logits"

    checkpointing = config.new(actor=config.actor.new(gradient_checkpointing=True), critic={})
    estimate = estimate_memory(checkpointing, folder, "cuda")
    assert (estimate.section, estimate.activations) == ("critic", alone.activations)
    assert "critic.gradient_checkpointing=true" in advice(checkpointing, replace(estimate, base=0.0), 1.05e8, "cuda")


def test_frozen_models_have_no_gradients_and_rows_of_any_length_may_fill_a_microbatch(tmp_path):
    config, folder = sized(tmp_path, {"vocab_size": 4000}, dtype="bfloat16")
    root, layer = 4000 * 32 + 32, create_model(MODEL, seed=0).model.layers[0]
    largest = sum(p.numel() for p in layer.parameters())
    adapters = estimate_memory(config.new(actor=config.actor.new(lora={"rank": 2})), folder, "cuda")
    whole = estimate_memory(config, folder, "cuda")
    assert adapters.gathered == 2 * (root + 2 * largest) == whole.gathered - 2 * (root + largest) - 4 * root
    assert whole.head - adapters.head >= 2 * 2 * 4000 * 32
    short = config.new(rollout={"consumer_batch_size": 1}, gconfig={"n_samples": 2, "max_new_tokens": 8})
    assert memory.tokens_per_microbatch(short) < 16384
    assert memory.tokens_per_microbatch(short.new(dpo={})) == memory.tokens_per_microbatch(short.new(warmup={})) == 16384


def test_model_that_cannot_fit_is_refused_with_the_key_to_turn(tmp_path):
    config, folder = sized(tmp_path, HUGE)
    with pytest.raises(ConfigError, match=r"the trainer does not fit: a rank needs at least 1,?\d{3}\.\d GiB") as caught:
        check_memory(config, folder, "cpu")
    assert "actor.backend=fsdp:d" in caught.value.hint
    small, folder = sized(tmp_path)
    line, is_close = check_memory(small, folder, "cpu")
    assert line.startswith("trainer memory: about ") and "free here" in line
    assert not is_close


def test_what_sglang_takes_of_a_shared_gpu_is_not_there_for_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "count_gpus", lambda: 1)
    monkeypatch.setattr(memory, "gpu_memory", lambda: 10 * 2**30)
    config, folder = sized(tmp_path, device="cuda")
    shared = config.new(rollout={"backend": "sglang:d1", "colocate": True})
    assert (taken_of_trainer_gpu(config), taken_of_trainer_gpu(shared)) == (0.0, 0.4)
    assert taken_of_trainer_gpu(shared.new(sglang={"options": {"mem-fraction-static": 0.7}})) == 0.7
    line, _ = check_memory(shared, folder, "cuda", taken_of_trainer_gpu(shared))
    assert "; 6.0 GiB of its GPU beside SGLang, which takes 40% (sglang.options.mem_fraction_static)" in line
    with pytest.raises(ConfigError, match=r"it has 0\.1 GiB of its GPU beside SGLang"):
        check_memory(shared, folder, "cuda", 0.99)
    assert check_memory(config, folder, "cuda")[0].endswith("; 10.0 GiB of its GPU")


def test_run_that_cannot_fit_starts_nothing(tmp_path, capsys):
    _config, folder = sized(tmp_path, HUGE)
    build_tokenizer(8).save_pretrained(folder)
    words = ["train", "examples/arithmetic.yaml", f"actor.path={folder}", "actor.init_from_scratch=null", "warmup=null"]
    root = Path(__file__).parents[1]
    assert main([words[0], str(root / words[1]), *words[2:], f"stats_logger.fileroot={tmp_path}"]) == 2
    assert "the trainer does not fit" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*/logs/trainer*"))


def changed(config, **sections):
    return config.model_copy(update={name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()})


def test_key_to_turn_is_that_of_the_largest_part(tmp_path):
    config, folder = sized(tmp_path, MANY_TOKENS, mb_spec={"max_tokens_per_mb": 32768})
    config = changed(config, rollout={"consumer_batch_size": 1000})
    estimate = estimate_memory(config, folder, "cpu")
    room = estimate.total - estimate.activations / 2
    said = advice(config, estimate, room, "cpu")
    tokens = int(said.split("max_tokens_per_mb=")[1].split(",")[0])
    assert 256 <= tokens < 32768 and "gradient_checkpointing=true" in said
    fitting = sized(tmp_path, MANY_TOKENS, mb_spec={"max_tokens_per_mb": tokens})[0]
    assert estimate_memory(changed(fitting, rollout={"consumer_batch_size": 1000}), folder, "cpu").total <= room

    # Not even the longest sequence fits: less of each token must be kept, then less of a sequence.
    config = changed(config, gconfig={"max_new_tokens": 30000})
    estimate = estimate_memory(config, folder, "cpu")
    room = (estimate.total - 0.9 * estimate.activations) / 0.85
    assert advice(config, estimate, room, "cpu") == "set actor.gradient_checkpointing=true"
    checkpointing = changed(config, actor={"gradient_checkpointing": True})
    assert "actor.backend=fsdp:d1c2" in advice(checkpointing, estimate, room, "cpu")
    assert advice(checkpointing, estimate, room, "cuda") == "set actor.dtype=bfloat16"
    assert advice(config, estimate, estimate.fixed, "cuda").startswith("set actor.offload=true")


def test_allocation_that_fails_says_which_key_to_turn(tmp_path):
    config, folder = sized(tmp_path)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    said = explain_out_of_memory(caught.value, config, folder)
    assert said is not None and said.startswith("no memory is left on the trainer's machine for micro-batches of up to ")
    assert "actor." in said
    assert "trainer's GPU" in explain_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), config, folder)
    assert explain_out_of_memory(RuntimeError("shapes do not match"), config, folder) is None


def test_memory_that_is_free_here():
    assert 0 < memory_available("cpu") < 1 << 50
    assert memory_available("cuda") == 0 or torch.cuda.is_available()


def test_files_that_the_system_keeps_in_memory_are_free(tmp_path):
    assert memory._free_in_container(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 400\nactive_file 150\n")
    assert memory._free_in_container(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._free_in_container(tmp_path) == 650


def test_small_model_of_the_demo_takes_no_time(tmp_path):
    save_small_model(tmp_path)
    config = make_config(tmp_path, tmp_path)
    assert estimate_memory(config, tmp_path, "cpu").total < 1 << 30
