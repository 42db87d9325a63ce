"""flatten_weights, unflatten_weights and their layout, on every backend."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal.ops import BackendUnavailable, WeightsLayout, flatten_weights, unflatten_weights, weights_hash
from areal.ops._dispatch import build_info, compiled_module, missing_cpp
from areal.ops.flatten_weights import _flatten_op, _unflatten_op
from areal.ops.weights_layout import LayoutEntry
from tests.op_backends import backends

ALL = pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp", "cuda"))
CPU_BACKENDS = ["torch", "cpp"] if missing_cpp() is None else ["torch"]
needs_cpp = pytest.mark.skipif(missing_cpp() is not None, reason=str(missing_cpp()))
SPECIAL = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, 1.0039062, 1.0117188, 65504.0, 1e-8]


def some_weights(device: str = "cpu") -> dict[str, Tensor]:
    memory = torch.randn(100_003, device=device)
    tensors = {
        "matrix": torch.randn(37, 19),
        "empty": torch.empty(0, 4),
        "half": torch.randn(5, 3).bfloat16(),
        "fp16": torch.randn(9).half(),
        "double": torch.randn(7, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(11),
        "special": torch.tensor(SPECIAL),
        "large": memory[1:],  # not at a multiple of 8 bytes
        "odd": memory[:41].bfloat16()[3:],
        "fp8": torch.randn(13).to(torch.float8_e4m3fn),
        "last": torch.randn(3),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}  # views into `memory` stay what they are


def bits(tensor: Tensor) -> Tensor:
    """The bytes; every not-a-number counts as the same one."""
    if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return tensor.to(dtype) if dtype is not None and tensor.dtype in floating else tensor


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, None])
def test_there_and_back(on_backend: tuple[str, str], dtype: torch.dtype | None) -> None:
    backend, device = on_backend
    tensors = some_weights(device)
    memory = torch.full((700_000,), 0xAB, dtype=torch.uint8, device=device)
    bucket, layout = flatten_weights(tensors, memory, dtype, backend)
    assert bucket.data_ptr() == memory.data_ptr() and len(bucket) == layout.nbytes
    assert memory[layout.nbytes :].eq(0xAB).all(), "nothing behind the bucket is written"
    assert all(bucket[begin:end].eq(0).all() for begin, end in layout.gaps())
    for entry in layout.entries:
        expected = cast(tensors[entry.name], dtype)
        assert entry.offset % 64 == 0 and entry.dtype == expected.dtype and entry.shape == expected.shape
        assert torch.equal(bits(bucket[entry.offset : entry.offset + entry.nbytes].view(entry.dtype)), bits(expected)), entry.name

    into = {name: torch.empty_like(tensor).fill_(1) for name, tensor in tensors.items()}
    assert unflatten_weights(bucket, layout, into, backend).keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(bits(into[name]), bits(cast(tensor, dtype).to(tensor.dtype))), name
    for name, view in unflatten_weights(bucket, layout).items():
        assert torch.equal(bits(view), bits(cast(tensors[name], dtype))) and view.shape == tensors[name].shape
        assert view.numel() == 0 or view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


@ALL
def test_targets_at_any_address(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    tensors = {f"{n}": torch.randn(n) for n in (0, 1, 3, 7, 8, 9, 31, 32, 33, 1000, 32768, 32769, 70_000)}
    for dtype, kind in ((torch.bfloat16, torch.float32), (None, torch.float32), (torch.float32, torch.bfloat16), (None, torch.bfloat16)):
        sources = {name: tensor.to(device, kind) for name, tensor in tensors.items()}
        bucket, layout = flatten_weights(sources, dtype=dtype, backend=backend)
        for begin in (0, 1, 2, 3, 5):
            memory = {name: torch.full((len(t) + 16,), 7, dtype=kind, device=device) for name, t in sources.items()}
            targets = {name: t[begin : begin + len(sources[name])] for name, t in memory.items()}
            unflatten_weights(bucket, layout, targets, backend)
            for name, source in sources.items():
                assert torch.equal(targets[name], cast(source, dtype).to(kind))
                assert memory[name][:begin].eq(7).all() and memory[name][begin + len(source) :].eq(7).all()


@settings(deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=8),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, None]),
    backend=st.sampled_from(CPU_BACKENDS),
)
def test_any_shapes(shapes: list[list[int]], dtype: torch.dtype | None, backend: str) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
    tensors = {str(i): (torch.randn(shape) * 9).to(kinds[i % 4]) for i, shape in enumerate(shapes)}
    bucket, layout = flatten_weights(tensors, dtype=dtype, backend=backend)
    assert layout == WeightsLayout.from_json(json.loads(json.dumps(layout.to_json())))
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    unflatten_weights(bucket, layout, into, backend)
    assert all(torch.equal(into[name], cast(tensor, dtype).to(tensor.dtype)) for name, tensor in tensors.items())


def test_a_bucket_has_the_hash_of_its_weights() -> None:
    tensors = some_weights()
    bucket, layout = flatten_weights(tensors, dtype=None)
    assert weights_hash(unflatten_weights(bucket, layout)) == weights_hash(tensors)
    again, _ = flatten_weights(tensors, torch.full_like(bucket, 9), None)
    assert torch.equal(again, bucket), "the bytes of a bucket follow from the weights"


def test_cuda_takes_the_list_in_one_launch(cuda_on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[int, ...]] = []
    launch = cuda_on_host.copy_list_cuda
    monkeypatch.setattr(cuda_on_host, "copy_list_cuda", lambda *arguments: (launches.append(arguments), launch(*arguments)))
    tensors = some_weights()
    bucket, layout = flatten_weights(tensors, backend="cuda")
    assert len(launches) == 1
    unflatten_weights(bucket, layout, {name: tensor.clone() for name, tensor in tensors.items()}, "cuda")
    assert len(launches) == 2


@needs_cpp
def test_instruction_sets_threads_and_streaming() -> None:
    module, info = compiled_module(), build_info()
    assert module is not None and info is not None
    n = 9_000_011  # beyond what is written around the caches
    floats = torch.randn(n)
    floats[: len(SPECIAL)] = torch.tensor(SPECIAL)
    narrow = floats.bfloat16()
    wide = narrow.float()
    for name in info["instruction_sets"]:
        for threads, at in ((1, 0), (3, 0), (2, 1)):
            for source, expected, count, conversion in ((floats, floats, 4 * n, 0), (floats, narrow, n, 1), (narrow, wide, n, 2)):
                memory = torch.full((n + 65,), 7, dtype=expected.dtype)
                target = memory[at : at + n]
                module.copy_list([(source.data_ptr(), target.data_ptr(), count, 4, conversion, 0)], threads, name)
                assert torch.equal(target[len(SPECIAL) :], expected[len(SPECIAL) :]) and torch.equal(
                    bits(target[: len(SPECIAL)]), bits(expected[: len(SPECIAL)])
                )
                clear = 4 // memory.element_size()
                assert memory[at + n : at + n + clear].eq(0).all() and memory[at + n + clear :].eq(7).all()


def test_parameters_and_their_version() -> None:
    for backend in CPU_BACKENDS:
        model = torch.nn.Linear(5, 3)
        weights = dict(model.named_parameters())
        bucket, layout = flatten_weights(weights, dtype=None, backend=backend)
        assert not bucket.requires_grad
        loss = (model.weight**2).sum()
        unflatten_weights(bucket, layout, weights, backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend: str) -> None:
    tensors = [torch.randn(5), torch.randn(3)]
    torch.library.opcheck(_flatten_op, (tensors, torch.zeros(128, dtype=torch.uint8), [0, 64], [1, 0], backend))
    torch.library.opcheck(_unflatten_op, (torch.zeros(128, dtype=torch.uint8), tensors, [0, 64], [1, 0], backend))


def test_compiles_without_graph_break() -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(70)}

    def there_and_back(tensors: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        bucket, layout = flatten_weights({name: 2 * tensor for name, tensor in tensors.items()})
        into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        unflatten_weights(bucket, layout, into)
        return bucket, list(into.values())

    bucket, into = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(tensors)
    expected_bucket, expected_into = there_and_back(tensors)
    assert torch.equal(bucket, expected_bucket)
    assert all(torch.equal(a, b) for a, b in zip(into, expected_into, strict=True))


def test_wrong_arguments() -> None:
    tensors = {"w": torch.randn(4, 3), "v": torch.randn(5)}
    bucket, layout = flatten_weights(tensors)
    for message, arguments in {
        r"flatten_weights: tensors\['w'\] is not contiguous": ({"w": torch.randn(3, 4).t()},),
        r"flatten_weights: tensors\['w'\] is a list": ({"w": [0.0]},),
        r"flatten_weights: tensors\['v'\] is on meta": ({**tensors, "v": torch.empty(5, device="meta")},),
        r"flatten_weights: tensors\['w'\] is float8_e4m3fnuz": ({"w": torch.empty(3, dtype=torch.float8_e4m3fnuz)},),
        "flatten_weights: out is float32; it must be uint8": (tensors, torch.empty(400)),
        "flatten_weights: out has 127 bytes; the layout needs 128": (tensors, torch.empty(127, dtype=torch.uint8)),
        "flatten_weights: out begins 8 bytes into its storage": (tensors, torch.empty(500, dtype=torch.uint8)[8:]),
        "flatten_weights: out is not contiguous": (tensors, torch.empty(500, dtype=torch.uint8)[::2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            flatten_weights(*arguments)
    for message, into in {
        "only one of tensors and layout has 'v'": {"w": tensors["w"]},
        r"unflatten_weights: tensors\['w'\] has the shape \[3, 4\]; it must be \[4, 3\]": {**tensors, "w": torch.empty(3, 4)},
        r"unflatten_weights: tensors\['v'\] is not contiguous": {**tensors, "v": torch.empty(10)[::2]},
    }.items():
        with pytest.raises(ValueError, match=message):
            unflatten_weights(bucket, layout, into)
    shifted = torch.zeros(200, dtype=torch.uint8)[4:]
    for into in (None, tensors):
        with pytest.raises(ValueError, match="unflatten_weights: bucket begins 4 bytes into its storage"):
            unflatten_weights(shifted, layout, into)
    with pytest.raises(ValueError, match="unflatten_weights: bucket has 64 bytes"):
        unflatten_weights(bucket[:64], layout)
    with pytest.raises(BackendUnavailable, match="flatten_weights: backend 'cuda'"):
        flatten_weights(tensors, backend="cuda")


def test_layouts_that_cannot_be() -> None:
    entry = LayoutEntry("a", (4,), torch.float32, 0)
    for other in (
        LayoutEntry("b", (4,), torch.float32, 8),  # no multiple of 64
        LayoutEntry("b", (4,), torch.float32, 0),  # over a
        LayoutEntry("b", (40,), torch.float32, 64),  # out of the bucket
        LayoutEntry("a", (4,), torch.float32, 64),  # twice
        LayoutEntry("b", (4,), torch.float8_e4m3fnuz, 64),
        LayoutEntry("b", (-4,), torch.float32, 64),
    ):
        with pytest.raises(ValueError, match="weights layout"):
            WeightsLayout((entry, other), 128)
    for data in ({}, {"nbytes": 64, "tensors": [{"name": "a"}]}, {"nbytes": 64, "tensors": [{**_described(), "dtype": "float7"}]}):
        with pytest.raises(ValueError, match="weights layout"):
            WeightsLayout.from_json(data)
    assert WeightsLayout.from_json({"nbytes": 64, "tensors": [_described()]}).entries == (entry,)


def _described() -> dict[str, object]:
    return {"name": "a", "shape": [4], "dtype": "float32", "offset": 0}
