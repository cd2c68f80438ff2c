"""Terms added to the attention scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.spec import At, Initializer, Param, Spec


def relative_key_spec(name: str, max_positions: int, head_dim: int, init: Initializer) -> Spec:
    """A vector for every distance from -(max_positions - 1) to max_positions - 1, shared by all heads."""
    table = Param((2 * max_positions - 1, head_dim), (None, None), "weight", init)
    return At(name, {"embedding": table}, flax="", tf="")


def relative_key_bias(p: dict[str, Any], q: jax.Array, k: jax.Array, *, key_too: bool, q_offset: Any = 0) -> jax.Array:
    """Scores of queries (and keys) against the vector of their distance, scaled as the other scores: [B, H, T, S].

    Shaw et al. 2018, arXiv:1803.02155 (queries); Huang et al. 2020, arXiv:2009.13658 (queries and keys: `key_too`).
    Every vector is scored once and then picked by distance, so that nothing of size T x S x D is made.
    """
    table = p["embedding"].astype(q.dtype)
    t, s = q.shape[1], k.shape[1]
    distance = jnp.arange(t)[:, None] + q_offset - jnp.arange(s)[None, :] + (table.shape[0] - 1) // 2  # [T, S]
    bias = jnp.take_along_axis(jnp.einsum("bthd,rd->bhtr", q, table), distance[None, None], axis=-1, mode="clip")
    if key_too:
        of_keys = jnp.einsum("bshd,rd->bhsr", k, table)
        bias = bias + jnp.take_along_axis(of_keys, distance.T[None, None], axis=-1, mode="clip").swapaxes(-1, -2)
    return bias * q.shape[-1] ** -0.5


def bucketed_spec(name: str, buckets: int, heads: int, init: Initializer) -> Spec:
    """A number for every bucket of distances and every head (Raffel et al. 2019, arXiv:1910.10683)."""
    return At(name, {"embedding": Param((buckets, heads), (None, "heads"), "weight", init)})


def buckets(distances: int, count: int, max_distance: int) -> np.ndarray:
    """Bucket of the distances 0 to `distances` - 1: half of the `count` hold one distance each, the rest ever more.

    Distances from `max_distance` on share the last one. Made here rather than in the program, since the logarithm of
    another compiler may fall on the other side of a whole number.
    """
    exact = count // 2
    n = np.arange(distances)
    log = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    far = exact + (log * np.float32(count - exact)).astype(np.int32)
    return np.where(n < exact, n, np.minimum(far, count - 1)).astype(np.int32)


def bucketed_bias(
    p: dict[str, Any], t: int, s: int, *, both_ways: bool, max_distance: int, q_offset: Any = 0
) -> jax.Array:
    """The number of each pair's distance, for t queries from position `q_offset` and s keys: [1, H, t, s].

    `both_ways`: half of the buckets are for keys after the query; else those are all at distance 0.
    """
    table = p["embedding"]
    count = table.shape[0] // 2 if both_ways else table.shape[0]
    ahead = jnp.arange(s)[None, :] - (jnp.arange(t)[:, None] + q_offset)  # [t, s], positive for keys after the query
    distance = jnp.abs(ahead) if both_ways else jnp.maximum(-ahead, 0)
    found = jnp.take(jnp.asarray(buckets(max_distance + 1, count, max_distance)), distance, mode="clip")
    if both_ways:
        found = found + jnp.where(ahead > 0, count, 0)
    return jnp.take(table, found, axis=0, mode="clip").transpose(2, 0, 1)[None]
