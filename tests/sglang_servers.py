"""Real SGLang servers on a tiny random model, for tests marked ``sglang``.

The interpreter of SGLang's own environment is that of AREAL_SGLANG_PYTHON, else of .venv-sglang (``make test-sglang`` makes it).
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
import venv
from pathlib import Path
from typing import ClassVar

from areal.inference.sglang import Option, sglang_argv, sglang_env
from areal.launcher.local import ChildProcess, free_port
from tests.sglang_python import sglang_python


class SGLangServer:
    """One SGLang process on the CPU, in float32."""

    started: ClassVar[list[SGLangServer]] = []  # conftest shows the logs of those that have died beside a test that failed

    def __init__(self, model: Path, log: Path, name: str = "rollout 0", n_ranks: int = 1, **options: Option) -> None:
        python = sglang_python()
        assert python is not None
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        argv = sglang_argv(model, port, device="cpu", dtype="float32", n_ranks=n_ranks, options=options)
        self.process = ChildProcess(name, argv, log, sglang_env("cpu", 1, python, n_ranks), python=python)
        self.started.append(self)

    def wait(self, timeout: float = 110.0) -> SGLangServer:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(self.process.describe_death(40))
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return self
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.2)
        raise AssertionError(f"not ready after {timeout} s: {self.process.last_log_lines(40)}")


def fake_sglang(environment: Path, version: str) -> Path:
    """An environment that says it has SGLang; its interpreter."""
    venv.create(environment, symlinks=True, with_pip=False)
    (libraries,) = environment.glob("lib/python*/site-packages")
    about = libraries / f"sglang-{version}.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    return environment / "bin" / "python"
