"""The life of a stage process: spec, load, link, run, end; or, instead of the end, the spec of another epoch.

Owns: the order of these steps, the JSON lines on stdin and stdout, the kernel timer and the exit code.
Does not own: the loop (``worker``), the port (``service``), the weights (``loaded``), what the agent makes of the
events (``process``).
Invariant: every end but an orderly one is told to the agent by a ``failed`` event first, when Python still runs. A word
of another epoch is said only after links and stream of the one before are closed and the device is done with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_cluster import lifeline, log
from mlx_cluster.errors import ClusterError, Fenced, LinkClosed, LinkTimeout
from mlx_cluster.stage.compression import CompressingRunner
from mlx_cluster.stage.device import DeviceThread
from mlx_cluster.stage.loaded import Facts, LoadedStage, Progress
from mlx_cluster.stage.service import EpochStream, StageService
from mlx_cluster.stage.spec import AGENT_SILENCE_SECONDS, TICK_LINE, LinkCommand, StageEvent, StageSpec, parse_command
from mlx_cluster.stage.worker import Worker
from mlx_cluster.transport.choose import MLX_KINDS
from mlx_cluster.transport.link import StagePosition
from mlx_cluster.transport.open import Links, open_links

EXIT_ORDERLY = 0
EXIT_FAILED = 3  # a typed error, told in a ``failed`` event
EXIT_CRASHED = 4  # an unexpected one
_END_SECONDS = 2.0  # for the mlx thread to finish what it does
_PROGRESS_SECONDS = 0.25

logger = log.get("stage")


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What serves one epoch; ``stage`` outlives it."""

    spec: StageSpec
    facts: Facts
    stage: LoadedStage
    stream: EpochStream


def main() -> int:
    """Run this process as a stage until it ends; gives the exit code."""
    events = EventPipe(_take_stdout())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole family; the agent decides
    lifeline.arm(AGENT_SILENCE_SECONDS)
    # The mlx thread builds graphs in Python: with the default interval the event loop would wait 5 ms for the GIL.
    sys.setswitchinterval(1e-4)
    code = asyncio.run(StageChild(events).run())
    sys.stderr.flush()
    return code


def _take_stdout() -> int:
    """Keep stdout for events alone: whatever else prints goes to standard error. Gives the descriptor for events."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    return descriptor


class EventPipe:
    """Writes events as lines; any thread may."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def emit(self, event: StageEvent) -> None:
        rest = memoryview(event.to_line().encode() + b"\n")
        with self._lock, contextlib.suppress(BrokenPipeError):  # the agent is gone: its lifeline ends us
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


class AgentVoice:
    """What the agent says: ticks re-arm the timer in the reading thread, other lines are handed to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[str] = asyncio.Queue(16)
        self._silence_seconds: float = AGENT_SILENCE_SECONDS
        lifeline.watch_parent(self._lost, on_line=self._line)

    async def next_line(self) -> str:
        """The next line that is not a tick."""
        return await self._lines.get()

    @contextlib.contextmanager
    def silence_allowed(self, seconds: float) -> Iterator[None]:
        """For calls that hold the GIL, when no tick can be heard: the timer allows ``seconds`` more."""
        self._silence_seconds = AGENT_SILENCE_SECONDS + seconds
        lifeline.arm(self._silence_seconds)
        try:
            yield
        finally:
            self._silence_seconds = AGENT_SILENCE_SECONDS
            lifeline.arm(self._silence_seconds)

    def _line(self, line: str) -> None:
        if line == TICK_LINE:
            lifeline.arm(self._silence_seconds)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._lines.put_nowait, line)

    def _lost(self) -> None:
        # An orderly end (a hard kill can leak wired memory on a Mac), with the timer behind it in case it gets stuck.
        lifeline.arm(_END_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)


class StageChild:
    def __init__(self, events: EventPipe) -> None:
        self._events = events

    async def run(self) -> int:
        """From the spec to the end."""
        async with contextlib.AsyncExitStack() as cleanup:
            # A task of its own: SIGTERM ends the life, not the clean-up after it.
            life = asyncio.create_task(self._live(AgentVoice(), cleanup), name="life of the stage")
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, life.cancel)
            # Told before the clean-up, which may take seconds and must not delay the agent.
            return await self._told(life)

    async def _told(self, life: asyncio.Task[None]) -> int:
        """Await the process's life; tell the agent how it ended and give the exit code."""
        try:
            await life
        except asyncio.CancelledError:
            logger.info("stage ends: SIGTERM")
        except ClusterError as error:
            logger.error("stage ends", code=error.code, error=str(error))
            self._events.emit(StageEvent("failed", code=error.code, message=str(error)))
            return EXIT_FAILED
        except Exception as error:
            # The root of the process.
            logger.exception("stage crashed")
            self._events.emit(StageEvent("failed", code=ClusterError.code, message=f"{type(error).__name__}: {error}"))
            return EXIT_CRASHED
        return EXIT_ORDERLY

    async def _live(self, agent: AgentVoice, cleanup: contextlib.AsyncExitStack) -> None:
        spec = StageSpec.from_line(await agent.next_line())
        _log_as(spec)
        device = DeviceThread()
        cleanup.push_async_callback(_close_device, device)
        service = StageService(spec.host, spec.port)
        cleanup.push_async_callback(service.close)
        links = await cleanup.enter_async_context(contextlib.AsyncExitStack())
        address = await service.start()
        stage = LoadedStage()
        while True:
            stream = service.enter(spec)
            facts = await device.call(functools.partial(stage.load, spec, self._progress()))
            self._events.emit(
                StageEvent(
                    "loaded",
                    address=address,
                    memory_bytes=facts.memory_bytes,
                    can_trim=facts.can_trim,
                    kv_fixed_bytes=facts.kv_fixed_bytes,
                    kv_bytes_per_position=facts.kv_bytes_per_position,
                )
            )
            following = await self._serve_epoch(_Epoch(spec, facts, stage, stream), device, service, agent, links)
            # What an epoch began it ends, before a word of the next one is said.
            await links.aclose()
            await device.call(stage.drop)
            spec = await following
            _log_as(spec)
            logger.info("the stage goes over to another epoch", epoch=str(spec.epoch), layers=spec.layers)
            self._events.emit(StageEvent("adopted"))

    async def _serve_epoch(
        self,
        epoch: _Epoch,
        device: DeviceThread,
        service: StageService,
        agent: AgentVoice,
        links: contextlib.AsyncExitStack,
    ) -> asyncio.Future[StageSpec]:
        """From loaded to the end of the epoch; gives the spec of the next one, which the agent may still have to say.

        Raises what ends the process.
        """
        spec, stream = epoch.spec, epoch.stream
        following: asyncio.Future[StageSpec] = asyncio.get_running_loop().create_future()
        command = parse_command(await agent.next_line())
        if isinstance(command, StageSpec):  # another stage of the pipeline did not load
            following.set_result(command)
            return following
        ends = await self._link(spec, command, device, service, agent)
        links.push_async_callback(ends.close)
        worker = Worker(
            spec.index,
            CompressingRunner(epoch.stage.runner, sends=ends.send is not None and spec.compression != "off"),
            device,
            receive=ends.receive,
            send=ends.send,
            link_timeout_seconds=spec.link_timeout_seconds,
            on_report=stream.report,
        )
        stream.begin(worker, epoch.facts.saved, epoch.stage.held)
        self._events.emit(StageEvent("linked"))
        following = asyncio.create_task(_next_spec(agent), name="spec of the next epoch")
        error = await _serve(worker, stream, following)
        if not spec.keep:
            raise error
        await ends.cut()
        logger.info("the epoch is over", code=error.code, error=str(error))
        self._events.emit(StageEvent("ended", code=error.code, message=str(error)))
        return following

    async def _link(
        self, spec: StageSpec, command: LinkCommand, device: DeviceThread, service: StageService, agent: AgentVoice
    ) -> Links:
        position = StagePosition(spec.plan.pipeline, spec.epoch, spec.plan.hash(), spec.index, spec.plan.num_stages)
        blocking = command.timeout_seconds if command.transport in MLX_KINDS else 0.0
        with agent.silence_allowed(blocking):
            return await open_links(
                command.transport,
                position,
                hidden=service.hidden,
                stage_addresses=command.stage_addresses,
                timeout_seconds=command.timeout_seconds,
                mlx_addresses=command.mlx_addresses,
                run_on_owner=device.call if spec.emulation is None else None,
            )

    def _progress(self) -> Progress:
        """Emits ``loading`` events, a few in a second at most."""
        last = 0.0

        def on_progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PROGRESS_SECONDS or done_bytes == total_bytes:
                last = now
                self._events.emit(StageEvent("loading", done_bytes=done_bytes, total_bytes=total_bytes))

        return on_progress


async def _next_spec(agent: AgentVoice) -> StageSpec:
    return StageSpec.from_line(await agent.next_line())


async def _serve(worker: Worker, stream: EpochStream, following: asyncio.Future[StageSpec]) -> ClusterError:
    """Work until the epoch is over. Gives why, when others ended it; raises what went wrong here.

    Others: the agent, by the spec of the next epoch; the engine; a neighbour that is gone or silent.
    """
    work = asyncio.create_task(worker.run(), name="worker")
    engine = asyncio.create_task(stream.ended(), name="engine stream")
    try:
        await asyncio.wait((work, engine, following), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work
        if following.done():
            raise Fenced(f"the epoch is over: {following.result().epoch} took over")
        raise engine.result()
    except ClusterError as error:
        by_others = not work.done() or isinstance(error, (LinkClosed, LinkTimeout))
        work.cancel()  # nothing more is computed for this epoch
        await stream.fail(error)
        if not by_others:
            raise
        return error
    finally:
        for task in (work, engine):
            task.cancel()
        await asyncio.gather(work, engine, return_exceptions=True)


def _log_as(spec: StageSpec) -> None:
    log.configure(spec.log_level, pipeline=spec.plan.pipeline, stage=spec.index, epoch=str(spec.epoch))


async def _close_device(device: DeviceThread) -> None:
    if not await device.close(_END_SECONDS):
        # Stuck in native code: the interpreter's own shutdown could hang or crash beside it.
        logger.warning("the mlx thread is stuck: the process ends without it")
        os._exit(EXIT_CRASHED)
