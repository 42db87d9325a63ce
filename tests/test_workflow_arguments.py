"""``workflow_kwargs``: what does not fit is one sentence when the workflow is made, and never passed over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from chat_templates import byte_tokenizer

from areal.agent import AgentWorkflow, hermes
from areal.config import ConfigError, GenerationConfig
from areal.config_load import load_expr_config
from areal.workflow import MultiTurnWorkflow, ToolWorkflow
from areal.workflow.arguments import check_arguments
from areal.workflow.build import build_workflow

if TYPE_CHECKING:
    from nowhere import Tokenizer

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "arithmetic.yaml")
TOKENIZER = byte_tokenizer()


class Agent:
    def __init__(self, tries: int = 2, mode: Literal["a", "b"] = "a", limit: float = None) -> None:  # type: ignore[assignment]  # noqa: RUF013
        self.tries = tries

    async def run(self, data: dict[str, Any], base_url: str, api_key: str) -> float:
        return 1.0


async def agent(data: dict[str, Any], base_url: str, api_key: str) -> float:
    return 1.0


class Workflow:
    def __init__(self, n: int = 1) -> None:
        if n > 3:
            raise ValueError(f"n={n} is too many")

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> None:
        return None


an_object = Workflow()


def build(*words: str) -> Any:
    config, _ = load_expr_config([EXAMPLE, *words])
    return build_workflow(config, TOKENIZER)


MULTI_TURN = ("workflow=areal:MultiTurnWorkflow",)
AGENT = ("workflow=areal.agent:AgentWorkflow", f"workflow_kwargs.agent={__name__}:Agent")
TOOLS = ("workflow=areal:ToolWorkflow", "workflow_kwargs.format=python")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("workflow_kwargs.foo=1",), "RLVRWorkflow.* cannot be made: .*'foo'"),
        ((f"workflow={__name__}:agent", "workflow_kwargs.export_style=individual"), "is not a class .*areal.agent:AgentWorkflow"),
        ((f"workflow={__name__}:an_object", "workflow_kwargs.n=2"), "workflow_kwargs were given, but the workflow .* is not a class"),
        ((f"workflow={__name__}:Workflow", "workflow_kwargs.n=4"), "cannot be made: n=4 is too many"),
        ((f"workflow={__name__}:Workflow", "workflow_kwargs.n=x"), "workflow_kwargs.n is 'x', but Workflow takes int"),
        ((*MULTI_TURN, "workflow_kwargs.max_turns=2.5"), "workflow_kwargs.max_turns is 2.5, but MultiTurnWorkflow takes int"),
        ((*MULTI_TURN, "workflow_kwargs.max_turns=null"), "workflow_kwargs.max_turns is None"),
        ((*MULTI_TURN, "workflow_kwargs.reward_timeout=soon"), r"reward_timeout is 'soon', but MultiTurnWorkflow takes float \| None"),
        (
            (*MULTI_TURN, "workflow_kwargs.gconfig.top_p=0.5"),
            "workflow_kwargs.gconfig is .*leave it out: the keys of gconfig are the run's",
        ),
        ((*AGENT, "workflow_kwargs.turn_discount=much"), "turn_discount is 'much'"),
        ((*AGENT, "workflow_kwargs.turn_discount=-3"), "turn_discount=-3 of AgentWorkflow is not a discount"),
        ((*AGENT, "workflow_kwargs.port=70000"), "port=70000 of AgentWorkflow is no port"),
        ((*AGENT, "workflow_kwargs.tool_parser=foo"), "tool_parser='foo' cannot be imported"),
        ((*AGENT, "workflow_kwargs.agent_kwargs=3"), "agent_kwargs of AgentWorkflow is a int"),
        ((*AGENT, "workflow_kwargs.agent_kwargs.mode=c"), r"agent_kwargs.mode is 'c', but Agent takes Literal\['a', 'b'\]"),
        ((*TOOLS, "workflow_kwargs.isolation=none"), "workflow_kwargs.isolation is 'none'"),
        ((*TOOLS, "workflow_kwargs.tool_timeout=-1"), "cannot be made: Limits"),
    ],
)
def test_mistakes_are_one_sentence(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(*words)


def test_arguments_that_an_object_cannot_take_are_told_in_a_script_too() -> None:
    config, _ = load_expr_config([EXAMPLE])
    with pytest.raises(ConfigError, match="is not a class"):
        build_workflow(config, TOKENIZER, an_object, {"n": 2})


def test_what_fits_is_taken() -> None:
    workflow = build(
        *MULTI_TURN, "workflow_kwargs.turn_discount=1", "workflow_kwargs.reward_timeout=2", "workflow_kwargs.enable_thinking=null"
    )
    assert isinstance(workflow, MultiTurnWorkflow) and workflow.turn_discount == 1
    assert isinstance(build(*TOOLS, "workflow_kwargs.tools=python"), ToolWorkflow)
    assert isinstance(build(*AGENT, "workflow_kwargs.agent_kwargs={tries: 4, limit: null}"), AgentWorkflow)
    assert build(*AGENT, "workflow_kwargs.tool_parser=areal.agent:hermes")._chat._tool_parser is hermes


def test_annotations_that_cannot_be_read_are_left_alone() -> None:
    class Odd:
        def __init__(self, tokenizer: Tokenizer, n: int = 1) -> None: ...

    check_arguments(Odd, {"n": "x"}, "kwargs")
    check_arguments(dict, {"n": "x"}, "kwargs")
    check_arguments(agent, {"n": "x"}, "kwargs")
    check_arguments(MultiTurnWorkflow, {"gconfig": GenerationConfig()}, "kwargs")
