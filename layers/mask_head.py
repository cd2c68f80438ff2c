"""Masks of objects, painted by a pyramid of convolutions from where each object looks on the map.

The head that DETR has for segmentation (Carion et al. 2020, arXiv:2005.12872, section 4.4; the pyramid is Lin et al.
2017, arXiv:1612.03144). B batch, Q queries, h x w places of the last map, E width of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.spec import At, Spec, normal, scaled
from formax.layers import norm
from formax.layers.attention.api import split_heads
from formax.layers.conv import channels_first, conv, conv_spec
from formax.layers.linear import linear, linear_spec
from formax.layers.maps import resize

EPS = 1e-5


def mask_head_spec(c: Any, maps: Sequence[int]) -> dict[str, Spec]:
    """Attention from objects to the map, and convolutions from there up to the largest of the backbone's `maps`.

    `maps` are their channels, from the largest map to the last.
    """
    size, heads = c.d_model, c.encoder_attention_heads
    widths = [size + heads, size // 2, size // 4, size // 8, size // 16]
    kernel, init = partial(conv_spec, init=normal(c.init_std)), scaled(c.init_xavier_std**2, "average", uniform=True)
    steps = zip([widths[0], *widths[:-1]], widths, strict=True)
    skips = zip(maps[2::-1], widths[1:4], strict=False)
    masks: dict[str, Spec] = {
        "convs": tuple(kernel(f"lay{i + 1}", d_in, d_out, (3, 3)) for i, (d_in, d_out) in enumerate(steps)),
        "norms": tuple(norm.layer_spec(f"gn{i + 1}", width) for i, width in enumerate(widths)),
        "maps": tuple(kernel(f"adapter{i + 1}", d_in, d_out, (1, 1)) for i, (d_in, d_out) in enumerate(skips)),
        "out": kernel("out_lay", widths[-1], 1, (3, 3)),
    }
    attn = {part: linear_spec(f"{part}_linear", size, size, ("embed", "heads"), init=init) for part in ("q", "k")}
    return {"attn": At("bbox_attention", attn), "masks": At("mask_head", masks)}


def check_mask_head(p: Any, maps: Sequence[int]) -> None:
    """Raises ValueError for a head whose sizes cannot be, or a backbone with too few `maps`."""
    widths = [kernel["bias"].shape[0] for kernel in p["masks"]["convs"]]
    if any(width % groups_of(width) for width in widths) or len(maps) < 3:
        raise ValueError(
            f"a mask head needs three maps of the backbone, it has {len(maps)}; and 8 must divide the channels "
            f"of its own maps, {widths}, made of d_model and encoder_attention_heads, where they are more than 8"
        )


def groups_of(width: int) -> int:
    """Into how many groups the mask head's norms divide so many channels."""
    return min(8, width)


def object_attention(p: Any, x: jax.Array, memory: jax.Array, seen: jax.Array, heads: int) -> jax.Array:
    """Where objects [B, Q, E] look on the map [B, h, w, E]: [B, Q, h, w, heads], one softmax over places and heads."""
    b, h, w, size = memory.shape
    q = split_heads(linear(p["q"], x) * (size // heads) ** -0.5, size // heads)
    k = split_heads(linear(p["k"], memory.reshape(b, h * w, size)), size // heads)
    scores = jnp.einsum("bqnd,bsnd->bqsn", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen.reshape(b, 1, h * w, 1), scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores.reshape(b, -1, h * w * heads)).astype(x.dtype)
    return tap.tap("attn.weights", weights.reshape(b, -1, h, w, heads))


def masks(p: Any, projected: jax.Array, where: jax.Array, maps: list[jax.Array]) -> jax.Array:
    """Masks of objects from where they look [B, Q, h, w, heads], and maps ever larger: [B, Q, H / 4, W / 4]."""
    b, q, h, w, _ = where.shape
    x = jnp.concatenate([jnp.broadcast_to(projected[:, None], (b, q, *projected.shape[1:])), where], axis=-1)
    x = x.reshape(b * q, h, w, -1)
    for i, (kernel, scale) in enumerate(zip(p["convs"], p["norms"], strict=True)):
        if i > 1:
            skip = conv(p["maps"][i - 2], maps[i - 2])
            x = resize(x, *skip.shape[1:3]).reshape(b, q, *skip.shape[1:])
            x = (x + skip[:, None]).reshape(b * q, *skip.shape[1:])
        x = conv(kernel, x, padding=1)
        x = jax.nn.relu(norm.group(scale, x, groups_of(x.shape[-1]), EPS))
    y = channels_first(conv(p["out"], x, padding=1))
    return y.reshape(b, q, *y.shape[2:])
