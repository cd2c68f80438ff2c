"""A model as a way from tokens to the scores of the next one, whatever family it is of.

`Feed` says how a model is given its tokens, `Context` is what it knows of them; `read` goes from one to the next. The
loops of generation are written over these three alone.

Prompts of different lengths share a program: they stand in a buffer that is longer. Where caches can go back, the
columns after the prompt are read along and then forgotten; else columns before it are, which a mask hides.

B rows, L columns of the buffer, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.core import mesh
from formax.generation.cache_kinds import FULL, Kind, as_kind
from formax.generation.state import Tokens
from formax.layers.attention import cache as caches
from formax.model import HEAD_MASKS, Model

# What is said of an encoder's states goes with every step; the states themselves are in the cache.
OF_MEMORY = ("encoder_attention_mask",)
# Output fields that are kept of every step -> the switch of the call that makes them.
SEEN = {
    "attentions": "output_attentions",
    "decoder_attentions": "output_attentions",
    "cross_attentions": "output_attentions",
    "hidden_states": "output_hidden_states",
    "decoder_hidden_states": "output_hidden_states",
}
OF_ENCODER = ("encoder_attentions", "encoder_hidden_states", "encoder_last_hidden_state")


def bucket(n: int) -> int:
    """The next size that programs are compiled for: four for every doubling, none below 16.

    Columns that are not used cost next to nothing, since attention reads the filled part of a cache.
    """
    step = max(16, 2 ** (n - 1).bit_length() // 8)
    return -(-n // step) * step


@dataclass(frozen=True)
class Feed:
    """How a model is given tokens.

    Attributes:
        ids: the input that has them.
        mask: the input that says which are padding, if there is padding.
        positions: the input that has their positions, if there is padding, or the family counts otherwise than from 0,
            and it takes any.
        of_memory: inputs that go with every step.
        keeps: whether the model makes scores of chosen positions alone (`logits_to_keep`).
        cached: whether it has a cache.
        seen: switches of what else is wanted of every step.
        static: further inputs that are no arrays.
        placing: the mesh that the model is on.
        kind: which caches the model is given.
    """

    ids: str
    mask: str | None = None
    positions: str | None = None
    of_memory: tuple[str, ...] = ()
    keeps: bool = False
    cached: bool = True
    seen: tuple[str, ...] = ()
    static: tuple[tuple[str, Any], ...] = ()
    placing: mesh.Placing | None = None
    kind: Kind = FULL

    @property
    def vectors(self) -> str:
        """The input that has vectors in the place of tokens."""
        return self.ids.replace("input_ids", "inputs_embeds")

    def is_by_token(self, name: str) -> bool:
        """Whether an input could say something of each token; not one about an encoder, whatever its shape."""
        about = name.startswith(self.ids.removesuffix("input_ids")) and not name.startswith("encoder_")
        return about and name not in self.of_memory

    @classmethod
    def of(cls, model: Model, *, padded: bool = False, cached: bool = True, seen: tuple[str, ...] = ()) -> Feed:
        """How this model is given tokens.

        Raises:
            TypeError: there is padding, and the model has no input that would say so.
        """
        names = model.input_names
        seq2seq = "decoder_input_ids" in names
        prefix = "decoder_" if seq2seq else ""
        mask, positions = f"{prefix}attention_mask", f"{prefix}position_ids"
        if padded and mask not in names:
            raise TypeError(f"{model.architecture.name} takes no {mask}: give rows of one length, without padding")
        of_memory = ("attention_mask", "decoder_head_mask", "cross_attn_head_mask") if seq2seq else tuple(HEAD_MASKS)
        return cls(
            ids=f"{prefix}input_ids",
            mask=mask if padded else None,
            positions=positions if (padded or model.family.counts_tokens) and positions in names else None,
            of_memory=(*of_memory, *OF_MEMORY),
            keeps="logits_to_keep" in names,
            cached=cached,
            seen=seen,
            placing=mesh.of_arrays(jax.tree.leaves(model.params)),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a model knows of a text.

    Attributes:
        cache: the model's caches; None where it reads the whole text at every step.
        mask: bool [B, L], the columns that are no padding; None if there is none.
        memory: inputs that go with every step.
    """

    cache: Any
    mask: Array | None
    memory: dict[str, Array]

    def take(self, rows: Array, *, of_texts: bool = False) -> Context:
        """What is known of the rows [B'] of these; with `of_texts` these are texts about the same inputs."""
        cache = None if self.cache is None else caches.take_rows(self.cache, rows, of_texts=of_texts)
        if of_texts:
            return replace(self, cache=cache)
        mask = None if self.mask is None else self.mask[rows]
        kept = {name: x if name in HEAD_MASKS else x[rows] for name, x in self.memory.items()}
        return Context(cache, mask, kept)

    def rewound(self, length: Any) -> Context:
        """What was known when `length` columns had been read."""
        return self if self.cache is None else replace(self, cache=caches.rewind(self.cache, length))


def read(
    model: Model,
    feed: Feed,
    context: Context,
    tokens: Tokens,
    start: Any,
    count: int,
    *,
    keep: Any = None,
    first: Mapping[str, Any] | None = None,
) -> tuple[Array, Context, dict[str, Any]]:
    """Reads columns of the buffer: what follows each, and what is known then.

    Args:
        model: the model.
        feed: how it is given tokens.
        context: what it knows of the columns before.
        tokens: the buffer.
        start: the first column.
        count: how many.
        keep: int [n], the ones of these whose scores are wanted; all by default.
        first: inputs that are given once: what the text is about, or vectors in the place of its tokens.

    Returns:
        Scores float32 [B, count or n, V], the context after them, and what else was asked for.
    """
    given: dict[str, Any] = {**context.memory, **(first or {})}
    if feed.cached:
        columns = tokens.ids if count == tokens.ids.shape[1] else _columns(tokens.ids, start, count)
        wanted = keep
    else:
        # Without a cache the whole buffer is read: what is not written yet comes after, and is not looked at.
        columns, wanted = tokens.ids, start + (jnp.arange(count) if keep is None else keep)
    if feed.vectors not in given:
        given[feed.ids] = columns
    if feed.mask is not None and context.mask is not None:
        given[feed.mask] = context.mask.astype(jnp.int32)
        if feed.positions is not None:
            positions = jnp.maximum(jnp.cumsum(context.mask, axis=1) - 1, 0)
            given[feed.positions] = _columns(positions, start, count) if feed.cached else positions
    if feed.cached:
        given["cache"] = context.cache
    if wanted is not None and feed.keeps:
        given["logits_to_keep"] = wanted
    with mesh.placed(feed.placing):
        switches: Any = dict.fromkeys(feed.seen, True)
        out = model(**given, **dict(feed.static), **switches)
    logits = out.logits if wanted is None or feed.keeps else jnp.take(out.logits, wanted, axis=1)
    seen = {name: getattr(out, name, None) for name, switch in SEEN.items() if switch in feed.seen}
    if first:
        seen |= {
            name: getattr(out, name, None) for name in OF_ENCODER if feed.seen or name.endswith("last_hidden_state")
        }
    after = replace(context, cache=out.cache) if feed.cached else context
    return logits.astype(jnp.float32), after, {name: x for name, x in seen.items() if x is not None}


def _columns(x: Array, start: Any, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "length", "begins", "start", "mask", "memory", "first", "cache"],
    meta_fields=["encoder_length"],
)
@dataclass(frozen=True)
class Prompt:
    """What a text begins with, and what it is about.

    Attributes:
        ids: int32 [B, P], filled up to a size that programs are compiled for.
        length: int32, where the first new token goes.
        begins: int32, the column where the text begins.
        start: int32, the first column that is not in the cache yet.
        mask: bool [B, P], the columns that are no padding and no filling; None if all are tokens.
        memory: inputs that go with every step.
        first: inputs that are given once.
        cache: caches of the columns before `start`; None for new ones.
        encoder_length: how many states of an encoder there are.
    """

    ids: Array
    length: Any
    begins: Any
    start: Any
    mask: Array | None
    memory: dict[str, Array]
    first: dict[str, Any]
    cache: Any = None
    encoder_length: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Known:
    """What a model makes of a prompt.

    Attributes:
        logits: float32 [B, V] of the first new token.
        tokens: the buffer, with the prompt in it.
        context: what is known of the prompt.
        states: of all layers, the prompt's last [B, E], if hidden states are asked for.
        seen: what else was asked for, of the whole prompt.
    """

    logits: Array
    tokens: Tokens
    context: Context
    states: tuple[Array, ...]
    seen: dict[str, Any]

    def branched(self, times: int) -> Known:
        """The same for so many texts of each prompt, one beside the other; `seen` stays that of the prompts."""
        if times == 1:
            return self
        rows = jnp.repeat(jnp.arange(len(self.logits)), times)
        tokens = replace(self.tokens, ids=self.tokens.ids[rows])
        states = tuple(x[rows] for x in self.states)
        return Known(self.logits[rows], tokens, self.context.take(rows), states, self.seen)

    def forgotten(self) -> Known:
        """The same without what was seen, so that the rest can be given away."""
        return replace(self, seen={})


@partial(jax.jit, static_argnames=("feed", "room", "count"))
def prefill(model: Model, feed: Feed, prompt: Prompt, room: int, count: int) -> Known:
    """Reads the prompt. This is a program of its own, the same for all ways of generating.

    Args:
        model: the model.
        feed: how it is given tokens.
        prompt: what it is given.
        room: columns of the buffer.
        count: columns from `prompt.start` on that are read.
    """
    rows = len(prompt.ids)
    more = room - prompt.ids.shape[1]
    tokens = Tokens(jnp.pad(prompt.ids, ((0, 0), (0, more))), prompt.length, prompt.begins, prompt.length)
    mask = None if prompt.mask is None else jnp.pad(prompt.mask, ((0, 0), (0, more)), constant_values=True)
    cache = prompt.cache
    if feed.cached:
        if cache is None:
            cache = as_kind(model.init_cache(rows, room, prompt.encoder_length, cache_dtype(model)), feed.kind)
        else:
            cache = caches.grow(cache, room)
        cache = caches.map_caches(lambda one: one.until(prompt.length), cache)
    last = (prompt.length - 1 - prompt.start if feed.cached else prompt.length - 1)[None]
    context = Context(cache, mask, prompt.memory)
    start = prompt.start if feed.cached else 0
    logits, context, seen = read(model, feed, context, tokens, start, count, keep=last, first=prompt.first)
    if not feed.cached:  # what the text is about is looked at again in every step
        about = {"encoder_outputs": seen.get("encoder_last_hidden_state", prompt.first.get("encoder_outputs"))}
        about |= {"encoder_hidden_states": prompt.first.get("encoder_hidden_states")}
        memory = {name: x for name, x in about.items() if x is not None}
        context = replace(context, memory=context.memory | memory)
    else:
        context = replace(context, cache=caches.settle(context.cache, prompt.length))
    states = seen.get("hidden_states", seen.get("decoder_hidden_states", ()))
    return Known(logits[:, 0], tokens, context, tuple(x[:, last[0]] for x in states), seen)


def cache_dtype(model: Model) -> Any:
    """The dtype of most of a model's parameters."""
    sizes: dict[Any, int] = {}
    for leaf in jax.tree.leaves(model.params):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + int(np.prod(leaf.shape))
    return max(sizes, key=lambda dtype: sizes[dtype], default=jnp.dtype(jnp.float32))


@lru_cache(maxsize=512)
def _abstract(make: Callable[..., Any] | None, config: Any) -> Any:
    return None if make is None else jax.eval_shape(lambda: make(config, 1, 1, 1, jnp.float32))


def has_cache(model: Model) -> bool:
    """Whether the model decodes step by step."""
    return _abstract(model.family.init_cache, model.config) is not None


def rewinds(model: Model) -> bool:
    """Whether it does, and its caches can be taken back."""
    return has_cache(model) and caches.can_rewind(_abstract(model.family.init_cache, model.config))
