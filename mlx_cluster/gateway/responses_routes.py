"""/v1/responses: create (at once, as a stream, in the background), retrieve, list the input, cancel, delete.

Owns: what is stored when, and the ids, which name the node that keeps the response.
Does not own: bodies (``responses``), printing (``responses_dialect``), the database (``store``).
Invariant: a response with ``store: true`` is stored before its client sees its end, so the next may build upon it.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from mlx_cluster import log
from mlx_cluster.errors import InvalidRequest, Superseded, Unavailable
from mlx_cluster.gateway.answer import Gateway, GenerationResponse
from mlx_cluster.gateway.ask import Ask
from mlx_cluster.gateway.background import Background
from mlx_cluster.gateway.errors import ResponseNotFound
from mlx_cluster.gateway.idempotency import Key, drawn_id, numbered_ids
from mlx_cluster.gateway.incoming import asked_by, formats_in_vain, hints_in_vain, name_dropped, read_parsed
from mlx_cluster.gateway.openai import Dialect, Head
from mlx_cluster.gateway.responses import Parsed, ResponsesBody, ask_after, parse_responses
from mlx_cluster.gateway.responses_dialect import ResponsesDialect, error_object, new_id, response_object
from mlx_cluster.gateway.shelf import Elsewhere, Shelf
from mlx_cluster.gateway.sse import EventWriter
from mlx_cluster.gateway.store import ResponseStore, Stored
from mlx_cluster.tokenizer import Tokenizer

_log = log.get("gateway")

PATH = "/v1/responses"


def response_id(node_id: int, key: Key | None = None) -> str:
    """A new id, or the key's. It names its node, so that any gateway can say who keeps the response."""
    return f"resp_{node_id}_{drawn_id(key, 'answer', 24)}"


class StoredAnswer(GenerationResponse):
    """One exchange whose response is kept before its client sees the end of it."""

    def __init__(self, gateway: Gateway, ask: Ask, turn: Turn, request_id: str) -> None:
        super().__init__(gateway, ask, self._dialect, turn.id, request_id)
        self._turn = turn
        self._printed: ResponsesDialect | None = None
        self._superseded = False

    def _dialect(self, head: Head, tokenizer: Tokenizer) -> ResponsesDialect:
        item_ids = numbered_ids(self._ask.key, "item", 16)
        self._printed = ResponsesDialect(head, tokenizer, self._turn.body, lambda prefix: f"{prefix}_{item_ids()}")
        return self._printed

    async def _whole(self) -> bytes:
        whole = await super()._whole()
        await self._keep()
        return whole

    async def _stream(self, writer: EventWriter) -> bytes:
        last = await super()._stream(writer)
        await self._keep()
        return last

    def _failure(self, error: Exception, dialect: Dialect) -> bytes:
        self._superseded = isinstance(error, Superseded)
        return super()._failure(error, dialect)

    async def _keep(self) -> None:
        if self._superseded:
            return  # the newer attachment keeps it, under the same id
        assert self._printed is not None, "an answer was printed"
        await self._turn.keep(self._printed.response)

    async def in_background(self, model: str) -> None:
        """The work without a client: what it comes to is in the store."""
        await self._turn.keep(self._turn.empty(model, "in_progress"))
        try:
            await self._whole()
        except Exception as error:  # noqa: BLE001 - the root of a task: logged, and told to whoever asks for the response
            _log.warning("background response failed", response=self._turn.id, exc_info=error)
            failed = {**self._turn.empty(model, "failed"), "error": error_object(error, self._request_id)}
            await self._turn.keep(failed)


class Turn:
    """One turn of a conversation: its id, what was asked in it, and where it is kept."""

    def __init__(self, id_: str, parsed: Parsed, store: ResponseStore) -> None:
        self.id = id_
        self.body: ResponsesBody = parsed.body
        self.created = int(time.time())
        self._input = [_listed(item) for item in parsed.raw_items] if parsed.body.store else []
        self._store = store

    def empty(self, model: str, status: str) -> dict[str, Any]:
        """The response before there is any output."""
        return response_object(self.id, self.created, model, self.body, status)

    async def keep(self, response: dict[str, Any]) -> None:
        if not self.body.store:
            return
        body = {**response, "created_at": self.created}
        try:
            await self._store.put(Stored(self.id, self.body.previous_response_id, self._input, body))
        except Unavailable:
            # The store has logged why. Who waits for this answer needs it more than the store does.
            _log.error("response is not stored", response=self.id)


def _listed(item: dict[str, Any]) -> dict[str, Any]:
    """An input item as it is listed: with an id, and its content as parts."""
    content = item.get("content")
    if isinstance(content, str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        item = {**item, "content": [{"type": kind, "text": content}]}
    return item if item.get("id") else {**item, "id": new_id("item")}


def add_responses(
    app: FastAPI, gateway: Gateway, node_id: int, store: ResponseStore, elsewhere: Elsewhere | None = None
) -> Shelf:
    """Add the routes of this dialect; gives the shelf that other nodes may ask."""
    background = Background(gateway)
    shelf = Shelf(node_id, store, background, elsewhere)

    async def stored(id_: str) -> Stored:
        found = await shelf.get(id_)
        if found is None:
            raise ResponseNotFound(_missing(id_), param="response_id")
        return found

    async def ask_of(body: ResponsesBody) -> Ask:
        previous = body.previous_response_id
        if previous is None:
            return body.to_ask()
        chain = await shelf.chain(previous)
        if chain is None:
            raise InvalidRequest(_missing(previous), param="previous_response_id", code="previous_response_not_found")
        status = chain[-1].body["status"]
        if status not in ("completed", "incomplete"):
            raise InvalidRequest(
                f"the response {previous!r} is {status}: only one that is completed or incomplete can be built upon",
                param="previous_response_id",
                code="invalid_value",
            )
        items = [item for turn in chain for item in (*turn.input, *turn.body["output"])]
        return await gateway.catalogue.off_loop(ask_after, body, items)

    @app.post(PATH, openapi_extra=_body_schema())
    async def create(request: Request) -> Response:
        parsed = await read_parsed(request, gateway, parse_responses)
        ask = await ask_of(parsed.body)
        name_dropped(
            request, [*parsed.dropped, *await hints_in_vain(ask, gateway), *await formats_in_vain(ask, gateway)]
        )
        ask = asked_by(request, ask, gateway)
        turn = Turn(response_id(node_id, ask.key), parsed, store)
        answer = StoredAnswer(gateway, ask, turn, request.state.request_id)
        if not parsed.body.background:
            return answer
        if ask.key is not None and (begun := await store.get(turn.id)) is not None:
            return JSONResponse(begun.body)
        model = gateway.catalogue.find(ask.model).id
        queued = turn.empty(model, "queued")
        with background.place() as place:
            await turn.keep(queued)
            background.start(turn.id, answer.in_background(model), place.pop_all())
        return JSONResponse(queued)

    @app.get(f"{PATH}/{{response_id}}")
    async def retrieve(request: Request, response_id: str) -> Response:
        for name in ("stream", "starting_after"):
            if request.query_params.get(name, "false") != "false":
                raise InvalidRequest(
                    f"{name}: a stored response is not streamed again; retrieve it without, until its status is final",
                    param=name,
                    code="unsupported_parameter",
                )
        return JSONResponse((await stored(response_id)).body)

    @app.get(f"{PATH}/{{response_id}}/input_items")
    async def input_items(request: Request, response_id: str) -> Response:
        return JSONResponse(_page((await stored(response_id)).input, request))

    @app.post(f"{PATH}/{{response_id}}/cancel")
    async def cancel(response_id: str) -> Response:
        if not (await stored(response_id)).body["background"]:
            raise InvalidRequest(
                "only a response with background: true can be cancelled; close the connection of any other",
                param="response_id",
                code="invalid_value",
            )
        found = await shelf.cancel(response_id)
        if found is None:
            raise ResponseNotFound(_missing(response_id), param="response_id")
        return JSONResponse(found.body)

    @app.delete(f"{PATH}/{{response_id}}")
    async def delete(response_id: str) -> Response:
        if not await shelf.delete(response_id):
            raise ResponseNotFound(_missing(response_id), param="response_id")
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    return shelf


def _missing(id_: str) -> str:
    return f"there is no response {id_[:128]!r}: it was not stored, was deleted, or is older than what is kept"


def _page(items: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    query = request.query_params
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 100):
        raise InvalidRequest(f"limit is {limit[:64]!r}: it must be from 1 to 100", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order is {order[:64]!r}: it must be asc or desc", param="order")
    ordered = items if order == "asc" else items[::-1]
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise InvalidRequest(f"after is {after[:64]!r}: no item has this id", param="after")
        ordered = ordered[ids.index(after) + 1 :]
    page = ordered[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(ordered),
    }


def _body_schema() -> dict[str, object]:
    schema = ResponsesBody.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
