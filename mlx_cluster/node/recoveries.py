"""Which pipelines were lost, when and why, and when they served again: what drivers say turned into news.

Owns: for each pipeline the last epoch that served, the first reason of its loss, who tells of its recovery.
Does not own: the table of nodes (``cluster.membership``), what a driver says (``bringup``), the rows (``history``).
Pure but for the news; time is an argument.
Invariant: every node tells of a loss when it sees it, once. A recovery is told by one node: the one that drives the
newer epoch, or, if that one had not been there before the loss, the lowest one that had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_cluster.cluster.membership import ClusterView, NodeView
from mlx_cluster.cluster.status import PipelineStatus
from mlx_cluster.node.history import History
from mlx_cluster.plan import Epoch, Plan

PLANNED_ANEW = "planned anew"


@dataclass(frozen=True, slots=True)
class _Word:
    """What the node that drives a pipeline says of it."""

    driver: int
    status: PipelineStatus


@dataclass(frozen=True, slots=True)
class _Served:
    """A pipeline was last seen ready so. ``boots`` are those of the nodes that lived then: they know of this epoch."""

    plan: Plan
    epoch: Epoch
    driver: int
    boots: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class _Loss:
    since: float
    cause: str


class PipelineWatch:
    """Look at every beat, and whenever a driver says something new: between two beats a pipeline may go and return."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._served: dict[str, _Served] = {}
        self._lost: dict[str, _Loss] = {}

    def has_served(self, model_id: str) -> bool:
        """Whether a pipeline of this model has been ready under the eyes of this node."""
        return any(served.plan.model.id == model_id for served in self._served.values())

    def look(self, view: ClusterView, own: Iterable[PipelineStatus], now: float) -> None:
        """``own`` is what this node's drivers say at this moment; its row of the table may be older."""
        words = _words(view, own)
        for pipeline in {**self._served, **words}:
            self._weigh(pipeline, words.get(pipeline), view, now)

    def _weigh(self, pipeline: str, word: _Word | None, view: ClusterView, now: float) -> None:
        served = self._served.get(pipeline)
        ready = word is not None and word.status.state == "ready"
        if served is not None:
            goes_on = ready and word is not None and word.status.epoch == served.epoch
            if not goes_on and pipeline not in self._lost:
                loss = self._lost[pipeline] = _Loss(now, _cause(served, word, view))
                self._history.note("pipeline_lost", pipeline=pipeline, epoch=str(served.epoch), cause=loss.cause)
        if word is None or not ready or (served is not None and word.status.epoch < served.epoch):
            return
        if served is not None and (lost := self._lost.pop(pipeline, None)) is not None:
            if word.status.epoch == served.epoch:
                self._history.note("pipeline_back", pipeline=pipeline, epoch=str(served.epoch), cause=lost.cause)
            elif _teller(served, word.driver, view) == view.self_id:
                self._history.recovered(pipeline, str(word.status.epoch), lost.cause, now - lost.since)
        self._served[pipeline] = _Served(word.status.plan, word.status.epoch, word.driver, _boots(view))


def _words(view: ClusterView, own: Iterable[PipelineStatus]) -> dict[str, _Word]:
    """Of each pipeline the word about its newest epoch; the dead have no say."""
    others = (
        _Word(node.node_id, status)
        for node in view.nodes
        if node.node_id != view.self_id and node.state != "dead" and node.status is not None
        for status in node.status.pipelines
    )
    newest: dict[str, _Word] = {}
    for word in [*(_Word(view.self_id, status) for status in own), *others]:
        pipeline = word.status.plan.pipeline
        if pipeline not in newest or word.status.epoch > newest[pipeline].status.epoch:
            newest[pipeline] = word
    return newest


def _boots(view: ClusterView) -> dict[int, str]:
    return {status.node_id: status.boot_id for status in view.living}


def _teller(served: _Served, driver: int, view: ClusterView) -> int | None:
    """A driver that has started since the loss knows nothing of it."""
    boots = _boots(view)
    able = [node_id for node_id, boot in served.boots.items() if boots.get(node_id) == boot]
    return driver if driver in able else min(able, default=None)


def _cause(served: _Served, word: _Word | None, view: ClusterView) -> str:
    """Why the epoch that served does not serve any more, as far as this node can know at the first sight of it."""
    if word is not None and (word.driver, word.status.epoch) == (served.driver, served.epoch):
        return word.status.detail or f"{word.status.state} again"
    if word is not None and word.status.epoch.version == served.epoch.version and word.status.lost:
        return word.status.lost  # the beat between the two epochs was missed
    driver = view.node(served.driver)
    if driver is None:
        return f"node {served.driver} is not a member any more"
    if driver.state != "dead" and driver.status is not None and driver.status.boot_id != served.boots[served.driver]:
        return f"{driver.member.name} was started again"
    holders = (view.node(stage.node_id) for stage in served.plan.stages)
    return next((why for node in holders if node is not None and (why := _missing(node))), PLANNED_ANEW)


def _missing(node: NodeView) -> str:
    """Why a node cannot hold its stages, "" when it can."""
    name, status = node.member.name, node.status
    if status is not None and status.leaving:
        return f"{name} has left"
    if node.state == "dead":
        return f"{name} is dead ({node.detail or 'silent'})"
    return f"{name} drains" if status is not None and status.draining else ""
