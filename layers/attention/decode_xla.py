"""A few queries against a long buffer on a CPU: only the part of it that is filled, or within a window, is read.

In decoding the buffer is as long as the text may become. What a token costs should follow from the length of the text
so far, so the keys are worked off in blocks, up to the last that the mask lets anybody see.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from formax.layers.attention.bias import by_pairs
from formax.layers.attention.decode import as_xla_slopes
from formax.layers.attention.kernel import NOTHING
from formax.layers.attention.problem import Problem

BLOCK = 256  # keys


def supports(p: Problem) -> str | None:
    """A few queries, all weights."""
    if p.q.shape[1] > 8:
        return f"{p.q.shape[1]} queries are more than 8"
    if p.dropout:
        return "drops no weights"
    return None


def suits(p: Problem) -> str | None:
    """Worth it when a part of the keys may be left out."""
    m, s = p.mask, p.k.shape[1]
    if s <= BLOCK:
        return f"{s} keys are no more than a block of {BLOCK}"
    left = (m.window or (None, None))[0]
    if m.kv_length is None and not m.causal and left is None:
        return "all keys are seen"
    return None


def attend(p: Problem) -> jax.Array:
    """See `formax.layers.attention.attention`."""
    b, t, s, h, heads = p.sizes
    groups, block = h // heads, min(BLOCK, s)
    q = p.q.reshape(b, t, heads, groups, p.q.shape[-1]) * jnp.asarray(p.scale, p.q.dtype)
    seen = p.mask.materialise(t, s)  # booleans of few queries are little beside the keys, and so are their terms
    added = None if p.bias is None else by_pairs(p.bias, t, s, p.mask.q_offset).astype(jnp.float32)

    def columns(x: jax.Array, start: jax.Array) -> jax.Array:
        """Of something that broadcasts to [B, H, T, S], as [B or 1, K or 1, G or 1, T or 1, block or 1]."""
        x = x if x.shape[3] == 1 else jax.lax.dynamic_slice_in_dim(x, start, block, axis=3)
        split = (heads, groups) if x.shape[1] > 1 else (1, 1)
        return x.reshape(x.shape[0], *split, *x.shape[2:])

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        sums, most, total = carry
        start = jnp.minimum(j * block, s - block)  # the last block begins earlier rather than end too late
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (p.k, p.v))
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
        if p.softcap is not None:
            scores = p.softcap * jnp.tanh(scores / p.softcap)
        if added is not None:
            scores = scores + columns(added, start)
        new = start + jnp.arange(block) >= j * block
        here = new if seen is None else new & columns(seen, start)
        scores = jnp.where(here, scores, NOTHING)
        largest = jnp.maximum(most, scores.max(-1))
        weights = jnp.where(here, jnp.exp(scores - largest[..., None]), 0)
        fade = jnp.exp(most - largest)
        more = jnp.einsum("bkgts,bskd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return fade[..., None] * sums + more, largest, fade * total + weights.sum(-1)

    shape = (b, heads, groups, t)
    if p.sinks is None:
        most, total = jnp.full(shape, NOTHING, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:  # a key that has a score and no value
        own = p.sinks.astype(jnp.float32).reshape(1, heads, groups, 1)
        most, total = jnp.broadcast_to(own, shape), jnp.ones(shape, jnp.float32)
    sums = jnp.zeros((*shape, p.v.shape[-1]), jnp.float32)
    sums, _, total = jax.lax.fori_loop(*blocks(p, block), step, (sums, most, total))
    out = sums / jnp.where(total > 0, total, 1)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, p.v.shape[-1]).astype(p.v.dtype)


def blocks(p: Problem, block: int) -> tuple[jax.Array, jax.Array]:
    """The first block of keys that any query of any row sees, and the last but one."""
    m, (_, t, s, _, _) = p.mask, p.sizes
    left, right = m.window or (None, None)
    first = jnp.asarray(m.q_offset, jnp.int32)
    end, start = jnp.asarray(s, jnp.int32), jnp.asarray(0, jnp.int32)
    if m.causal:
        end = jnp.minimum(end, first + t if m.prefix is None else jnp.maximum(first + t, m.prefix))
    if right is not None:
        end = jnp.minimum(end, first + t + right)
    if m.kv_length is not None:
        end = jnp.minimum(end, m.kv_length)
    if left is not None:
        start = jnp.maximum(start, first - left)
    return jnp.min(start) // block, -(-jnp.maximum(jnp.max(end), 0) // block)


attention = as_xla_slopes(attend)
