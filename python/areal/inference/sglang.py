"""The command that starts one SGLang server: arguments, environment, and the files of ours that run inside of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PLUGIN = Path(__file__).with_name("sglang_plugin")
"""On the server's PYTHONPATH; its files need nothing of areal, which the server's environment may not have."""

Option = bool | int | float | str | list[str]


def sglang_argv(model: Path, port: int, *, device: str, dtype: str, n_ranks: int, options: Mapping[str, Option]) -> list[str]:
    """What comes behind the interpreter. ``device`` is cpu or cuda:N (the first of ``n_ranks`` GPUs); ``options`` win over ours."""
    ours: dict[str, Option] = {
        "model_path": str(model),
        "host": "127.0.0.1",
        "port": port,
        "dtype": dtype,
        "tensor_parallel_size": n_ranks,
        "sleep_on_idle": True,
    }
    if device == "cpu":
        ours |= {"device": "cpu", "attention_backend": "torch_native", "grammar_backend": "none", "max_total_tokens": 65536}
    else:
        ours["base_gpu_id"] = int(device.partition(":")[2] or 0)
    words = ["-m", "sglang.launch_server"]
    for name, value in {**ours, **options}.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *value]
        elif value is not False:
            words += [flag, str(value)]
    return words


def sglang_env(device: str, threads: int) -> dict[str, str]:
    """Environment of the server's process, on top of ours."""
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(PLUGIN)}
    if device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
    return env
