"""Stored responses of the whole cluster: those of this node, and by their ids those of the others.

Owns: whom to ask for a response, and what other nodes may ask of this one.
Does not own: the database (``store``), running work (``background``), the way to other nodes (``Elsewhere``).
Invariant: only the node that an id names reads or changes that response; an answer for another node is never passed on.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import Any, Protocol

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway.background import Background
from mlx_cluster.gateway.store import MAX_CHAIN, MAX_CHAIN_BYTES, ResponseStore, Stored

UNFINISHED = ("queued", "in_progress")
_ID = re.compile(r"resp_([0-9]{1,6})_[0-9a-f]{48}")


class Elsewhere(Protocol):
    """The shelves of the other nodes."""

    async def ask(self, node_id: int, operation: str, response_id: str) -> Any:
        """What that node's ``Shelf.serve`` gives. Raises ``Unavailable`` when it cannot be reached."""
        ...


class Shelf:
    """``elsewhere`` None: this node is alone."""

    def __init__(
        self, node_id: int, store: ResponseStore, background: Background, elsewhere: Elsewhere | None = None
    ) -> None:
        self._node_id, self._store, self._background, self._elsewhere = node_id, store, background, elsewhere

    async def get(self, id_: str) -> Stored | None:
        return _stored(await self._ask("get", id_))

    async def cancel(self, id_: str) -> Stored | None:
        """End its work if it has any, and give what it then is."""
        return _stored(await self._ask("cancel", id_))

    async def delete(self, id_: str) -> bool:
        return bool(await self._ask("delete", id_))

    async def chain(self, id_: str) -> list[Stored] | None:
        """As the store's, over all nodes: a conversation may go on at another gateway with each turn."""
        if self._owner(id_) is None and (here := await self._store.chain(id_)) is not None:
            return here
        found: list[Stored] = []
        wanted: str | None = id_
        num_bytes = 0
        while wanted is not None:
            stored = await self.get(wanted)
            if stored is None:
                return None
            num_bytes += len(json.dumps([stored.input, stored.body]))
            if len(found) == MAX_CHAIN or num_bytes > MAX_CHAIN_BYTES:
                raise InvalidRequest(
                    f"previous_response_id: the conversation has more than {MAX_CHAIN} responses, or "
                    f"{MAX_CHAIN_BYTES} bytes: start a new one",
                    param="previous_response_id",
                )
            found.append(stored)
            wanted = stored.previous_id
        return found[::-1]

    async def serve(self, operation: str, id_: str) -> Any:
        """What another node asks, as JSON values; None for what is not here. Raises ``InvalidRequest``."""
        match operation:
            case "get":
                found = await self._store.get(id_)
            case "cancel":
                found = await self._cancel(id_)
            case "delete":
                await self._background.cancel(id_)
                return await self._store.delete(id_)
            case _:
                raise InvalidRequest(f"a stored response knows no {operation[:32]!r}: the nodes run different versions")
        return None if found is None else asdict(found)

    async def _cancel(self, id_: str) -> Stored | None:
        await self._background.cancel(id_)
        found = await self._store.get(id_)
        if found is not None and found.body["status"] in UNFINISHED and found.body["background"]:
            found = replace(found, body={**found.body, "status": "cancelled"})
            await self._store.put(found)
        return found

    async def _ask(self, operation: str, id_: str) -> Any:
        owner = self._owner(id_)
        if owner is None or self._elsewhere is None:
            return await self.serve(operation, id_)
        return await self._elsewhere.ask(owner, operation, id_)

    def _owner(self, id_: str) -> int | None:
        """The other node that keeps this response, if it is one."""
        named = _ID.fullmatch(id_)
        return int(named[1]) if named is not None and int(named[1]) != self._node_id else None


def _stored(values: Any) -> Stored | None:
    return None if values is None else Stored(**values)
