"""One generation exchange: from an ``Ask`` to the last byte of its answer.

Owns: the order prepare → admission → status → text → usage → end, the concurrency limit, errors after the status.
Does not own: sessions and dialects.
Invariant: the status is sent after admission; what fails later is the dialect's error event and end, never silence.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from mlx_cluster import log
from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.errors import ClusterError, DeadlineExceeded, Overloaded
from mlx_cluster.gateway.ask import Ask
from mlx_cluster.gateway.catalogue import Catalogue
from mlx_cluster.gateway.client import SEND_BODY, ClientGone, Receive, Send, send_within, unless_gone
from mlx_cluster.gateway.echo import Echoed
from mlx_cluster.gateway.errors import SlowReader, is_internal
from mlx_cluster.gateway.idempotency import KeyBook
from mlx_cluster.gateway.keys import Keys
from mlx_cluster.gateway.openai import Answered, CompletionDialect, Dialect, Head, best
from mlx_cluster.gateway.parts import Part
from mlx_cluster.gateway.prepare import Prepared, prepare
from mlx_cluster.gateway.session import ChoiceEnd, Delta, Limits, PartDelta, Session, Usage
from mlx_cluster.gateway.sse import EVENT_STREAM, EventWriter
from mlx_cluster.metrics import GatewayMetrics
from mlx_cluster.tokenizer import Tokenizer

_log = log.get("gateway")

MakeDialect = Callable[[Head, Tokenizer], Dialect]


@dataclass(slots=True)
class Gateway:
    """What all exchanges of one gateway share."""

    catalogue: Catalogue
    settings: ApiGatewaySection
    metrics: GatewayMetrics
    in_flight: int = field(default=0)
    keys: Keys = field(init=False)
    key_book: KeyBook = field(default_factory=KeyBook)

    def __post_init__(self) -> None:
        self.keys = Keys(self.settings)

    @contextmanager
    def place(self) -> Generator[None]:
        """One of the places of ``max_concurrent_requests``. Raises ``Overloaded`` when all are taken."""
        limit = self.settings.max_concurrent_requests
        if self.in_flight >= limit:
            raise Overloaded(
                f"this gateway already serves {limit} requests (api_gateway.max_concurrent_requests): "
                "try again, or ask another node",
                retry_after_seconds=1.0,
            )
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)

    @property
    def limits(self) -> Limits:
        settings = self.settings
        return Limits(settings.timeout, settings.idle_timeout, settings.keepalive_seconds, settings.recovery_timeout)


class GenerationResponse(Response):
    """Runs one exchange as the response itself, so that a client that leaves cancels all of it.

    Errors before the status are raised, for the application to answer.
    """

    def __init__(
        self,
        gateway: Gateway,
        ask: Ask,
        make_dialect: MakeDialect,
        answer_id: str,
        request_id: str,
        *,
        content_type: bytes = EVENT_STREAM,
    ) -> None:
        super().__init__()
        self._gateway = gateway
        self._ask = ask
        self._make_dialect = make_dialect
        self._answer_id = answer_id
        self._request_id = request_id
        self._content_type = content_type  # of a stream
        self._started_at = asyncio.get_running_loop().time()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._exchange(send, scope["state"][SEND_BODY]))

    async def _exchange(self, send: Send, send_body: Send) -> None:
        # The place is free and the engine's rows are released before the last bytes go out: a client that sends its
        # next request as soon as it has its answer must not find its own old one in the way.
        if self._ask.stream:
            writer = EventWriter(send, send_body, self._gateway.settings.slow_reader_timeout, self._content_type)
            with self._gateway.place():
                last = await self._stream(writer)
            try:
                await writer.write(last)
            except SlowReader:
                raise ClientGone from None
            await writer.end()
            return
        with self._gateway.place():
            body = await self._whole()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        seconds = self._gateway.settings.idle_timeout
        await send_within(send, {"type": "http.response.start", "status": 200, "headers": headers}, seconds)
        await send_within(send, {"type": "http.response.body", "body": body, "more_body": False}, seconds)

    async def _whole(self) -> bytes:
        """The body of an answer in one piece. Every error is raised, and becomes a status."""
        count = self._ask.num_sequences
        parts: list[list[Part]] = [[] for _ in range(count)]
        ends = [ChoiceEnd(index, "length", 0) for index in range(count)]
        echoes: list[Echoed | None] = [None] * count
        async with self._within_total(), self._session() as (session, dialect):
            async for batch in session.batches():
                for event in batch:
                    if isinstance(event, Delta):
                        parts[event.choice].append(event.piece)
                    elif isinstance(event, PartDelta):
                        parts[event.choice].append(event.part)
                    elif isinstance(event, ChoiceEnd):
                        ends[event.choice] = event
                    elif isinstance(event, Echoed):
                        echoes[event.choice] = event
        choices = best(
            [Answered(end.choice, parts[end.choice], end.reason, end.stop_string, echoes[end.choice]) for end in ends],
            self._ask.num_drawn,
            self._ask.num_choices,
        )
        return json.dumps(dialect.whole(choices, session.usage), ensure_ascii=False).encode()

    async def _stream(self, writer: EventWriter) -> bytes:
        """Write the stream up to its last bytes, and return those. Errors before admission are raised."""
        async with self._session() as (session, dialect):
            await writer.start()
            try:
                async with self._within_total():
                    if opening := dialect.start(self._ask.num_sequences):
                        await writer.write(opening)
                    async for batch in session.batches():
                        await writer.write(b"".join([_event(event, dialect) for event in batch]))
            except ClientGone:
                raise
            except Exception as error:  # noqa: BLE001 - the root of a stream: logged, and told to the client
                return self._failure(error, dialect)
        return dialect.end(session.usage)

    @asynccontextmanager
    async def _within_total(self) -> AsyncGenerator[None]:
        """Raises ``DeadlineExceeded`` when the whole answer takes too long."""
        seconds = self._gateway.settings.total_timeout
        total = asyncio.timeout_at(self._started_at + seconds)
        try:
            async with total:
                yield
        except TimeoutError:
            if not total.expired():
                raise
            raise DeadlineExceeded(
                f"the answer was not whole within {seconds:g} s (api_gateway.total_timeout): ask for fewer tokens"
            ) from None

    @asynccontextmanager
    async def _session(self) -> AsyncGenerator[tuple[Session, Dialect]]:
        """An admitted session and its dialect; the engine's streams are closed at the end."""
        started_at = self._started_at
        prepared = await self._prepare()
        session = Session(prepared, self._gateway.limits, self._gateway.metrics, started_at)
        try:
            async with session:
                await session.admitted()
                if self._ask.key is not None:
                    self._gateway.key_book.note(self._ask.key)
                yield session, self._make_dialect(self._head(prepared, session.usage), prepared.tokenizer)
        finally:
            self._gateway.metrics.count_key(
                self._ask.caller.label, session.usage.prompt_tokens, session.usage.completion_tokens
            )
            _log.info(
                "generation",
                request=self._request_id,
                answer=self._answer_id,
                model=prepared.model.id,
                prompt_tokens=session.usage.prompt_tokens,
                completion_tokens=session.usage.completion_tokens,
                first_token_seconds=session.first_token_seconds,
                seconds=asyncio.get_running_loop().time() - started_at,
            )

    async def _prepare(self) -> Prepared:
        seconds = self._gateway.settings.timeout
        try:
            async with asyncio.timeout(seconds):
                return await prepare(self._ask, self._answer_id, self._gateway.catalogue)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the prompt was not tokenized within {seconds:g} s (api_gateway.timeout): shorten it, or try later"
            ) from None

    def _head(self, prepared: Prepared, usage: Usage) -> Head:
        ask = self._ask
        return Head(
            id=self._answer_id,
            created=int(time.time()),
            model=prepared.model.id,
            include_usage=ask.include_usage,
            continuous_usage=ask.continuous_usage,
            with_logprobs=ask.sampling.top_logprobs is not None,
            prompt_tokens=prepared.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            max_tokens=prepared.sequences[0].max_tokens,
        )

    def _failure(self, error: Exception, dialect: Dialect) -> bytes:
        """The error event of a stream whose status is already sent."""
        code = getattr(error, "code", ClusterError.code)
        self._gateway.metrics.stream_errors.labels(code).inc()
        if is_internal(error):
            _log.error("stream failed", request=self._request_id, exc_info=error)
        else:
            _log.warning("stream failed", request=self._request_id, code=code, error=str(error))
        return dialect.failure(error, self._request_id)


def _event(event: Any, dialect: Dialect) -> bytes:
    if isinstance(event, Delta):
        return dialect.delta(event)
    if isinstance(event, PartDelta):
        return dialect.part(event)
    if isinstance(event, ChoiceEnd):
        return dialect.choice_end(event)
    if isinstance(event, Echoed):
        assert isinstance(dialect, CompletionDialect), "no other route has echo"
        return dialect.echoed(event)
    return dialect.alive()
