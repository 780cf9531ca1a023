"""What a node must remember over a restart: one small JSON file.

Owns: the newest cluster document this node has accepted, and the highest epoch it has seen of every pipeline.
Does not own: what follows from them.
Invariant: what a method has returned from is on the disk; the file is always one whole version.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

from mlx_cluster.cluster.document import ClusterDocument, accept
from mlx_cluster.errors import ConfigError, Fenced, PlanError
from mlx_cluster.plan import Epoch

FILE_NAME = "node.json"


class NodeState:
    """The memory of one node. Another cluster's file in the same folder is an error, not a start."""

    def __init__(self, folder: Path, cluster: str) -> None:
        self._path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self._path.read_text() if self._path.exists() else None
        except OSError as error:
            raise ConfigError(
                f"state directory {folder} cannot be used ({error}): set nodes.<name>.state_dir"
            ) from error
        self.document = ClusterDocument(cluster)
        self._epochs: dict[str, Epoch] = {}
        if text is not None:
            self._load(text, cluster)

    @property
    def epochs(self) -> tuple[tuple[str, Epoch], ...]:
        return tuple(sorted(self._epochs.items()))

    def accept(self, document: ClusterDocument) -> bool:
        """Take a document into force; False when it already is. Raises as ``document.accept``."""
        accepted = accept(self.document, document)
        if accepted == self.document:
            return False
        self.document = accepted
        self._save()
        return True

    def see(self, pipeline: str, epoch: Epoch) -> None:
        """Remember an epoch. Raises ``Fenced`` when a newer one has been seen."""
        highest = self._epochs.get(pipeline)
        if highest is not None and epoch < highest:
            raise Fenced(f"epoch {epoch} of {pipeline} is older than {highest}, which this node has seen")
        if epoch != highest:
            self._epochs[pipeline] = epoch
            self._save()

    def next_epoch(self, pipeline: str, version: int, named: Epoch | None = None) -> Epoch:
        """The next incarnation of this plan version, above every one seen here or ``named`` by another node."""
        seen = [e.incarnation for e in (self._epochs.get(pipeline), named) if e is not None and e.version == version]
        epoch = Epoch(version, max(seen, default=0) + 1)
        self.see(pipeline, epoch)
        return epoch

    def _load(self, text: str, cluster: str) -> None:
        try:
            data: dict[str, Any] = json.loads(text)
            document = ClusterDocument.from_text(data["document"])
            self._epochs = {pipeline: Epoch.parse(epoch) for pipeline, epoch in data["epochs"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise ConfigError(
                f"{self._path} cannot be read ({error!r}): remove it, and this node starts without a memory"
            ) from error
        if document.cluster != cluster:
            raise ConfigError(
                f"{self._path} belongs to cluster {document.cluster!r}, this node to {cluster!r}: "
                "give each cluster its own nodes.<name>.state_dir"
            )
        self.document = document

    def _save(self) -> None:
        data = {
            "document": self.document.to_text(),
            "epochs": {pipeline: str(epoch) for pipeline, epoch in self._epochs.items()},
        }
        write_durably(self._path, json.dumps(data))


def write_durably(path: Path, text: str) -> None:
    """Replace the file in one step; on the disk when this returns. Raises ``ConfigError`` when the disk refuses."""
    fresh = path.with_suffix(".new")
    try:
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            _sync(file.fileno())
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}): this node cannot promise to remember") from error


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        # fsync on macOS stops at the drive's cache.
        with contextlib.suppress(OSError):  # network file systems do not know it: fsync is the most they offer
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
