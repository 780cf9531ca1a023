"""The error tree of the project, in one place.

Owns: every typed error that crosses a module border, its stable ``code`` and who should act on it.
Does not own: how a dialect prints an error (``gateway.errors`` maps this tree to HTTP).
Invariant: a message names the value that is wrong and the remedy.
"""

from __future__ import annotations

from typing import ClassVar


class ClusterError(Exception):
    """Root of the tree. ``code`` is stable and machine readable; the message is for a person."""

    code: ClassVar[str] = "internal_error"


# -- the operator acts -------------------------------------------------------------------------


class ConfigError(ClusterError):
    """A setting is unknown, has a bad value or contradicts another one.

    ``file`` and ``line`` name the place where it stands, ``key`` its dotted path.
    """

    code = "config_error"

    def __init__(
        self, message: str, *, key: str | None = None, file: str | None = None, line: int | None = None
    ) -> None:
        place = file if line is None else f"{file}:{line}"
        super().__init__(f"{place}: {message}" if place else message)
        self.key, self.file, self.line = key, file, line


class PlanError(ClusterError):
    """A plan does not cover every layer exactly once, or a model does not fit the nodes."""

    code = "plan_error"


class CheckpointError(ClusterError):
    """A model directory or repository lacks something, or cannot be reached."""

    code = "checkpoint_error"


class UnsupportedModel(ClusterError):
    """This model family cannot be cut into slices; the message says why."""

    code = "unsupported_model"


class PortInUse(ClusterError):
    """A port that this node needs is taken by another program."""

    code = "port_in_use"


# -- the client acts ---------------------------------------------------------------------------


class InvalidRequest(ClusterError):
    """The request itself is wrong. ``param`` names the field, ``code`` may be more exact."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code  # type: ignore[misc]  # an instance may be more exact than its class


class IdempotencyKeyReused(InvalidRequest):
    """An ``Idempotency-Key`` that stands for another body."""

    code = "idempotency_key_reused"


class Superseded(ClusterError):
    """The same ``Idempotency-Key`` came again: whoever attached last has the answer."""

    code = "superseded"


class ModelNotFound(InvalidRequest):
    """No pipeline serves this model name."""

    code = "model_not_found"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class Overloaded(ClusterError):
    """The queue is full; the client should come back after ``retry_after_seconds``."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QueueTimeout(Overloaded):
    """The request waited for a row as long as it may; it was not begun."""

    code = "queue_timeout"


# -- the cluster acts (and a client may retry) --------------------------------------------------


class Unavailable(ClusterError):
    """The pipeline is not ready to serve: loading, or lost."""

    code = "unavailable"

    def __init__(self, message: str, *, retry_after_seconds: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Recovering(Unavailable):
    """What served a moment ago is being brought up again: worth waiting for."""

    code = "recovering"


class StageLost(Recovering):
    """A stage died, hung or was fenced while it held this work."""

    code = "stage_lost"


class StageStartError(ClusterError):
    """A stage process could not be started, could not load its slice or could not link."""

    code = "stage_start_error"


class RowFailed(ClusterError):
    """A stage could not execute one sequence; others are not touched."""

    code = "row_failed"


class DeadlineExceeded(ClusterError):
    """Something did not answer within the time it was given."""

    code = "deadline_exceeded"


class Fenced(ClusterError):
    """A message carries an epoch older than the one in force."""

    code = "fenced"


class LinkError(ClusterError):
    """A link between two stages failed. Every link raises only errors below this one."""

    code = "link_error"


class LinkUnavailable(LinkError):
    """The link could not be brought up (``auto`` may try another kind)."""

    code = "link_unavailable"


class LinkClosed(LinkError):
    """The peer is gone."""

    code = "link_closed"


class LinkTimeout(LinkError):
    """The peer did not deliver, or did not take, a frame within the deadline."""

    code = "link_timeout"


class LinkMismatch(LinkError):
    """The peer speaks of another epoch, plan, frame order or shape."""

    code = "link_mismatch"
