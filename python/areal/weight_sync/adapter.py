"""Adapters alone on their way to servers that hold the base weights: what goes with their factors, and the files of a version.

The transports shm and disk can carry them. Besides the factors (peft's names, float32) a server gets the scale of the product and the hash of
the weights that it is to be added to, so that an adapter never lands on another model. The hash of an update is that of the factors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""peft's names."""
INFO = "areal_adapter.json"
"""Written last: version, hash and ``AdapterInfo``."""
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}
"""What an adapter_config.json may say for the product to be alpha / r times B A, and all that there is."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What factors are."""

    config: Mapping[str, Any]
    """What peft's adapter_config.json says."""
    base: str
    """Hash of the weights that they belong to, 16 hex digits; "" = not known."""

    @property
    def scale(self) -> float:
        return float(self.config["lora_alpha"]) / int(self.config["r"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write_config(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(dict(self.config), indent=2))


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], AdapterInfo]:
    """The factors and their description of a folder that the trainer or peft wrote. ``ValueError`` or ``OSError`` if it is no plain LoRA."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        known = json.loads((folder / INFO).read_bytes()) if (folder / INFO).is_file() else {}
        for key, allowed in _PLAIN.items():
            if config.get(key) not in allowed:
                raise ValueError(f"{CONFIG} says {key}={config.get(key)!r}; only plain LoRA adapters are added to weights")
        info = AdapterInfo(config, known.get("base", ""))
        if not info.scale:
            raise ValueError(f"{CONFIG} says lora_alpha=0")
        return load_file(folder / WEIGHTS), info
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, SafetensorError) as error:
        raise ValueError(f"{folder} is no adapter of peft: {error!r}") from error
