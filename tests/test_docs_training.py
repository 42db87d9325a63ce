"""docs/training.md: its configuration passes the checks, and its keys, columns, commands and the estimate are what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from areal import cli
from areal.config import GRPOConfig
from areal.config_check import check_config
from areal.config_load import all_keys
from areal.metrics import RunTotals, StepClock, meter_row, train_row
from areal.trainer.memory import MemoryEstimate, estimate_memory, size_text

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()
WHOLE, RECOVER = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
QWEN2_5 = {
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064},
    "32B": {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648, "vocab_size": 152064},
}  # fmt: skip


def test_configuration_passes_the_checks() -> None:
    check_config(GRPOConfig.model_validate(WHOLE))
    check_config(GRPOConfig.model_validate({**WHOLE, **RECOVER}))


def test_layouts_fill_eight_gpus() -> None:
    rows = re.findall(r"^\| [^|]+ \| `(fsdp:\w+)` \| `(sglang:\w+)` \|", PAGE, re.M)
    assert len(rows) == 6
    for trainer, servers in rows:
        config = GRPOConfig.model_validate(
            {**WHOLE, "actor": {**WHOLE["actor"], "backend": trainer}, "rollout": {**WHOLE["rollout"], "backend": servers}}
        )
        check_config(config)
        n_gpus = config.trainer_layout.world_size + config.layout.n_servers * config.layout.n_ranks
        assert n_gpus == 8 or (trainer, servers) == ("fsdp:d1", "sglang:d1")


def estimate(folder: Path, size: str, backend: str, **actor: Any) -> MemoryEstimate:
    model = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": size == "1.5B", **QWEN2_5[size]}
    (folder / "config.json").write_text(json.dumps({**model, "max_position_embeddings": 32768}))
    longest = actor.get("mb_spec", {}).get("max_tokens_per_mb", 0)
    config = GRPOConfig.model_validate(
        {
            **WHOLE,
            "actor": {**WHOLE["actor"], "backend": backend, **actor},
            "gconfig": {**WHOLE["gconfig"], **({"max_new_tokens": longest - 1024} if longest else {})},
        }
    )
    return estimate_memory(config, folder, "cuda")


def test_estimates_are_those_of_a_run(tmp_path: Path) -> None:
    first = estimate(tmp_path, "1.5B", "fsdp:d2")
    assert f"trainer memory: about {size_text(first.total)} a rank ({first.describe()})" in PAGE
    of = {
        "1.5B | `fsdp:d2`": first,
        "32768`) | `fsdp:d2c2`": estimate(tmp_path, "1.5B", "fsdp:d2c2", mb_spec={"max_tokens_per_mb": 32768}),
        "7B | `fsdp:d4`": estimate(tmp_path, "7B", "fsdp:d4"),
        "7B, adapters (`actor.lora: {}`) | `fsdp:d1`": estimate(tmp_path, "7B", "fsdp:d1", lora={}),
        "32B, adapters | `fsdp:d4`": estimate(tmp_path, "32B", "fsdp:d4", lora={}),
        "40% of it) | `fsdp:d1`": estimate(tmp_path, "1.5B", "fsdp:d1"),
    }
    said = {row: int(PAGE.partition(row)[2].split(" GiB")[0].rpartition("| ")[2]) for row in of}
    assert said == {row: round(e.total / 2**30) for row, e in of.items()}


def test_keys_exist() -> None:
    known = {key for key, _ in all_keys()}
    sections = "actor|critic|ref|rollout|gconfig|train_dataset|valid_dataset|evaluator|saver|recover|stats_logger|warmup|sglang|weight_sync"
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)(?=[`:=])", PAGE))
    assert len(named) >= 20
    assert {key for key in named if not any(k == key or k.startswith(f"{key}.") for k in known)} == set()


def test_columns_are_those_of_a_row() -> None:
    meters = {phase: 0.0 for phase in ("recompute", "forward", "backward", "optimizer", "other")}
    cost = meter_row({"model_flops": 1.0, "peak_flops_per_s": 1.0, "seconds": meters, "peak_mb": meters}, 1.0)
    stats = dict.fromkeys(
        ("loss", "grad_norm", "clip_fraction", "entropy", "kl_behaviour", "importance_weight_mean", "skipped_nonfinite"), 0.0
    )
    trained = train_row({**stats, "logprob_drift": {"mean_abs": None, "max_abs": None, "n": 0}})
    clock = StepClock()
    clock.start_step()
    clock.got_batch()
    clock.trained()
    of_batch = {"reward", "accuracy", "length", "truncated", "staleness_max"}
    table = PAGE.partition("| look at | and |")[2].partition("\n\n")[0]
    columns = {c for line in table.splitlines() if line.startswith("| `") for c in re.findall(r"`(\w+)`", line.split("|")[1])}
    known = cost.keys() | trained.keys() | clock.row(0, 0, 0.0).keys() | of_batch
    assert len(columns) > 12 and columns - known == {"dropped"}
    assert hasattr(RunTotals(), "dropped")


@pytest.mark.parametrize("line", re.findall(r"^areal (.*?)(?: +#.*)?$", PAGE, re.M))
def test_commands_are_known(line: str) -> None:
    """As far as parsing goes: what they name need not be there."""
    arguments = cli._parser().parse_args(line.split())
    assert arguments.command in ("doctor", "train", "eval", "serve")


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([\w./-]+\.md)\)", PAGE)
    assert links and [link for link in links if not (ROOT / "docs" / link).is_file()] == []
