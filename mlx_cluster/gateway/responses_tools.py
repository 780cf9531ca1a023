"""Tools as /v1/responses declares them: functions, custom tools, and hosted ones, which are dropped and named.

Owns: their types and bounds, the way to a ``ToolUse``, how a custom tool looks to a model.
Does not own: how a model is told of tools and how its calls are read (``prepare``, ``splitter``).
Invariant: a choice that insists on a call has a tool to call, or the request is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway.ask import Tool, ToolUse
from mlx_cluster.gateway.messages_tools import MAX_TOOLS, ToolName
from mlx_cluster.gateway.schemas import Body
from mlx_cluster.request import Grammar

__all__ = ["MAX_TOOLS", "AnyChoice", "AnyTool", "custom_names", "dropped_tools", "tool_use"]


class FunctionTool(Body):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: list[Any] | None = None
    output_schema: Any = None

    def for_model(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters or {})


class CustomFormat(Body):
    type: Literal["text", "grammar"] = "text"
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(Body):
    """A tool whose input is plain text. A model sees a function with that text as its one argument."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: CustomFormat = CustomFormat()
    defer_loading: bool | None = None
    allowed_callers: list[Any] | None = None

    def for_model(self) -> Tool:
        text = {"type": "string", "description": "The tool's whole input, as plain text."}
        parameters = {
            "type": "object",
            "properties": {"input": text},
            "required": ["input"],
            "additionalProperties": False,
        }
        description = self.description or ""
        if self.format.definition is not None:
            description += (
                f"\n\nIts input follows this {self.format.syntax or 'lark'} grammar:\n{self.format.definition}"
            )
        return Tool(self.name, description.strip(), parameters, text_grammar=self.grammar())

    def grammar(self) -> Grammar | None:
        if self.format.type == "text" or self.format.definition is None:
            return None
        return Grammar("regex" if self.format.syntax == "regex" else "lark", self.format.definition)


class HostedTool(Body):
    """A tool that another service runs, or whose schema only its own models know."""

    model_config = ConfigDict(extra="allow")
    type: str


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return kind if kind in ("function", "custom") else "hosted"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(_kind),
]


class NamedChoice(Body):
    type: Literal["function", "custom"]
    name: str


class AllowedChoice(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


AnyChoice = Literal["none", "auto", "required"] | Annotated[NamedChoice | AllowedChoice, Field(discriminator="type")]


def tool_use(tools: Sequence[Any], choice: Any, *, parallel: bool) -> ToolUse | None:
    """Raises ``InvalidRequest`` for a choice that cannot be met, and for two tools of one name."""
    known = {
        tool.name: replace(tool.for_model(), schema_field=_schema_field(tool, index))
        for index, tool in enumerate(tools)
        if isinstance(tool, FunctionTool | CustomTool)
    }
    if len(known) < sum(isinstance(tool, FunctionTool | CustomTool) for tool in tools):
        raise InvalidRequest("tools: two tools have the same name: rename one", param="tools", code="invalid_value")
    only: str | None = None
    mode = choice
    if isinstance(choice, AllowedChoice):
        allowed = [tool.get("name") for tool in choice.tools if tool.get("type") in ("function", "custom")]
        known = {name: tool for name, tool in known.items() if name in allowed}
        mode = choice.mode
    elif isinstance(choice, NamedChoice):
        mode, only = "required", choice.name
        if only not in known:
            raise InvalidRequest(
                f"tool_choice.name is {only[:128]!r}, and no tool that is served here has this name",
                param="tool_choice.name",
                code="invalid_value",
            )
    if known:
        return ToolUse(tools=tuple(known.values()), choice=mode, only=only, parallel=parallel)
    if mode == "required":
        raise InvalidRequest(
            "tool_choice insists on a call, and there is no tool that is served here: send one",
            param="tool_choice",
            code="invalid_value",
        )
    return None


def _schema_field(tool: FunctionTool | CustomTool, index: int) -> str:
    return f"tools[{index}].{'parameters' if isinstance(tool, FunctionTool) else 'format.definition'}"


def custom_names(tools: Sequence[Any]) -> frozenset[str]:
    return frozenset(tool.name for tool in tools if isinstance(tool, CustomTool))


def dropped_tools(tools: Sequence[Any]) -> list[str]:
    """The hosted ones, as the header names them."""
    return [f"tools[{tool.type}]" for tool in tools if isinstance(tool, HostedTool)]
