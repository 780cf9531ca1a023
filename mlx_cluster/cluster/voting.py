"""The thread in which this node votes, and the one that waits for the disk.

Owns: the queue of what has been heard, the timer, the writes; hands what the election decides to the event loop.
Does not own: the election (``voter``), how messages travel (``post``), what is done with its news (``node``).
Invariant: votes and heartbeats are timed and sent in a thread of their own, so that a busy event loop does not make its
node look dead; but the loop takes in what others say, so while it is held up nobody is blamed for silence, and a loop
that is held up for ``max_stale_seconds`` silences its voter: a frozen agent must not lead.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from mlx_cluster import log
from mlx_cluster.cluster import stable
from mlx_cluster.cluster.election import clock as election_clock
from mlx_cluster.cluster.election.events import Command, Settings
from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.election.values import Durable, Era
from mlx_cluster.cluster.voter import News, Standing, Voter
from mlx_cluster.errors import ConfigError, DeadlineExceeded, Unavailable

FILE_NAME = "voter.state"
MAX_QUEUED = 1024  # messages beyond are dropped, as the network may do as well
ORDER_SECONDS = 5.0
DISK_RETRY_SECONDS = 1.0
LONGEST_SLEEP_SECONDS = 1.0
BLIND_SECONDS = 0.5  # an intake that has been silent for so long is held up

_log = log.get(__name__)
_Work = Callable[[float], None]


class Post(Protocol):
    """Carries messages to other voters; must not block, and may lose them."""

    def send(self, message: Message) -> None: ...

    def close(self) -> None: ...


class VotingThread:
    """Made and used in the event loop. ``on_news`` and ``on_standing`` are called there, in order.

    ``is_alive`` must be called often (several times in ``BLIND_SECONDS``) by the loop that also calls ``hear``.
    Raises ``ConfigError`` when the state directory cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        node: str,
        settings: Settings,
        *,
        cluster: str,
        nodes: Iterable[str],
        witnesses: Iterable[str] = (),
        make_post: Callable[[], Post],
        on_news: Callable[[News, Era], None],
        on_standing: Callable[[Standing], None],
        max_stale_seconds: float,
        clock: Callable[[], float] = election_clock.now,
    ) -> None:
        self._path = folder / FILE_NAME
        self._make_post, self._on_news, self._on_standing = make_post, on_news, on_standing
        self._clock, self._max_stale_seconds = clock, max_stale_seconds
        self._intake_at = clock()
        self._work: queue.Queue[_Work] = queue.Queue(MAX_QUEUED)
        self._writes: queue.SimpleQueue[Durable | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._post: Post | None = None
        self._loop = asyncio.get_running_loop()
        dice = random.Random(secrets.randbits(64))
        self._voter = Voter(
            node,
            self._load(cluster),
            settings,
            self,
            cluster=cluster,
            nodes=nodes,
            witnesses=witnesses,
            fresh=lambda: secrets.token_hex(4),
            chance=dice.random,
        )
        self.standing = self._voter.standing()
        self._threads = [
            threading.Thread(target=self._vote, name="voter", daemon=True),
            threading.Thread(target=self._write_down, name="voter's disk", daemon=True),
        ]

    # -- from the event loop -------------------------------------------------------------------------------

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float = 1.0) -> None:
        """End both threads; blocks for at most twice ``seconds``."""
        self._ending.set()
        self._writes.put(None)
        with contextlib.suppress(queue.Full):
            self._work.put_nowait(lambda _: None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(seconds)

    def is_alive(self) -> None:
        """The intake works: what others have said until now has been handed to ``hear``."""
        self._intake_at = self._clock()

    def hear(self, message: Message) -> None:
        self._put(lambda now: self._voter.hear(message, now))

    def prefer(self, priority: float) -> None:
        self._put(lambda now: self._voter.prefer(priority, now))

    async def order(self, command: Command, timeout_seconds: float = ORDER_SECONDS) -> str:
        """Have the voter carry out a command: "" once it has begun, or why it is refused.

        A forced founding takes as long as the others have to answer. Raises ``DeadlineExceeded``, ``Unavailable``.
        """
        answer: asyncio.Future[str] = self._loop.create_future()

        def resolve(reason: str) -> None:
            if not answer.done():
                answer.set_result(reason)

        if not self._put(lambda now: self._voter.order(command, now, lambda reason: self._in_loop(resolve, reason))):
            raise Unavailable("this node's voter is busy: try again")
        try:
            async with asyncio.timeout(timeout_seconds):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(
                f"the voter of this node did not decide {type(command).__name__} within {timeout_seconds:g} s"
            ) from None

    # -- what the voter asks for (``voter.Surroundings``), in the voter's thread -----------------------------

    def send(self, message: Message) -> None:
        assert self._post is not None
        self._post.send(message)

    def write(self, durable: Durable) -> None:
        self._writes.put(durable)

    def tell(self, news: News, era: Era) -> None:
        self._in_loop(self._on_news, news, era)

    # -- the threads ---------------------------------------------------------------------------------------

    def _vote(self) -> None:
        self._post = self._make_post()
        try:
            self._voter.start(self._clock())
            while not self._ending.is_set():
                self._next()
        except Exception:  # noqa: BLE001  # logged with its traceback
            # The root of the thread: a voter that has met a bug falls silent, and the others go on without it.
            _log.exception("voter ended")
        finally:
            self._post.close()

    def _next(self) -> None:
        """Wait for the next message or the timer, and take it in."""
        wait = min(self._voter.timer - self._clock(), LONGEST_SLEEP_SECONDS)
        work: _Work | None = None
        with contextlib.suppress(queue.Empty):
            work = self._work.get(timeout=wait) if wait > 0 else self._work.get_nowait()
        now = self._clock()
        if work is not None:
            work(now)
        stale = now - self._intake_at
        if now >= self._voter.timer and stale <= self._max_stale_seconds:
            self._voter.wake(now, blind=stale > BLIND_SECONDS)
        elif stale > self._max_stale_seconds:
            self._ending.wait(BLIND_SECONDS)
        standing = self._voter.standing()
        if standing != self.standing:
            self.standing = standing
            self._in_loop(self._on_standing, standing)

    def _write_down(self) -> None:
        """One write after the other. A disk that refuses is asked again: until it has agreed the voter is silent."""
        while (durable := self._writes.get()) is not None:
            while not self._ending.is_set():
                try:
                    stable.save(self._path, durable)
                except OSError as error:
                    _log.error("the voter's state cannot be written", path=str(self._path), reason=str(error))
                    self._ending.wait(DISK_RETRY_SECONDS)
                else:
                    written = durable
                    self._work.put(lambda now, written=written: self._voter.written(written, now))  # type: ignore[misc]
                    break

    def _put(self, work: _Work) -> bool:
        try:
            self._work.put_nowait(work)
        except queue.Full:
            return False
        return True

    def _in_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        if not self._ending.is_set():
            with contextlib.suppress(RuntimeError):  # the loop closed in between: nobody listens any more
                self._loop.call_soon_threadsafe(callback, *arguments)

    def _load(self, cluster: str) -> Durable | stable.LostDisk:
        try:
            found = stable.load(self._path)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read ({error}): set nodes.<name>.state_dir") from error
        if isinstance(found, stable.LostDisk):
            _log.info("voter starts without a memory", reason=found.reason)
            return found
        if found.cluster != cluster:
            raise ConfigError(
                f"{self._path} belongs to cluster {found.cluster!r}, this node to {cluster!r}: "
                "give each cluster its own nodes.<name>.state_dir"
            )
        return found
