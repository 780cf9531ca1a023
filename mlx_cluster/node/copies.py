"""Models that this node lacks: copied from a peer that has them, else downloaded once for all.

Owns: whom to ask, in which order, and the pauses after a failure. Does not own: how files travel
(``cluster.weights``), downloads (``model.hub``), where models are looked for (``models``).
Invariant: one model is fetched at a time; of several nodes that lack a model nobody has, only the one with the lowest
id downloads it, and the others copy it from there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from mlx_cluster import log
from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.cluster.weights import ModelFiles, WeightsService, copy_model
from mlx_cluster.config.quantity import format_bytes
from mlx_cluster.config.schema import ModelEntry, Settings
from mlx_cluster.errors import CheckpointError, ClusterError
from mlx_cluster.model import checkpoint, hub
from mlx_cluster.node.models import LocalModels

LOOK_SECONDS = 2.0
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0

_log = log.get(__name__)


def weights_service(cluster: str, models: LocalModels) -> WeightsService:
    """Gives away the models that this node has."""

    def find(model_id: str) -> ModelFiles | None:
        local = models.get(model_id)
        return None if local is None else ModelFiles(local.directory, local.facts.manifest_hash)

    return WeightsService(cluster, find, hub.WANTED_FILES)


class Copies:
    """``living`` are the statuses of all living nodes, this one's included; ``channel`` dials a comms address."""

    def __init__(
        self,
        settings: Settings,
        node_id: int,
        models: LocalModels,
        living: Callable[[], Sequence[NodeStatus]],
        channel: Callable[[str], grpc.aio.Channel],
        download: Callable[[str], Path] = hub.fetch,
    ) -> None:
        self._cluster, self._entries = settings.cluster.name, settings.models
        self._policy = settings.runtime.missing_models
        self._node_id, self._models, self._living, self._channel = node_id, models, living, channel
        self._download = download
        self._not_before: dict[str, float] = {}
        self._failures: dict[str, int] = {}

    async def run(self) -> None:
        """Look for what is missing, for ever."""
        if self._policy == "off":
            await asyncio.Event().wait()
        while True:
            await self.look_once()
            await asyncio.sleep(LOOK_SECONDS)

    async def look_once(self) -> None:
        """Try to get each missing model whose pause is over."""
        now = asyncio.get_running_loop().time()
        for model_id, _ in self._models.missing:
            if model_id not in self._entries or now < self._not_before.get(model_id, 0.0):
                continue
            try:
                fetched = await self._get(model_id, self._entries[model_id])
            except ClusterError as error:
                self._pause(model_id, str(error))
                continue
            finally:
                self._models.note(model_id, "")
            if fetched:
                self._failures.pop(model_id, None)
                await self._models.refresh()

    async def _get(self, model_id: str, entry: ModelEntry) -> bool:
        peers = [s for s in self._living() if s.node_id != self._node_id and s.model(model_id) is not None]
        if peers:
            # Another peer each time, so that one with a bad disk does not keep the model from us.
            await self._copy(model_id, peers[self._failures.get(model_id, 0) % len(peers)])
            return True
        wanted = entry.path or model_id
        if self._policy != "fetch" or not _is_repository(wanted) or not self._is_ours_to_download(model_id):
            return False
        self._models.note(model_id, f"downloading {wanted}")
        await _in_thread(self._download, wanted)
        return True

    async def _copy(self, model_id: str, peer: NodeStatus) -> None:
        facts = peer.model(model_id)
        assert facts is not None

        def tell(done: int, total: int) -> None:
            self._models.note(model_id, f"copying from {peer.name}: {format_bytes(done)} of {format_bytes(total)}")

        await copy_model(
            self._channel(peer.comms_address),
            cluster=self._cluster,
            model=model_id,
            manifest_hash=facts.manifest_hash,
            target=self._models.copy_of(model_id),
            verify=_verified_hash,
            on_progress=tell,
        )

    def _is_ours_to_download(self, model_id: str) -> bool:
        """Of the living nodes that lack it, the lowest id goes first."""
        lacking = [s.node_id for s in self._living() if any(model == model_id for model, _ in s.missing)]
        return min(lacking, default=self._node_id) >= self._node_id

    def _pause(self, model_id: str, reason: str) -> None:
        count = self._failures.get(model_id, 0)
        self._failures[model_id] = count + 1
        seconds = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**count)
        self._not_before[model_id] = asyncio.get_running_loop().time() + seconds
        _log.warning("model not fetched", model=model_id, reason=reason, again_in_seconds=seconds)


def _verified_hash(directory: Path) -> str:
    checkpoint.validate(directory)
    return checkpoint.manifest_hash(directory)


def _is_repository(path: str) -> bool:
    """``organisation/name``, and no path."""
    return path.count("/") == 1 and not path.startswith(("/", ".", "~"))


async def _in_thread(function: Callable[[str], Path], argument: str) -> Path:
    """Run a long download so that it cannot keep the process from ending."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Path] = loop.create_future()

    def finish(path: Path | None, error: Exception | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        elif path is not None:
            result.set_result(path)

    def work() -> None:
        try:
            path, error = function(argument), None
        except CheckpointError as failure:
            path, error = None, failure
        except Exception as failure:  # noqa: BLE001  # the thread's root: it becomes the waiter's typed error
            _log.exception("download failed", model=argument)
            path, error = None, CheckpointError(f"{argument} could not be downloaded: {failure!r}")
        loop.call_soon_threadsafe(finish, path, error)

    threading.Thread(target=work, name=f"download {argument}", daemon=True).start()
    return await result
