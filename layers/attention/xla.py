"""Attention in plain XLA operations: the reference of all backends, and the one that can show its weights.

On a CPU many queries are worked off in blocks whose scores stay in the cache: two to four times faster from about a
thousand queries on, and no table of all pairs is in memory, in the backward pass neither.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.layers.attention.mask import Mask, rows_from
from formax.layers.dropout import dropout as drop

# Bytes: scores up to the first are made at once; else blocks of about the second, which fits a core's cache.
WHOLE, BLOCK = 2**24, 2**21
LEAST = 16  # queries of a block


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    bias: jax.Array | None,
    scale: float,
    dropout: float,
    key: jax.Array | None,
) -> jax.Array:
    """See `formax.layers.attention.attention`. Taps: `scores` (before the softmax) and `weights`, both [B, H, T, S]."""
    whole = partial(at_once, scale=scale, dropout=dropout, key=key)
    rows = rows_of_block(q, k)
    # Weights that are looked at, or dropped by one draw for all pairs, are made at once.
    if rows >= q.shape[1] or tap.watched("scores", "weights") or (key is not None and dropout > 0):
        return whole(q, k, v, mask, bias)
    return jax.lax.platform_dependent(q, k, v, mask, bias, cpu=partial(in_blocks, whole, rows), default=whole)


def rows_of_block(q: jax.Array, k: jax.Array) -> int:
    """How many queries at a time: all, where the scores of all pairs are small."""
    row = 4 * q.shape[0] * q.shape[2] * k.shape[1]  # bytes of the scores of one query of every row and head
    return q.shape[1] if row * q.shape[1] <= WHOLE else max(LEAST, BLOCK // row)


def in_blocks(
    attend: Callable[..., jax.Array], rows: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, bias: Any
) -> jax.Array:
    """`attend` for `rows` queries at a time: [B, T, H, D] -> [B, T, H, Dv]."""
    t = q.shape[1]

    @jax.checkpoint
    def block(start: Any, q: jax.Array) -> jax.Array:
        count = q.shape[1]
        return attend(q, k, v, mask.of_queries(start, count), rows_from(bias, start, count))

    starts = jnp.arange(t // rows) * rows
    parts = jnp.moveaxis(q[:, : t // rows * rows].reshape(len(q), -1, rows, *q.shape[2:]), 1, 0)
    done = jax.lax.map(lambda item: block(*item), (starts, parts))
    out = jnp.moveaxis(done, 0, 1).reshape(len(q), -1, *done.shape[3:])
    rest = t % rows
    return jnp.concatenate([out, block(t - rest, q[:, t - rest :])], axis=1) if rest else out


def at_once(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    *,
    scale: float,
    dropout: float,
    key: jax.Array | None,
) -> jax.Array:
    """All pairs of queries and keys in one go."""
    b, t, h, d = q.shape
    s, groups = k.shape[1], k.shape[2]
    # Grouped heads share keys: [B, T, K, H/K, D]. The softmax runs in float32 for any input.
    split = (q * jnp.asarray(scale, q.dtype)).reshape(b, t, groups, h // groups, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", split, k, preferred_element_type=jnp.float32).reshape(b, h, t, s)
    if bias is not None:
        scores = scores + bias
    scores = tap.tap("scores", scores)
    allowed = mask.materialise(t, s)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if allowed is not None:
        # Once more for queries that may look nowhere: where all scores are equally low, all keys would get a share.
        weights = jnp.where(allowed, weights, 0)
    weights = tap.tap("weights", drop(weights, dropout, key).astype(v.dtype))
    out = jnp.einsum("bkgts,bskd->btkgd", weights.reshape(b, groups, h // groups, t, s), v)
    return out.reshape(b, t, h, v.shape[-1])
