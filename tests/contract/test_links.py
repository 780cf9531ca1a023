"""What every link promises, run over each implementation in real processes (one for the inprocess link).

Contract: frames arrive whole, once and in order; a slow receiver holds the sender back; every failure is a typed error
within its deadline. A new kind of link is one small class at the end of this file.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import ClassVar

import pytest

from tests.contract.links_line import Line, Refused, line_of, mpirun

PATIENT = 40.0  # a deadline that a healthy link never reaches
MEBIBYTE = 1024 * 1024


def frames(*sizes: int, first_id: int = 1) -> list[list[object]]:
    return [[first_id + number, "uint8", [size]] for number, size in enumerate(sizes)]


@pytest.fixture(scope="class")
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    """Three linked stages, shared by the tests of a class that leave them as they were."""
    with line_of(request.cls.kind, 3) as line:
        line.open()
        yield line


@pytest.fixture
def own_line(request: pytest.FixtureRequest) -> Iterator[Line]:
    """Three linked stages of one test."""
    with line_of(request.cls.kind, 3) as line:
        line.open()
        yield line


@pytest.fixture
def couple(request: pytest.FixtureRequest) -> Iterator[Line]:
    """Two linked stages of one test."""
    with line_of(request.cls.kind, 2) as line:
        line.open()
        yield line


class LinkContract:
    kind: ClassVar[str]

    def test_frames_arrive_whole_and_in_order(self, line: Line) -> None:
        sent = frames(1, 3, 1024, 7168, 65_537, 3_670_016, 8 * MEBIBYTE, 1, 7168)
        sending = line[0].begin("send", frames=sent, timeout=PATIENT)
        received = line[1].ask("receive", count=len(sent), timeout=PATIENT)
        line[0].result(sending)
        assert [item["frame"] for item in received] == sent
        assert all(item["whole"] for item in received)

    def test_shapes_and_dtypes_travel(self, line: Line) -> None:
        sent = [
            [20, "bfloat16", [1, 5, 64]],
            [21, "float16", [2, 1, 33]],
            [22, "float32", [4, 1, 96]],
            [23, "uint32", [7]],
            [24, "bool_", [3, 3]],
            [25, "float32", [0, 96]],
            [26, "float32", []],
        ]
        sending = line[0].begin("send", frames=sent, timeout=PATIENT)
        received = line[1].ask("receive", count=len(sent), timeout=PATIENT)
        line[0].result(sending)
        assert [item["frame"] for item in received] == sent
        assert all(item["whole"] for item in received)

    def test_a_middle_stage_sends_and_receives_at_once(self, line: Line) -> None:
        sent = [frames(*[200_000] * 6, first_id=100 * index) for index in (1, 2)]
        sending = [line[index].begin("send", frames=sent[index], timeout=PATIENT) for index in (0, 1)]
        receiving = [line[index].begin("receive", count=6, timeout=PATIENT) for index in (1, 2)]
        received = [line[1].result(receiving[0]), line[2].result(receiving[1])]
        for index in (0, 1):
            line[index].result(sending[index])
            assert [item["frame"] for item in received[index]] == sent[index]
            assert all(item["whole"] for item in received[index])

    def test_a_slow_receiver_gets_everything_in_order(self, line: Line) -> None:
        sent = frames(*[50_000, MEBIBYTE] * 6, first_id=300)
        sending = line[0].begin("send", frames=sent, timeout=PATIENT, together=True)
        received = line[1].ask("receive", count=len(sent), timeout=PATIENT, pause=0.02)
        line[0].result(sending)
        assert [item["frame"] for item in received] == sent
        assert all(item["whole"] for item in received)

    def test_a_receive_that_timed_out_may_be_repeated(self, line: Line) -> None:
        with pytest.raises(Refused) as refused:
            line[1].ask("receive", count=1, timeout=0.1)
        assert refused.value.code == "link_timeout"
        sending = line[0].begin("send", frames=frames(7168, first_id=400), timeout=PATIENT)
        (received,) = line[1].ask("receive", count=1, timeout=PATIENT)
        line[0].result(sending)
        assert received["frame"][0] == 400
        assert received["whole"]

    def test_closing_tells_both_neighbours_and_is_idempotent(self, own_line: Line) -> None:
        waiting = own_line[2].begin("receive", count=1, timeout=PATIENT)
        own_line[1].ask("close")
        own_line[1].ask("close")
        for stage, attempt in (
            (own_line[2], waiting),
            (own_line[2], own_line[2].begin("receive", count=1, timeout=PATIENT)),
        ):
            with pytest.raises(Refused) as refused:
                stage.result(attempt)
            assert refused.value.code == "link_closed"
        with pytest.raises(Refused) as refused:
            own_line[0].ask("send", frames=frames(*[7168] * 200, first_id=500), timeout=PATIENT)
        assert refused.value.code == "link_closed"
        with pytest.raises(Refused) as refused:
            own_line[1].ask("receive", count=1, timeout=PATIENT)
        assert refused.value.code == "link_closed"


class ProcessLinkContract(LinkContract):
    """What links between processes promise beyond that."""

    def test_a_killed_sender_closes_a_waiting_receive(self, couple: Line) -> None:
        waiting = couple[1].begin("receive", count=1, timeout=PATIENT)
        couple[0].signal(signal.SIGKILL)
        with pytest.raises(Refused) as refused:
            couple[1].result(waiting)
        assert refused.value.code == "link_closed"

    def test_a_killed_receiver_closes_the_sends(self, couple: Line) -> None:
        sending = couple[0].begin("send", frames=frames(*[4 * MEBIBYTE] * 40), timeout=PATIENT)
        couple[1].ask("receive", count=1, timeout=PATIENT)
        couple[1].signal(signal.SIGKILL)
        with pytest.raises(Refused) as refused:
            couple[0].result(sending)
        assert refused.value.code == "link_closed"

    def test_a_stopped_receiver_times_a_send_out(self, couple: Line) -> None:
        couple[1].signal(signal.SIGSTOP)
        with pytest.raises(Refused) as refused:
            couple[0].ask("send", frames=frames(*[8 * MEBIBYTE] * 20), timeout=2.0)
        assert refused.value.code == "link_timeout"

    def test_a_stopped_sender_times_a_receive_out(self, couple: Line) -> None:
        couple[0].signal(signal.SIGSTOP)
        with pytest.raises(Refused) as refused:
            couple[1].ask("receive", count=1, timeout=0.5)
        assert refused.value.code == "link_timeout"

    def test_neighbours_of_different_plans_do_not_link(self, request: pytest.FixtureRequest) -> None:
        with line_of(request.cls.kind, 2) as line:
            opening = line.begin_open(plan_hashes=["one", "other"])
            with pytest.raises(Refused) as refused:
                line[0].result(opening[0])
            assert refused.value.code == "link_mismatch"

    def test_a_neighbour_of_an_older_epoch_is_fenced(self, request: pytest.FixtureRequest) -> None:
        with line_of(request.cls.kind, 2) as line:
            opening = line.begin_open(epochs=["1.0", "1.1"])
            with pytest.raises(Refused) as refused:
                line[0].result(opening[0])
            assert refused.value.code == "fenced"


class TestInprocess(LinkContract):
    kind = "inprocess"


class TestGrpc(ProcessLinkContract):
    kind = "grpc"


class TestRing(ProcessLinkContract):
    kind = "ring"


@pytest.mark.skipif(mpirun() is None, reason="mpirun is not installed: pip install 'mlx-cluster[mpi]'")
class TestMpi(LinkContract):
    """mpirun ends all ranks when one dies, so what a killed or stopped peer does is mpirun's affair."""

    kind = "mpi"
