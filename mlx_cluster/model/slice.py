"""``ModelSlice``: layers ``[start, end)`` of a stock mlx-lm model, without a fork of its file.

Owns: the class swap that turns a whole model into a slice, its cache slots, and which weights it reads.
Does not own: reading those weights (``model.load``).
Invariant: a chain of slices gives the whole model's logits, bit for bit.

How it works. The model's own ``__call__`` runs, so embedding scale, masks, soft caps and tied heads stay mlx-lm's.
Layers before the slice return what was received; after the slice's last layer the call ends early. What the model
computes around the slice (an embedding on a later stage) is built into the graph, but nothing asks for it, so it is
never evaluated and its weights are never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, make_prompt_cache

from mlx_cluster.errors import PlanError, UnsupportedModel
from mlx_cluster.model import cache as row_cache
from mlx_cluster.model import graph, state
from mlx_cluster.model.cache import Caches
from mlx_cluster.model.quantized_cache import KvFormat

# Which positions the last slice gives logits for.
Head = Literal["none", "last", "all"]


class _SliceEnd(Exception):
    """Ends a model's forward pass after the slice's last layer; carries what that layer returned."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class ModelSlice:
    """Callable on tokens, the received state and a row's (or a batch's) caches. Lives on one thread.

    Raises ``UnsupportedModel`` when the family cannot be cut, ``PlanError`` when it cannot be cut here.
    """

    def __init__(self, model: nn.Module, start: int, end: int, kv: KvFormat | None = None) -> None:
        layers = list(model.layers)
        if not 0 <= start < end <= len(layers):
            raise PlanError(f"[{start}, {end}) is no slice of a model with {len(layers)} layers")
        self.model, self.start, self.end, self.kv = model, start, end, kv
        self.first, self.last = start == 0, end == len(layers)
        try:
            traced = graph.trace(model)
            self._crossing_in = () if self.first else graph.crossing(model, traced, start)
            self._crossing_out = () if self.last else graph.crossing(model, traced, end)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            raise UnsupportedModel(
                f"layers [{start}, {end}) of this {getattr(model, 'model_type', 'model')} cannot run by themselves "
                f"({error}); choose other cuts, or a model of another family"
            ) from error
        self.vocab_size = traced.vocab_size
        self._returns = traced.returns
        self._arrange_slots(traced)
        self._incoming: list[mx.array] = []
        self._head: Head = "all"
        self._ends: Sequence[int] = ()
        self._swap(layers)
        _strip([*layers[:start], *layers[end:]], keep=model, kept_layers=layers[start:end])
        self._check_kv()
        self._head_takes_one_position = self._probe_head()
        # Whether rows of this slice can decode in one batch; else they run one after the other.
        self.can_batch = row_cache.can_batch(self.make_caches()) and self._probe_batch()

    # -- running -------------------------------------------------------------------------------------

    def __call__(
        self,
        tokens: mx.array,
        received: Sequence[mx.array],
        caches: Caches,
        *,
        head: Head = "last",
        lengths: Sequence[int] = (),
        hidden: bool = False,
    ) -> list[mx.array]:
        """Build (not evaluate) one forward pass of ``tokens`` (rows, positions).

        Returns what the next slice must receive; on the last slice [logits] of shape (rows, positions, vocabulary),
        or nothing with ``head="none"``. The caches grow by the number of positions. ``lengths`` says how many positions
        of each row are its own where the others are padding: its last position is then the last of these. ``hidden``:
        the last slice gives the state behind the final norm instead of logits; raises ``ValueError`` where the family's
        code has no such place.
        """
        batch, length = tokens.shape
        self._incoming, self._head, self._ends = list(received), head, tuple(lengths)
        try:
            logits = (self._body if hidden and self.last else self.model)(
                tokens, cache=[caches[index] for index in self._slot_to_mine]
            )
        except _SliceEnd as end:
            output = end.output
        else:
            output = None
        finally:
            self._incoming = []
        row_cache.advance_ghosts(caches[self._num_own :], batch, length)
        if not self.last:
            leaves, _ = state.flatten(graph.without_scalars(output))
            return [leaves[number] for number in self._crossing_out]
        if head == "none":
            return []
        return [_last_position(logits, lengths) if head == "last" and not self._head_takes_one_position else logits]

    @property
    def _body(self) -> Any:
        """The model up to its final norm: what all families of causal models call ``model``."""
        body = getattr(self.model, "model", None)
        if not isinstance(body, nn.Module):
            kind = getattr(self.model, "model_type", "this")
            raise ValueError(f"{kind} models have no state that could be an embedding")
        return body

    def make_caches(self) -> Caches:
        """Empty caches of one row: the slice's own slots, then its stand-ins."""
        every = make_prompt_cache(self.model)
        ghosts = [every[slot] for slot in self._ghost_slots]
        for ghost in ghosts:
            row_cache.fill_ghost(ghost)
        own = [every[slot] for slot in self._own_slots]
        return [self.kv.empty_row() for _ in own] + ghosts if self.kv is not None else own + ghosts

    def output_specs(self, batch: int, length: int) -> list[Any]:
        """Shapes and dtypes that ``__call__`` returns for empty caches; nothing is computed."""
        tokens = mx.zeros((batch, length), mx.int32)
        output = self(tokens, self.stand_ins(batch, length), self.make_caches(), head="last")
        return [state.spec_of(array) for array in output]

    def parameters_read(self) -> dict[str, mx.array]:
        """The weights of this slice by name, in the model's order.

        All of its layers' (some read a weight only in long contexts), and of the others those that the graph reads.
        """
        caches = self.make_caches()
        output = self(mx.zeros((1, 2), mx.int32), self.stand_ins(1, 2), caches, head="last")
        cached = [a for _, a in tree_flatten([c.state for c in caches[: self._num_own]]) if isinstance(a, mx.array)]
        parameters = dict(tree_flatten(self.model.parameters()))
        layers = list(self.model.layers)[self.start : self.end]
        own = {id(array) for layer in layers for _, array in tree_flatten(layer.parameters())}
        names = {f"p{number}": name for number, name in enumerate(parameters)}
        labels = graph.consumed([*output, *cached], {label: parameters[name] for label, name in names.items()})
        read = {names[label] for label in labels}
        return {name: array for name, array in parameters.items() if name in read or id(array) in own}

    # -- building ------------------------------------------------------------------------------------

    def _arrange_slots(self, traced: graph.Trace) -> None:
        """Map every cache slot of the model to one of ours.

        Models choose masks and positions by some layer's cache, which may belong to another stage, so each foreign
        slot is an alias of an own slot of equal kind, or of a stand-in that only counts positions.
        """
        kinds = [_kind(cache) for cache in make_prompt_cache(self.model)]
        used = {slot for slot in traced.slots[self.start : self.end] if slot is not None}
        # What no layer uses is the model's own memory of the tokens (n-gram embeddings), which every stage sees.
        of_no_layer = set(range(len(kinds))) - set(traced.slots)
        self._own_slots = sorted(used | of_no_layer)
        self._num_own = len(self._own_slots)
        self._ghost_slots: list[int] = []
        mine_of_kind: dict[Any, int] = {}
        for mine, slot in enumerate(self._own_slots):
            if slot in used:
                mine_of_kind.setdefault(kinds[slot], mine)
        for slot, kind in enumerate(kinds):
            if kind not in mine_of_kind and slot not in of_no_layer:
                mine_of_kind[kind] = self._num_own + len(self._ghost_slots)
                self._ghost_slots.append(slot)
        own = {slot: mine for mine, slot in enumerate(self._own_slots)}
        self._slot_to_mine = [own[slot] if slot in own else mine_of_kind[kind] for slot, kind in enumerate(kinds)]

    def _swap(self, layers: Sequence[Any]) -> None:
        for index in range(self.start):
            graph.swap_call(layers[index], lambda _original, index=index: self._receive(index))  # type: ignore[misc]
        graph.swap_call(layers[self.end - 1], self._finish)

    def _receive(self, index: int) -> graph.LayerCall:
        """Stands in for a layer before the slice: returns what was received, in the form that the model unpacks."""
        leaves, skeleton = self._returns[index]
        crossing = self._crossing_in

        def call(_self: Any, *_args: Any, **_kwargs: Any) -> Any:
            filled: list[Any] = [None] * max(len(leaves), max(crossing) + 1)
            for number, array in zip(crossing, self._incoming, strict=True):
                filled[number] = array
            return state.unflatten(skeleton, filled)

        return call

    def _finish(self, original: graph.LayerCall) -> graph.LayerCall:
        """Wraps the slice's last layer: ends the pass there, or keeps only the position that the head needs."""

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(layer, *args, **kwargs)
            if not self.last or self._head == "none":
                raise _SliceEnd(output)
            return _last_position(output, self._ends) if self._head == "last" else output

        return call

    def _check_kv(self) -> None:
        """Raise ``UnsupportedModel`` when keys and values are to be quantized and this model cannot use them so."""
        if self.kv is None:
            return
        name = getattr(self.model, "model_type", "model")
        every = make_prompt_cache(self.model)
        kinds = sorted({type(every[slot]).__name__ for slot in self._own_slots} - {KVCache.__name__})
        if kinds:
            raise UnsupportedModel(
                f"runtime.kv_bits is {self.kv.bits}, but this {name} keeps a {' and a '.join(kinds)}, which cannot be "
                "quantized: set runtime.kv_bits to null"
            )
        try:
            self._run_once()
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise UnsupportedModel(
                f"runtime.kv_bits is {self.kv.bits}, but this {name} cannot attend to keys in groups of "
                f"{self.kv.group_size} ({why}): set runtime.kv_group_size to 32 where the size of its heads is a "
                "multiple of that, or runtime.kv_bits to null"
            ) from error

    def _run_once(self) -> None:
        caches = self.make_caches()
        for length in (2, 1):
            self(mx.zeros((1, length), mx.int32), self.stand_ins(1, length), caches, head="none")

    def _probe_head(self) -> bool:
        """Whether norm and head are content with one position (else the last one is taken from all logits)."""
        self._head_takes_one_position = True
        if not self.last:
            return True
        try:
            tokens = mx.zeros((1, 2), mx.int32)
            (logits,) = self(tokens, self.stand_ins(1, 2), self.make_caches(), head="last")
        except (TypeError, ValueError, RuntimeError):
            return False
        return bool(logits.shape[1] == 1)

    def _probe_batch(self) -> bool:
        """Whether the model's masks fit a batch: some families of mlx-lm were only ever written for one row.

        Thirteen rows, because a number that is also one of the model's dimensions may broadcast by accident.
        """
        rows = 13
        singles = [self.make_caches() for _ in range(rows)]
        try:
            for length, caches in enumerate(singles, start=1):
                self(mx.zeros((1, length), mx.int32), self.stand_ins(1, length), caches, head="none")
            batch = row_cache.merge(singles)
            output = self(mx.zeros((rows, 1), mx.int32), self.stand_ins(rows, 1), batch, head="last")
        except (TypeError, ValueError, RuntimeError):
            return False
        return all(array.shape[0] == rows for array in output)

    def fit_received(self, received: Sequence[mx.array], length: int) -> list[mx.array]:
        """A received state cut to its first ``length`` positions."""
        return [
            _fit(array, length) if self._is_long(self.start, n) else array
            for array, n in zip(received, self._crossing_in, strict=True)
        ]

    def fit_output(self, output: Sequence[mx.array], length: int) -> list[mx.array]:
        """What a slice that is not the last returned, cut or padded with zeros to ``length`` positions."""
        return [
            _fit(array, length) if self._is_long(self.end, n) else array
            for array, n in zip(output, self._crossing_out, strict=True)
        ]

    def _is_long(self, cut: int, number: int) -> bool:
        """Whether an array that crosses at this cut has one element per position; the trace ran two positions."""
        return bool(self._returns[cut - 1][0][number].shape[1] == 2)

    def stand_ins(self, batch: int, length: int) -> list[mx.array]:
        """Zeros in the form of the state that this slice receives."""
        if self.first:
            return []
        leaves, _ = self._returns[self.start - 1]
        shapes = [(leaves[number].shape, leaves[number].dtype) for number in self._crossing_in]
        # The trace ran one row of two positions.
        return [mx.zeros((batch, length if s[1] == 2 else s[1], *s[2:]), dtype) for s, dtype in shapes]


def _last_position(output: Any, lengths: Sequence[int]) -> Any:
    """The hidden state (a layer's return value, or its first element) at each row's last position only."""
    if not isinstance(output, mx.array):
        return type(output)((_last_position(output[0], lengths), *output[1:]))
    if not lengths:
        return output[:, -1:]
    return output[mx.arange(len(lengths)), mx.array(list(lengths)) - 1][:, None]


def _fit(array: mx.array, length: int) -> mx.array:
    """The first ``length`` positions, or zeros behind those that are there."""
    missing = length - array.shape[1]
    if missing <= 0:
        return array[:, :length] if missing else array
    return mx.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))


def _kind(cache: Any) -> Any:
    """Caches of equal kind give equal masks and positions, so one may stand in for another."""
    if isinstance(cache, CacheList):
        return (CacheList, *(_kind(part) for part in cache.caches))
    if isinstance(cache, ArraysCache):
        return ArraysCache
    return (type(cache), *(getattr(cache, name, None) for name in ("max_size", "keep", "chunk_size")))


def _strip(skipped: Sequence[nn.Module], *, keep: nn.Module, kept_layers: Sequence[nn.Module]) -> None:
    """Drop the arrays of layers that are not ours; plain attributes stay, models look at them.

    Modules that some kept part shares (one rotary embedding for all layers, say) are left alone.
    """
    kept = {id(module) for layer in kept_layers for module in layer.modules()}
    kept |= {id(module) for module in _outside(keep, {id(layer) for layer in (*skipped, *kept_layers)})}
    for layer in skipped:
        for module in layer.modules():
            if id(module) not in kept:
                for name in [name for name, value in module.items() if isinstance(value, mx.array)]:
                    del module[name]


def _outside(module: nn.Module, layers: set[int]) -> Iterator[nn.Module]:
    """This module and those below it that are not part of a layer."""
    yield module
    for _, child in tree_flatten(module.children(), is_leaf=nn.Module.is_module):
        if id(child) not in layers:
            yield from _outside(child, layers)
