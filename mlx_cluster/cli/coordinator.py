"""``mlx-cluster coordinator``: who leads, who should, and what to do when quorum is lost for good."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_cluster.cli.options import ConfigDir
from mlx_cluster.errors import ClusterError, Unavailable

Url = Annotated[
    str | None, typer.Option("--url", help="Of a node's admin API (default: those of the configuration, in turn).")
]
COMMAND_SECONDS = 40.0  # a forced founding first waits for the others

coordinator_app = typer.Typer(help="Who leads the cluster, and why.", no_args_is_help=True)


@coordinator_app.command("show")
def show(
    as_json: Annotated[bool, typer.Option("--json", help="Print the admin API's answer.")] = False,
    url: Url = None,
    config: ConfigDir = None,
) -> None:
    """Print the coordinator, the voters and the last elections."""
    import json

    data = ask("GET", "/cluster", None, url, config)
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        for line in coordinator_lines(data):
            typer.echo(line)


@coordinator_app.command("set")
def set_coordinator(
    name: Annotated[str, typer.Argument(help="The node that should lead: mini2, node_1 or 1.")],
    ttl: Annotated[
        float | None, typer.Option("--ttl", metavar="SECONDS", help="For so long; default: until unset.")
    ] = None,
    url: Url = None,
    config: ConfigDir = None,
) -> None:
    """Have a node lead as long as it can."""
    data = ask("POST", "/coordinator", {"node": name, "ttl_seconds": ttl}, url, config)
    until = "" if ttl is None else f" for {ttl:g} s"
    typer.echo(f"{data['pinned']} should lead{until}; it takes over within seconds")


@coordinator_app.command("unset")
def unset(url: Url = None, config: ConfigDir = None) -> None:
    """Let coordinator.election_strategy decide again."""
    ask("DELETE", "/coordinator", {}, url, config)
    typer.echo("the strategy decides again")


@coordinator_app.command("force-new-cluster")
def force_new_cluster(
    url: Annotated[
        str, typer.Option("--url", help="Admin API of the node that goes on, such as http://10.0.0.2:8204.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Found the cluster anew with what ONE node holds, because a majority of the voters is gone for good.

    Refused while another voter answers that node. What only the lost voters knew is lost.
    """
    if not yes:
        typer.confirm(f"Is a majority of the voters gone for good, and shall {url} go on without them?", abort=True)
    data = ask("POST", "/coordinator/force-new-cluster", {}, url, None)
    typer.echo(f"{data['founded_by']} has founded the cluster anew; the others may join when they return")


def ask(method: str, path: str, body: dict[str, Any] | None, url: str | None, config: Any) -> dict[str, Any]:
    """The answer of the first admin API that answers at all. Raises ``ClusterError`` with a node's reason."""
    import httpx

    from mlx_cluster.cli.status import admin_urls
    from mlx_cluster.wire import error_from_code

    urls = [url.rstrip("/").removesuffix("/cluster").removesuffix("/coordinator")] if url else admin_urls(config)
    refusal: ClusterError | None = None
    with httpx.Client(timeout=COMMAND_SECONDS, trust_env=False) as client:
        for each in urls:
            try:
                answer = client.request(method, f"{each}{path}", json=body)
                data = answer.json()
            except (httpx.TransportError, ValueError):
                continue
            if answer.is_success and isinstance(data, dict):
                return data
            error = data.get("error") if isinstance(data, dict) else None
            text = error.get("message") if isinstance(error, dict) else f"{each} answered {answer.status_code}"
            code = error.get("code") if isinstance(error, dict) else "unavailable"
            refusal = error_from_code(str(code), str(text))
            if answer.status_code < 500:
                break
    raise refusal or Unavailable(
        f"no node answers at {', '.join(urls)}: start one with 'mlx-cluster up', or say --url or --config"
    )


def coordinator_lines(data: dict[str, Any]) -> list[str]:
    """``GET /cluster`` in words; what an answer lacks is left out."""
    leads, election = data.get("coordinator") or {}, data.get("election") or {}
    names = {node["node_id"]: node.get("name") for node in data.get("nodes", ())}
    elections = data.get("elections") or []
    node_id = leads.get("node_id")
    name = leads.get("name") or names.get(node_id) or f"node_{node_id}"
    lines: list[str] = []
    if node_id is None:
        lines.append(f"no coordinator: {election.get('detail') or 'an election is going on'}")
    else:
        why = f": {elections[0]['reason']}" if elections else ""
        lines.append(f"coordinator {name}, term {leads.get('term')}{why}")
    mode = election.get("mode")
    if mode == "elected":
        lines.append(f"elected ({election.get('strategy')}), era {election.get('era')}")
    elif mode:
        lines.append(f"{mode}; {election.get('detail') or 'by coordinator.fixed'}")
    pin = (data.get("document") or {}).get("pin")
    if pin:
        lines.append(f"the operator wants {names.get(pin['node_id']) or 'node ' + str(pin['node_id'])} to lead")
    for voter in election.get("voters", ()):
        silent = ", silent" if voter.get("heard") is False else ""
        lines.append(f"  voter {voter['name']}{' (witness)' if voter.get('witness') else ''}{silent}")
    for each in elections[:5]:
        gap = "" if each.get("seconds") is None else f" after {each['seconds']:g} s without one"
        who = names.get(each["node_id"]) or f"node {each['node_id']}"
        lines.append(f"  {_clock(each['at'])} term {each['term']}: {who}{gap}; {each['reason']}")
    return lines


def recovery_lines(data: dict[str, Any]) -> list[str]:
    """The last recoveries of ``GET /cluster`` in words."""
    return [
        f"  {_clock(r['at'])} {r['pipeline']} epoch {r['epoch']}: back after {r['seconds']:.1f} s; {r['cause']}"
        for r in (data.get("recoveries") or [])[:5]
    ]


def _clock(at: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
