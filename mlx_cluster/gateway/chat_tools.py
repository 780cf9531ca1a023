"""Tools as /v1/chat/completions declares, chooses and remembers them.

Owns: their types and bounds, the way to a ``ToolUse``, calls in a conversation's history.
Does not own: how a model is told of tools and how its calls are read (``prepare``, ``splitter``).
Invariant: a choice that insists on a call has a tool to call, or the request is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from pydantic_core import from_json

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway.ask import Tool, ToolUse
from mlx_cluster.gateway.body import Body

MAX_TOOLS = 512
MAX_CALLS = 256  # of one message
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class Function(Body):
    """``strict`` asks that arguments follow the schema: they do wherever a call is required, with or without it."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: ToolName


class NamedChoice(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedChoice]


class AllowedChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "word"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "allowed" if kind == "allowed_tools" else "named"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedChoice, Tag("named")]
    | Annotated[AllowedChoice, Tag("allowed")],
    Discriminator(_kind),
]


class Called(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str = ""


class ToolCall(Body):
    """A call in the history, as an answer brought it. ``index`` stands in what some clients add up from a stream."""

    id: Annotated[str, Field(max_length=256)] = ""
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """Templates print the arguments as JSON themselves, so they get the object; cut ones stay text."""
        arguments: Any = self.function.arguments
        try:
            arguments = from_json(arguments or "{}", allow_inf_nan=False)
        except ValueError:
            pass
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


def tool_use(tools: Sequence[FunctionTool], choice: Any, *, parallel: bool) -> ToolUse | None:
    """Raises ``InvalidRequest`` for a choice that cannot be met, and for two tools of one name."""
    known = {tool.function.name: _tool(tool.function) for tool in tools}
    if len(known) < len(tools):
        raise _invalid("tools: two tools have the same name: rename one", "tools")
    mode: Literal["none", "auto", "required"] = "auto"
    only: str | None = None
    match choice:
        case "none" | "auto" | "required":
            mode = choice
        case NamedChoice():
            mode, only = "required", choice.function.name
            _check_known([only], known)
        case AllowedChoice():
            mode = choice.allowed_tools.mode
            allowed = [tool.function.name for tool in choice.allowed_tools.tools]
            _check_known(allowed, known)
            known = {name: known[name] for name in allowed}
    if not known:
        if mode == "required":
            raise _invalid("tool_choice insists on a call, and there are no tools: send some", "tool_choice")
        return None
    return ToolUse(tuple(known.values()), mode, only, parallel)


def _tool(function: Function) -> Tool:
    return Tool(function.name, function.description or "", function.parameters or {})


def _check_known(names: Sequence[str], known: dict[str, Tool]) -> None:
    for name in names:
        if name not in known:
            raise _invalid(f"tool_choice names {name!r}, and no tool of this request has this name", "tool_choice")


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
