"""What the readers of checkpoint files share: the error they raise, a memory-mapped file, and where tensors lie in it.

A checkpoint is opened by mapping its files into memory: nothing is read until a tensor's bytes are touched, and then
only the pages they lie on. What stands in a header is checked here against the size of the file before any use.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# NumPy's own limits: an array beyond them cannot be described, let alone allocated.
MAX_DIMENSIONS = 64
MAX_BYTES = 2**63 - 1


class CheckpointError(ValueError):
    """A checkpoint file is not what it should be; the message names the file, the key and what would be right."""


@dataclass(frozen=True)
class Region:
    """Where a tensor lies in a file.

    Attributes:
        shape: Dimensions of the tensor.
        dtype: Type of its elements, little-endian.
        offset: Byte of the file at which the first element starts.
        strides: Bytes from one element to the next along each axis; None means row-major and dense.
        pieces: Where the parts of the flattened tensor lie, if the file does not hold it in one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    strides: tuple[int, ...] | None = None
    pieces: tuple[Region, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when dense."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes of the file from the tensor's first element to the end of its last."""
        if self.strides is None or self.nbytes == 0:
            return self.nbytes
        return extent(self.shape, self.strides) + self.dtype.itemsize


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Distance from the first to the last element of a non-empty array, in the unit of `strides`."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def shape_problem(shape: Any, itemsize: int) -> str | None:
    """Says why no array can have this shape, whatever JSON or a pickle put in its place; None if one can."""
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
        return "its shape must be a list of integers, none negative"
    if len(shape) > MAX_DIMENSIONS:
        return f"its shape has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are possible"
    # Also with a dimension of zero: an empty array of absurd dimensions overflows NumPy's arithmetic all the same.
    nbytes = itemsize
    for size in shape:
        nbytes *= max(size, 1)
        if nbytes > MAX_BYTES:
            return "its shape is larger than any memory"
    return None


class MappedFile:
    """A file mapped read-only into memory.

    The map lives as long as this object or any array made from it. The file must not be truncated while it is mapped;
    replacing it by renaming another over it, as formax and most programs save, is safe.

    Attributes:
        path: The file.
        data: The map; slices of it are copies, as `bytes`.
        size: Length in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Maps `path`.

        Raises:
            CheckpointError: if it is missing, empty, unreadable or not a regular file.
        """
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory")
        if not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
        try:
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path}: the file is empty; save or download it again")
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        self.path = path
        self.size = len(self.data)

    def array(self, region: Region) -> np.ndarray:
        """A read-only view of a tensor in the map; no byte of it is read yet. One in pieces is put together: a copy."""
        if region.pieces:
            whole = np.concatenate([self.array(piece).reshape(-1) for piece in region.pieces]).reshape(region.shape)
            whole.flags.writeable = False
            return whole
        strides = region.strides if region.nbytes else None
        return np.ndarray(region.shape, region.dtype, buffer=self.data, offset=region.offset, strides=strides)

    def release(self, region: Region) -> None:
        """Drops the whole pages inside a tensor from the resident set; they are read again when touched again."""
        for piece in region.pieces:
            self.release(piece)
        if region.pieces:
            return
        page = mmap.PAGESIZE
        start = -(-region.offset // page) * page
        stop = (region.offset + region.span) // page * page
        if stop > start:
            self.data.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclass(frozen=True)
class TensorFile:
    """One opened file of tensors.

    Attributes:
        file: The map.
        format: "safetensors", "torch", "flax" or "tf".
        tensors: Where each tensor lies, in the order of the file.
        metadata: What else the file says.
    """

    file: MappedFile
    format: str
    tensors: dict[str, Region]
    metadata: dict[str, str]


def parse_json(path: Path, data: bytes, what: str) -> dict[str, Any]:
    """Reads a JSON object strictly: UTF-8, no key twice.

    Args:
        path: The file it stands in, for messages.
        data: The JSON text.
        what: What it is, for messages ("the header").

    Raises:
        CheckpointError: if it is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path}: {what} holds the key {key!r} twice")
            found[key] = value
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} must be a JSON object, not {type(value).__name__}")
    return value
