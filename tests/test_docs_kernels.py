"""docs/kernels.md: its Python runs as it stands, and every public name is on the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from areal import ops

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"


def blocks() -> list[tuple[int, str]]:
    """(line, source) of every ```python block."""
    text = PAGE.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def test_the_examples_run_in_their_order(areal_ops: Callable[[str], None]) -> None:
    areal_ops("")
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "kernels"}
    found = blocks()
    assert len(found) > 10
    for line, source in found:
        # Blank lines before it, so that a traceback names the page's line.
        exec(compile("\n" * line + source, str(PAGE), "exec"), namespace)


@pytest.mark.parametrize("name", ops.__all__)
def test_every_public_name_is_on_the_page(name: str) -> None:
    assert re.search(rf"\b{name}\b", PAGE.read_text())
