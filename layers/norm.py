"""Normalisation over the embedding axis, computed in float32 whatever the activations' dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from formax.core.spec import At, Param, Spec, ones, zeros


def layer_spec(name: str, size: int) -> Spec:
    """Scale and bias of layer normalisation (Ba et al. 2016); checkpoints of 2018 call them gamma and beta."""
    return At(
        name,
        {
            "scale": Param((size,), ("embed",), "weight", ones, also=("gamma",)),
            "bias": Param((size,), ("embed",), "bias", zeros, also=("beta",)),
        },
    )


def layer(p: dict[str, Any], x: jax.Array, eps: float) -> jax.Array:
    """Layer normalisation, [..., E] -> [..., E]."""
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    var = jnp.square(y - mean).mean(-1, keepdims=True)
    y = (y - mean) * jax.lax.rsqrt(var + eps)
    return (y * p["scale"].astype(jnp.float32) + p["bias"].astype(jnp.float32)).astype(x.dtype)
