"""What a model can call while it answers, and how a call looks in its text."""

from areal.tool_calls import ToolCall
from areal.workflow.tools.formats import FORMATS, HermesFormat, PythonFormat, ToolFormat
from areal.workflow.tools.tool import Tool

__all__ = ["FORMATS", "HermesFormat", "PythonFormat", "Tool", "ToolCall", "ToolFormat"]
