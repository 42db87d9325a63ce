"""Layouts of the trainer's ranks that cannot work are refused with a sentence before anything starts."""

from pathlib import Path

import pytest
from test_config import GOOD, refusal
from trainer_setup import save_small_model

from areal.config import GRPOConfig
from areal.config_check import check_machine
from areal.config_load import load_expr_config
from areal.config_trainer import TrainerLayout, parse_trainer_backend


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    ("backend", "layout", "world_size"),
    [("fsdp:d4", (4, 1, 1), 4), ("fsdp:d4r2", (4, 2, 1), 4), ("fsdp:d2c2", (2, 1, 2), 4), ("fsdp:d4r2c2", (4, 2, 2), 8)],
)
def test_layouts(backend: str, layout: tuple[int, int, int], world_size: int) -> None:
    assert parse_trainer_backend(backend) == TrainerLayout(*layout)
    assert TrainerLayout(*layout).world_size == world_size


@pytest.mark.parametrize(
    ("backend", "says", "way_out"),
    [
        ("fsdp:d2c3", "has 4 attention heads, which 3 context ranks cannot share equally", "fsdp:d2c2"),
        ("fsdp:d4r2c8", "has 4 attention heads, which 8 context ranks", "fsdp:d4r2c4"),
        ("fsdp:d4r3", "4 data-parallel ranks cannot be 3 replicas of equal size", "fsdp:d3r3"),
        ("fsdp:d2c2r2", "'d2c2r2' is not a layout of fsdp", "dNrR"),
    ],
)
def test_layouts_that_cannot_work(good: Path, backend: str, says: str, way_out: str) -> None:
    error = refusal([good, f"actor.backend={backend}", "actor.init_from_scratch.num_attention_heads=4"])
    assert says in str(error)
    assert way_out in str(error.hint)


def test_heads_of_a_folder(good: Path, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    config, _ = load_expr_config(
        [str(good), "actor.init_from_scratch=null", f"actor.path={model}", "actor.backend=fsdp:d1c3", "rollout.consumer_batch_size=32"],
        GRPOConfig,
    )
    with pytest.raises(ValueError, match="actor.path has 4 attention heads, which 3 context ranks"):
        check_machine(config)


def test_nothing_to_offload_from(good: Path) -> None:
    config, _ = load_expr_config([str(good), "actor.offload=true"], GRPOConfig)
    with pytest.raises(ValueError, match="actor.offload=true moves parameters out of a GPU's memory, but the trainer is on the CPU"):
        check_machine(config)
