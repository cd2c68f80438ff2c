"""Attention in plain XLA operations: the reference of all backends, and the one that can show its weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.layers.attention.mask import Mask
from formax.layers.dropout import dropout as drop


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
