"""Who asks: tenants from keys, ceilings of priorities, patience, and metrics that no client can widen."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mlx_cluster.config.schema import ApiGatewaySection, KeySettings
from mlx_cluster.errors import InvalidRequest, Overloaded, QueueTimeout
from mlx_cluster.gateway.keys import Caller, Keys
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script
from tests.unit.gateway.conftest import World, running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
MESSAGES: dict[str, Any] = {**CHAT, "max_tokens": 5}


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


BATCH = KeySettings(name="batch", sha256=digest("sk-batch"), priority=-2)
FAST = KeySettings(name="fast", sha256=digest("sk-fast"), priority=3, weight=4.0)


def keys(**changes: Any) -> Keys:
    return Keys(ApiGatewaySection(keys=(BATCH, FAST), **changes))


def test_a_listed_key_is_known_by_its_hash_in_either_header() -> None:
    bearer = keys().caller([(b"authorization", b"Bearer sk-fast")])
    assert bearer == keys().caller([(b"x-api-key", b"sk-fast")])
    assert bearer == keys().caller([(b"authorization", b"bearer  sk-fast ")])
    assert bearer == Caller(digest("sk-fast")[:16], "fast", 3)
    assert bearer.tenant == FAST.tenant


def test_a_key_that_is_not_listed_is_a_tenant_of_its_own_with_defaults() -> None:
    one, two = (keys().caller([(b"x-api-key", key)]) for key in (b"sk-one", b"sk-two"))
    assert one.tenant != two.tenant
    assert "sk-one" not in one.tenant
    assert (one.label, one.max_priority) == ("other", 0)


@pytest.mark.parametrize("headers", [[], [(b"authorization", b"Bearer ")], [(b"authorization", b"Basic eDp5")]])
def test_without_a_key_everybody_is_one_tenant(headers: list[tuple[bytes, bytes]]) -> None:
    assert keys(queue_timeout=4.0).caller(headers) == Caller("", "none", 0, 4.0)


def test_a_priority_may_be_lowered_and_not_raised_above_the_keys() -> None:
    fast = keys().caller([(b"x-api-key", b"sk-fast")])
    assert [fast.priority(asked) for asked in (None, 3, -10)] == [3, 3, -10]
    with pytest.raises(InvalidRequest, match="priority is 4, but requests of this key may have at most 3"):
        fast.priority(4)


async def test_an_engine_hears_tenant_priority_and_patience(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, keys=(BATCH, FAST), queue_timeout=7.0) as world:
        engine = world.engine(text="hello")
        asks = [
            ("/v1/chat/completions", {**CHAT, "priority": 2}),
            ("/v1/completions", {"model": "tiny", "prompt": "hi", "priority": 2}),
            ("/v1/messages", {**MESSAGES, "priority": 2}),
            ("/v1/responses", {"model": "tiny", "input": "hi", "priority": 2}),
        ]
        for path, body in asks:
            answer = await world.http.post(path, json=body, headers={"authorization": "Bearer sk-fast"})
            assert answer.status_code == 200, answer.text
        assert {(r.tenant, r.priority, r.queue_seconds) for r in engine.requests} == {(FAST.tenant, 2, 7.0)}
        assert len(engine.requests) == 4
        await world.http.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": "sk-batch"})
        await world.http.post("/v1/chat/completions", json=CHAT)
        assert [(r.tenant, r.priority) for r in engine.requests[4:]] == [(BATCH.tenant, -2), ("", 0)]


async def test_an_engine_hears_whether_asking_again_gives_the_same(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        engine = world.engine(text="hello")
        for changes in ({"temperature": 0}, {"seed": 5}, {"temperature": 0.5}):
            await world.http.post("/v1/chat/completions", json={**CHAT, **changes})
        assert [request.repeatable for request in engine.requests] == [True, True, False]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("priority", [1, 11, -11, "high", 0.5, True])
async def test_a_priority_out_of_bounds_is_refused_by_name(world: World, priority: object) -> None:
    engine = world.engine(text="hello")
    answer = await world.http.post("/v1/chat/completions", json={**CHAT, "priority": priority})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "priority"
    assert engine.requests == []


async def test_metrics_name_listed_keys_and_no_others(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, keys=(BATCH, FAST)) as world:
        world.engine(text="hello")
        for key in ("sk-fast", "sk-fast", "sk-1", "sk-2", "sk-3"):
            await world.http.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": key})
        await world.http.post("/v1/chat/completions", json=CHAT)
        counts = {key: world.metric("key_requests_total", key=key) for key in ("fast", "batch", "other", "none")}
        assert counts == {"fast": 2, "batch": 0, "other": 3, "none": 1}
        assert world.metric("key_tokens_total", key="fast", kind="completion") == 4
        assert world.metric("key_tokens_total", key="fast", kind="prompt") > 2
        shown = (await world.http.get("/metrics")).text
        assert not any(digest(key)[:16] in shown for key in ("sk-1", "sk-fast"))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("error", "path", "status", "kind"),
    [
        (Overloaded("full", retry_after_seconds=4.2), "/v1/chat/completions", 429, "rate_limit_error"),
        (QueueTimeout("waited", retry_after_seconds=4.2), "/v1/chat/completions", 503, "server_error"),
        (Overloaded("full", retry_after_seconds=4.2), "/v1/messages", 429, "rate_limit_error"),
        (QueueTimeout("waited", retry_after_seconds=4.2), "/v1/messages", 529, "overloaded_error"),
    ],
)
async def test_overload_says_when_to_come_back(
    world: World, error: Overloaded, path: str, status: int, kind: str
) -> None:
    world.engine(Script(refuse=error))
    answer = await world.http.post(path, json=MESSAGES)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["retry-after-ms"] == "4200"
