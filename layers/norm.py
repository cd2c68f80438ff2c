"""Normalisation, computed in float32 whatever the activations' dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.spec import At, Ignored, Param, Spec, constant, ones, zeros


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


def rms_spec(name: str, size: int) -> Spec:
    """Scale of root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return At(name, {"scale": Param((size,), ("embed",), "weight", ones)})


def rms(p: dict[str, Any], x: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation, [..., E] -> [..., E]; scaled in the dtype of `x`, as checkpoints were trained."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype) * p["scale"].astype(x.dtype)


def rms_plus_one_spec(name: str, size: int) -> Spec:
    """Scale of `rms_plus_one`, kept as its distance from 1."""
    return At(name, {"scale": Param((size,), ("embed",), "weight", zeros)})


def rms_plus_one(p: dict[str, Any], x: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation as Gemma has it, [..., E] -> [..., E]: times 1 + scale, all in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * (1 + p["scale"].astype(jnp.float32))).astype(x.dtype)


def layer_scale_spec(name: str, size: int, value: float) -> dict[str, Spec]:
    """A factor for every channel, `value` at first (LayerScale, Touvron et al. 2021, arXiv:2103.17239)."""
    return {"scale": Param((size,), ("embed",), name, constant(value))}


def layer_scale(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """What a part of a layer adds, scaled by channel, [..., E] -> [..., E]."""
    return x * p["scale"].astype(x.dtype)


def group(p: dict[str, Any], x: jax.Array, groups: int, eps: float) -> jax.Array:
    """Group normalisation (Wu and He 2018) of channels-last maps, [B, *spatial, C] -> [B, *spatial, C].

    Mean and variance are those of a group of channels over all places of one row. Parameters as of `layer_spec`.
    """
    y = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = y.mean((1, 3), keepdims=True)
    var = jnp.square(y - mean).mean((1, 3), keepdims=True)
    y = ((y - mean) * jax.lax.rsqrt(var + eps)).reshape(x.shape)
    return (y * p["scale"].astype(jnp.float32) + p["bias"].astype(jnp.float32)).astype(x.dtype)


def batch_spec(name: str, size: int) -> Spec:
    """Batch normalisation (Ioffe and Szegedy 2015): scale, bias, and as buffers the running statistics and a count."""
    count = Param((), (), "num_batches_tracked", zeros, buffer=True, optional=True, stored_as="int64")
    return At(name, {**_batch_leaves(size), "count": count})


def _batch_leaves(size: int) -> dict[str, Param]:
    return {
        "scale": Param((size,), ("conv_out",), "weight", ones),
        "bias": Param((size,), ("conv_out",), "bias", zeros),
        "mean": Param((size,), ("conv_out",), "running_mean", zeros, buffer=True),
        "var": Param((size,), ("conv_out",), "running_var", ones, buffer=True),
    }


def frozen_batch_spec(name: str, size: int) -> Spec:
    """A batch norm whose parameters are all statistics, none of them trained, and whose batches are not counted."""
    frozen = {key: replace(leaf, buffer=True) for key, leaf in _batch_leaves(size).items()}
    return At(name, {**frozen, "count": Ignored("num_batches_tracked")})


def batch(
    p: dict[str, Any],
    x: jax.Array,
    eps: float = 1e-5,
    *,
    momentum: float = 0.1,
    key: jax.Array | None = None,
    name: str = "norm",
) -> jax.Array:
    """Batch normalisation of channels-last maps, [B, *spatial, C] -> [B, *spatial, C].

    Without a key (inference) by the running statistics. With one (training) by the batch's own; the new running
    statistics are then the places `mean`, `var` and `count` in the scope `name`, which are the paths of the buffers in
    the parameter tree: a training step writes back what it finds there.
    """
    y = x.astype(jnp.float32)
    mean, var = p["mean"].astype(jnp.float32), p["var"].astype(jnp.float32)
    if key is not None:
        places = tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        old = mean, var
        mean, var = y.mean(places), y.var(places)
        with tap.scope(name):
            unbiased = var * (count / max(count - 1, 1))
            for part, before, now in (("mean", old[0], mean), ("var", old[1], unbiased)):
                tap.tap(part, ((1 - momentum) * before + momentum * now).astype(p[part].dtype))
            if "count" in p:
                tap.tap("count", p["count"] + 1)
    scale = p["scale"].astype(jnp.float32) * jax.lax.rsqrt(var + eps)
    return (y * scale + (p["bias"].astype(jnp.float32) - mean * scale)).astype(x.dtype)
