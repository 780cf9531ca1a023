"""The engine over real gRPC streams to stages that report scripted tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest

from mlx_cluster._pb import stage_pb2
from mlx_cluster.config.schema import SchedulerSection
from mlx_cluster.engine import remote as remote_engine
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.engine.remote import SERVICE, EngineService, RemoteEngine
from mlx_cluster.errors import (
    ContextLengthExceeded,
    QueueTimeout,
    Recovering,
    RowFailed,
    StageLost,
    StageStartError,
    Unavailable,
)
from mlx_cluster.microbatch import Kind
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment
from mlx_cluster.request import Admitted, Event, Finished, Sampling, SequenceRequest, Token
from tests.fake_stages import FakeStage, scripted_token

PLAN = Plan(
    "p",
    1,
    ModelRef("m", "hash", 28),
    (StageAssignment(0, 0, 0, 10), StageAssignment(1, 1, 10, 19), StageAssignment(2, 2, 19, 28)),
    "grpc",
)


def request(tokens: int = 5, prompt: int = 4, **kw: object) -> SequenceRequest:
    return SequenceRequest("r", "m", tuple(range(1, prompt + 1)), tokens, Sampling(), **kw)  # type: ignore[arg-type]


@pytest.fixture
async def stages() -> AsyncIterator[list[FakeStage]]:
    started = [await FakeStage(i, last=i == 2).start() for i in range(3)]
    yield started
    for stage in started:
        await stage.stop()


@pytest.fixture
async def engine(stages: list[FakeStage]) -> AsyncIterator[PipelineEngine]:
    engine = make_engine(stages)
    await engine.start(10)
    yield engine
    await engine.stop()


def make_engine(stages: list[FakeStage], deadline: float = 30.0, max_wait_ms: float = 0.0) -> PipelineEngine:
    addresses = [stage.address for stage in stages]
    settings = SchedulerSection(prefill_chunk=8, max_rows=4, max_wait_ms=max_wait_ms)
    return PipelineEngine(PLAN, Epoch(1, 2), addresses, settings, max_context=100, report_deadline_seconds=deadline)


async def collect(engine: PipelineEngine | RemoteEngine, wanted: SequenceRequest) -> list[Event]:
    return [event async for event in engine.generate(wanted)]


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def test_tokens_come_in_order_and_every_stage_hears_the_same(
    engine: PipelineEngine, stages: list[FakeStage]
) -> None:
    events = await collect(engine, request(tokens=5))
    assert events[0] == Admitted()
    assert events[1:-1] == [Token(i, scripted_token(0, i)) for i in range(5)]
    assert events[-1] == Finished("length", 4, 5)
    await until(lambda: all(stage.headers[-1].kind is Kind.CONTROL for stage in stages))
    assert stages[0].headers == stages[1].headers == stages[2].headers
    assert stages[0].headers[-1].release == (0,)
    assert stages[1].metadata["epoch"] == "1.2"
    assert stages[1].metadata["plan-hash"] == PLAN.hash()


async def test_many_at_once_each_get_their_own_tokens(engine: PipelineEngine) -> None:
    results = await asyncio.gather(*(collect(engine, request(tokens=7)) for _ in range(11)))
    for events in results:
        tokens = [e for e in events if isinstance(e, Token)]
        assert [t.index for t in tokens] == list(range(7))
    firsts = {next(e.token_id for e in events if isinstance(e, Token)) for events in results}
    assert firsts == {scripted_token(row, 0) for row in range(11)}


async def test_the_canary_goes_through_all_stages(engine: PipelineEngine, stages: list[FakeStage]) -> None:
    await engine.canary(10)
    assert [h.kind for h in stages[2].headers][:2] == [Kind.PREFILL, Kind.DECODE]


async def test_closing_the_generator_releases_the_row(engine: PipelineEngine, stages: list[FakeStage]) -> None:
    async with contextlib.aclosing(engine.generate(request(tokens=90))) as events:
        async for event in events:
            if isinstance(event, Token) and event.index == 3:
                break
    await until(lambda: any(h.release == (0,) for h in stages[2].headers))
    await until(lambda: engine.statistics()["rows"] == 0)


async def test_a_lost_stage_ends_everything_with_a_typed_error(engine: PipelineEngine, stages: list[FakeStage]) -> None:
    stages[1].fail_with = stage_pb2.StageFailure(code="link_closed", message="the peer is gone")
    stages[2].go_on.clear()  # nothing comes to it any more
    with pytest.raises(StageLost, match=r"stage 1 \(layers 10…18\) on node 1: link_closed: the peer is gone"):
        await collect(engine, request())
    assert engine.lost.is_set()
    with pytest.raises(StageLost):
        await collect(engine, request())


async def test_a_stage_that_dies_while_a_request_waits(engine: PipelineEngine, stages: list[FakeStage]) -> None:
    stages[2].go_on.clear()
    task = asyncio.create_task(collect(engine, request()))
    await until(lambda: stages[2].headers)
    await stages[2].stop()
    with pytest.raises(StageLost, match="stage 2"):
        await task


async def test_the_stage_that_died_is_the_cause_not_the_neighbour_that_says_so_first(
    engine: PipelineEngine, stages: list[FakeStage]
) -> None:
    stages[2].fail_with = stage_pb2.StageFailure(code="link_closed", message="hop 1→2: stage 1 is gone")
    stages[1].go_on.clear()
    task = asyncio.create_task(collect(engine, request()))
    await until(lambda: stages[2].headers and stages[1].headers)
    assert not engine.lost.is_set()
    await stages[1].stop()
    with pytest.raises(StageLost, match=r"stage 1 \(layers 10…18\) on node 1: "):
        await task


async def test_an_overdue_report_names_the_stage(stages: list[FakeStage]) -> None:
    engine = make_engine(stages, deadline=0.5)
    await engine.start(10)
    stages[1].go_on.clear()
    stages[2].go_on.clear()
    with pytest.raises(StageLost, match="microbatch 0 is not reported"):
        await collect(engine, request())
    assert engine.hung == 1, "its process is not to be kept"
    for stage in stages:
        stage.go_on.set()
    await engine.stop()


async def test_a_stage_that_does_not_answer_fails_the_start(stages: list[FakeStage]) -> None:
    await stages[1].stop()
    engine = make_engine(stages)
    with pytest.raises(StageStartError, match=r"stage 1 at .* did not answer"):
        await engine.start(0.5)
    await engine.stop()


async def test_a_row_that_a_stage_cannot_execute_fails_alone(engine: PipelineEngine, stages: list[FakeStage]) -> None:
    stages[0].bad_tokens = frozenset({77})
    bad = SequenceRequest("bad", "m", (1, 77), 3, Sampling())
    good, failed = await asyncio.gather(collect(engine, request()), collect(engine, bad), return_exceptions=True)
    assert isinstance(failed, RowFailed)
    assert isinstance(good, list)
    assert isinstance(good[-1], Finished)


async def test_what_does_not_fit_the_context_is_refused(engine: PipelineEngine) -> None:
    with pytest.raises(
        ContextLengthExceeded, match="98 prompt tokens and 5 requested ones are 103, the context holds 100"
    ):
        await collect(engine, request(prompt=98))


async def test_a_stopped_engine_refuses(stages: list[FakeStage]) -> None:
    engine = make_engine(stages)
    await engine.start(10)
    await engine.stop()
    with pytest.raises(Unavailable, match="shutting down"):
        await collect(engine, request())


async def test_an_engine_on_another_node_gives_the_same_events_and_errors(engine: PipelineEngine) -> None:
    def resolve(pipeline: str) -> PipelineEngine:
        if pipeline != "m#2":
            raise Unavailable(f"no engine for {pipeline}", retry_after_seconds=3.5)
        return engine

    server = grpc.aio.server()
    EngineService(resolve).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        remote = RemoteEngine(channel, "m#2")
        events = await collect(remote, request(tokens=3))
        assert [type(e) for e in events] == [Admitted, Token, Token, Token, Finished]
        with pytest.raises(Unavailable, match="no engine for x") as caught:
            await collect(RemoteEngine(channel, "x"), request())
        assert caught.value.retry_after_seconds == 3.5
        async with contextlib.aclosing(remote.generate(request(tokens=90))) as stream:
            async for event in stream:
                if isinstance(event, Token):
                    break
        await until(lambda: engine.statistics()["rows"] == 0)
        await server.stop(None)
        with pytest.raises(Unavailable, match="cannot be reached"):
            await collect(remote, request())


async def test_an_engines_node_that_falls_silent_is_given_up() -> None:
    """What answers the call never says a word, as a frozen process would not."""

    async def silent(_request: Any, _context: Any) -> None:
        await asyncio.sleep(60)

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(silent)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Generate": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(Recovering, match="silent"):
            await collect(RemoteEngine(channel, "m", silence_seconds=0.05), request())
    await server.stop(None)


async def test_a_slow_engine_on_another_node_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of the sequence for many times the silence that is allowed."""
    monkeypatch.setattr(remote_engine, "TICK_SECONDS", 0.02)

    class Slow:
        async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
            yield Admitted()
            await asyncio.sleep(2.0)
            yield Finished("length", 1, 0)

    server = grpc.aio.server()
    EngineService(lambda _: Slow()).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        events = await collect(RemoteEngine(channel, "m", silence_seconds=1.0), request())
        assert [type(e) for e in events] == [Admitted, Finished]
    await server.stop(None)


async def test_steps_of_several_sizes_are_timed_when_nobody_wants_anything(stages: list[FakeStage]) -> None:
    engine = make_engine(stages)
    await engine.start(10)
    await engine.canary(10)
    await engine.rehearsed()
    sizes = {len(h.rows) for h in stages[2].headers if h.kind is Kind.DECODE}
    assert sizes >= {1, 2, 4}, "as many as max_rows allows"
    await until(lambda: engine.statistics()["rows"] == 0)
    await engine.stop()


async def test_a_client_does_not_wait_for_a_measurement(stages: list[FakeStage]) -> None:
    engine = make_engine(stages)
    await engine.start(10)
    await engine.canary(10)
    for stage in stages:
        stage.go_on.clear()
    await until(lambda: engine.statistics()["in_flight"] > 0)
    task = asyncio.create_task(collect(engine, request(tokens=3)))
    await until(lambda: engine.statistics()["rows"] + engine.statistics()["waiting"] == 1)
    for stage in stages:
        stage.go_on.set()
    assert [type(e) for e in await task][-1] is Finished
    await engine.stop()


async def test_who_waits_too_long_for_a_row_hears_it_while_nothing_else_happens(stages: list[FakeStage]) -> None:
    engine = make_engine(stages)
    await engine.start(10)
    for stage in stages:
        stage.go_on.clear()
    running = [asyncio.create_task(collect(engine, request())) for _ in range(4)]
    await until(lambda: engine.statistics()["rows"] == 4)
    with pytest.raises(QueueTimeout, match=r"within 0\.1 s"):
        await collect(engine, request(queue_seconds=0.1))
    for stage in stages:
        stage.go_on.set()
    assert [len(events) for events in await asyncio.gather(*running)] == [7] * 4
    await engine.stop()


async def test_a_lone_prompt_goes_when_its_wait_for_company_is_over(stages: list[FakeStage]) -> None:
    engine = make_engine(stages, max_wait_ms=30)
    await engine.start(10)
    assert len(await collect(engine, request())) == 7
    await engine.stop()


async def test_a_row_that_a_stage_holds_and_nobody_has_is_found(
    stages: list[FakeStage], capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in stages:
        stage.held = stage_pb2.Held(rows=0, entries=2)
    engine = make_engine(stages)
    await engine.start(10)
    await collect(engine, request())
    await until(lambda: engine.statistics()["held"] == [(0, 2)] * 3)
    await until(lambda: engine._scheduler.idle and not engine._trips)
    for _ in range(3):
        engine._audit()
    assert engine.statistics()["unaccounted"] == {}
    stages[1].held = stage_pb2.Held(rows=1, entries=2)
    engine._streams[1].tick()
    await until(lambda: engine.statistics()["held"][1] == (1, 2))
    engine._audit()
    assert engine.statistics()["unaccounted"] == {1: 1}
    assert "stages hold rows that nobody has" in "".join(capsys.readouterr())
    await engine.stop()
