"""What a contestant offers: tasks that a worker prepares once and then calls and times.

Imported in the environments of all frameworks, so it needs nothing but NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# What a task is to do, as it came through the pipe.
Options = Mapping[str, Any]

# Hyper-parameters of AdamW, the same for all: the libraries differ in their defaults.
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.01
# Steps whose losses are compared before a training step is timed.
CHECKED_STEPS = 3


class UnavailableError(Exception):
    """This contestant cannot run here; the message says why and goes into the table."""


@dataclass(frozen=True)
class Task:
    """Something to time.

    Attributes:
        run: does it once and returns when it is done; what it returns is let go after the clock has stopped.
        digest: numbers from its result that every contestant has to agree on.
    """

    run: Callable[[], object]
    digest: Sequence[float] = ()


def token_ids(options: Options, seed: int = 0) -> npt.NDArray[np.int32]:
    """Random ids [batch, length] of the task's shape, none of them 0: PyTorch does not train the row of the padding."""
    shape: tuple[int, ...] = tuple(options["shape"])
    return np.random.default_rng(seed).integers(1, options["vocab_size"], shape, dtype=np.int32)


def arrays(options: Options) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a call, {name: (kind, shape)} in the options, filled with random numbers."""
    generator = np.random.default_rng(0)
    fill: dict[str, Callable[[tuple[int, ...]], npt.NDArray[Any]]] = {
        "ids": lambda shape: generator.integers(1, options["vocabulary"], shape, dtype=np.int32),
        "ones": lambda shape: np.ones(shape, np.int32),
        "floats": lambda shape: generator.standard_normal(shape, np.float32),
    }
    return {name: fill[kind](tuple(shape)) for name, (kind, shape) in options["inputs"].items()}


def labels(options: Options) -> npt.NDArray[np.int32]:
    """Random words to predict, [batch, length]."""
    return token_ids(options, seed=1)


def heads(options: Options) -> list[npt.NDArray[np.float32]]:
    """Queries, keys and values [batch, length, heads, head_dim] of shapes `q` and `k`."""
    generator = np.random.default_rng(0)
    shapes = [tuple(options[name]) for name in ("q", "k", "k")]
    return [generator.standard_normal(shape, np.float32) for shape in shapes]


def sample(values: npt.ArrayLike, count: int = 64) -> list[float]:
    """About `count` numbers spread over an array."""
    flat = np.asarray(values, np.float64).reshape(-1)
    return [float(value) for value in flat[:: max(1, flat.size // count)]]


def square(options: Options) -> npt.NDArray[np.float32]:
    """A matrix [n, n] to multiply with itself."""
    return np.random.default_rng(0).random((options["n"], options["n"]), np.float32)


def tall(options: Options) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A matrix [rows, columns] that no cache holds, and a vector [columns]: their product reads the one from memory."""
    return np.ones((options["rows"], options["columns"]), np.float32), np.ones(options["columns"], np.float32)
