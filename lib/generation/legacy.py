"""Caches as tuples of arrays, which transformers had before its caches were classes: `past_key_values` of old code.

A tuple has an entry a layer: keys and values [B, K, T, D] of the positions read, and for decoders that look at an
encoder its keys and values [B, K, S, D] after them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from formax.layers.attention.cache import CrossCache, KVCache, caches_of, map_caches
from formax.model import Model

Legacy = tuple[tuple[Array, ...], ...]


def is_legacy(cache: Any) -> bool:
    """Whether this is such a tuple."""
    return isinstance(cache, tuple | list) and bool(cache) and all(_is_layer(layer) for layer in cache)


def _is_layer(layer: Any) -> bool:
    return isinstance(layer, tuple | list) and len(layer) in (2, 4) and all(jnp.ndim(x) == 4 for x in layer)


def to_legacy_cache(cache: Any) -> Legacy:
    """A model's caches as a tuple of arrays.

    Raises:
        TypeError: caches that keep something else than all keys and values.
        ValueError: rows that have seen different numbers of positions.
    """
    layers = []
    for layer in cache:
        own: list[Array] = []
        for one in caches_of(layer):
            if not isinstance(one, KVCache):
                raise TypeError(f"a {type(one).__name__} is not keys and values of all positions, as such tuples are")
            if one.length.ndim:
                raise ValueError("this cache holds texts of different lengths, which such tuples cannot")
            end = one.room if isinstance(one, CrossCache) else int(one.length)
            own += [x[:, :end].swapaxes(1, 2) for x in (one.k, one.v)]
        layers.append(tuple(own))
    return tuple(layers)


def from_legacy_cache(model: Model, past: Any) -> Any:
    """A model's caches out of a tuple of arrays.

    Args:
        model: whose they are.
        past: an entry a layer, of [B, K, T, D] arrays: keys, values, and those of an encoder's states.

    Raises:
        ValueError: another number of layers, or other shapes than the model's.
    """
    if not is_legacy(past):
        raise ValueError("past_key_values must have an entry a layer: two or four arrays [batch, heads, length, size]")
    batch, _, length, _ = past[0][0].shape
    empty = model.init_cache(batch, length, past[0][2].shape[2] if len(past[0]) == 4 else 0)
    arrays = [layer[i : i + 2] for layer in past for i in range(0, len(layer), 2)]
    if len(arrays) != len(caches_of(empty)):
        raise ValueError(f"past_key_values has {len(past)} layers, not those of this {model.architecture.name}")
    each = iter(arrays)

    def filled(one: Any) -> Any:
        k, v = (jnp.asarray(x).swapaxes(1, 2) for x in next(each))
        if not isinstance(one, KVCache) or (k.shape, v.shape) != (one.k.shape, one.v.shape):
            raise ValueError(f"past_key_values: {type(one).__name__} {one.k.shape} of the model, {k.shape} given")
        return replace(one, k=k.astype(one.k.dtype), v=v.astype(one.v.dtype), length=jnp.int32(k.shape[1]))

    return map_caches(filled, empty)
