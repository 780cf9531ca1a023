"""A process that holds the links of one stage (or, for the inprocess link, of all of them) and does what a test says.

Run as ``python -m tests.contract.links_child KIND NUM_STAGES CONTROL_PORT [INDEX]``. Each stage dials the test's
control port and then answers JSON lines; commands run side by side. Under mpirun the rank is the index.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio

from mlx_cluster import wire
from mlx_cluster.errors import ClusterError
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.plan import Epoch
from mlx_cluster.transport import framing
from mlx_cluster.transport.grpc_link import HiddenStates
from mlx_cluster.transport.inprocess import pair
from mlx_cluster.transport.link import StagePosition
from mlx_cluster.transport.open import CAPACITY, Links, open_links

LIFETIME_SECONDS = 100  # a kernel timer: ends even a process that forms a group holding the GIL


def payload_of(microbatch_id: int, num_bytes: int) -> bytes:
    """The bytes that both ends expect for this microbatch."""
    return random.Random(microbatch_id).randbytes(num_bytes)


def frame_of(microbatch_id: int, dtype: str, shape: list[int]) -> Frame:
    tensors = (TensorSpec(dtype, tuple(shape)),)
    return Frame(microbatch_id, tensors, payload_of(microbatch_id, framing.num_bytes(tensors)))


class StageUnderTest:
    """One stage's links, and the commands of a test upon them."""

    def __init__(self, kind: str, index: int, num_stages: int, links: Links | None = None) -> None:
        self.kind, self.index, self.num_stages = kind, index, num_stages
        self.links = links or Links(None, None)
        self.hidden = HiddenStates(hold_seconds=20.0)
        self.owner = ThreadPoolExecutor(1)
        self.address = ""

    async def serve(self, control_port: int) -> None:
        server = grpc.aio.server(options=wire.GRPC_OPTIONS)
        self.hidden.add_to(server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", control_port)
        self._reply(writer, {"index": self.index, "address": self.address, "pid": os.getpid()})
        tasks = set()
        while line := await reader.readline():
            task = asyncio.create_task(self._answer(writer, json.loads(line)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _answer(self, writer: asyncio.StreamWriter, command: dict[str, Any]) -> None:
        number, name = command.pop("number"), command.pop("do")
        try:
            result = await getattr(self, f"do_{name}")(**command)
        except ClusterError as error:
            self._reply(writer, {"number": number, "error": error.code, "message": str(error)})
        else:
            self._reply(writer, {"number": number, "result": result})

    def _reply(self, writer: asyncio.StreamWriter, reply: dict[str, Any]) -> None:
        writer.write(json.dumps(reply).encode() + b"\n")

    async def do_open(
        self, stage_addresses: list[str], mlx_addresses: list[str], plan_hash: str, epoch: str, timeout: float
    ) -> None:
        if self.kind == "inprocess":
            return
        self.links = await open_links(
            self.kind,
            StagePosition("tiny", Epoch.parse(epoch), plan_hash, self.index, self.num_stages),
            hidden=self.hidden,
            stage_addresses=stage_addresses,
            timeout_seconds=timeout,
            mlx_addresses=mlx_addresses,
            run_on_owner=lambda fn: asyncio.get_running_loop().run_in_executor(self.owner, fn),
        )

    async def do_send(self, frames: list[tuple[int, str, list[int]]], timeout: float, together: bool = False) -> None:
        """One after the other, or all sends begun at once."""
        assert self.links.send is not None
        end = self.links.send
        if together:
            await asyncio.gather(*(end.send(frame_of(*frame), timeout) for frame in frames))
        else:
            for frame in frames:
                await end.send(frame_of(*frame), timeout)

    async def do_receive(self, count: int, timeout: float, pause: float = 0.0) -> list[dict[str, Any]]:
        assert self.links.receive is not None
        received = []
        for _ in range(count):
            frame = await self.links.receive.receive(timeout)
            payload = bytes(memoryview(frame.payload))
            received.append(
                {
                    "frame": [frame.microbatch_id, frame.tensors[0].dtype, list(frame.tensors[0].shape)],
                    "whole": payload == payload_of(frame.microbatch_id, framing.num_bytes(frame.tensors)),
                }
            )
            await asyncio.sleep(pause)
        return received

    async def do_close(self) -> None:
        await self.links.close()

    async def do_exit(self) -> None:
        os._exit(0)  # not sys.exit: an mlx operation that never ends would keep the process


async def main(kind: str, num_stages: int, control_port: int, index: int) -> None:
    if kind != "inprocess":
        await StageUnderTest(kind, index, num_stages).serve(control_port)
        return
    hops = [pair(CAPACITY) for _ in range(num_stages - 1)]
    links = [
        Links(hops[i - 1][1] if i > 0 else None, hops[i][0] if i < num_stages - 1 else None) for i in range(num_stages)
    ]
    stages = [StageUnderTest(kind, i, num_stages, links[i]) for i in range(num_stages)]
    await asyncio.gather(*(stage.serve(control_port) for stage in stages))


if __name__ == "__main__":
    signal.alarm(LIFETIME_SECONDS)
    rank = sys.argv[4] if len(sys.argv) > 4 else os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(rank)))
    os._exit(0)
