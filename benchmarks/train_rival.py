"""A train step as Hugging Face ``Trainer`` (with accelerate) takes it on the sequences of areal's step: the rival of ``bench_train_step``.

Supervised loss of the same tokens, AdamW, gradient clipping, gradient checkpointing where areal has it. Parameters and moments are in the dtype
of the products, where areal keeps them in float32: less to read and write in the rival's optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from areal.types import Trajectory

_IGNORED = -100


def trainer_seconds(folder: Path, device: str, samples: Sequence[Trajectory], at_once: int, rounds: int, warmup: int) -> list[float]:
    """Seconds of each optimizer step on all ``samples``, ``at_once`` of them in a forward pass, padded to the longest of these.

    With ``at_once=1`` nothing is padded. ``ImportError`` without accelerate; ``torch.OutOfMemoryError`` where logits do not fit.
    """
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    arguments = TrainingArguments(
        output_dir=str(folder / "hugging_face"),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=-(-len(samples) // at_once),
        max_steps=warmup + rounds,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}} if on_gpu else {}),
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    model.config.use_cache = False
    clock = _Clock(on_gpu)
    trainer = Trainer(model, arguments, train_dataset=[_row(t) for t in samples], data_collator=_padded, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds[warmup:]


class _Clock(TrainerCallback):
    """From the begin of a step, its rows at hand, to the end of its optimizer step."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.seconds: list[float] = []

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._begin)


def _row(t: Trajectory) -> dict[str, Tensor]:
    ids = torch.from_numpy(t.input_ids)
    return {"input_ids": ids, "labels": torch.where(torch.from_numpy(t.loss_mask), ids, _IGNORED)}


def _padded(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[rows, longest]; one row alone needs no mask."""
    fill = {"input_ids": 0, "labels": _IGNORED}
    batch = {k: torch.nn.utils.rnn.pad_sequence([row[k] for row in rows], True, value) for k, value in fill.items()}
    if len(rows) > 1:
        seen = [torch.ones_like(row["input_ids"]) for row in rows]
        batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(seen, True, 0)
    return batch
