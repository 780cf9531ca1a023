"""Repositories: what is asked of huggingface_hub, and what its failures say here. Nothing is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from mlx_cluster.errors import CheckpointError
from mlx_cluster.model import hub
from tests.tiny_models import write_tiny_model


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://127.0.0.1/"))


def refuse(error: Exception) -> Any:
    def snapshot_download(*_args: Any, **_kwargs: Any) -> str:
        raise error

    return snapshot_download


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("no", response=answer(403)), "is gated: accept its terms on its page and set HF_TOKEN"),
        (RepositoryNotFoundError("no", response=answer(404)), "does not exist, or is private: check its name"),
        (httpx.ReadTimeout("slow"), "cannot be downloaded .ReadTimeout: slow.: check the network"),
        (OSError("disk full"), "cannot be downloaded .OSError: disk full.: check the network"),
    ],
)
def test_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(error))
    with pytest.raises(CheckpointError, match=f"some/model {message}"):
        hub.fetch("some/model")


def test_a_name_that_is_no_repository_id_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither a directory nor a repository id"):
        hub.fetch("not//a repository")


def test_offline_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"some/model cannot be downloaded .*model_dirs"):
        hub.fetch("some/model", cache_dir=tmp_path)


def test_what_is_fetched_is_validated_and_progress_is_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", layers=2, width=32, vocab=300)
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        """Behaves as the real one does towards its progress bars."""
        asked.update(kwargs, repo_id=repo_id)
        files = kwargs["tqdm_class"](total=3, desc="Fetching 3 files")
        on_disk = kwargs["tqdm_class"](total=0, name="huggingface_hub.snapshot_download", unit="B")
        on_disk.total = 100
        for _ in range(2):
            on_disk.update(50)
            files.update(1)
        return str(shutil.copytree(source, tmp_path / "snapshot", dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    seen: list[tuple[int, int]] = []
    path = hub.fetch("some/model", revision="main", on_progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "snapshot"
    assert seen == [(50, 100), (100, 100)]
    assert (asked["repo_id"], asked["revision"]) == ("some/model", "main")
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])
    (source / "tokenizer.json").unlink()
    shutil.rmtree(tmp_path / "snapshot")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        hub.fetch("some/model")
