"""Heads of encoders of images: labels of images, and the pixels of patches that were hidden (SimMIM).

Xie et al. 2021, arXiv:2111.09886: a patch's pixels from its state alone, by one linear map.
"""

from __future__ import annotations

from typing import Any

import jax

from formax.core.layout import Patch
from formax.core.spec import Spec, normal
from formax.layers import heads
from formax.layers.linear import linear, linear_spec
from formax.layers.resize import pair


def labels_spec(c: Any) -> dict[str, Spec]:
    """A linear map to the labels; none when there are none."""
    return heads.linear_head("classifier")(c) if c.num_labels else {}


def pixels_spec(c: Any) -> dict[str, Spec]:
    """A linear map from a state to pixels, stored as the convolution of 1 x 1 that it is."""
    width, init = c.encoder_stride**2 * c.num_channels, normal(c.initializer_range)
    kernel = linear_spec("decoder.0", c.hidden_size, width, ("embed", None), init=init, layout=Patch((1, 1)))
    return {"head": kernel}


def check_stride(c: Any) -> None:
    """Raises ValueError where what is made of patches would not have the size of the image."""
    s = c.encoder_stride
    if pair(c.patch_size) != (s, s):
        raise ValueError(f"bool_masked_pos needs patches of the encoder_stride={s}, patch_size is {c.patch_size}")


def pixels(p: Any, c: Any, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Pixels of all places, `encoder_stride` x `encoder_stride` for each: [B, rows * columns, E] -> [B, C, H, W]."""
    (rows, columns), s = grid, c.encoder_stride
    x = linear(p["head"], x).reshape(len(x), rows, columns, c.num_channels, s, s).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(len(x), c.num_channels, rows * s, columns * s)
