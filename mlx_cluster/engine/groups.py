"""The groups that decode, and the rows that wait for one: who decodes with whom, and whose step goes next.

Owns: loose rows (they have a token and wait for a border), the groups, and the order in which ready groups step.
Does not own: microbatches and rows' ends (``engine.scheduler``), how many groups are good (``Policy.num_groups``).
Invariants: a row is loose or in one group; a group has one step in flight at most, and changes only at its border.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from mlx_cluster.engine.chunking import Pace
from mlx_cluster.engine.sequence import Group, Policy, SequenceState


class Groups:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy
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
            return True
        group.members.remove(sequence)
        sequence.group = None
        if not group.members:
            self._groups.remove(group)
            if group in self._ready:
                self._ready.remove(group)
        return True

    def next_step(self) -> Group | None:
        """The group whose step goes out now, its rows settled; None when every group is in flight."""
        target = self._policy.num_groups(self.num_rows) if self.num_rows else 0
        while self._ready:
            group = self._ready.popleft()
            if len(self._groups) > target:
                self._dissolve(group)
                continue
            return self._leave_border(group, target)
        if self._loose and len(self._groups) < target:
            group = Group(self._next_id)
            self._next_id += 1
            self._groups.append(group)
            return self._leave_border(group, target)
        return None

    def _leave_border(self, group: Group, target: int) -> Group:
        self._balance(group, target)
        group.in_flight = True
        return group

    def _dissolve(self, group: Group) -> None:
        for sequence in group.members:
            sequence.group = None
        self._loose.extend(group.members)
        self._groups.remove(group)

    def _balance(self, group: Group, target: int) -> None:
        """Bring a group that is at a border to its fair share: loose rows join, too many leave.

        A row leaves only when that evens out a difference of two or more, as every move copies its cache.
        """
        share = math.ceil(self.num_rows / target)
        while self._loose and len(group.members) < share:
            sequence = self._loose.popleft()
            sequence.group = group
            group.members.append(sequence)
        others = [len(other.members) for other in self._groups if other is not group]
        while len(group.members) > share and (len(self._groups) < target or min(others) < len(group.members) - 1):
            sequence = group.members.pop()
            sequence.group = None
            self._loose.append(sequence)
