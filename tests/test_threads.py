"""Threads of a run: calls that hang hold up no other call, and neither the end of the loop nor that of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from areal.threads import use_daemon_threads


def test_a_call_does_not_wait_for_those_that_hang() -> None:
    let_go = threading.Event()

    async def main() -> None:
        use_daemon_threads()
        hanging = [asyncio.ensure_future(asyncio.to_thread(let_go.wait, 60)) for _ in range(100)]
        async with asyncio.timeout(20):
            assert await asyncio.to_thread(lambda: threading.current_thread().daemon)
            with pytest.raises(ZeroDivisionError):
                await asyncio.to_thread(lambda: 1 / 0)
        for task in hanging:
            task.cancel()

    begin = time.monotonic()
    try:
        asyncio.run(main())
        assert time.monotonic() - begin < 30
    finally:
        let_go.set()


SCRIPT = """
import asyncio, time
from areal.threads import use_daemon_threads

async def main():
    use_daemon_threads()
    asyncio.ensure_future(asyncio.to_thread(time.sleep, 600))
    await asyncio.sleep(0.1)

asyncio.run(main())
print("end")
"""


def test_a_process_does_not_wait_for_a_call_that_hangs() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
