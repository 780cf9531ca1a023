"""Tools as /v1/messages declares them: a client's own, and hosted ones, which are dropped and named.

Owns: their types and bounds, the way to a ``ToolUse``.
Does not own: how a model is told of tools and how its calls are read (``prepare``, ``splitter``).
Invariant: a choice that insists on a call has a tool to call, or the request is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway.ask import Tool, ToolUse
from mlx_cluster.gateway.schemas import Body

MAX_TOOLS = 512
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class ClientTool(Body):
    """A tool that the client runs. What else it may say of it is about how it is loaded, or cached."""

    name: ToolName
    input_schema: dict[str, Any]
    description: str = ""
    type: Literal["custom"] | None = None
    cache_control: Any = None
    strict: bool | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[Any] | None = None
    allowed_callers: list[Any] | None = None


class HostedTool(Body):
    """A tool that another service runs, or whose schema only its own models know."""

    model_config = ConfigDict(extra="allow")
    type: str
    name: str | None = None


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "hosted" if isinstance(kind, str) and kind != "custom" else "client"


AnyTool = Annotated[Annotated[ClientTool, Tag("client")] | Annotated[HostedTool, Tag("hosted")], Discriminator(_kind)]


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


_CHOICES: Mapping[str, Literal["none", "auto", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def tool_use(tools: Sequence[ClientTool | HostedTool], choice: ToolChoice | None) -> ToolUse | None:
    """Raises ``InvalidRequest`` for a choice that cannot be met, and for two tools of one name."""
    known = [tool for tool in tools if isinstance(tool, ClientTool)]
    names = [tool.name for tool in known]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"tools: two tools have the name {name!r}: rename one", param="tools")
    if choice is not None and choice.type == "tool" and choice.name not in names:
        raise InvalidRequest(
            f"tool_choice.name is {choice.name!r}, and no tool that is served here has this name",
            param="tool_choice.name",
            code="invalid_value",
        )
    if not known:
        if choice is not None and choice.type == "any":
            raise InvalidRequest(
                "tool_choice.type is 'any', and there is no tool that is served here: send one",
                param="tool_choice",
                code="invalid_value",
            )
        return None
    choice = choice if choice is not None else ToolChoice(type="auto")
    return ToolUse(
        tools=tuple(
            Tool(tool.name, tool.description, tool.input_schema, f"tools[{index}].input_schema")
            for index, tool in enumerate(tools)
            if isinstance(tool, ClientTool)
        ),
        choice=_CHOICES[choice.type],
        only=choice.name if choice.type == "tool" else None,
        parallel=not choice.disable_parallel_tool_use,
    )


def dropped_tools(tools: Sequence[ClientTool | HostedTool]) -> list[str]:
    """The hosted ones, as the header names them."""
    return [f"tools[{tool.type}]" for tool in tools if isinstance(tool, HostedTool)]
