"""What the small examples share: a model of 226k parameters that reads and writes single characters, made from random weights."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from areal import GRPOConfig, load_expr_config
from areal.models.loading import create_model
from areal.tasks.characters import PLAIN_CHAT, byte_tokenizer

HERE = Path(__file__).parent
SIZES = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
}


def load_config(name: str, characters: str) -> GRPOConfig:
    """``examples/NAME.yaml``, changed by the ``key=value`` words of the command line; without an actor.path of its own it gets a new model."""
    words = sys.argv[1:]
    if not any(word.startswith("actor.path=") for word in words):
        words.append(f"actor.path={_make_model(Path('runs') / name / 'start', characters)}")
    config, _ = load_expr_config(["--config", str(HERE / f"{name}.yaml"), *words], GRPOConfig)
    return config


def _make_model(folder: Path, characters: str) -> Path:
    tokenizer = byte_tokenizer(characters, PLAIN_CHAT)
    special = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    create_model({**special, **SIZES}, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(n_train: int, n_held_out: int, draw: Callable[[random.Random, int], dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Rows of prompts that all differ: ``draw(random, index)`` makes one. No held-out prompt is among those for training."""
    rows: dict[str, dict[str, Any]] = {}
    numbers = random.Random(0)
    while len(rows) < n_train + n_held_out:
        row = draw(numbers, len(rows))
        rows.setdefault(row["prompt"], row)
    held_out, train = _split(rows.values(), n_held_out)
    return train, held_out


def _split(rows: Iterable[dict[str, Any]], n: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    everything = list(rows)
    return everything[:n], everything[n:]
