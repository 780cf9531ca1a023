"""Who leads, and which cluster document is committed: a state machine without clock, disk, network or dice.

``machine.Election`` is the whole of it; ``values`` and ``messages`` are what it keeps and says, ``events`` what goes in
and what comes out, ``leading`` what a leader knows about its voters, ``strategy`` who should lead when several could.
``docs/election.md`` gives the rules and the reasons.
"""
