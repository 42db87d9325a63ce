"""An agent that somebody already has, as a workflow: an OpenAI-compatible endpoint in front of the rollout servers.

An episode opens a session and gives its key to the agent as the API key. Every call is generated through the episode's engine, recorded
token by token, and exported as sequences to train on. Nothing here talks to a server itself.
"""

from areal.agent.endpoint import AgentEndpoint
from areal.agent.workflow import AgentWorkflow
from areal.tool_calls import ToolCall, hermes

__all__ = ["AgentEndpoint", "AgentWorkflow", "ToolCall", "hermes"]
