"""Dropout, on exactly when a key is given."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate`, scales the rest by 1 / (1 - rate); `x` itself when `key` is None."""
    if key is None or rate == 0.0:
        return x
    if rate == 1.0:
        return jnp.zeros_like(x)  # the quotient below would be infinite, and its gradient no number
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def layer_drop(before: jax.Array, x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """A layer left out as a whole, with probability `rate` (LayerDrop, Fan et al. 2019, arXiv:1909.11556).

    What went into it and what came out, both [B, T, E] -> one of them; what came out when `key` is None.
    """
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, rate), before, x)


def drop_path(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """What a part of a layer adds, left out of whole rows with probability `rate`; others times 1 / (1 - rate).

    Stochastic depth (Huang et al. 2016, arXiv:1603.09382): [B, ...] -> [B, ...]; `x` itself when `key` is None.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (len(x), *[1] * (x.ndim - 1)))
    return jnp.where(keep, x / jnp.where(rate == 1.0, 1.0, 1.0 - rate), 0).astype(x.dtype)
