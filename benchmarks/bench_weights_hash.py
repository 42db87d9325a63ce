"""weights_hash and copy_and_hash against the floor: the bytes that must move.

Hashing reads every byte once; copying and hashing reads it and writes it once. The floor is measured in the same run: the best plain
read (numpy max) and copy (numpy copyto) of the same memory. `seconds_floor` is bytes / floor speed.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import torch

from areal.ops._dispatch import build_info, compiled_module, missing_cpp, missing_cuda
from areal.ops.weights_hash import HashedCopy, copy_and_hash, tensor_key, weights_hash
from benchmarks.measure import interleaved, report, summary


def bench(mebibytes: float, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    n = int(mebibytes * 2**20) // 8
    tensors = {f"layer{i}": torch.randint(0, 2**62, (n // 4,)) for i in range(4)}  # several tensors, as in a model
    copies = [HashedCopy(tensor_key(name, t.shape, t.dtype), t, torch.empty_like(t)) for name, t in tensors.items()]
    expected = weights_hash(tensors, backend="torch")
    assert copy_and_hash(copies) == expected and all(torch.equal(c.source, c.target) for c in copies)
    arrays = [(c.source.numpy().view(np.int32), c.target.numpy().view(np.int32)) for c in copies]
    variants: dict[str, Any] = {
        "floor: read": lambda: [source.max() for source, _ in arrays],
        "floor: copy": lambda: [np.copyto(target, source) for source, target in arrays],
        "hash torch": lambda: weights_hash(tensors, backend="torch"),
    }
    module, info = compiled_module(), build_info()
    if module is not None and info is not None:
        for name in info["instruction_sets"]:
            rows = [(c.source.data_ptr(), 0, c.source.nbytes, c.key) for c in copies]
            variants[f"hash cpp {name}"] = lambda rows=rows, name=name: module.copy_and_hash(rows, threads, name)
            moves = [(c.source.data_ptr(), c.target.data_ptr(), c.source.nbytes, c.key) for c in copies]
            variants[f"copy+hash cpp {name}"] = lambda moves=moves, name=name: module.copy_and_hash(moves, threads, name)
        assert all(variant() == expected for label, variant in variants.items() if "cpp" in label)
    seconds = {label: summary(times) for label, times in interleaved(variants, rounds=5 if mebibytes > 64 else 50).items()}
    rows = []
    for label, times in seconds.items():
        floor = seconds["floor: copy" if label.startswith("copy") else "floor: read"]["best"]
        rows.append(
            {"MiB": mebibytes, "threads": threads, "what": label, "GB/s": n * 8 / times["best"] / 1e9, "seconds": times["best"]}
            | {"median": times["median"], "spread": times["spread"], "seconds_floor": floor}
        )
    return rows


def bench_cuda(mebibytes: float) -> list[dict[str, Any]]:
    """Floor: a device-to-device copy's bytes per second (it reads and writes), which a read alone can at best match."""
    tensors = {f"layer{i}": torch.randint(0, 2**62, (int(mebibytes * 2**20) // 32,), device="cuda") for i in range(4)}
    target = {name: torch.empty_like(t) for name, t in tensors.items()}
    assert weights_hash(tensors) == weights_hash({name: t.cpu() for name, t in tensors.items()})
    total = sum(t.nbytes for t in tensors.values())

    def copy() -> None:
        for name, t in tensors.items():
            target[name].copy_(t)
        torch.cuda.synchronize()

    seconds = {
        label: summary(t) for label, t in interleaved({"floor: copy cuda": copy, "hash cuda": lambda: weights_hash(tensors)}).items()
    }
    floor = seconds["floor: copy cuda"]["best"] / 2
    return [
        {"MiB": mebibytes, "threads": 0, "what": label, "GB/s": total * (2 if "copy" in label else 1) / times["best"] / 1e9}
        | {"seconds": times["best"], "median": times["median"], "spread": times["spread"], "seconds_floor": floor}
        for label, times in seconds.items()
    ]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench weights_hash", description=__doc__)
    parser.add_argument("--mib", type=float, nargs="*", default=[1.0, 256.0], help="sizes of the weights")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    arguments = parser.parse_args(argv)
    if missing_cpp() is not None:
        print(f"without cpp: {missing_cpp()}")
    rows = [row for mib, threads in itertools.product(arguments.mib, arguments.threads) for row in bench(mib, threads)]
    if missing_cuda() is None:
        rows += [row for mib in (512.0, 8192.0) for row in bench_cuda(mib)]
    report("weights_hash", rows)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
