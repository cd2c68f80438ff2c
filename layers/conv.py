"""Convolutions and pooling over channels-last maps [B, *spatial, C], and images as rows of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.layout import CONV_1D, CONV_2D, CONV_3D, Patch, Permute
from formax.core.spec import At, Initializer, Param, Spec, zeros
from formax.layers.linear import linear

LAYOUTS = {1: CONV_1D, 2: CONV_2D, 3: CONV_3D}
SPATIAL = {1: "W", 2: "HW", 3: "DHW"}

Sizes = int | Sequence[int]


def conv_spec(
    name: str,
    d_in: int,
    d_out: int,
    window: Sequence[int],
    *,
    init: Initializer,
    bias: bool = True,
    groups: int = 1,
    axes: tuple[str | None, str | None] = ("conv_in", "conv_out"),
) -> At:
    """`kernel` (*window, d_in / groups, d_out) and `bias` (d_out,), stored as (d_out, d_in / groups, *window).

    The number of dimensions is that of `window`.
    """
    shape = (*window, d_in // groups, d_out)
    layout = LAYOUTS[len(window)]
    spec: dict[str, Spec] = {"kernel": Param(shape, (*[None] * len(window), *axes), "weight", init, layout)}
    if bias:
        spec["bias"] = Param((d_out,), axes[1:], "bias", zeros)
    return At(name, spec)


def conv(
    p: dict[str, Any],
    x: jax.Array,
    *,
    stride: Sizes = 1,
    padding: Sizes | Sequence[tuple[int, int]] = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolution (a correlation, as everywhere), [B, *spatial, d_in] -> [B, *spatial', d_out].

    `padding` is a number of zeros on both sides, of each dimension if several, or pairs (before, after).
    """
    rank = x.ndim - 2
    kernel = p["kernel"].astype(x.dtype)
    if math.prod(kernel.shape[:rank]) == 1 and groups == 1 and padding == 0:
        # A matrix product by another name, and faster as one.
        picked = x[:, *(slice(None, None, step) for step in _each(stride, rank))]
        return linear({**p, "kernel": kernel.reshape(kernel.shape[rank:])}, picked)
    pads = [pad if isinstance(pad, tuple) else (pad, pad) for pad in _each(padding, rank)]
    letters = SPATIAL[rank]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        _each(stride, rank),
        pads,
        rhs_dilation=_each(dilation, rank),
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )
    return y + p["bias"].astype(x.dtype) if "bias" in p else y


def conv_transpose_spec(name: str, d_in: int, d_out: int, window: Sequence[int], *, init: Initializer) -> At:
    """Of a transposed convolution: `kernel` (*window, d_in, d_out), stored as (d_in, d_out, *window), and `bias`."""
    rank = len(window)
    stored = Permute((*range(2, 2 + rank), 0, 1))
    kernel = Param((*window, d_in, d_out), (*[None] * rank, "conv_in", "conv_out"), "weight", init, stored)
    return At(name, {"kernel": kernel, "bias": Param((d_out,), ("conv_out",), "bias", zeros)})


def conv_transpose(p: dict[str, Any], x: jax.Array, *, stride: int) -> jax.Array:
    """Every place paints a window, `stride` places from the next: [B, *spatial, d_in] -> [B, *spatial', d_out].

    The transpose of a convolution without padding: spatial' = (spatial - 1) * stride + window.
    """
    rank, kernel = x.ndim - 2, p["kernel"].astype(x.dtype)
    letters = SPATIAL[rank]
    y = jax.lax.conv_general_dilated(
        x,
        jnp.flip(kernel, range(rank)),
        [1] * rank,
        [(size - 1, size - 1) for size in kernel.shape[:rank]],
        lhs_dilation=[stride] * rank,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )
    return y + p["bias"].astype(x.dtype)


def max_pool(x: jax.Array, window: int, *, stride: int, padding: int = 0) -> jax.Array:
    """Largest value of every window, [B, *spatial, C] -> [B, *spatial', C]; beyond the edges nothing counts."""
    rank = x.ndim - 2
    low = np.array(-np.inf, x.dtype)  # of NumPy: JAX must see the value to know this for a maximum, with its gradient
    sizes, steps = (1, *[window] * rank, 1), (1, *[stride] * rank, 1)
    pads = ((0, 0), *[(padding, padding)] * rank, (0, 0))
    return jax.lax.reduce_window(x, low, jax.lax.max, sizes, steps, pads)


def patch_spec(
    name: str, channels: int, size: int, patch: Sequence[int], *, init: Initializer, bias: bool = True
) -> Spec:
    """A convolution whose windows do not overlap, as the matrix (prod(patch) * channels, size) that it is."""
    rows = math.prod(patch) * channels
    spec: dict[str, Spec] = {"kernel": Param((rows, size), ("conv_in", "embed"), "weight", init, Patch(tuple(patch)))}
    if bias:
        spec["bias"] = Param((size,), ("embed",), "bias", zeros)
    return At(name, spec)


def embed_patches(p: dict[str, Any], pixels: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Images [B, channels, height, width] -> vectors of their patches [B, rows * columns, size], row by row."""
    b, channels, height, width = pixels.shape
    rows, columns = height // patch[0], width // patch[1]
    x = pixels[:, :, : rows * patch[0], : columns * patch[1]]
    x = x.reshape(b, channels, rows, patch[0], columns, patch[1]).transpose(0, 2, 4, 3, 5, 1)
    return linear(p, x.reshape(b, rows * columns, -1))


def channels_last(x: jax.Array) -> jax.Array:
    """[B, C, *spatial] (as users give and get maps) -> [B, *spatial, C]."""
    return jnp.moveaxis(x, 1, -1)


def channels_first(x: jax.Array) -> jax.Array:
    """[B, *spatial, C] -> [B, C, *spatial]."""
    return jnp.moveaxis(x, -1, 1)


def _each(value: Any, rank: int) -> list[Any]:
    """One entry a dimension."""
    return [value] * rank if isinstance(value, int) else list(value)
