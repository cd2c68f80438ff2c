"""State-space layers: a causal convolution over the last few positions, and a linear recurrence over all of them.

Both work on a whole sequence at once and hand out the state after it, from which the next positions go on. Letters
beside those of the package: C channels, N numbers of the state of a channel, W width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core.spec import Initializer
from formax.layers.attention.cache import Cache

# Positions whose states are in memory at once.
CHUNK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MambaCache(Cache):
    """What a layer keeps of the positions seen: inputs of the convolution [B, W - 1, C], state [B, C, N], how many."""

    conv: jax.Array
    state: jax.Array
    length: jax.Array
    recurrent: ClassVar[bool] = True

    @staticmethod
    def empty(batch: int, channels: int, width: int, size: int, dtype: Any = jnp.float32) -> MambaCache:
        """Nothing seen; the state is float32 whatever `dtype`, since it sums over all positions."""
        conv, state = jnp.zeros((batch, width - 1, channels), dtype), jnp.zeros((batch, channels, size), jnp.float32)
        return MambaCache(conv, state, jnp.zeros((), jnp.int32))


def tokens_seen(mask: jax.Array | None, x: jax.Array, offset: Any) -> jax.Array | None:
    """A padding mask for the positions at hand, [B, T, 1] in the dtype of `x` [B, T, E].

    Args:
        mask: [B, T], or [B, S] from the first position on; what lies beyond it is no padding.
        x: states of the positions.
        offset: how many positions there were before.

    Raises:
        ValueError: another number of dimensions, or fewer columns than positions.
    """
    if mask is None:
        return None
    length = x.shape[1]
    if mask.ndim != 2 or mask.shape[1] < length:
        raise ValueError(f"attention_mask must be [batch, length], for {x.shape[:2]} at least, got {mask.shape}")
    if mask.shape[1] > length:
        mask = jnp.pad(mask, ((0, 0), (0, length)), constant_values=1)
        mask = jax.lax.dynamic_slice_in_dim(mask, offset, length, axis=1)
    return (mask != 0).astype(x.dtype)[..., None]


def causal_conv(p: dict[str, Any], x: jax.Array, before: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Every channel's convolution with its own kernel [W, 1, C]: [B, T, C] -> ([B, T, C], the last W - 1 inputs).

    `before` [B, W - 1, C] are the inputs before the first, zeros by default.
    """
    kernel, length = p["kernel"].astype(x.dtype), x.shape[1]
    if before is None:
        before = jnp.zeros((len(x), len(kernel) - 1, x.shape[2]), x.dtype)
    seen = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    y = sum((seen[:, i : i + length] * tap for i, tap in enumerate(kernel[:, 0])), start=jnp.zeros_like(x))
    return y + p["bias"].astype(x.dtype) if "bias" in p else y, seen[:, length:]


def selective_scan(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The recurrence h = exp(dt a) h + dt b x, y = c h of Mamba (Gu and Dao 2023, arXiv:2312.00752), in float32.

    A single position is a step of the recurrence. More are scanned chunk by chunk: the states of a chunk are in memory
    at once (and computed again in the backward pass), so memory grows with T C and not with T C N.

    Args:
        x: input [B, T, C].
        dt: positive steps [B, T, C].
        a: negative rates [C, N].
        b: how the input enters the state, [B, T, N].
        c: how the state is read, [B, T, N].
        state: h before the first position, [B, C, N], zeros by default.

    Returns:
        y [B, T, C] in the dtype of x, and h after the last position, float32.
    """
    dtype, (rows, length, channels) = x.dtype, x.shape
    parts = [each.astype(jnp.float32) for each in (dt * x, dt, b, c)]
    a = a.astype(jnp.float32)
    h = jnp.zeros((rows, channels, a.shape[1])) if state is None else state.astype(jnp.float32)
    if length == 1:
        h, y = _step(h, a, *(each[:, 0] for each in parts))
        return y[:, None].astype(dtype), h

    size = min(CHUNK, length)
    # Positions of no length fill up the last chunk: they change no state.
    parts = [jnp.pad(each, ((0, 0), (0, -length % size), (0, 0))) for each in parts]
    chunks = [jnp.moveaxis(each.reshape(rows, -1, size, each.shape[-1]), 1, 0) for each in parts]

    @jax.checkpoint
    def chunk(h: jax.Array, parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.platform_dependent(h, a, *parts, cpu=_one_by_one, default=_at_once)

    h, y = jax.lax.scan(chunk, h, chunks)
    return jnp.moveaxis(y, 0, 1).reshape(rows, -1, channels)[:, :length].astype(dtype), h


def _at_once(h: jax.Array, a: jax.Array, dx: jax.Array, dt: jax.Array, b: jax.Array, c: jax.Array) -> Any:
    """A chunk as an associative scan, in about log2 of its length steps: (state after it, y [B, T, C])."""

    def compose(first: Any, second: Any) -> Any:
        return first[0] * second[0], second[0] * first[1] + second[1]

    pairs = jnp.exp(dt[..., None] * a), dx[..., None] * b[:, :, None]
    decay, added = jax.lax.associative_scan(compose, pairs, axis=1)
    states = decay * h[:, None] + added
    return states[:, -1], jnp.einsum("btcn,btn->btc", states, c)


def _one_by_one(h: jax.Array, a: jax.Array, *parts: jax.Array) -> Any:
    """The same step by step, which is less work: faster where arithmetic and not the number of steps takes the time."""

    def step(h: jax.Array, now: tuple[jax.Array, ...]) -> Any:
        return _step(h, a, *now)

    h, y = jax.lax.scan(step, h, tuple(jnp.moveaxis(each, 1, 0) for each in parts))
    return h, jnp.moveaxis(y, 0, 1)


def _step(h: jax.Array, a: jax.Array, dx: jax.Array, dt: jax.Array, b: jax.Array, c: jax.Array) -> Any:
    """One position: h [B, C, N], dx and dt [B, C], b and c [B, N] -> (h, y [B, C])."""
    h = jnp.exp(dt[..., None] * a) * h + dx[..., None] * b[:, None]
    return h, jnp.einsum("bcn,bn->bc", h, c)


# ---- initial values -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def uniform(bound: float) -> Initializer:
    """Uniform between -bound and bound."""

    def draw(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw


def log_range(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Rows of log 1 to log N, [C, N]: the rates of S4D (Gu et al. 2022, arXiv:2206.11893)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32)), shape).astype(dtype)


@lru_cache(maxsize=256)
def step_bias(low: float, high: float, floor: float) -> Initializer:
    """Biases whose softplus is spread evenly over the orders of magnitude from `low` to `high`, at least `floor`."""

    def draw(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        steps = jnp.exp(jax.random.uniform(key, shape, jnp.float32, jnp.log(low), jnp.log(high)))
        steps = jnp.maximum(steps, floor)
        return (steps + jnp.log(-jnp.expm1(-steps))).astype(dtype)

    return draw
