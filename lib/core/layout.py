"""How a parameter lies in a checkpoint: a closed set of invertible storage layouts.

A *leaf* is an array of our parameter tree, a *stored* tensor is what the checkpoint file holds. `read` turns the second
into the first and `store` is its inverse, bit for bit. Both work on NumPy views: reading a slice of a leaf from a
memory-mapped file touches the pages of that slice alone (but for `Patch` and for `Part` over interleaved groups, which
copy the leaf first).

Kernels of formax are `(in, out)` and convolutions channels-last, as in Flax; PyTorch stores `(out, in)` and
channels-first. A weight-normalised kernel is two leaves, magnitude and direction, each in one of these layouts: merging
them on the way would lose bits. Which layout applies is declared by kind and never guessed from the number of
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """The leaf is stored as it is; base of the other layouts."""

    def stored_shape(self, shape: Shape) -> Shape:
        """Shape of (each of) the stored tensor(s) of a leaf of this shape."""
        return shape

    def load(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """Stored tensor -> leaf of `shape`, as a view where the layout allows one."""
        return stored

    def store(self, leaf: np.ndarray) -> np.ndarray:
        """Leaf -> stored tensor; the inverse of `load`."""
        return leaf

    def names(self, name: str) -> tuple[str, ...]:
        """The stored tensors that make up the leaf declared under `name`."""
        return (name,)

    def read(self, get: Callable[[str], np.ndarray], name: str, shape: Shape, index: Index) -> np.ndarray:
        """The part `index` of the leaf, out of the stored tensors that `get` opens by name."""
        return self.load(get(name), shape)[index]


SAME = Layout()


@dataclass(frozen=True)
class Permute(Layout):
    """`leaf = stored.transpose(order)`."""

    order: tuple[int, ...]

    def stored_shape(self, shape: Shape) -> Shape:
        return tuple(shape[self.order.index(axis)] for axis in range(len(self.order)))

    def load(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        return stored.transpose(self.order)

    def store(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.transpose([self.order.index(axis) for axis in range(len(self.order))])


TRANSPOSE = Permute((1, 0))  # nn.Linear (out, in) -> (in, out)
CONV_1D = Permute((2, 1, 0))  # (out, in, width) -> (width, in, out)
CONV_2D = Permute((2, 3, 1, 0))  # (out, in, height, width) -> (height, width, in, out)
CONV_3D = Permute((2, 3, 4, 1, 0))  # (out, in, depth, height, width) -> (depth, height, width, in, out)


@dataclass(frozen=True)
class Reshape(Layout):
    """Same elements in the same order under another shape, e.g. a class token stored as `(1, 1, hidden)`."""

    stored: Shape

    def stored_shape(self, shape: Shape) -> Shape:
        if math.prod(shape) != math.prod(self.stored):
            raise ValueError(f"a leaf of shape {shape} cannot be stored as {self.stored}")
        return self.stored

    def load(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        return stored.reshape(shape)

    def store(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(self.stored)


@dataclass(frozen=True)
class Patch(Layout):
    """A patch-embedding convolution `(out, channels, *patch)` as the matrix `(prod(patch) * channels, out)` it is."""

    patch: Shape

    def stored_shape(self, shape: Shape) -> Shape:
        rows, out = shape
        return (out, rows // math.prod(self.patch), *self.patch)

    def load(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        return np.moveaxis(stored, (0, 1), (-1, -2)).reshape(shape)

    def store(self, leaf: np.ndarray) -> np.ndarray:
        rows, out = leaf.shape
        split = leaf.reshape((*self.patch, rows // math.prod(self.patch), out))
        return np.moveaxis(split, (-1, -2), (0, 1))


@dataclass(frozen=True)
class Part(Layout):
    """One of several leaves fused into a single stored tensor along its axis `axis`, such as q, k and v.

    With `groups` > 1 the parts are interleaved: the axis is `groups` runs, each holding every part in turn (as
    GPT-NeoX and BLOOM interleave q, k and v per head). The leaf then is the concatenation of its pieces, a copy.
    `sizes` are the lengths of all parts along the axis, over all groups. `then` applies to the part after it is cut.
    A part is not stored alone: `join` takes the place of `store`.
    """

    index: int
    sizes: tuple[int, ...]
    axis: int = 0
    groups: int = 1
    then: Layout = SAME

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(self.sizes) or self.axis < 0:
            raise ValueError(f"there is no part {self.index} along axis {self.axis} of parts of sizes {self.sizes}")
        if any(size % self.groups for size in self.sizes):
            raise ValueError(f"parts of sizes {self.sizes} cannot be interleaved in {self.groups} groups")

    def stored_shape(self, shape: Shape) -> Shape:
        part = self.then.stored_shape(shape)
        if part[self.axis] != self.sizes[self.index]:
            raise ValueError(f"a leaf of shape {shape} is no part {self.index} of sizes {self.sizes}, axis {self.axis}")
        return (*part[: self.axis], sum(self.sizes), *part[self.axis + 1 :])

    def load(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        part_shape = self.then.stored_shape(shape)
        run = [size // self.groups for size in self.sizes]
        start = sum(run[: self.index])
        before, after = stored.shape[: self.axis], stored.shape[self.axis + 1 :]
        grouped = stored.reshape((*before, self.groups, sum(run), *after))
        cut = (slice(None),) * (self.axis + 1) + (slice(start, start + run[self.index]),)
        return self.then.load(grouped[cut].reshape(part_shape), shape)

    def store(self, leaf: np.ndarray) -> np.ndarray:
        raise TypeError("a part is stored together with the others: join them")

    def join(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """All leaves, in the order of `sizes` -> the stored tensor."""
        parts = []
        for leaf, size in zip(leaves, self.sizes, strict=True):
            part = self.then.store(leaf)
            before, after = part.shape[: self.axis], part.shape[self.axis + 1 :]
            parts.append(part.reshape((*before, self.groups, size // self.groups, *after)))
        # NumPy's, or JAX's for arrays of a trace.
        joined = parts[0].__array_namespace__().concatenate(parts, axis=self.axis + 1)
        before, after = joined.shape[: self.axis], joined.shape[self.axis + 2 :]
        return joined.reshape((*before, sum(self.sizes), *after))


@dataclass(frozen=True)
class Stacked(Layout):
    """Many equal stored tensors as one leaf with a leading axis, such as experts; the name holds `{}` for the number.

    Reading a slice of the leading axis opens only the tensors in that slice. `read` and `split` take the place of
    `load` and `store`, which are about one tensor.
    """

    count: int
    then: Layout = SAME

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(name.replace("{}", str(i)) for i in range(self.count))

    def stored_shape(self, shape: Shape) -> Shape:
        return self.then.stored_shape(shape[1:])

    def load(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        raise TypeError("stacked tensors are several: read them")

    def store(self, leaf: np.ndarray) -> np.ndarray:
        raise TypeError("stacked tensors are several: split the leaf")

    def read(self, get: Callable[[str], np.ndarray], name: str, shape: Shape, index: Index) -> np.ndarray:
        rest = index[1:]
        picked = self.names(name)[index[0]]
        out: np.ndarray | None = None
        for row, one in enumerate(picked):
            part = self.then.load(get(one), shape[1:])[rest]
            if out is None:
                out = np.empty((len(picked), *part.shape), part.dtype)
            out[row] = part
        return np.empty((0, *shape[1:]))[:, *rest] if out is None else out

    def split(self, leaf: np.ndarray) -> list[np.ndarray]:
        """The leaf -> its stored tensors, in order."""
        return [self.then.store(row) for row in leaf]
