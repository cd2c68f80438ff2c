"""Images as rows of vectors: a token for the whole, the patches, and where each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from formax.layers.conv import embed_patches
from formax.layers.resize import check_pixels, grid_of, pair, stretch_positions


def tokens_first(tokens: Sequence[Any], x: jax.Array) -> jax.Array:
    """So many vectors before the patches of every image: [B, N, E] -> [B, tokens + N, E]."""
    shape = (len(x), 1, x.shape[-1])
    return jnp.concatenate([*(jnp.broadcast_to(p["embedding"].astype(x.dtype), shape) for p in tokens), x], axis=1)


def embed_image(
    p: Any, c: Any, pixels: Any, *, stretch: bool, hidden: Any = None, first: tuple[str, ...] = ("cls",)
) -> jax.Array:
    """Tokens and patches, row by row, with their positions: [B, C, height, width] -> [B, tokens + N, E].

    Args:
        p: `patch` (of `conv.patch_spec`), the table `position` of tokens + N rows, the tokens' vectors, and in models
            that hide patches the vector `mask`.
        c: a configuration with `num_channels`, `image_size` and `patch_size`.
        pixels: the images.
        stretch: whether the positions are to be stretched to images of another size.
        hidden: [B, N], not 0 where a patch is replaced by the mask.
        first: names of the tokens before the patches.

    Raises:
        ValueError: images that do not fit, or patches hidden of another shape or in a model without a mask.
    """
    grid = check_pixels(pixels, c, stretch)
    if hidden is not None and "mask" not in p:
        raise ValueError("bool_masked_pos needs a model for masked image modelling: this one has no token for masks")
    if hidden is not None and hidden.shape != (len(pixels), grid[0] * grid[1]):
        raise ValueError(
            f"bool_masked_pos must be {(len(pixels), grid[0] * grid[1])} [batch, patches], got {hidden.shape}"
        )
    x = embed_patches(p["patch"], pixels.astype(p["patch"]["kernel"].dtype), pair(c.patch_size))
    if hidden is not None:
        x = jnp.where(hidden[..., None] != 0, p["mask"]["embedding"].astype(x.dtype), x)
    own = grid_of(c.image_size, c.patch_size)
    table = stretch_positions(p["position"]["embedding"], own, grid, first=len(first))
    return tokens_first([p[name] for name in first], x) + table.astype(x.dtype)
