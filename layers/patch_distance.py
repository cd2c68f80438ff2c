"""Attention among patches by how many rows and columns they are apart: a table of numbers for every head.

Bao et al. 2021, arXiv:2106.08254; original code microsoft/unilm (beit). Beside the distances the table has three rows
more: from the class token to any patch, from any patch to it, and to itself. For images of other sizes it is stretched.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.spec import At, Ignored, Param, Spec, zeros
from formax.layers.attention import Indexed
from formax.layers.resize import bilinear

Grid = tuple[int, int]
CLASS = 3  # rows of the table about the class token, the last ones


def spec(name: str, grid: Grid, heads: int) -> Spec:
    """The table [(2 H - 1) (2 W - 1) + 3, heads] for a grid of H rows and W columns, under this name."""
    rows, columns = grid
    shape = ((2 * rows - 1) * (2 * columns - 1) + CLASS, heads)
    table = Param(shape, (None, "heads"), "relative_position_bias_table", zeros)
    return At(name, {"embedding": table, "index": Ignored("relative_position_index")})


@lru_cache(maxsize=16)
def index(rows: int, columns: int) -> np.ndarray:
    """The row of the table for every pair of the class token and the patches of a grid: [1 + N, 1 + N]."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    down, right = (at[:, None] - at + size - 1 for at, size in ((y, rows), (x, columns)))
    known = (2 * rows - 1) * (2 * columns - 1)
    out = np.full((1 + len(y), 1 + len(y)), known)
    out[1:, 1:] = down * (2 * columns - 1) + right
    out[:, 0] = known + 1
    out[0, 0] = known + 2
    return out


def stretched(p: Any, own: Grid, new: Grid) -> jax.Array:
    """The table of a grid for one of another size: [(2 H - 1) (2 W - 1) + 3, heads] -> [rows, heads].

    The reference takes the height for the width here, which only tables of grids that are not square show.
    """
    table = p["embedding"]
    height, width, rows, columns = (2 * size - 1 for size in (*own, *new))
    if (width, height) == (rows, columns):
        return table
    near = bilinear(table[:-CLASS].reshape(width, height, -1), rows, columns)
    return jnp.concatenate([near.reshape(rows * columns, -1), table[-CLASS:]])


def bias(table: jax.Array, grid: Grid) -> Indexed:
    """What attention adds to the scores of a grid's pairs."""
    return Indexed(table, jnp.asarray(index(*grid)))
