"""An engine that is several: each sequence goes to one of a model's replicas.

Owns: ``RoutedEngine``, which picks a replica for every sequence and tells the router how it went.
Does not own: the choice (``cluster.routing``), which replicas are ready (``routes``).
A request with a key goes to the replica that its key names, whatever the load: there its generation is held.
Invariant: a sequence is handed to another replica only before it was admitted; every one that was sent is counted out.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from time import monotonic

from mlx_cluster.cluster.routing import Replica, Router
from mlx_cluster.errors import ClusterError, Overloaded, Recovering, StageLost, Unavailable
from mlx_cluster.request import Admitted, Engine, Event, SequenceRequest, Token


@dataclass(frozen=True, slots=True)
class ReadyReplica:
    replica: Replica
    engine: Engine


class RoutedEngine:
    """Implements ``request.Engine`` over the replicas that ``ready`` gives at the time of each sequence."""

    def __init__(
        self, ready: Callable[[], Sequence[ReadyReplica]], router: Router, clock: Callable[[], float] = monotonic
    ) -> None:
        self._ready, self.router, self._clock = ready, router, clock

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        """See ``request.Engine``. A replica that is full or gone before it admits is passed over for another one."""
        refused: dict[str, ClusterError] = {}
        while True:
            left = [each for each in self._ready() if each.replica.pipeline not in refused]
            if not left:
                raise next(reversed(refused.values()), Recovering(f"no replica of {request.model} is ready"))
            chosen = self._choose(left, request)
            admitted = False
            try:
                async with contextlib.aclosing(self._follow(chosen, request)) as events:
                    async for event in events:
                        admitted = True
                        yield event
                return
            except (Overloaded, Unavailable, StageLost) as error:
                if admitted:
                    raise
                refused[chosen.replica.pipeline] = error

    def _choose(self, ready: Sequence[ReadyReplica], request: SequenceRequest) -> ReadyReplica:
        if request.key:
            # Every gateway must ask the same one first, without a word between them: rendezvous hashing.
            return max(ready, key=lambda each: sha256(f"{request.key}/{each.replica.pipeline}".encode()).digest())
        replicas = [each.replica for each in ready]
        picked = self.router.choose(replicas, request.prompt, request.tenant, self._clock())
        return next(each for each in ready if each.replica == picked)

    async def _follow(self, chosen: ReadyReplica, request: SequenceRequest) -> AsyncGenerator[Event]:
        """The events of one replica, counted in and out of the router's book."""
        pipeline, admitted_at, failed = chosen.replica.pipeline, None, False
        self.router.sent(pipeline)
        try:
            async with contextlib.aclosing(chosen.engine.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Admitted):
                        admitted_at = self._clock()
                    elif isinstance(event, Token) and admitted_at is not None:
                        self.router.first_token(pipeline, self._clock() - admitted_at)
                        admitted_at = None
                    yield event
        except (Unavailable, StageLost):
            failed = True
            raise
        finally:
            self.router.ended(pipeline, failed=failed, now=self._clock())
