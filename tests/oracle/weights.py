"""Checkpoint weights that are a function of their name, so that a golden need not store them.

The generator (beside the reference) and the test suite (beside formax) both call `tensor`; it needs numpy alone. The
stream of `numpy.random.RandomState` is frozen by numpy's compatibility policy, so the two sides agree in every version.

The scales are chosen to make a wrong model give a wrong answer. With the usual initialisation (std 0.02, zero biases,
unit norm scales) attention is almost uniform, a forgotten bias changes nothing, and whole parts of a model can be
missing within a plausible tolerance. Here every kernel keeps the size of its input, and no scale or bias is neutral.
"""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_SCALE = {"weight", "gamma", "scale", "g"}
_TABLE = re.compile(r"embed|token|position|wte|wpe|shared", re.IGNORECASE)


def tensor(name: str, shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Returns the weight that a checkpoint of this oracle stores under `name`.

    Args:
        name: the key on disk, such as `bert.encoder.layer.0.output.dense.weight`.
        shape: the shape on disk.
        dtype: any floating dtype that numpy knows (also `ml_dtypes.bfloat16`).

    Raises:
        ValueError: `dtype` is not a floating type. Integer buffers mean something, so a family states their values; but
            for how many batches a batch norm has seen, which is any number that is not 0.
    """
    kind = np.dtype(dtype)
    if name.endswith("num_batches_tracked"):
        return np.full(tuple(shape), 1 + zlib.crc32(name.encode()) % 100_000, kind)
    if kind.kind != "f" and kind.name != "bfloat16":
        raise ValueError(f"{name}: weights of dtype {kind} cannot be made up; give their values in the family's case")
    n = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return np.asarray(_scaled(name, n), kind)  # also of a scalar, of which arithmetic makes no array


def scaled(keys: Mapping[str, Any], scale: Iterable[tuple[str, float]]) -> dict[str, npt.NDArray[Any]]:
    """Returns the tensors of a checkpoint whose parts are larger or smaller than usual.

    Args:
        keys: {name: (shape, dtype)} of its tensors.
        scale: (pattern, factor): how many times larger those are whose names have a match. Factors multiply.
    """
    tensors = {name: tensor(name, shape, dtype) for name, (shape, dtype) in keys.items()}
    for pattern, factor in scale:
        for name in tensors:
            if re.search(pattern, name):
                tensors[name] = tensors[name] * tensors[name].dtype.type(factor)
    return tensors


def _scaled(name: str, n: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Gives the standard normal `n` the location and spread that suit the parameter called `name`."""
    module, _, leaf = name.rpartition(".")
    if leaf == "running_var":
        return np.exp(0.3 * n)
    if n.ndim < 2:
        return 1.0 + 0.2 * n if n.ndim and leaf in _SCALE else 0.2 * n
    if _is_table(module, leaf, n.shape):
        # Rows of norm sqrt(hidden)/2: the tables that are added up (words, positions, segments) weigh the same, and
        # each alone is as large as what a layer adds, so none can be forgotten. Fan-in (the vocabulary) plays no part.
        return 0.5 * n
    return n / np.sqrt(np.prod(n.shape[1:]))


def _is_table(module: str, leaf: str, shape: tuple[int, ...]) -> bool:
    """Tells rows that are looked up or added (embeddings, class tokens) from kernels that are multiplied by."""
    owner = module.rpartition(".")[2] if leaf == "weight" else leaf
    return (len(shape) == 2 or shape[0] == 1) and bool(_TABLE.search(owner))
