"""Drafts: what lookup finds, when it pays, and that a scheduler with drafts says what one without says, only sooner."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.engine.prefix import Limits, PrefixIndex
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Ended, Policy
from mlx_cluster.engine.speculation import (
    GRACE_STEPS,
    INDEX_TOKENS_PER_STEP,
    PROBE_EVERY_STEPS,
    PROBE_SHARE,
    BlockCosts,
    Bounds,
    Lookup,
    Mode,
    Speculation,
)
from mlx_cluster.microbatch import Kind, Microbatch
from mlx_cluster.request import Sampling, SequenceRequest
from tests.simulated_pipeline import SimulatedPipeline

STOP = 999
Script = Callable[[int, int], int]


def repeating(period: int) -> Script:
    return lambda row, index: 100 + row + 3 * (index % period)


def unrelated(row: int, index: int) -> int:
    """Few different tokens, so that three of them often stood together before, and mean nothing for the fourth."""
    return random.Random(1000 * row + index).randrange(6)


def request(prompt: tuple[int, ...] = (1, 2, 3), tokens: int = 60, **kw: object) -> SequenceRequest:
    return SequenceRequest("r", "m", prompt, tokens, Sampling(), **kw)  # type: ignore[arg-type]


# -- lookup -----------------------------------------------------------------------------------------


def lookup_of(text: list[int], most: int, *, min_match: int = 3) -> tuple[int, ...]:
    lookup = Lookup(min_match)
    lookup.extend(text, [])
    return lookup.draft(most)


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], (4, 5, 6, 7)),
        ([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3], (5, 9, 1, 2)),  # the latest place
        ([7, 8, 7, 8, 7], (8, 7, 8, 7)),  # goes round
        ([5, 5, 5, 5], (5, 5, 5, 5)),
        ([1, 2, 3, 4, 5, 6], ()),
        ([1, 2], ()),
        ([1, 2, 3], ()),
        ([], ()),
    ],
    ids=str,
)
def test_what_followed_the_last_tokens_the_time_before(text: list[int], draft: tuple[int, ...]) -> None:
    assert lookup_of(text, 4) == draft


def test_a_place_that_proved_right_is_followed_though_a_later_one_looks_alike() -> None:
    passage = list(range(20, 40))
    noise = [passage[9], passage[10], passage[11], 77]  # the same three tokens once more, going on otherwise
    prompt = [*passage, 1, *noise, 2]
    lookup, output = Lookup(3), []
    output += passage[:4]
    lookup.extend(prompt, output)
    for at in range(4, 16, 4):
        assert lookup.draft(4) == tuple(passage[at : at + 4])
        output += passage[at : at + 4]
        lookup.extend(prompt, output)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=80), st.integers(1, 4), st.integers(1, 9))
def test_a_draft_goes_on_from_where_the_same_tokens_stood(text: list[int], min_match: int, most: int) -> None:
    """However the text came in; and there is a draft exactly when its last tokens occurred before."""
    lookup = Lookup(min_match)
    for end in range(0, len(text) + 1, 5):
        lookup.extend(text[:5], text[5 : max(5, end)])
        lookup.draft(most)
    lookup.extend(text[:5], text[5:])
    draft = lookup.draft(most)
    n = min_match
    places = [at for at in range(n, len(text)) if text[at - n : at] == text[len(text) - n :]]
    assert bool(draft) == bool(places)
    if draft:
        assert len(draft) == most
        assert any(draft == tuple(text[at + i % (len(text) - at)] for i in range(most)) for at in places), (
            "the draft stands nowhere in the text"
        )


def test_a_long_prompt_is_indexed_in_shares() -> None:
    prompt = list(range(10 * INDEX_TOKENS_PER_STEP))
    lookup, output = Lookup(3), [5000, 5001, 5002]
    num_steps = 0
    while True:
        lookup.extend(prompt, output)
        num_steps += 1
        if lookup.draft(2):
            break
    assert lookup.draft(2) == (5003, 5004)
    assert num_steps == 5000 // INDEX_TOKENS_PER_STEP + 1


# -- what blocks cost ---------------------------------------------------------------------------------


def costs(per_position: float, base: float = 1.0, stages: int = 2, hop: float = 0.0) -> BlockCosts:
    """Measured at one, two and five positions."""
    block_costs = BlockCosts(stages, lambda: hop)
    for positions, stage in itertools.product((1, 2, 5), range(stages)):
        block_costs.observe(stage, positions, base + per_position * positions)
    return block_costs


def test_costs_are_interpolated_and_extrapolated() -> None:
    linear = costs(1.0)
    assert linear.relative(1, crowded=False) == 1.0
    assert linear.relative(3, crowded=False) == pytest.approx(2.0)
    assert linear.relative(9, crowded=True) == pytest.approx(5.0)
    assert costs(0.0).relative(9, crowded=False) == 1.0


def test_alone_hops_count_and_among_others_the_slowest_stage() -> None:
    block_costs = BlockCosts(2, lambda: 1.0)
    for stage, positions, seconds in ((0, 1, 1.0), (1, 1, 2.0), (0, 4, 1.0), (1, 4, 6.0)):
        block_costs.observe(stage, positions, seconds)
    assert block_costs.relative(4, crowded=False) == pytest.approx(9 / 5)
    assert block_costs.relative(4, crowded=True) == pytest.approx(3.0)


def test_one_hiccup_changes_nothing() -> None:
    block_costs = costs(0.5)
    for _ in range(4):
        block_costs.observe(0, 5, 3.5)
    block_costs.observe(0, 5, 100.0)
    assert block_costs.relative(5, crowded=False) == pytest.approx(7 / 3)


# -- when drafts pay ----------------------------------------------------------------------------------


def simulate(
    script: Script,
    *,
    mode: Mode = "auto",
    step: float = 1.0,
    position: float = 0.05,
    requests: tuple[SequenceRequest, ...] = (request(),),
    prefix: PrefixIndex | None = None,
    stages: int = 3,
    groups: int = 3,
    model: object | None = None,
) -> tuple[SimulatedPipeline, dict[int, list[int]]]:
    """Every sequence's tokens from a pipeline of equal stages where a step takes ``step + position * positions``."""
    block_costs = BlockCosts(stages, lambda: 0.0)

    def seconds(microbatch: Microbatch) -> float:
        return step + position * len(microbatch.tokens)

    def observe(stage: int, microbatch: Microbatch, seconds: float) -> None:
        if microbatch.kind in (Kind.DECODE, Kind.VERIFY) and len(microbatch.rows) == 1:
            block_costs.observe(stage, len(microbatch.tokens), seconds)

    speculation = Speculation(Bounds(mode), block_costs, model)  # type: ignore[arg-type]
    scheduler = Scheduler(Policy(stages, 8, 100, 64, lambda b: min(b, groups)), prefix, speculation)
    pipeline = SimulatedPipeline(scheduler, [seconds] * stages, on_stage_report=observe, script=script)
    for each in requests:
        pipeline.submit(each)
    pipeline.run()
    assert scheduler.idle
    said: dict[int, list[int]] = {}
    for _, effect in pipeline.effects:
        if isinstance(effect, Drew):
            assert effect.token.index == len(said.setdefault(effect.sequence, []))
            said[effect.sequence].append(effect.token.token_id)
    return pipeline, said


def kinds(pipeline: SimulatedPipeline) -> list[Kind]:
    return [microbatch.kind for _, microbatch in pipeline.sent]


@pytest.mark.parametrize("period", [5, 12, 30])
def test_a_text_that_repeats_itself_is_said_much_sooner(period: int) -> None:
    long = request(tokens=200)
    plain, expected = simulate(repeating(period), mode="off", requests=(long,))
    drafted, said = simulate(repeating(period), requests=(long,))
    assert said == expected
    assert Kind.VERIFY not in kinds(plain)
    assert plain.now / drafted.now > 2.5


def test_where_every_position_costs_a_step_only_a_probe_is_left_now_and_then() -> None:
    drafted, _ = simulate(repeating(5), step=0.0, position=1.0, requests=(request(tokens=200),))
    plain, _ = simulate(repeating(5), mode="off", step=0.0, position=1.0, requests=(request(tokens=200),))
    blocks = [m for _, m in drafted.sent if m.kind is Kind.VERIFY]
    assert len(blocks) <= 3 + 200 / PROBE_EVERY_STEPS
    assert all(len(m.tokens) == 2 for m in blocks[1:])
    assert drafted.now <= 1.03 * plain.now


@pytest.mark.parametrize("position", [0.02, 0.2, 0.5])
def test_unrelated_text_loses_next_to_nothing(position: float) -> None:
    long = request(tokens=300)
    plain, expected = simulate(unrelated, mode="off", position=position, requests=(long,))
    drafted, said = simulate(unrelated, position=position, requests=(long,))
    assert said == expected
    assert Kind.VERIFY in kinds(drafted), "nothing was even tried"
    # One block may still be under way when the bound is reached; its own cost comes on top.
    most_steps = 300 * (1 + PROBE_SHARE) + GRACE_STEPS + 9 * position
    assert drafted.now <= plain.now * most_steps / 300


def test_a_text_that_begins_to_repeat_itself_late_is_noticed() -> None:
    def script(row: int, index: int) -> int:
        return unrelated(row, index) if index < 200 else repeating(6)(row, index)

    drafted, _ = simulate(script, requests=(request(tokens=400),))
    plain, _ = simulate(script, mode="off", requests=(request(tokens=400),))
    assert plain.now / drafted.now > 1.3


def test_the_request_has_the_last_word_save_where_drafts_are_off() -> None:
    costly = {"step": 0.0, "position": 1.0}
    forced, _ = simulate(repeating(5), requests=(request(speculate=True),), **costly)  # type: ignore[arg-type]
    assert kinds(forced).count(Kind.VERIFY) >= 6
    refused, _ = simulate(repeating(5), requests=(request(speculate=False),))
    assert Kind.VERIFY not in kinds(refused)
    off, _ = simulate(repeating(5), mode="off", requests=(request(speculate=True),))
    assert Kind.VERIFY not in kinds(off)
    on, _ = simulate(repeating(5), mode="on", **costly)  # type: ignore[arg-type]
    assert kinds(on).count(Kind.VERIFY) >= 6


def test_a_group_of_several_rows_steps_plainly() -> None:
    several, _ = simulate(repeating(5), requests=(request(), request()), groups=1)
    assert Kind.VERIFY not in [m.kind for _, m in several.sent if len(m.rows) > 1]
    assert any(m.kind is Kind.DECODE and len(m.rows) == 2 for _, m in several.sent)


def test_nothing_is_drafted_behind_the_end() -> None:
    """Neither beyond the last token that was asked for, nor a stop token or anything behind it."""

    def script(row: int, index: int) -> int:
        return STOP if index == 30 else repeating(5)(row, index)

    prompt = (*[repeating(5)(0, i) for i in range(10)], STOP, 1, 2)
    pipeline, said = simulate(script, mode="on", requests=(request(prompt, 50, stop_token_ids=frozenset({STOP})),))
    assert len(said[0]) == 31
    assert not any(STOP in m.tokens for _, m in pipeline.sent if m.kind is Kind.VERIFY)
    pipeline, said = simulate(repeating(5), mode="on", requests=(request(tokens=23),))
    assert len(said[0]) == 23
    positions = sum(len(m.tokens) for _, m in pipeline.sent if m.kind in (Kind.DECODE, Kind.VERIFY))
    assert positions == 22, "a draft that is always right computes every token once"


def test_drafted_and_accepted_tokens_are_counted() -> None:
    pipeline, _ = simulate(repeating(5), mode="on", requests=(request(tokens=41),))
    counted = pipeline.scheduler.statistics()
    blocks = [m for _, m in pipeline.sent if m.kind is Kind.VERIFY]
    assert counted["drafted_tokens"] == sum(len(m.tokens) - 1 for m in blocks)
    assert counted["verified_blocks"] == len(blocks)
    plain = sum(m.kind is Kind.DECODE for _, m in pipeline.sent)
    assert counted["accepted_tokens"] == 40 - plain - len(blocks)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=6),
    mode=st.sampled_from(["auto", "on"]),
    groups=st.integers(1, 4),
    cancels=st.lists(st.integers(0, 5), max_size=2),
    size=st.integers(0, 200),
)
def test_rows_that_draft_keep_the_books_in_order(
    seed: int, lengths: list[tuple[int, int]], mode: Mode, groups: int, cancels: list[int], size: int
) -> None:
    """Random texts of three letters, a prefix cache that evicts, cancelled rows: caches always hold what was said.

    The simulated stages check every header: rows' contents, trims, stores and loads.
    """

    def script(row: int, index: int) -> int:
        return random.Random(seed * 31 + row * 7919 + index // 3).randrange(3)

    index = PrefixIndex(Limits(max_bytes=size, bytes_per_position=1, min_tokens=2, can_trim=True))
    speculation = Speculation(Bounds(mode), BlockCosts(3, lambda: 0.0))
    scheduler = Scheduler(Policy(3, 4, 100, 16, lambda b: min(b, groups)), index, speculation)
    pipeline = SimulatedPipeline(scheduler, [lambda m: 1.0 + 0.1 * len(m.tokens)] * 3, script=script)
    text = [random.Random(seed).randrange(3) for _ in range(50)]
    ids = [pipeline.submit(request(tuple(text[:prompt]), tokens)) for prompt, tokens in lengths]
    for cancelled in cancels:
        for _ in range(4):
            pipeline.step()
        pipeline.cancel(ids[cancelled % len(ids)])
    pipeline.run()
    assert scheduler.idle
    ended = [effect for _, effect in pipeline.effects if isinstance(effect, Ended)]
    assert len(ended) >= len(ids) - len(cancels)
    for effect in ended:
        assert effect.completion_tokens == lengths[ids.index(effect.sequence)][1]
    # An entry holds a beginning of what its row was given and said; a later hit on it was checked header by header.
    for entry in pipeline.entries.values():
        assert all(0 <= token < 3 for token in entry)


def test_the_work_for_a_draft_does_not_grow_with_the_text() -> None:
    """Counted in what is touched, not timed: an index grows by as many entries as the text grew."""
    lookup = Lookup(3)
    prompt = [random.Random(1).randrange(50) for _ in range(INDEX_TOKENS_PER_STEP)]
    output: list[int] = []
    lookup.extend(prompt, output)

    class Counting(list[int]):
        """Says how many of its elements are read."""

        read = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            found = super().__getitem__(key)
            Counting.read += len(found) if isinstance(key, slice) else 1
            return found

    lookup._text = Counting(lookup._text)
    reads = []
    for step in range(60):
        before = Counting.read
        output.append(step % 7)
        lookup.extend(prompt, output)
        lookup.draft(8)
        reads.append(Counting.read - before)
    assert max(reads) < 60
