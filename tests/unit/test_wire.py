"""decode(encode(value)) == value, for everything that crosses a wire; typed errors keep their class."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster import errors, wire
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
from mlx_cluster.request import Admitted, Finished, Grammar, Sampling, Scored, SequenceRequest, Token

small = st.integers(0, 2**31)
real = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(small, max_size=5).map(tuple)
pairs = st.lists(st.tuples(small, real), max_size=3).map(tuple)
samplings = st.builds(
    Sampling,
    temperature=real,
    top_p=real,
    top_k=small,
    min_p=real,
    seed=st.integers(0, 2**63 - 1),
    presence_penalty=real,
    frequency_penalty=real,
    repetition_penalty=real,
    logit_bias=pairs,
    top_logprobs=st.none() | st.integers(0, 20),
)
grammars = st.none() | st.builds(
    Grammar, kind=st.sampled_from(["json_schema", "regex", "lark", "choice"]), source=st.text(max_size=9)
)
specs = st.builds(
    RowSpec,
    row=small,
    sampling=samplings,
    choice=small,
    first_index=small,
    prompt_length=small,
    history=ids,
    grammar=grammars,
    stop_token_ids=ids,
)
saved_entries = st.builds(Saved, digest=st.binary(max_size=16), salt=st.text(max_size=5), tokens=ids)
microbatches = st.builds(
    Microbatch,
    id=small,
    kind=st.sampled_from(Kind),
    rows=ids,
    tokens=ids,
    group=small,
    sample=st.booleans(),
    admit=st.lists(specs, max_size=2).map(tuple),
    release=ids,
    lengths=ids,
    store=st.lists(st.builds(Store, row=small, entry=small, saved=st.none() | saved_entries), max_size=3).map(tuple),
    load=st.lists(st.builds(Load, row=small, entry=small, length=small, digest=st.binary(max_size=16)), max_size=3).map(
        tuple
    ),
    evict=ids,
    trim=st.lists(st.builds(Trim, row=small, length=small), max_size=3).map(tuple),
)
reports = st.builds(
    Report,
    microbatch_id=small,
    stage=st.integers(0, 64),
    compute_seconds=real,
    wait_seconds=real,
    sent_bytes=small,
    saved_bytes=small,
    sampled=st.lists(
        st.builds(Sampled, row=small, token_id=small, logprob=st.none() | real, top=pairs), max_size=3
    ).map(tuple),
    failed=st.lists(st.builds(FailedRow, row=small, message=st.text(max_size=9)), max_size=2).map(tuple),
    missing=ids,
)
requests = st.builds(
    SequenceRequest,
    request_id=st.text(max_size=9),
    model=st.text(max_size=9),
    prompt=ids,
    max_tokens=small,
    sampling=samplings,
    choice=small,
    stop_token_ids=st.frozensets(small, max_size=3),
    emitted=ids,
    priority=st.integers(-100, 100),
    tenant=st.text(max_size=9),
    queue_seconds=st.none() | st.floats(0, 1e4),
    speculate=st.none() | st.booleans(),
    key=st.text(max_size=9),
    grammar=grammars,
)
events = st.one_of(
    st.builds(Admitted, cached_tokens=small),
    st.builds(Token, index=small, token_id=small, logprob=st.none() | real, top=pairs),
    st.builds(
        Finished,
        reason=st.sampled_from(["stop", "length", "cancelled"]),
        prompt_tokens=small,
        completion_tokens=small,
        cached_tokens=small,
    ),
)


@given(microbatches)
def test_microbatches(value: Microbatch) -> None:
    data = wire.encode_microbatch(value).SerializeToString()
    assert wire.decode_microbatch(stage_pb2.Microbatch.FromString(data)) == value


@given(reports)
def test_reports(value: Report) -> None:
    data = wire.encode_report(value).SerializeToString()
    assert wire.decode_report(stage_pb2.Report.FromString(data)) == value


@given(requests)
def test_requests(value: SequenceRequest) -> None:
    data = wire.encode_sequence_request(value).SerializeToString()
    assert wire.decode_sequence_request(engine_pb2.SequenceRequest.FromString(data)) == value


@given(events)
def test_events(value: Admitted | Token | Finished) -> None:
    data = wire.encode_event(value).SerializeToString()
    assert wire.decode_event(engine_pb2.SequenceEvent.FromString(data)) == value


def test_a_steady_decode_header_is_small() -> None:
    for rows in (1, 8, 32):
        header = Microbatch(90_000, Kind.DECODE, tuple(range(700, 700 + rows)), (150_000,) * rows, 3, sample=True)
        message = stage_pb2.EngineMessage(microbatch=wire.encode_microbatch(header))
        assert message.ByteSize() <= 64 + 16 * rows


@pytest.mark.parametrize(
    "error",
    [
        errors.Overloaded("full", retry_after_seconds=2.5),
        errors.StageLost("gone"),
        errors.ContextLengthExceeded("too long", param="max_tokens"),
        errors.RowFailed("bad row"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_typed_errors_keep_their_class_and_facts(error: errors.ClusterError) -> None:
    with pytest.raises(type(error), match=str(error)) as caught:
        wire.decode_event(engine_pb2.SequenceEvent.FromString(wire.encode_failure(error).SerializeToString()))
    assert getattr(caught.value, "retry_after_seconds", None) == getattr(error, "retry_after_seconds", None)
    assert getattr(caught.value, "param", None) == getattr(error, "param", None)


def test_an_unknown_code_is_still_an_error_of_the_tree() -> None:
    error = wire.error_from_code("from_the_future", "what")
    assert type(error) is errors.ClusterError


@given(st.lists(st.tuples(small, small, real, pairs), max_size=4), st.sampled_from([None, "last", "mean"]))
def test_what_is_read_off_a_prompt_crosses(scores: list[tuple[int, int, float, Any]], pool: Any) -> None:
    scored = tuple(ScoredToken(5, position, token, logprob, top) for position, token, logprob, top in scores)
    report = Report(1, 2, scored=scored, pooled=(PooledRow(3, (0.5, -0.25)),))
    assert wire.decode_report(wire.encode_report(report)) == report
    event = Scored(tuple(Token(position, token, logprob, top) for position, token, logprob, top in scores))
    assert wire.decode_event(wire.encode_event(event)) == event
    finished = Finished("stop", 3, 0, pooled=(0.5, -0.25))
    assert wire.decode_event(wire.encode_event(finished)) == finished
    request = SequenceRequest("r", "m", (1,), 1, Sampling(), prompt_logprobs=0, pool=pool)
    assert wire.decode_sequence_request(wire.encode_sequence_request(request)) == request
    header = Microbatch(1, Kind.PREFILL, admit=(RowSpec(1, Sampling(), 0, prompt_logprobs=0, pool=pool),))
    assert wire.decode_microbatch(wire.encode_microbatch(header)) == header


@given(st.lists(saved_entries, max_size=3))
def test_entries_on_a_disk(entries: list[Saved]) -> None:
    assert wire.decode_saved_entries(wire.encode_saved_entries(entries)) == tuple(entries)
