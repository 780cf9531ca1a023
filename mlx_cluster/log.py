"""Structured logs: one line per event, to standard error, human readable or JSON.

Invariant: no prompt text, no token ids, no keys in a log line.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

LogFormat = Literal["console", "json"]


def configure(level: str = "info", log_format: LogFormat = "console", **context: Any) -> None:
    """Set up structlog for this process; ``context`` (node, stage …) stands in every line."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            exception_formatter=structlog.dev.plain_traceback,  # the default prints local variables: token ids, keys
        )
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info if log_format == "json" else _keep,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**context)


# Until ``configure`` is called (a library's user, a test) all is as structlog has it, but for tracebacks: its own print
# every frame's local variables, which are nobody's to read and take a second.
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)


def get(name: str) -> Any:
    """A logger whose lines carry ``unit=name``."""
    return structlog.get_logger(unit=name)


def _keep(_logger: Any, _name: str, event: Any) -> Any:
    return event
