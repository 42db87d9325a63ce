"""weights_hash reads every byte once; copy_and_hash reads it and writes it once. Their limit is a plain copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from areal.ops._dispatch import build_info, compiled_module
from areal.ops.weights_hash import HashedCopy, copy_and_hash, tensor_key, weights_hash
from benchmarks.op_bench import Bytes, Case

MEBIBYTES = {"cpu": (1, 1024), "cuda": (512, 8192)}
TARGET = 0.8


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    for mebibytes in MEBIBYTES[device]:
        yield hash_case(mebibytes, device, backends)
        if device == "cpu":
            yield copy_case(mebibytes, backends)


def model(mebibytes: int, device: str) -> dict[str, torch.Tensor]:
    """Several tensors, as in a model."""
    return {f"layer{i}": torch.randint(0, 2**62, (mebibytes * 2**15,), device=device) for i in range(4)}


def hash_case(mebibytes: int, device: str, backends: Sequence[str]) -> Case:
    tensors = model(mebibytes, device)
    variants: dict[str, Callable[[], object]] = {b: partial(weights_hash, tensors, backend=b) for b in wanted(device, backends)}
    rows = [(t.data_ptr(), 0, t.nbytes, tensor_key(name, t.shape, t.dtype)) for name, t in tensors.items()]
    variants |= each_instruction_set(rows) if device == "cpu" and "cpp" in backends else {}
    size = mebibytes * 2**20
    return Case(f"hash {mebibytes} MiB", size, variants, None, "torch", Bytes(size), TARGET, "hash")


def copy_case(mebibytes: int, backends: Sequence[str]) -> Case:
    copies = [HashedCopy(tensor_key(name, t.shape, t.dtype), t, torch.zeros_like(t)) for name, t in model(mebibytes, "cpu").items()]
    variants: dict[str, Callable[[], object]] = {b: partial(copy_and_hash, copies, backend=b) for b in wanted("cpu", backends)}
    rows = [(c.source.data_ptr(), c.target.data_ptr(), c.source.nbytes, c.key) for c in copies]
    # The addresses in `rows` are good as long as `copies` is, which the torch variant holds.
    variants |= each_instruction_set(rows) if "cpp" in backends else {}
    size = mebibytes * 2**20
    return Case(f"copy and hash {mebibytes} MiB", size, variants, None, "torch", Bytes(2 * size), TARGET, "copy and hash")


def wanted(device: str, backends: Sequence[str]) -> list[str]:
    return [b for b in backends if b == "torch" or b == {"cpu": "cpp", "cuda": "cuda"}[device]]


def each_instruction_set(rows: list[tuple[int, int, int, int]]) -> dict[str, Callable[[], object]]:
    module, info = compiled_module(), build_info()
    if module is None or info is None:
        return {}
    threads = torch.get_num_threads()
    return {f"cpp {name}": partial(module.copy_and_hash, rows, threads, name) for name in info["instruction_sets"]}
