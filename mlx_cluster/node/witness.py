"""The witness: a voter that stores the cluster document and runs no stage, the third voice of a two-node cluster.

Owns: its process from start to end. Does not own: the election (``cluster.voting``).
Invariant: it never leads and answers nothing but votes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import NoReturn

import grpc

from mlx_cluster import log
from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.election.values import Era
from mlx_cluster.cluster.post import VotePost
from mlx_cluster.cluster.rpc import ClusterService
from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.cluster.voter import News, Standing
from mlx_cluster.cluster.voting import VotingThread
from mlx_cluster.config.load import Loaded
from mlx_cluster.config.ports import is_free, plan_ports
from mlx_cluster.config.schema import Settings, WitnessEntry
from mlx_cluster.errors import ConfigError, PortInUse
from mlx_cluster.node import machine
from mlx_cluster.node.authority import ALIVE_SECONDS, WITNESS, timing_of
from mlx_cluster.node.identity import default_state_dir
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.security import policy
from mlx_cluster.wire import GRPC_OPTIONS

MAX_STALE_SECONDS = 10.0  # a loop that is held up longer silences its voter, as on a node

_log = log.get(__name__)


def run_witness(loaded: Loaded) -> int:
    """Vote until SIGTERM or SIGINT. Raises ``ClusterError`` at start."""
    os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    settings = loaded.settings
    entry = settings.cluster.witness
    if entry is None:
        raise ConfigError(
            "cluster.witness is missing: say where the witness listens, such as {host: 10.0.0.9, port: 8451}",
            key="cluster.witness",
        )
    log.configure(settings.log.level, settings.log.format, node=WITNESS)
    return asyncio.run(_run(settings, entry))


async def _run(settings: Settings, entry: WitnessEntry) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    ports = plan_ports(settings)
    addresses = {str(node.node_id): f"{node.host}:{ports[node.node_id].comms}" for node in settings.cluster.nodes}
    timing = timing_of(settings.coordinator)
    voting = VotingThread(
        _state_dir(settings, entry),
        WITNESS,
        timing,
        cluster=settings.cluster.name,
        nodes=addresses,
        make_post=lambda: VotePost(addresses, settings.cluster.name, timing.timeout_min_seconds),
        on_news=_on_news,
        on_standing=_on_standing,
        max_stale_seconds=MAX_STALE_SECONDS,
    )
    server = await _listen(settings, entry, voting)
    voting.start()
    _log.info("witness votes", pid=os.getpid(), address=f"{entry.host}:{entry.port}")
    try:
        while not stopping.is_set():
            voting.is_alive()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), ALIVE_SECONDS)
    finally:
        await asyncio.to_thread(voting.stop)
        await server.stop(0.5)
    return 0


def _state_dir(settings: Settings, entry: WitnessEntry) -> Path:
    return Path(entry.state_dir).expanduser() if entry.state_dir else default_state_dir(settings, WITNESS)


async def _listen(settings: Settings, entry: WitnessEntry, voting: VotingThread) -> grpc.aio.Server:
    policy.check_bind(settings, entry.host, "cluster.witness.host")
    if not is_free(entry.host, entry.port):
        raise PortInUse(f"port {entry.port} on {entry.host} is taken by another program, the witness wants it")
    server = grpc.aio.server(options=GRPC_OPTIONS)
    ClusterService(_OnlyVotes(voting), settings.cluster.name, machine.versions()).add_to(server)
    server.add_insecure_port(f"{entry.host}:{entry.port}")
    await server.start()
    return server


def _on_news(news: News, era: Era) -> None:
    _log.info("election", news=type(news).__name__, era=era.number)


def _on_standing(standing: Standing) -> None:
    _log.debug("standing", term=standing.term, leader=standing.leader)


class _OnlyVotes:
    """Implements ``rpc.ClusterHandler`` for a process that holds nothing."""

    def __init__(self, voting: VotingThread) -> None:
        self._voting = voting

    def vote(self, message: Message) -> None:
        self._voting.hear(message)

    def heartbeat(self, status: NodeStatus) -> NodeStatus:
        self._refuse()

    async def put_document(self, document: ClusterDocument) -> None:
        self._refuse()

    async def start_stage(
        self, plan: Plan, index: int, epoch: Epoch, fresh: bool
    ) -> AsyncGenerator[cluster_pb2.StageProgress]:
        self._refuse()
        yield cluster_pb2.StageProgress()

    async def link_stage(self, request: cluster_pb2.LinkStageRequest) -> None:
        self._refuse()

    async def stop_stage(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError("this address is the witness's, which only votes: check the ports of cluster.nodes")
