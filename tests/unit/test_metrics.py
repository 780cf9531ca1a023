"""What an engine says of itself shows in /metrics, by model."""

from __future__ import annotations

from mlx_cluster.metrics import Metrics


def test_engines_are_read_when_asked_and_may_come_and_go() -> None:
    engines: dict[tuple[str, str], dict[str, object]] = {}
    metrics = Metrics()
    metrics.watch_engines(lambda: engines)
    assert "model=" not in metrics.render().decode()
    engines["m", "m@1"] = {"prefix_hits": 3, "prefix_entries": 2, "busy_seconds": [0.5, 1.5], "unknown": "ignored"}
    shown = metrics.render().decode()
    assert 'mlx_cluster_engine_prefix_hits_total{model="m",pipeline="m@1"} 3.0' in shown
    assert "# TYPE mlx_cluster_engine_prefix_entries gauge" in shown
    assert 'mlx_cluster_engine_stage_busy_seconds_total{model="m",pipeline="m@1",stage="1"} 1.5' in shown
    assert "unknown" not in shown
    engines.clear()
    assert "model=" not in metrics.render().decode()
