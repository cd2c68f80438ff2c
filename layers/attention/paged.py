"""The cache of many texts of different lengths, in pages of pools that they share (`layers.attention.decode.Pages`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from formax.layers.attention.api import attention
from formax.layers.attention.cache import Cache
from formax.layers.attention.decode import Pages, paged_attention
from formax.layers.attention.mask import Mask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache(Cache):
    """Keys and values in pools `k`, `v` [pages, page, K, D], and which pages are whose.

    Attributes:
        k: keys of all texts.
        v: their values.
        table: int32 [B, N], the pages of each text, in order; entries that are not in use may be any page.
        length: int32 [B], positions seen of each text.
        stop: int32 [B], the position of each text from which on nothing is written: what is read there is filling.
    """

    k: jax.Array
    v: jax.Array
    table: jax.Array
    length: jax.Array
    stop: jax.Array

    @classmethod
    def empty(cls, pages: int, page: int, heads: int, head_dim: int, dtype: Any = jnp.float32) -> Self:
        """Pools without texts: `placed` says whose pages are read."""
        shape = (pages, page, heads, head_dim)
        # No array twice: a buffer cannot be donated twice.
        table, length, stop = (jnp.zeros(sizes, jnp.int32) for sizes in ((0, 1), 0, 0))
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), table, length, stop)

    def placed(self, table: jax.Array, length: jax.Array, stop: jax.Array) -> Self:
        """The same pools, for the texts of these pages and lengths."""
        return replace(self, table=table, length=length, stop=stop)

    def take(self, rows: jax.Array) -> Self:
        raise TypeError(
            "texts in pages are chosen by their rows of the table; two that share pages would write into both"
        )

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, bias: Any = None, **how: Any
    ) -> tuple[jax.Array, Self]:
        """As `KVCache.attend`, of texts each of which is at a position of its own.

        Where there is more than causality and a window, the pages of each text are gathered first.
        """
        cache = self._appended(k, v)
        pool_k, pool_v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        if bias is None and how.get("key") is None and _is_plain(mask):
            window = None if mask.window is None or mask.window[0] is None else mask.window[0] + 1
            own = {name: x for name, x in how.items() if name not in ("dropout", "key")}
            pages = Pages(pool_k, pool_v, self.table, self.length + q.shape[1])
            return paged_attention(q, pages, window=window, **own), cache
        keys, values = _gathered(pool_k, self.table), _gathered(pool_v, self.table)
        bias = bias(q, keys) if callable(bias) else bias
        return attention(q, keys, values, mask=mask, bias=bias, **how), cache

    def _appended(self, k: jax.Array, v: jax.Array) -> Self:
        """The cache with [B, T, K, D] more keys and values."""
        count, page = k.shape[1], self.k.shape[1]
        at = self.length[:, None] + jnp.arange(count)  # [B, T]
        held = jnp.take_along_axis(self.table, at // page, axis=1, mode="clip")
        place = jnp.where(at < self.stop[:, None], held * page + at % page, len(self.k) * page)

        def put(pool: jax.Array, x: jax.Array) -> jax.Array:
            rows = pool.reshape(-1, *pool.shape[2:])
            return rows.at[place].set(x.astype(pool.dtype), mode="drop").reshape(pool.shape)

        length = jnp.maximum(self.length, jnp.minimum(self.length + count, self.stop))
        return replace(self, k=put(self.k, k), v=put(self.v, v), length=length)


def _gathered(pool: jax.Array, table: jax.Array) -> jax.Array:
    """All pages of every text, in order: [pages, page, K, D] and [B, N] -> [B, N * page, K, D]."""
    found = jnp.take(pool, table, axis=0, mode="clip")
    return found.reshape(len(table), -1, *pool.shape[2:])


def _is_plain(mask: Mask) -> bool:
    """Whether the mask is causal, perhaps with a window, and nothing else."""
    further = (mask.kv_length, mask.keys, mask.segments, mask.prefix, mask.dense)
    right = (mask.window or (None, None))[1]
    return mask.causal and mask.dilation == 1 and right in (None, 0) and all(x is None for x in further)
