"""The scheduler over real slices: with drafts and without, every row says the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from mlx_cluster.demo import model_dir
from mlx_cluster.engine.prefix import Limits, PrefixIndex
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Ended, Failed, Policy
from mlx_cluster.engine.speculation import BlockCosts, Bounds, Speculation
from mlx_cluster.microbatch import Frame, Kind, Microbatch, Report
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.request import Grammar, Sampling, SequenceRequest, Token
from tests.tiny_models import write_tiny_model

VOCAB = 300
ALWAYS = Bounds("on", max_draft=5, min_match=1)  # one token that was there before is enough: many drafts, most wrong
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=0.4, seed=7, top_k=5)
PENALISED = Sampling(temperature=0.5, seed=3, top_k=8, repetition_penalty=1.1, frequency_penalty=0.2)
LOGPROBS = Sampling(temperature=0.3, seed=1, top_logprobs=2)


class Pipeline:
    """Slices in this process; one microbatch after the other goes through all of them, as the scheduler says."""

    def __init__(self, runners: Sequence[SliceRunner], bounds: Bounds | None, *, groups: int, prefix: bool) -> None:
        self.runners = runners
        cuts = all(runner.can_trim for runner in runners)
        index = PrefixIndex(Limits(1 << 20, 100, min_tokens=4, can_trim=cuts)) if prefix else None
        speculation = Speculation(bounds, BlockCosts(len(runners), lambda: 0.0)) if bounds else None
        policy = Policy(len(runners), 8, 100, 16, lambda rows: min(rows, groups), 4)
        self.scheduler = Scheduler(policy, index, speculation)
        self.sent: list[Microbatch] = []

    def run(self, requests: Sequence[SequenceRequest]) -> list[list[Token]]:
        said: dict[int, list[Token]] = {self.scheduler.submit(request): [] for request in requests}
        num_ended = 0
        while (microbatch := self.scheduler.next()) is not None:
            self.sent.append(microbatch)
            for effect in self.scheduler.complete(self._through(microbatch)):
                assert not isinstance(effect, Failed), effect
                if isinstance(effect, Drew):
                    said[effect.sequence].append(effect.token)
                num_ended += isinstance(effect, Ended)
            self.scheduler.audit()
        assert self.scheduler.idle
        assert num_ended == len(requests)
        assert all(runner.num_rows == 0 for runner in self.runners)
        return list(said.values())

    def _through(self, microbatch: Microbatch) -> Report:
        frame: Frame | None = None
        for runner in self.runners:
            outcome = runner.submit(microbatch, frame).wait()
            frame = outcome.frame
        return Report(microbatch.id, len(self.runners) - 1, sampled=outcome.sampled, failed=outcome.failed)

    @property
    def num_blocks(self) -> int:
        return sum(microbatch.kind is Kind.VERIFY for microbatch in self.sent)


def both(
    runners: Sequence[SliceRunner], requests: Sequence[SequenceRequest], *, groups: int = 9, prefix: bool = True
) -> Pipeline:
    """Compare what comes out with drafts to what comes out without any; gives the pipeline that drafted."""
    plain = Pipeline(runners, None, groups=groups, prefix=prefix)
    expected = plain.run(requests)
    for runner in runners:
        for microbatch in plain.sent:
            for store in microbatch.store:
                runner.submit(Microbatch(0, Kind.CONTROL, evict=(store.entry,)), None).wait()
    drafted = Pipeline(runners, ALWAYS, groups=groups, prefix=prefix)
    for mine, theirs in zip(drafted.run(requests), expected, strict=True):
        assert [token.token_id for token in mine] == [token.token_id for token in theirs]
        assert [token.index for token in mine] == list(range(len(mine)))
        for one, other in zip(mine, theirs, strict=True):
            assert [i for i, _ in one.top] == [i for i, _ in other.top]
            assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-4))
    return drafted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speculation") / "tiny"
    return write_tiny_model(path, layers=4, width=32, vocab=VOCAB, family="qwen2/untied")


@pytest.fixture(scope="module", params=[[4], [2, 2], [1, 2, 1]], ids=str)
def runners(request: pytest.FixtureRequest, model: Path) -> list[SliceRunner]:
    bounds = [sum(request.param[:index]) for index in range(len(request.param) + 1)]
    return [SliceRunner.load(model, start, end, device="cpu") for start, end in pairwise(bounds)]


def request(prompt: Sequence[int], sampling: Sampling, tokens: int = 30, **values: object) -> SequenceRequest:
    return SequenceRequest("r", "m", tuple(prompt), tokens, sampling, **values)  # type: ignore[arg-type]


def passage(seed: int) -> list[int]:
    """A prompt that repeats itself, so that there is something to look up."""
    dice = Random(seed)
    part = [dice.randrange(VOCAB) for _ in range(6)]
    return [*part, dice.randrange(VOCAB), *part]


@pytest.mark.parametrize(
    "sampling", [GREEDY, WARM, PENALISED, LOGPROBS], ids=["greedy", "warm", "penalised", "logprobs"]
)
def test_a_row_alone(runners: list[SliceRunner], sampling: Sampling) -> None:
    drafted = both(runners, [request(passage(seed), replace(sampling, seed=seed)) for seed in range(1)])
    assert drafted.num_blocks > 3


def test_rows_with_and_without_drafts_beside_each_other(runners: list[SliceRunner]) -> None:
    """Every row in a group of its own, then in fewer groups, where those that share one step plainly."""
    every = [GREEDY, WARM, PENALISED, LOGPROBS, GREEDY]
    requests = [
        request(passage(seed), sampling, 12 + 5 * seed, speculate=None if seed % 2 else False, choice=seed)
        for seed, sampling in enumerate(every)
    ]
    assert both(runners, requests).num_blocks > 3
    assert both(runners, requests, groups=3).num_blocks > 0


def test_conversations_go_on_from_what_drafts_left_in_the_prefix_cache(runners: list[SliceRunner]) -> None:
    """The second turn begins with everything that the first one was given and said, kept beside its last trim."""
    plain = Pipeline(runners, None, groups=9, prefix=False)
    drafted = Pipeline(runners, ALWAYS, groups=9, prefix=True)
    text = passage(2)
    for turn in range(6):
        # A row ends beside a rejected draft only by a stop token: some of many come up.
        stops = frozenset(range(0, VOCAB, 11)) if turn else frozenset[int]()
        ask = request([*text, turn + 1], WARM, 17, stop_token_ids=stops)
        (expected,), (said,) = plain.run([ask]), drafted.run([ask])
        assert said == expected
        text = [*ask.prompt, *(token.token_id for token in said)]
    assert drafted.num_blocks > 3
    assert sum(len(m.load) for m in drafted.sent) == 5
    assert any(m.trim and m.store for m in drafted.sent)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, seed=11)], ids=["greedy", "warm"])
def test_a_grammar_over_two_stages(sampling: Sampling) -> None:
    schema = {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 4, "maxItems": 6}
    runners = [SliceRunner.load(model_dir(), *cut, device="cpu") for cut in ((0, 14), (14, 28))]
    grammar = Grammar("json_schema", json.dumps(schema))
    ask = request([40, 50, 60], sampling, 60, grammar=grammar, stop_token_ids=frozenset({0, 2}))
    drafted = both(runners, [ask, request([40, 50, 61], sampling, 20)], prefix=False)
    assert drafted.num_blocks > 3


def test_a_resumed_row_drafts_from_what_it_said_before(runners: list[SliceRunner]) -> None:
    whole = Pipeline(runners, None, groups=9, prefix=False).run([request(passage(4), WARM, 24)])[0]
    emitted = tuple(token.token_id for token in whole[:11])
    drafted = Pipeline(runners, ALWAYS, groups=9, prefix=False)
    (rest,) = drafted.run([request(passage(4), WARM, 24, emitted=emitted)])
    assert rest == whole[11:]
    assert drafted.num_blocks > 0
