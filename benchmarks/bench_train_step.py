"""What a train step costs beside the products that it is made of: packing, overhead, memory of the head, utilisation.

    packing    lognormal lengths (sigma 1), packed, against sequences of even length with as many tokens and as much attention, and
               against the same sequences padded to the longest
    overhead   the demo's training run: the share of a train step that is not forward, backward or optimizer
    memory     peak of a step, each in a process of its own: areal's head, and the same trainer with all logits in memory
    rival      MFU of areal's step and of a plain Hugging Face loop on the padded batch: same model, same optimizer, same sequences

On a GPU (--device cuda) the model of packing and rival has the shapes of Qwen2 1.5B in bfloat16, and the head a vocabulary of 151,936.

    python -m benchmarks train_step [-- --parts packing,overhead,memory,rival --quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal.algo.policy_loss import PPOInputs, policy_loss
from areal.config import GRPOConfig
from areal.models.heads import _hidden_before, head_of
from areal.models.loading import create_model
from areal.models.prefix import SharedTokens
from areal.ops import LinearPPOLoss
from areal.packer import pack
from areal.trainer.engine import RankMinibatch, TrainEngine
from areal.trainer.inputs import to_device
from areal.trainer.mesh import RankMesh
from areal.trainer.meters import matmul_peak
from areal.types import Microbatch, Trajectory
from benchmarks.bench_async_vs_sync import SKIPPED_STEPS, areal_train
from benchmarks.measure import interleaved, report, summary

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("packing", "overhead", "memory", "rival")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
QWEN2_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768, **_SPECIAL,
}  # fmt: skip
SMALL = {
    "model_type": "qwen2", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 768, "vocab_size": 4096, "tie_word_embeddings": True, "max_position_embeddings": 32768, **_SPECIAL,
}  # fmt: skip


def lognormal_lengths(n_tokens: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of sigma 1 around an eighth of ``longest``, which bounds them, that sum to ``n_tokens``."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (rest := n_tokens - sum(lengths)) > 0:
        lengths.append(min(rest, int(np.clip(rng.lognormal(np.log(longest / 8), 1.0), 16, longest))))
    return lengths


def even_lengths(lengths: Sequence[int]) -> list[int]:
    """Of equal length (to one token), with the same sum and about the same sum of squares, hence FLOPs of attention."""
    total = sum(lengths)
    n = max(1, round(total * total / sum(x * x for x in lengths)))
    return [total // n + (i < total % n) for i in range(n)]


def sequences(lengths: Sequence[int], vocabulary: int, padded_to: int = 0) -> list[Trajectory]:
    """The loss is on the last three quarters of each; padding has none."""
    rng = np.random.default_rng(1)
    result = []
    for n in lengths:
        place, size = np.arange(max(n, padded_to)), max(n, padded_to)
        mask = (place >= max(1, n // 4)) & (place < n)
        logprobs = np.where(mask, -np.log(vocabulary), 0).astype(np.float32)
        result.append(Trajectory(rng.integers(2, vocabulary, size), mask, logprobs, np.where(mask, 0, -1).astype(np.int32), 1.0))
    return result


def as_minibatch(samples: list[Trajectory]) -> RankMinibatch:
    microbatch: Microbatch = pack(samples, [np.where(t.loss_mask, 0.5, 0.0).astype(np.float32) for t in samples])
    return RankMinibatch([microbatch], float(microbatch.loss_mask.sum()))


@contextmanager
def engine_of(model: dict[str, Any], device: str, folder: Path, **actor: Any) -> Iterator[TrainEngine]:
    """An engine on one rank in this process, with random weights."""
    path = folder / "model"
    if not path.exists():
        create_model(model, seed=0, dtype=torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(path)
    keys = {"path": str(path), "device": device, "dtype": "bfloat16" if device == "cuda" else "float32", **actor}
    config = GRPOConfig.model_validate({"actor": keys, "train_dataset": {"type": "arithmetic"}})
    if device == "cuda":
        torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield TrainEngine(path, config.actor, mesh=RankMesh(torch.device(device)))
    finally:
        if device == "cuda":
            torch.distributed.destroy_process_group()


def finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


# -- packing ------------------------------------------------------------------------------------------------------------------------


def bench_packing(device: str, quick: bool) -> list[dict[str, Any]]:
    model = QWEN2_1_5B if device == "cuda" else SMALL
    n_tokens, longest = (16384, 8192) if device == "cuda" else (2048, 1024) if quick else (8192, 4096)
    lengths = lognormal_lengths(n_tokens, longest)
    even = even_lengths(lengths)
    with (
        tempfile.TemporaryDirectory() as scratch,
        engine_of(model, device, Path(scratch), gradient_checkpointing=device == "cuda") as engine,
    ):
        batches = {
            "packed": as_minibatch(sequences(lengths, model["vocab_size"])),
            "even": as_minibatch(sequences(even, model["vocab_size"])),
            "padded": as_minibatch(sequences(lengths, model["vocab_size"], max(lengths))),
        }
        if device == "cuda":
            del batches["padded"]  # several times the tokens need not fit; the part "rival" has a padded batch
        calls = {name: finished(lambda batch=batch: engine.train_step([batch]), device) for name, batch in batches.items()}
        seconds = interleaved(calls, rounds=3 if quick else 9, warmup=1)
        flops = {name: _flops(engine, batch) for name, batch in batches.items()}
    of_even = [p / e for p, e in zip(seconds["packed"], seconds["even"], strict=True)]
    print(f"packing: packed takes {statistics.median(of_even):.3f} times as long as even (wanted: at most 1.1)", file=sys.stderr)
    return [
        {
            "part": "packing",
            "what": name,
            "sequences": len(batch.microbatches[0].cu_seqlens) - 1,
            "tokens": batch.microbatches[0].n_tokens,
            "model_tflops": flops[name] / 1e12,
            "seconds": summary(seconds[name])["median"],
            "spread": summary(seconds[name])["spread"],
            "times_even": statistics.median(a / b for a, b in zip(seconds[name], seconds["even"], strict=True)),
        }
        for name, batch in batches.items()
    ]


def _flops(engine: TrainEngine, batch: RankMinibatch) -> float:
    return sum(engine.actor.flops_of(to_device(mb, engine.device, 0), training=True) for mb in batch.microbatches)


# -- overhead -----------------------------------------------------------------------------------------------------------------------


def bench_overhead(device: str, quick: bool) -> list[dict[str, Any]]:
    """The demo from random weights; ``other`` is all that is not in a phase: packing, the way to the rank and back, inputs, statistics."""
    words = ["warmup=null", f"total_train_steps={10 if quick else 40}", "evaluator.n_prompts=0"]
    with tempfile.TemporaryDirectory() as scratch:
        run = areal_train("examples/arithmetic.yaml", [*words, f"actor.device={device}"], Path(scratch), 1800)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][SKIPPED_STEPS:]
    phases = ("recompute", "forward", "backward", "optimizer", "other")
    totals = [sum(row[f"{phase}_seconds"] for phase in phases) for row in rows]
    table = []
    for phase in phases:
        shares = [row[f"{phase}_seconds"] / total for row, total in zip(rows, totals, strict=True)]
        seconds = summary([row[f"{phase}_seconds"] for row in rows])
        table.append(
            {
                "part": "overhead",
                "what": phase,
                "seconds": seconds["median"],
                "spread": seconds["spread"],
                "share": statistics.median(shares),
            }
        )
    print(f"overhead: {100 * table[-1]['share']:.1f}% outside of the phases (wanted: under 10%)", file=sys.stderr)
    return table


# -- memory -------------------------------------------------------------------------------------------------------------------------


def whole_logits_loss(
    model: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Sequence[int],
    temperature: float,
    inputs: PPOInputs,
    *,
    rows: Tensor,
    shared: SharedTokens | None = None,
    part: None = None,
    values: None = None,
    **options: Any,
) -> LinearPPOLoss:
    """``packed_ppo_loss`` as most trainers do it: logits and log-probs of all tokens, and autograd."""
    hidden = _hidden_before(model, input_ids, position_ids, lengths, rows, shared)
    logits = torch.nn.functional.linear(hidden, head_of(model).projection.weight).float() / temperature
    logprobs = torch.log_softmax(logits, -1).gather(1, input_ids.index_select(0, rows).unsqueeze(1)).squeeze(1)
    loss, stats = policy_loss(logprobs, torch.zeros_like(logprobs), inputs.at(rows), **options)
    whole = torch.zeros(len(input_ids), dtype=logprobs.dtype, device=rows.device).index_copy(0, rows, logprobs.detach())
    return LinearPPOLoss(loss, stats, whole, torch.zeros_like(whole))


def measure_memory(head: str, device: str, n_tokens: int, vocabulary: int) -> dict[str, float]:
    """In a process of its own: MiB at the peak of the second step, and what was held before."""
    torch.set_num_threads(1)
    model = {**(QWEN2_1_5B if device == "cuda" else SMALL), "vocab_size": vocabulary, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as scratch, engine_of(model, device, Path(scratch)) as engine:
        if head == "whole_logits":
            engine.model.packed_ppo_loss = whole_logits_loss.__get__(engine.model)
        batch = as_minibatch(sequences([512] * (n_tokens // 512), vocabulary))
        peaks = [engine.train_step([batch])["meters"]["peak_mb"] for _ in range(2)][-1]
    return {"peak_mb": max(value or 0.0 for value in peaks.values())}


def bench_memory(device: str, quick: bool) -> list[dict[str, Any]]:
    n_tokens, vocabulary = (16384, 151936) if device == "cuda" else (1024 if quick else 4096, 32768)
    table = []
    for head in ("areal", "whole_logits"):
        words = ["--measure-memory", head, "--device", device, "--tokens", str(n_tokens), "--vocabulary", str(vocabulary)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.bench_train_step", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
        figures = json.loads(done.stdout.splitlines()[-1])
        table.append({"part": "memory", "what": head, "tokens": n_tokens, "vocabulary": vocabulary, **figures})
    ours, theirs = (row["peak_mb"] for row in table)
    wanted = " (wanted: 4096 MiB less)" if device == "cuda" else ""
    print(
        f"memory: {ours:.0f} MiB against {theirs:.0f} MiB with all logits, {theirs - ours:.0f} MiB less, {theirs / ours:.2f} times{wanted}",
        file=sys.stderr,
    )
    return [{**row, "times_areal": row["peak_mb"] / ours} for row in table]


# -- rival --------------------------------------------------------------------------------------------------------------------------


def hugging_face_step(folder: Path, device: str, samples: list[Trajectory]) -> Callable[[], object]:
    """Forward, loss of the answers, backward and AdamW as a Hugging Face user writes them: the batch padded to its longest sequence.

    Parameters in the dtype of areal's products. Sequences are as long as in the packed batch and of about equal length, so that there is
    as little padding as this way of training can have.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True).to(device).train()
    model.config.use_cache = False
    if device == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    longest = max(len(t) for t in samples)
    ids, labels, seen = (torch.full((len(samples), longest), fill, dtype=torch.int64) for fill in (0, -100, 0))
    for row, t in enumerate(samples):
        ids[row, : len(t)], seen[row, : len(t)] = torch.from_numpy(t.input_ids), 1
        labels[row, : len(t)] = torch.where(torch.from_numpy(t.loss_mask), torch.from_numpy(t.input_ids), -100)
    ids, labels, seen = (x.to(device) for x in (ids, labels, seen))

    def step() -> None:
        model(input_ids=ids, attention_mask=seen, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_rival(device: str, quick: bool) -> list[dict[str, Any]]:
    model = QWEN2_1_5B if device == "cuda" else SMALL
    n_tokens, shortest, longest = (16384, 2048, 8192) if device == "cuda" else (1024 if quick else 4096, 128, 512)
    rng, lengths = np.random.default_rng(0), list[int]()
    while (rest := n_tokens - sum(lengths)) > 0:
        lengths.append(min(rest, int(rng.integers(shortest, longest + 1))))
    samples = sequences(lengths, model["vocab_size"])
    batch = as_minibatch(samples)
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("areal", "hugging_face"):  # one after the other: both do not fit
            with engine_of(model, device, Path(scratch), gradient_checkpointing=device == "cuda") as engine:
                peak, flops = matmul_peak(engine.device, engine.actor.dtype), _flops(engine, batch)
                step: Callable[[], object] = lambda: engine.train_step([batch])  # noqa: B023, E731
                if name == "hugging_face":
                    del engine
                    step = hugging_face_step(Path(scratch) / "model", device, samples)
                seconds = interleaved({name: finished(step, device)}, rounds=3 if quick else 9, warmup=2)[name]
            median = summary(seconds)["median"]
            row = {"tokens": n_tokens, "seconds": median, "spread": summary(seconds)["spread"], "mfu": flops / median / peak}
            table.append({"part": "rival", "what": name, **row, "tokens_per_s": n_tokens / median, "matmul_tflops": peak / 1e12})
            (Path(scratch) / "store").unlink(missing_ok=True)
            step, engine = None, None  # type: ignore[assignment]
            if device == "cuda":
                torch.cuda.empty_cache()
    print(f"rival: MFU {table[0]['mfu']:.1%} against {table[1]['mfu']:.1%} (wanted on a GPU: at least 45%)", file=sys.stderr)
    return table


# -- all ----------------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train_step", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smaller, fewer rounds: a look, not a figure to quote")
    parser.add_argument("--measure-memory", choices=("areal", "whole_logits"), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure_memory:
        print(json.dumps(measure_memory(args.measure_memory, args.device, args.tokens, args.vocabulary)))
        return
    torch.set_num_threads(args.threads)
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"there is no part '{unknown[0]}'; there are {', '.join(PARTS)}")
    run = {"packing": bench_packing, "overhead": bench_overhead, "memory": bench_memory, "rival": bench_rival}
    begin, rows = time.perf_counter(), []
    for part in parts:
        rows += run[part](args.device, args.quick)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [{key: row.get(key, "") for key in columns} for row in rows]
    facts = {"device": args.device, "threads": args.threads, "quick": args.quick, "seconds": time.perf_counter() - begin}
    report("train_step" if args.device == "cpu" else "train_step_cuda", table, **facts)


if __name__ == "__main__":
    main()
