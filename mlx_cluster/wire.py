"""Frozen values ⇄ protobuf messages: the only file that knows both sides.

Owns: the codecs of the engine-stage and gateway-engine protocols, and the way typed errors cross a wire by their code.
Invariant: ``decode(encode(value)) == value``.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlx_cluster import errors
from mlx_cluster._pb import engine_pb2, stage_pb2
from mlx_cluster.microbatch import (
    FailedRow,
    Kind,
    Load,
    Microbatch,
    PooledRow,
    Report,
    RowSpec,
    Sampled,
    Saved,
    ScoredToken,
    Store,
    Trim,
)
from mlx_cluster.request import Admitted, Event, Finished, Grammar, Sampling, Scored, SequenceRequest, Token

# gRPC's default limit of 4 MiB is below one 512-token chunk of a 7B model (3.67 MB), so every channel and server
# of the project raises it; keepalive finds a peer that vanished without closing its socket.
GRPC_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.max_send_message_length", 256 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
]


# -- sampling -----------------------------------------------------------------------------------


def encode_sampling(value: Sampling) -> stage_pb2.Sampling:
    return stage_pb2.Sampling(
        temperature=value.temperature,
        top_p=value.top_p,
        top_k=value.top_k,
        min_p=value.min_p,
        seed=value.seed,
        presence_penalty=value.presence_penalty,
        frequency_penalty=value.frequency_penalty,
        repetition_penalty=value.repetition_penalty,
        logit_bias=[stage_pb2.LogitBias(token_id=i, bias=b) for i, b in value.logit_bias],
        top_logprobs=value.top_logprobs,
    )


def decode_sampling(message: stage_pb2.Sampling) -> Sampling:
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple((b.token_id, b.bias) for b in message.logit_bias),
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
    )


def encode_grammar(value: Grammar | None) -> stage_pb2.Grammar | None:
    return None if value is None else stage_pb2.Grammar(kind=value.kind, source=value.source)


def decode_grammar(message: stage_pb2.Grammar) -> Grammar:
    return Grammar(message.kind, message.source)  # type: ignore[arg-type]  # the sender's Grammar is typed


# -- engine → stage ------------------------------------------------------------------------------


def encode_microbatch(value: Microbatch) -> stage_pb2.Microbatch:
    return stage_pb2.Microbatch(
        id=value.id,
        kind=int(value.kind),
        group=value.group,
        sample=value.sample,
        rows=value.rows,
        tokens=value.tokens,
        admit=[
            stage_pb2.RowSpec(
                row=spec.row,
                sampling=encode_sampling(spec.sampling),
                choice=spec.choice,
                first_index=spec.first_index,
                prompt_length=spec.prompt_length,
                history=spec.history,
                grammar=encode_grammar(spec.grammar),
                stop_token_ids=spec.stop_token_ids,
                prompt_logprobs=spec.prompt_logprobs,
                pool=spec.pool,
            )
            for spec in value.admit
        ],
        release=value.release,
        lengths=value.lengths,
        store=[stage_pb2.Store(row=s.row, entry=s.entry, saved=_encode_saved(s.saved)) for s in value.store],
        load=[
            stage_pb2.Load(row=item.row, entry=item.entry, length=item.length, digest=item.digest)
            for item in value.load
        ],
        evict=value.evict,
        trim=[stage_pb2.Trim(row=t.row, length=t.length) for t in value.trim],
    )


def decode_microbatch(message: stage_pb2.Microbatch) -> Microbatch:
    return Microbatch(
        id=message.id,
        kind=Kind(message.kind),
        rows=tuple(message.rows),
        tokens=tuple(message.tokens),
        group=message.group,
        sample=message.sample,
        admit=tuple(
            RowSpec(
                row=spec.row,
                sampling=decode_sampling(spec.sampling),
                choice=spec.choice,
                first_index=spec.first_index,
                prompt_length=spec.prompt_length,
                history=tuple(spec.history),
                grammar=decode_grammar(spec.grammar) if spec.HasField("grammar") else None,
                stop_token_ids=tuple(spec.stop_token_ids),
                prompt_logprobs=spec.prompt_logprobs if spec.HasField("prompt_logprobs") else None,
                pool=spec.pool or None,  # type: ignore[arg-type]  # the sender's RowSpec is typed
            )
            for spec in message.admit
        ),
        release=tuple(message.release),
        lengths=tuple(message.lengths),
        store=tuple(
            Store(s.row, s.entry, _decode_saved(s.saved) if s.HasField("saved") else None) for s in message.store
        ),
        load=tuple(Load(item.row, item.entry, item.length, item.digest) for item in message.load),
        evict=tuple(message.evict),
        trim=tuple(Trim(t.row, t.length) for t in message.trim),
    )


def _encode_saved(value: Saved | None) -> stage_pb2.Saved | None:
    return None if value is None else stage_pb2.Saved(digest=value.digest, salt=value.salt, tokens=value.tokens)


def _decode_saved(message: stage_pb2.Saved) -> Saved:
    return Saved(message.digest, message.salt, tuple(message.tokens))


def encode_saved_entries(entries: Iterable[Saved]) -> stage_pb2.SavedEntries:
    return stage_pb2.SavedEntries(
        entries=[stage_pb2.Saved(digest=e.digest, salt=e.salt, tokens=e.tokens) for e in entries]
    )


def decode_saved_entries(message: stage_pb2.SavedEntries) -> tuple[Saved, ...]:
    return tuple(_decode_saved(each) for each in message.entries)


# -- stage → engine ------------------------------------------------------------------------------


def encode_report(value: Report) -> stage_pb2.Report:
    return stage_pb2.Report(
        microbatch_id=value.microbatch_id,
        stage=value.stage,
        compute_seconds=value.compute_seconds,
        wait_seconds=value.wait_seconds,
        sent_bytes=value.sent_bytes,
        saved_bytes=value.saved_bytes,
        sampled=[
            stage_pb2.Sampled(
                row=s.row,
                token_id=s.token_id,
                logprob=s.logprob,
                top=[stage_pb2.TopLogprob(token_id=i, logprob=p) for i, p in s.top],
            )
            for s in value.sampled
        ],
        failed=[stage_pb2.FailedRow(row=f.row, message=f.message) for f in value.failed],
        missing=value.missing,
        scored=[
            stage_pb2.ScoredToken(
                row=s.row, position=s.position, token_id=s.token_id, logprob=s.logprob, top=_encode_top(s.top)
            )
            for s in value.scored
        ],
        pooled=[stage_pb2.PooledRow(row=p.row, values=p.values) for p in value.pooled],
    )


def decode_report(message: stage_pb2.Report) -> Report:
    return Report(
        microbatch_id=message.microbatch_id,
        stage=message.stage,
        compute_seconds=message.compute_seconds,
        wait_seconds=message.wait_seconds,
        sent_bytes=message.sent_bytes,
        saved_bytes=message.saved_bytes,
        sampled=tuple(
            Sampled(
                row=s.row,
                token_id=s.token_id,
                logprob=s.logprob if s.HasField("logprob") else None,
                top=tuple((t.token_id, t.logprob) for t in s.top),
            )
            for s in message.sampled
        ),
        failed=tuple(FailedRow(f.row, f.message) for f in message.failed),
        missing=tuple(message.missing),
        scored=tuple(
            ScoredToken(s.row, s.position, s.token_id, s.logprob, tuple((t.token_id, t.logprob) for t in s.top))
            for s in message.scored
        ),
        pooled=tuple(PooledRow(p.row, tuple(p.values)) for p in message.pooled),
    )


# -- gateway ⇄ engine ----------------------------------------------------------------------------


def encode_sequence_request(value: SequenceRequest) -> engine_pb2.SequenceRequest:
    return engine_pb2.SequenceRequest(
        request_id=value.request_id,
        model=value.model,
        prompt=value.prompt,
        max_tokens=value.max_tokens,
        sampling=encode_sampling(value.sampling),
        choice=value.choice,
        stop_token_ids=sorted(value.stop_token_ids),
        emitted=value.emitted,
        priority=value.priority,
        grammar=encode_grammar(value.grammar),
        tenant=value.tenant,
        queue_seconds=value.queue_seconds,
        speculate=value.speculate,
        key=value.key,
        prompt_logprobs=value.prompt_logprobs,
        pool=value.pool,
        repeatable=value.repeatable,
    )


def decode_sequence_request(message: engine_pb2.SequenceRequest) -> SequenceRequest:
    return SequenceRequest(
        request_id=message.request_id,
        model=message.model,
        prompt=tuple(message.prompt),
        max_tokens=message.max_tokens,
        sampling=decode_sampling(message.sampling),
        choice=message.choice,
        stop_token_ids=frozenset(message.stop_token_ids),
        emitted=tuple(message.emitted),
        priority=message.priority,
        grammar=decode_grammar(message.grammar) if message.HasField("grammar") else None,
        tenant=message.tenant,
        queue_seconds=message.queue_seconds if message.HasField("queue_seconds") else None,
        speculate=message.speculate if message.HasField("speculate") else None,
        key=message.key,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        pool=message.pool or None,  # type: ignore[arg-type]  # the sender's request is typed
        repeatable=message.repeatable,
    )


def encode_event(value: Event) -> engine_pb2.SequenceEvent:
    match value:
        case Admitted(cached_tokens):
            return engine_pb2.SequenceEvent(admitted=engine_pb2.Admitted(cached_tokens=cached_tokens))
        case Token():
            return engine_pb2.SequenceEvent(token=_encode_token(value))
        case Scored(tokens):
            return engine_pb2.SequenceEvent(scored=engine_pb2.Scored(tokens=map(_encode_token, tokens)))
        case Finished():
            return engine_pb2.SequenceEvent(
                finished=engine_pb2.Finished(
                    reason=value.reason,
                    prompt_tokens=value.prompt_tokens,
                    completion_tokens=value.completion_tokens,
                    cached_tokens=value.cached_tokens,
                    pooled=value.pooled,
                )
            )


def _encode_token(value: Token) -> engine_pb2.TokenEvent:
    top = _encode_top(value.top)
    return engine_pb2.TokenEvent(index=value.index, token_id=value.token_id, logprob=value.logprob, top=top)


def _decode_token(message: engine_pb2.TokenEvent) -> Token:
    return Token(
        index=message.index,
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple((t.token_id, t.logprob) for t in message.top),
    )


def _encode_top(top: tuple[tuple[int, float], ...]) -> list[stage_pb2.TopLogprob]:
    return [stage_pb2.TopLogprob(token_id=i, logprob=p) for i, p in top]


def decode_event(message: engine_pb2.SequenceEvent) -> Event:
    """Inverse of ``encode_event``; a failure message is raised as its typed error."""
    match message.WhichOneof("kind"):
        case "admitted":
            return Admitted(message.admitted.cached_tokens)
        case "token":
            return _decode_token(message.token)
        case "scored":
            return Scored(tuple(map(_decode_token, message.scored.tokens)))
        case "finished":
            done = message.finished
            return Finished(
                reason=done.reason,  # type: ignore[arg-type]  # the sender's Finished is typed
                prompt_tokens=done.prompt_tokens,
                completion_tokens=done.completion_tokens,
                cached_tokens=done.cached_tokens,
                pooled=tuple(done.pooled),
            )
        case "failure":
            raise decode_failure(message.failure)
        case _:
            raise errors.LinkMismatch("an engine event without a kind: the nodes run different versions")


def encode_failure(error: errors.ClusterError) -> engine_pb2.SequenceEvent:
    return engine_pb2.SequenceEvent(
        failure=engine_pb2.EngineFailure(
            code=error.code,
            message=str(error),
            retry_after_seconds=getattr(error, "retry_after_seconds", None),
            param=getattr(error, "param", None),
        )
    )


def decode_failure(message: engine_pb2.EngineFailure) -> errors.ClusterError:
    return error_from_code(
        message.code,
        message.message,
        retry_after_seconds=message.retry_after_seconds if message.HasField("retry_after_seconds") else None,
        param=message.param if message.HasField("param") else None,
    )


def error_from_code(
    code: str, text: str, *, retry_after_seconds: float | None = None, param: str | None = None
) -> errors.ClusterError:
    """The error class that owns ``code``, with ``text``; an unknown code gives the root class."""
    cls = _CLASS_OF_CODE.get(code, errors.ClusterError)
    if issubclass(cls, errors.InvalidRequest):
        return cls(text, param=param)
    if issubclass(cls, errors.Unavailable | errors.Overloaded) and retry_after_seconds is not None:
        return cls(text, retry_after_seconds=retry_after_seconds)
    return cls(text)


def _descendants(cls: type[errors.ClusterError]) -> list[type[errors.ClusterError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _descendants(child))]


_CLASS_OF_CODE = {cls.code: cls for cls in _descendants(errors.ClusterError)}
