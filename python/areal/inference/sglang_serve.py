"""``areal serve --backend sglang``: one SGLang server in the foreground, its output on the terminal."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from areal.inference.sglang import installed_version, sglang_argv, sglang_env, sglang_python
from areal.launcher.local import ChildProcess

_POLL = 0.5


def serve(
    model: Path,
    *,
    python: str,
    host: str,
    port: int,
    device: str,
    dtype: str,
    max_running_requests: int,
    max_context: int,
    threads: int,
    keep_prefixes: bool,
    options: Sequence[str],
) -> int:
    """Until the server ends or a signal comes; returns an exit code. Prints the URL to stdout once the server answers.

    ``options`` are words for SGLang's own command line, behind ours, so that they win.
    """
    python = sglang_python(python)
    argv = sglang_argv(
        model,
        port,
        host=host,
        device=device,
        dtype=dtype,
        max_running_requests=max_running_requests,
        max_context=max_context,
        keep_prefixes=keep_prefixes,
    )
    print(f"starting SGLang {installed_version(python)} of {python}", file=sys.stderr, flush=True)
    # In a session of its own: Ctrl-C comes here alone, and the server's processes end together instead of each by its own traceback.
    process = ChildProcess("SGLang", [*argv, *options], None, sglang_env(device, threads, python), python=python)
    try:
        code = _wait(process, host, port)
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
    if code:
        print(f"error: {process.describe_death()}; its last words are above", file=sys.stderr)
    return 1 if code else 0


def _wait(process: ChildProcess, host: str, port: int) -> int:
    everywhere = host in ("0.0.0.0", "::")
    near = f"http://{'127.0.0.1' if everywhere else host}:{port}/health"
    ready = False
    while (code := process.wait(_POLL)) is None:
        if not ready and (ready := _answers(near)):
            print(f"http://{socket.gethostname() if everywhere else host}:{port}", flush=True)
    return code


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # not listening yet, or 503 while it starts
        return False
