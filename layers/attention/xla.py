"""Attention in plain XLA operations: the reference of all backends, and the one that can show its weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.layers.attention.bias import by_pairs
from formax.layers.attention.problem import Problem
from formax.layers.dropout import dropout


def supports(p: Problem) -> str | None:
    """Everything: this backend is the measure of the others."""
    return None


def suits(p: Problem) -> str | None:
    """Always: it is asked last."""
    return None


def attention(p: Problem) -> jax.Array:
    """All pairs of queries and keys at once. Taps: `scores` (before the softmax) and `weights`, both [B, H, T, S]."""
    b, t, s, h, groups = p.sizes
    # Grouped heads share keys: [B, T, K, H/K, D]. The softmax runs in float32 for any input.
    q = (p.q * jnp.asarray(p.scale, p.q.dtype)).reshape(b, t, groups, h // groups, p.q.shape[-1])
    scores = jnp.einsum("btkgd,bskd->bkgts", q, p.k, preferred_element_type=jnp.float32).reshape(b, h, t, s)
    if p.softcap is not None:
        scores = p.softcap * jnp.tanh(scores / p.softcap)
    if p.bias is not None:
        scores = scores + by_pairs(p.bias, t, s, p.mask.q_offset)
    scores = tap.tap("scores", scores)
    allowed = p.mask.materialise(t, s)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    if p.sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:  # one key more, which has a score and no value
        sinks = jnp.broadcast_to(p.sinks.astype(scores.dtype)[:, None, None], (b, h, t, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    if allowed is not None:
        # Once more for queries that may look nowhere: where all scores are equally low, all keys would get a share.
        weights = jnp.where(allowed, weights, 0)
    weights = tap.tap("weights", dropout(weights, p.dropout, p.key).astype(p.v.dtype))
    out = jnp.einsum("bkgts,bskd->btkgd", weights.reshape(b, groups, h // groups, t, s), p.v)
    return out.reshape(b, t, h, p.v.shape[-1])
