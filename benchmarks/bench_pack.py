"""pack and unpack of a train batch's fields; the limit is reading the tokens and writing them and the derived columns once.

Rivals are what one writes with torch: boolean indexing by the mask, torch.cat, pad_sequence, each with the derived columns made by further
torch calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from areal.ops import Packed, pack, unpack
from benchmarks.op_bench import Bytes, Case

DTYPES = {
    "input_ids": torch.int64,
    "loss_mask": torch.bool,
    "logprobs": torch.float32,
    "versions": torch.int32,
    "advantages": torch.float32,
}
TOKEN = sum(dtype.itemsize for dtype in DTYPES.values())
DERIVED = 8 + 4 + 8 + 1  # position ids, sequence ids, targets and their mask; ids and mask are in the cache for these
WIDTH = 8192
SEQUENCES = {"cpu": (16, 128, 1024), "cuda": (256, 4096, 16384)}
TARGET = {"cpu": None, "cuda": 0.8}  # on the CPU there is no target


def cases(device: str, backends: Sequence[str]) -> Iterator[Case]:
    wanted = [b for b in backends if b == "torch" or b == {"cpu": "cpp", "cuda": "cuda"}[device]]
    for n in SEQUENCES[device]:
        yield from shape_cases(n, device, wanted)


def shape_cases(n: int, device: str, backends: list[str]) -> Iterator[Case]:
    torch.manual_seed(0)
    lengths = torch.empty(n).log_normal_(7.0, 0.8).clamp(16, WIDTH).long().to(device)
    total, target = int(lengths.sum()), TARGET[device]
    mask = torch.arange(WIDTH, device=device) < lengths.unsqueeze(1)
    fields = {name: torch.randint(0, 2, (n, WIDTH), device=device).to(dtype) for name, dtype in DTYPES.items()}
    label, limit = f"{n} x {WIDTH}, {total} tokens", Bytes(total * (2 * TOKEN + DERIVED))

    variants: dict[str, Callable[[], object]] = {b: partial(pack, fields, lengths, total=total, backend=b) for b in backends}
    by_mask = {f"{b} by mask": partial(pack, fields, attention_mask=mask, total=total, backend=b) for b in backends if b != "torch"}
    rival = {"boolean index": partial(index_all, fields, mask, lengths, total)}
    yield Case(label, total, variants | by_mask | rival, same, "torch", limit, target, "pack padded")

    rows = {name: [field[i, : lengths[i]].clone() for i in range(n)] for name, field in fields.items()}
    variants = {b: partial(pack, rows, backend=b) for b in backends}
    yield Case(label, total, variants | {"cat": partial(cat_all, rows, lengths)}, same, "torch", limit, target, "pack ragged")
    del rows

    packed = pack(fields, lengths, total=total)
    sizes = lengths.tolist()
    variants = {b: partial(unpack, packed.fields, packed.cu_seqlens, max_length=WIDTH, backend=b) for b in backends}
    variants |= {"pad_sequence": partial(pad_all, packed.fields, sizes)}
    moved = Bytes(total * TOKEN + n * WIDTH * TOKEN)
    yield Case(label, total, variants, same, "torch", moved, target, "unpack")


def same(found: Any, expected: Any) -> None:
    if isinstance(found, Packed):
        assert found.max_length == expected.max_length
        found, expected = ({**p.fields, **dict(zip("abcde", p[1:6], strict=True))} for p in (found, expected))
    for name, column in found.items():
        assert torch.equal(column, expected[name]), name


def derive(fields: dict[str, Tensor], lengths: Tensor, total: int, longest: int) -> Packed:
    ends = torch.cumsum(lengths, 0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)
    position = torch.arange(total, device=lengths.device) - (ends - lengths)[sequence]
    targets, mask = fields["input_ids"].roll(-1), fields["loss_mask"].roll(-1)
    targets[ends - 1] = 0
    mask[ends - 1] = False
    return Packed(fields, cu_seqlens, position, sequence.int(), targets, mask, longest)


def index_all(fields: dict[str, Tensor], mask: Tensor, lengths: Tensor, total: int) -> Packed:
    return derive({name: field[mask] for name, field in fields.items()}, lengths, total, WIDTH)


def cat_all(rows: dict[str, list[Tensor]], lengths: Tensor) -> Packed:
    fields = {name: torch.cat(tensors) for name, tensors in rows.items()}
    return derive(fields, lengths, len(fields["input_ids"]), int(lengths.max()))


def pad_all(fields: dict[str, Tensor], sizes: list[int]) -> dict[str, Tensor]:
    made = {}
    for name, field in fields.items():
        padded = pad_sequence(field.split(sizes), batch_first=True)
        made[name] = torch.nn.functional.pad(padded, (0, WIDTH - padded.shape[1]))
    return made
