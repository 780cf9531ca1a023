"""Which Host and Origin a keyless gateway on loopback answers to, and its CORS allow list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest

from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.gateway.errors import Forbidden
from mlx_cluster.gateway.origin import OriginPolicy
from mlx_cluster.tokenizer import Tokenizer
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = "https://chat.example"


def policy(**settings: Any) -> OriginPolicy:
    return OriginPolicy.of(ApiGatewaySection(**settings))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "localhost:9", "LocalHost", "[::1]:8000", "app.localhost:1", "Box.lan:80", None],
)
async def test_own_names_are_answered(host: str | None) -> None:
    policy(allowed_hosts=["box.LAN"]).check(host, None)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.nip.example", "192.168.1.7:8000", "a@localhost", "", "[::1"],
)
async def test_other_names_are_refused(host: str) -> None:
    with pytest.raises(Forbidden, match=r"api_gateway\.allowed_hosts") as caught:
        policy().check(host, None)
    assert caught.value.code == "host_not_allowed"


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:80"),
        ("box.lan", "https://box.lan"),
        ("127.0.0.1:8000", PAGE),
    ],
)
async def test_the_own_page_and_listed_origins_may_ask(host: str, origin: str) -> None:
    policy(allowed_hosts=["box.lan"], allowed_origins=[PAGE]).check(host, origin)


@pytest.mark.parametrize(
    "origin", ["null", "https://evil.example", "http://127.0.0.1:3000", "http://localhost:8000", "file://", ""]
)
async def test_other_origins_are_refused(origin: str) -> None:
    with pytest.raises(Forbidden, match=r"api_gateway\.allowed_origins") as caught:
        policy(allowed_origins=[PAGE]).check("127.0.0.1:8000", origin)
    assert caught.value.code == "origin_not_allowed"


async def test_any_may_be_said_in_words() -> None:
    policy(allowed_hosts=["*"], allowed_origins=["*"]).check("evil.example", "https://evil.example")


async def test_beyond_loopback_names_prove_nothing_and_are_not_judged() -> None:
    policy(host="0.0.0.0").check("evil.example", "https://evil.example")


@pytest.mark.parametrize(
    "bad", [{"allowed_hosts": ["http://a"]}, {"allowed_hosts": ["a:80"]}, {"allowed_origins": ["chat.example"]}]
)
async def test_settings_that_would_never_match_are_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match="write it"):
        ApiGatewaySection(**bad)


@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics", "/nothing"])
async def test_a_rebound_name_reads_nothing(world: World, path: str) -> None:
    answer = await world.http.get(path, headers={"host": "evil.example"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_foreign_page_starts_no_generation(world: World) -> None:
    engine = world.engine(text="x")
    headers = {"origin": "https://evil.example"}
    answer = await world.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert not engine.requests
    assert "access-control-allow-origin" not in answer.headers
    own = await world.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers={"origin": world.url})
    assert own.status_code == 200


async def test_the_refusal_has_the_form_of_the_dialect(world: World) -> None:
    answer = await world.http.post("/v1/messages", json={}, headers={"origin": "null"})
    assert answer.status_code == 403
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "permission_error"


async def test_a_listed_page_gets_its_preflight_and_its_answer(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, allowed_origins=[PAGE]) as world:
        world.engine(text="x")
        asks = {
            "origin": PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
            "access-control-request-private-network": "true",
        }
        preflight = await world.http.options("/v1/completions", headers=asks)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-private-network"] == "true"
        for body, status in (({"model": "tiny", "prompt": "x"}, 200), ({"model": "tiny"}, 400)):
            answer = await world.http.post("/v1/completions", json=body, headers={"origin": PAGE})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = await world.http.options("/v1/completions", headers={**asks, "origin": "https://evil.example"})
        assert other.status_code == 403
        assert "access-control-allow-origin" not in other.headers
