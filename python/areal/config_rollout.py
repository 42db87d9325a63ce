"""The sections of the configuration about rollout servers and the weights that they get, and what every section is made of.

They are imported from ``areal.config``, as all others. Importing this module does not import torch.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field


class ConfigError(ValueError):
    """A mistake in a configuration: one sentence that names the key, and a hint that says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint


class RolloutLayout(NamedTuple):
    """``sglang:d4t2``: 4 servers of 2 ranks each."""

    engine: Literal["embedded", "sglang"]
    n_servers: int
    n_ranks: int
    """Tensor-parallel ranks of one server."""


def parse_rollout_backend(backend: str) -> RolloutLayout:
    """``ConfigError`` for anything but embedded:dN, sglang:dN and sglang:dNtM."""
    match = re.fullmatch(r"(\w*)(?::(.*))?", backend)
    engine, layout = (match.group(1), match.group(2) or "") if match else (backend, "")
    if engine not in ("embedded", "sglang"):
        raise ConfigError(f"rollout.backend='{backend}': the backend '{engine}' is not known here", "use embedded:dN or sglang:dN")
    sizes = re.fullmatch(r"d([1-9]\d*)(?:t([1-9]\d*))?", layout)
    if sizes is None or (engine == "embedded" and sizes.group(2)):
        way_out = "sglang:dN or sglang:dNtM, N servers of M GPUs each" if engine == "sglang" else "embedded:dN with N of 1 or more"
        raise ConfigError(f"rollout.backend='{backend}': '{layout}' is not a layout of {engine}", f"use {way_out}")
    return RolloutLayout(engine, int(sizes.group(1)), int(sizes.group(2) or 1))  # type: ignore[arg-type]


class Section(BaseModel):
    """A part of the tree: immutable, without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    def new(self, **changes: Any) -> Self:
        """A validated copy with some keys changed."""
        unknown = sorted(set(changes) - set(type(self).model_fields))
        if unknown:
            raise ConfigError(f"{type(self).__name__} has no key '{unknown[0]}'; it has {', '.join(type(self).model_fields)}")
        return type(self).model_validate({**self.model_dump(exclude_unset=True), **changes})


class RolloutConfig(Section):
    """The side that generates."""

    backend: str = "embedded:d1"
    """embedded:dN = N of areal's own engines, one process each; sglang:dN or sglang:dNtM = N SGLang servers, each over M GPUs."""
    urls: list[str] = Field(default_factory=list)
    """Addresses (http://host:port) of the servers of backend where they run already, N of them; empty = they are started here."""
    max_concurrent_rollouts: int = Field(64, ge=1)
    """Groups that generate at once. Those that only wait for their scores come on top, as max_head_offpolicyness allows; not with a
    workflow that generates again after a score."""
    max_head_offpolicyness: int = Field(2, ge=0)
    """eta: a token may be trained on at most this many versions after it was sampled; 0 is synchronous."""
    over_age_tokens: Literal["wait", "mask"] = "wait"
    """What keeps the bound when old groups are slow: the batch waits for them, or their over-age tokens are masked and counted."""
    batch_timeout: float = Field(900.0, gt=0)
    """Seconds without any finished group after which the trainer gives up waiting for a batch."""
    consumer_batch_size: int = Field(32, ge=1)
    """Groups per train step."""
    dynamic_filter: str = ""
    """Which finished groups are trained on: empty = all, mixed = those whose episodes differ in reward (DAPO), or the import path
    package.module:name of fn(group) -> bool, true for a group to keep."""
    dynamic_filter_max_waste: float = Field(4.0, gt=0)
    """Groups that the filter may leave out for each one trained on, over about a batch; beyond that groups pass, counted."""
    max_running_requests: int = Field(64, ge=1)
    """Sequences one server decodes at once."""
    max_context: int = Field(0, ge=0)
    """Longest prompt + answer in tokens; 0 = the model's own limit."""
    update_mode: Literal["auto", "abort", "retract", "in_place"] = "auto"
    """What running sequences do at a weight update: abort = they end, and are sent again with the tokens they have; retract = they stay
    in the server and recompute their KV; in_place = they keep it (embedded only). auto = abort with sglang, retract with embedded."""
    colocate: bool = False
    """Servers run on the GPUs of the trainer and get its weights there (weight_sync.transport tensor)."""
    episode_timeout: float = Field(600.0, gt=0)
    """Seconds an episode may take before its group is dropped and counted."""
    request_timeout: float = Field(300.0, gt=0)
    """Seconds one generation request may take."""
    startup_timeout: float = Field(120.0, gt=0)
    """Seconds a rollout server may take to be ready."""
    max_restarts: int = Field(2, ge=0)
    """How often a dead rollout server is replaced before the run ends."""
    threads: int = Field(1, ge=1)
    """CPU threads of one server."""
    device: str = "auto"
    """auto, cpu, or cuda:N for the first server (the next ones count up)."""


class SGLangConfig(Section):
    """SGLang servers that are started here (rollout.backend: sglang:dN)."""

    python: str = ""
    """Interpreter of the environment that SGLang is installed in; empty = that of AREAL_SGLANG_PYTHON, else the one that runs areal if
    SGLang is there, else .venv-sglang/bin/python (`make sglang-env`)."""
    options: dict[str, bool | int | float | str | list[int | float | str]] = Field(default_factory=dict)
    """Options of sglang.launch_server by their names, e.g. mem_fraction_static: 0.7; they win over those of areal. true gives a flag, false
    leaves out one that areal gives."""


class WeightSyncConfig(Section):
    """How new weights reach the rollout servers."""

    transport: Literal["auto", "shm", "broadcast", "disk", "tensor"] = "auto"
    """shm (embedded servers on this machine), broadcast (NCCL or gloo), disk (also a shared file system), tensor (same GPU or machine);
    auto = shm for embedded servers, tensor with rollout.colocate, else broadcast."""
    bucket_mb: int = Field(64, ge=1)
    """MiB of weights that are gathered and sent at a time."""
    verify: Literal["always", "first", "never"] = "always"
    """After which updates what a server holds is compared with what the trainer sent; first = after the first one of every server."""
    timeout: float = Field(120.0, gt=0)
    """Seconds a server may take to stop generating, and again to take one update; after that it is replaced."""
    folder: str = ""
    """disk: where the weights are written; every server must see it under the same path. Empty = the run's folder."""
