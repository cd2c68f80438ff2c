"""Looking inside and reaching inside: named places in the forward pass.

Layers call `tap(name, value)` at the places worth knowing; `scope` gives the names their path, as in
"layers.3.attn.weights". Without a `watch` in force a tap returns its value and costs nothing. Within one, values at
matching places are collected, and interventions replace them. Hidden states, attention maps, head masks, logit lens and
activation patching are all this one mechanism, in every family, unrolled or scanned, under `jit`.

Patterns are dotted names in which `*` stands for one part and `**` for any number: "layers.*.attn.weights", "**.out".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

_LOOP = "#"  # the layer number inside a scanned loop, known only to the program


@dataclass(frozen=True)
class Intervention:
    """Replaces the value at every place that `pattern` matches by `change(value)`.

    With `indexed`, `change(value, layer)` also gets the number in the place's path (traced inside a scan). A
    `required` one that matches nothing is an error.
    """

    pattern: str
    change: Callable[..., Any]
    indexed: bool = False
    required: bool = True


@dataclass
class Watch:
    """What a forward pass is asked for (`patterns`, `interventions`), where it is, and what was `seen` so far."""

    patterns: tuple[str, ...]
    interventions: tuple[Intervention, ...]
    path: tuple[str, ...] = ()
    index: Any = None
    depth: int = 0
    seen: dict[str, Any] = field(default_factory=dict)
    places: dict[str, None] = field(default_factory=dict)

    def find(self, patterns: Sequence[str]) -> dict[str, Any]:
        """{place: value} of all places that match, pattern by pattern, in the order they were passed."""
        found = {}
        for pattern in patterns:
            found.update({name: value for name, value in self.seen.items() if _regex(pattern).fullmatch(name)})
        return found

    def among(self, patterns: Sequence[str]) -> list[str]:
        """All places that were passed and that match one of the patterns."""
        return [place for place in self.places if any(_regex(pattern).fullmatch(place) for pattern in patterns)]

    def asks(self, *places: str) -> bool:
        """Whether a value at any of these places is to be collected."""
        return any(_regex(pattern).fullmatch(place) for pattern in self.patterns for place in places)

    def check(self, pattern: str) -> None:
        """Raises ValueError when no place that was passed matches `pattern`, naming those there were."""
        if not any(_regex(pattern).fullmatch(place) for place in self.places):
            kinds = sorted({re.sub(r"\b\d+\b", "*", place) for place in self.places})
            raise ValueError(f"{pattern!r} matches nothing in this forward pass; there are: {', '.join(kinds)}")


_current: ContextVar[Watch | None] = ContextVar("formax_watch", default=None)


@contextmanager
def watch(
    patterns: Sequence[str] = (), interventions: Sequence[Intervention] = (), *, optional: Sequence[str] = ()
) -> Iterator[Watch]:
    """Collects and changes values while a forward pass is traced inside.

    Args:
        patterns: places to collect; each must match one.
        interventions: changes to make.
        optional: more places to collect, if they exist.

    Raises:
        ValueError: on leaving, when a pattern matched no place that was passed.
    """
    state = Watch((*patterns, *optional), tuple(interventions))
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)
    for pattern in (*patterns, *(item.pattern for item in state.interventions if item.required)):
        state.check(pattern)


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Adds `name` to the path of every tap inside (and to the compiled program's own names, for profilers)."""
    state = _current.get()
    with jax.named_scope(name):
        if state is None:
            yield
            return
        outer = state.path
        state.path = (*outer, name)
        try:
            yield
        finally:
            state.path = outer


def tap(name: str, value: Any) -> Any:
    """Marks `value` as the place `name` in the current scope; returns it, changed where an intervention says so."""
    state = _current.get()
    if state is None:
        return value
    site = ".".join((*state.path, name))
    places = _expand(site, state.depth)
    state.places.update(dict.fromkeys(places))
    for item in state.interventions:
        value = _intervene(item, value, places, state)
    if state.asks(*places):
        state.seen[site] = value
    return value


def watched(*names: str) -> bool:
    """Whether a value at one of these places of the current scope is asked for, or is going to be changed.

    A layer that makes such a value only on the way can then do without it.
    """
    state = _current.get()
    if state is None:
        return False
    places = [place for name in names for place in _expand(".".join((*state.path, name)), state.depth)]
    state.places.update(dict.fromkeys(places))
    changed = any(_regex(item.pattern).fullmatch(place) for item in state.interventions for place in places)
    return changed or state.asks(*places)


def isolate(function: Callable[..., Any], *, remat: bool) -> Callable[..., Any]:
    """`jax.checkpoint(function)` when `remat`, with the values seen inside carried out as outputs."""
    if not remat:
        return function
    state = _current.get()
    if state is None or not (state.patterns or state.interventions):
        return jax.checkpoint(function)  # of one function, so that equal layers are traced once

    def inner(*args: Any) -> tuple[Any, dict[str, Any]]:
        outer, state.seen = state.seen, {}
        try:
            return function(*args), state.seen
        finally:
            state.seen = outer

    def run(*args: Any) -> Any:
        out, seen = jax.checkpoint(inner)(*args)
        state.seen.update(seen)
        return out

    return run


@contextmanager
def loop(index: Any, depth: int) -> Iterator[dict[str, Any]]:
    """The body of a scan over `depth` layers: yields the dict that the body must return as per-step output."""
    state = _current.get()
    if state is None:
        yield {}
        return
    if state.depth:
        raise NotImplementedError("a scan over layers inside a scan over layers: taps know one layer number only")
    outer = state.seen, state.path, state.index
    inner: dict[str, Any] = {}
    state.seen, state.path, state.index, state.depth = inner, (*state.path, _LOOP), index, depth
    try:
        yield inner
    finally:
        state.seen, state.path, state.index = outer
        state.depth = 0


def emit(seen: Mapping[str, Any], depth: int) -> None:
    """Hands the stacked outputs of a scan's `loop` to the watch, one value a layer that was asked for."""
    state = _current.get()
    if state is None:
        return
    for site, stacked in seen.items():
        for i, place in enumerate(_expand(site, depth)):
            if state.asks(place):
                state.seen[place] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)


def _intervene(item: Intervention, value: Any, places: Sequence[str], state: Watch) -> Any:
    regex = _regex(item.pattern)
    chosen = [i for i, place in enumerate(places) if regex.fullmatch(place)]
    if not chosen:
        return value
    if item.indexed:
        index = state.index if state.depth else _layer_number(places[0])
        new = item.change(value, index)
    else:
        new = item.change(value)
    new = _as_before(item, value, new, places[chosen[0]])
    if len(chosen) == len(places):
        return new
    here = jnp.isin(state.index, jnp.asarray(chosen))
    return jax.tree.map(lambda a, b: jnp.where(here, a, b), new, value)


def _as_before(item: Intervention, old: Any, new: Any, place: str) -> Any:
    """The new value in the dtype of the old one, so that what follows computes as it would; another shape raises."""
    shapes = [jax.tree.map(jnp.shape, value) for value in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the intervention {item.pattern!r} turned {place} of shape {shapes[0]} into {shapes[1]}; keep the shape"
        )
    return jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), old, new)


def _layer_number(place: str) -> int:
    numbers = [part for part in place.split(".") if part.isdigit()]
    if not numbers:
        raise ValueError(f"{place} is in no numbered layer")
    return int(numbers[-1])


def _expand(site: str, depth: int) -> list[str]:
    parts = site.split(".")
    if _LOOP not in parts:
        return [site]
    return [".".join(str(i) if part == _LOOP else part for part in parts) for i in range(depth)]


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern)
    for glob, regex in (
        (r"\*\*\.", r"(?:[^.]+\.)~"),
        (r"\.\*\*", r"(?:\.[^.]+)~"),
        (r"\*\*", r".~"),
        (r"\*", r"[^.]~"),
    ):
        text = text.replace(glob, regex)
    return re.compile(text.replace("~", "*"))
