"""Layers, errors with their place, and the two documents that must load as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from mlx_cluster.config.explain import MASK, explain
from mlx_cluster.config.keys import leaves
from mlx_cluster.config.load import Loaded, build, environment_layer, load, provenance_of, written_layer
from mlx_cluster.config.names import find_node, manual_stages, node_name, settings_of_node
from mlx_cluster.config.schema import CoordinatorSection, NetworkSection, Section, Settings
from mlx_cluster.errors import ConfigError

CLUSTER_DOCUMENT = """\
cluster:
  name: "mlx-distributed-cluster"
  nodes:
    - {host: "mini1.local", node_id: 0, ports: [8100, 8101, 8102]}
    - {host: "mini2.local", node_id: 1, ports: [8200, 8201, 8202]}
    - {host: "master.local", node_id: 2, ports: [8300, 8301, 8302]}
coordinator: {port: 8400, election_strategy: "health_based", health_check_interval: 5, failure_threshold: 3}
api_gateway: {port: 8000, timeout: 30, max_concurrent_requests: 100}
"""
MODELS_DOCUMENT = """\
models:
  qwen2.5-7b:
    total_layers: 28
    sharding:            # layer bounds are inclusive in this file
      node_0: {layers: [0, 9], estimated_memory: "2.5GB"}
      node_1: {layers: [10, 18], estimated_memory: "2.2GB"}
      node_2: {layers: [19, 27], estimated_memory: "2.2GB", includes_output_head: true}
"""
ROOT = Path(__file__).resolve().parents[3]


def directory(tmp_path: Path, **files: str) -> Path:
    """A configuration directory; ``cluster`` is the content of cluster.yaml."""
    for name, text in {"cluster": CLUSTER_DOCUMENT, **files}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def refusal(tmp_path: Path, **files: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(directory(tmp_path, **files))
    return caught.value


def test_the_cluster_document_loads_as_it_stands(tmp_path: Path) -> None:
    settings = load(directory(tmp_path)).settings
    assert settings.cluster.name == "mlx-distributed-cluster"
    assert [(n.node_id, n.host, n.ports) for n in settings.cluster.nodes] == [
        (0, "mini1.local", (8100, 8101, 8102)),
        (1, "mini2.local", (8200, 8201, 8202)),
        (2, "master.local", (8300, 8301, 8302)),
    ]
    assert [node_name(n) for n in settings.cluster.nodes] == ["mini1", "mini2", "master"]
    assert settings.coordinator.port == 8400
    assert settings.coordinator.election_strategy == "health_based"
    assert (settings.coordinator.health_check_interval, settings.coordinator.failure_threshold) == (5, 3)
    assert (settings.api_gateway.port, settings.api_gateway.timeout) == (8000, 30)
    assert settings.api_gateway.max_concurrent_requests == 100


def test_the_models_document_loads_as_it_stands(tmp_path: Path) -> None:
    settings = load(directory(tmp_path, models=MODELS_DOCUMENT)).settings
    model = settings.models["qwen2.5-7b"]
    assert model.total_layers == 28
    stages = manual_stages(settings, model)
    assert [(s.node_id, s.start, s.end, s.estimated_bytes) for s in stages] == [
        (0, 0, 10, 2_500_000_000),
        (1, 10, 19, 2_200_000_000),
        (2, 19, 28, 2_200_000_000),
    ]
    assert model.sharding["node_2"].includes_output_head


def test_the_shipped_examples_load(tmp_path: Path) -> None:
    settings = load(ROOT / "config").settings
    assert [node_name(n) for n in settings.cluster.nodes] == ["mini1", "mini2", "master"]
    assert settings_of_node(settings, find_node(settings, "node_2")).memory_budget == "24GB"
    assert [s.end - s.start for s in manual_stages(settings, settings.models["qwen2.5-7b"])] == [10, 9, 9]


def test_a_later_layer_wins_and_explain_tells(tmp_path: Path) -> None:
    loaded = load(
        directory(tmp_path),
        environ={"MLX_CLUSTER__API_GATEWAY__PORT": "9001", "PATH": "/bin"},
        runtime={"api_gateway.port": 9002},
        manual={"api_gateway.port": 9003},
    )
    assert loaded.settings.api_gateway.port == 9003
    (told,) = explain(loaded, "api_gateway.port")
    assert [(o.layer, o.value) for o in told.origins] == [
        ("defaults", 8000),
        ("files", 8000),
        ("environment", 9001),
        ("runtime", 9002),
        ("manual", 9003),
    ]
    assert told.winner == "manual"
    assert told.origins[1].place == f"{tmp_path / 'cluster.yaml'}:8"
    assert told.origins[2].place == "MLX_CLUSTER__API_GATEWAY__PORT"


@pytest.mark.parametrize("layer", ["environ", "runtime", "manual"])
def test_each_layer_above_the_files_wins_over_them(tmp_path: Path, layer: str) -> None:
    key = "MLX_CLUSTER__LOG__LEVEL" if layer == "environ" else "log.level"
    loaded = load(directory(tmp_path, network="network: {transport: grpc}"), **{layer: {key: "debug"}})  # type: ignore[arg-type]
    assert loaded.settings.log.level == "debug"
    assert loaded.settings.network.transport == "grpc"


def test_explain_of_a_section_lists_all_of_it(tmp_path: Path) -> None:
    loaded = load(directory(tmp_path))
    told = {e.key: e for e in explain(loaded, "coordinator")}
    assert set(told) == {f"coordinator.{name}" for name in CoordinatorSection.model_fields}
    assert told["coordinator.heartbeat_interval"].winner == "defaults"
    assert told["coordinator.port"].winner == "files"


def test_explain_reaches_into_a_model_whose_name_has_dots(tmp_path: Path) -> None:
    loaded = load(directory(tmp_path, models=MODELS_DOCUMENT))
    (told,) = explain(loaded, "models.qwen2.5-7b.total_layers")
    assert (told.value, told.winner) == (28, "files")
    with pytest.raises(ConfigError, match=r"is not set: models has qwen2\.5-7b"):
        explain(loaded, "models.llama.total_layers")


def test_the_command_line_reaches_a_model_whose_name_has_dots(tmp_path: Path) -> None:
    text = "models: {qwen2.5-7b: {total_layers: 28}}"
    loaded = load(directory(tmp_path, models=text), manual={"models.qwen2.5-7b.split": "14/14"})
    assert loaded.settings.models["qwen2.5-7b"].split == "14/14"
    assert loaded.settings.models["qwen2.5-7b"].total_layers == 28


def test_the_environment_reaches_a_model_by_its_plain_name(tmp_path: Path) -> None:
    text = "models: {qwen2.5-7b: {total_layers: 28}}"
    environ = {"MLX_CLUSTER__MODELS__QWEN2_5_7B__SPLIT": "10/9/9"}
    assert load(directory(tmp_path, models=text), environ=environ).settings.models["qwen2.5-7b"].split == "10/9/9"


def test_an_unknown_key_names_its_place_and_a_suggestion(tmp_path: Path) -> None:
    error = refusal(tmp_path, network="network:\n  transport: auto\n  link_timeuot: 3\n")
    assert str(error) == (
        f"{tmp_path / 'network.yaml'}:3: unknown key 'network.link_timeuot' (did you mean 'link_timeout'?)"
    )
    assert (error.key, error.line) == ("network.link_timeuot", 3)


def test_an_unknown_section_gets_a_suggestion(tmp_path: Path) -> None:
    assert "(did you mean 'api_gateway'?)" in str(refusal(tmp_path, cluster="api_gatway: {port: 1}\n"))


def test_an_unknown_key_inside_a_list_names_its_line(tmp_path: Path) -> None:
    text = "cluster:\n  nodes:\n    - host: a\n      node_id: 0\n      prots: [1]\n"
    error = refusal(tmp_path, cluster=text)
    assert error.line == 5
    assert "did you mean 'ports'" in str(error)


def test_an_unknown_key_of_a_model_names_its_line(tmp_path: Path) -> None:
    error = refusal(tmp_path, models="models:\n  m:\n    spilt: 1/2\n")
    assert error.line == 3
    assert "did you mean 'split'" in str(error)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("api_gateway:\n  port: 70000\n", 2, "less than or equal to 65535, not 70000"),
        ("network:\n  transport: rign\n", 2, "did you mean 'ring'"),
        ("network:\n  transport: rign\n  insecure: maybe\n", 2, "(and 1 more)"),
        ("coordinator:\n  failure_threshold: 0\n", 2, "greater than or equal to 1, not 0"),
        ("cluster:\n  nodes:\n    - node_id: 0\n", 3, "host is missing"),
        ("nodes:\n  mini1: {memory_budget: lots}\n", 2, "write it like 2.5GB"),
        ("models:\n  m:\n    split: ten\n", 3, "10/9/9"),
        ("api_gateway:\n  port: 1\n  port: 2\n", 3, "stands here and on line 2"),
        ("api_gateway: &a {port: 1}\nnetwork: *a\n", 1, "anchors and aliases are not supported"),
        ("api_gateway: [port\n", 2, "not valid YAML"),
        ("just text\n", 1, "must hold sections"),
        ("log: !!python/object/apply:os.getcwd []\n", 1, "is not supported: write a plain value"),
    ],
)
def test_a_bad_value_names_its_place(tmp_path: Path, text: str, line: int, words: str) -> None:
    error = refusal(tmp_path, cluster=text)
    assert words in str(error)
    assert (error.file, error.line) == (str(tmp_path / "cluster.yaml"), line)


def test_a_missing_cluster_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml is missing"):
        load(tmp_path)


def test_a_section_in_the_wrong_file_is_named(tmp_path: Path) -> None:
    error = refusal(tmp_path, models="models: {}\nnetwork: {}\n")
    assert error.line == 2
    assert "everything else stands in cluster.yaml" in str(error)


def test_a_key_in_two_files_is_an_error(tmp_path: Path) -> None:
    error = refusal(
        tmp_path, cluster="network: {transport: grpc}\n", network="network:\n  insecure: true\n  transport: ring\n"
    )
    assert error.line == 3
    assert f"{tmp_path / 'cluster.yaml'}:1" in str(error)


def test_sections_of_two_files_are_joined(tmp_path: Path) -> None:
    path = directory(tmp_path, cluster="network: {transport: grpc}\n", network="network: {insecure: true}\n")
    network = load(path).settings.network
    assert (network.transport, network.insecure) == ("grpc", True)


def test_off_is_a_word(tmp_path: Path) -> None:
    assert load(directory(tmp_path, cluster="runtime: {blas: off}\n")).settings.runtime.blas == "off"


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("MLX_CLUSTER__API_GATEWAY__PROT", "did you mean 'port'"),
        ("MLX_CLUSTER__APIGATEWAY__PORT", "did you mean 'api_gateway'"),
        ("MLX_CLUSTER__API_GATEWAY__PORT__X", "api_gateway.port has no 'x'"),
    ],
)
def test_an_unknown_variable_is_an_error(variable: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, environ={variable: "1"})
    assert variable in str(caught.value)
    assert words in str(caught.value)


def test_a_bad_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"MLX_CLUSTER__API_GATEWAY__PORT: api_gateway\.port must be a valid integer"):
        load(None, environ={"MLX_CLUSTER__API_GATEWAY__PORT": "many"})


def test_a_bad_key_on_the_command_line_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'transport'"):
        load(None, manual={"network.tansport": "grpc"})
    with pytest.raises(ConfigError, match=r"api_gateway\.port is a single value"):
        load(None, manual={"api_gateway.port.x": 1})


class _Vault(Section):
    token: SecretStr | None = None
    plain: str = "a"


class _WithSecret(Section):
    vault: _Vault = _Vault()


def test_a_secret_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("12345\n")
    layers = [
        environment_layer(_WithSecret, {"MLX_CLUSTER__VAULT__TOKEN_FILE": str(tmp_path / "token")}, ()),
        written_layer("manual", _WithSecret, {"vault.plain": "b"}, ()),
    ]
    built = build(_WithSecret, layers)
    assert built.vault.token is not None
    assert built.vault.token.get_secret_value() == "12345"
    loaded: Any = Loaded(built, provenance_of(_WithSecret, layers))  # type: ignore[arg-type]
    (told,) = explain(loaded, "vault.token")
    assert (told.value, told.origins[-1].value, told.winner) == (MASK, MASK, "environment")
    assert "12345" not in repr(told)
    assert explain(loaded, "vault.plain")[0].value == "b"


def test_a_secret_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="MLX_CLUSTER__VAULT__TOKEN_FILE names a file that cannot be read"):
        environment_layer(_WithSecret, {"MLX_CLUSTER__VAULT__TOKEN_FILE": "/nowhere/token"}, ())


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ("m: {split: 10/9/9, total_layers: 29}", "layers 28…28 are on no stage"),
        ("m: {split: 10/9/9/9}", "names 4 nodes, the cluster has 3"),
        ("m: {split: 0/0/0}", "gives no node any layer"),
        ("m: {split: 1/1/1, sharding: {node_0: {layers: [0, 2]}}}", "both 'split' and 'sharding'"),
        ("m: {sharding: {node_0: {layers: [0, 9]}, node_1: {layers: [11, 12]}}}", "layers 10…10 are on no stage"),
        ("m: {sharding: {node_0: {layers: [0, 9]}, node_1: {layers: [9, 12]}}}", "layers 9…9 are on two stages"),
        ("m: {sharding: {node_0: {layers: [9, 0]}}}", "run backwards"),
        ("m: {sharding: {node_9: {layers: [0, 9]}}}", "no node is called 'node_9'"),
        ("m: {sharding: {node_0: {layers: [0, 1]}, mini1: {layers: [2, 3]}}}", "are the same node"),
        (
            "m: {sharding: {node_0: {layers: [0, 1], includes_output_head: true}, node_1: {layers: [2, 3]}}}",
            "'node_0' cannot hold the output head",
        ),
        ("m: {aliases: [k]}\n  k: {}", "'k' names both 'm' and 'k'"),
        ("m: {split: 10/9/9, replicas: 2}", "a manual split and 2 replicas"),
        ("m: {fallback_model: n}", "fallback_model 'n' of models.m is not another model"),
        ("m: {fallback_model: m}", "is not another model"),
        ("m: {batching: {min_chunk: 300}}", "min_chunk is 300, but the longest chunk (prefill_chunk) is 256"),
        ("m: {batching: {min_chunk: 64, prefill_chunk: 32}}", "min_chunk is 64, but the longest"),
        ("m: {batching: {max_batch: 0}}", "max_batch"),
        ("m: {batching: {max_wait_ms: 20000}}", "max_wait_ms"),
        ("m: {batching: {max_rows: 3}}", "max_rows"),
        ("m: {fallback_model: k}\n  k: {fallback_model: m}", "has a fallback itself"),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_its_place(tmp_path: Path, models: str, words: str) -> None:
    error = refusal(tmp_path, models=f"models:\n  {models}\n")
    assert words in str(error)
    assert error.file == str(tmp_path / "models.yaml")


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("{host: b, node_id: 0}", "node_id 0 is given twice"),
        ("{host: a.local, node_id: 1}", "two nodes are called 'a'"),
        ("{host: b, node_id: 1, ports: [1, 1]}", "repeat a port"),
    ],
)
def test_nodes_are_unique(tmp_path: Path, second: str, words: str) -> None:
    error = refusal(tmp_path, cluster=f"cluster:\n  nodes:\n    - {{host: a, node_id: 0}}\n    - {second}\n")
    assert words in str(error)
    assert error.line == 4


def test_nodes_yaml_must_name_nodes_of_the_cluster(tmp_path: Path) -> None:
    error = refusal(tmp_path, nodes="nodes:\n  mini3: {memory_budget: 1GB}\n")
    assert error.line == 2
    assert "did you mean 'mini1'" in str(error) or "did you mean 'mini2'" in str(error)
    assert "are the same node" in str(refusal(tmp_path, nodes="nodes:\n  mini1: {}\n  node_0: {}\n"))


def test_a_node_has_many_names(tmp_path: Path) -> None:
    settings = load(directory(tmp_path)).settings
    for ref in ("mini2", "node_1", "1", 1, "mini2.local"):
        assert find_node(settings, ref).node_id == 1


def test_leaves_do_not_divide_lists(tmp_path: Path) -> None:
    tree = load(directory(tmp_path)).settings.model_dump(mode="json")
    paths = [path for path, _ in leaves(tree, Settings)]
    assert ("cluster", "nodes") in paths
    assert len(paths) == len(set(paths))


def test_a_models_batching_is_over_the_schedulers(tmp_path: Path) -> None:
    models = "models:\n  m: {batching: {max_batch: 3, max_wait_ms: 20, min_chunk: 8, prefill_chunk: 64}}\n  k: {}\n"
    settings = load(directory(tmp_path, models=models)).settings
    own = settings.models["m"].batching.over(settings.scheduler)
    assert (own.max_rows, own.max_wait_ms, own.min_chunk, own.prefill_chunk) == (3, 20, 8, 64)
    assert own.max_prompts == settings.scheduler.max_prompts
    assert settings.models["k"].batching.over(settings.scheduler) == settings.scheduler


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("[{name: a, sha256: abc}]", "sha256"),
        ("[{name: other, sha256: HASH}]", "is what metrics call every key that is not listed"),
        ("[{name: a, sha256: HASH}, {name: a, sha256: BASE}]", "is taken"),
        ("[{name: a, sha256: HASH}, {name: b, sha256: HASH}]", "'b' and 'a' are the same key"),
        ("[{name: a, sha256: HASH, priority: 11}]", "priority"),
        ("[{name: a, sha256: HASH, weight: 0}]", "weight"),
        ("[{name: a b, sha256: HASH}]", "name"),
        ("[{name: a, key: sk-secret}]", "key"),
    ],
)
def test_keys_are_listed_by_hash_and_once(tmp_path: Path, keys: str, words: str) -> None:
    keys = keys.replace("HASH", "ab" * 32).replace("BASE", "ba" * 32)
    cluster = f"cluster:\n  nodes:\n    - {{host: a, node_id: 0}}\napi_gateway:\n  keys: {keys}\n"
    assert words in str(refusal(tmp_path, cluster=cluster))


def test_links_are_named_by_pairs_of_nodes_in_any_order() -> None:
    network = NetworkSection.model_validate({"links": {"2-1": {"compression": "int8"}}})
    assert network.links["1-2"].compression == "int8"
    assert network.compression == "off"
    with pytest.raises(ValidationError, match="write their ids like 0-1"):
        NetworkSection.model_validate({"links": {"mini1": {}}})
