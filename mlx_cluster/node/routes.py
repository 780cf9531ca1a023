"""The gateway's routing table, from this node's view of the cluster.

Owns: ``NodeRoutes``: which engine serves a model now, here or on another node. Does not own: the view, the engines.
Invariant: an engine is handed out only for a pipeline whose driver says ``ready``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.membership import ClusterView
from mlx_cluster.config.schema import ModelEntry
from mlx_cluster.errors import ModelNotFound, Unavailable
from mlx_cluster.node import report
from mlx_cluster.node.models import LocalModels
from mlx_cluster.request import Engine, ServedModel

Picture = tuple[ClusterView, Leadership, ClusterDocument]


class NodeRoutes:
    """Implements ``request.Routes``.

    ``picture`` gives the view, the leader and the document as of now; ``local_engine`` the engine of a pipeline that
    this node drives, or None; ``remote_engine`` one on another node, by its comms address.
    """

    def __init__(
        self,
        models: Mapping[str, ModelEntry],
        local: LocalModels,
        picture: Callable[[], Picture],
        local_engine: Callable[[str], Engine | None],
        remote_engine: Callable[[str], Engine],
    ) -> None:
        self._models, self._local, self._picture = models, local, picture
        self._local_engine, self._remote_engine = local_engine, remote_engine

    def models(self) -> list[ServedModel]:
        return [self._served(model_id, entry) for model_id, entry in self._models.items()]

    def engine_for(self, model_id: str) -> Engine:
        """See ``request.Routes``. Raises ``ModelNotFound`` or ``Unavailable``."""
        if model_id not in self._models:
            raise ModelNotFound(
                f"the model {model_id!r} does not exist; models of this cluster: {', '.join(self._models) or 'none'}",
                param="model",
            )
        view, leadership, document = self._picture()
        state, detail = report.model_state(model_id, view, leadership, document)
        plan = document.plan(model_id)
        engine: Engine | None = None
        if state == "ready" and plan is not None:
            if plan.engine_node_id == view.self_id:
                engine = self._local_engine(plan.pipeline)
            else:
                node = view.node(plan.engine_node_id)
                engine = self._remote_engine(node.status.comms_address) if node and node.status else None
        if engine is None:
            raise Unavailable(f"{model_id} is {state}: {detail or 'its engine is starting again'}")
        return engine

    def _served(self, model_id: str, entry: ModelEntry) -> ServedModel:
        state, detail = report.model_state(model_id, *self._picture())
        local = self._local.get(model_id)
        if local is None:
            why = dict(self._local.missing).get(model_id, "not looked for yet")
            return ServedModel(model_id, entry.aliases, "", 0, 0, "failed", f"this node cannot load it: {why}")
        return ServedModel(
            id=model_id,
            aliases=entry.aliases,
            model_dir=str(local.directory),
            max_context=local.facts.max_context,
            created=local.created,
            state=cast('Literal["loading", "ready", "failed"]', state),
            detail=detail,
        )
