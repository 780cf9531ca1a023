"""The round trips to the other nodes, measured again and again beside everything else.

Owns: a thread that opens and closes one TCP connection to each address of each node per interval. Does not own: what
follows (``cluster.addresses``). Invariant: nobody ever waits for it; every connection attempt has a deadline.

A connection is opened by the other machine's kernel: a busy or frozen agent there does not make its link look slow.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence

from mlx_cluster import log
from mlx_cluster.cluster.addresses import DialledAddresses

CONNECT_SECONDS = 1.0

_log = log.get(__name__)


def connect_seconds(address: str) -> float | None:
    """The time that a TCP handshake with ``host:port`` takes, without the look-up of the name; None: no answer."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.settimeout(CONNECT_SECONDS)
            began = time.perf_counter()
            probe.connect(place)
            return time.perf_counter() - began
    except OSError:
        return None


class RoundTripProbe:
    """``names`` are the nodes', by id, for the log; ``hints`` gives further addresses of a node, by its id."""

    def __init__(
        self,
        addresses: DialledAddresses,
        names: dict[int, str],
        interval_seconds: float,
        *,
        hints: Callable[[int], Sequence[str]] = lambda _: (),
        measure: Callable[[str], float | None] = connect_seconds,
    ) -> None:
        self._addresses, self._names, self._interval_seconds = addresses, names, interval_seconds
        self._hints, self._measure = hints, measure
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="round trips", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; it is not waited for, because a name's look-up may take long and harms nobody."""
        self._ending.set()

    def look(self) -> None:
        """Measure every address once, and choose."""
        for node_id, ranked in self._addresses.ranked.items():
            ranked.hinted(self._hints(node_id))
            for address in ranked.candidates:
                if self._ending.is_set():
                    return
                ranked.measured(address, self._measure(address))
            before = ranked.current
            if ranked.rank():
                seconds = ranked.seconds(ranked.current)
                _log.info(
                    "another address is dialled",
                    node=self._names[node_id],
                    address=ranked.current,
                    before=before,
                    milliseconds=None if seconds is None else round(seconds * 1e3, 3),
                )

    def _run(self) -> None:
        # The first look comes after a while: a node that starts has better things to do, and so have its neighbours.
        while not self._ending.wait(self._interval_seconds):
            self.look()
