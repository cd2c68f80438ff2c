"""Keys and values in 8, 4 or 2 bits, the newest ones also as they are.

Whole numbers of so many bits stand for the numbers of a group of channels, by a step and (below 8 bits) a least value
that each position, head and group has of its own. The newest positions count most, and are looked up in full precision
(Liu et al. 2024, "KIVI", arXiv:2402.02750, whose keys are grouped along positions instead).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from formax.layers.attention.api import attention
from formax.layers.attention.cache import Cache
from formax.layers.attention.mask import Mask
from formax.layers.attention.ring import NEVER, kept, newest

BITS = (8, 4, 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """Numbers [..., D] in few bits, in groups of D / G channels.

    Attributes:
        codes: int8 [..., D] with 8 bits, else uint8 [..., D * bits / 8]: two or four in a byte, the first lowest.
        step: [..., G], between two neighbours.
        least: [..., G], what code 0 stands for; None with 8 bits, where it stands for 0.
        bits: 8, 4 or 2.
    """

    codes: jax.Array
    step: jax.Array
    least: jax.Array | None
    bits: int = field(metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array, bits: int, group: int, dtype: Any) -> Self:
        """The nearest numbers to x [..., D], in groups of `group` channels; steps are kept in `dtype`."""
        parts = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // group, group)
        if bits == 8:
            step = (jnp.abs(parts).max(-1) / 127).astype(dtype)
            least, low, high = None, -127, 127
            shifted = parts
        else:
            # Rounded to `dtype` first, so that codes are about the numbers that are kept.
            least = parts.min(-1).astype(dtype)
            shifted = parts - least.astype(jnp.float32)[..., None]
            step = (shifted.max(-1) / (2**bits - 1)).astype(dtype)
            low, high = 0, 2**bits - 1
        width = step.astype(jnp.float32)[..., None]
        codes = jnp.clip(jnp.round(shifted / jnp.where(width > 0, width, 1)), low, high)
        codes = codes.astype(jnp.int8 if bits == 8 else jnp.uint8).reshape(x.shape)
        return cls(_packed(codes, bits), step, least, bits)

    def numbers(self, dtype: Any) -> jax.Array:
        """What they stand for, [..., D]."""
        codes = _unpacked(self.codes, self.bits)
        parts = codes.reshape(*self.step.shape, -1).astype(jnp.float32) * self.step.astype(jnp.float32)[..., None]
        if self.least is not None:
            parts = parts + self.least.astype(jnp.float32)[..., None]
        return parts.reshape(codes.shape).astype(dtype)


def _packed(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [..., D] of `bits` bits each, as bytes [..., D * bits / 8]."""
    if bits == 8:
        return codes
    several = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    places = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    return jnp.bitwise_or.reduce(several << places, axis=-1)


def _unpacked(codes: jax.Array, bits: int) -> jax.Array:
    """Inverse of `_packed`."""
    if bits == 8:
        return codes
    places = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    return ((codes[..., None] >> places) & (2**bits - 1)).reshape(*codes.shape[:-1], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantisedCache(Cache):
    """All keys and values in few bits, and the last N as they are.

    Attributes:
        k: [B, S, K, D] in few bits.
        v: likewise.
        new_k: [B, N, K, D]; position p is in slot p mod N.
        new_v: likewise.
        held: int32 [B, N], the position that each slot holds, -1 for none.
        length: int32, how many positions were seen.
        stop: int32, the position from which on the next ones are filling (`until`).
        group: channels that have a step of their own.
    """

    k: Quantised
    v: Quantised
    new_k: jax.Array
    new_v: jax.Array
    held: jax.Array
    length: jax.Array
    stop: jax.Array
    group: int = field(metadata={"static": True})
    rewinds: ClassVar[bool] = True

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        heads: int,
        head_dim: int,
        dtype: Any = jnp.float32,
        *,
        bits: int = 4,
        group: int = 64,
        residual: int = 128,
    ) -> Self:
        """A cache with room for `length` positions.

        Args:
            batch: B.
            length: S.
            heads: K.
            head_dim: D.
            dtype: of the newest, and of steps.
            bits: of a number, 8, 4 or 2.
            group: channels that have a step of their own, made smaller until they divide D.
            residual: N, how many of the newest are kept as they are; 0 for none.

        Raises:
            ValueError: impossible settings, or heads whose channels do not fill bytes.
        """
        if bits not in BITS:
            raise ValueError(f"nbits={bits} is none of {', '.join(map(str, BITS))}")
        if group < 1 or residual < 0:
            raise ValueError(f"q_group_size={group} must be 1 or more, and residual_length={residual} 0 or more")
        if head_dim * bits % 8:
            raise ValueError(f"heads of {head_dim} channels do not fill whole bytes with {bits} bits a channel")
        own, kept_positions = math.gcd(group, head_dim), min(residual, length)

        def few() -> Quantised:
            codes = jnp.zeros((batch, length, heads, head_dim * bits // 8), jnp.int8 if bits == 8 else jnp.uint8)
            steps = (batch, length, heads, head_dim // own)
            return Quantised(codes, jnp.zeros(steps, dtype), None if bits == 8 else jnp.zeros(steps, dtype), bits)

        shape = (batch, kept_positions, heads, head_dim)
        held = jnp.full((batch, kept_positions), -1, jnp.int32)
        new_k, new_v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return cls(few(), few(), new_k, new_v, held, jnp.zeros((), jnp.int32), jnp.int32(NEVER), own)

    @property
    def room(self) -> int:
        """Positions that there is room for."""
        return self.k.codes.shape[1]

    @property
    def residual(self) -> int:
        """Positions that are kept as they are."""
        return self.held.shape[1]

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, bias: Any = None, **how: Any
    ) -> tuple[jax.Array, Self]:
        """As `KVCache.attend`. The new positions are seen as they are, however many.

        Raises:
            ValueError: more positions than the whole cache has room for.
        """
        if k.shape[1] > self.room:
            raise ValueError(f"{k.shape[1]} positions do not fit into a cache of {self.room}")
        start = (0, self.length, 0, 0)
        keys = jax.lax.dynamic_update_slice(self._all(self.k, self.new_k, q.dtype), k, start)
        values = jax.lax.dynamic_update_slice(self._all(self.v, self.new_v, q.dtype), v, start)
        bias = bias(q, keys) if callable(bias) else bias
        return attention(q, keys, values, mask=mask, bias=bias, **how), self._appended(k, v)

    def _all(self, few: Quantised, new: jax.Array, dtype: Any) -> jax.Array:
        """All positions, the newest as they are: [B, S, K, D]."""
        numbers = few.numbers(dtype)
        if not self.residual:
            return numbers
        places = jnp.where(self.held[0] < 0, self.room, self.held[0])  # the same in all rows
        return numbers.at[:, places].set(new.astype(dtype), mode="drop")

    def _appended(self, k: jax.Array, v: jax.Array) -> Self:
        count = k.shape[1]

        def put(few: Quantised, x: jax.Array) -> Quantised:
            more = Quantised.of(x, few.bits, self.group, few.step.dtype)
            return jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, self.length, 0, 0)), few, more
            )

        changes: dict[str, Any] = {"k": put(self.k, k), "v": put(self.v, v)}
        if self.residual:
            end = jnp.minimum(self.length + count, self.stop)
            at = newest(end, self.residual)
            changes["new_k"] = kept(self.new_k, k, self.length, end)
            changes["new_v"] = kept(self.new_v, v, self.length, end)
            changes["held"] = jnp.where(at >= self.length, at, self.held)
        return replace(self, **changes, length=self.length + count, stop=jnp.int32(NEVER))

    def rewound(self, length: Any) -> Self:
        length = jnp.asarray(length, jnp.int32)
        return replace(self, length=length, held=jnp.where(self.held < length, self.held, -1))

    def grown(self, room: int) -> Self:
        more = max(room - self.room, 0)
        k, v = (
            jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))), few) for few in (self.k, self.v)
        )
        return replace(self, k=k, v=v)

    def until(self, length: Any) -> Self:
        return replace(self, stop=jnp.asarray(length, jnp.int32))
