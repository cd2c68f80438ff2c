"""The cache of a layer whose positions see a window: what lies before it is overwritten.

Position p stands in slot p mod W, so that W slots always hold the last W positions. A family's mask speaks of
positions, not of slots; it is translated here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from formax.layers.attention.api import attention
from formax.layers.attention.bias import ALiBi, Bias, Bucketed, Indexed
from formax.layers.attention.cache import Cache
from formax.layers.attention.mask import Mask

NEVER = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache(Cache):
    """Keys and values of the last positions seen: `k`, `v` [B, W, K, D], where W is at most the window.

    Attributes:
        k: keys; position p is in slot p mod W.
        v: their values.
        length: int32, how many positions were seen.
        stop: int32, the position from which on the next ones are filling (`until`).
        window: how many positions a position sees, itself included.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    stop: jax.Array
    window: int = field(metadata={"static": True})

    @classmethod
    def empty(
        cls, batch: int, length: int, heads: int, head_dim: int, dtype: Any = jnp.float32, *, window: int
    ) -> Self:
        """A cache for up to `length` positions, of which it keeps `window`.

        Raises:
            ValueError: a window without a position.
        """
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        shape = (batch, min(length, window), heads, head_dim)
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zero, jnp.int32(NEVER), window)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, bias: Any = None, **how: Any
    ) -> tuple[jax.Array, Self]:
        """Attention of new positions to themselves and those of the window before: ([B, T, H, D], the cache with them).

        Args:
            q: queries [B, T, H, D].
            k: their keys [B, T, K, D].
            v: their values.
            mask: over all positions, those that are gone included.
            bias: as for `attention`, over all positions.
            **how: as for `attention`.

        Raises:
            ValueError: the mask lets a position see further than the window.
            NotImplementedError: a bias that keys without their positions do not tell.
        """
        left = (mask.window or (None, None))[0]
        if mask.dense is None and (left is None or left >= self.window):
            seen = "all before it" if left is None else f"{left + 1}"
            raise ValueError(f"a ring keeps {self.window} positions, the layer's mask lets a position see {seen}")
        if callable(bias) or isinstance(bias, Indexed):
            raise NotImplementedError("a ring cache does not know this bias: take cache_implementation=None")
        return self._step(q, k, v, mask, bias, how) if q.shape[1] == 1 else self._block(q, k, v, mask, bias, how)

    def _step(self, q: Any, k: Any, v: Any, mask: Mask, bias: Any, how: Any) -> tuple[jax.Array, Self]:
        """One position: it takes the place of the oldest, which it does not see."""
        size = self.k.shape[1]
        start = (0, self.length % size, 0, 0)
        put = jax.lax.dynamic_update_slice
        new_k, new_v = put(self.k, k.astype(self.k.dtype), start), put(self.v, v.astype(self.v.dtype), start)
        at = newest(self.length + 1, size)
        table = mask.materialise(1, size, at)
        assert table is not None  # a window, or pairs
        table = table & (at >= 0)
        heads = table.ndim == 4 and table.shape[1] > 1
        if not heads:  # with one query, a table is about keys
            table = jnp.broadcast_to(table.reshape(-1, size), (len(q), size))
        own = Mask(dense=table) if heads else Mask(keys=table)
        keys, values = new_k.astype(q.dtype), new_v.astype(q.dtype)
        out = attention(q, keys, values, mask=own, bias=_bias_at(bias, at, self.length), **how)
        return out, replace(self, k=new_k, v=new_v, length=self.length + 1, stop=jnp.int32(NEVER))

    def _block(self, q: Any, k: Any, v: Any, mask: Mask, bias: Any, how: Any) -> tuple[jax.Array, Self]:
        """Several positions: the old ones are put in order before them, so that the mask keeps its structure."""
        size, count = self.k.shape[1], q.shape[1]
        first = self.length - size
        order = (first + jnp.arange(size)) % size

        own = mask.since(first, size + count)
        if not isinstance(bias, ALiBi | Bucketed):
            bias = _bias_at(bias, first + jnp.arange(size + count), self.length)
        out = attention(q, after(self.k, order, k), after(self.v, order, v), mask=own, bias=bias, **how)
        end = jnp.minimum(self.length + count, self.stop)
        new_k, new_v = kept(self.k, k, self.length, end), kept(self.v, v, self.length, end)
        return out, replace(self, k=new_k, v=new_v, length=end, stop=jnp.int32(NEVER))

    def grown(self, room: int) -> Self:
        # Fewer slots than the window were enough for all positions so far, so each stands in the slot of its number.
        more = max(min(room, self.window) - self.k.shape[1], 0)
        k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (self.k, self.v))
        return replace(self, k=k, v=v)

    def until(self, length: Any) -> Self:
        return replace(self, stop=jnp.asarray(length, jnp.int32))


def after(old: jax.Array, order: jax.Array, new: jax.Array) -> jax.Array:
    """Old slots [B, W, ...] in an order, int32 [W], and new positions [B, T, ...] after them."""
    return jnp.concatenate([jnp.take(old, order, axis=1).astype(new.dtype), new], axis=1)


def newest(length: Any, size: int) -> jax.Array:
    """Which position each of `size` slots holds after `length` of them: int32 [size], below 0 where there is none."""
    last = length - 1
    return last - (last - jnp.arange(size)) % size


def kept(old: jax.Array, new: jax.Array, length: Any, end: Any) -> jax.Array:
    """Slots [B, W, ...] after the positions from `length` up to `end`, whose values `new` [B, T, ...] begins with."""
    return placed(old, new, newest(end, old.shape[1]), length, end)


def placed(old: jax.Array, new: jax.Array, at: jax.Array, length: Any, end: Any) -> jax.Array:
    """As `kept`, of slots that hold the positions `at`, int32 [W], then."""
    index = jnp.clip(at - length, 0, new.shape[1] - 1)
    fresh = ((at >= length) & (at < end)).reshape(1, -1, *[1] * (old.ndim - 2))
    return jnp.where(fresh, jnp.take(new, index, axis=1).astype(old.dtype), old)


def _bias_at(bias: Bias | None, positions: jax.Array, query: Any) -> Any:
    """The terms of keys at `positions` [S] for one query, or those of an array for any."""
    if bias is None:
        return None
    if isinstance(bias, ALiBi | Bucketed):
        return bias.of_distance(positions - query)[None, :, None]  # [1, H, 1, S]
    assert not isinstance(bias, Indexed)
    return bias if bias.shape[-1] == 1 else jnp.take(bias, positions, axis=-1, mode="clip")
