"""The gateway's routing table, from this node's view of the cluster.

Owns: ``NodeRoutes``: which engine serves a model now, here or on another node. Does not own: the view, the engines.
Invariant: an engine is handed out only for a pipeline whose driver says ``ready``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, cast

from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.membership import ClusterView
from mlx_cluster.cluster.routing import Replica, Router
from mlx_cluster.config.schema import ModelEntry
from mlx_cluster.errors import ModelNotFound, Recovering, Unavailable
from mlx_cluster.node import report
from mlx_cluster.node.models import LocalModels
from mlx_cluster.node.routing import ReadyReplica, RoutedEngine
from mlx_cluster.request import Engine, ServedModel

Picture = tuple[ClusterView, Leadership, ClusterDocument]


class NodeRoutes:
    """Implements ``request.Routes``.

    ``picture`` gives the view, the leader and the document as of now; ``local_engine`` the engine of a pipeline that
    this node drives, or None; ``remote_engine`` one on another node, by its comms address and pipeline; ``has_served``
    says whether a model has been ready since this node came.
    """

    def __init__(
        self,
        models: Mapping[str, ModelEntry],
        local: LocalModels,
        picture: Callable[[], Picture],
        local_engine: Callable[[str], Engine | None],
        remote_engine: Callable[[str, str], Engine],
        has_served: Callable[[str], bool],
    ) -> None:
        self._models, self._local, self._picture = models, local, picture
        self._local_engine, self._remote_engine = local_engine, remote_engine
        self._has_served = has_served
        self._routed = {
            model_id: RoutedEngine(partial(self._ready, model_id), Router(entry.routing, random.random))
            for model_id, entry in models.items()
            if entry.replicas > 1
        }

    def models(self) -> list[ServedModel]:
        return [self._served(model_id, entry) for model_id, entry in self._models.items()]

    def engine_for(self, model_id: str) -> Engine:
        """See ``request.Routes``. Raises ``ModelNotFound``, ``Recovering`` or ``Unavailable``."""
        if model_id not in self._models:
            raise ModelNotFound(
                f"the model {model_id!r} does not exist; models of this cluster: {', '.join(self._models) or 'none'}",
                param="model",
            )
        ready = self._ready(model_id)
        if not ready:
            raise self._not_ready(model_id)
        return self._routed[model_id] if model_id in self._routed else ready[0].engine

    def _not_ready(self, model_id: str) -> Unavailable:
        """Worth waiting for is what served before and still has a plan; a model that fits nowhere is not."""
        state, detail = report.model_state(model_id, *self._picture())
        text = f"{model_id} is {state}: {detail or 'its engine is starting again'}"
        planned = any(plan.model.id == model_id for plan in self._picture()[2].plans)
        recovers = self._has_served(model_id) and (planned or state == "loading")
        return Recovering(text) if recovers else Unavailable(text)

    def _ready(self, model_id: str) -> list[ReadyReplica]:
        """The replicas of a model whose drivers say ``ready``, with their engines."""
        view, _, document = self._picture()
        found: list[ReadyReplica] = []
        for plan in document.plans:
            status = report.driven(view, plan) if plan.model.id == model_id else None
            if status is None or status.state != "ready":
                continue
            if plan.engine_node_id == view.self_id:
                engine = self._local_engine(plan.pipeline)
            else:
                node = view.node(plan.engine_node_id)
                status_there = node.status if node is not None else None
                engine = self._remote_engine(status_there.comms_address, plan.pipeline) if status_there else None
            if engine is not None:
                found.append(ReadyReplica(Replica(plan.pipeline, float(plan.num_stages)), engine))
        return found

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
            fallback=self._models[model_id].fallback_model,
            embeddings=entry.embeddings or local.pooling,
        )
