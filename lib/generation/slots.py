"""The programs of the `Engine`: reading a piece of one text, and one token more for all texts that are being written.

Each text has a slot, a row of every array here. What differs from text to text (lengths, pages, settings, keys) are
arrays, so no mix of requests compiles anything again.

B slots, L positions of a text, N pages of a text, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.core import mesh
from formax.generation import processors
from formax.generation.decoding import Feed
from formax.generation.state import Tokens
from formax.layers.attention.cache import Cache, KVCache, caches_of, map_caches
from formax.layers.attention.paged import PagedCache
from formax.model import Model

# Ends of a text that are kept from it while it is shorter than `min_new_tokens`.
ENDS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Store:
    """What the device keeps: the caches of all texts, and `texts` int32 [B, L] themselves."""

    caches: Any
    texts: Array


@jax.tree_util.register_dataclass
@dataclass
class Rows:
    """What is said of every slot, [B]; on the host NumPy's arrays, which are changed in place.

    Attributes:
        last: the token that is read next.
        length: positions that are in the cache.
        live: whether a text is being written there.
        count: tokens written so far.
        least: tokens before which none of `ends` [B, 8] is chosen (filled up with -1).
        key: uint32 [B, 2], what is drawn for the text.
        samples: whether anything is drawn, or the likeliest taken.
        temperature, top_k, top_p, min_p: as `generate` has them.
        repetition: the factor for tokens of the text, prompt included.
        presence: what is taken from the scores of tokens that were written.
        frequency: likewise, for every time that they were.
    """

    last: Any
    length: Any
    live: Any
    count: Any
    least: Any
    ends: Any
    key: Any
    samples: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any

    @classmethod
    def empty(cls, slots: int) -> Rows:
        """No text anywhere."""
        whole, real, flag = (np.zeros(slots, dtype) for dtype in (np.int32, np.float32, bool))
        made: dict[str, Any] = dict.fromkeys(("last", "length", "count", "least", "top_k"), whole)
        made |= dict.fromkeys(("top_p", "min_p", "presence", "frequency"), real)
        made |= dict.fromkeys(("temperature", "repetition"), np.ones(slots, np.float32))
        made |= {"live": flag, "samples": flag, "key": np.zeros((slots, 2), np.uint32)}
        made["ends"] = np.full((slots, ENDS), -1, np.int32)
        return cls(**{name: x.copy() for name, x in made.items()})

    def put(self, slot: int, **values: Any) -> None:
        """Says of one slot what is given."""
        for name, value in values.items():
            getattr(self, name)[slot] = value

    def on_device(self) -> Rows:
        """A copy on the device."""
        return Rows(**{f.name: jnp.array(getattr(self, f.name)) for f in fields(self)})


def store_of(model: Model, slots: int, pages: int, page: int, length: int, dtype: Any) -> Store:
    """Empty caches: pools of pages for what is kept by position, a row a slot for what is not.

    Raises:
        TypeError: a model whose caches are neither.
    """

    def made(one: Cache) -> Cache:
        if type(one) is KVCache:
            heads, width = one.k.shape[2:]
            return PagedCache.empty(pages, page, heads, width, dtype)
        if one.recurrent:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
        raise TypeError(
            f"{model.architecture.name} keeps a {type(one).__name__}, which has no pages: the Engine serves decoders "
            "with keys and values of every position, or with recurrent states"
        )

    abstract = jax.eval_shape(lambda: model.init_cache(slots, 1, 0, dtype))
    return Store(map_caches(made, abstract), jnp.zeros((slots, length), jnp.int32))


def is_paged(store: Store) -> bool:
    """Whether any layer has pages."""
    return any(isinstance(one, PagedCache) for one in caches_of(store.caches))


def is_recurrent(store: Store) -> bool:
    """Whether any layer has a state."""
    return any(one.recurrent for one in caches_of(store.caches))


def _placed(tree: Any, table: Array, length: Array, stop: Array) -> Any:
    """Caches of the texts of these pages [b, N] and lengths [b]."""

    def placed(one: Any) -> Cache:
        return one.placed(table, length, stop) if isinstance(one, PagedCache) else replace(one, length=length)

    return map_caches(placed, tree)


def _stored(tree: Any, before: Any) -> Any:
    """Caches as they are stored: without the texts that were placed."""

    def stored(one: Any, old: Any) -> Cache:
        if isinstance(one, PagedCache):
            return one.placed(old.table, old.length, old.stop)
        return replace(one, length=old.length)

    return jax.tree.map(stored, tree, before, is_leaf=lambda x: isinstance(x, Cache))


@partial(jax.jit, donate_argnames=("store",))
def place(store: Store, slot: Array, text: Array) -> Store:
    """Another text [L] in a slot, of which nothing is read yet."""

    def begun(one: Cache) -> Cache:
        return jax.tree.map(lambda x: x.at[slot].set(0) if x.ndim else x, one) if one.recurrent else one

    return Store(map_caches(begun, store.caches), store.texts.at[slot].set(text))


@partial(jax.jit, static_argnames=("feed",), donate_argnames=("store",))
def read_piece(
    model: Model, store: Store, ids: Array, slot: Array, table: Array, start: Array, stop: Array, *, feed: Feed
) -> Store:
    """Reads a piece of one text.

    Args:
        model: the model.
        store: all caches.
        ids: [1, T] tokens from position `start` on; those from `stop` on are filling.
        slot: whose they are.
        table: [1, N] its pages.
        start: where the piece begins.
        stop: where it ends.
        feed: how the model is given tokens.
    """

    def own(one: Cache) -> Cache:
        return one.take(slot[None]) if one.recurrent else one

    tree = _placed(map_caches(own, store.caches), table, start[None], stop[None])
    given: dict[str, Any] = {feed.ids: ids, "cache": tree}
    if feed.positions is not None:
        given[feed.positions] = start + jnp.arange(ids.shape[1])[None]
    if feed.keeps:
        given["logits_to_keep"] = jnp.zeros(1, jnp.int32)  # nobody asks for the scores
    with mesh.placed(feed.placing):
        after = _stored(model(**given).cache, store.caches)

    def back(one: Any, old: Any) -> Any:
        if not one.recurrent:
            return one
        return jax.tree.map(lambda x, y: y.at[slot].set(x[0]) if y.ndim else y, one, old)

    return replace(store, caches=jax.tree.map(back, after, store.caches, is_leaf=lambda x: isinstance(x, Cache)))


@partial(jax.jit, static_argnames=("feed",), donate_argnames=("store", "rows"))
def write(model: Model, store: Store, rows: Rows, table: Array, *, feed: Feed) -> tuple[Store, Rows, Array, Array]:
    """One token more for every live text.

    Returns:
        The caches, the slots, the tokens int32 [B], and the logarithm of the probability [B] that the model gave them.
    """
    length = jnp.where(rows.live, rows.length, 0)
    caches = _placed(store.caches, table, length, jnp.where(rows.live, length + 1, 0))
    given: dict[str, Any] = {feed.ids: rows.last[:, None], "cache": caches}
    if feed.positions is not None:
        given[feed.positions] = length[:, None]
    with mesh.placed(feed.placing):
        out = model(**given)
    logits = out.logits[:, -1].astype(jnp.float32)

    def kept(one: Any, old: Any) -> Any:
        """A state that is not live may be one that is still reading: it stays as it was."""
        if not one.recurrent:
            return one
        return jax.tree.map(
            lambda x, y: jnp.where(rows.live.reshape(-1, *[1] * (x.ndim - 1)), x, y) if x.ndim else y, one, old
        )

    after = jax.tree.map(kept, _stored(out.cache, store.caches), store.caches, is_leaf=lambda x: isinstance(x, Cache))
    chosen = choose(logits, rows, store.texts)
    each = jnp.arange(len(chosen))
    place = jnp.where(rows.live, length + 1, store.texts.shape[1])
    texts = store.texts.at[each, place].set(chosen, mode="drop")
    sure = jax.nn.log_softmax(logits)[each, chosen]
    more = rows.live.astype(jnp.int32)
    rows = replace(rows, last=chosen, length=rows.length + more, count=rows.count + more)
    return Store(after, texts), rows, chosen, sure


def choose(logits: Array, rows: Rows, texts: Array) -> Array:
    """The next token of every slot by the scores [B, V]: int32 [B]. What nobody asks for is not computed."""
    penalised = (rows.repetition != 1) | (rows.presence != 0) | (rows.frequency != 0) | (rows.count < rows.least)
    scores = jax.lax.cond((penalised & rows.live).any(), _penalised, lambda x, rows, texts: x, logits, rows, texts)
    draw = jax.vmap(_drawn)
    return jax.lax.cond(
        (rows.samples & rows.live).any(),
        lambda scores: jnp.where(rows.samples, draw(scores, rows), scores.argmax(-1).astype(jnp.int32)),
        lambda scores: scores.argmax(-1).astype(jnp.int32),
        scores,
    )


def _penalised(scores: Array, rows: Rows, texts: Array) -> Array:
    return jax.vmap(_penalised_row)(scores, rows, texts)


def _penalised_row(scores: Array, row: Rows, text: Array) -> Array:
    """Scores [V] of one text [L], without what it has too often and with its end forbidden while it is too short."""
    length = row.length + 1
    tokens = Tokens(text[None], length, jnp.int32(0), length - row.count)
    scores = processors.repetition_penalty(row.repetition)(tokens, scores[None])[0]
    columns = jnp.arange(len(text))
    written = (columns >= length - row.count) & (columns < length)
    times = jnp.zeros(len(scores)).at[text].add(written, mode="drop")
    scores = scores - row.frequency * times - row.presence * (times > 0)
    ends = jnp.where(row.ends < 0, len(scores), row.ends)
    return jnp.where(row.count < row.least, scores.at[ends].set(-jnp.inf, mode="drop"), scores)


def _drawn(scores: Array, row: Rows) -> Array:
    """A token of one text, by its own key and the number of tokens that it has: neighbours change nothing."""
    process = processors.then(
        processors.temperature(row.temperature),
        processors.top_k(row.top_k),
        processors.top_p(row.top_p),
        processors.min_p(row.min_p),
    )
    nothing = Tokens(jnp.zeros((1, 1), jnp.int32), jnp.int32(1), jnp.int32(0), jnp.int32(1))
    key = jax.random.fold_in(jax.random.wrap_key_data(row.key, impl="threefry2x32"), row.count)
    return jax.random.categorical(key, process(nothing, scores[None])[0]).astype(jnp.int32)
