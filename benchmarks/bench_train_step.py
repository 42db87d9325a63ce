"""What a train step costs beside the products that it is made of: packing, overhead, memory of the head, utilisation.

    packing    lognormal lengths (sigma 1), packed, against sequences of even length with as many tokens and as much attention, and
               against the same sequences padded to the longest
    overhead   the demo's training run: the share of a train step that is not forward, backward or optimizer
    memory     peak of a step, each in a process of its own: areal's head, and the same trainer with all logits in memory
    rival      MFU of areal's step and of Hugging Face Trainer's (with accelerate) on the same sequences: one by one, and as one padded batch

On a GPU (--device cuda) the model of packing and rival has the shapes of Qwen2 1.5B in bfloat16, 16,384 tokens a micro-batch, and the head a
vocabulary of 151,936. What was measured is written after each part.

    python -m benchmarks train_step [-- --parts rival,memory,packing,overhead --quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
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
from benchmarks.measure import interleaved, print_table, summary, write_results

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("rival", "memory", "packing", "overhead")
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


def uniform_lengths(n_tokens: int, shortest: int, longest: int) -> list[int]:
    """Lengths between both, the last one shorter, that sum to ``n_tokens``."""
    rng, lengths = np.random.default_rng(0), list[int]()
    while (rest := n_tokens - sum(lengths)) > 0:
        lengths.append(min(rest, int(rng.integers(shortest, longest + 1))))
    return lengths


def even_lengths(lengths: Sequence[int]) -> list[int]:
    """Of equal length (to one token), with the same sum and about the same sum of squares, hence FLOPs of attention."""
    total = sum(lengths)
    n = max(1, round(total * total / sum(x * x for x in lengths)))
    return [total // n + (i < total % n) for i in range(n)]


def sequences(lengths: Sequence[int], vocabulary: int, padded_to: int = 0, prompt: float = 0.25) -> list[Trajectory]:
    """All tokens but the first share ``prompt`` of each sequence are loss tokens; padding has none."""
    rng = np.random.default_rng(1)
    result = []
    for n in lengths:
        place, size = np.arange(max(n, padded_to)), max(n, padded_to)
        mask = (place >= max(1, int(n * prompt))) & (place < n)
        logprobs = np.where(mask, -np.log(vocabulary), 0).astype(np.float32)
        result.append(Trajectory(rng.integers(2, vocabulary, size), mask, logprobs, np.where(mask, 0, -1).astype(np.int32), 1.0))
    return result


def as_minibatch(samples: list[Trajectory], most_tokens: int = sys.maxsize) -> RankMinibatch:
    """Micro-batches of up to ``most_tokens``, the samples in their order."""
    parts: list[list[Trajectory]] = [[]]
    for t in samples:
        if parts[-1] and sum(map(len, parts[-1])) + len(t) > most_tokens:
            parts.append([])
        parts[-1].append(t)
    packed: list[Microbatch] = [pack(part, [np.where(t.loss_mask, 0.5, 0.0).astype(np.float32) for t in part]) for part in parts]
    return RankMinibatch(packed, float(sum(mb.loss_mask.sum() for mb in packed)))


@contextmanager
def engine_of(model: dict[str, Any], device: str, folder: Path, **actor: Any) -> Iterator[TrainEngine]:
    """An engine on one rank in this process, with random weights."""
    path = folder / "model"
    if not path.exists():
        with torch.device(device):  # drawn there: on a CPU core it takes most of a minute
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
            (folder / "store").unlink(missing_ok=True)


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


# -- packing ------------------------------------------------------------------------------------------------------------------------


def bench_packing(device: str, quick: bool, scratch: Path) -> list[dict[str, Any]]:
    model = QWEN2_1_5B if device == "cuda" else SMALL
    n_tokens, longest = (16384, 8192) if device == "cuda" else (2048, 1024) if quick else (8192, 4096)
    lengths = lognormal_lengths(n_tokens, longest)
    even = even_lengths(lengths)
    with engine_of(model, device, scratch, gradient_checkpointing=device == "cuda") as engine:
        batches = {
            "packed": as_minibatch(sequences(lengths, model["vocab_size"])),
            "even": as_minibatch(sequences(even, model["vocab_size"])),
            "padded": as_minibatch(sequences(lengths, model["vocab_size"], max(lengths)), n_tokens),
        }
        calls = {name: finished(lambda batch=batch: engine.train_step([batch]), device) for name, batch in batches.items()}
        seconds = interleaved(calls, rounds=3 if quick else 9, warmup=1)
        flops = {name: _flops(engine, batch) for name, batch in batches.items()}
    of_even = [p / e for p, e in zip(seconds["packed"], seconds["even"], strict=True)]
    print(f"packing: packed takes {statistics.median(of_even):.3f} times as long as even (wanted: at most 1.1)", file=sys.stderr)
    return [
        {
            "part": "packing",
            "what": name,
            "sequences": sum(len(mb.cu_seqlens) - 1 for mb in batch.microbatches),
            "tokens": sum(mb.n_tokens for mb in batch.microbatches),
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


def bench_overhead(device: str, quick: bool, scratch: Path) -> list[dict[str, Any]]:
    """The demo from random weights; ``other`` is all that is not in a phase: packing, the way to the rank and back, inputs, statistics."""
    words = ["warmup=null", f"total_train_steps={10 if quick else 40}", "evaluator.n_prompts=0"]
    run = areal_train("examples/arithmetic.yaml", [*words, f"actor.device={device}"], scratch, 1800)
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
        batch = as_minibatch(sequences([512] * (n_tokens // 512), vocabulary, prompt=0.0))
        peaks = [engine.train_step([batch])["meters"]["peak_mb"] for _ in range(2)][-1]
    return {"peak_mb": max(value or 0.0 for value in peaks.values())}


def bench_memory(device: str, quick: bool, scratch: Path) -> list[dict[str, Any]]:
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


def bench_rival(device: str, quick: bool, scratch: Path) -> list[dict[str, Any]]:
    model = QWEN2_1_5B if device == "cuda" else SMALL
    n_tokens, shortest, longest = (16384, 2048, 8192) if device == "cuda" else (1024 if quick else 4096, 128, 512)
    samples = sequences(uniform_lengths(n_tokens, shortest, longest), model["vocab_size"])
    rounds = 3 if quick else 9
    seconds, flops, peak = _areal_seconds(scratch, device, model, as_minibatch(samples), rounds)
    table = [_utilisation("areal", seconds, n_tokens, flops, peak)]
    for name, at_once in (("hf_trainer", 1), ("hf_trainer_padded", len(samples))):
        free_memory(device)  # one after the other: all do not fit
        try:
            table.append(_utilisation(name, _trainer_seconds(scratch, device, samples, at_once, rounds), n_tokens, flops, peak))
        except (ImportError, torch.OutOfMemoryError) as error:
            table.append({"part": "rival", "what": name, "not_run": str(error).partition("\n")[0].partition(". ")[0]})
    rivals = [f"{row['mfu']:.1%} ({row['what']})" if "mfu" in row else f"{row['what']} not run" for row in table[1:]]
    print(f"rival: MFU {table[0]['mfu']:.1%} against {', '.join(rivals)} (wanted on a GPU: at least 45%)", file=sys.stderr)
    return table


def _areal_seconds(
    scratch: Path, device: str, model: dict[str, Any], batch: RankMinibatch, rounds: int
) -> tuple[list[float], float, float]:
    """Also the model FLOPs of a step, and FLOP/s of a matrix product."""
    with engine_of(model, device, scratch, gradient_checkpointing=device == "cuda") as engine:
        call = finished(lambda: engine.train_step([batch]), device)
        peak, flops = matmul_peak(engine.device, engine.actor.dtype), _flops(engine, batch)
        return interleaved({"areal": call}, rounds=rounds, warmup=2)["areal"], flops, peak


def _trainer_seconds(scratch: Path, device: str, samples: list[Trajectory], at_once: int, rounds: int) -> list[float]:
    from benchmarks.train_rival import trainer_seconds

    return trainer_seconds(scratch, device, samples, at_once, rounds, warmup=2)


def _utilisation(name: str, seconds: list[float], n_tokens: int, flops: float, peak: float) -> dict[str, Any]:
    """The same model FLOPs for all: what padding, recomputation and logits of prompts cost is not counted as work."""
    of = summary(seconds)
    row = {
        "tokens": n_tokens,
        "model_tflops": flops / 1e12,
        "seconds": of["median"],
        "spread": of["spread"],
        "mfu": flops / of["median"] / peak,
    }
    return {"part": "rival", "what": name, **row, "tokens_per_s": n_tokens / of["median"], "matmul_tflops": peak / 1e12}


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
    if args.device == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would cut its batches over all of them
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA device")
    torch.set_num_threads(args.threads)
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"there is no part '{unknown[0]}'; there are {', '.join(PARTS)}")
    run = {"packing": bench_packing, "overhead": bench_overhead, "memory": bench_memory, "rival": bench_rival}
    begin, rows, table = time.perf_counter(), list[dict[str, Any]](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            free_memory(args.device)
            rows += run[part](args.device, args.quick, Path(scratch))
            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = [{key: row.get(key, "") for key in columns} for row in rows]
            facts = {"device": args.device, "threads": args.threads, "quick": args.quick, "seconds": time.perf_counter() - begin}
            write_results("train_step" if args.device == "cpu" else "train_step_cuda", table, **facts)
    print_table(table)


if __name__ == "__main__":
    main()
