"""What one hop costs: half of a round trip of a hidden state between two processes, on every link.

    python benchmarks/hop.py --repeat 5 --json hop.json

Beside the links stand two echoes without any framing: a blocking socket and asyncio streams (a length and the bytes).
Payloads: 7,168 bytes (one row of a 7B model in bfloat16) and 3,670,016 (its 512-token chunk). The links take turns
within each repetition; a figure is the median over the repetitions of each repetition's median trip. Everything runs
on this machine over loopback. The aim is a gRPC hop within 2.5 times an asyncio-streams hop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record
from mlx_cluster import wire
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.plan import Epoch
from mlx_cluster.transport.link import HopId, ReceiveEnd, SendEnd, StagePosition

KINDS = ("socket", "streams", "inprocess", "grpc", "ring", "mpi")
TRIPS = {7_168: 300, 3_670_016: 20}
WARM_UP_TRIPS = 5
PATIENCE_SECONDS = 60.0
LIFETIME_SECONDS = 1_800
CAPACITY = 4

Trip = Callable[[Any], Awaitable[Any]]  # one round trip of a payload
LENGTH = struct.Struct("<Q")


# -- the two processes of a link: index 0 measures, index 1 echoes ------------------------------------------------


@dataclass(frozen=True, slots=True)
class Side:
    """Which end this process is, and the main program's voice."""

    kind: str
    index: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def meet(self, address: str) -> dict[str, Any]:
        """Tell the main program my address and hear both."""
        self.tell({"kind": self.kind, "index": self.index, "address": address})
        return await self.hear()

    def tell(self, value: Any) -> None:
        self.writer.write(json.dumps(value).encode() + b"\n")

    async def hear(self) -> Any:
        line = await self.reader.readline()
        if not line:
            os._exit(0)  # the main program is done; an mlx group must not delay the end
        return json.loads(line)

    async def measure(self, trip: Trip) -> None:
        """Answer each ``{"size", "trips"}`` with the seconds of every trip."""
        while True:
            order = await self.hear()
            payload = bytes(order["size"])
            for _ in range(WARM_UP_TRIPS):
                await trip(payload)
            seconds = []
            for _ in range(order["trips"]):
                start = time.perf_counter()
                await trip(payload)
                seconds.append(time.perf_counter() - start)
            self.tell(seconds)

    async def wait_for_the_end(self) -> None:
        await self.hear()


async def run_socket(side: Side) -> None:
    """A blocking echo; the event loop stands still meanwhile, as it would have no other work."""
    if side.index == 1:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await side.meet(f"127.0.0.1:{listener.getsockname()[1]}")
            connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while head := _read_exactly(connection, LENGTH.size):
            connection.sendall(head)
            connection.sendall(_read_exactly(connection, LENGTH.unpack(head)[0]))
        os._exit(0)
    connection = socket.create_connection(_parts((await side.meet(""))["addresses"][1]))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def trip(payload: bytes) -> None:
        connection.sendall(LENGTH.pack(len(payload)))
        connection.sendall(payload)
        _read_exactly(connection, LENGTH.size)
        _read_exactly(connection, len(payload))

    await side.measure(trip)


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        count = connection.recv_into(view[filled:])
        if not count:
            return b""
        filled += count
    return bytes(buffer)


async def run_streams(side: Side) -> None:
    limit = 8 * 1024 * 1024
    if side.index == 1:

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                head = await reader.readexactly(LENGTH.size)
                writer.write(head + await reader.readexactly(LENGTH.unpack(head)[0]))
                await writer.drain()

        server = await asyncio.start_server(echo, "127.0.0.1", 0, limit=limit)
        await side.meet(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await side.wait_for_the_end()
    reader, writer = await asyncio.open_connection(*_parts((await side.meet(""))["addresses"][1]), limit=limit)

    async def trip(payload: bytes) -> None:
        writer.write(LENGTH.pack(len(payload)) + payload)
        await writer.drain()
        await reader.readexactly(LENGTH.unpack(await reader.readexactly(LENGTH.size))[0])

    await side.measure(trip)


async def run_inprocess(side: Side) -> None:
    """Both ends in the process of index 0; index 1 has nothing to do."""
    from mlx_cluster.transport.inprocess import pair

    await side.meet("")
    if side.index == 1:
        await side.wait_for_the_end()
    send, receive_there = pair(CAPACITY)
    send_back, receive = pair(CAPACITY)
    echo = asyncio.create_task(_echo(receive_there, send_back))
    await side.measure(_trip(send, receive))
    echo.cancel()


async def run_link(side: Side) -> None:
    """grpc, or an mlx backend whose notes go over gRPC: one link there, one back."""
    import grpc.aio

    from mlx_cluster.transport.grpc_link import HiddenStates, connect

    hidden = HiddenStates()
    server = grpc.aio.server(options=wire.GRPC_OPTIONS)
    hidden.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    met = await side.meet(f"127.0.0.1:{port}")
    there, back = (HopId(name, Epoch(1, 0), "benchmark", 0) for name in ("there", "back"))
    hop_out, hop_in = (there, back) if side.index == 0 else (back, there)
    receive: ReceiveEnd = hidden.expect(hop_in, CAPACITY)
    send: SendEnd = await connect(met["addresses"][1 - side.index], hop_out, PATIENCE_SECONDS)
    if side.kind != "grpc":
        send, receive = await _over_mlx(side, met["mlx_addresses"], hop_out, send, hop_in, receive)
    if side.index == 1:
        echo = asyncio.create_task(_echo(receive, send))
        await side.wait_for_the_end()
        echo.cancel()
    await side.measure(_trip(send, receive))


async def _over_mlx(
    side: Side, addresses: list[str], hop_out: HopId, send_notes: SendEnd, hop_in: HopId, receive_notes: ReceiveEnd
) -> tuple[SendEnd, ReceiveEnd]:
    from mlx_cluster.transport.mlx_link import MlxGroup, MlxReceiveEnd, MlxSendEnd

    owner = ThreadPoolExecutor(1)
    peer = 1 - side.index
    group = await MlxGroup.open(
        side.kind,
        StagePosition("benchmark", Epoch(1, 0), "benchmark", side.index, 2),
        addresses,
        lambda fn: asyncio.get_running_loop().run_in_executor(owner, fn),
        PATIENCE_SECONDS,
    )
    # A pipeline's links go one way; for the way back the ends are made by hand.
    return (
        MlxSendEnd(hop_out, send_notes, lambda payload: group.post_send(payload, peer)),
        MlxReceiveEnd(hop_in, receive_notes, lambda num_bytes: group.post_receive(num_bytes, peer)),
    )


def _trip(send: SendEnd, receive: ReceiveEnd) -> Trip:
    async def trip(payload: bytes) -> None:
        await send.send(Frame(1, (TensorSpec("uint8", (len(payload),)),), payload), PATIENCE_SECONDS)
        await receive.receive(PATIENCE_SECONDS)

    return trip


async def _echo(receive: ReceiveEnd, send: SendEnd) -> None:
    while True:
        await send.send(await receive.receive(LIFETIME_SECONDS), PATIENCE_SECONDS)


async def run_side(kind: str, index: int, control_port: int) -> None:
    run = {"socket": run_socket, "streams": run_streams, "inprocess": run_inprocess}.get(kind, run_link)
    await run(Side(kind, index, *await asyncio.open_connection("127.0.0.1", control_port, limit=2**24)))


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


# -- the main program ---------------------------------------------------------------------------------------------


class Pair:
    """The two processes of one kind, seen from the main program."""

    def __init__(self, kind: str, stack: ExitStack) -> None:
        self.kind = kind
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE_SECONDS)
        for command in _commands(kind, listener.getsockname()[1]):
            environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            stack.callback(_end, subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        voices = {}
        for _ in range(2):
            connection, _ = listener.accept()
            connection.settimeout(PATIENCE_SECONDS)
            stack.callback(connection.close)
            lines = connection.makefile("rw")
            hello = json.loads(lines.readline())
            voices[hello["index"]] = (lines, hello["address"])
        addresses = {
            "addresses": [voices[index][1] for index in range(2)],
            "mlx_addresses": [f"127.0.0.1:{port}" for port in _free_ports(2)],
        }
        for lines, _ in voices.values():
            _tell(lines, addresses)
        self._measuring = voices[0][0]

    def seconds_of_trips(self, size: int, num_trips: int) -> list[float]:
        _tell(self._measuring, {"size": size, "trips": num_trips})
        return json.loads(self._measuring.readline())


def _tell(lines: Any, value: Any) -> None:
    lines.write(json.dumps(value) + "\n")
    lines.flush()


def _commands(kind: str, control_port: int) -> list[list[str]]:
    side = [sys.executable, __file__, "--side", kind, "--control", str(control_port)]
    if kind == "mpi":
        launcher = _mpirun()
        assert launcher is not None
        return [[launcher, "--oversubscribe", "--bind-to", "none", "-np", "2", *side]]
    return [[*side, "--index", str(index)] for index in range(2)]


def _mpirun() -> str | None:
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def measure(kinds: list[str], repeat: int, sizes: list[int]) -> list[dict[str, Any]]:
    """One row per kind and size, times in microseconds of one hop."""
    medians: dict[tuple[str, int], list[float]] = {(kind, size): [] for size in sizes for kind in kinds}
    with ExitStack() as stack:
        pairs = [Pair(kind, stack) for kind in kinds]
        for _ in range(repeat):
            for size in sizes:
                for pair in pairs:
                    trips = pair.seconds_of_trips(size, TRIPS[size])
                    medians[pair.kind, size].append(statistics.median(trips) / 2 * 1e6)
    return [
        {
            "link": kind,
            "payload_bytes": size,
            "hop_microseconds": round(statistics.median(values), 1),
            "repetitions": [round(value, 1) for value in values],
            "times_streams": round(statistics.median(values) / statistics.median(medians["streams", size]), 2),
        }
        for (kind, size), values in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--links", nargs="+", choices=KINDS, default=None)
    parser.add_argument("--sizes", nargs="+", type=int, choices=list(TRIPS), default=list(TRIPS), metavar="BYTES")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--control", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        signal.alarm(LIFETIME_SECONDS)
        rank = arguments.index if arguments.index is not None else int(os.environ["OMPI_COMM_WORLD_RANK"])
        asyncio.run(run_side(arguments.side, rank, arguments.control))
        return
    kinds = arguments.links or [kind for kind in KINDS if kind != "mpi" or _mpirun()]
    if "streams" not in kinds:
        kinds.insert(0, "streams")  # what the others are compared with
    results = measure(kinds, arguments.repeat, arguments.sizes)
    for row in results:
        print(
            f"{row['link']:>10} {row['payload_bytes']:>10,} B {row['hop_microseconds']:>10,.1f} µs a hop "
            f"{row['times_streams']:>6.2f} × streams"
        )
    record.save(arguments.json, "hop", results)


if __name__ == "__main__":
    main()
