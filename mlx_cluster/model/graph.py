"""What a model's graph says about cutting it: found by building graphs, without evaluating anything.

Owns: the class swap (one layer instance gets its own ``__call__``), and three questions answered with it: what does
each layer return and which cache does it use; which arrays must cross at a cut; which weights does a slice read.
Invariant: nothing here evaluates an array, so it costs milliseconds on an unloaded model of any size.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_cluster.errors import PlanError, UnsupportedModel
from mlx_cluster.model import state

LayerCall = Callable[..., Any]

_CONSUMED = re.compile(r'^"([a-z]\w*)" -> \d+$', re.MULTILINE)


def swap_call(layer: Any, make: Callable[[LayerCall], LayerCall]) -> None:
    """Give one layer instance its own ``__call__``; its attributes and parameters stay as they are.

    ``make`` gets the original, to be called as ``original(layer, *args, **kwargs)``. Python looks ``__call__`` up on
    the class, so the instance gets a class of its own.
    """
    original_class = type(layer)
    layer.__class__ = type(
        original_class.__name__,
        (original_class,),
        {"__call__": make(original_class.__call__), "_swapped_from": original_class},
    )


def restore_call(layer: Any) -> None:
    """Undo ``swap_call``."""
    layer.__class__ = type(layer)._swapped_from


@contextmanager
def swapped(layers: Sequence[Any], make: Callable[[int, LayerCall], LayerCall]) -> Iterator[None]:
    """``swap_call`` on every layer for a while; ``make`` gets the layer's index and its original call."""
    done: list[Any] = []
    try:
        for index, layer in enumerate(layers):
            swap_call(layer, lambda original, index=index: make(index, original))  # type: ignore[misc]
            done.append(layer)
        yield
    finally:
        for layer in reversed(done):
            restore_call(layer)


@dataclass(frozen=True, slots=True)
class Trace:
    """One graph-only forward of a whole model on two tokens.

    ``returns`` holds (arrays, skeleton) of every layer's return value, ``slots`` the index of the cache that it used.
    """

    returns: tuple[tuple[tuple[mx.array, ...], Any], ...]
    slots: tuple[int | None, ...]
    num_slots: int
    vocab_size: int


def trace(model: Any) -> Trace:
    """Record every layer's return value and cache.

    Raises ``UnsupportedModel`` when layers do not run once each, in order.
    """
    layers = list(model.layers)
    caches = make_prompt_cache(model)
    slot_of = {id(part): slot for slot, cache in enumerate(caches) for part in (cache, *_parts(cache))}
    calls: list[tuple[int, int | None, Any]] = []

    def make(index: int, original: LayerCall) -> LayerCall:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            used = (slot_of.get(id(value)) for value in (*args, *kwargs.values()))
            slot = next((found for found in used if found is not None), None)
            result = original(self, *args, **kwargs)
            calls.append((index, slot, result))
            return result

        return call

    with swapped(layers, make):
        logits = model(mx.zeros((1, 2), mx.int32), cache=caches)
    if [index for index, _, _ in calls] != list(range(len(layers))):
        raise UnsupportedModel(
            f"this model calls its {len(layers)} layers {len(calls)} times per token, or not in order: it cannot "
            "be cut into slices that each run once"
        )
    flat = [state.flatten(without_scalars(result)) for _, _, result in calls]
    return Trace(
        returns=tuple((tuple(leaves), skeleton) for leaves, skeleton in flat),
        slots=tuple(slot for _, slot, _ in calls),
        num_slots=len(caches),
        vocab_size=int(logits.shape[-1]),
    )


def crossing(model: Any, traced: Trace, cut: int) -> tuple[int, ...]:
    """Which arrays of layer ``cut - 1``'s return value the layers from ``cut`` on (and the head) read.

    Raises ``PlanError`` when they also read what an earlier layer returned: nothing but a neighbour's state crosses;
    ``UnsupportedModel`` when the graph cannot tell.
    """
    layers = list(model.layers)
    names: dict[str, mx.array] = {}

    def make(index: int, original: LayerCall) -> LayerCall:
        if index >= cut:
            return original
        leaves, skeleton = traced.returns[index]
        stand_ins = [mx.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        names.update({f"s{index}_{number}": array for number, array in enumerate(stand_ins)})
        return lambda *_args, **_kwargs: state.unflatten(skeleton, stand_ins)

    with swapped(layers, make):
        logits = model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(model))
    read = [tuple(map(int, name[1:].split("_"))) for name in consumed([logits], names)]
    if not read:
        raise UnsupportedModel(
            "this model evaluates parts of itself while its graph is built, so its graph does not tell what must cross"
        )
    early = sorted({index for index, _ in read if index != cut - 1})
    if early:
        raise PlanError(
            f"this model cannot be cut before layer {cut}: layers after it read what layers "
            f"{', '.join(map(str, early))} computed; choose another cut"
        )
    return tuple(sorted(number for _, number in read))


def consumed(outputs: Sequence[mx.array], names: Mapping[str, mx.array]) -> set[str]:
    """The names of those arrays that some operation on the way to ``outputs`` reads.

    Names are a letter and word characters. Source: the edges of mlx's own export of the graph.
    """
    text = io.StringIO()
    mx.export_to_dot(text, *outputs, **names)
    return set(_CONSUMED.findall(text.getvalue())) & names.keys()


def _parts(cache: Any) -> tuple[Any, ...]:
    """The caches inside a ``CacheList``: some models hand these to their layers, not the list."""
    return tuple(getattr(cache, "caches", ()))


def without_scalars(tree: Any) -> Any:
    """A return value with positions (Python numbers) left out: every stage counts positions by itself."""
    if isinstance(tree, tuple | list):
        return type(tree)(without_scalars(child) for child in tree)
    return None if isinstance(tree, int | float) else tree
