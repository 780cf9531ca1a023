"""The models a gateway can serve: names, tokenizers, and the threads that tokenize.

Owns: the way from a client's model name to a served model and its loaded tokenizer.
Does not own: the routing table (``request.Routes``).
Invariant: a tokenizer is loaded once per directory, and never on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import TypeVar

from mlx_cluster import log
from mlx_cluster.errors import CheckpointError, ModelNotFound, Unavailable
from mlx_cluster.request import Engine, Routes, ServedModel
from mlx_cluster.tokenizer import Tokenizer, load

_log = log.get("gateway")
T = TypeVar("T")

# Two, so that one very long prompt does not keep the short ones waiting.
NUM_THREADS = 2


def is_pattern(alias: str) -> bool:
    """Whether an alias stands for every name of its form."""
    return any(char in alias for char in "*?[")


class Catalogue:
    def __init__(self, routes: Routes, load_tokenizer: Callable[[str], Tokenizer] = load) -> None:
        self._routes = routes
        self._load = load_tokenizer
        self._loads: dict[str, asyncio.Task[Tokenizer]] = {}
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenizer")

    def models(self) -> list[ServedModel]:
        return self._routes.models()

    def find(self, name: str) -> ServedModel:
        """The model with this id, alias or alias pattern (``claude-*``; of several the longest).

        Raises ``ModelNotFound`` and says which there are.
        """
        models = self._routes.models()
        for model in models:
            if name == model.id:
                return model
        for model in models:
            if name in model.aliases:
                return model
        matches = [
            (len(alias), model)
            for model in models
            for alias in model.aliases
            if is_pattern(alias) and fnmatchcase(name, alias)
        ]
        if matches:
            return max(matches, key=lambda match: match[0])[1]
        known = ", ".join(repr(model.id) for model in models) or "none"
        raise ModelNotFound(f"the model {name[:128]!r} does not exist; models of this cluster: {known}", param="model")

    def serving(self, name: str) -> ServedModel:
        """As ``find``, but a model that cannot be served gives way to its fallback, when that one is ready.

        The answer carries the fallback's own name, so a client can tell.
        """
        model = self.find(name)
        if model.state == "failed" and model.fallback is not None:
            other = self.find(model.fallback)
            if other.state == "ready":
                return other
        return model

    def engine_for(self, model: ServedModel) -> Engine:
        """Raises ``Unavailable`` while the model is not ready."""
        return self._routes.engine_for(model.id)

    async def tokenizer(self, model: ServedModel) -> Tokenizer:
        """The model's tokenizer, loaded at its first use. Raises ``Unavailable`` when this node cannot load it."""
        task = self._loads.get(model.model_dir)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self.off_loop(self._load, model.model_dir))
            self._loads[model.model_dir] = task
        try:
            # Others may be waiting for the same load: one client that leaves must not cancel it.
            return await asyncio.shield(task)
        except CheckpointError as error:
            _log.error("tokenizer cannot be loaded", model=model.id, error=str(error))
            raise Unavailable(
                f"this node cannot load the tokenizer of {model.id!r} (its log says why): ask another node",
                retry_after_seconds=30.0,
            ) from error

    async def off_loop(self, function: Callable[..., T], *args: object) -> T:
        """Run something that takes longer than an event loop should wait."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def warm(self) -> None:
        """Load the tokenizers of all models now, so that no first request waits for them."""
        for model in self.models():
            try:
                await self.tokenizer(model)
            except Unavailable:
                continue  # logged; requests for this model will say it again
