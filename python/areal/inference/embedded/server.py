"""One embedded engine as a process: ``python -m areal.inference.embedded.server --model DIR --port P``.

HTTP (http_api) and the engine (driver) share one event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from areal.launcher.local import bound_socket, die_with_parent

if TYPE_CHECKING:
    from areal.inference.embedded.engine import EmbeddedEngine

logger = logging.getLogger("areal.server")


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="areal.inference.embedded.server", description="Serve a model with the embedded engine.")
    parser.add_argument("--model", required=True, help="Hugging Face model directory")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fd", type=int, help="a socket that is bound to --host and --port already")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-running-requests", type=int, default=64, help="sequences decoded at once")
    parser.add_argument("--max-context", type=int, default=0, help="longest prompt + answer in tokens; 0 = the model's own limit")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine")
    parser.add_argument("--update-mode", default="retract", choices=["retract", "in_place"], help="K/V of running sequences at an update")
    parser.add_argument("--deterministic", action="store_true", help="bit-for-bit repeatable answers (cpu, one thread)")
    return parser.parse_args(argv)


def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    if not any((Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def build_engine(args: argparse.Namespace) -> EmbeddedEngine:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is imported; set_num_threads does not reach every library
    import torch
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    from areal.inference.embedded.engine import EmbeddedEngine
    from areal.inference.embedded.selfcheck import check_engine

    disable_progress_bar()
    torch.set_num_threads(args.threads)
    check_engine(AutoConfig.from_pretrained(args.model, local_files_only=True))
    return EmbeddedEngine(
        args.model,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        max_running_requests=args.max_running_requests,
        max_context=args.max_context,
        deterministic=args.deterministic,
        update_mode=args.update_mode,
        tokenizer=_load_tokenizer(args.model),
    )


async def serve(args: argparse.Namespace, engine: EmbeddedEngine, bound: socket.socket) -> int:
    """Until a signal comes (0), or the engine fails (1): a server without an engine must not look alive."""
    from aiohttp import web

    from areal.inference.embedded.http_api import EngineServer

    ended = asyncio.Event()
    server = EngineServer(engine, args.model, on_failure=ended.set)
    runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=2.0)
    await runner.setup()
    await server.start()
    await web.SockSite(runner, bound, backlog=1024).start()
    logger.info("serving %s on http://%s:%d (%s)", args.model, args.host, args.port, args.device)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    await server.stop()
    await runner.cleanup()
    if server.failure is None:
        return 0
    print(f"error: the engine failed: {server.failure!r}; the traceback is above", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    args = _parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        bound = bound_socket(args.host, args.port) if args.fd is None else socket.socket(fileno=args.fd)
        engine = build_engine(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return asyncio.run(serve(args, engine, bound))


if __name__ == "__main__":
    die_with_parent()  # not in main: `areal serve` may outlive the shell that started it
    sys.exit(main())
