"""How far an output is from its golden: one measure, used by the generator's checks and by the test suite."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]


def error(expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float:
    """Returns max|expected - actual| over the standard deviation of `expected` (over |expected| for a scalar)."""
    if expected.shape != actual.shape:
        raise ValueError(f"the golden has shape {expected.shape}, the output {actual.shape}")
    scale = np.std(expected) if expected.size > 1 else np.abs(expected).max()
    # a NaN or an infinity in `actual` must come out as an error, never as a small number
    difference = np.max(np.abs(expected.astype(np.float64) - actual.astype(np.float64)))
    return float(difference / scale) if np.isfinite(difference) else float("inf")


def visible(output: npt.NDArray[Any], inputs: Arrays) -> npt.NDArray[Any]:
    """Returns the rows of `output` that belong to real tokens, as `[tokens, ...]`; padding computes nothing of worth.

    Per-token outputs are `[B, T, ...]` and attention weights `[B, H, T, S]`, of which T is looked at. Other outputs,
    and those of a call without a padding mask `[B, T]`, are returned whole.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return output
    if output.shape[:2] == mask.shape:
        return output[mask.astype(bool)]
    if output.ndim == 4 and (output.shape[0], output.shape[2]) == mask.shape:
        return output.swapaxes(1, 2)[mask.astype(bool)]
    return output
