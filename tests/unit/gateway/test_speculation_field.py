"""The wish about drafts: every dialect has it, and the engine hears it."""

from __future__ import annotations

import pytest

from tests.unit.gateway.conftest import World

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "hi"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
    "/v1/responses": {"model": "tiny", "input": "hi"},
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", BODIES)
async def test_an_engine_hears_the_wish(world: World, path: str) -> None:
    engine = world.engine(text="hello")
    for wish in ({}, {"speculation": None}, {"speculation": False}, {"speculation": True}):
        answer = await world.http.post(path, json={**BODIES[path], **wish})
        assert answer.status_code == 200, answer.text
    assert [request.speculate for request in engine.requests] == [None, None, False, True]


@pytest.mark.asyncio(loop_scope="module")
async def test_anything_but_yes_and_no_is_refused_by_name(world: World) -> None:
    world.engine(text="hello")
    answer = await world.http.post("/v1/chat/completions", json={**CHAT, "speculation": "fast"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "speculation"
