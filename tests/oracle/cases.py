"""What the cases of many families are made of: inputs decided by a name, and ways to plant a bug."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Plant = Callable[[dict[str, Any], Tensors, Tensors], None]

# Tokens of a text and words of a vocabulary, wherever a family has no reason for another number.
T = 25
VOCAB = 61


def ids(name: str, *shape: int, low: int = 1, high: int = VOCAB) -> Array:
    """Returns integers in `[low, high)`, decided by `name`; the default is any token but padding."""
    return np.random.RandomState(zlib.crc32(name.encode())).randint(low, high, shape).astype(np.int64)


def floats(name: str, *shape: int) -> Array:
    """Returns standard normal floats, decided by `name`."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def mask(*lengths: int, width: int = T, left: bool = False) -> Array:
    """Returns a padding mask `[rows, width]`: `lengths[i]` ones, then zeros (before them if `left`)."""
    ones = (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int64)
    return ones[:, ::-1].copy() if left else ones


def labels(name: str, high: int, seen: Array) -> Array:
    """Returns per-token labels `[rows, T]` in `[0, high)`; -100 (ignored) for padding and for a third of the rest."""
    drawn = ids(name, *seen.shape, low=-high // 2, high=high)
    return np.where((drawn < 0) | (seen == 0), -100, drawn)


def ending(tensors: Tensors, *ends: str) -> list[str]:
    """Returns the keys that end so; there must be some, or a bug would silently be none."""
    found = [key for key in tensors if key.endswith(ends)]
    if not found:
        raise ValueError(f"no key ends with {ends}")
    return found


def zero(*ends: str) -> Plant:
    """Forgets parameters."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        tensors.update({key: np.zeros_like(tensors[key]) for key in ending(tensors, *ends)})

    return apply


def change(how: Any, *ends: str) -> Plant:
    """Misreads parameters."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        tensors.update({key: how(tensors[key]).copy() for key in ending(tensors, *ends)})

    return apply


def configure(**changes: Any) -> Plant:
    """Misreads the configuration."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        config.update(changes)

    return apply


def change_input(name: str, how: Any) -> Plant:
    """Misreads an input."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        inputs[name] = how(inputs[name]).copy()

    return apply
