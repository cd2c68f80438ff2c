"""Labels for every place of an image: UPerNet over a pyramid of maps, and the plain convolutions trained beside it.

Xiao et al. 2018, arXiv:1807.10221 (UPerNet), which is pyramid pooling of the smallest map (Zhao et al. 2016,
arXiv:1612.01105) and a way down from it through all others (Lin et al. 2016, arXiv:1612.03144); Long et al. 2014,
arXiv:1411.4038 (FCN). Maps are channels-last, [B, H, W, C], the largest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.spec import At, Initializer, Spec, normal
from formax.layers import norm
from formax.layers.conv import conv, conv_spec, conv_transpose, conv_transpose_spec, max_pool
from formax.layers.resize import bilinear, pooled


def unit_spec(name: str, d_in: int, d_out: int, window: int, init: Initializer) -> Spec:
    """A convolution and its batch norm."""
    kernel = conv_spec("conv", d_in, d_out, (window, window), init=init, bias=False)
    return At(name, {"conv": kernel, "norm": norm.batch_spec("bn", d_out)})


def unit(p: Any, x: jax.Array, place: str, key: Any) -> jax.Array:
    """Convolution, batch norm and ReLU, [B, H, W, C] -> [B, H, W, C']; `place` is the path of `p`."""
    x = conv(p["conv"], x, padding=p["conv"]["kernel"].shape[0] // 2)
    with tap.scope(place):
        return jax.nn.relu(norm.batch(p["norm"], x, key=key))


def pyramid_spec(c: Any) -> dict[str, Spec]:
    """Convolutions that make the first of four maps four times as large, and the second one twice."""
    double = partial(conv_transpose_spec, d_in=c.hidden_size, d_out=c.hidden_size, window=(2, 2))
    init = normal(c.initializer_range)
    first = {"up": double("fpn1.0", init=init), "norm": norm.batch_spec("fpn1.1", c.hidden_size)}
    return {"first": {**first, "again": double("fpn1.3", init=init)}, "second": {"up": double("fpn2.0", init=init)}}


def pyramid(p: Any, maps: Sequence[jax.Array], eps: float = 1e-5, *, key: Any = None) -> list[jax.Array]:
    """Four maps of one size -> of 4, 2, 1 and 1 / 2 times that size; all [B, H, W, E]."""
    a, b, same, d = maps
    a = conv_transpose(p["first"]["up"], a, stride=2)
    with tap.scope("pyramid.first"):
        a = jax.nn.gelu(norm.batch(p["first"]["norm"], a, eps, key=key), approximate=False)
    a = conv_transpose(p["first"]["again"], a, stride=2)
    return [a, conv_transpose(p["second"]["up"], b, stride=2), same, max_pool(d, 2, stride=2)]


def upernet_spec(c: Any, levels: int = 4) -> dict[str, Spec]:
    """The head over so many maps, all of `hidden_size` channels; `pool_scales` are the sizes of the pooled maps."""
    size, init = c.hidden_size, normal(c.initializer_range)
    pools = [unit_spec(f"psp_modules.{i}.1", size, size, 1, init) for i in range(len(c.pool_scales))]
    return {
        "pools": tuple(pools),
        "top": unit_spec("bottleneck", size * (1 + len(pools)), size, 3, init),
        "lateral": tuple(unit_spec(f"lateral_convs.{i}", size, size, 1, init) for i in range(levels - 1)),
        "smooth": tuple(unit_spec(f"fpn_convs.{i}", size, size, 3, init) for i in range(levels - 1)),
        "merge": unit_spec("fpn_bottleneck", size * levels, size, 3, init),
        "head": conv_spec("classifier", size, c.num_labels, (1, 1), init=init),
    }


def upernet(p: Any, c: Any, maps: Sequence[jax.Array], key: Any) -> jax.Array:
    """Scores of labels at every place of the largest map: maps [B, H, W, E], ... -> [B, H, W, labels]."""
    *larger, last = maps
    size = last.shape[1:3]
    pools = [
        bilinear(unit(q, pooled(last, scale, scale), f"pools.{i}", key), *size)
        for i, (q, scale) in enumerate(zip(p["pools"], c.pool_scales, strict=True))
    ]
    found = [unit(p["top"], jnp.concatenate([last, *pools], axis=-1), "top", key)]
    for i, x in reversed(list(enumerate(larger))):
        found.insert(0, unit(p["lateral"][i], x, f"lateral.{i}", key) + bilinear(found[0], *x.shape[1:3]))
    for i, q in enumerate(p["smooth"]):
        found[i] = unit(q, found[i], f"smooth.{i}", key)
    found = [bilinear(x, *maps[0].shape[1:3]) for x in found]
    return conv(p["head"], unit(p["merge"], jnp.concatenate(found, axis=-1), "merge", key))


def fcn_spec(c: Any) -> dict[str, Spec]:
    """So many (`auxiliary_num_convs`) convolutions to `auxiliary_channels`, and one over what went in and came out."""
    size, inner, init = c.hidden_size, c.auxiliary_channels, normal(c.initializer_range)
    widths = [size, *[inner] * c.auxiliary_num_convs]
    convs = [unit_spec(f"convs.{i}", d_in, d, 3, init) for i, (d_in, d) in enumerate(pairwise(widths))]
    spec: dict[str, Spec] = {"convs": tuple(convs)} if convs else {}
    if c.auxiliary_concat_input:
        spec["both"] = unit_spec("conv_cat", size + inner, inner, 3, init)
    return {**spec, "head": conv_spec("classifier", inner, c.num_labels, (1, 1), init=init)}


def fcn(p: Any, x: jax.Array, key: Any) -> jax.Array:
    """Scores of labels at every place, [B, H, W, E] -> [B, H, W, labels]."""
    h = x
    for i, q in enumerate(p.get("convs", ())):
        h = unit(q, h, f"convs.{i}", key)
    if "both" in p:
        h = unit(p["both"], jnp.concatenate([x, h], axis=-1), "both", key)
    return conv(p["head"], h)
