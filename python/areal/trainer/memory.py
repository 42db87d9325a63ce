"""Whether a rank's part of the models fits into its device: an estimate before anything is loaded, and what to turn when it does not.

It counts what is known exactly (parameters, gradients, optimizer state, gathered layers, the head's gradient) and what autograd keeps of
a full micro-batch (``activations``), plus what is alive for a moment. On the CPU, Qwen2 and Llama shapes, float32 and bfloat16, with and
without checkpointing, measured peaks were 0.92 to 1.09 times the estimate; what may be wrong by ``ERROR`` is refused only beyond that.
Not measured on a GPU yet. Rollout servers on the same GPU, and copies of weights on their way to files and servers, are not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from areal.config import ActorConfig, ConfigError, CriticConfig, GRPOConfig, LoraConfig
from areal.config_trainer import TrainEngineConfig
from areal.launcher.gpus import gpu_memory
from areal.models.attention import ATTENTION_NAME
from areal.models.loading import decoder_layers
from areal.ops._linear_chunks import chunk_tokens, memory_budget_for
from areal.trainer.activations import saved_bytes_per_token

ERROR = 0.35
"""Of what is not known exactly."""
_CLOSE = 0.85
_BASE = {"cpu": 500 << 20, "cuda": 1 << 30}
"""Libraries and what malloc keeps; the context, and workspaces of the products."""
_SCORES_UP_TO = 128
"""Sequences up to this length keep attention weights on the CPU (``models.packed``)."""
_GIB = 2**30


class OutOfMemory(RuntimeError):
    """A rank's device had no memory left; the message says which key to turn."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank at the peak of a train step."""

    parameters: float
    gradients: float
    optimizer: float
    """State, and what a step of Muon holds for a moment."""
    other_models: float
    """Reference and critic, with its gradients and optimizer state."""
    gathered: float
    """Layers and root that FSDP brings together."""
    activations: float
    head: float
    """Logits of a chunk of tokens, and the gradient of the head."""
    working: float
    """Gradients of activations in one layer."""
    base: float
    section: Literal["actor", "critic"] = "actor"
    """Whose micro-batch needs most: gathered layers, activations, head and working memory are those of this model."""

    @property
    def fixed(self) -> float:
        """Known exactly, whatever the batch is."""
        return self.parameters + self.gradients + self.optimizer + self.other_models

    @property
    def total(self) -> float:
        return float(sum(getattr(self, name) for name in _PARTS))

    @property
    def at_least(self) -> float:
        return self.fixed + (1 - ERROR) * (self.total - self.fixed)

    def describe(self) -> str:
        parts = {name.replace("_", " "): getattr(self, name) for name in _PARTS}
        return ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size >= 0.005 * self.total)


_PARTS = [f.name for f in fields(MemoryEstimate) if f.name != "section"]


class _Momentary(NamedTuple):
    """Bytes of one model's micro-batch, as the fields of ``MemoryEstimate``."""

    gathered: float
    activations: float
    head: float
    working: float


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the estimate needs of a model."""

    n: int
    """Parameters."""
    root: int
    """Those outside of the layers."""
    largest_layer: int
    same_matrices: int
    """Entries of all matrices of the layers that have one shape, the largest such sum."""
    n_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    tied: bool
    saved: float
    """Activations of all layers kept for backward, bytes a token."""
    has_head: bool = True

    def without_head(self) -> _Shape:
        """As a critic has it; a tied head stays as the embedding."""
        head = 0 if self.tied else self.vocabulary * self.hidden
        return replace(self, n=self.n - head, root=self.root - head, has_head=False)


def estimate_memory(config: GRPOConfig, model_folder: Path, device: Literal["cpu", "cuda"]) -> MemoryEstimate:
    """Of a rank that trains ``actor`` with ``ref`` and ``critic`` as they are configured; nothing is loaded."""
    actor, critic, ref = config.actor, config.critic, config.ref
    itemsize = 2 if actor.dtype == "bfloat16" else 4
    n_shards = config.trainer_layout.world_size // config.trainer_layout.replicas

    def shape_of(path: str) -> _Shape:
        folder = Path(path).expanduser() if path else model_folder
        return _shape_of(folder, actor.dtype, _score_width(config) if device == "cpu" else 0)

    shape = shape_of("")
    parameters, gradients, optimizer = _fixed(actor, shape, n_shards, itemsize, actor.lora)
    most, section = _momentary(config, actor, shape, tokens_per_microbatch(config), device), "actor"
    others = 0.0
    if _has_reference_model(config) and not (device == "cuda" and ref.offload):
        others += itemsize * (shape_of(ref.path) if ref.path else shape).n / n_shards
    if critic is not None and not critic.shared:
        of_critic = (shape_of(critic.path) if critic.path else shape).without_head()
        if not (device == "cuda" and critic.offload):
            others += sum(_fixed(critic, of_critic, n_shards, itemsize, None))
        own = _momentary(config, critic, of_critic, tokens_per_microbatch(config, critic), device)
        if sum(own) > sum(most):  # one after the other
            most, section = own, "critic"
    if device == "cuda" and actor.offload:
        parameters = gradients = optimizer = 0.0
    return MemoryEstimate(parameters, gradients, optimizer, others, *most, base=_BASE[device], section=section)  # type: ignore[arg-type]


def _has_reference_model(config: GRPOConfig) -> bool:
    """With adapters the actor's own base is the reference, unless a warm-up changes it."""
    return config.uses_ref and (config.actor.lora is None or bool(config.ref.path) or config.warmup is not None)


def _momentary(config: GRPOConfig, section: TrainEngineConfig, shape: _Shape, n_tokens: int, device: str) -> _Momentary:
    """``n_tokens``: of a micro-batch, over its context ranks."""
    actor, layout = config.actor, config.trainer_layout
    itemsize = 2 if actor.dtype == "bfloat16" else 4
    tokens = n_tokens / layout.context
    frozen = section is actor and actor.lora is not None
    saved = shape.saved
    if section.gradient_checkpointing:
        saved = itemsize * shape.hidden * (shape.n_layers + 1) + saved / shape.n_layers
    gathered = 0.0
    if layout.world_size > 1 or itemsize < 4 or section.offload:
        # The root stays gathered between its forward and backward; two layers are there at a time. Where they are trained, also the
        # gradients of the root and of one layer, and the larger of these in float32 while it is summed.
        gathered = itemsize * (shape.root + 2 * shape.largest_layer)
        gathered += 0 if frozen else itemsize * (shape.root + shape.largest_layer) + 4 * max(shape.root, shape.largest_layer)
    return _Momentary(
        gathered,
        saved * tokens,
        _head(shape, itemsize, tokens, device, frozen) if shape.has_head else 0.0,
        itemsize * tokens * (4 * shape.hidden + 3 * shape.intermediate),
    )


def _fixed(section: TrainEngineConfig, shape: _Shape, n_shards: int, itemsize: int, lora: LoraConfig | None) -> tuple[float, float, float]:
    """Float32 master weights, gradients and optimizer state of this rank; with adapters only these have the last two."""
    trained, parameters = float(shape.n), 4.0 * shape.n
    if lora is not None:
        trained = 2 * lora.rank * (shape.n - shape.root) / shape.hidden  # each matrix [a, b] gets rank * (a + b)
        parameters = itemsize * shape.n + 4 * trained
    gradients = 4 * trained / n_shards
    if section.optimizer.type == "muon" and lora is None:
        in_layers = shape.n - shape.root
        momentary = 14 * shape.same_matrices  # float32 directions and their stack, three matrices in bfloat16
        return parameters / n_shards, gradients, (4 * in_layers + 8 * shape.root) / n_shards + momentary
    return parameters / n_shards, gradients, 8 * trained / n_shards


def _head(shape: _Shape, itemsize: int, tokens: float, device: str, frozen: bool) -> float:
    budget = memory_budget_for("memory", torch.device(device), None)
    chunk = chunk_tokens(max(1, int(tokens)), shape.vocabulary, itemsize, budget)
    logits = chunk * shape.vocabulary * itemsize
    several = chunk < tokens
    weight = shape.vocabulary * shape.hidden
    # d(weight), and it times the gradient of the loss; of a tied one the embedding's share too.
    of_weight = weight * itemsize * (3 if shape.tied else 2) + (4 * weight if several and itemsize < 4 else 0)
    return logits + (0 if frozen else of_weight) + 3 * itemsize * tokens * shape.hidden


def tokens_per_microbatch(config: GRPOConfig, section: ActorConfig | CriticConfig | None = None) -> int:
    """Of the largest of ``section`` (the actor): as many as the key allows, unless a rank's part of a mini-batch has fewer."""
    section = section or config.actor
    if config.dpo is not None or (section is config.actor and config.warmup is not None):
        return section.mb_spec.max_tokens_per_mb  # rows of any length that fits
    samples = -(-config.rollout.consumer_batch_size // section.ppo_n_minibatches) * config.gconfig.n_samples
    of_rank = -(-samples // config.trainer_layout.data) * _longest(config)
    return min(section.mb_spec.max_tokens_per_mb, of_rank)


def _longest(config: GRPOConfig) -> int:
    return config.train_dataset.max_prompt_len + config.gconfig.max_new_tokens


def _score_width(config: GRPOConfig) -> int:
    """Attention weights that a query keeps on the CPU."""
    return min(_longest(config), _SCORES_UP_TO)


def _shape_of(folder: Path, dtype: str, score_width: int) -> _Shape:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=ATTENTION_NAME).eval()
    layers = decoder_layers(model)
    in_layers = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    matrices: Counter[torch.Size] = Counter()
    for p in layers.parameters():
        if p.ndim == 2:
            matrices[p.shape] += p.numel()
    text, n = config.get_text_config(), sum(p.numel() for p in model.parameters())
    return _Shape(
        n=n,
        root=n - sum(in_layers),
        largest_layer=max(in_layers),
        same_matrices=max(matrices.values(), default=0),
        n_layers=len(layers),
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        vocabulary=text.vocab_size,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        saved=_saved(model, text, torch.empty(0, dtype=getattr(torch, dtype)).element_size(), score_width),
    )


def _intermediate(config: PretrainedConfig) -> int:
    """Width of the feed-forward part that a token goes through."""
    used = getattr(config, "num_experts_per_tok", None)
    of_expert = getattr(config, "moe_intermediate_size", None)
    size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return used * (of_expert or size) if used else size


def _saved(model: PreTrainedModel, config: PretrainedConfig, itemsize: int, score_width: int) -> float:
    try:
        return saved_bytes_per_token(model, score_width)
    except (RuntimeError, NotImplementedError):  # a forward pass that looks at values, as the routing of experts does
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = config.num_attention_heads * (4 * size + score_width)
        return config.num_hidden_layers * itemsize * (10 * config.hidden_size + 4 * _intermediate(config) + attention)


# -- against what there is ----------------------------------------------------------------------------------------------------------


def check_memory(config: GRPOConfig, model_folder: Path, device: Literal["cpu", "cuda"], taken: float = 0.0) -> tuple[str, bool]:
    """One line about the trainer's memory, and whether it is close; ``ConfigError`` when it certainly does not fit.

    ``taken``: the share of each GPU that rollout servers have.
    """
    estimate = estimate_memory(config, model_folder, device)
    available = memory_available(device) * (1 - taken if device == "cuda" else 1 / config.trainer_layout.world_size)
    on_gpu = "of its GPU" if not taken else f"of its GPU beside SGLang, which takes {taken:.0%} (sglang.options.mem_fraction_static)"
    where = on_gpu if device == "cuda" else "that are free here for each rank" if config.trainer_layout.world_size > 1 else "free here"
    line = f"trainer memory: about {size_text(estimate.total)} a rank ({estimate.describe()})"
    if not available:
        return line, False
    line = f"{line}; {size_text(available)} {where}"
    if estimate.at_least > available:
        raise ConfigError(
            f"the trainer does not fit: a rank needs at least {size_text(estimate.at_least)} ({estimate.describe()}), and it has "
            f"{size_text(available)} {where}",
            advice(config, estimate, available, device),
        )
    if estimate.total > _CLOSE * available:
        return f"{line}, which is close: {advice(config, estimate, available, device)}", True
    return line, False


def memory_available(device: Literal["cpu", "cuda"]) -> float:
    """Bytes: of the smallest GPU, or of memory that is free on this machine and within the limit of its container; 0 = unknown."""
    if device == "cuda":
        return float(gpu_memory())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0.0)
    return min(free, _free_in_container(Path("/sys/fs/cgroup")))


def _free_in_container(cgroup: Path) -> float:
    """Bytes up to its limit; infinity without one."""
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(parts["inactive_file"]) + int(parts["active_file"])  # counted as used, and given back before anything fails
    except (OSError, ValueError, KeyError):  # no such files, or "max"
        return math.inf
    return max(0.0, float(limit - used + cached))


def advice(config: GRPOConfig, estimate: MemoryEstimate, available: float, device: str, *, most_tokens: int | None = None) -> str:
    """The key that brings most, with a value where one can be told; ``most_tokens``: a micro-batch that is not too large."""
    actor, layout = config.actor, config.trainer_layout
    section = config.critic if estimate.section == "critic" and config.critic is not None else actor
    if estimate.fixed + estimate.base > _CLOSE * available:
        return _advice_on_models(config, estimate, available, device)
    variable = estimate.activations + estimate.working
    room = _CLOSE * available - (estimate.total - variable)
    fitting = int(tokens_per_microbatch(config, section) * max(0.0, room) / max(1.0, variable))
    fitting = min(fitting, most_tokens or fitting) // 256 * 256
    checkpoint = f"{estimate.section}.gradient_checkpointing=true"
    if fitting >= max(_longest(config), 256):
        return f"set {estimate.section}.mb_spec.max_tokens_per_mb={fitting}" + (
            "" if section.gradient_checkpointing else f", or {checkpoint}"
        )
    if not section.gradient_checkpointing:
        return f"set {checkpoint}"
    if actor.dtype == "float32" and device == "cuda":
        return "set actor.dtype=bfloat16"
    shorter = "leave out long rows" if config.dpo is not None else "lower gconfig.max_new_tokens"
    return f"{shorter}, or let several ranks share a sequence (actor.backend=fsdp:d{layout.data}c{2 * layout.context})"


def _advice_on_models(config: GRPOConfig, estimate: MemoryEstimate, available: float, device: str) -> str:
    """Where parameters and optimizer alone are too large."""
    critic = config.critic if config.critic is not None and not config.critic.shared else None
    sections = {"actor": config.actor, "critic": critic, "ref": config.ref if _has_reference_model(config) else None}
    stays = [f"{key}.offload=true" for key, section in sections.items() if section is not None and not section.offload]
    if device == "cuda" and stays:
        return f"set {' and '.join(stays)}, give the trainer more ranks (actor.backend=fsdp:dN), or train adapters (actor.lora)"
    needed = config.trainer_layout.world_size * -(-(estimate.fixed) // max(1.0, 0.6 * available))
    more = f"give the trainer more memory, e.g. {needed:.0f} ranks on as many devices (actor.backend=fsdp:d{needed:.0f})"
    return f"{more}, or train a smaller model or adapters (actor.lora)"


def explain_out_of_memory(error: RuntimeError, config: GRPOConfig, model_folder: Path) -> str | None:
    """One sentence for an allocation that failed; None for any other error."""
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    if not on_gpu and "can't allocate memory" not in str(error):
        return None
    device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
    estimate = estimate_memory(config, model_folder, device)
    tokens = tokens_per_microbatch(config, config.critic if estimate.section == "critic" else None)
    key = advice(config, estimate, memory_available(device) or estimate.total, device, most_tokens=tokens // 2)
    return f"no memory is left on the trainer's {'GPU' if on_gpu else 'machine'} for micro-batches of up to {tokens} tokens: {key}"


def size_text(n_bytes: float) -> str:
    return f"{n_bytes / _GIB:.1f} GiB" if n_bytes >= 0.1 * _GIB else f"{n_bytes / 2**20:.0f} MiB"
