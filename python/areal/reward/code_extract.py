"""The program of a completion."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+#.-]*)")
_OPENS_LATE = re.compile(r"(`{3,})[ \t]*(python3?|py)[ \t]*$", re.IGNORECASE)
_DEFINED = re.compile(r"^(?:(?:async\s+)?def|class)\s+(\w+)", re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_LEAST_INDENT = 4  # spaces by which a fence inside of a block is farther in than the block's own


def extract_code(completion: str, expects: Iterable[str] = ()) -> str:
    """The last fenced block that is marked as Python, else the last plain one, else the whole text; the last may be without its end.

    Thinking does not count: only what follows the last ``</think>``.

    Args:
        expects: names that tests want; the last block that defines one of them comes before later ones (an example of a call).
    """
    completion = completion.rpartition("</think>")[2].removeprefix("\ufeff")
    python, plain = _blocks(completion)
    if not (blocks := python or plain):
        return completion
    last = next((i for i in reversed(range(len(blocks))) if defines(blocks[i], expects)), len(blocks) - 1)
    return _with_helpers(blocks[: last + 1])


def _with_helpers(blocks: list[str]) -> str:
    """The last block, after those that define what it uses and does not define."""
    program = blocks[-1]
    for block in reversed(blocks[:-1]):
        mine, words = set(_DEFINED.findall(program)), set(re.findall(r"\w+", program))
        theirs = set(_DEFINED.findall(block))
        if theirs & words and not theirs & mine:
            program = block + program
    return program


def programs(completion: str, prompt: str, expects: Iterable[str]) -> list[str]:
    """What the program may be; the first that compiles is it.

    Where the prompt is code that begins what is expected (HumanEval), the completion may go on from there, or repeat all but the imports.
    """
    source = extract_code(completion, expects)
    found = [source, textwrap.dedent(source)]
    if defines(prompt, expects):
        found = [prompt + source, f"{prompt}\n{source}", *found]
    return list(dict.fromkeys(found))


def defines(text: str, names: Iterable[str]) -> bool:
    """Whether one of the names is defined in the first column."""
    pattern = "|".join(map(re.escape, sorted(names)))
    return (
        bool(pattern) and re.search(rf"^(?:(?:async\s+)?def|class)\s+(?:{pattern})\b|^(?:{pattern})\s*[:=]", text, re.MULTILINE) is not None
    )


def _blocks(text: str) -> tuple[list[str], list[str]]:
    """The fenced blocks that are marked as Python, and those that are not marked at all."""
    python: list[str] = []
    plain: list[str] = []
    opened, indent, language, lines = "", 0, "", list[str]()
    for line in text.splitlines(keepends=True):
        fence = _FENCE.match(line)
        if opened:
            if fence and fence[2].startswith(opened) and not fence[3] and len(fence[1]) < indent + _LEAST_INDENT:
                _add(python, plain, language, lines)
                opened = ""
            else:
                lines.append(line)
        elif fence:
            opened, indent, language, lines = fence[2], len(fence[1]), fence[3].lower(), []
        elif late := _OPENS_LATE.search(line):
            opened, indent, language, lines = late[1], 0, "python", []
    if opened and language in _PYTHON:  # cut off, or closed at the end of its last line
        closed = next((number for number, line in enumerate(lines) if line.rstrip().endswith(opened)), None)
        if closed is not None:
            lines[closed:] = [lines[closed].rstrip().removesuffix(opened)]
        _add(python, plain, language, lines)
    return python, plain


def _add(python: list[str], plain: list[str], language: str, lines: list[str]) -> None:
    text = "".join(lines)
    if re.match(r"\s*\n?[ \t]", text):  # dedent also empties lines of blanks, which may be a string's
        text = textwrap.dedent(text)
    if language in _PYTHON:
        python.append(text)
    elif not language:
        plain.append(text)
