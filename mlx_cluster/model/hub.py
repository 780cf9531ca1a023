"""Hugging Face repositories: from a repository id to a local directory.

Owns: which files of a repository are fetched, and what its errors mean here. The only file that imports
huggingface_hub, and only when something is to be fetched.
Invariant: what ``fetch`` returns has passed ``checkpoint.validate``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_cluster.errors import CheckpointError
from mlx_cluster.model import checkpoint

# (bytes done, bytes in all so far known)
Progress = Callable[[int, int], None]

WANTED_FILES = (
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jinja",
)


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Download what is missing of a repository (weights, configuration, tokenizer) and return its directory.

    Blocks; run it in a thread. Raises ``CheckpointError`` when the repository does not exist, may not be read, cannot
    be reached, or is no checkpoint that can be loaded.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(WANTED_FILES),
            tqdm_class=_progress_bar(on_progress or _ignore),
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"repository {repo_id} is gated: accept its terms on its page and set HF_TOKEN, or choose another model"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"repository {repo_id} does not exist, or is private: check its name, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"repository {repo_id} has no revision {revision}: check its name") from error
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a directory nor a repository id (organisation/name): check the model's path"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise CheckpointError(
            f"repository {repo_id} cannot be downloaded ({type(error).__name__}: {_first_line(error)}): check the "
            "network, or put the model's directory into model_dirs"
        ) from error
    path = Path(folder)
    checkpoint.validate(path)
    return path


def _ignore(_done: int, _total: int) -> None:
    pass


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _progress_bar(on_progress: Progress) -> Any:
    """A progress bar class for huggingface_hub that draws nothing and reports the bytes written to disk."""
    from huggingface_hub import utils

    quiet_bar: Any = utils.tqdm  # type: ignore[attr-defined]  # documented, but not re-exported for type checkers

    class Report(quiet_bar):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # One bar counts files, one the bytes from the network, one the bytes on disk: the last is ours.
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self._done = 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            if self._counts:
                on_progress(self._done, int(self.total or 0))

    return Report
