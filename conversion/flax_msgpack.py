"""Reads and writes Flax's checkpoints (`flax_model.msgpack`): a tree of arrays in MessagePack, without Flax.

The file is one map from names to maps or arrays. An array is an extension value (type 1) that holds its shape, the name
of its dtype and its bytes, again in MessagePack; one of more than 2**30 bytes is a map that holds it in pieces. The
reader walks the tree and notes where the bytes lie, so that arrays are mapped in place; every length is checked against
what is left of the file before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from formax.conversion.mapped import CheckpointError, MappedFile, Region, TensorFile, shape_problem

# Extension types of `flax.serialization`.
ARRAY, SCALAR = 1, 3
CHUNKED = "__msgpack_chunked_array__"
# Larger arrays are written in pieces of this many bytes, as a length in MessagePack has 32 bits.
CHUNK = 2**30
MAX_DEPTH = 64
# What stands above the parameters of models that also have batch statistics.
COLLECTIONS = ("params", "batch_stats")
STATISTICS = ("mean", "var")

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64"),
    )
} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}

# First byte -> (kind, bytes of the length or number that follows, and the struct format of that).
SIZED = {
    0xC4: ("bin", "B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xC7: ("ext", "B"),
    0xC8: ("ext", ">H"),
    0xC9: ("ext", ">I"),
    0xD9: ("str", "B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("array", ">H"),
    0xDD: ("array", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
    0xCC: ("int", "B"),
    0xCD: ("int", ">H"),
    0xCE: ("int", ">I"),
    0xCF: ("int", ">Q"),
    0xD0: ("int", "b"),
    0xD1: ("int", ">h"),
    0xD2: ("int", ">i"),
    0xD3: ("int", ">q"),
    0xCA: ("number", ">f"),
    0xCB: ("number", ">d"),
}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def looks_like_flax(head: bytes) -> bool:
    """Whether a file that begins with these bytes can be a map of MessagePack with a name first."""
    first = head[:1]
    if not first:
        return False
    if first[0] in (0xDE, 0xDF):
        head = head[3 if first[0] == 0xDE else 5 :]
    elif 0x80 < first[0] <= 0x8F:
        head = head[1:]
    else:
        return False
    return bool(head) and (0xA0 <= head[0] <= 0xBF or 0xD9 <= head[0] <= 0xDB)


@dataclass
class Reader:
    """A place in the file, and what stands there."""

    file: MappedFile
    position: int = 0
    end: int = 0
    where: list[str] = field(default_factory=list)

    def fail(self, problem: str) -> CheckpointError:
        """The error, naming the file and the entry that is read."""
        entry = f"{'/'.join(self.where)!r}: " if self.where else ""
        return CheckpointError(f"{self.file.path}: {entry}{problem}; save or download the checkpoint again")

    def take(self, count: int) -> bytes:
        """The next bytes, if the value that is read has so many."""
        if count > self.end - self.position:
            raise self.fail(f"byte {self.position + count} is needed, it ends at byte {self.end} and is truncated")
        self.position += count
        return self.file.data[self.position - count : self.position]

    def head(self) -> tuple[str, Any]:
        """Kind of the next value, and its length ("bin", "ext", "str", "array", "map") or else itself."""
        first = self.take(1)[0]
        if first < 0x80 or first >= 0xE0:
            return "int", first if first < 0x80 else first - 256
        if first < 0xC0:
            kind, mask = (("map", 0xF) if first < 0x90 else ("array", 0xF)) if first < 0xA0 else ("str", 0x1F)
            return kind, first & mask
        if first in CONSTANTS:
            return "constant", CONSTANTS[first]
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first not in SIZED:
            raise self.fail(f"the byte {first:#x} begins no value of MessagePack")
        kind, form = SIZED[first]
        return kind, struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """The next value, a string."""
        kind, length = self.head()
        if kind not in ("str", "bin"):
            raise self.fail(f"a name is needed, there is a value of the kind {kind!r}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a name is not UTF-8") from None

    def keys(self, count: int) -> Iterable[str]:
        """The names of a map of so many entries; the caller reads the value after each."""
        seen: set[str] = set()
        for _ in range(count):
            name = self.text()
            if name in seen:
                raise self.fail(f"it holds the name {name!r} twice")
            seen.add(name)
            self.where.append(name)
            yield name
            self.where.pop()

    def array(self, length: int) -> Region:
        """The array whose extension value has `length` bytes and begins here, with the byte of its type."""
        code = self.take(1)[0]
        if code not in (ARRAY, SCALAR):
            raise self.fail(f"it is an extension value of type {code}, arrays are of type {ARRAY}")
        if length > self.end - self.position:
            raise self.fail(f"its {length} bytes end behind the file, at byte {self.end}; it is truncated")
        outside, self.end = self.end, self.position + length
        if self.head() != ("array", 3):
            raise self.fail("an array must be a list of shape, dtype and bytes")
        kind, rank = self.head()
        if kind != "array":
            raise self.fail("its shape must be a list")
        shape = tuple(self.number() for _ in range(rank))
        name = self.text()
        if name not in DTYPES:
            raise self.fail(f"its dtype is {name!r}; there are {', '.join(DTYPES)}")
        if problem := shape_problem(shape, DTYPES[name].itemsize):
            raise self.fail(problem)
        kind, size = self.head()
        region = Region(shape, DTYPES[name].newbyteorder("<"), self.position)
        if kind not in ("bin", "str") or size != region.nbytes or self.position + size != self.end:
            raise self.fail(f"{name} of shape {shape} takes {region.nbytes} bytes, there are {size}")
        self.position, self.end = self.end, outside
        return region

    def number(self) -> int:
        """The next value, an integer."""
        kind, value = self.head()
        if kind != "int":
            raise self.fail(f"an integer is needed, there is a value of the kind {kind!r}")
        return value

    def chunked(self, count: int) -> Region:
        """An array in pieces: the map of `count` entries whose first was `CHUNKED`."""
        shape: tuple[int, ...] | None = None
        pieces: tuple[Region, ...] = ()
        for name in self.keys(count - 1):
            kind, length = self.head()
            if kind != "map" or name not in ("shape", "chunks"):
                raise self.fail("an array in pieces has the entries 'shape' and 'chunks', both maps")
            if name == "shape":
                shape = tuple(size for _, size in self.listed(length, self.number))
            else:
                pieces = tuple(region for _, region in self.listed(length, self.piece))
        kinds = {piece.dtype for piece in pieces}
        if shape is None or len(kinds) != 1:
            raise self.fail("an array in pieces needs a shape, and pieces of one dtype")
        dtype = kinds.pop()
        if problem := shape_problem(shape, dtype.itemsize):
            raise self.fail(problem)
        region = Region(shape, dtype, pieces[0].offset, pieces=pieces)
        if region.nbytes != sum(piece.nbytes for piece in pieces):
            raise self.fail(f"its pieces do not make up the shape {shape}")
        return region

    def piece(self) -> Region:
        """The next value, an array."""
        kind, length = self.head()
        if kind != "ext":
            raise self.fail(f"a piece must be an array, there is a value of the kind {kind!r}")
        return self.array(length)

    def listed(self, count: int, read: Callable[[], Any]) -> Iterable[tuple[str, Any]]:
        """The entries of a map whose names are numbers in order."""
        for i, name in enumerate(self.keys(count)):
            if name != str(i):
                raise self.fail(f"the entry {i} is called {name!r}")
            yield name, read()

    def tree(self, count: int, found: dict[str, Region]) -> None:
        """Notes the arrays of a map of `count` entries."""
        if len(self.where) >= MAX_DEPTH:
            raise self.fail(f"maps lie in one another more than {MAX_DEPTH} deep")
        for name in self.keys(count):
            if not name or "/" in name:
                raise self.fail("a name must not be empty or hold a slash")
            kind, value = self.head()
            if kind == "ext":
                found["/".join(self.where)] = self.array(value)
            elif kind == "map":
                start = self.position
                if value and self.text() == CHUNKED:
                    if self.head() != ("constant", True):
                        raise self.fail(f"{CHUNKED} must be true")
                    found["/".join(self.where)] = self.chunked(value)
                else:
                    self.position = start
                    self.tree(value, found)
            else:
                raise self.fail(f"an array or a map is needed, there is a value of the kind {kind!r}")


def read_flax(file: MappedFile) -> TensorFile:
    """Reads the tree of a Flax checkpoint; names are joined by slashes, without the collections of batch statistics.

    Raises:
        CheckpointError: naming the file, and the entry if one is at fault.
    """
    reader = Reader(file, 0, file.size)
    kind, count = reader.head()
    if kind != "map":
        raise CheckpointError(f"{file.path}: holds a value of the kind {kind!r}, not a tree of arrays")
    found: dict[str, Region] = {}
    reader.tree(count, found)
    if reader.position != file.size:
        raise CheckpointError(f"{file.path}: {file.size - reader.position} bytes follow the tree; the file is damaged")
    tensors: dict[str, Region] = {}
    for name, region in found.items():
        plain = plain_name(name)
        if plain in tensors:
            raise CheckpointError(f"{file.path}: two collections hold {plain!r}")
        tensors[plain] = region
    return TensorFile(file, "flax", tensors, {})


def plain_name(name: str) -> str:
    """A name without the collection that it is in."""
    first, _, rest = name.partition("/")
    return rest if rest and first in COLLECTIONS else name


def full_names(names: Iterable[str]) -> dict[str, str]:
    """{name: the name in its collection}; there are collections only where there are batch statistics."""
    names = list(names)
    statistics = {name for name in names if name.rpartition("/")[2] in STATISTICS}
    if not statistics:
        return {name: name for name in names}
    return {name: f"{COLLECTIONS[name in statistics]}/{name}" for name in names}


def write_flax(
    write: Callable[[bytes | memoryview], object], tensors: Mapping[str, Region], fetch: Callable[[str], np.ndarray]
) -> None:
    """Writes a Flax checkpoint, byte for byte as `flax.serialization.to_bytes` does, holding one array at a time.

    Args:
        write: takes the bytes in order.
        tensors: shape and dtype of every array, by names joined by slashes, collections included.
        fetch: gives the elements of an array when its turn comes.
    """
    tree: dict[str, Any] = {}
    for name in tensors:
        *inside, last = name.split("/")
        node = tree
        for part in inside:
            node = node.setdefault(part, {})
        node[last] = name

    def array(shape: tuple[int, ...], dtype: np.dtype[Any], data: memoryview) -> None:
        inner = b"\x93" + _sized(shape, 0x90, 0xDC, 0xDD) + b"".join(map(_integer, shape)) + _text(dtype.name)
        inner += _binary(data.nbytes)
        length = len(inner) + data.nbytes
        fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(length)
        write(bytes([fixed, ARRAY]) if fixed else _extension(length))
        write(inner)
        write(data)

    def leaf(name: str) -> None:
        declared, value = tensors[name], fetch(name)
        if value.shape != declared.shape or value.dtype != declared.dtype:
            raise CheckpointError(
                f"{name!r} was declared as {declared.dtype} of shape {declared.shape}, "
                f"it is {value.dtype} of shape {value.shape}"
            )
        flat = np.ascontiguousarray(value).reshape(-1)
        if flat.nbytes <= CHUNK:
            array(value.shape, value.dtype, flat.view(np.uint8).data)
            return
        step = max(1, CHUNK // flat.itemsize)
        pieces = [flat[i : i + step] for i in range(0, flat.size, step)]
        write(b"\x83" + _text(CHUNKED) + b"\xc3" + _text("shape") + _sized(value.shape, 0x80, 0xDE, 0xDF))
        for i, size in enumerate(value.shape):
            write(_text(str(i)) + _integer(size))
        write(_text("chunks") + _sized(pieces, 0x80, 0xDE, 0xDF))
        for i, piece in enumerate(pieces):
            write(_text(str(i)))
            array(piece.shape, piece.dtype, piece.view(np.uint8).data)

    def branch(node: dict[str, Any]) -> None:
        write(_sized(node, 0x80, 0xDE, 0xDF))
        for name, part in node.items():
            write(_text(name))
            if isinstance(part, dict):
                branch(part)
            else:
                leaf(part)

    branch(tree)


def _sized(items: Any, fixed: int, two: int, four: int) -> bytes:
    """The head of a list or map of these items."""
    count = len(items)
    if count < 16:
        return bytes([fixed | count])
    return bytes([two]) + struct.pack(">H", count) if count < 2**16 else bytes([four]) + struct.pack(">I", count)


def _integer(value: int) -> bytes:
    """A size, in as few bytes as it takes."""
    if value < 0x80:
        return bytes([value])
    for limit, first, form in ((2**8, 0xCC, "B"), (2**16, 0xCD, ">H"), (2**32, 0xCE, ">I")):
        if value < limit:
            return bytes([first]) + struct.pack(form, value)
    return b"\xcf" + struct.pack(">Q", value)


def _text(value: str) -> bytes:
    """A string, in as few bytes as it takes."""
    data = value.encode("utf-8")
    if len(data) < 32:
        return bytes([0xA0 | len(data)]) + data
    if len(data) < 2**8:
        return bytes([0xD9, len(data)]) + data
    return b"\xda" + struct.pack(">H", len(data)) + data


def _binary(length: int) -> bytes:
    """The head of so many bytes."""
    if length < 2**8:
        return bytes([0xC4, length])
    return b"\xc5" + struct.pack(">H", length) if length < 2**16 else b"\xc6" + struct.pack(">I", length)


def _extension(length: int) -> bytes:
    """The head of an extension value of so many bytes, with its type."""
    if length < 2**8:
        return bytes([0xC7, length, ARRAY])
    if length < 2**16:
        return b"\xc8" + struct.pack(">H", length) + bytes([ARRAY])
    return b"\xc9" + struct.pack(">I", length) + bytes([ARRAY])
