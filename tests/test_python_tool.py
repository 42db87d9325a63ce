"""The Python tool: what code that a model wrote gives back, in the sandbox and in an episode."""

from __future__ import annotations

import asyncio
from typing import Any

import psutil
import pytest
from chat_templates import byte_tokenizer
from scripted_engine import ScriptedEngine

from areal.config import GenerationConfig
from areal.reward import RewardService
from areal.reward.run_python import RunPython, clip
from areal.reward.sandbox.limits import Limits
from areal.types import Trajectory
from areal.workflow import EpisodeDropped, ToolCall, ToolWorkflow, to_trajectory
from areal.workflow.tools.formats import HermesFormat, PythonFormat
from areal.workflow.tools.python import python_tool

RUN = RunPython(limits=Limits(cpu_seconds=2.0, wall_seconds=60.0, output_bytes=10_000))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("6*7", "42\n"),
        ("print(3)\n4", "3\n4\n"),
        ("x = 3", ""),
        ("None", ""),
        ("", ""),
        ("'it\\'s'", '"it\'s"\n'),
        ("def double(n):\n    return 2 * n\n\nif __name__ == '__main__':\n    print(double(4))", "8\n"),
        ("import math\nmath.comb(5, 2)", "10\n"),
        ("import sys\nprint('no', file=sys.stderr)\nsys.exit(3)", "no\n"),
        ("import os\nos._exit(3)", "Error: the program failed, and printed nothing"),
        ("x = '''{}'''\nx.format(1)", "'1'\n"),
        ("1/0", 'Traceback (most recent call last):\n  File "tool.py", line 1, in <module>\n    1/0\n'),
        ("x = (1\ny", '  File "tool.py", line 1\n    x = (1\n        ^\nSyntaxError: '),
        ("(" * 300, '  File "tool.py", line 1\n'),
    ],
)
def test_what_code_gives_back(code: str, told: str) -> None:
    text = RUN(code)
    assert text == told or (told.startswith(("Traceback", "  File")) and text.startswith(told)), text
    assert "harness" not in text and "solution.py" not in text


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print(1, flush=True)\nwhile True: pass", "1\nError: the program was ended: its CPU time ran out"),
        ("while True: print('a' * 1000)", "Error: the program was ended: it printed too much"),
        ("x = bytearray(1 << 40)", "MemoryError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "Error"),
        ("open('/work/x', 'w')", "Error"),
    ],
)
def test_limits_are_told(code: str, told: str) -> None:
    assert told in RUN(code)


def test_nothing_is_kept() -> None:
    assert RUN("import builtins, os\nbuiltins.left = 1\nopen('left', 'w').close()\nos.listdir()") == "['left']\n"
    assert RUN("import builtins, os\nhasattr(builtins, 'left'), os.listdir()") == "(False, [])\n"


async def length(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **row: Any) -> float:
    return float(len(completions))


def _episode(tokenizer: Any, format: str, *texts: str, **row: Any) -> Trajectory:
    workflow = ToolWorkflow(length, GenerationConfig(max_new_tokens=400), tokenizer, format=format, tool_timeout=60)
    engine = ScriptedEngine(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))

    async def main() -> Trajectory:
        async with RewardService(timeout=60):
            return to_trajectory(await workflow.arun_episode(engine, row))

    return asyncio.run(main())


def test_fenced_blocks() -> None:
    tokenizer = byte_tokenizer("none")
    texts = ["So:\n```text\n1\n```\n", "```python\nx = 6*7\nprint(x)\n```\n", "```py\n1/0\n```\n", "It is 42.<|endoftext|>"]
    t = _episode(tokenizer, "python", *texts, prompt="6*7?\n")
    whole = tokenizer.decode(t.input_ids)
    results = ["", "```output\n42\n```\n"]  # a block of text is no call: the model goes on at once
    assert whole.startswith("6*7?\n" + texts[0] + texts[1] + results[1] + texts[2] + "```output\nTraceback")
    assert whole.endswith("ZeroDivisionError: division by zero\n```\n" + texts[3])
    assert tokenizer.decode(t.input_ids[t.loss_mask]) == "".join(texts)


def test_through_a_template() -> None:
    tokenizer = byte_tokenizer("qwen2.5")
    call = '<tool_call>\n{"name": "python", "arguments": {"code": "print(6*7)"}}\n</tool_call><|im_end|>'
    t = _episode(tokenizer, "hermes", call, "42.<|im_end|>", messages=[{"role": "user", "content": "6*7?"}])
    text = tokenizer.decode(t.input_ids)
    assert '"name": "python"' in text and "<tool_response>\n42\n\n</tool_response>" in text and text.endswith("\n42.<|im_end|>")


def test_faults_of_the_sandbox_are_no_answer() -> None:
    tool = python_tool(timeout=60)

    async def main() -> None:
        async with RewardService(timeout=60):
            assert "unexpected keyword argument 'program'" in await tool.result({"program": "1"})
            assert await tool.result({"code": "1"}) == "1\n"
            fork_servers = [p for p in psutil.Process().children(recursive=True) if any("areal_sandbox" in word for word in p.cmdline())]
            assert fork_servers
            call = asyncio.create_task(tool.result({"code": "import time\ntime.sleep(50)"}))
            await asyncio.sleep(0.5)
            for process in fork_servers:
                process.kill()
            with pytest.raises(EpisodeDropped, match="SandboxError: .*fork server") as caught:
                await call
            assert caught.value.cause == "tool_failed"
            assert await tool.result({"code": "1"}) == "1\n"  # with another one

    asyncio.run(main())


def test_formats_read_calls() -> None:
    python = PythonFormat()
    assert python.parse("```python\n1\n```\n")[0].arguments == {"code": "1\n"}  # type: ignore[index]
    assert [python.parse(text) for text in ("", "1", "```\n1\n```\n", "```python\n1\n```\nand", "```text\n```\n```\n")] == [None] * 5
    hermes = HermesFormat()
    read = hermes.parse('a<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call> <tool_call>{"name": "g"}')
    assert read is not None and [(call.name, call.arguments, call.error) for call in read] == [("f", {"x": 1}, ""), ("g", {}, "")]
    assert hermes.parse("no call") is None
    for broken in ("[1]", "{", '{"arguments": {}}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}', '"f"'):
        assert hermes.parse(f"<tool_call>{broken}</tool_call>")[0].error, broken  # type: ignore[index]


def test_long_results_lose_their_middle() -> None:
    assert clip("a" * 10, 10) == "a" * 10
    assert clip("a" * 50 + "b" * 51, 20) == "a" * 10 + "\n[81 characters left out]\n" + "b" * 10


@pytest.mark.parametrize("max_result_chars", [100, 4000, 50_000])
def test_megabytes_are_told_without_their_middle(max_result_chars: int) -> None:
    """Whatever their characters need on their way from the worker."""
    workflow = ToolWorkflow(
        length, GenerationConfig(), byte_tokenizer("none"), format="python", tool_timeout=60, max_result_chars=max_result_chars
    )

    async def main() -> None:
        async with RewardService(timeout=60):
            for printed in ("x", "\U0001f600", "\x01"):
                text = await workflow._result(ToolCall("python", {"code": f"print({printed!r} * 1_000_000)"}))
                assert text.startswith(printed) and text.endswith(printed + "\n") and len(text) <= min(max_result_chars, 4900)
                assert text.count(printed) + int(text.partition("[")[2].partition(" characters left out")[0]) == 1_000_000
            assert "TypeError: code is a string, not int" in await workflow._result(ToolCall("python", {"code": 7}))

    asyncio.run(main())
