"""The table from errors to HTTP: complete, and silent about what is nobody's business."""

from __future__ import annotations

import pytest

from mlx_cluster import errors
from mlx_cluster.gateway.errors import FORMS, error_body, error_headers, form_of, is_internal


def test_every_error_a_client_may_meet_stands_in_the_table() -> None:
    named = {
        "InvalidRequest": 400,
        "ContextLengthExceeded": 400,
        "ModelNotFound": 404,
        "Overloaded": 429,
        "QueueTimeout": 503,
        "Unavailable": 503,
        "StageLost": 503,
        "RowFailed": 500,
        "DeadlineExceeded": 504,
        "Superseded": 409,
    }
    assert {kind.__name__: FORMS[kind].status for kind in FORMS if kind.__module__ == "mlx_cluster.errors"} == named


@pytest.mark.parametrize("error", [ValueError("secret"), errors.ConfigError("secret"), errors.LinkClosed("secret")])
def test_any_other_error_is_internal_and_says_only_the_request_id(error: Exception) -> None:
    assert is_internal(error)
    body = error_body(error, "req_1")["error"]
    assert "secret" not in str(body)
    assert "req_1" in body["message"]
    assert (form_of(error).status, body["type"], body["param"], body["code"]) == (
        500,
        "server_error",
        None,
        "internal_error",
    )
    assert error_headers(error) == {"x-should-retry": "false"}


def test_retry_after_is_whole_seconds_and_milliseconds() -> None:
    assert error_headers(errors.Overloaded("full", retry_after_seconds=0.25)) == {
        "retry-after": "1",
        "retry-after-ms": "250",
    }


def test_the_sdk_is_told_when_a_retry_is_useless() -> None:
    assert error_headers(errors.DeadlineExceeded("late"))["x-should-retry"] == "false"
    assert "x-should-retry" not in error_headers(errors.StageLost("gone"))


def test_an_instance_may_be_more_exact_than_its_class() -> None:
    error = errors.InvalidRequest("no", param="n", code="exact")
    assert error_body(error, "r") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "exact"}
    }
