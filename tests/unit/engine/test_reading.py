"""Prompts that something is read off: alone in their microbatches, computed whole, told once."""

from __future__ import annotations

from mlx_cluster.engine.prefix import Limits, PrefixIndex
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Ended, Policy, Read
from mlx_cluster.microbatch import Kind, Microbatch, PooledRow, Report, Sampled, ScoredToken
from mlx_cluster.request import Sampling, SequenceRequest

PROMPT = tuple(range(1, 41))


def scheduler() -> Scheduler:
    prefix = PrefixIndex(Limits(max_bytes=10_000, bytes_per_position=1, min_tokens=2, can_trim=True))
    return Scheduler(Policy(2, 8, 8, 16, lambda rows: min(rows, 2), 8), prefix)


def score(microbatch: Microbatch, at: int) -> Report:
    """The last stage's report of a chunk that begins at position ``at``."""
    (row,) = microbatch.rows
    scored = tuple(
        ScoredToken(row, position, PROMPT[position], -1.0)
        for position in range(at + 1, min(at + 1 + len(microbatch.tokens), len(PROMPT)))
    )
    return Report(microbatch.id, 1, sampled=(Sampled(row, 7),) if microbatch.sample else (), scored=scored)


def prefill(engine: Scheduler) -> list[Microbatch]:
    """All chunks that go out until there are no more credits or prompts."""
    sent: list[Microbatch] = []
    while (microbatch := engine.next()) is not None and microbatch.kind is Kind.PREFILL:
        sent.append(microbatch)
    return sent


def test_a_scored_prompt_is_told_once_and_computed_whole_again() -> None:
    engine = scheduler()
    request = SequenceRequest("r", "m", PROMPT, 1, Sampling(), prompt_logprobs=1)
    for _ in range(2):  # the second time its prefix is cached, and not used
        sequence = engine.submit(request)
        chunks = prefill(engine)
        assert sum(len(chunk.tokens) for chunk in chunks) == len(PROMPT)
        assert [chunk.load for chunk in chunks] == [()] * len(chunks)
        (spec,) = chunks[0].admit
        assert (spec.history, spec.prompt_length, spec.prompt_logprobs) == (PROMPT, len(PROMPT), 1)
        effects, at = engine.take_effects(), 0
        for chunk in chunks:
            effects += engine.complete(score(chunk, at))
            effects += engine.complete(score(chunk, at))  # of an unknown microbatch by now
            at += len(chunk.tokens)
        read = [token for effect in effects if isinstance(effect, Read) for token in effect.tokens]
        assert [(token.index, token.token_id) for token in read] == list(enumerate(PROMPT))[1:]
        kinds = [type(effect) for effect in effects]
        assert kinds.index(Read) < kinds.index(Drew) < kinds.index(Ended)
        while (control := engine.next()) is not None:
            engine.complete(Report(control.id, 1))
        assert sequence >= 0
        assert engine.idle


def test_a_pooled_prompt_shares_no_microbatch_and_ends_with_its_vector() -> None:
    engine = scheduler()
    pooled = [engine.submit(SequenceRequest("r", "m", (1, 2, 3), 0, Sampling(), pool="last")) for _ in range(2)]
    other = engine.submit(SequenceRequest("r", "m", (1, 2, 3), 1, Sampling()))
    chunks = prefill(engine)
    assert [len(chunk.rows) for chunk in chunks] == [1, 1, 1]
    engine.take_effects()
    ended = [
        effect
        for chunk in chunks[:2]
        for effect in engine.complete(Report(chunk.id, 1, pooled=(PooledRow(chunk.rows[0], (0.6, 0.8)),)))
    ]
    assert ended == [Ended(sequence, "stop", 0, 0, (0.6, 0.8)) for sequence in pooled]
    engine.complete(Report(chunks[2].id, 1, sampled=(Sampled(chunks[2].rows[0], 9),)))
    assert other not in pooled
    while (control := engine.next()) is not None:
        engine.complete(Report(control.id, 1))
    engine.audit()
    assert engine.idle
