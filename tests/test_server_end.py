"""How a rollout server ends: with its engine, and at once where it cannot listen."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import pytest
from rollout_servers import make_model

from areal.config import GenerationConfig, GRPOConfig, RolloutConfig
from areal.inference.client import RolloutClient, ServerDied
from areal.inference.embedded.server import main
from areal.inference.servers import start_server
from areal.launcher.local import ChildProcess
from areal.types import ModelRequest

pytestmark = pytest.mark.timeout(120)
_LONG = GenerationConfig(max_new_tokens=500, ignore_eos=True)
FAILING = """
import sys
from areal.inference.embedded import engine, server
step = engine.EmbeddedEngine.step
def fail(self):
    if self.tokens_generated > 200:  # more than the self-check of a start generates
        raise RuntimeError("CUDA error: an illegal memory access")
    return step(self)
engine.EmbeddedEngine.step = fail
sys.exit(server.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


def test_a_server_whose_engine_failed_exits_with_the_reason(model: Path, tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        bound.listen()  # so that the client may come before the server is ready
        argv = ["-c", FAILING, "--model", str(model), "--port", "0", "--fd", str(bound.fileno())]
        process = ChildProcess("rollout 0", argv, tmp_path / "log", pass_fds=(bound.fileno(),))

    async def generate() -> None:
        client = RolloutClient(RolloutConfig(max_restarts=0), [url], [process])
        with pytest.raises(ServerDied, match="rollout 0 .* exited with code 1; (.|\n)*illegal memory access"):
            async with asyncio.timeout(90):
                await client.agenerate(ModelRequest([3], _LONG))
        await client.close()

    try:
        asyncio.run(generate())
        assert process.last_log_lines(1).startswith("error: the engine failed")
    finally:
        process.terminate()


def test_a_port_in_use_is_a_sentence(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--model", str(model), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use); give another --host or --port" in capsys.readouterr().err


def test_a_starting_server_already_owns_its_port(model: Path, tmp_path: Path) -> None:
    """Nobody else can answer at an address that a run waits for."""
    config = GRPOConfig.model_validate({"actor": {"path": str(model)}, "train_dataset": {"type": "arithmetic"}})

    async def start() -> None:
        server = await start_server(config, model, tmp_path, 0)
        try:
            argv = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
            assert argv[argv.index("--port") + 1] == server.url.rpartition(":")[2] and "--fd" in argv
        finally:
            server.process.terminate()

    assert sys.platform == "linux"
    asyncio.run(start())
