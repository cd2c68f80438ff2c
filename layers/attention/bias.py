"""Terms added to the attention scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from formax.core.spec import At, Initializer, Param, Spec


def relative_key_spec(name: str, max_positions: int, head_dim: int, init: Initializer) -> Spec:
    """A vector for every distance from -(max_positions - 1) to max_positions - 1, shared by all heads."""
    return At(name, {"embedding": Param((2 * max_positions - 1, head_dim), (None, None), "weight", init)})


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
