"""The voter's threads: a real disk, a post that notes, and the event loop in which news arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_cluster.cluster import stable
from mlx_cluster.cluster.election.events import BecomeLeader, Bootstrap, Committed, Propose, Settings, TransferTo
from mlx_cluster.cluster.election.messages import Message, VoteRequest
from mlx_cluster.cluster.voter import News, Standing
from mlx_cluster.cluster.voting import FILE_NAME, VotingThread
from mlx_cluster.errors import ConfigError

FAST = Settings(heartbeat_seconds=0.1, timeout_min_seconds=0.3, timeout_max_seconds=0.6)
PATIENCE_SECONDS = 60.0


class Notes:
    def __init__(self) -> None:
        self.news: list[News] = []
        self.standings: list[Standing] = []
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def close(self) -> None:
        pass

    def thread(
        self, folder: Path, *, nodes: tuple[str, ...] = (), clock: Callable[[], float] = time.monotonic
    ) -> VotingThread:
        return VotingThread(
            folder,
            "0",
            FAST,
            cluster="c",
            nodes=nodes,
            make_post=lambda: self,
            on_news=lambda news, _era: self.news.append(news),
            on_standing=self.standings.append,
            max_stale_seconds=5.0,
            clock=clock,
        )


async def until(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not probe():
            await asyncio.sleep(0.01)


async def test_one_voter_founds_proposes_and_remembers(tmp_path: Path) -> None:
    notes = Notes()
    thread = notes.thread(tmp_path)
    thread.start()
    try:
        thread.is_alive()
        assert await thread.order(Bootstrap((thread.standing.voter,), "b0")) == ""
        await until(lambda: bool(notes.standings) and notes.standings[-1].is_idle)
        assert [type(n) for n in notes.news] == [Committed, BecomeLeader]
        committed = notes.news[0]
        assert isinstance(committed, Committed)
        assert await thread.order(Propose("b1", committed.document.version)) == ""
        await until(lambda: isinstance(n := notes.news[-1], Committed) and n.document.body == "b1")
        assert "is not another voter" in await thread.order(TransferTo("9:z"))
    finally:
        await asyncio.to_thread(thread.stop)
    stored = stable.load(tmp_path / FILE_NAME)
    assert not isinstance(stored, stable.LostDisk)
    assert stored.document is not None
    assert (stored.voter, stored.document.body) == (thread.standing.voter, "b1")
    again = Notes().thread(tmp_path)
    assert (again.standing.voter, again.standing.term) == (thread.standing.voter, thread.standing.term)


async def test_nothing_is_said_before_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals: list[str] = []

    def refuse(path: Path, durable: object) -> None:
        refusals.append(str(path))
        raise OSError(28, "no space left")

    monkeypatch.setattr(stable, "save", refuse)
    notes = Notes()
    thread = notes.thread(tmp_path, nodes=("1",))
    thread.start()
    try:
        thread.is_alive()
        await thread.order(Bootstrap((thread.standing.voter, "1:a"), "b0"))
        await until(lambda: bool(refusals))
        for _ in range(10):
            thread.is_alive()
            await asyncio.sleep(0.05)
        asked = [m for m in notes.sent if isinstance(m.body, VoteRequest)]
        assert all(m.body.pre for m in asked if isinstance(m.body, VoteRequest)), "a candidacy is a durable word"
    finally:
        await asyncio.to_thread(thread.stop)


async def test_another_clusters_state_is_refused_by_name(tmp_path: Path) -> None:
    stable.save(tmp_path / FILE_NAME, stable.blank("other", "0", "a"))
    with pytest.raises(ConfigError, match="belongs to cluster 'other', this node to 'c'"):
        Notes().thread(tmp_path)


async def test_a_frozen_loop_silences_its_voter(tmp_path: Path) -> None:
    """The clock jumps ahead: the loop's last sign of life then lies further back than ``max_stale_seconds``."""
    ahead = [0.0]
    notes = Notes()
    thread = notes.thread(tmp_path, nodes=("1",), clock=lambda: time.monotonic() + ahead[0])
    thread.start()
    try:
        thread.is_alive()
        await thread.order(Bootstrap((thread.standing.voter, "1:a"), "b0"))
        ahead[0] += 600.0
        await asyncio.sleep(1.2)  # longer than the voter's thread ever sleeps: it has seen the jump
        before = len(notes.sent)
        await asyncio.sleep(1.2)  # twice its longest time-out
        assert len(notes.sent) == before

        def revived() -> bool:
            thread.is_alive()
            return len(notes.sent) > before

        await until(revived)
    finally:
        await asyncio.to_thread(thread.stop)
