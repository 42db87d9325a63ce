"""pack and unpack: every backend against slices written out, both forms, derived columns, gradients, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_backends import backends
from torch import Tensor

from areal.ops import Packed, _pack_backends, pack, unpack, unpack_ragged
from areal.ops._pack_backends import layout_op

BACKENDS = backends("torch", "cpp", "cuda")
DTYPES = {"input_ids": torch.int64, "loss_mask": torch.bool, "logprobs": torch.float32, "versions": torch.int32, "values": torch.bfloat16}
DTYPES |= {"scores": torch.float64, "bytes": torch.uint8}


def make_ragged(lengths: list[int], device: str = "cpu", dtypes: dict[str, torch.dtype] = DTYPES) -> dict[str, list[Tensor]]:
    return {
        name: [torch.randint(0, 2 if dtype == torch.bool else 100, (L,), device=device).to(dtype) for L in lengths]
        for name, dtype in dtypes.items()
    }


def make_padded(ragged: dict[str, list[Tensor]], width: int, left: list[int] | None = None) -> dict[str, Tensor]:
    """Rows begin at column ``left[i]``; what is padding is 77, so that it would show."""
    fields = {}
    for name, rows in ragged.items():
        field = torch.full((len(rows), width), 77, device=rows[0].device).to(rows[0].dtype)
        for i, row in enumerate(rows):
            begin = left[i] if left else 0
            field[i, begin : begin + len(row)] = row
        fields[name] = field
    return fields


def expected(ragged: dict[str, list[Tensor]], total: int | None = None, final_target: int = 0) -> dict[str, Tensor]:
    """The columns by plain slicing."""
    lengths = [len(row) for row in next(iter(ragged.values()))]
    extra = (sum(lengths) if total is None else total) - sum(lengths)

    def column(rows: list[Any], dtype: torch.dtype, tail: int) -> Tensor:
        return torch.tensor([x for row in rows for x in row] + [tail] * extra, dtype=dtype)

    made = {name: column([row.tolist() for row in rows], rows[0].dtype, 0) for name, rows in ragged.items()}
    made["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    made["position_ids"] = column([range(L) for L in lengths], torch.int64, 0)
    made["sequence_ids"] = column([[i] * L for i, L in enumerate(lengths)], torch.int32, -1)
    if "input_ids" in ragged:
        rows = ragged["input_ids"]
        made["targets"] = column([[*row.tolist()[1:], final_target][: len(row)] for row in rows], rows[0].dtype, final_target)
    if "loss_mask" in ragged:
        made["mask"] = column([[*row.tolist()[1:], 0][: len(row)] for row in ragged["loss_mask"]], ragged["loss_mask"][0].dtype, 0)
    else:
        made["mask"] = column([[k + 1 < L for k in range(L)] for L in lengths], torch.bool, 0)
    return made


def check(packed: Packed, want: dict[str, Tensor]) -> None:
    derived = {"cu_seqlens": packed.cu_seqlens, "position_ids": packed.position_ids, "sequence_ids": packed.sequence_ids}
    found = {**packed.fields, **derived, "mask": packed.loss_mask} | ({} if packed.targets is None else {"targets": packed.targets})
    assert found.keys() == want.keys()
    for name, column in found.items():
        assert column.dtype == want[name].dtype, name
        torch.testing.assert_close(column.cpu(), want[name], rtol=0, atol=0, msg=name)


LENGTHS = [[5, 1, 3], [0, 4, 0, 0, 7, 0], [0], [1], [1300, 2, 0, 2900], [3] * 400]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padded_and_ragged_give_the_same(lengths: list[int], on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    ragged = make_ragged(lengths, device)
    width = max(lengths) + 3
    at = torch.tensor(lengths, device=device)
    check(pack(make_ragged(lengths, device) | ragged, backend=backend), expected(ragged))
    check(pack(make_padded(ragged, width), at, backend=backend), expected(ragged))
    check(
        pack(make_padded(ragged, width), at.int(), total=sum(lengths) + 5, final_target=-100, backend=backend),
        expected(ragged, sum(lengths) + 5, -100),
    )
    check(pack(ragged, total=sum(lengths) + 2000, backend=backend), expected(ragged, sum(lengths) + 2000))
    for element in (torch.bool, torch.int16, torch.int32, torch.int64):
        mask = (torch.arange(width, device=device) < at.unsqueeze(1)).to(element)
        check(pack(make_padded(ragged, width), attention_mask=mask, backend=backend), expected(ragged))
    left = [(i % 4 if i % 5 else width - L) for i, L in enumerate(lengths)]
    mask = make_padded({"mask": [torch.ones(L, device=device) for L in lengths]}, width, left)["mask"] == 1
    check(pack(make_padded(ragged, width, left), attention_mask=mask, backend=backend), expected(ragged))
    check(pack(make_padded(ragged, width, left), attention_mask=mask.long() * 3, total=sum(lengths), backend=backend), expected(ragged))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_fields_of_any_name_and_number(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    lengths = [4, 0, 9]
    many = {f"field{i}": dtype for i, dtype in enumerate([torch.float16, torch.int64, torch.int8] * 7)}  # more than one launch holds
    ragged = make_ragged(lengths, device, many)
    for packed in (pack(ragged, backend=backend), pack(make_padded(ragged, 9), torch.tensor(lengths, device=device), backend=backend)):
        assert packed.targets is None and packed.max_length == 9
        check(packed, expected(ragged))
    tokens = make_ragged(lengths, device, {"tokens": torch.int32, "learn": torch.int64})
    packed = pack(tokens, targets="tokens", loss_mask="learn", backend=backend)
    want = expected({"input_ids": tokens["tokens"], "loss_mask": tokens["learn"]})
    assert packed.targets is not None and torch.equal(packed.targets.cpu(), want["targets"])
    assert torch.equal(packed.loss_mask.cpu(), want["mask"])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_unpack_restores(side: Any, on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    for lengths in LENGTHS:
        ragged = make_ragged(lengths, device)
        packed = pack(ragged, total=sum(lengths) + 3, backend=backend)
        width = max(lengths) + 1
        padding = {"logprobs": float("-inf"), "versions": -1, "values": 0.5, "bytes": 200, "loss_mask": 1}
        padded = unpack(packed.fields, packed.cu_seqlens, max_length=width, padding=padding, side=side, backend=backend)
        lists = unpack_ragged(packed.fields, packed.cu_seqlens)
        for name, rows in ragged.items():
            assert all(torch.equal(a, b) for a, b in zip(rows, lists[name], strict=True))
            want = torch.full((len(rows), width), padding.get(name, 0)).to(rows[0].dtype)
            for i, row in enumerate(rows):
                want[i, slice(0, len(row)) if side == "right" else slice(width - len(row), width)] = row.cpu()
            assert torch.equal(padded[name].cpu(), want), name
        one = unpack(packed.fields["logprobs"], packed.cu_seqlens, side=side, backend=backend)
        assert torch.equal(one, unpack(packed.fields, packed.cu_seqlens, side=side, backend="torch")["logprobs"])
        assert one.shape == (len(lengths), max(lengths))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_gradients(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    lengths, options = [3, 0, 5], {"dtype": torch.float64, "device": device, "requires_grad": True}
    at, ids = torch.tensor(lengths, device=device), torch.zeros(3, 6, dtype=torch.int64, device=device)
    x, y = torch.randn(3, 6, **options), torch.randn(3, 6, **options)
    rows = [torch.randn(L, **options) for L in lengths]
    column = torch.randn(10, **options)
    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=device)

    def padded(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        fields = pack({"x": x, "input_ids": ids, "y": y}, at, total=9, backend=backend).fields
        return fields["x"], fields["y"] * 2

    def ragged(*rows: Tensor) -> Tensor:
        return pack({"rows": list(rows)}, total=9, backend=backend).fields["rows"]

    def back(column: Tensor) -> Tensor:
        return unpack({"x": column, "y": column * 3}, cu_seqlens, max_length=6, side="left", backend=backend)["y"]

    assert torch.autograd.gradcheck(padded, (x, y))
    assert torch.autograd.gradcheck(padded, (x, y.detach()))
    assert torch.autograd.gradcheck(ragged, rows)
    assert torch.autograd.gradcheck(back, (column,))
    assert torch.autograd.gradgradcheck(lambda x, y: padded(x**2, y), (x, y))
    assert torch.autograd.gradgradcheck(lambda column: back(column**2), (column,))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40) | st.integers(0, 2500), min_size=1, max_size=12),
    extra=st.integers(0, 30),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_any_lengths(lengths: list[int], extra: int, seed: int, on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    torch.manual_seed(seed)
    ragged = make_ragged(lengths, device, {"input_ids": torch.int32, "loss_mask": torch.uint8, "x": torch.float16})
    total = sum(lengths) + extra
    left = torch.randint(0, extra + 1, (len(lengths),)).tolist()
    fields = make_padded(ragged, max(lengths) + extra, left)
    mask = make_padded({"mask": [torch.ones(L, device=device) for L in lengths]}, max(lengths) + extra, left)["mask"] == 1
    packed = pack(fields, attention_mask=mask, total=total, backend=backend)
    check(packed, expected(ragged, total))
    check(pack(ragged, total=total, backend=backend), expected(ragged, total))
    padded = unpack(packed.fields, packed.cu_seqlens, max_length=max(lengths) + extra, backend=backend)
    want = make_padded(ragged, max(lengths) + extra)
    assert all(torch.equal(padded[n][i, :L], want[n][i, :L]) and not padded[n][i, L:].any() for n in want for i, L in enumerate(lengths))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_many_tokens(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    lengths = torch.randint(0, 700, (200,), device=device)
    lengths[7] = 70_000
    fields = {"input_ids": torch.arange(200 * 70_000, device=device, dtype=torch.int32).view(200, 70_000)}
    packed, want = (pack(fields, lengths, backend=b) for b in (backend, "torch"))
    assert len(packed.position_ids) > 100_000
    assert all(torch.equal(a, b) for a, b in zip(packed[1:-1], want[1:-1], strict=True))
    assert torch.equal(unpack(packed.fields["input_ids"], packed.cu_seqlens, backend=backend)[7], fields["input_ids"][7])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads: int) -> None:
    ragged = make_ragged([40_000, 3, 0, 20_000, 16_384, 1])
    torch.set_num_threads(threads)
    try:
        packed = pack(make_padded(ragged, 40_000), torch.tensor([40_000, 3, 0, 20_000, 16_384, 1]), backend="cpp")
    finally:
        torch.set_num_threads(1)
    check(packed, expected(ragged))


@pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp"))
def test_compiles_without_a_break(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    fields = {"input_ids": torch.randint(0, 9, (4, 6), device=device), "x": torch.randn(4, 6, device=device, requires_grad=True)}
    lengths = torch.tensor([6, 0, 2, 3], device=device)

    def step(fields: dict[str, Tensor], lengths: Tensor) -> tuple[Tensor, ...]:
        packed = pack(fields, lengths, total=16, backend=backend)
        again = unpack({"x": packed.fields["x"] * 2}, packed.cu_seqlens, max_length=6, padding=-1, backend=backend)["x"]
        return packed.targets, packed.position_ids, packed.loss_mask, again

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, want = compiled(fields, lengths), step(fields, lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    (gradient,) = torch.autograd.grad(found[-1].square().sum(), fields["x"])
    (wanted,) = torch.autograd.grad(want[-1].square().sum(), fields["x"])
    assert torch.equal(gradient, wanted)


def test_registered_as_torch_wants_it() -> None:
    ids, x, lengths = torch.randint(0, 9, (4, 6)), torch.randn(4, 6), torch.tensor([6, 0, 2, 3])
    cu_seqlens, starts = layout_op(lengths, None, 6, 11, "cpp")
    torch.library.opcheck(layout_op, (lengths, None, 6, 11, "cpp"))
    torch.library.opcheck(layout_op, (None, ids > 100, 6, -1, "cpp"))
    for backend in ("torch", "cpp"):
        torch.library.opcheck(torch.ops.areal.pack.default, ([ids, x], 2, 0, -100, -1, False, backend, 12, cu_seqlens, starts))
        torch.library.opcheck(
            torch.ops.areal.unpack.default, ([x[0], ids[1]], [0.5, 3.0], torch.tensor([0, 2, 6]).int(), starts, 4, backend)
        )


def padded_case(**changes: Any) -> tuple[Any, dict[str, Any]]:
    arguments = {"fields": {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, "lengths": torch.tensor([3, 1])} | changes
    return arguments.pop("fields"), arguments


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (({}, {}), "fields has no entries"),
        (padded_case(fields={"a": torch.zeros(2, 3), "b": [torch.zeros(3)]}), r"fields\['b'\] is ragged, the first one is not"),
        (
            padded_case(fields={"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}),
            r"fields\['b'\] has the shape \[2, 4\]; it must be \[2, 3\]",
        ),
        (padded_case(fields={"a": torch.zeros(2)}), r"fields\['a'\] has the shape \[2\]; it must be \[any, any\]"),
        (padded_case(fields={"a": torch.zeros(3, 2).T}), r"fields\['a'\] is not contiguous"),
        (padded_case(fields={"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, device="meta")}), r"fields\['b'\] is on meta"),
        (padded_case(fields={"a": torch.zeros(2, 3, dtype=torch.complex128)}), "complex128; it must be of at most 8 bytes"),
        (padded_case(lengths=None), r"either lengths \[n\] or attention_mask"),
        (padded_case(attention_mask=torch.ones(2, 3)), "either lengths"),
        (padded_case(lengths=torch.ones(2)), "lengths is float32; it must be int32 or int64"),
        (padded_case(lengths=torch.tensor([1, 2, 3])), r"lengths has the shape \[3\]"),
        (padded_case(lengths=torch.tensor([1, 4])), "lengths must be from 0 to 3"),
        (padded_case(lengths=torch.tensor([1, -1])), "lengths must be from 0 to 3"),
        (padded_case(total=3), "total=3 is less than the number of tokens"),
        (padded_case(lengths=None, attention_mask=torch.ones(2, 4).bool()), r"attention_mask has the shape \[2, 4\]"),
        (padded_case(lengths=None, attention_mask=torch.ones(2, 3)), "attention_mask is float32"),
        (padded_case(lengths=None, attention_mask=torch.tensor([[1, 0, 1], [0, 0, 0]])), "side by side"),
        (({"a": [torch.zeros(2)]}, {"lengths": torch.tensor([2])}), "for padded fields"),
        (({"a": []}, {}), r"fields\['a'\] is empty"),
        (({"a": [torch.zeros(2)], "b": []}, {}), r"fields\['b'\] has 0 tensors; it must have 1"),
        (({"a": [torch.zeros(2)], "b": [torch.zeros(3)]}, {}), r"fields\['b'\]\[0\] has the length 3; it must be 2"),
        (({"a": [torch.zeros(2), torch.zeros(1, 2)]}, {}), "not 1-D"),
        (({"a": [torch.zeros(2), torch.zeros(2).int()]}, {}), "torch.float32 and torch.int32"),
        (({"a": [torch.zeros(2), torch.zeros(2, device="meta")]}, {}), "is on cpu, meta"),
        (({"a": [torch.zeros(4)[::2]]}, {}), "not contiguous"),
        (({"a": [torch.zeros(2), [0.0]]}, {}), r"fields\['a'\] has entries that are no tensors"),
        (padded_case(total=-1), "total=-1; it must be from 0"),
        (({"a": [torch.zeros(4)]}, {"total": 3}), "total=3; it must be at least the 4 tokens"),
        (padded_case(backend="numpy"), "pack has the backends"),
    ],
)
def test_mistakes_in_pack_are_named(case: tuple[Any, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(case[0], **case[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": {}}, "packed has no entries"),
        ({"packed": torch.zeros(2, 3)}, r"packed has the shape \[2, 3\]; it must be \[any\]"),
        ({"packed": {"a": torch.zeros(5), "b": torch.zeros(6)}}, r"packed\['b'\] has the shape \[6\]; it must be \[5\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is int64; it must be int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens is empty"),
        ({"cu_seqlens": torch.tensor([0, 6]).int()}, "must ascend from 0 to at most 5"),
        ({"cu_seqlens": torch.tensor([0, 4, 2]).int()}, "must ascend"),
        ({"cu_seqlens": torch.tensor([1, 4]).int()}, "must ascend"),
        ({"max_length": 2}, "max_length=2 is less than the longest"),
        ({"max_length": -1}, "max_length=-1"),
        ({"side": "top"}, "side='top'"),
        ({"packed": torch.zeros(5).int(), "padding": 0.5}, "padding=0.5 is no int32"),
        ({"packed": torch.zeros(5).bool(), "padding": 2}, "padding=2 is no bool"),
    ],
)
def test_mistakes_in_unpack_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {"packed": torch.zeros(5), "cu_seqlens": torch.tensor([0, 2, 5]).int()} | changes
    with pytest.raises(ValueError, match=message):
        unpack(arguments.pop("packed"), arguments.pop("cu_seqlens"), **arguments)


@pytest.mark.parametrize("ends", [[0, 6], [0, 4, 2], [1, 5]])
def test_unpack_ragged_checks_where_sequences_end(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="unpack_ragged: cu_seqlens must ascend from 0"):
        unpack_ragged(torch.zeros(5), torch.tensor(ends).int())


@pytest.mark.parametrize("total", [-1, -7, 2**31])
def test_room_that_cu_seqlens_cannot_count_is_refused(total: int) -> None:
    with pytest.raises(ValueError, match=f"pack: total={total}"):
        pack({"x": torch.zeros(2, 3)}, torch.tensor([1, 2]), total=total)


def test_kernels_are_launched_on_the_device_of_the_tensors(cuda_on_host: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch goes to the current device, which need not be that of the tensors."""
    current: list[torch.device] = []

    @contextmanager
    def on_device(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    class Module:
        def __getattr__(self, name: str) -> Any:
            assert current, f"{name} is launched on whatever device is current"
            return getattr(cuda_on_host, name)

    monkeypatch.setattr(_pack_backends, "on_device", on_device)
    monkeypatch.setattr(_pack_backends, "compiled_module", Module)
    fields, lengths = {"x": torch.arange(6.0).view(2, 3)}, torch.tensor([1, 2])
    packed = pack(fields, lengths, total=3, backend="cuda")
    assert unpack(packed.fields["x"], packed.cu_seqlens, max_length=3, backend="cuda").tolist() == [[0, 0, 0], [3, 4, 0]]
    assert pack({"x": [torch.ones(2)]}, backend="cuda").fields["x"].tolist() == [1, 1]
