"""Maps of places [B, H, W, C] as detectors use them: brought to another size, and told where their places are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.spec import Spec
from formax.layers.embed import embedding_spec

UNIFORM = jax.nn.initializers.uniform(1.0)


def nearest(size: int, wanted: int) -> np.ndarray:
    """For each of `wanted` places the one of `size` that it shows, by their first corners as in PyTorch: [wanted]."""
    step = np.float32(size) / np.float32(wanted)
    return np.minimum((np.arange(wanted, dtype=np.float32) * step).astype(np.int64), size - 1)


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """[B, H, W, ...] -> [B, height, width, ...] by the nearest place."""
    return x[:, nearest(x.shape[1], height)][:, :, nearest(x.shape[2], width)]


def seen_places(pixel_mask: Any, pixels: tuple[int, int, int], places: tuple[int, int]) -> jax.Array:
    """Where a map shows what is no padding: a mask [B, height, width] of the pixels, or None -> booleans [B, H, W].

    Raises:
        ValueError: the mask is not of the shape `pixels`.
    """
    if pixel_mask is None:
        return jnp.ones((pixels[0], *places), bool)
    if pixel_mask.shape != pixels:
        raise ValueError(f"pixel_mask must be [batch, height, width] {pixels}, got {pixel_mask.shape}")
    return resize(pixel_mask, *places) != 0


def sine_positions(seen: jax.Array, size: int) -> jax.Array:
    """Waves of each place's height and width as parts of what is real: [B, H, W] booleans -> [B, H, W, size].

    Carion et al. 2020, arXiv:2005.12872: sines and cosines by turns, half of the `size` for the rows and half for the
    columns, so that 4 must divide it.
    """

    def waves(axis: int) -> jax.Array:
        at = jnp.cumsum(seen, axis, dtype=jnp.float32)
        at = at / (jax.lax.slice_in_dim(at, -1, None, axis=axis) + 1e-6) * 2 * jnp.pi
        angles = at[..., None] / 10000 ** (np.arange(0, size // 2, 2, dtype=np.float32) / (size // 2))
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*seen.shape, size // 2)

    return jnp.concatenate([waves(1), waves(2)], axis=-1)


def learned_spec(size: int, grid: int) -> dict[str, Spec]:
    """Vectors of `grid` rows and as many columns, each half of `size` long."""

    def table(name: str) -> Spec:
        return embedding_spec(name, grid, size // 2, init=UNIFORM, axes=(None, "embed"))

    return {"rows": table("row_embeddings"), "columns": table("column_embeddings")}


def learned_positions(p: Any, seen: jax.Array) -> jax.Array:
    """Vectors of each place's column and row: [B, H, W] -> [B, H, W, E].

    Raises:
        ValueError: more rows or columns than there are vectors.
    """
    columns, rows = p["columns"]["embedding"], p["rows"]["embedding"]
    (b, h, w), grid = seen.shape, len(rows)
    if max(h, w) > grid:
        raise ValueError(
            f"the map is {h} x {w} places, learned positions know {grid} rows and columns; shrink the image"
        )
    columns = jnp.broadcast_to(columns[None, None, :w], (b, h, w, columns.shape[1]))
    return jnp.concatenate([columns, jnp.broadcast_to(rows[None, :h, None], columns.shape)], axis=-1)
