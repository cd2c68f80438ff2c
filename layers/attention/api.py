"""One function for attention, and the layer around it that families use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.spec import Initializer, Spec
from formax.layers.attention import backends
from formax.layers.attention.bias import Bias
from formax.layers.attention.mask import Mask
from formax.layers.attention.problem import problem
from formax.layers.linear import linear, linear_spec

if TYPE_CHECKING:
    from formax.layers.attention.cache import KVCache


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout: float | None = None,
    key: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D]; K divides H, and heads share keys in groups of H / K.
        v: values [B, S, K, Dv].
        mask: what may be looked at; everything by default.
        bias: added to the scaled scores: `ALiBi`, `Bucketed`, `Indexed`, or an array that broadcasts to [B, H, T, S].
        scale: factor on the scores, 1 / sqrt(D) by default.
        softcap: scores go through softcap * tanh(scores / softcap), before the bias (Gemma 2, arXiv:2408.00118).
        sinks: [H] a score that every query has beside those of its keys, and that has no value (gpt-oss,
            arXiv:2508.10925; Xiao et al. 2023, arXiv:2309.17453).
        dropout: rate for the weights, applied when `key` is given.
        key: random key.
        backend: one of `backends.BACKENDS`; by default the first that supports this call and is worth it, which
            `explain_attention` names.

    Returns:
        [B, T, H, Dv]; rows that may look nowhere are zero.

    Raises:
        ValueError: ranks, batches, lengths, head counts or masks that do not fit, with both shapes; a named backend
            that does not exist.
        TypeError: dtypes that differ or are no floating-point numbers.
        NotImplementedError: a named backend that cannot do this, with the reason.
    """
    given = problem(q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout, key=key)
    return backends.run(given, backend)


def attention_spec(
    size: int,
    heads: int,
    head_dim: int,
    *,
    names: tuple[str, str, str, str],
    init: Initializer | Mapping[str, Initializer],
    kv_heads: int | None = None,
    kv_size: int | None = None,
    bias: bool | str = True,
) -> dict[str, Spec]:
    """`q`, `k`, `v`, `o` projections, stored under the four `names`.

    `kv_size` is the width that keys are made from; `bias` may name the projections that have one ("qvo"), `init` be one
    initialiser for each.
    """
    kv = (kv_heads or heads) * head_dim
    shapes: dict[str, tuple[int, int, tuple[str, str]]] = {
        "q": (size, heads * head_dim, ("embed", "heads")),
        "k": (kv_size or size, kv, ("embed", "kv_heads")),
        "v": (kv_size or size, kv, ("embed", "kv_heads")),
        "o": (heads * head_dim, size, ("heads", "embed")),
    }
    biased = bias if isinstance(bias, str) else "qkvo" * bias
    inits = init if isinstance(init, Mapping) else dict.fromkeys(shapes, init)
    return {
        part: linear_spec(name, d_in, d_out, axes, init=inits[part], bias=part in biased)
        for name, (part, (d_in, d_out, axes)) in zip(names, shapes.items(), strict=True)
    }


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[B, T, heads * D] -> [B, T, heads, D]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, T, heads, D] -> [B, T, heads * D]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def self_attention(
    p: dict[str, Any],
    x: jax.Array,
    head_dim: int,
    *,
    mask: Mask,
    rotate: Callable[[jax.Array], jax.Array] | None = None,
    rotate_values: Callable[[jax.Array], jax.Array] | None = None,
    bias: Any = None,
    scale: float | None = None,
    cache: KVCache | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    name: str = "attn",
) -> tuple[jax.Array, KVCache | None]:
    """Multi-head self-attention, [B, T, E] -> ([B, T, E], the cache with these T positions).

    The number of heads is what the kernels hold (a pruned layer has fewer). `rotate` puts positions into queries and
    keys (`layers.rope`), `rotate_values` into values. `bias` is as for `attention`, or a function of (q, k) that gives
    one. With a cache, keys are the buffer's S positions and `mask` must hide the unfilled ones, as a causal mask at
    `q_offset=cache.length` does.
    Taps, under `name`: `q`, `k`, `v`, `scores`, `weights`, `out`.
    """
    with tap.scope(name):
        q, k, v = (split_heads(linear(p[part], x), head_dim) for part in ("q", "k", "v"))
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if rotate_values is not None:
            v = rotate_values(v)
        q, k, v = tap.tap("q", q), tap.tap("k", k), tap.tap("v", v)
        how: dict[str, Any] = {"mask": mask, "scale": scale, "dropout": dropout, "key": key}
        if cache is not None:
            out, cache = cache.attend(q, k, v, bias=bias, **how)
        else:
            out = attention(q, k, v, bias=bias(q, k) if callable(bias) else bias, **how)
        return tap.tap("out", linear(p["o"], merge_heads(out))), cache


def cross_attention(
    p: dict[str, Any],
    x: jax.Array,
    memory: jax.Array | None,
    head_dim: int,
    *,
    mask: Mask,
    scale: float | None = None,
    cache: KVCache | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    name: str = "cross",
) -> tuple[jax.Array, KVCache | None]:
    """Attention from `x` [B, T, E] to `memory` [B, S, E']; the same taps as `self_attention`, under `cross`.

    Keys and values of the memory are computed when it is given, and kept in the cache; later calls pass None for
    `memory` and use the cache.
    """
    with tap.scope(name):
        q = tap.tap("q", split_heads(linear(p["q"], x), head_dim))
        if memory is not None:
            k, v = (tap.tap(part, split_heads(linear(p[part], memory), head_dim)) for part in ("k", "v"))
            if cache is not None:
                filled = jnp.asarray(k.shape[1], jnp.int32)
                cache = replace(cache, k=k.astype(cache.k.dtype), v=v.astype(cache.v.dtype), length=filled)
        elif cache is not None:
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        else:
            raise ValueError("cross-attention needs encoder_hidden_states, or a cache that holds their keys and values")
        out = attention(q, k, v, mask=mask, scale=scale, dropout=dropout, key=key)
        return tap.tap("out", linear(p["o"], merge_heads(out))), cache
