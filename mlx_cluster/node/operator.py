"""What an operator may ask of a running cluster: who leads and votes, which nodes are drained, a new founding.

Owns: each request's checks, and forwarding it to the coordinator. Does not own: HTTP (``http``), the decisions.
Invariant: a request that returns has taken effect: the document that says so is committed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx

from mlx_cluster.cluster.document import ClusterDocument, LeaderPin
from mlx_cluster.config.names import find_node, node_name
from mlx_cluster.errors import ClusterError, ConfigError, DeadlineExceeded, Unavailable
from mlx_cluster.node.agent import Agent

AMEND_SECONDS = 10.0
LOOK_AGAIN_SECONDS = 0.1
FORWARD_SECONDS = 15.0
FORWARDED = "x-mlx-cluster-forwarded"

Change = Callable[[ClusterDocument], ClusterDocument]
Answer = dict[str, Any]


class Operator:
    """Of one agent. Every method raises a ``ClusterError`` with the reason when it cannot be done."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def pin(self, node: str, ttl_seconds: float | None) -> Answer:
        """Have this node lead, for ``ttl_seconds`` or until ``unpin``."""
        entry = find_node(self._agent.settings, node)
        fixed = self._agent.settings.coordinator.fixed
        if fixed is not None:
            raise ConfigError(f"the coordinator is fixed to {fixed} by coordinator.fixed: change it there")
        if ttl_seconds is not None and not 0 < ttl_seconds < 1e9:
            raise ConfigError(f"ttl_seconds {ttl_seconds:g}: give a number of seconds above zero, or none at all")
        expires_at = None if ttl_seconds is None else time.time() + ttl_seconds
        await self._amend(lambda document: replace(document, pin=LeaderPin(entry.node_id, expires_at)))
        return {"pinned": node_name(entry), "expires_at": expires_at}

    async def unpin(self) -> Answer:
        """Let the strategy decide again."""
        await self._amend(lambda document: replace(document, pin=None))
        return {"pinned": None}

    async def drain(self, node: str, *, undo: bool = False) -> Answer:
        """Give this node no new work and move what it holds; ``undo`` makes it an ordinary node again."""
        entry = find_node(self._agent.settings, node)
        changed: list[int] = []

        def change(document: ClusterDocument) -> ClusterDocument:
            drained = set(document.drained) - {entry.node_id} if undo else {*document.drained, entry.node_id}
            changed[:] = sorted(drained)
            return replace(document, drained=tuple(changed))

        await self._amend(change)
        self._agent.history.note("node_undrained" if undo else "node_drained", node=node_name(entry))
        return {"node": node_name(entry), "drained": not undo}

    async def remove(self, node: str) -> Answer:
        """Take the vote of a dead node away for good. If it comes back it asks for a new one, as a new node does."""
        node_id, name = self._node_or_former(node)
        authority = self._agent.authority
        voter = authority.voter_of(node_id)
        if voter is None:
            raise ConfigError(f"{name} has no vote: there is nothing to remove; 'coordinator show' lists the voters")
        row = self._agent.view.node(node_id)
        if row is not None and row.state != "dead":
            raise ConfigError(
                f"{name} is {row.state}: stop it first ('kill -TERM {row.status.pid if row.status else 'PID'}' there; "
                "it drains and leaves), and remove it only if it shall not come back"
            )
        try:
            async with asyncio.timeout(AMEND_SECONDS):
                while authority.voter_of(node_id) == voter or authority.waiting():
                    if not self._agent.leads:
                        raise Unavailable("this node is not the coordinator (any more): try again")
                    if not authority.waiting() and (refusal := await authority.remove_voter(voter)):
                        raise Unavailable(f"{name} keeps its vote: {refusal}")
                    await asyncio.sleep(LOOK_AGAIN_SECONDS)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the change was not committed within {AMEND_SECONDS:g} s: is a majority of the voters there?"
            ) from None
        return {"node": name, "removed": voter}

    def _node_or_former(self, ref: str) -> tuple[int, str]:
        """(id, name); a node that cluster.yaml no longer names can still be meant by its id."""
        try:
            entry = find_node(self._agent.settings, ref)
        except ConfigError:
            digits = ref.removeprefix("node_")
            if digits.isdecimal() and self._agent.authority.voter_of(int(digits)) is not None:
                return int(digits), f"node_{int(digits)}"
            raise
        return entry.node_id, node_name(entry)

    async def force_new_cluster(self) -> Answer:
        """Go on with what this node holds, alone, because the other voters are gone for good."""
        refusal = await self._agent.authority.force_new_cluster()
        if refusal:
            raise Unavailable(f"{self._agent.identity.name} founds no new cluster: {refusal}")
        return {"founded_by": self._agent.identity.name}

    def leader_url(self) -> str | None:
        """Where to send what only the coordinator can do; None when that is this node. Raises ``Unavailable``."""
        view, leadership, _ = self._agent.picture()
        if self._agent.leads:
            return None
        leader = view.node(leadership.node_id) if leadership.node_id is not None else None
        if leader is None or leader.status is None:
            detail = self._agent.authority.report(view).get("detail") or "an election is going on: try again"
            raise Unavailable(f"there is no coordinator: {detail}")
        return leader.status.admin_url

    async def forward(self, url: str, method: str, path: str, body: Mapping[str, Any]) -> tuple[int, Answer]:
        """Ask the coordinator. Raises ``Unavailable``."""
        try:
            async with httpx.AsyncClient(timeout=FORWARD_SECONDS, trust_env=False) as client:
                answer = await client.request(method, f"{url}{path}", json=dict(body), headers={FORWARDED: "1"})
            return answer.status_code, dict(answer.json())
        except (httpx.HTTPError, ValueError) as error:
            raise Unavailable(f"the coordinator at {url} does not answer ({error!r}): try again") from error

    async def _amend(self, change: Change) -> None:
        """Commit a change of the document; another document that comes in between is changed as well."""
        agent = self._agent
        wanted_once = False
        try:
            async with asyncio.timeout(AMEND_SECONDS):
                while not (wanted_once and change(agent.state.document) == agent.state.document):
                    if not agent.leads:
                        raise Unavailable("this node is not the coordinator (any more): try again")
                    document = agent.state.document
                    if not agent.authority.waiting():
                        wanted_once = True
                        wanted = change(document)
                        if wanted != document:
                            term = agent.picture()[1].term
                            agent.authority.commit(replace(wanted, term=term, version=document.version + 1))
                    await asyncio.sleep(LOOK_AGAIN_SECONDS)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the change was not committed within {AMEND_SECONDS:g} s: is a majority of the voters there?"
            ) from None


def status_of(error: ClusterError) -> int:
    """The HTTP status for an operator's error."""
    return {"config_error": 400, "deadline_exceeded": 504}.get(error.code, 503)
