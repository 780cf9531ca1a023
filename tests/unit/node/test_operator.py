"""An operator's commands against several agents in one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from mlx_cluster.cli.coordinator import coordinator_lines, recovery_lines
from mlx_cluster.errors import ConfigError, Unavailable
from mlx_cluster.node import report
from mlx_cluster.node.http import operator_routes
from mlx_cluster.node.operator import FORWARDED, Operator
from tests.unit.node.test_agent import Node, cluster, until


def leading(nodes: dict[int, Node]) -> Node:
    return next(node for node in nodes.values() if node.agent.leads)


async def test_pins_and_drained_nodes_stand_in_the_document_and_are_obeyed(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 3, split="3/3/0") as three:
        await three.ready(0, 1, 2)
        operator = Operator(leading(three.nodes).agent)
        with pytest.raises(ConfigError, match="no node is called 'mini9'"):
            await operator.pin("mini9", None)
        with pytest.raises(ConfigError, match="ttl_seconds -1"):
            await operator.pin("mini2", -1.0)
        answer = await operator.pin("mini2", 3600.0)
        assert answer["pinned"] == "mini2"
        await until("the pinned node leads", lambda: three.nodes[2].agent.leads)
        await until("everybody knows why", lambda: three.nodes[0].agent.picture()[1].node_id == 2)
        assert three.nodes[0].agent.history.elections[-1].reason == "the operator has set it"

        follower = Operator(three.nodes[0].agent)
        assert follower.leader_url() == three.nodes[2].agent.identity.admin_url
        with pytest.raises(Unavailable, match="not the coordinator"):
            await follower.unpin()
        assert Operator(three.nodes[2].agent).leader_url() is None
        await carried_out(three.nodes, lambda operator: operator.unpin())
        await carried_out(three.nodes, lambda operator: operator.drain("mini1"))
        await until("its layers have moved", lambda: (held := holders(three.nodes[2])) and 1 not in held)
        view, leadership, document = three.nodes[2].agent.picture()
        assert report.cluster("agents", view, leadership, document)["document"]["drained"] == [1]
        await carried_out(three.nodes, lambda operator: operator.drain("mini1", undo=True))
        await until("the split is restored", lambda: holders(three.nodes[2]) == {0, 1})
        with pytest.raises(Unavailable, match=r"quorum is not lost|still answers"):
            await Operator(leading(three.nodes).agent).force_new_cluster()


async def test_a_dead_nodes_vote_is_removed_for_good_and_it_joins_anew(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 3, split="3/3/0") as three:
        await three.ready(0, 1, 2)

        def voters() -> tuple[str, ...]:
            return tuple(v["voter"] for v in leading(three.nodes).agent.office()["election"]["voters"])

        await until("all vote", lambda: len(voters()) == 3)
        lost = next(i for i in (2, 1) if not three.nodes[i].agent.leads)
        old = next(v for v in voters() if v.startswith(f"{lost}:"))
        for node, reason in ((lost, f"mini{lost} is alive: stop it first"), ("mini9", "no node is called 'mini9'")):
            with pytest.raises(ConfigError, match=reason):
                await Operator(leading(three.nodes).agent).remove(str(node))
        await three.nodes[lost].stop()
        left = {i: node for i, node in three.nodes.items() if i != lost}
        await until("it counts as dead", lambda: leading(left).agent.view.is_dead(lost))
        assert len(voters()) == 3, "a death alone takes no vote away"
        await carried_out(left, lambda operator: operator.remove(f"mini{lost}"))
        assert len(voters()) == 2
        with pytest.raises(ConfigError, match=f"mini{lost} has no vote"):
            await Operator(leading(left).agent).remove(str(lost))
        await three.start(lost)
        await until("it has a new vote", lambda: len(voters()) == 3)
        assert old not in voters()


async def carried_out(nodes: dict[int, Node], act: Callable[[Operator], Awaitable[object]]) -> None:
    """By whoever leads: on a busy machine somebody else may lead a moment later."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(Unavailable, StopIteration):
                await act(Operator(leading(nodes).agent))
                return
            await asyncio.sleep(0.05)


def holders(node: Node) -> set[int]:
    plan = node.ready_plan()
    return {stage.node_id for stage in plan.stages} if plan is not None else set()


async def test_commands_over_http_name_what_is_wrong_and_refuse_web_pages(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 1) as one:
        await one.ready(0)
        app = Starlette(routes=operator_routes(Operator(one.nodes[0].agent)))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            page = await client.post("/coordinator", json={"node": "0"}, headers={"origin": "http://evil.example"})
            assert (page.status_code, page.json()["error"]["code"]) == (400, "config_error")
            for body in ("[]", "{", '{"node": 3.5}', '{"node": "mini0", "ttl_seconds": "soon"}'):
                answer = await client.post("/coordinator", content=body)
                assert answer.status_code == 400, body
            pinned = await client.post("/coordinator", json={"node": "mini0"}, headers={FORWARDED: "1"})
            assert pinned.json() == {"pinned": "mini0", "expires_at": None}
            drained = await client.post("/nodes/mini0/drain")
            assert drained.json() == {"node": "mini0", "drained": True}
            unknown = await client.post("/nodes/mini7/drain")
            assert "no node is called 'mini7'" in unknown.json()["error"]["message"]
        view, leadership, document = one.nodes[0].agent.picture()
        picture = {**report.cluster("agents", view, leadership, document), **one.nodes[0].agent.office()}
        lines = coordinator_lines(picture)
        assert lines[0].startswith("coordinator mini0, term 1")
        assert "the operator wants mini0 to lead" in lines
        assert "  voter mini0" in lines


def test_what_an_answer_lacks_is_left_out_and_recoveries_are_lines() -> None:
    assert coordinator_lines({}) == ["no coordinator: an election is going on"]
    row = {"pipeline": "tiny", "epoch": "3.2", "cause": "stage 1 died", "seconds": 1.25, "at": 0.0}
    (line,) = recovery_lines({"recoveries": [row]})
    assert line.endswith("tiny epoch 3.2: back after 1.2 s; stage 1 died")


async def test_a_fixed_coordinator_leads_from_any_id_and_takes_no_orders_about_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    async with cluster(tmp_path, tiny_model, 2, fixed="mini1") as two:
        plan = await two.ready(0, 1)
        assert two.nodes[1].agent.leads
        assert {s.node_id for s in plan.stages} == {0, 1}
        operator = Operator(two.nodes[1].agent)
        with pytest.raises(ConfigError, match=r"fixed to mini1"):
            await operator.pin("mini0", None)
        await operator.drain("mini0")
        await until("the drained node is empty", lambda: holders(two.nodes[1]) == {1})
        await two.nodes[1].stop()
        await until("nobody leads", lambda: two.nodes[0].agent.picture()[1].node_id is None)
        said = two.nodes[0].agent.authority.report(two.nodes[0].agent.view)
        assert said["detail"].startswith("mini1 does not answer")
