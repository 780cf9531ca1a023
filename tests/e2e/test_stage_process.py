"""Real stage processes: from the spec to tokens, and every way they end. Emulated devices unless a test says other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step

from mlx_cluster._pb import stage_pb2
from mlx_cluster.config.schema import RuntimeSection
from mlx_cluster.engine.stages import RUN_METHOD, StageStream
from mlx_cluster.errors import CheckpointError, Fenced, LinkUnavailable, PortInUse, StageStartError
from mlx_cluster.microbatch import Kind, Load, Microbatch, Report, RowSpec
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment
from mlx_cluster.request import Sampling
from mlx_cluster.stage import process
from mlx_cluster.stage.emulation import scripted_token
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import AGENT_SILENCE_SECONDS, EmulationSpec, LinkCommand, StageEvent, StageSpec
from mlx_cluster.transport.grpc_link import connect
from mlx_cluster.transport.link import HopId
from mlx_cluster.wire import encode_microbatch
from tests.tiny_models import write_tiny_model

PATIENCE_SECONDS = 60.0
EPOCH = Epoch(3, 1)
EMULATION = EmulationSpec(seconds_per_step=0.001)
GREEDY = Sampling(temperature=0.0)


def plan(num_stages: int, num_layers: int = 4, model: str = "emulated") -> Plan:
    cuts = [num_layers * i // num_stages for i in range(num_stages + 1)]
    stages = tuple(StageAssignment(i, i, cuts[i], cuts[i + 1]) for i in range(num_stages))
    return Plan("pipe", EPOCH.version, ModelRef(model, "hash", num_layers), stages, "grpc")


def spec_of(the_plan: Plan, index: int) -> StageSpec:
    return StageSpec(the_plan, index, EPOCH, "", "127.0.0.1", 0, emulation=EMULATION, link_timeout_seconds=30.0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return True


def maps_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def ended(pid: int) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while alive(pid):  # the kernel tells nobody but the parent
            await asyncio.sleep(0.05)


class Held:
    """A stage process and the reason of its end."""

    def __init__(self) -> None:
        self.process: StageProcess
        self.exit: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.events: list[StageEvent] = []
        self.failed = asyncio.Event()

    def hear(self, event: StageEvent) -> None:
        self.events.append(event)
        if event.type == "failed":
            self.failed.set()

    async def reason(self) -> str:
        return await asyncio.wait_for(asyncio.shield(self.exit), PATIENCE_SECONDS)


def free_addresses(num: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num)]
        return [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]


@asynccontextmanager
async def started(*specs: StageSpec, runtime: RuntimeSection | None = None) -> AsyncIterator[list[Held]]:
    held = [Held() for _ in specs]
    try:
        for one, spec in zip(held, specs, strict=True):
            one.process = await StageProcess.start(
                spec, runtime or RuntimeSection(), on_progress=one.hear, on_exit=one.exit.set_result
            )
        yield held
    finally:
        for one in held:
            await one.process.stop()


@asynccontextmanager
async def linked(*specs: StageSpec, transport: str = "grpc") -> AsyncIterator[tuple[list[Held], list[str]]]:
    async with started(*specs) as held:
        addresses = [(await one.process.loaded()).address for one in held]
        command = LinkCommand(transport, tuple(addresses), tuple(free_addresses(len(specs))))
        await asyncio.gather(*(one.process.link(command) for one in held))
        yield held, addresses


class Engine:
    """Run streams to all stages, as the real engine opens them."""

    def __init__(self, the_plan: Plan, addresses: list[str], epoch: Epoch = EPOCH) -> None:
        self.reports: list[asyncio.Queue[Report]] = [asyncio.Queue() for _ in addresses]
        self.lost: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
        self.streams = [
            StageStream(
                index,
                address,
                the_plan,
                str(epoch),
                capacity=64,
                on_report=self.reports[index].put_nowait,
                on_lost=lambda stage, reason: self.lost.put_nowait((stage, reason)),
            )
            for index, address in enumerate(addresses)
        ]

    async def __aenter__(self) -> Engine:
        for stream in self.streams:
            await stream.open(PATIENCE_SECONDS)
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self.streams:
            await stream.close()

    def put(self, header: Microbatch) -> None:
        message = stage_pb2.EngineMessage(microbatch=encode_microbatch(header)).SerializeToString()
        for stream in self.streams:
            stream.put(message)

    async def report(self, stage: int) -> Report:
        return await asyncio.wait_for(self.reports[stage].get(), PATIENCE_SECONDS)


PREFILL = Microbatch(
    0, Kind.PREFILL, rows=(1,), tokens=(5, 6, 7), sample=True, admit=(RowSpec(1, Sampling(seed=4), choice=0),)
)
CONTROL = Microbatch(1, Kind.CONTROL)


async def test_microbatches_travel_through_two_processes() -> None:
    two = plan(2)
    async with linked(spec_of(two, 0), spec_of(two, 1)) as (held, addresses), Engine(two, addresses) as engine:
        engine.put(PREFILL)
        for i in range(1, 5):
            engine.put(Microbatch(i, Kind.DECODE, rows=(1,), tokens=(0,), sample=True))
        engine.put(Microbatch(5, Kind.CONTROL, release=(1,)))
        first = [await engine.report(0) for _ in range(6)]
        last = [await engine.report(1) for _ in range(6)]
        assert [r.microbatch_id for r in first] == [r.microbatch_id for r in last] == [0, 1, 2, 3, 4, 5]
        assert [r.sent_bytes for r in first] == [3 * 7168, *[7168] * 4, 0]
        assert min(first[0].compute_seconds, last[0].compute_seconds) >= EMULATION.seconds_per_step
        tokens = [s.token_id for r in last for s in r.sampled]
        assert tokens == [scripted_token(EMULATION, 4, 0, i) for i in range(5)]
        if sys.platform.startswith("linux"):
            assert "libmlx" not in maps_of(held[0].process.pid), "an emulated stage needs no mlx"
        await asyncio.gather(*(one.process.stop() for one in held))
        for one in held:
            assert not alive(one.process.pid)
            assert not one.exit.done(), "what was asked for is not reported as a loss"


async def refusal(address: str, metadata: dict[str, str]) -> str:
    """Open a Run stream with this metadata; gives the refusal."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(RUN_METHOD)(metadata=tuple(metadata.items()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), PATIENCE_SECONDS)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value.details())


async def test_a_stream_of_another_epoch_plan_or_pipeline_is_refused_and_harms_nobody() -> None:
    one = plan(1)
    right = {"epoch": str(EPOCH), "plan-hash": one.hash(), "pipeline": "pipe"}
    async with linked(spec_of(one, 0)) as (_, addresses):
        (address,) = addresses
        assert "which is over" in await refusal(address, {**right, "epoch": "2.9"})
        for key in right:
            assert (await refusal(address, {**right, key: "9.9"})).startswith("fenced: ")
        async with Engine(one, addresses) as engine:
            assert "has had its one stream" in await refusal(address, right)
            engine.put(PREFILL)
            assert (await engine.report(0)).microbatch_id == 0


async def test_a_stream_before_the_links_is_refused() -> None:
    one = plan(1)
    async with started(spec_of(one, 0)) as (held,):
        address = (await held.process.loaded()).address
        metadata = {"epoch": str(EPOCH), "plan-hash": one.hash(), "pipeline": "pipe"}
        assert "not linked yet" in await refusal(address, metadata)


async def test_the_epoch_ends_with_the_engines_stream() -> None:
    one = plan(1)
    async with linked(spec_of(one, 0)) as ((held,), addresses):
        async with Engine(one, addresses):
            pass
        assert "engine" in await held.reason()
        await ended(held.process.pid)
        assert held.events[-1].type == "failed"


async def test_a_killed_stage_ends_its_neighbour_and_both_are_told() -> None:
    two = plan(2)
    async with linked(spec_of(two, 0), spec_of(two, 1)) as (held, addresses), Engine(two, addresses) as engine:
        engine.put(PREFILL)
        await engine.report(1)
        os.kill(held[1].process.pid, signal.SIGKILL)
        assert "killed by SIGKILL (out of memory?)" in await held[1].reason()
        assert (await asyncio.wait_for(engine.lost.get(), PATIENCE_SECONDS))[0] == 1
        engine.put(Microbatch(1, Kind.DECODE, rows=(1,), tokens=(0,), sample=True))
        assert "hop 0→1" in await held[0].reason()
        stage, reason = await asyncio.wait_for(engine.lost.get(), PATIENCE_SECONDS)
        assert stage == 0
        assert reason.startswith("link_closed: "), "the stage says why before it goes"


async def test_a_stop_in_the_middle_of_an_end_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    two = plan(2)
    async with linked(spec_of(two, 0), spec_of(two, 1)) as (held, addresses):
        async with Engine(two, addresses):
            pass
        for one in held:
            await asyncio.wait_for(one.failed.wait(), PATIENCE_SECONDS)
            await one.process.stop()
    assert "Traceback" not in capfd.readouterr().err


async def test_a_stopped_stage_can_be_stopped() -> None:
    async with started(spec_of(plan(1), 0)) as (held,):
        await held.process.loaded()
        os.kill(held.process.pid, signal.SIGSTOP)
        await held.process.stop(grace_seconds=0.1)
        assert not alive(held.process.pid)


async def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with started(replace(spec_of(plan(1), 0), port=port)) as (held,):
            with pytest.raises(PortInUse, match=str(port)):
                await held.process.loaded()


async def test_loading_has_a_deadline() -> None:
    async with started(spec_of(plan(1), 0), runtime=RuntimeSection(load_timeout=0.001)) as (held,):
        with pytest.raises(StageStartError, match=r"did not load within 0\.001 s"):
            await held.process.loaded()
        await held.reason()
        assert not alive(held.process.pid)


async def test_a_neighbour_that_is_not_there_is_a_link_error() -> None:
    two = plan(2)
    async with started(spec_of(two, 0)) as (held,):
        address = (await held.process.loaded()).address
        with socket.create_server(("127.0.0.1", 0)) as silent:
            nobody = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(LinkUnavailable, match=nobody):
                await held.process.link(LinkCommand("grpc", (address, nobody), timeout_seconds=0.5))
        assert nobody in await held.reason()


# -- processes that outlive their epoch ---------------------------------------------------------------

NEXT = Epoch(EPOCH.version, EPOCH.incarnation + 1)


def kept(spec: StageSpec) -> StageSpec:
    return replace(spec, keep=True)


async def go_over(one: Held, spec: StageSpec) -> StageEvent:
    assert one.process.can_become(spec)
    await one.process.adopt(spec, on_progress=one.hear, on_exit=one.exit.set_result)
    return await one.process.loaded()


async def test_a_process_whose_neighbour_died_goes_on_in_the_next_epoch_and_nothing_old_is_heard() -> None:
    two = plan(2)
    specs = [kept(spec_of(two, index)) for index in range(2)]
    async with linked(*specs) as (held, addresses):
        first, second = held
        pid = first.process.pid
        async with Engine(two, addresses) as engine:
            engine.put(PREFILL)
            await engine.report(1)
            assert first.process.can_become(replace(specs[0], epoch=NEXT))
            assert not first.process.can_become(specs[0]), "an epoch is not entered twice"
            os.kill(second.process.pid, signal.SIGKILL)
            await second.reason()
            engine.put(Microbatch(1, Kind.DECODE, rows=(1,), tokens=(0,), sample=True))
            await asyncio.wait_for(engine.lost.get(), PATIENCE_SECONDS)
        async with started(replace(specs[1], epoch=NEXT)) as (fresh,):
            event = await go_over(first, replace(specs[0], epoch=NEXT))
            assert event.address == addresses[0], "it listens where it did"
            assert not first.exit.done()
            old = {"epoch": str(EPOCH), "plan-hash": two.hash(), "pipeline": "pipe"}
            assert "which is over" in await refusal(addresses[0], old)
            with pytest.raises(Fenced):
                await connect(addresses[0], HopId("pipe", EPOCH, two.hash(), 0), 5.0)
            again = [addresses[0], (await fresh.process.loaded()).address]
            command = LinkCommand("grpc", tuple(again))
            await asyncio.gather(*(one.process.link(command) for one in (first, fresh)))
            async with Engine(two, again, NEXT) as engine:
                engine.put(PREFILL)
                report = await engine.report(1)
                assert [s.token_id for s in report.sampled] == [scripted_token(EMULATION, 4, 0, 0)]
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while (counts := engine.streams[0].held) is None or counts.rows == 0:
                        engine.streams[0].tick()
                        await asyncio.sleep(0.02)
                assert counts.rows == 1, "the row of the epoch before is gone"
        assert first.process.pid == pid


async def test_a_process_in_the_middle_of_its_epoch_is_called_away_from_it() -> None:
    one = plan(1)
    spec = kept(spec_of(one, 0))
    async with linked(spec) as ((held,), addresses), Engine(one, addresses) as engine:
        engine.put(PREFILL)
        await engine.report(0)
        await go_over(held, replace(spec, epoch=NEXT))
        _, reason = await asyncio.wait_for(engine.lost.get(), PATIENCE_SECONDS)
        assert reason.startswith("fenced: ")
        assert str(NEXT) in reason


async def test_a_frozen_process_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ADOPT_SECONDS", 0.5)
    spec = kept(spec_of(plan(1), 0))
    async with started(spec) as (held,):
        await held.process.loaded()
        os.kill(held.process.pid, signal.SIGSTOP)
        with pytest.raises(StageStartError, match="did not let go within"):
            await go_over(held, replace(spec, epoch=NEXT))
        assert not alive(held.process.pid)


async def test_a_process_whose_device_is_stuck_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event loop answers ticks all the while."""
    monkeypatch.setattr(process, "ADOPT_SECONDS", 1.0)
    one = plan(1)
    stuck = EmulationSpec(seconds_per_step=PATIENCE_SECONDS, burn_python_seconds=PATIENCE_SECONDS)
    spec = kept(replace(spec_of(one, 0), emulation=stuck))
    async with linked(spec) as ((held,), addresses):
        async with Engine(one, addresses) as engine:
            engine.put(PREFILL)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while (counts := engine.streams[0].held) is None or counts.rows == 0:
                    engine.streams[0].tick()
                    await asyncio.sleep(0.02)
        with pytest.raises(StageStartError, match="did not let go within"):
            await go_over(held, replace(spec, epoch=NEXT))
        assert not alive(held.process.pid)


# -- real slices -------------------------------------------------------------------------------------

PROMPT = (65, 66, 67, 68, 69, 70, 71)
NUM_TOKENS = 6


def alone(model_dir: Path) -> list[int]:
    """What one process with all layers says, by mlx-lm itself."""
    model, _ = mlx_lm.load(str(model_dir))
    steps = generate_step(mx.array(PROMPT), model, max_tokens=NUM_TOKENS)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("transport", ["grpc", "ring"])
async def test_two_processes_with_half_a_model_each_say_what_one_says(tmp_path: Path, transport: str) -> None:
    model_dir = write_tiny_model(tmp_path / "tiny", layers=4, width=64, vocab=320)
    two = plan(2, model="tiny")
    specs = [
        replace(spec_of(two, i), emulation=None, model_dir=str(model_dir), device="cpu", memory_budget_bytes=2**30)
        for i in range(2)
    ]
    async with linked(*specs, transport=transport) as (held, addresses), Engine(two, addresses) as engine:
        loading = [event for event in held[0].events if event.type == "loading"]
        assert loading
        assert loading[-1].done_bytes == loading[-1].total_bytes > 0
        event = await held[0].process.loaded()
        assert event.memory_bytes > 0
        # Two layers of two heads of 16 float32 keys and values.
        assert (event.can_trim, event.kv_fixed_bytes, event.kv_bytes_per_position) == (True, 0, 2 * 2 * 2 * 16 * 4)
        # The prompt in two chunks that follow each other without waiting, then one step after the other.
        spec = RowSpec(1, GREEDY, choice=0)
        engine.put(Microbatch(0, Kind.PREFILL, rows=(1,), tokens=PROMPT[:4], admit=(spec,)))
        engine.put(Microbatch(1, Kind.PREFILL, rows=(1,), tokens=PROMPT[4:], sample=True))
        tokens: list[int] = []
        assert (await engine.report(1)).sampled == ()
        for i in range(NUM_TOKENS):
            report = await engine.report(1)
            assert not report.failed
            tokens.append(report.sampled[0].token_id)
            if i + 1 < NUM_TOKENS:
                engine.put(Microbatch(i + 2, Kind.DECODE, rows=(1,), tokens=(tokens[-1],), sample=True))
        first = await engine.report(0)
        assert first.sent_bytes == 4 * 64 * 4
        load = Load(2, entry=5, length=3)
        engine.put(Microbatch(99, Kind.PREFILL, (2,), (1, 2), admit=(replace(spec, row=2),), load=(load,), sample=True))
        report = await engine.report(1)
        assert (report.missing, report.sampled, report.failed) == ((2,), (), ())
    assert tokens == alone(model_dir)


async def test_a_survivor_takes_over_the_other_half_and_says_what_one_process_says(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "tiny", layers=4, width=64, vocab=320)
    two, whole = plan(2, model="tiny"), replace(plan(1, model="tiny"), version=EPOCH.version + 1)
    real = {"emulation": None, "model_dir": str(model_dir), "device": "cpu", "memory_budget_bytes": 2**30}
    specs = [kept(replace(spec_of(two, i), **real)) for i in range(2)]
    async with linked(*specs) as (held, addresses):
        async with Engine(two, addresses) as engine:
            engine.put(Microbatch(0, Kind.PREFILL, (1,), PROMPT, admit=(RowSpec(1, GREEDY, 0),), sample=True))
            await engine.report(1)
        survivor = held[1].process
        wider = replace(specs[1], plan=whole, index=0, epoch=Epoch(whole.version, 1))
        held[1].events.clear()
        event = await go_over(held[1], wider)
        assert event.memory_bytes > 0
        await survivor.link(LinkCommand("inprocess", (addresses[1],)))
        async with Engine(whole, addresses[1:], wider.epoch) as engine:
            tokens: list[int] = []
            spec = RowSpec(1, GREEDY, choice=0)
            engine.put(Microbatch(0, Kind.PREFILL, rows=(1,), tokens=PROMPT, admit=(spec,), sample=True))
            for i in range(NUM_TOKENS):
                tokens.append((await engine.report(0)).sampled[0].token_id)
                engine.put(Microbatch(i + 1, Kind.DECODE, rows=(1,), tokens=(tokens[-1],), sample=True))
    assert tokens == alone(model_dir)


async def test_a_missing_checkpoint_is_told_as_such(tmp_path: Path) -> None:
    spec = replace(spec_of(plan(1), 0), emulation=None, model_dir=str(tmp_path / "nothing"), device="cpu")
    async with started(spec) as (held,):
        with pytest.raises(CheckpointError, match="nothing"):
            await held.process.loaded()
        assert "nothing" in await held.reason()


# -- agents that die or freeze ----------------------------------------------------------------------

AGENT = """
import asyncio, sys
from mlx_cluster.config.schema import RuntimeSection
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import StageSpec

async def main():
    process = await StageProcess.start(StageSpec.from_line(sys.argv[1]), RuntimeSection())
    await process.loaded()
    print(process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def agent() -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """An agent of its own with one loaded stage process."""
    line = spec_of(plan(1), 0).to_line()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, line, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield process, int(await process.stdout.readline())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_killed_agent_leaves_no_orphan() -> None:
    async with agent() as (process, pid):
        assert alive(pid)
        process.kill()
        await ended(pid)


async def test_the_stage_of_a_frozen_agent_dies_by_its_timer_and_that_of_a_living_one_does_not() -> None:
    async with started(spec_of(plan(1), 0)) as (living,), agent() as (process, pid):
        await living.process.loaded()
        process.send_signal(signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        frozen_at = loop.time()
        await ended(pid)
        assert loop.time() - frozen_at > AGENT_SILENCE_SECONDS / 2
        assert living.process.running
