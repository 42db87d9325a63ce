"""``areal sft`` and ``areal dpo``: training without rollouts. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from areal.config import GRPOConfig

_HELP = {
    "sft": (
        "train a model on demonstrations",
        "rows with a prompt and an answer, or whole conversations; the recipe is the section 'warmup'",
    ),
    "dpo": ("train a model on preferences", "rows with a prompt, a chosen and a rejected answer; the recipe is the section 'dpo'"),
}


def add_supervised(commands: Any) -> None:
    """The two commands for the parser of ``cli``."""
    for name, (purpose, rows) in _HELP.items():
        parser = commands.add_parser(
            name,
            usage=f"areal {name} CONFIG [key=value ...]",
            help=purpose,
            description=f"{purpose.capitalize()}: {rows}. The run's folder gets metrics, checkpoints and summary.json, whose path is printed.",
        )
        parser.add_argument(
            "words", metavar="CONFIG [key=value ...]", nargs="+", help=f"a YAML file, e.g. examples/{name}.yaml, and changes to its keys"
        )
        parser.add_argument("--check", action="store_true", help="check the configuration, print it in full and stop")


def run_supervised(args: argparse.Namespace, prepare: Callable[[], None]) -> int:
    """The command of ``args``, start to end; ``prepare`` makes the process ready once its configuration is known to be right."""
    from areal.config import GRPOConfig
    from areal.config_check_supervised import check_dpo_config, check_sft_config
    from areal.config_load import dump_yaml, load_expr_config

    config, _ = load_expr_config(args.words, GRPOConfig, check=check_sft_config if args.command == "sft" else check_dpo_config)
    if args.check:
        print(dump_yaml(config), end="")
        return 0
    prepare()
    print(_train(args.command, config) / "summary.json")
    return 0


def _train(command: str, config: GRPOConfig) -> Path:
    """Returns the run's folder."""
    if command == "sft":
        from areal.sft import SFTTrainer

        with SFTTrainer(config) as sft:
            sft.train()
        return sft.run_folder
    from areal.dpo import DPOTrainer

    with DPOTrainer(config) as dpo:
        dpo.train()
    return dpo.run_folder
