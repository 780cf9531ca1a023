"""How long a failure is felt: the fault matrix with a clock. Real processes of four nodes on this machine.

    python benchmarks/failover.py --json failover.json                       # every cell, once
    python benchmarks/failover.py --cells 'stage*-SIGKILL' 'node-*' --repeat 3 --json failover.json
    python benchmarks/failover.py --coordinator --repeat 5 --json coordinator.json
    python benchmarks/failover.py --throughput --bound 300 --json throughput.json
    python benchmarks/failover.py --list

The cells are those of `make faults` (tests/faults): nodes 1 and 2 hold the stages of the demo model and 1 its engine,
0 coordinates, 3 is the clients' gateway; 8 greedy and 8 seeded streams of 96 tokens, and the signal when each has had
8. `stageN` is a stage process, `node-ROLE` all processes of a node (SIGTERM: its agent, which then drains), `node-all`
one that is coordinator, engine and gateway, `agent-ROLE` an agent without its stage process, `ring-…` the same over the
ring. After each cell the node is brought back, and the answers must be those of the quiet run.

Printed, as medians over the repetitions: from the signal to the first news of it (a lost pipeline or coordinator, a
dead or leaving node: `GET /cluster` of any node); from the signal to the first token after a stream's longest pause,
the median and the last of the streams (0 for one that never paused for half a second); and the longest pause that any
client saw. `--coordinator` alternates quiet runs with runs in which the coordinator, which holds no stage, is killed;
`--throughput` is told in `failing.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import failing, record
from mlx_cluster.config.schema import CoordinatorSection
from mlx_cluster.engine.engine import _SILENCE_SECONDS as STAGE_SILENCE_SECONDS
from tests.faults.fleet import GATEWAY, STANDBY, Fleet, Stream, fleet, load

SPLIT = "0/14/14/0"
ENGINE, STAGE = 1, 2
SIGNALS = {number.name: number for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)}
NOTICES = ("pipeline_lost", "node_dead", "node_left", "coordinator_lost")
FAILURES = (AssertionError, TimeoutError, httpx.HTTPError, ProcessLookupError)
INTERRUPTED_SECONDS = 0.5  # a stream whose longest pause is shorter has not been interrupted
ALLOWED_GAP_SECONDS = 0.050  # beyond the quiet run's, when a coordinator without a stage dies


@dataclass(frozen=True, slots=True)
class Cell:
    """``strike`` has the streams run, sends the signal, and gives them back when the node is whole again."""

    name: str
    transport: str
    number: signal.Signals
    strike: Callable[[Fleet, signal.Signals], list[Stream]]
    node_deadline: bool = True  # whether it hangs by heartbeats (a node), else by ticks of the engine's streams

    @property
    def deadline_seconds(self) -> float | None:
        """What a hang is noticed by, as configured; None where nothing hangs."""
        if self.number is not signal.SIGSTOP:
            return None
        section = CoordinatorSection()
        return section.heartbeat_interval * section.failure_threshold if self.node_deadline else STAGE_SILENCE_SECONDS

    @property
    def aim(self) -> dict[str, float]:
        """Upper bounds in seconds for (some of) the figures."""
        if (deadline := self.deadline_seconds) is not None:
            return {"noticed": deadline + 1.0}
        if self.number is not signal.SIGKILL:
            return {}
        return {"resumed_last": 6.0} if self.node_deadline else {"noticed": 0.2, "resumed_last": 4.0}


def cells() -> list[Cell]:
    grpc = [
        *(
            Cell(f"stage{i}-{name}", "grpc", number, _stage(i), False)
            for i in (0, 1)
            for name, number in SIGNALS.items()
        ),
        *(
            Cell(f"node-{role}-{name}", "grpc", number, _node(node))
            for role, node in (("stage", STAGE), ("engine", ENGINE), ("coordinator", STANDBY), ("gateway", GATEWAY))
            for name, number in SIGNALS.items()
        ),
        *(Cell(f"node-all-{name}", "grpc", number, _node(ENGINE, ENGINE)) for name, number in SIGNALS.items()),
        *(
            Cell(f"agent-{role}-{name}", "grpc", SIGNALS[name], _agent(node))
            for role, node in (("engine", ENGINE), ("stage", STAGE))
            for name in ("SIGKILL", "SIGSTOP")
        ),
    ]
    ring = [
        Cell(f"ring-{what}-{name}", "ring", SIGNALS[name], strike, what == "node")
        for what, strike in (("stage", _stage(1)), ("node", _node(STAGE)))
        for name in ("SIGKILL", "SIGSTOP")
    ]
    return [*grpc, *ring]


def _stage(index: int) -> Callable[[Fleet, signal.Signals], list[Stream]]:
    def strike(four: Fleet, number: signal.Signals) -> list[Stream]:
        four.lead(STANDBY)
        pid = int(four.stages()[index]["pid"])
        return load(four.urls(), lambda: four.send(number, [pid]))

    return strike


def _node(node: int, first: int = GATEWAY) -> Callable[[Fleet, signal.Signals], list[Stream]]:
    """A gateway other than the usual one is the node's own, which coordinates then too."""

    def strike(four: Fleet, number: signal.Signals) -> list[Stream]:
        four.lead(STANDBY if first == GATEWAY else first)
        agent = four.cluster.processes[node].pid
        pids = [agent] if number is signal.SIGTERM else [agent, *four.stage_pids(node)]
        return four.strike(node, number, pids, first=first)

    return strike


def _agent(node: int) -> Callable[[Fleet, signal.Signals], list[Stream]]:
    def strike(four: Fleet, number: signal.Signals) -> list[Stream]:
        four.lead(STANDBY)
        return four.strike(node, number, [four.cluster.processes[node].pid])

    return strike


# -- one cell -----------------------------------------------------------------------------------------


def measure(cell: Cell, four: Fleet) -> dict[str, Any]:
    """One strike. Raises one of ``FAILURES`` when the streams did not get through."""
    streams = cell.strike(four, cell.number)
    four.check(streams)
    at = four.struck_at
    pictures = four.pictures()
    gaps = [stream.longest_gap(at) for stream in streams]
    after = [end - at if gap >= INTERRUPTED_SECONDS else 0.0 for gap, end in gaps]
    return {
        **noticed(pictures, time.time() - time.monotonic() + at),
        "resumed_median": statistics.median(after),
        "resumed_last": max(after),
        "longest_gap": max(gap for gap, _ in gaps),
        "reconnects": sum(stream.reconnects for stream in streams),
    }


def noticed(pictures: Sequence[dict[str, Any]], struck: float) -> dict[str, Any]:
    """The first news of a signal that was sent then (Unix seconds), and what the cluster says of its recoveries."""
    news = [
        (transition["at"] - struck, transition)
        for picture in pictures
        for transition in picture["transitions"]
        if transition["kind"] in NOTICES and transition["at"] >= struck
    ]
    recoveries = [r for picture in pictures[:1] for r in picture["recoveries"] if r["at"] >= struck]
    seconds, first = min(news, key=lambda each: each[0], default=(None, {}))
    return {
        "noticed": seconds,
        "notice": first.get("kind", ""),
        "cause": first.get("cause") or " ".join(filter(None, (first.get("node"), first.get("detail")))),
        "recoveries": [{"cause": r["cause"], "seconds": r["seconds"]} for r in reversed(recoveries)],
    }


FIGURES = ("noticed", "resumed_median", "resumed_last", "longest_gap")


def summary(cell: Cell, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs that ended, and which aims they miss."""
    good = [run for run in runs if "error" not in run]
    medians = {
        figure: round(statistics.median(found), 3)
        for figure in FIGURES
        if (found := [run[figure] for run in good if run[figure] is not None])
    }
    missed = [f"{figure} > {most:g} s" for figure, most in cell.aim.items() if medians.get(figure, most + 1) > most]
    return {"cell": cell.name, "deadline": cell.deadline_seconds, "missed": missed, **medians, "runs": runs}


def matrix(chosen: list[Cell], repeat: int) -> list[dict[str, Any]]:
    results = []
    print(f"{'cell':26} {'noticed':>8} {'resumed':>8} {'the last':>8} {'longest':>8}   aim, and the first news")
    for transport in ("grpc", "ring"):
        wanted = [cell for cell in chosen if cell.transport == transport for _ in range(repeat)]
        found: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in wanted}
        for cell, figures in runs(transport, wanted):
            found[cell.name].append(figures)
            if len(found[cell.name]) == repeat:
                results.append(summary(cell, found[cell.name]))
                print(line(results[-1]), flush=True)
    return results


def runs(transport: str, wanted: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cell after cell on one cluster; after one that fails the next has a new cluster."""
    left = list(wanted)
    while left:
        with cluster(transport) as four:
            while left:
                cell = left.pop(0)
                try:
                    figures = measure(cell, four)
                except FAILURES as error:
                    yield cell, {"error": f"{type(error).__name__}: {error}"}
                    break
                yield cell, figures


@contextlib.contextmanager
def cluster(transport: str = "grpc", changes: dict[str, dict[str, Any]] | None = None) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder), SPLIT, transport, changes) as four:
        yield four


def line(result: dict[str, Any]) -> str:
    figures = " ".join(f"{result[f]:7.2f}s" if f in result else f"{'–':>8}" for f in FIGURES)
    errors = [run["error"] for run in result["runs"] if "error" in run]
    first = next((f"{run['notice']}: {run['cause']}" for run in result["runs"] if run.get("notice")), "no news")
    verdict = f"MISSED: {', '.join(result['missed'])}" if result["missed"] else "ok"
    failed = f"; {len(errors)} of {len(result['runs'])} failed: {errors[0][:200]}" if errors else ""
    return f"{result['cell']:26} {figures}   {verdict}; {first}{failed}"


# -- the coordinator alone ------------------------------------------------------------------------------


def coordinator(repeat: int) -> dict[str, Any]:
    """Longest pause of any stream in quiet runs and in runs that lose the coordinator, alternating."""
    pairs: list[tuple[float, float]] = []
    epochs: set[str] = set()
    with cluster() as four:
        for _ in range(repeat):
            four.lead(STANDBY)
            epochs.add(four.balanced()["epoch"])
            moments: list[float] = []
            quiet = load(four.urls(), lambda moments=moments: moments.append(time.monotonic()))  # type: ignore[misc]
            streams = four.strike(STANDBY, signal.SIGKILL, [four.cluster.processes[STANDBY].pid])
            four.check(quiet)
            four.check(streams)
            pair = _longest(quiet, moments[0]), _longest(streams, four.struck_at)
            print(
                f"longest pause: quiet {1000 * pair[0]:7.1f} ms   coordinator killed {1000 * pair[1]:7.1f} ms",
                flush=True,
            )
            pairs.append(pair)
        epochs.add(four.balanced()["epoch"])
    quiet_median, killed_median = (statistics.median(side) for side in zip(*pairs, strict=True))
    passes = killed_median <= quiet_median + ALLOWED_GAP_SECONDS and len(epochs) == 1
    print(
        f"medians of {repeat}: quiet {1000 * quiet_median:.1f} ms, killed {1000 * killed_median:.1f} ms "
        f"(at most 50 ms more wanted); epochs {sorted(epochs)}: {'ok' if passes else 'MISSED'}"
    )
    return {
        "quiet_seconds": [quiet for quiet, _ in pairs],
        "killed_seconds": [killed for _, killed in pairs],
        "quiet_median": quiet_median,
        "killed_median": killed_median,
        "epochs": sorted(epochs),
        "passes": passes,
    }


def _longest(streams: list[Stream], after: float) -> float:
    return max(stream.longest_gap(after)[0] for stream in streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["*"], help="names or patterns (default: all)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the cells' names and end")
    parser.add_argument("--coordinator", action="store_true", help="instead of the matrix: see above")
    parser.add_argument("--throughput", action="store_true", help="instead of the matrix: tokens/s at failure rates")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 1e-3, 1e-2], help="failures per token-step")
    parser.add_argument("--streams", type=int, default=16, help="of --throughput, 16 at most")
    parser.add_argument("--tokens", type=int, default=512, help="of each answer of --throughput")
    parser.add_argument("--bound", type=float, default=300.0, help="seconds that a run of --throughput may take")
    parser.add_argument("--seed", type=int, default=1, help="of the failures")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = [c for c in cells() if any(fnmatch.fnmatch(c.name, pattern) for pattern in arguments.cells)]
    if arguments.list or not chosen:
        print(*(cell.name for cell in cells()), sep="\n")
        sys.exit(0 if arguments.list else f"no cell matches {arguments.cells}")
    if arguments.coordinator:
        record.save(arguments.json, "failover-coordinator", coordinator(arguments.repeat))
    elif arguments.throughput:
        options = failing.Options(
            tuple(arguments.rates), arguments.streams, arguments.tokens, arguments.bound, arguments.seed
        )
        record.save(arguments.json, "failover-throughput", failing.throughput(options, cluster))
    else:
        results = matrix(chosen, arguments.repeat)
        record.save(arguments.json, "failover", results)
        if any("error" in run for result in results for run in result["runs"]):
            sys.exit(1)


if __name__ == "__main__":
    main()
