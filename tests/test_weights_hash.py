"""The weight hash: its definition in plain integers, agreement of all backends, and what it must notice."""

from __future__ import annotations

import struct
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal.ops import BackendUnavailable
from areal.ops._dispatch import build_info, compiled_module, missing_cpp
from areal.ops.weights_hash import HashedCopy, _op, copy_and_hash, tensor_key, weights_hash
from tests.op_backends import backends

needs_cpp = pytest.mark.skipif(missing_cpp() is not None, reason=str(missing_cpp()))
ALL = pytest.mark.parametrize(("backend", "device"), backends("torch", "cpp", "cuda"))
MASK = 2**64 - 1


def hash_by_definition(tensors: dict[str, Tensor]) -> int:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    total = 0
    for name, tensor in tensors.items():
        key = tensor_key(name, tensor.shape, tensor.dtype)
        data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
        data += bytes(-len(data) % 8)
        total += mix(key)
        for i, (word,) in enumerate(struct.iter_unpack("<Q", data)):
            total += mix(word ^ ((key + i * 0x9E3779B97F4A7C15) & MASK))
    return total & MASK


def some_tensors() -> dict[str, Tensor]:
    wide = torch.randn(40, 50)
    return {
        "matrix": torch.randn(33, 17),
        "half": torch.randn(5, 3).bfloat16(),
        "bytes": torch.arange(13, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": wide.t(),
        "strided": wide[3:, ::2],
        "odd offset": torch.randn(100).bfloat16()[3:],
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def place(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@ALL
def test_is_the_defined_sum(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    tensors = some_tensors()
    assert weights_hash(place(tensors, device), backend=backend) == hash_by_definition(tensors)
    assert weights_hash({}, backend=backend) == 0


def test_key_is_stable_across_processes_and_releases() -> None:
    assert tensor_key("w", (2, 3), torch.float32) == 11662625936681568773


@ALL
def test_large_tensors_agree_with_the_reference(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend
    # Beyond the chunks of all backends, and no multiple of any vector.
    tensors = {"a": torch.randn(3_000_001), "b": torch.randint(-9, 9, (1_000_003,), dtype=torch.int16)}
    assert weights_hash(place(tensors, device), backend=backend) == weights_hash(tensors, backend="torch")


@ALL
def test_notices_every_kind_of_difference(on_backend: tuple[str, str]) -> None:
    backend, device = on_backend

    def hashed(tensors: dict[str, Tensor]) -> int:
        return weights_hash(place(tensors, device), backend=backend)

    a, b = torch.randn(64, 32), torch.randn(64, 32)
    base = hashed({"a": a, "b": b})
    assert hashed({"b": b, "a": a}) == base, "the order of the tensors must not matter"
    flipped = a.clone()
    flipped.view(torch.int32)[63, 31] ^= 1
    swapped = a.clone()
    swapped[0, 0], swapped[0, 2] = a[0, 2], a[0, 0]
    others = {
        "one bit": {"a": flipped, "b": b},
        "two elements swapped": {"a": swapped, "b": b},
        "tensors swapped": {"a": b, "b": a},
        "renamed": {"a": a, "c": b},
        "reshaped": {"a": a.reshape(32, 64), "b": b},
        "other dtype": {"a": a.view(torch.int32), "b": b},
        "one missing": {"a": a},
        "one empty more": {"a": a, "b": b, "c": torch.empty(0)},
        "zeros": {"a": torch.zeros_like(a), "b": b},
        "negative zeros": {"a": -torch.zeros_like(a), "b": b},
    }
    hashes = {kind: hashed(tensors) for kind, tensors in others.items()}
    assert base not in hashes.values()
    assert len(set(hashes.values())) == len(hashes)


@ALL
def test_many_tensors_of_all_sizes_and_offsets(on_backend: tuple[str, str]) -> None:
    # Sizes around the words, vectors and chunks of the kernels, at addresses of every alignment; some are empty.
    backend, device = on_backend
    memory = torch.randint(0, 256, (400_000,), dtype=torch.uint8)
    sizes = [0, 1, 7, 8, 9, 0, 15, 16, 17, 63, 64, 65, 4096, 65535, 65536, 65537, 131072, 0]
    tensors = {f"{size} at {at} ({i})": memory[at : at + size] for i, size in enumerate(sizes) for at in (0, 1, 2, 4, 8, 16, 22)}
    on_it = memory.to(device)
    placed = {name: on_it[int(name.split()[2]) :][: len(t)] for name, t in tensors.items()}
    # Contiguous as they are, so that the kernel reads them where they lie.
    assert weights_hash(placed, backend=backend) == weights_hash(tensors, backend="torch")


DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.float64)


@ALL
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(DTYPES), st.booleans()), max_size=6))
def test_any_shape(on_backend: tuple[str, str], kinds: list[tuple[list[int], torch.dtype, bool]]) -> None:
    backend, device = on_backend
    tensors = {}
    for i, (shape, dtype, turned) in enumerate(kinds):
        tensor = torch.randint(0, 2, shape).to(dtype)
        tensors[f"{i}"] = tensor.transpose(0, -1) if turned and shape else tensor
    assert weights_hash(place(tensors, device), backend=backend) == hash_by_definition(tensors)


def test_cuda_takes_the_list_in_one_launch(cuda_on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[int, ...]] = []
    launch = cuda_on_host.weights_hash_cuda
    monkeypatch.setattr(cuda_on_host, "weights_hash_cuda", lambda *arguments: (launches.append(arguments), launch(*arguments)))
    tensors = some_tensors()
    assert weights_hash(tensors, backend="cuda") == hash_by_definition(tensors) and len(launches) == 1


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_the_registered_op(backend: str) -> None:
    tensors = [torch.randn(5, 3), torch.arange(7)]
    result = _op(tensors, [3, -5], backend)
    assert result.shape == () and result.dtype == torch.int64
    torch.library.opcheck(_op, (tensors, [3, -5], backend))


@needs_cpp
def test_instruction_sets_and_threads_give_the_same_hash_and_copy() -> None:
    info, module = build_info(), compiled_module()
    assert info is not None and module is not None
    source = torch.randint(0, 256, (20_000_005,), dtype=torch.uint8)  # large enough for several threads and for streaming stores
    for begin, size in ((0, len(source)), (1, 12_345), (5, len(source) - 5), (0, 63)):
        piece = source[begin : begin + size].clone() if begin == 0 else source[begin : begin + size]
        expected = weights_hash({"x": piece}, backend="torch")
        key = tensor_key("x", piece.shape, piece.dtype)
        for instruction_set in info["instruction_sets"]:
            for threads in (1, 3):
                for offset in (0, 1):  # aligned and unaligned targets
                    memory = torch.full((size + 64,), 7, dtype=torch.uint8)
                    target = memory[offset : offset + size]
                    row = (piece.data_ptr(), target.data_ptr(), size, key)
                    assert module.copy_and_hash([row], threads, instruction_set) == expected
                    assert torch.equal(target, piece) and memory[offset + size :].eq(7).all()
                    assert module.copy_and_hash([(piece.data_ptr(), 0, size, key)], threads, instruction_set) == expected
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        module.copy_and_hash([], 1, "mmx")


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_copy_casts_and_hashes_what_arrived(backend: str) -> None:
    sources = {"w": torch.randn(37, 5), "t": torch.randn(8, 9).t(), "n": torch.arange(5)}
    targets = {"w": torch.empty(37, 5, dtype=torch.bfloat16), "t": torch.empty(9, 8), "n": torch.empty(5, dtype=torch.int64)}
    keys = {name: tensor_key(name, target.shape, target.dtype) for name, target in targets.items()}
    copied = copy_and_hash([HashedCopy(keys[name], sources[name], targets[name]) for name in sources], backend=backend)
    assert copied == weights_hash(targets, backend="torch")
    assert torch.equal(targets["w"], sources["w"].bfloat16()) and torch.equal(targets["t"], sources["t"])


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(TypeError, match="'w' is a meta tensor"):
        weights_hash({"w": torch.empty(3, device="meta")})
    with pytest.raises(TypeError, match="'w' is a cpu tensor of layout torch"):
        weights_hash({"w": torch.eye(3).to_sparse()})

    class Subclass(Tensor):
        pass

    with pytest.raises(TypeError, match="'w' is a Subclass; give plain tensors"):
        weights_hash({"w": torch.ones(2).as_subclass(Subclass)})


@pytest.mark.gpu
def test_cuda_unaligned_views_and_mixed_devices() -> None:
    x = torch.randn(100_001, device="cuda").bfloat16()
    tensors = {"odd": x[1:], "even": x[8:], "host": torch.randn(77)}
    assert weights_hash(tensors) == weights_hash({k: v.cpu() for k, v in tensors.items()}, backend="torch")
    with pytest.raises(BackendUnavailable, match="weights_hash: backend 'cpp' was asked for, but the tensors are on a GPU"):
        weights_hash({"x": x}, backend="cpp")
