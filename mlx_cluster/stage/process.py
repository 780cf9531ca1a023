"""The agent's side of a stage process: start it, follow it, tell it to link, stop it.

Owns: the child's environment, its ticks, the deadlines on loading, linking and going over to another epoch, and the
words for how it ended.
Does not own: when a stage is started, kept or what follows its end (``node``).
Invariant: a tick leaves every second from the agent's own event loop, so a frozen agent falls silent; after ``stop`` or
an end by itself the process does not exist any more.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any

from mlx_cluster import lifeline
from mlx_cluster.config.schema import RuntimeSection
from mlx_cluster.errors import ClusterError, LinkUnavailable, StageStartError
from mlx_cluster.stage import blas
from mlx_cluster.stage.spec import AGENT_SILENCE_SECONDS, TICK_LINE, TICK_SECONDS, LinkCommand, StageEvent, StageSpec
from mlx_cluster.wire import error_from_code

STOP_GRACE_SECONDS = 5.0
# Beyond the link's own deadline, for the events to come through.
_LINK_MARGIN_SECONDS = 5.0

# For a process to let go of one epoch and begin another. One that is frozen, or whose device is stuck in a computation,
# does not answer; neither does one that computes longer than this, which then costs a load and nothing else. It is what
# counts as frozen elsewhere too: a healthy process lets go in a tenth of a second, on a starved machine in several.
ADOPT_SECONDS = float(AGENT_SILENCE_SECONDS)
# A process that did not answer for so long does not hear SIGTERM either.
_HUNG_GRACE_SECONDS = 0.2

OnProgress = Callable[[StageEvent], None]
OnExit = Callable[[str], None]


class StageProcess:
    """One running stage process. Made by ``start``; ``on_exit`` hears once, and not after ``stop``, why it ended."""

    _child: lifeline.Child
    _end: asyncio.Task[None]
    _loading: asyncio.Task[None]
    _load_timeout_seconds: float

    def __init__(self, spec: StageSpec, *, on_progress: OnProgress | None, on_exit: OnExit | None) -> None:
        loop = asyncio.get_running_loop()
        self.spec = spec
        self.progress: StageEvent | None = None
        self._on_progress, self._on_exit = on_progress, on_exit
        self._failure: ClusterError | None = None
        self._stopping = self._linking = False
        self._loop = loop
        self._adopted: asyncio.Future[StageEvent] | None = None
        self._loaded, self._linked = self._expected(), self._expected()

    @classmethod
    async def start(
        cls,
        spec: StageSpec,
        runtime: RuntimeSection,
        *,
        on_progress: OnProgress | None = None,
        on_exit: OnExit | None = None,
    ) -> StageProcess:
        """Spawn it and hand it the spec. Raises ``StageStartError`` when it cannot be started."""
        self = cls(spec, on_progress=on_progress, on_exit=on_exit)
        env = blas.environment(
            blas.find(), threads=runtime.threads, preload=runtime.blas == "auto" and spec.device != "gpu"
        )
        try:
            self._child = await lifeline.spawn(
                [sys.executable, "-m", "mlx_cluster.stage"],
                env=env,
                on_line=self._on_line,
                on_error_line=_pass_on,
                stderr="tail",
            )
        except OSError as error:
            raise StageStartError(f"{self.name} cannot be started: {error}") from error
        self._child.send_line(spec.to_line())
        self._load_timeout_seconds = runtime.load_timeout
        self._end = asyncio.create_task(self._watch(self._child), name=f"end of {self.name}")
        self._loading = asyncio.create_task(self._bound_loading(), name=f"deadline on loading of {self.name}")
        return self

    @property
    def name(self) -> str:
        return f"stage {self.spec.index} of {self.spec.plan.pipeline} in epoch {self.spec.epoch}"

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.returncode is None

    async def loaded(self) -> StageEvent:
        """Wait until its slice is loaded; the event has its address and memory.

        Raises the error that it failed with (``CheckpointError`` …), or ``StageStartError`` when it ended or exceeded
        ``runtime.load_timeout``, after which it is killed.
        """
        return await asyncio.shield(self._loaded)

    async def link(self, command: LinkCommand) -> None:
        """Have it bring up its links. Raises ``LinkError`` or ``StageStartError``; the process is over then."""
        await self.loaded()
        self._linking = True
        self._child.send_line(command.to_line())
        deadline_seconds = command.timeout_seconds + _LINK_MARGIN_SECONDS
        if not await _done_within(deadline_seconds, self._linked):
            self._kill(LinkUnavailable(f"{self.name}: no {command.transport} link within {deadline_seconds:g} s"))
        await asyncio.shield(self._linked)
        self._linking = False

    def can_become(self, spec: StageSpec) -> bool:
        """Whether ``adopt`` may be tried: it runs, its slice was loaded, and nothing went wrong in it."""
        settled = self._loaded.done() and self._adopted is None and not self._linking
        well = self.running and self._failure is None and not self._stopping
        return well and settled and self.spec.can_become(spec)

    async def adopt(self, spec: StageSpec, *, on_progress: OnProgress | None, on_exit: OnExit | None) -> None:
        """Have it go over to another epoch with the weights that it has; ``loaded`` follows as after a start.

        Raises ``StageStartError`` when it does not answer within ``ADOPT_SECONDS``; it is killed then.
        """
        self._loading.cancel()
        self._on_progress, self._on_exit = on_progress, on_exit
        before, self.spec = self.name, spec
        adopted = self._adopted = self._expected()
        self._child.send_line(spec.to_line())
        try:
            if not await _done_within(ADOPT_SECONDS, adopted):
                raise StageStartError(f"{before} did not let go within {ADOPT_SECONDS:g} s: it hangs, and is killed")
            adopted.result()
        except BaseException:
            await self.stop(_HUNG_GRACE_SECONDS)
            raise
        self._loading = asyncio.create_task(self._bound_loading(), name=f"deadline on loading of {self.name}")

    async def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """SIGTERM, then SIGKILL; idempotent. SIGTERM first: a hard kill can leak wired memory on a Mac."""
        self._stopping = True
        await self._child.stop(grace_seconds)
        await self._end

    # -- tasks ----------------------------------------------------------------------------------------

    async def _watch(self, child: lifeline.Child) -> None:
        """Follow it to its end."""
        ticks = asyncio.create_task(_tick(child), name=f"ticks to {self.name}")
        exit_ = await child.wait()
        ticks.cancel()
        self._loading.cancel()
        error = self._failure or self._error_of(exit_)
        self._settle(error)
        if not self._stopping and self._on_exit is not None:
            self._on_exit(str(error))

    async def _bound_loading(self) -> None:
        """Kill it when its slice is not loaded in time."""
        seconds = self._load_timeout_seconds
        if not await _done_within(seconds, self._loaded):
            self._kill(
                StageStartError(
                    f"{self.name} did not load within {seconds:g} s: raise runtime.load_timeout, "
                    "or give this node fewer layers"
                )
            )

    def _on_line(self, line: str) -> None:
        event = StageEvent.from_line(line)
        if self._adopted is not None:
            self._hear_before_adoption(event, self._adopted)
            return
        self.progress = event
        match event.type:
            case "loaded" if not self._loaded.done():
                self._loaded.set_result(event)
            case "linked" if not self._linked.done():
                self._linked.set_result(event)
            case "failed":
                self._failure = self._failure or error_from_code(event.code, event.message)
                self._settle(self._failure)
        if self._on_progress is not None:
            self._on_progress(event)

    def _hear_before_adoption(self, event: StageEvent, adopted: asyncio.Future[StageEvent]) -> None:
        """What it still says of the epoch before concerns nobody, save that it fails."""
        if event.type == "failed":
            self._failure = self._failure or error_from_code(event.code, event.message)
            self._settle(self._failure)
        elif event.type == "adopted" and not adopted.done():
            self._adopted = None
            self._loaded, self._linked = self._expected(), self._expected()
            adopted.set_result(event)

    def _expected(self) -> asyncio.Future[StageEvent]:
        future: asyncio.Future[StageEvent] = self._loop.create_future()
        future.add_done_callback(_retrieve)
        return future

    # -- ends -----------------------------------------------------------------------------------------

    def _kill(self, error: ClusterError) -> None:
        self._failure = self._failure or error
        self._settle(self._failure)
        self._child.kill()

    def _settle(self, error: ClusterError) -> None:
        """Whoever waits for an event that will not come hears why."""
        for future in (self._adopted, self._loaded, self._linked):
            if future is not None and not future.done():
                future.set_exception(error)

    def _error_of(self, exit_: lifeline.Exit) -> ClusterError:
        if self._stopping:
            return StageStartError(f"{self.name} was stopped")
        if self._linking and exit_.code == -signal.SIGALRM:
            # Making an mlx group blocks with the GIL held: only the kernel's timer can end it.
            return LinkUnavailable(f"{self.name}: the mlx group did not come together in time")
        return StageStartError(f"{self.name} ended: {exit_}")


async def _tick(child: lifeline.Child) -> None:
    while True:
        child.send_line(TICK_LINE)
        await asyncio.sleep(TICK_SECONDS)


async def _done_within(seconds: float, *futures: asyncio.Future[Any]) -> bool:
    """Whether one of them is done in time."""
    done, _ = await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


def _retrieve(future: asyncio.Future[StageEvent]) -> None:
    """Nobody has to wait for the event: its error is told by ``on_exit`` too."""
    if not future.cancelled():
        future.exception()


def _pass_on(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
