"""From the options of ``up`` to the settings its nodes read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mlx_cluster import demo
from mlx_cluster.cli.compose import UpOptions, compose
from mlx_cluster.cli.launcher import commands_of
from mlx_cluster.config.load import load
from mlx_cluster.config.names import manual_stages, node_name
from mlx_cluster.config.ports import plan_ports
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def composed(tmp_path: Path, environ: dict[str, str] | None = None, **options: object) -> Settings:
    return compose(UpOptions(**options), environ or {}, tmp_path).settings  # type: ignore[arg-type]


def sizes(settings: Settings, model: str) -> list[int]:
    return [stage.end - stage.start for stage in manual_stages(settings, settings.models[model])]


def test_the_demo_on_three_nodes_is_cut_10_9_9(tmp_path: Path) -> None:
    settings = composed(tmp_path)
    assert [node_name(n) for n in settings.cluster.nodes] == ["mini1", "mini2", "master"]
    assert sizes(settings, "demo") == [10, 9, 9]
    assert settings.models["demo"].path == str(demo.model_dir())
    assert [p.gateway for p in plan_ports(settings).values()] == [8000, 8001, 8002]
    assert settings.log.level == "warning"


def test_what_is_written_is_what_was_composed_and_private(tmp_path: Path) -> None:
    settings = composed(tmp_path, aliases=("gpt",), transport="grpc")
    assert load(tmp_path).settings == settings
    assert stat.S_IMODE((tmp_path / "cluster.yaml").stat().st_mode) == 0o600
    assert {Path(n.state_dir or "").parent for n in settings.nodes.values()} == {tmp_path / "state"}
    assert settings.models["demo"].aliases == ("gpt",)
    assert settings.network.transport == "grpc"


@pytest.mark.parametrize(("num_nodes", "split"), [(1, []), (2, []), (5, [])])
def test_other_numbers_of_nodes_are_placed_automatically(tmp_path: Path, num_nodes: int, split: list[int]) -> None:
    settings = composed(tmp_path, num_nodes=num_nodes)
    assert len(settings.cluster.nodes) == num_nodes
    assert sizes(settings, "demo") == split


def test_a_split_says_how_many_nodes(tmp_path: Path) -> None:
    settings = composed(tmp_path, split="14/14")
    assert len(settings.cluster.nodes) == 2
    assert sizes(settings, "demo") == [14, 14]


def test_a_split_that_does_not_cover_the_demo_names_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"command line models\.demo\.split: .* layers 27…27 are on no stage"):
        composed(tmp_path, split="9/9/9")


def test_the_command_line_wins_over_the_environment(tmp_path: Path) -> None:
    environ = {"MLX_CLUSTER__NETWORK__TRANSPORT": "ring", "MLX_CLUSTER__LOG__LEVEL": "error"}
    settings = composed(tmp_path, environ, transport="grpc")
    assert (settings.network.transport, settings.log.level) == ("grpc", "error")
    assert composed(tmp_path, environ).network.transport == "ring"


def test_ports_and_assignments(tmp_path: Path) -> None:
    settings = composed(
        tmp_path, num_nodes=2, base_port=9100, gateway_port=9000, assignments={"scheduler.max_rows": 8}, verbose=True
    )
    assert [(p.node_api, p.gateway) for p in plan_ports(settings).values()] == [(9100, 9000), (9200, 9001)]
    assert (settings.scheduler.max_rows, settings.log.level) == (8, "info")


def test_a_directory_is_a_model(tmp_path: Path) -> None:
    model = tmp_path / "Tiny-1"
    model.mkdir()
    settings = composed(tmp_path, model=str(model))
    assert settings.models["Tiny-1"].path == str(model)
    assert list(settings.models) == ["Tiny-1"]


def test_a_repository_is_a_model_with_its_whole_name_as_alias(tmp_path: Path) -> None:
    entry = composed(tmp_path, model="some-org/Qwen2.5-7B", aliases=("gpt",)).models["Qwen2.5-7B"]
    assert (entry.path, entry.aliases) == ("some-org/Qwen2.5-7B", ("some-org/Qwen2.5-7B", "gpt"))


@pytest.mark.parametrize("model", ["./nowhere", "nowhere", "/no/where", "a/b/c"])
def test_what_is_no_model_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        composed(tmp_path, model=model)


def test_a_real_clusters_configuration_comes_to_this_machine(tmp_path: Path) -> None:
    settings = composed(tmp_path, config_dir=ROOT / "config")
    assert [(node_name(n), n.host) for n in settings.cluster.nodes] == [
        ("mini1", "127.0.0.1"),
        ("mini2", "127.0.0.1"),
        ("master", "127.0.0.1"),
    ]
    assert sizes(settings, "qwen2.5-7b") == [10, 9, 9]
    assert settings.nodes["master"].memory_budget == "24GB"
    assert [p.gateway for p in plan_ports(settings).values()] == [8000, 8001, 8002]


def test_the_demo_on_a_real_clusters_configuration(tmp_path: Path) -> None:
    settings = composed(tmp_path, config_dir=ROOT / "config", model="demo", base_port=9100)
    assert list(settings.models) == ["demo"]
    assert sizes(settings, "demo") == [10, 9, 9]
    assert [p.node_api for p in plan_ports(settings).values()] == [9100, 9200, 9300]


def test_a_witness_comes_along(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "cluster.yaml").write_text(
        "cluster:\n  nodes: [{host: a.lan, node_id: 0}, {host: b.lan, node_id: 1}]\n"
        "  witness: {host: nas.lan, port: 8451, state_dir: /var/lib/witness}\n"
    )
    witness = composed(tmp_path, config_dir=tmp_path / "c", model="demo").cluster.witness
    assert witness is not None
    assert (witness.host, witness.port, witness.state_dir) == ("127.0.0.1", 8451, str(tmp_path / "state" / "witness"))
    settings = composed(tmp_path, config_dir=tmp_path / "c", model="demo", base_port=9100)
    assert settings.cluster.witness is not None
    assert settings.cluster.witness.port == 9109
    commands = commands_of(settings, tmp_path)
    assert list(commands) == ["a", "b", "the witness"]
    assert commands["the witness"][2:4] == ["mlx_cluster", "witness"]


def test_a_split_on_the_command_line_replaces_sharding(tmp_path: Path) -> None:
    settings = composed(tmp_path, config_dir=ROOT / "config", split="12/8/8", aliases=("gpt",))
    assert sizes(settings, "qwen2.5-7b") == [12, 8, 8]
    assert settings.models["qwen2.5-7b"].aliases == ("gpt",)


def test_what_contradicts_a_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "cluster.yaml").write_text("cluster: {nodes: [{host: a, node_id: 0}]}\nmodels: {a: {}, b: {}}\n")
    with pytest.raises(ConfigError, match="--nodes and --config contradict"):
        composed(tmp_path, config_dir=tmp_path / "c", num_nodes=2)
    with pytest.raises(ConfigError, match="need one model"):
        composed(tmp_path, config_dir=tmp_path / "c", split="1")
    (tmp_path / "c" / "cluster.yaml").write_text("cluster: {nodes: [{host: a, node_id: 0}]}\n")
    with pytest.raises(ConfigError, match="no model is configured"):
        composed(tmp_path, config_dir=tmp_path / "c")
