"""Attention of long texts in blocks: to tokens nearby, and to sums of those further away (Guo et al. 2021, LongT5).

arXiv:2112.07916. A query sees less than a block's length of keys to either side, which lie in its own block, the one
before and the one after; so scores are a band [blocks, L, 3 L] rather than T x T. It may also see the text in short,
a few states for many tokens. Both cost as much again for a text as long again, or nearly.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.layers.dropout import dropout


def in_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [B, N, size, ...], filled up with zeros."""
    fill = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, fill).reshape(x.shape[0], -(-x.shape[1] // size), size, *x.shape[2:])


def with_neighbours(x: jax.Array) -> jax.Array:
    """Each block behind the one before and in front of the one after: [B, N, L, ...] -> [B, N, 3 L, ...].

    Before the first and after the last one are zeros.
    """
    fill = [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, fill)
    return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    size: int,
    *,
    keys: jax.Array | None,
    bias: Callable[[jax.Array], jax.Array],
    side: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Attention to keys less than `size` away, with scores that are not scaled.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, T, H, D].
        v: values [B, T, H, D].
        size: length L of a block.
        keys: [B or 1, T] booleans, the keys that exist; None for all.
        bias: `bias(ahead)`, terms for keys so many positions after their query: [L, 3 L] -> [H, L, 3 L].
        side: (keys [B, G, H, D], values [B, G, H, D], terms [B or 1, H, T, G], booleans [B or 1, G]) of what all
            queries see besides, as far as it exists.
        rate: of the dropout of weights, with a `key`.
        key: random key.

    Returns:
        [B, T, H, D]; queries that may look nowhere give zeros. Taps: `scores` and `weights` [B, H, N, L, 3 L + G], and
        `blocks`, the weights as the reference has them, [B, N, H, L, 3 L + G].
    """
    length = q.shape[1]
    q, k, v = in_blocks(q, size), with_neighbours(in_blocks(k, size)), with_neighbours(in_blocks(v, size))
    exist = jnp.ones((1, length), bool) if keys is None else keys
    exist = with_neighbours(in_blocks(exist, size))[:, None, :, None]  # [B or 1, 1, N, 1, 3 L]
    ahead = jnp.arange(3 * size) - size - jnp.arange(size)[:, None]
    scores = jnp.einsum("bnqhd,bnkhd->bhnqk", q, k, preferred_element_type=jnp.float32)
    scores = scores + bias(ahead)[None, :, None]
    allowed = jnp.broadcast_to(exist & (jnp.abs(ahead) < size), (*exist.shape[:3], *ahead.shape))
    if side is not None:
        side_k, side_v, terms, there = side
        terms = jnp.moveaxis(in_blocks(jnp.moveaxis(terms, 2, 1), size), 3, 1)  # [B or 1, H, N, L, G]
        more = jnp.einsum("bnqhd,bghd->bhnqg", q, side_k, preferred_element_type=jnp.float32) + terms
        scores = jnp.concatenate([scores, more], axis=-1)
        there = jnp.broadcast_to(there[:, None, None, None], (len(there), *allowed.shape[1:4], there.shape[1]))
        rows = max(len(allowed), len(there))
        allowed = jnp.concatenate([jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (allowed, there)], axis=-1)
    scores = tap.tap("scores", scores)
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min), axis=-1)
    weights = tap.tap("weights", dropout(jnp.where(allowed, weights, 0), rate, key).astype(v.dtype))
    tap.tap("blocks", jnp.moveaxis(weights, 1, 2))
    out = jnp.einsum("bhnqk,bnkhd->bnqhd", weights[..., : 3 * size], v)
    if side is not None:
        out = out + jnp.einsum("bhnqg,bghd->bnqhd", weights[..., 3 * size :], side_v)
    return out.reshape(out.shape[0], out.shape[1] * size, *out.shape[3:])[:, :length]


def summed_blocks(keys: jax.Array | None, length: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Which sum every token of a text is part of, where each is of `size` tokens and the last one also of the rest.

    Args:
        keys: [B, T] booleans, the tokens that are no padding; None for all.
        length: T.
        size: tokens a sum.

    Returns:
        [B or 1, T] the number of its sum, -1 for padding and in a text without a whole block; [B or 1, T // size]
        whether there is such a sum.
    """
    keys = jnp.ones((1, length), bool) if keys is None else keys
    places = jnp.arange(length)
    # Ends of blocks are counted, so that padding on the left takes from the last ones; as the reference does.
    last = (keys & (places % size == size - 1)).sum(1, keepdims=True) - 1
    which = jnp.where(keys, jnp.minimum(places // size, last), -1)
    return which, jnp.arange(length // size) <= which.max(1, keepdims=True)


def block_sums(x: jax.Array, which: jax.Array, count: int) -> jax.Array:
    """Sums of states, in float32: [B, T, E] and the number of each one's sum [B or 1, T] -> [B, count, E]."""
    which = jnp.broadcast_to(jnp.where(which < 0, count, which), x.shape[:2])
    rows = jnp.arange(len(x))[:, None]
    sums = jnp.zeros((len(x), count, x.shape[2]), jnp.float32)
    return sums.at[rows, which].add(x.astype(jnp.float32), mode="drop").astype(x.dtype)
