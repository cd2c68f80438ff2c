"""Attention by cuDNN, through `jax.nn.dot_product_attention`, for what is known to come out right.

Of what that function offers several combinations are wrong or slow: a causal mask is aligned to the first key, which
is not where queries after a cache are; a window without a causal mask looks into the future (jax#39576); masks that
broadcast fail (jax#28974), or take cuDNN's slow path; a bias has no gradient beyond one row (jax#30593). So only what
is listed in `supports` goes there, and no mask or bias as an array.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from formax.layers.attention.problem import Problem, fewer_queries_than, target


def supports(p: Problem) -> str | None:
    """Half precision, heads of a multiple of 8 channels up to 128; all pairs, or causal ones, also in a window."""
    m, (_, t, s, _, _) = p.mask, p.sizes
    if target().interpret:
        return "cannot be interpreted"
    if p.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 and float16, not {p.q.dtype}"
    if p.q.shape[3] != p.v.shape[3] or p.q.shape[3] % 8 or p.q.shape[3] > 128:
        return f"heads of {p.q.shape[3]} and {p.v.shape[3]} channels; both must be the same multiple of 8 up to 128"
    for name, given in (("a bias", p.bias), ("a soft cap", p.softcap), ("sinks", p.sinks), ("dropout", p.key)):
        if given is not None:
            return f"{name} is not on the list of what is known to come out right"
    for name in ("kv_length", "keys", "segments", "prefix", "dense"):
        if getattr(m, name) is not None:
            return f"a mask with {name} is not on the list of what is known to come out right"
    if m.dilation > 1:
        return "a dilated window is not on the list of what is known to come out right"
    left, right = m.window or (None, None)
    if m.window is not None and not (m.causal and left is not None and right in (None, 0)):
        return f"window {m.window} without a causal mask, or to the right: cuDNN looks into the future (jax#39576)"
    if m.causal and (not isinstance(m.q_offset, int) or m.q_offset != 0 or t != s):
        return (
            f"a causal mask is aligned to the first key: q_offset must be 0 and {t} queries be as many as the {s} keys"
        )
    return None


def suits(p: Problem) -> str | None:
    """Worth it from a block of queries on."""
    return fewer_queries_than(16, p)


def attention(p: Problem) -> jax.Array:
    """See `formax.layers.attention.attention`."""
    window: Any = None if p.mask.window is None else (p.mask.window[0], 0)
    return jax.nn.dot_product_attention(
        p.q,
        p.k,
        p.v,
        scale=p.scale,
        is_causal=p.mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )
