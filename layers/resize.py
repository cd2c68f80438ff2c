"""Images as grids of patches, and tables of positions stretched to images of another size."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Size = int | tuple[int, ...]  # of a square, or height and width

A = -0.75  # PyTorch's cubic convolution; `jax.image.resize` has the other usual one, -0.5


@lru_cache(maxsize=64)
def cubic_matrix(size: int, new: int) -> np.ndarray:
    """The matrix [new, size] of cubic convolution (Keys 1981), as `torch.nn.functional.interpolate` does it.

    Pixels are areas (`align_corners=False`); those beyond the edge repeat the last one. Shrinking picks and does not
    average (`antialias=False`).
    """
    at = (np.arange(new) + 0.5) * (size / new) - 0.5
    matrix = np.zeros((new, size))
    for tap in (-1, 0, 1, 2):  # the four neighbours of a place
        column = np.floor(at) + tap
        t = np.abs(at - column)
        near = ((A + 2) * t - (A + 3)) * t**2 + 1
        far = A * (((t - 5) * t + 8) * t - 4)
        kept = np.clip(column, 0, size - 1).astype(int)
        np.add.at(matrix, (np.arange(new), kept), np.where(t <= 1, near, far))
    return matrix


@lru_cache(maxsize=64)
def linear_matrix(size: int, new: int) -> np.ndarray:
    """The matrix [new, size] of linear interpolation between middles of pixels, otherwise as `cubic_matrix`."""
    at = np.maximum((np.arange(new) + 0.5) * (size / new) - 0.5, 0)
    left = np.minimum(at.astype(int), size - 1)
    matrix, rows = np.zeros((new, size)), np.arange(new)
    np.add.at(matrix, (rows, left), 1 - (at - left))
    np.add.at(matrix, (rows, np.minimum(left + 1, size - 1)), at - left)
    return matrix


@lru_cache(maxsize=64)
def mean_matrix(size: int, new: int) -> np.ndarray:
    """The matrix [new, size] of means over `new` runs of pixels that cover all: a pixel that two share is in both."""
    matrix = np.zeros((new, size))
    for i in range(new):
        start, stop = i * size // new, -(-(i + 1) * size // new)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resized(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Matrices [height, H] and [width, W] over both directions, [..., H, W, E] -> [..., height, width, E].

    Computed in float32.
    """
    both = jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32)
    y = jnp.einsum("yh,xw,...hwe->...yxe", *both, x.astype(jnp.float32), precision="highest")
    return y.astype(x.dtype)


def bicubic(x: jax.Array, height: int, width: int) -> jax.Array:
    """Cubic interpolation in both directions, [..., H, W, E] -> [..., height, width, E]."""
    return resized(x, cubic_matrix(x.shape[-3], height), cubic_matrix(x.shape[-2], width))


def bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Linear interpolation in both directions, [..., H, W, E] -> [..., height, width, E]."""
    return resized(x, linear_matrix(x.shape[-3], height), linear_matrix(x.shape[-2], width))


def pooled(x: jax.Array, height: int, width: int) -> jax.Array:
    """Means over height x width parts of a map (adaptive pooling), [..., H, W, E] -> [..., height, width, E]."""
    return resized(x, mean_matrix(x.shape[-3], height), mean_matrix(x.shape[-2], width))


def stretch_positions(table: jax.Array, grid: tuple[int, int], new: tuple[int, int], *, first: int = 1) -> jax.Array:
    """A table of positions for a grid of another size: [first + H * W, E] -> [first + height * width, E].

    The `first` rows belong to tokens outside the grid, such as a class token, and stay as they are.
    """
    if new == grid:
        return table
    stretched = bicubic(table[first:].reshape(*grid, -1), *new)
    return jnp.concatenate([table[:first], stretched.reshape(-1, table.shape[-1])])


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size that may be a square's.

    Raises:
        ValueError: neither one number nor two.
    """
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"a size is one number, or height and width; got {size}")
    return size[0], size[1]


def grid_of(image: Size, patch: Size) -> tuple[int, int]:
    """Rows and columns of whole patches in an image.

    Raises:
        ValueError: not one patch.
    """
    (height, width), (rows, columns) = pair(image), pair(patch)
    if min(rows, columns) < 1 or height < rows or width < columns:
        raise ValueError(f"an image of {height} x {width} has no patch of {rows} x {columns}")
    return height // rows, width // columns


def check_pixels(pixels: Any, c: Any, stretch: bool) -> tuple[int, int]:
    """Rows and columns of patches in images [B, channels, height, width].

    Args:
        pixels: the images.
        c: a configuration with `num_channels`, `image_size` and `patch_size`.
        stretch: whether images of another size are meant.

    Raises:
        ValueError: another rank, number of channels or size, or smaller than a patch.
    """
    if pixels is None or pixels.ndim != 4 or pixels.shape[1] != c.num_channels:
        given = "nothing" if pixels is None else f"shape {pixels.shape}"
        raise ValueError(f"pixel_values must be [batch, {c.num_channels} channels, height, width], got {given}")
    (height, width), own = pixels.shape[2:], pair(c.image_size)
    if not stretch and (height, width) != own:
        raise ValueError(
            f"pixel_values are {height} x {width}, the model's images {own[0]} x {own[1]}: resize them, or stretch the "
            "model's positions with interpolate_pos_encoding=True"
        )
    return grid_of((height, width), c.patch_size)
