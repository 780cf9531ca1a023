"""schemathesis against our own /openapi.json, over HTTP: every check, bounded examples, the same ones in every run.

A 400 that names what is wrong (a parameter, or a code that says that the body is no JSON object) counts as documented,
also for a body that follows the schema: a schema cannot say everything that a route refuses by name.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from mlx_cluster.gateway.server import GatewayServer
from tests.fuzz.seeds import SEEDS
from tests.fuzz.test_bodies import Target

EXAMPLES = 15  # of each operation, that follow the schema; as many again that do not
WITHOUT_PARAM = ("invalid_json", "host_not_allowed", "origin_not_allowed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, str]]:
    """A gateway on a loop in a thread of its own: schemathesis calls it as any client does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Target, GatewayServer]:
        target = Target(tmp_path_factory.mktemp("openapi"))
        server = GatewayServer(target.app, "127.0.0.1", 0)
        await server.start()
        return target, server

    target, server = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    try:
        yield target, f"http://127.0.0.1:{server.port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


def schema_of(url: str) -> Any:
    config = schemathesis.Config.from_dict(
        {
            "checks": {
                "positive_data_acceptance": {"expected-statuses": ["2xx", 400, 404]},
                "negative_data_rejection": {"expected-statuses": [400, 403, 404, 405, 413, 415]},
            }
        }
    )
    document = requests.get(f"{url}/openapi.json", timeout=60).json()
    # Nobody guesses the name of a model that is served here.
    for item in document["paths"].values():
        for operation in item.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "model" in body.get("properties", {}):
                body["properties"]["model"] = {"enum": ["tiny", "gpt-tiny"]}
    schema = schemathesis.openapi.from_dict(document, config=config)
    schema.config.update(base_url=url)
    return schema


def named(_context: Any, response: Any, _case: Any) -> None:
    """A refusal names its parameter, in the form of its dialect."""
    if response.status_code != 400:
        return
    body = response.json()
    error = body["error"]
    if isinstance(error, str):
        assert error
    elif body.get("type") == "error":
        assert error["message"]
    else:
        assert error["param"] is not None or error["code"] in WITHOUT_PARAM, error


@pytest.mark.timeout(600)
def test_every_operation_is_as_described(served: tuple[Target, str]) -> None:
    target, url = served
    schema = schema_of(url)
    operations = [result.ok() for result in schema.get_all_operations()]
    described = {(operation.method.upper(), operation.path) for operation in operations}
    assert {("POST", path) for path in target.posts} <= described
    checks = CHECKS.get_all()
    assert len(checks) >= 10
    statuses: dict[int, int] = {}
    with requests.Session() as session:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _run(operation, mode, session, statuses)
    print(statuses)
    assert statuses[200] > 15
    assert statuses[400] > 50
    assert not {status for status in statuses if status >= 500 or status == 422}


def test_what_is_taken_follows_the_description(served: tuple[Target, str]) -> None:
    document = served[0].app.openapi()
    for path, bodies in SEEDS.items():
        body_schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        whole = {**body_schema, "components": document["components"]}
        for body in bodies:
            if path == "/tokenize" and "messages" in body:
                continue  # a conversation is described where chats are
            jsonschema.validate(body, whole)


def test_nobody_is_told_of_422(served: tuple[Target, str]) -> None:
    for item in served[0].app.openapi()["paths"].values():
        for operation in item.values():
            assert "422" not in operation["responses"]
            assert {"200", "400", "429", "503"} <= set(operation["responses"])


def _run(operation: Any, mode: GenerationMode, session: requests.Session, statuses: dict[int, int]) -> None:
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
        return

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        response = case.call(session=session, timeout=60)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        case.validate_response(response, additional_checks=[named])

    call()
