"""Reads and writes safetensors files: a length, a JSON header, and the tensors end to end.

The reader trusts nothing the header says: the tensors must fill the rest of the file exactly, without a hole or an
overlap, as the format demands. The writer lays a file out as the safetensors library does, byte for byte, fetching one
tensor at a time. Neither needs the library, which cannot hand bfloat16 or 8-bit floats to NumPy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from formax.conversion.mapped import CheckpointError, MappedFile, Region, TensorFile, parse_json, shape_problem

# The limit of the format itself.
MAX_HEADER = 100_000_000

# In the order in which the safetensors library ranks them; its files hold the highest rank first, then sort by name.
DTYPES: dict[str, np.dtype[Any]] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": "<i2",
        "U16": "<u2",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "I32": "<i4",
        "U32": "<u4",
        "F32": "<f4",
        "C64": "<c8",
        "F64": "<f8",
        "I64": "<i8",
        "U64": "<u8",
    }.items()
}
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")

# Non-contiguous arrays are made contiguous in blocks of this many bytes, so that no second copy of a tensor exists.
BLOCK = 16 * 2**20


class TensorLike(Protocol):
    """Anything that declares a tensor: an array, a `jax.ShapeDtypeStruct`, a `TensorInfo`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""

    @property
    def dtype(self) -> Any:
        """Anything `numpy.dtype` accepts."""


def looks_like_safetensors(data: bytes) -> bool:
    """Whether a file that begins with these bytes (nine at least) can be safetensors."""
    return 2 <= int.from_bytes(data[:8], "little") <= MAX_HEADER and data[8:9] == b"{"


def read_safetensors(file: MappedFile) -> TensorFile:
    """Reads and checks the header of a safetensors file; the tensors come in the order of the file.

    Raises:
        CheckpointError: naming the file, and the tensor if one is at fault.
    """
    path = file.path
    if file.size < 8:
        raise CheckpointError(f"{path}: {file.size} bytes are too few for a safetensors file; it is truncated")
    length = int.from_bytes(file.data[:8], "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: the header would be {length} bytes long, at most {MAX_HEADER} are allowed; "
            "this is not a safetensors file or it is damaged"
        )
    begin = 8 + length
    if begin > file.size:
        raise CheckpointError(
            f"{path}: the header ends at byte {begin} and the file at byte {file.size}; it is truncated"
        )
    header = parse_json(path, file.data[8:begin], "the safetensors header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' must map strings to strings")

    ranges = {name: _entry(file, begin, name, entry) for name, entry in header.items()}
    tensors: dict[str, Region] = {}
    end = begin
    for name, region in sorted(ranges.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if region.offset != end:
            problem = "overlaps the one before it" if region.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} {problem}: it starts at byte {region.offset}, not at {end}")
        tensors[name] = region
        end += region.nbytes
    if end != file.size:
        raise CheckpointError(f"{path}: the tensors end at byte {end}, but the file at byte {file.size}")
    return TensorFile(file, "safetensors", tensors, metadata)


def _entry(file: MappedFile, begin: int, name: str, entry: Any) -> Region:
    """Checks what the header says of one tensor; the data begin at byte `begin` of the file."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: tensor {name!r}: {problem}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise fail("its header entry must hold 'dtype', 'shape' and 'data_offsets'")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code in SUB_BYTE:
        raise fail(f"dtype {code} packs several elements into a byte, which formax does not read")
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise fail(f"unknown dtype {code!r}; known are {', '.join(DTYPES)}")
    if problem := shape_problem(shape, dtype.itemsize):
        raise fail(problem)
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise fail("its 'data_offsets' must be two integers")
    start, stop = offsets
    if not 0 <= start <= stop:
        raise fail(f"its data_offsets {offsets} must be ascending and not negative")
    if begin + stop > file.size:
        raise fail(f"its data end at byte {begin + stop} and the file at byte {file.size}; the file is truncated")
    region = Region(tuple(shape), dtype, begin + start)
    if region.nbytes != stop - start:
        raise fail(f"shape {shape} of {code} takes {region.nbytes} bytes, its data_offsets span {stop - start}")
    return region


def check_storable(name: str, tensor: TensorLike) -> Region:
    """The shape and dtype of a tensor as it would be stored (at offset 0).

    Raises:
        CheckpointError: if the format cannot hold it.
    """
    try:
        dtype = np.dtype(tensor.dtype)
    except TypeError as error:
        raise CheckpointError(f"tensor {name!r}: {tensor.dtype} is not a dtype that a file can hold") from error
    if dtype not in CODES:
        raise CheckpointError(f"tensor {name!r}: safetensors cannot hold dtype {dtype}, only {', '.join(DTYPES)}")
    shape = tuple(int(size) for size in tensor.shape)
    if problem := shape_problem(shape, dtype.itemsize):
        raise CheckpointError(f"tensor {name!r}: {problem}")
    if name == "__metadata__":
        raise CheckpointError("a tensor cannot be named '__metadata__': safetensors keeps its metadata there")
    return Region(shape, dtype, 0)


def write_safetensors(
    write: Callable[[bytes | memoryview], object],
    tensors: Mapping[str, Region],
    fetch: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes one file, holding one tensor at a time.

    Args:
        write: Takes the bytes of the file, in order.
        tensors: What the file shall hold, from `check_storable`; the order does not matter.
        fetch: Gives a tensor by name, called once for each in the order of the file.
        metadata: Strings to put into the header.

    Raises:
        CheckpointError: if a fetched tensor has another shape or dtype than declared.
    """
    order = sorted(tensors, key=lambda name: (-RANKS[tensors[name].dtype], name))
    write(_header(tensors, order, metadata))
    for name in order:
        array, declared = np.asarray(fetch(name)), tensors[name]
        if array.shape != declared.shape or array.dtype != declared.dtype:
            raise CheckpointError(
                f"tensor {name!r}: declared as {declared.dtype}{list(declared.shape)}, "
                f"but it is {array.dtype}{list(array.shape)}"
            )
        _write_array(write, array)
        del array


def _header(tensors: Mapping[str, Region], order: list[str], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds `tensors` in this order."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": CODES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"the header of {len(order)} tensors is {len(text)} bytes long, over {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _write_array(write: Callable[[bytes | memoryview], object], array: np.ndarray) -> None:
    """Writes the elements in row-major order."""
    if array.flags.c_contiguous:
        write(array.reshape(-1).view(np.uint8).data)
        return
    row = max(1, math.prod(array.shape[1:]) * array.itemsize)
    if row > BLOCK:
        for part in array:
            _write_array(write, part)
        return
    rows = BLOCK // row
    for start in range(0, array.shape[0], rows):
        block = np.ascontiguousarray(array[start : start + rows])
        write(block.reshape(-1).view(np.uint8).data)
