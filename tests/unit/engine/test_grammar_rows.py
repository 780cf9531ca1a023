"""What the last stage is told of a row that has a grammar."""

from __future__ import annotations

from mlx_cluster.engine.scheduler import Policy, Scheduler
from mlx_cluster.microbatch import RowSpec
from mlx_cluster.request import Grammar, Sampling, SequenceRequest

GRAMMAR = Grammar("regex", "a+")


def row_of(**changes: object) -> RowSpec:
    values: dict[str, object] = {"sampling": Sampling(), "stop_token_ids": frozenset({9, 8}), "grammar": GRAMMAR}
    scheduler = Scheduler(Policy(num_stages=1, max_rows=4, max_queue=4, prefill_chunk=64, num_groups=lambda rows: 1))
    scheduler.submit(SequenceRequest("r", "m", (1, 2, 3), 20, **{**values, **changes}))  # type: ignore[arg-type]
    microbatch = scheduler.next()
    assert microbatch is not None
    return microbatch.admit[0]


def test_a_grammar_comes_with_its_stop_tokens() -> None:
    spec = row_of()
    assert (spec.grammar, spec.stop_token_ids, spec.history) == (GRAMMAR, (8, 9), ())


def test_a_resumed_row_tells_what_it_said() -> None:
    spec = row_of(emitted=(4, 5))
    assert spec.history[spec.prompt_length :] == (4, 5)
    assert spec.first_index == 2


def test_with_penalties_the_prompt_comes_too() -> None:
    spec = row_of(emitted=(4,), sampling=Sampling(presence_penalty=1.0))
    assert (spec.history, spec.prompt_length) == ((1, 2, 3, 4), 3)


def test_a_row_without_grammar_carries_nothing_more() -> None:
    spec = row_of(grammar=None)
    assert (spec.grammar, spec.stop_token_ids, spec.history) == (None, (), ())
