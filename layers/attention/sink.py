"""The cache of a layer that keeps its first positions and the last ones, so that a text may go on without end.

Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453: a model looks at its
first tokens whatever they say, and loses its way when a window drops them. They are kept, and stand right before the
window: their keys are turned on as it moves away from them. Position p < S stands in slot p, and a later one in slot
S + (p - S) mod (W - S).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from formax.layers.attention.api import attention
from formax.layers.attention.cache import Cache
from formax.layers.attention.mask import Mask
from formax.layers.attention.ring import NEVER, after, newest, placed
from formax.layers.rope import Rope


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SinkCache(Cache):
    """Keys and values of the first S positions and of the last W - S: `k`, `v` [B, W, K, D].

    Attributes:
        k: keys, turned as at their positions, the first S as at those right before the window.
        v: their values.
        first: keys [B, S, K, D] of the first S positions, turned as at these.
        length: int32, how many positions were seen.
        stop: int32, the position from which on the next ones are filling (`until`).
        rope: how the model turns its keys.
    """

    k: jax.Array
    v: jax.Array
    first: jax.Array
    length: jax.Array
    stop: jax.Array
    rope: Rope = field(metadata={"static": True})

    @classmethod
    def empty(
        cls, batch: int, window: int, sinks: int, heads: int, head_dim: int, dtype: Any = jnp.float32, *, rope: Rope
    ) -> Self:
        """A cache of `window` positions, the first `sinks` of them for good.

        Raises:
            ValueError: a window with no position beside the sinks.
        """
        if not 0 <= sinks < window:
            raise ValueError(f"sinks={sinks} must be 0 or more, and fewer than window={window}")

        def zeros(length: int) -> jax.Array:
            return jnp.zeros((batch, length, heads, head_dim), dtype)

        return cls(zeros(window), zeros(window), zeros(sinks), jnp.zeros((), jnp.int32), jnp.int32(NEVER), rope)

    @property
    def window(self) -> int:
        """W, how many positions a new one sees, itself included."""
        return self.k.shape[1]

    @property
    def sinks(self) -> int:
        """S, how many positions are kept for good."""
        return self.first.shape[1]

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, bias: Any = None, **how: Any
    ) -> tuple[jax.Array, Self]:
        """Attention of new positions to themselves and those that are kept: ([B, T, H, D], the cache with them).

        What an empty cache is given is seen as a whole, however long it is.

        Args:
            q: queries [B, T, H, D].
            k: their keys [B, T, K, D].
            v: their values.
            mask: causal, and nothing else.
            bias: None.
            **how: as for `attention`.

        Raises:
            NotImplementedError: another mask, such as one of padding, or a bias.
        """
        others = [f for f in fields(mask) if f.name not in ("causal", "q_offset")]
        if bias is not None or not mask.causal or any(getattr(mask, f.name) is not f.default for f in others):
            raise NotImplementedError(
                "a cache of sinks knows causal attention over rows without padding, and no windows or biases: take "
                "cache_implementation=None"
            )
        return self._step(q, k, v, how) if q.shape[1] == 1 else self._block(q, k, v, how)

    def _step(self, q: Any, k: Any, v: Any, how: Any) -> tuple[jax.Array, Self]:
        """One position: it takes the place of the oldest that is no sink."""
        at, sinks, ring = self.length, self.sinks, self.window - self.sinks
        slot = jnp.where(at < sinks, at, sinks + (at - sinks) % ring)
        first = self.first
        if sinks:
            put = jax.lax.dynamic_update_slice(first, k.astype(first.dtype), (0, jnp.minimum(at, sinks - 1), 0, 0))
            first = jnp.where(at < sinks, put, first)
        new_k = jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), (0, slot, 0, 0))
        new_v = jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), (0, slot, 0, 0))
        new_k = self._with_sinks(new_k, first, jnp.maximum(at + 1 - self.window, 0))
        seen = jnp.broadcast_to(jnp.arange(self.window) <= at, (len(q), self.window))
        out = attention(q, new_k.astype(q.dtype), new_v.astype(q.dtype), mask=Mask(keys=seen), **how)
        return out, replace(self, k=new_k, v=new_v, first=first, length=at + 1, stop=jnp.int32(NEVER))

    def _block(self, q: Any, k: Any, v: Any, how: Any) -> tuple[jax.Array, Self]:
        """Several positions: the old ones are put in order before them."""
        sinks, ring, count = self.sinks, self.window - self.sinks, q.shape[1]
        end = jnp.minimum(self.length + count, self.stop)
        begun = self.length > 0
        moved = jnp.where(begun, jnp.maximum(end - self.window, 0), 0)
        oldest = jnp.where(begun, end - ring, 0)
        before = self.length - ring + jnp.arange(ring)  # positions of the ring, in order
        order = jnp.concatenate([jnp.arange(sinks), sinks + (before - sinks) % ring])
        new = self.length + jnp.arange(count)
        seen = jnp.concatenate(
            [
                jnp.arange(sinks) < self.length,
                before >= jnp.maximum(sinks, oldest),
                (new >= oldest) | (new < sinks),
            ]
        )
        own = Mask(causal=True, q_offset=sinks + ring, keys=jnp.broadcast_to(seen, (len(q), len(seen))))

        keys = after(self._with_sinks(self.k, self.first, moved), order, k)
        out = attention(q, keys, after(self.v, order, v), mask=own, **how)
        at = jnp.concatenate([jnp.arange(sinks), sinks + newest(end - sinks, ring)])
        new_k, new_v = placed(self.k, k, at, self.length, end), placed(self.v, v, at, self.length, end)
        first = placed(self.first, k, at[:sinks], self.length, end)
        new_k = self._with_sinks(new_k, first, jnp.maximum(end - self.window, 0))
        return out, replace(self, k=new_k, v=new_v, first=first, length=end, stop=jnp.int32(NEVER))

    def _with_sinks(self, k: jax.Array, first: jax.Array, moved: jax.Array) -> jax.Array:
        """Keys whose first ones are the sinks', turned on by as much as the window has moved."""
        if not self.sinks:
            return k
        turned = self.rope.later(first.astype(jnp.float32), moved).astype(k.dtype)
        return jax.lax.dynamic_update_slice(k, turned, (0, 0, 0, 0))

    def until(self, length: Any) -> Self:
        return replace(self, stop=jnp.asarray(length, jnp.int32))
