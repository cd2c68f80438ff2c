"""Look-up tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.spec import At, Initializer, Param


def embedding_spec(
    name: str,
    rows: int,
    size: int,
    *,
    init: Initializer,
    axes: tuple[str | None, str | None] = ("vocab", "embed"),
    tf: str | None = None,
) -> At:
    """`embedding` (rows, size), stored as `name.weight`; `tf` is what TensorFlow calls it if not "embeddings"."""
    return At(name, {"embedding": Param((rows, size), axes, "weight", init, tf=tf)})


def embed(p: dict[str, Any], ids: jax.Array) -> jax.Array:
    """Rows of the table: ids [...] -> [..., size]. Ids outside the table give the nearest row."""
    return jnp.take(p["embedding"], ids, axis=0, mode="clip")


def positions(offset: Any, x: jax.Array) -> jax.Array:
    """Positions of states x [B, T, ...] of which the first is at `offset`, one number or [B]: int [1 or B, T]."""
    return jnp.reshape(offset, (-1, 1)) + jnp.arange(x.shape[1])


def positions_of_tokens(seen: jax.Array | None, offset: Any, x: jax.Array) -> jax.Array:
    """Positions of states x [B, T, ...] as the numbers of tokens that are no padding: int [1 or B, T].

    Args:
        seen: [B, S] which of all tokens up to here, or of a longer buffer, are no padding; None for all of them.
        offset: where among them the first state is, one number or [B].
        x: the states. Padding is at position -1.
    """
    at = positions(offset, x)
    if seen is None:
        return at
    numbers = jnp.where(seen, jnp.cumsum(seen, axis=1) - 1, -1)
    return jnp.take_along_axis(numbers, jnp.broadcast_to(at, (len(numbers), at.shape[1])), axis=1, mode="clip")


def logits(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """The table as a tied output projection: [..., size] -> [..., rows]."""
    return jnp.einsum("...e,ve->...v", x, p["embedding"].astype(x.dtype))


def sinusoids(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """The waves of `waves` at positions 0, 1, ...: [positions, size]. An initialiser."""
    rows, size = shape
    return waves(jnp.arange(rows), size).astype(dtype)


def waves(positions: jax.Array, size: int) -> jax.Array:
    """Sines, then cosines, of waves from 2 pi to 20000 pi long, at positions [...]: float32 [..., size].

    As many sines as cosines, so that `size` must be even, and at least 4.
    """
    rates = jnp.exp(-math.log(10000) / (size // 2 - 1) * jnp.arange(size // 2))
    angles = positions[..., None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def vaswani(key: jax.Array | None, shape: Sequence[int], dtype: Any) -> jax.Array:
    """The positions of Vaswani et al. 2017, all sines before all cosines: [positions, size]. An initialiser.

    The waves are from 2 pi to almost 20000 pi long, where those of `sinusoids` end at that; of an odd size one more is
    a sine. Angles are in double precision, as far positions turn many times.
    """
    rows, size = shape
    angles = np.arange(rows)[:, None] * 10000.0 ** (-2 * np.arange((size + 1) // 2) / size)
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles[:, : size // 2])], axis=1), dtype)


def vaswani_in_pairs(key: jax.Array | None, shape: Sequence[int], dtype: Any) -> jax.Array:
    """The same as the paper has them, sine and cosine of every wave side by side. An initialiser."""
    rows, size = shape
    return vaswani(key, (rows, size), dtype)[:, np.argsort(np.r_[0:size:2, 1:size:2])]


def check_inputs(
    input_ids: jax.Array | None, inputs_embeds: jax.Array | None, limit: int | None, prefix: str = ""
) -> None:
    """Refuses inputs that cannot be meant; `prefix` is that of their names ("decoder_").

    Raises:
        ValueError: not exactly one of ids [B, T] and vectors [B, T, E], another rank, no position at all, or more than
            `limit` (None where positions have no table).
    """
    if (input_ids is None) == (inputs_embeds is None):
        both = ", not both" if input_ids is not None else ""
        raise ValueError(f"give either {prefix}input_ids or {prefix}inputs_embeds{both}")
    name, x, rank = ("input_ids", input_ids, 2) if inputs_embeds is None else ("inputs_embeds", inputs_embeds, 3)
    name = prefix + name
    assert x is not None
    if x.ndim != rank:
        form = "[batch, length]" if rank == 2 else "[batch, length, size]"
        raise ValueError(f"{name} must be {form}, got shape {x.shape}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} of shape {x.shape} has no positions; give at least one token a row")
    if limit is not None and x.shape[1] > limit:
        raise ValueError(
            f"{name} has {x.shape[1]} positions, the model has {limit} (max_position_embeddings); truncate the input"
        )
