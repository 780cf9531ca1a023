"""The groups that decode, and the rows that wait for one: who decodes with whom, and whose step goes next.

Owns: loose rows (they have a token and wait for a border), the groups, and the order in which ready groups step.
Does not own: microbatches and rows' ends (``engine.scheduler``), how many groups are good (``Policy.num_groups``), what
fits (``engine.memory``).
Invariants: a row is loose or in one group; a group has one step in flight at most, and changes only at its border; a
group steps only when its batch fits every stage.

A batch pads every row to its longest, so rows of very different lengths decode apart: a row joins where less than a
quarter is padding, else it opens a group. That costs nothing up to one group a stage; beyond that a step more for
everybody costs more than padding, and rows join where they waste least, as long as memory allows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from mlx_cluster.engine.chunking import Pace
from mlx_cluster.engine.memory import Charge, KvBook, padded
from mlx_cluster.engine.sequence import Group, Policy, SequenceState

MAX_PADDING = 0.25
# Rows move between groups when that evens out so much of a difference in time: every move copies its cache.
_WORTH_EVENING = 1.1


class Groups:
    """``memory`` mirrors what the stages hold; this class asks it, the scheduler tells it."""

    def __init__(self, policy: Policy, memory: KvBook) -> None:
        self._policy, self._memory = policy, memory
        self._max_groups = policy.max_groups or 2 * policy.num_stages
        self._refused: set[int] = set()  # loose rows that a group had no memory for
        self._loose: deque[SequenceState] = deque()
        self._groups: list[Group] = []
        self._ready: deque[Group] = deque()
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @property
    def num_rows(self) -> int:
        return len(self._loose) + sum(len(group.members) for group in self._groups)

    @property
    def steps_per_cycle(self) -> int:
        """Steps that go out until every row, also a loose one, had its turn."""
        return len(self._groups) + bool(self._loose)

    def pace(self) -> Pace | None:
        """What a decode cycle takes; None while steps were not measured."""
        sizes = [len(group.members) for group in self._groups]
        if self._loose:
            sizes.append(len(self._loose))
        times = [self._policy.step_seconds(size) for size in sizes]
        known = [seconds for seconds in times if seconds is not None]
        if not known or len(known) < len(times):
            return None
        return Pace(sum(known), max(known), self._policy.itl_budget_seconds)

    def rows(self) -> Iterator[SequenceState]:
        yield from self._loose
        for group in self._groups:
            yield from group.members

    def add(self, sequence: SequenceState) -> None:
        """A row that has its first token: it joins a group at a border."""
        self._loose.append(sequence)

    def returned(self, group: Group) -> None:
        """Its step is done: the group is at a border, unless all its rows are gone."""
        group.in_flight = False
        if group in self._groups:
            self._ready.append(group)

    def remove(self, sequence: SequenceState) -> bool:
        """Take a row out, at any time; False when it is not here."""
        group = sequence.group
        if group is None:
            if sequence not in self._loose:
                return False
            self._loose.remove(sequence)
            self._refused.discard(sequence.id)
            return True
        group.members.remove(sequence)
        sequence.group = None
        if not group.members:
            self._groups.remove(group)
            if group in self._ready:
                self._ready.remove(group)
        return True

    @property
    def lacks_memory(self) -> bool:
        """Whether a row waits for a group that has no memory for it: nobody new should be admitted."""
        return bool(self._refused)

    # -- whose step -----------------------------------------------------------------------------------

    def next_step(self, make_room: Callable[[], bool], is_held: Callable[[Group], bool]) -> Group | None:
        """The group whose step goes out now, its rows settled; None when every group is in flight or lacks memory.

        ``make_room`` preempts a row (through ``remove``), anywhere; False when there is none. A group that ``is_held``
        stays at its border for now.
        """
        target = self._policy.num_groups(self.num_rows) if self.num_rows else 0
        deferred: list[Group] = []
        chosen: Group | None = None
        while self._ready and chosen is None:
            group = self._ready.popleft()
            if is_held(group):
                deferred.append(group)
                continue
            if len(self._groups) > target and self._may_dissolve(group, target):
                self._dissolve(group)
                continue
            self._balance(group, target)
            if self._finds_room(group, make_room):
                chosen = group
            elif group.members:
                deferred.append(group)
        self._ready.extendleft(reversed([group for group in deferred if group.members]))
        if chosen is None and self._loose:
            chosen = self._open(target)
        if chosen is not None:
            chosen.in_flight = True
        return chosen

    def _finds_room(self, group: Group, make_room: Callable[[], bool]) -> bool:
        """Whether the group may step, after rows were preempted for it if need be."""
        while group.members:
            lengths = _lengths(group.members)
            if self._memory.may_step(group.id, lengths):
                return True
            if len(self._groups) > 1 and self._memory.may_step(group.id, lengths, after_others=True):
                return False  # rows were preempted already: their batches let go of them at their next step
            if not make_room():
                return False
        return False

    def _open(self, target: int) -> Group | None:
        """A group for a loose row: one of those that are wanted, or for a row that no other group takes."""
        for sequence in self._loose:
            if len(self._groups) >= target and not self._needs_its_own(sequence, target):
                continue
            group = Group(self._next_id)
            if not self._memory.may_step(group.id, _lengths([sequence])):
                self._refused.add(sequence.id)
                continue
            self._next_id += 1
            self._groups.append(group)
            self._join(group, sequence)
            self._balance(group, target)
            return group
        return None

    def _needs_its_own(self, sequence: SequenceState, target: int) -> bool:
        if len(self._groups) >= self._max_groups:
            return False
        if sequence.id in self._refused:
            return True
        return len(self._groups) < self._padding_limit(target) and not any(
            _pads_little(group.members, sequence) for group in self._groups
        )

    def _padding_limit(self, target: int) -> int:
        """How many groups there may be for the sake of padding; none where memory has no bound."""
        return min(self._max_groups, max(target, self._policy.num_stages)) if self._memory.is_bounded else 0

    # -- who is in it -----------------------------------------------------------------------------------

    def _takes(self, group: Group, sequence: SequenceState, target: int) -> bool:
        """Whether padding lets the row join; when there are as many groups as may be, wherever it wastes least."""
        if not self._memory.is_bounded or _pads_little(group.members, sequence):
            return True
        if len(self._groups) < self._padding_limit(target):
            return False
        if any(_pads_little(other.members, sequence) for other in self._groups if other is not group):
            return False
        waste = _density(group.members, sequence)
        return all(waste >= _density(other.members, sequence) for other in self._groups if other is not group)

    def _balance(self, group: Group, target: int) -> None:
        """Bring a group that is at a border to its fair share: loose rows join, too many leave."""
        share = math.ceil(self.num_rows / max(1, target))
        self._let_join(group, share, target)
        if len(self._groups) < target:
            self._let_leave(group, len(group.members) - share)
        elif not self._loose:
            self._even_out(group)

    def _let_join(self, group: Group, share: int, target: int) -> None:
        for sequence in list(self._loose):
            if not self._takes(group, sequence, target):
                continue
            others = [len(o.members) for o in self._groups if o is not group and self._takes(o, sequence, target)]
            if len(group.members) >= share and (others and len(group.members) > min(others)):
                continue
            if not self._memory.may_step(group.id, _lengths([*group.members, sequence])):
                self._refused.add(sequence.id)
                continue
            self._join(group, sequence)

    def _even_out(self, group: Group) -> None:
        """Rows leave for a group that is smaller by two or more and faster for it."""
        while len(group.members) > 2:
            last = group.members[-1]
            homes = [o for o in self._groups if o is not group and self._takes(o, last, len(self._groups))]
            smallest = min((len(o.members) for o in homes), default=len(group.members))
            if len(group.members) - smallest - len(self._loose) < 2 or not self._is_slower(group, smallest):
                return
            if not self._let_leave(group, 1):
                return

    def _is_slower(self, group: Group, smaller: int) -> bool:
        slow, fast = self._policy.step_seconds(len(group.members)), self._policy.step_seconds(smaller)
        return slow is None or fast is None or slow > _WORTH_EVENING * fast

    def _let_leave(self, group: Group, count: int) -> bool:
        """The last ``count`` rows become loose, where that fits; False when it does not."""
        if count <= 0 or count >= len(group.members):
            return False
        if not self._memory.may_step(group.id, _lengths(group.members[:-count])):
            return False
        for sequence in group.members[-count:]:
            sequence.group = None
            self._loose.append(sequence)
        del group.members[-count:]
        return True

    def _join(self, group: Group, sequence: SequenceState) -> None:
        self._loose.remove(sequence)
        self._refused.discard(sequence.id)
        sequence.group = group
        group.members.append(sequence)

    def _may_dissolve(self, group: Group, target: int) -> bool:
        """Whether all its rows find another group, and memory is not so tight that they would wait for one."""
        if not self._memory.is_bounded:
            return True
        others = [other for other in self._groups if other is not group]
        if not all(any(_pads_little(other.members, s) for other in others) for s in group.members):
            return False
        share = math.ceil(self.num_rows / max(1, target))
        longest = max(s.num_positions for each in self._groups for s in each.members) + 1
        return self._memory.fits_beside(Charge(), Charge(share, share * padded(longest)))

    def _dissolve(self, group: Group) -> None:
        for sequence in group.members:
            sequence.group = None
        self._loose.extend(group.members)
        self._groups.remove(group)


def _lengths(members: Iterable[SequenceState]) -> dict[int, int]:
    """Row → positions with the step that goes out."""
    return {sequence.row: sequence.num_positions + 1 for sequence in members}


def _density(members: Iterable[SequenceState], sequence: SequenceState) -> float:
    """How much of a batch of these is no padding: by positions, or by the blocks that caches reserve anyway."""
    lengths = [each.num_positions + 1 for each in members]
    lengths.append(sequence.num_positions + 1)
    longest = max(lengths)
    exact = sum(lengths) / (longest * len(lengths))
    return max(exact, sum(map(padded, lengths)) / (padded(longest) * len(lengths)))


def _pads_little(members: Iterable[SequenceState], sequence: SequenceState) -> bool:
    return _density(members, sequence) > 1 - MAX_PADDING
