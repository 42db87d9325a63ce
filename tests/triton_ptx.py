"""Compiles a Triton kernel to PTX for a GPU that need not be there.

In a process of its own: where the tests interpret Triton, kernels cannot be compiled. ``python tests/triton_ptx.py`` is that process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any


def compile_to_ptx(
    module: str,
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    multiples_of_16: tuple[str, ...] = (),
    num_warps: int = 4,
    capability: int = 90,
) -> str:
    """The PTX of ``areal.kernels.<module>``'s jit function ``kernel`` for sm_<capability>; the cubin is made too, or this fails.

    ``signature`` has Triton's type of every argument that is no constant ("*fp32", "*bf16", "i64", "fp32"); pointers are taken to be multiples of
    16 bytes, as torch's are, and so are the integers in ``multiples_of_16`` (Triton compiles a kernel once more for an integer that is one; a
    mask that ends elsewhere makes all loads narrow). ``constants`` has the tl.constexpr arguments.
    """
    order: dict[str, Any] = {"module": module, "kernel": kernel, "signature": signature, "constants": constants, "num_warps": num_warps}
    order["aligned"] = multiples_of_16
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({**order, "capability": capability}),
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _compile(order: dict[str, Any]) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"areal.kernels.{order['module']}"), order["kernel"])
    signature = {**order["signature"], **dict.fromkeys(order["constants"], "constexpr")}
    names = list(function.arg_names)
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name in order["aligned"]
    }
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in order["constants"].items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", order["capability"], 32), options={"num_warps": order["num_warps"]})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


if __name__ == "__main__":
    sys.stdout.write(_compile(json.load(sys.stdin)))
