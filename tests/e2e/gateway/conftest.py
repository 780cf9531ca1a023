"""One real cluster of the demo model for everything that looks at the gateway from outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.test_up import Up, up


@pytest.fixture(scope="package")
def cluster() -> Iterator[Up]:
    """``up`` with two nodes and the demo model, which is also called gpt-4o-mini and claude-demo."""
    with up("--nodes", "2", "--alias", "gpt-4o-mini", "--alias", "claude-demo") as launcher:
        launcher.ready_line()
        yield launcher


@pytest.fixture(scope="package")
def url(cluster: Up) -> str:
    return cluster.url
