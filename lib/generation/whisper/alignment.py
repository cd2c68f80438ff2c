"""When each token was said: the way through a decoder's looks at a recording that goes on in both.

Whisper's word times (Radford et al. 2022, arXiv:2212.04356; original code openai/whisper, timing.py): of some heads of
the decoder that are known to look at what they write, weights [tokens, frames] are averaged, and dynamic time warping
finds the path along them.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def token_frames(weights: Array, width: int) -> Array:
    """The frame at which each token begins.

    Args:
        weights: [heads, tokens, frames] of attention.
        width: of the filter along the frames that takes the median, an odd number.

    Returns:
        Whole numbers [tokens], never falling.
    """
    weights = np.asarray(weights, np.float32)
    deviation = weights.std(axis=1, keepdims=True)
    normal = (weights - weights.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1)
    tokens, frames = warped(-smoothed(normal, width).mean(axis=0))
    return frames[np.diff(tokens, prepend=-1) > 0]


def smoothed(x: Array, width: int) -> Array:
    """The median of `width` neighbours along the last axis, which is mirrored at its ends; as it is if too short."""
    before = width // 2
    if x.shape[-1] <= before:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, before)], mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1), axis=-1)


def warped(cost: Array) -> tuple[Array, Array]:
    """Dynamic time warping: the cheapest path from the first corner of `cost` [N, M] to the last.

    Returns:
        Rows and columns of its places, in order. A step goes on in one of the two or in both; where two ways cost the
        same, along the columns.
    """
    n, m = cost.shape
    total, came = np.full((n + 1, m + 1), np.inf, np.float32), np.zeros((n + 1, m + 1), np.int8)
    total[0, 0] = 0
    came[0], came[:, 0] = 2, 1
    for diagonal in range(2, n + m + 1):  # all places of one diagonal at once
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        both, down, along = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        way = np.where((both < down) & (both < along), 0, np.where((down < both) & (down < along), 1, 2))
        total[i, j] = cost[i - 1, j - 1] + np.choose(way, [both, down, along])
        came[i, j] = way
    path, (i, j) = [], (n, m)
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        way = came[i, j]
        i, j = i - (way != 2), j - (way != 1)
    rows, columns = np.asarray(path[::-1]).T
    return rows, columns
