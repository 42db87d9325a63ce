"""Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from areal.launcher.local import ChildProcess, free_port

CHILD = "from areal.launcher.local import die_with_parent; die_with_parent(); import time; print('up', flush=True); time.sleep(60)"


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_terminate_ends_the_process_and_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('up', flush=True); time.sleep(60)"
    child = ChildProcess("parent", ["-c", code], tmp_path / "log")
    wait_until(lambda: "up" in child.last_log_lines())
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children()]
    assert len(family) == 2
    child.terminate(grace=2)
    wait_until(lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in family))


def test_a_group_ends_with_its_leader_and_gets_no_signal_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    child = ChildProcess("leader", ["-c", code], tmp_path / "log")
    wait_until(lambda: child.last_log_lines().strip().isdigit())
    left = psutil.Process(int(child.last_log_lines()))
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert left.is_running()
    assert child.wait(5) == 0
    wait_until(lambda: not left.is_running() or left.status() == psutil.STATUS_ZOMBIE)
    # From here on its number may be that of another group.
    sent: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: sent.append(number))
    child.terminate()
    child.kill()
    child.kill_soon()
    assert not sent and child.poll() == 0


def test_death_is_described_with_name_cause_and_last_lines(tmp_path: Path) -> None:
    child = ChildProcess("rollout 3", ["-c", "import sys; print('line'); sys.exit('the reason')"], tmp_path / "log")
    wait_until(lambda: child.poll() is not None)
    text = child.describe_death()
    assert "rollout 3" in text and "exited with code 1" in text and "the reason" in text
    killed = ChildProcess("trainer 0", ["-c", CHILD], tmp_path / "log2")
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: killed.poll() is not None)
    assert "was killed by SIGKILL" in killed.describe_death()


@pytest.mark.parametrize("stop_signal", [signal.SIGKILL, signal.SIGTERM])
def test_child_dies_when_its_parent_is_killed(tmp_path: Path, stop_signal: int) -> None:
    parent_code = (
        f"from areal.launcher.local import ChildProcess; from pathlib import Path; import time;"
        f"c = ChildProcess('c', ['-c', {CHILD!r}], Path({str(tmp_path / 'log')!r})); print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    wait_until(lambda: (tmp_path / "log").read_text() == "up\n")
    parent.send_signal(stop_signal)
    parent.wait(10)
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_free_port_is_free() -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", free_port()))
