"""What attention keeps of the positions seen, and what is done to the caches of a whole model.

A model's caches are any tree with a `Cache` for every layer (or several). The functions below do to all of them what
generating asks for: rows are chosen, repeated, taken back to an earlier length, given more room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from formax.layers.attention.api import attention
from formax.layers.attention.mask import Mask, from_attention_mask


class Cache:
    """What a layer keeps of the positions seen: a frozen pytree dataclass whose arrays begin with the batch axis.

    Attributes:
        length: int32, how many positions were seen; [B] where rows have seen different numbers.
        rewinds: whether it can be taken back to fewer positions than it has seen.
        recurrent: whether it is of one size and sums all positions up, so that texts of different lengths go on side
            by side whatever `length` says.
    """

    length: jax.Array
    rewinds: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False

    def take(self, rows: jax.Array) -> Self:
        """The cache of other rows, each one of these: int32 [B'] -> a cache of B' rows."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0) if jnp.ndim(x) else x, self)

    def rewound(self, length: Any) -> Self:
        """The cache as it was after `length` positions.

        Raises:
            TypeError: what it keeps does not tell.
        """
        raise TypeError(f"a {type(self).__name__} cannot go back to an earlier position")

    def grown(self, room: int) -> Self:
        """The cache with room for so many positions, if it has less."""
        return self

    def until(self, length: Any) -> Self:
        """The cache that takes what it is given next from position `length` on for filling, of which nothing is kept.

        One that can be taken back afterwards need not know.
        """
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache(Cache):
    """Keys and values seen so far, in buffers of fixed length: `k`, `v` [B, S, K, D], `length` filled positions."""

    k: jax.Array
    v: jax.Array
    length: jax.Array
    rewinds: ClassVar[bool] = True

    @classmethod
    def empty(cls, batch: int, length: int, heads: int, head_dim: int, dtype: Any = jnp.float32) -> Self:
        """A cache with room for `length` positions."""
        shape = (batch, length, heads, head_dim)
        # Two arrays, not one twice: a buffer cannot be donated twice.
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    @property
    def room(self) -> int:
        """Positions that there is room for."""
        return self.k.shape[1]

    def append(self, k: jax.Array, v: jax.Array) -> Self:
        """The cache with [B, T, K, D] more keys and values after the filled ones.

        The caller sees to it that they fit: `length` is known only when the program runs, where nothing can be raised,
        and positions too many would overwrite the last ones.

        Raises:
            ValueError: more positions than the whole buffer has.
        """
        if k.shape[1] > self.room:
            raise ValueError(f"{k.shape[1]} positions do not fit into a cache of {self.room}")
        start = (0, self.length, 0, 0)
        new_k = jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), start)
        new_v = jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), start)
        return replace(self, k=new_k, v=new_v, length=self.length + k.shape[1])

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, bias: Any = None, **how: Any
    ) -> tuple[jax.Array, Self]:
        """Attention of new positions to themselves and all before them: ([B, T, H, D], the cache with them).

        Args:
            q: queries [B, T, H, D].
            k: their keys [B, T, K, D].
            v: their values.
            mask: over the buffer's positions; it hides those that are not filled.
            bias: as for `attention`, or a function of (q, all keys) that gives one.
            **how: as for `attention`.
        """
        cache = self.append(k, v)
        keys, values = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        bias = bias(q, keys) if callable(bias) else bias
        return attention(q, keys, values, mask=mask, bias=bias, **how), cache

    def rewound(self, length: Any) -> Self:
        return replace(self, length=jnp.asarray(length, jnp.int32))

    def grown(self, room: int) -> Self:
        more = max(room - self.room, 0)
        k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (self.k, self.v))
        return replace(self, k=k, v=v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossCache(KVCache):
    """Keys and values of an encoder's states, which do not become more while text is written."""

    def rewound(self, length: Any) -> Self:
        return self

    def grown(self, room: int) -> Self:
        return self


def causal_mask(attention_mask: Any, tree: Any) -> Mask:
    """What a decoder's positions see of each other: those of its padding mask [B, S], up to themselves.

    With a model's caches the first position comes after those they hold (`q_offset`), and keys are all of the buffer.
    """
    if tree is None:
        return from_attention_mask(attention_mask, causal=True)
    own = next(one for one in caches_of(tree) if not isinstance(one, CrossCache))
    return from_attention_mask(attention_mask, causal=True, q_offset=own.length, keys=getattr(own, "room", None))


def caches_of(tree: Any) -> list[Cache]:
    """The caches of a model, in order."""
    return [one for one in jax.tree.leaves(tree, is_leaf=_is_cache) if _is_cache(one)]


def map_caches(function: Callable[[Cache], Cache], tree: Any) -> Any:
    """A model's caches, each through `function`."""
    return jax.tree.map(function, tree, is_leaf=_is_cache)


def take_rows(tree: Any, rows: jax.Array, *, of_texts: bool = False) -> Any:
    """A model's caches for the rows [B'] of these; with `of_texts` what is kept of an encoder stays as it is."""
    return map_caches(lambda one: one if of_texts and isinstance(one, CrossCache) else one.take(rows), tree)


def rewind(tree: Any, length: Any) -> Any:
    """A model's caches as they were after `length` positions."""
    return map_caches(lambda one: one.rewound(length), tree)


def settle(tree: Any, length: Any) -> Any:
    """A model's caches that were told of filling from `length` on (`until`), after reading it: it is forgotten."""
    return map_caches(lambda one: one.rewound(length) if one.rewinds else one, tree)


def grow(tree: Any, room: int) -> Any:
    """A model's caches with room for so many positions."""
    return map_caches(lambda one: one.grown(room), tree)


def can_rewind(tree: Any) -> bool:
    """Whether all of a model's caches can be taken back."""
    return all(one.rewinds for one in caches_of(tree))


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache)
