"""A cache in the memory of the host, for texts whose keys and values the device has no room for.

Every layer fetches its own when it attends: they are on the device one layer at a time, and every step pays for the way
there. XLA starts copies as early as it can, so a layer's may overlap with the computation of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import jax

from formax.layers.attention.cache import KVCache
from formax.layers.attention.mask import Mask

# `jax.memory` became public with jax 0.8.
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OffloadedCache(KVCache):
    """A `KVCache` whose `k` and `v` are in the host's memory between uses."""

    @classmethod
    def empty(cls, *args: Any, **named: Any) -> Self:
        return super().empty(*args, **named).put(HOST)

    def put(self, space: Any) -> Self:
        """The cache with its keys and values in this memory."""
        return replace(self, k=jax.device_put(self.k, space), v=jax.device_put(self.v, space))

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, bias: Any = None, **how: Any
    ) -> tuple[jax.Array, Self]:
        out, cache = super(OffloadedCache, self.put(DEVICE)).attend(q, k, v, mask=mask, bias=bias, **how)
        return out, cache.put(HOST)

    def take(self, rows: jax.Array) -> Self:
        return super(OffloadedCache, self.put(DEVICE)).take(rows).put(HOST)

    def grown(self, room: int) -> Self:
        return self if room <= self.room else super(OffloadedCache, self.put(DEVICE)).grown(room).put(HOST)
