"""A model that cannot be served gives way to its fallback, by name and only when that one is ready."""

from __future__ import annotations

import pytest

from mlx_cluster.gateway.catalogue import Catalogue
from mlx_cluster.request import ServedModel
from tests.fake_engine import ScriptedRoutes, served_model


def catalogue(*models: ServedModel) -> Catalogue:
    return Catalogue(ScriptedRoutes(list(models), {}))


@pytest.mark.parametrize(
    ("state", "small", "expected"),
    [
        ("ready", "ready", "big"),
        ("loading", "ready", "big"),  # a pause is not a loss
        ("failed", "ready", "small"),
        ("failed", "loading", "big"),
    ],
)
def test_who_answers(state: str, small: str, expected: str) -> None:
    models = catalogue(
        served_model("/m", id="big", aliases=("alias",), state=state, fallback="small"),
        served_model("/s", id="small", aliases=(), state=small),
    )
    assert models.serving("big").id == expected
    assert models.serving("alias").id == expected
    assert models.find("big").id == "big"
