"""Combinations of keys that cannot work, found before anything is started.

``check_config`` looks at the configuration alone, ``check_machine`` at the files and GPUs that it needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from areal.config import ConfigError, DatasetConfig, GenerationConfig, GRPOConfig, SGLangConfig
from areal.config_check_trainer import (
    check_adapters,
    check_critic_and_reference,
    check_heads,
    check_objective,
    check_offload,
    check_overlong,
    check_peft,
    check_recipe,
    check_same_vocabulary,
)
from areal.inference.placement import rollout_device, shares_gpu, trainer_gpus
from areal.inference.sglang import sglang_python
from areal.launcher.gpus import count_gpus
from areal.reward.address import is_service, service_address, why_unreachable
from areal.weight_sync.addresses import is_here


def check_config(config: GRPOConfig) -> None:
    """Raises ``ConfigError`` for keys that do not fit together."""
    n_data_ranks = config.trainer_layout.data
    check_recipe(config)
    _check_rollout(config)
    _check_batch(config, n_data_ranks)
    _check_lengths(config)
    _check_sampling(config)
    check_objective(config)
    check_overlong(config)
    _check_times(config)
    check_adapters(config)
    check_critic_and_reference(config, longest_sequence(config.train_dataset, config.gconfig))
    if config.deterministic:
        _check_deterministic(config)
    _check_names(config)
    for key, device in _devices(config).items():
        check_device_name(key, device)


def _check_names(config: GRPOConfig) -> None:
    """Import paths are import paths; a reward function may be the address of a service, a filter the one that has a name."""
    chosen = config.rollout.dynamic_filter
    named = {"reward_fn": config.reward_fn, "workflow": config.workflow, "rollout.dynamic_filter": "" if chosen == "mixed" else chosen}
    if is_service(named["reward_fn"]):
        try:
            service_address(named.pop("reward_fn"))
        except ValueError as error:
            raise ConfigError(f"reward_fn={error}", "write http://host:port/score") from None
    for key, path in named.items():
        if path and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
            or_else = ", or http://host:port/score" if key == "reward_fn" else ""
            raise ConfigError(f"{key}='{path}' is not an import path", f"write package.module:name{or_else}")
    if config.gconfig.n_samples == 1 and chosen == "mixed":
        raise ConfigError(
            "rollout.dynamic_filter=mixed compares the samples of a group, and gconfig.n_samples=1", "set gconfig.n_samples=8"
        )


def _devices(config: GRPOConfig) -> dict[str, str]:
    return {"rollout.device": config.rollout.device, "actor.device": config.actor.device}


def _check_rollout(config: GRPOConfig) -> None:
    """Servers, how they are interrupted, and how weights reach them."""
    rollout, layout = config.rollout, config.layout
    if rollout.urls and len(rollout.urls) != layout.n_servers:
        raise ConfigError(
            f"rollout.urls has {len(rollout.urls)} addresses, but rollout.backend='{rollout.backend}' means {layout.n_servers} servers",
            f"set rollout.backend={layout.engine}:d{len(rollout.urls)}",
        )
    for url in rollout.urls:
        if not re.fullmatch(r"http://[^/\s:]+:\d+/?", url):
            raise ConfigError(f"rollout.urls: '{url}' is not an address", "write http://host:port")
    addresses = [url.rstrip("/") for url in rollout.urls]
    if twice := next((url for url in addresses if addresses.count(url) > 1), ""):
        raise ConfigError(f"rollout.urls names {twice} twice", "give each server once")
    if config.weight_sync.folder and config.transport != "disk":
        raise ConfigError(
            f"weight_sync.folder is set, but the transport is {config.transport}", "set weight_sync.transport=disk, or remove the folder"
        )
    if layout.engine == "embedded":
        if config.sglang != SGLangConfig():
            raise ConfigError(f"sglang.* is set, but rollout.backend='{rollout.backend}' starts no SGLang", "set rollout.backend=sglang:d1")
        return
    if rollout.urls and config.sglang != SGLangConfig():
        raise ConfigError(
            "sglang.* is set, but the servers of rollout.urls run already",
            "give these options where they are started, `areal serve MODEL --backend sglang -- OPTIONS`, and remove them here",
        )
    if config.transport == "shm":
        raise ConfigError(
            "weight_sync.transport=shm works with embedded servers only", "use broadcast, disk or tensor; auto takes one that fits"
        )
    if config.update_mode == "in_place":
        raise ConfigError(
            "rollout.update_mode=in_place works with embedded servers only: SGLang's log-probs of mixed KV could not be recomputed",
            "use abort or retract",
        )
    if config.update_mode == "retract" and config.gconfig.stop:
        raise ConfigError(
            "rollout.update_mode=retract with gconfig.stop would change what is sampled: SGLang holds back what may begin a stop string",
            "set rollout.update_mode=abort, or use gconfig.stop_token_ids",
        )
    if config.update_mode == "retract" and config.sglang.options.get("disable_radix_cache") is False:
        raise ConfigError(
            "rollout.update_mode=retract with a radix cache would serve KV of old weights", "remove sglang.options.disable_radix_cache"
        )
    if config.deterministic:
        raise ConfigError("deterministic=true needs the embedded engine", "set rollout.backend=embedded:d1, or deterministic=false")


def _check_batch(config: GRPOConfig, n_ranks: int) -> None:
    batch, n_minibatches = config.rollout.consumer_batch_size, config.actor.ppo_n_minibatches
    if batch % n_minibatches:
        near = [n for n in range(1, batch + 1) if batch % n == 0]
        best = min(near, key=lambda n: abs(n - n_minibatches))
        raise ConfigError(
            f"rollout.consumer_batch_size={batch} groups cannot be cut into actor.ppo_n_minibatches={n_minibatches} equal parts",
            f"set actor.ppo_n_minibatches={best}, or rollout.consumer_batch_size={max(1, round(batch / n_minibatches)) * n_minibatches}",
        )
    samples = batch // n_minibatches * config.gconfig.n_samples
    if samples < n_ranks:
        raise ConfigError(
            f"a PPO mini-batch has {samples} samples, fewer than the {n_ranks} ranks of actor.backend='{config.actor.backend}'",
            "raise rollout.consumer_batch_size or gconfig.n_samples, or lower actor.ppo_n_minibatches",
        )


def longest_sequence(dataset: DatasetConfig, gconfig: GenerationConfig) -> int:
    """Tokens of the longest prompt and the longest answer together."""
    return dataset.max_prompt_len + gconfig.max_new_tokens


def _check_lengths(config: GRPOConfig) -> None:
    longest = longest_sequence(config.train_dataset, config.gconfig)
    sum_text = (
        f"train_dataset.max_prompt_len={config.train_dataset.max_prompt_len} + gconfig.max_new_tokens={config.gconfig.max_new_tokens}"
    )
    capacity = config.actor.mb_spec.max_tokens_per_mb
    if longest > capacity:
        raise ConfigError(
            f"actor.mb_spec.max_tokens_per_mb={capacity} cannot hold the longest sequence of {longest} tokens ({sum_text})",
            f"set actor.mb_spec.max_tokens_per_mb={longest} or more, or shorten prompts or answers",
        )
    _check_context(config, longest, f"the longest sequence of {longest} tokens ({sum_text})")
    if config.evaluator.n_prompts:
        longest = longest_sequence(config.held_out, config.evaluator.gconfig or config.gconfig)
        _check_context(config, longest, f"the longest sequence of an evaluation, {longest} tokens")
    if config.actor.init_from_scratch is not None:
        _check_model_limit(config, config.actor.init_from_scratch, "actor.init_from_scratch")


def _check_context(config: GRPOConfig, longest: int, what: str) -> None:
    if 0 < config.rollout.max_context < longest:
        raise ConfigError(
            f"rollout.max_context={config.rollout.max_context} is shorter than {what}",
            f"set rollout.max_context={longest}, or 0 for the model's own limit",
        )


def _check_model_limit(config: GRPOConfig, model: Mapping[str, Any], where: str) -> None:
    if not isinstance(model.get("model_type"), str):
        raise ConfigError(f"{where} has no model_type", "name a Hugging Face architecture, e.g. model_type: qwen2")
    check_heads(config, model, where)
    limit = model.get("max_position_embeddings")
    needs = {"gconfig": longest_sequence(config.train_dataset, config.gconfig)}
    if config.evaluator.gconfig is not None:
        needs["evaluator.gconfig"] = longest_sequence(config.held_out, config.evaluator.gconfig)
    for key, longest in needs.items():
        if isinstance(limit, int) and longest > limit:
            raise ConfigError(
                f"the model of {where} takes {limit} tokens (max_position_embeddings), but max_prompt_len + {key}.max_new_tokens is {longest}",
                f"lower {key}.max_new_tokens or train_dataset.max_prompt_len",
            )


def _check_sampling(config: GRPOConfig) -> None:
    gconfig = config.gconfig
    for key, off in (("top_p", 1.0), ("top_k", 0)):
        if getattr(gconfig, key) != off:
            raise ConfigError(
                f"gconfig.{key}={getattr(gconfig, key)} cuts the distribution that training needs whole",
                f"leave gconfig.{key} at {off}; evaluator.gconfig may set it",
            )
    if gconfig.temperature == 0:
        raise ConfigError("gconfig.temperature=0 always gives the same answer, so there is nothing to learn from", "use 1.0")
    norm = config.actor.reward_norm
    levels = {} if norm is None else {"mean_level": norm.mean_level, "std_level": norm.std_level}
    for key, level in levels.items():
        if gconfig.n_samples == 1 and level in ("group", "leave_one_out"):
            raise ConfigError(
                f"gconfig.n_samples=1 with actor.reward_norm.{key}='{level}' makes every advantage 0",
                "set gconfig.n_samples=8, or actor.reward_norm.mean_level=batch and std_level=batch",
            )


def _check_times(config: GRPOConfig) -> None:
    rollout = config.rollout
    if rollout.batch_timeout < rollout.episode_timeout:
        raise ConfigError(
            f"rollout.batch_timeout={rollout.batch_timeout:g} s ends the run before an episode has used its rollout.episode_timeout={rollout.episode_timeout:g} s",
            "raise the first or lower the second",
        )


def _check_deterministic(config: GRPOConfig) -> None:
    for key, threads in (("rollout.threads", config.rollout.threads), ("actor.threads", config.actor.threads)):
        if threads != 1:
            raise ConfigError(f"deterministic=true needs {key}=1, not {threads}", f"set {key}=1, or deterministic=false")
    for key, device in _devices(config).items():
        if device not in ("cpu", "auto"):
            raise ConfigError(f"deterministic=true runs on the CPU only, but {key}='{device}'", f"set {key}=cpu, or deterministic=false")
        if device == "auto" and count_gpus() > 0:
            raise ConfigError(f"deterministic=true runs on the CPU only, and {key}='auto' takes the GPU of this machine", f"set {key}=cpu")


def check_machine(config: GRPOConfig, given: Collection[str] = (), *, trains: bool = True) -> None:
    """Raises ``ConfigError`` for a model, data file, reward function or GPU that the configuration needs and this machine does not have.

    ``given`` names the data sets whose rows are there already; without ``trains`` no weights go to the servers.
    """
    _check_gpus(config)
    check_offload(config)
    check_peft(config)
    if config.layout.engine == "sglang" and not config.rollout.urls:
        sglang_python(config.sglang.python)
    if trains:
        _check_transport(config)
    _check_reward(config)
    _check_named(config)
    paths = {"actor.path": config.actor.path, "ref.path": config.ref.path, "critic.path": config.critic.path if config.critic else ""}
    for key, path in paths.items():
        if path:
            check_model_dir(key, path, config)
            if config.actor.path:
                check_same_vocabulary(key, path, config.actor.path)
    for key, dataset in (("train_dataset", config.train_dataset), ("valid_dataset", config.valid_dataset)):
        if dataset is not None and dataset.type == "jsonl" and key not in given and not Path(dataset.path).expanduser().is_file():
            raise ConfigError(
                f"{key}.path: there is no file '{dataset.path}'", f"give {key}.path=FILE; relative paths start at {Path.cwd()}"
            )


def _check_named(config: GRPOConfig) -> None:
    """What the keys of workflow and filter name can be imported."""
    from areal.group_filter import build_filter
    from areal.workflow.build import config_workflow

    config_workflow(config)
    build_filter(config.rollout)


def _check_reward(config: GRPOConfig) -> None:
    """The reward function can be imported; one for code is confined as demanded, and its programs end before their scores are overdue."""
    from areal.reward.code import CodeReward
    from areal.reward.sandbox.levels import HINT, namespaces_missing
    from areal.workflow.build import reward_function

    if is_service(config.reward_fn) and (why := why_unreachable(config.reward_fn)):
        raise ConfigError(
            f"reward_fn='{config.reward_fn}': nothing can be reached there ({why})",
            "start that service first, e.g. with `areal reward-server`, or look at the address",
        )
    function, reward = reward_function(config), config.reward
    code = function if isinstance(function, CodeReward) else CodeReward().within(reward)
    if code.isolation == "namespaces" and (reason := namespaces_missing()):
        raise ConfigError(
            f"reward.isolation=namespaces: this machine does not have that level ({reason})", f"{HINT}, or set reward.isolation=auto"
        )
    longest = CodeReward.longest_wall_seconds(reward.timeout)
    if code.limits is not None and code.limits.wall_seconds > longest:
        raise ConfigError(
            f"reward.timeout={reward.timeout:g} s leaves a program {longest:g} s, but the limits of reward_fn='{config.reward_fn}' give it "
            f"{code.limits.wall_seconds:g} s: slow programs would be failures instead of wrong answers",
            f"set reward.timeout={1.5 * code.limits.wall_seconds:g}",
        )


def _check_gpus(config: GRPOConfig) -> None:
    check_device("rollout.device", config.rollout.device)
    n_gpus = check_trainer_gpus(config)
    if not config.rollout.urls and n_gpus:
        _check_server_gpus(config, n_gpus)


def check_trainer_gpus(config: GRPOConfig) -> int:
    """Whether each rank has one, where they are to run on GPUs; returns how many there are."""
    check_device("actor.device", config.actor.device)
    n_gpus, n_ranks = count_gpus(), config.trainer_layout.world_size
    if config.actor.device != "cpu" and 0 < n_gpus < n_ranks:
        raise ConfigError(
            f"actor.backend='{config.actor.backend}' needs {n_ranks} GPUs, one a rank, and this machine has {n_gpus}",
            f"set actor.backend=fsdp:d{n_gpus}, or actor.device=cpu",
        )
    return n_gpus


def _check_server_gpus(config: GRPOConfig, n_gpus: int) -> None:
    layout = config.layout
    if config.rollout.device != "cpu" and n_gpus < layout.n_ranks:
        raise ConfigError(
            f"rollout.backend='{config.rollout.backend}' needs {layout.n_ranks} GPUs for one server, and this machine has {n_gpus}",
            f"set rollout.backend={layout.engine}:d{layout.n_servers}t{n_gpus}, or name servers of other machines in rollout.urls",
        )


def _check_transport(config: GRPOConfig) -> None:
    """Whether weights can go from where the trainer is to where the servers are."""
    transport, folder = config.transport, config.weight_sync.folder
    if transport in ("shm", "tensor") and (elsewhere := next((url for url in config.rollout.urls if not is_here(url)), "")):
        raise ConfigError(
            f"weight_sync.transport={transport} works on one machine only, and {elsewhere} of rollout.urls is not on this one",
            "set weight_sync.transport=broadcast, or disk with a weight_sync.folder that both see",
        )
    if folder:
        try:
            Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"weight_sync.folder: '{folder}' cannot be made: {error.strerror}", "name a folder that can be written"
            ) from None
    if transport not in ("broadcast", "tensor") or config.rollout.urls:
        return
    shared = [i for i in range(config.layout.n_servers) if shares_gpu(config, i)]
    if shared and transport == "broadcast":
        raise ConfigError(
            f"rollout server {shared[0]} has to share {rollout_device(config, shared[0])} with the trainer, and NCCL cannot broadcast there",
            "set rollout.colocate=true, or weight_sync.transport=disk",
        )
    trains_on_gpu, generates_on_gpu = bool(trainer_gpus(config)), rollout_device(config, 0) != "cpu"
    if trains_on_gpu != generates_on_gpu:
        trainer, servers = ("GPUs", "the CPU") if trains_on_gpu else ("the CPU", "GPUs")
        raise ConfigError(
            f"weight_sync.transport={transport} does not lead from a trainer on {trainer} to rollout servers on {servers}",
            "set weight_sync.transport=disk, or actor.device and rollout.device alike",
        )


def check_device_name(key: str, device: str) -> None:
    """Whether it is the name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"{key}='{device}' is not a device", "use auto, cpu, cuda or cuda:N")


def check_device(key: str, device: str) -> None:
    """Whether this machine has the device."""
    check_device_name(key, device)
    if not device.startswith("cuda"):
        return
    n_gpus = count_gpus()
    if n_gpus == 0:
        raise ConfigError(
            f"{key}='{device}', but there is no GPU that torch can use here", f"set {key}=cpu; `areal doctor` says what is missing"
        )
    if int(device.partition(":")[2] or 0) >= n_gpus:
        raise ConfigError(f"{key}='{device}', but the GPUs of this machine are cuda:0 to cuda:{n_gpus - 1}", f"set {key}=cuda:0")


def check_model_dir(key: str, path: str, config: GRPOConfig | None = None) -> Mapping[str, Any]:
    """Whether ``path`` is a Hugging Face model directory whose context is long enough for ``config``; returns the model's config."""
    file = Path(path).expanduser() / "config.json"
    if not file.parent.is_dir():
        way_out = (
            f"`hf download {path} --local-dir DIR` and {key}=DIR"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", path)
            else "give the folder of a Hugging Face model"
        )
        raise ConfigError(f"{key}: there is no folder '{path}'", f"models are read from folders: {way_out}")
    try:
        model = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{key}: the folder '{path}' has no config.json", "give the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: '{file}' cannot be read: {error}", "give the folder of a Hugging Face model") from None
    if config is not None:
        _check_model_limit(config, model, key)
    return model
