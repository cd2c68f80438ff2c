"""Reads the pickles inside PyTorch checkpoints without running them.

A pickle is a program for a stack machine, and Python's own machine lets it import and call anything. The one here has
no such power: it knows the instructions that `torch.save` writes for tensors and containers, and the handful of names
that rebuild a tensor are labels which it interprets itself. Whatever else a pickle names is refused, by name. Tensors
come out as a description of where their elements are stored.
"""

from __future__ import annotations

import pickle
import struct
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from formax.conversion.mapped import CheckpointError

# Far beyond any checkpoint (about 45 instructions a tensor); they bound the memory that a hostile file can claim.
MAX_INSTRUCTIONS = 10_000_000
MAX_STRING = 16 * 2**20
MAX_NAME = 1000

# How deep an error message looks into the stack for the key it concerns.
SEARCHED = 1000


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of elements that tensors lie in.

    Attributes:
        key: Its name in the checkpoint.
        dtype: Type of the elements; None for an untyped storage, which counts bytes.
        numel: Elements in the record of that name.
        start: First element of this storage in the record; not zero only in views, which old files have.
        length: Elements of this storage.
    """

    key: str
    dtype: np.dtype[Any] | None
    numel: int
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as the pickle describes it, unchecked: `offset`, `shape` and `strides` (in elements) may be anything."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True)
class Label:
    """A name that a pickle may use; `dtype` is that of a storage type or of a torch dtype."""

    name: str
    dtype: np.dtype[Any] | None = None


_STORAGES: Mapping[str, Any] = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": "<c8",
    "ComplexDoubleStorage": "<c16",
}
_DTYPES: Mapping[str, Any] = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": ml_dtypes.bfloat16,
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "i1",
    "uint64": "<u8",
    "uint32": "<u4",
    "uint16": "<u2",
    "uint8": "u1",
    "bool": np.bool_,
    "complex64": "<c8",
    "complex128": "<c16",
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
_LABELS: Mapping[tuple[str, str], Label] = MappingProxyType(
    {
        ("collections", "OrderedDict"): Label("OrderedDict"),
        ("torch", "Size"): Label("Size"),
        ("torch", "UntypedStorage"): Label("storage"),
        ("torch.storage", "UntypedStorage"): Label("storage"),
        **{("torch._utils", name): Label(name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2")},
        **{("torch._utils", name): Label(name) for name in ("_rebuild_tensor_v3", "_rebuild_parameter")},
        **{("torch", name): Label("storage", np.dtype(dtype)) for name, dtype in _STORAGES.items()},
        **{("torch", name): Label("dtype", np.dtype(dtype)) for name, dtype in _DTYPES.items()},
    }
)


def load_pickle(
    path: Path, data: bytes | mmap, position: int = 0, storages: dict[str, Storage] | None = None
) -> tuple[Any, int]:
    """Reads one pickle.

    Args:
        path: The file it stands in, for messages.
        data: The bytes.
        position: Where the pickle starts.
        storages: Filled with the storages that the pickle refers to, by key.

    Returns:
        The value, made of dicts, lists, tuples, numbers, strings, `StoredTensor`, `Storage` and `Label`, and the
        position behind the pickle.

    Raises:
        CheckpointError: if it is truncated, damaged, or names or does anything that tensors do not need.
    """
    machine = _Machine(path, data, position, {} if storages is None else storages)
    return machine.run(), machine.position


class _Machine:
    """The state of the stack machine."""

    def __init__(self, path: Path, data: bytes | mmap, position: int, storages: dict[str, Storage]) -> None:
        self.path = path
        self.data = data
        self.position = position
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Executes instructions up to the end of the pickle and returns its value."""
        for _ in range(MAX_INSTRUCTIONS):
            opcode = self.take(1)
            if opcode == pickle.STOP:
                return self.pop()
            self.step(opcode)
        raise self.fail(f"the pickle has more than {MAX_INSTRUCTIONS} instructions")

    def step(self, opcode: bytes) -> None:
        """Executes one instruction."""
        match opcode:
            case pickle.PROTO:
                self.take(1)
            case pickle.FRAME:
                self.take(8)
            case pickle.MARK:
                self.marks.append(len(self.stack))
            case pickle.NONE:
                self.stack.append(None)
            case pickle.NEWTRUE:
                self.stack.append(True)
            case pickle.NEWFALSE:
                self.stack.append(False)
            case pickle.BININT:
                self.stack.append(int.from_bytes(self.take(4), "little", signed=True))
            case pickle.BININT1:
                self.stack.append(self.number(1))
            case pickle.BININT2:
                self.stack.append(self.number(2))
            case pickle.LONG1:
                self.stack.append(int.from_bytes(self.take(self.number(1)), "little", signed=True))
            case pickle.BINFLOAT:
                self.stack.append(struct.unpack(">d", self.take(8))[0])
            case pickle.BINUNICODE | pickle.BINSTRING:
                self.stack.append(self.text(self.number(4)))
            case pickle.SHORT_BINUNICODE | pickle.SHORT_BINSTRING:
                self.stack.append(self.text(self.number(1)))
            case pickle.BINUNICODE8:
                self.stack.append(self.text(self.number(8)))
            case pickle.BINBYTES:
                self.stack.append(self.take(self.number(4)))
            case pickle.SHORT_BINBYTES:
                self.stack.append(self.take(self.number(1)))
            case pickle.EMPTY_DICT:
                self.stack.append({})
            case pickle.EMPTY_LIST:
                self.stack.append([])
            case pickle.EMPTY_TUPLE:
                self.stack.append(())
            case pickle.TUPLE:
                self.stack.append(tuple(self.pop_to_mark()))
            case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                size = 1 + (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3).index(opcode)
                self.stack.append(tuple(reversed([self.pop() for _ in range(size)])))
            case pickle.APPEND:
                value = self.pop()
                self.top(list).append(value)
            case pickle.APPENDS:
                values = self.pop_to_mark()
                self.top(list).extend(values)
            case pickle.SETITEM:
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case pickle.SETITEMS:
                self.set_items(self.pop_to_mark())
            case pickle.BINPUT:
                self.memo[self.number(1)] = self.top()
            case pickle.LONG_BINPUT:
                self.memo[self.number(4)] = self.top()
            case pickle.MEMOIZE:
                self.memo[len(self.memo)] = self.top()
            case pickle.BINGET:
                self.stack.append(self.recall(self.number(1)))
            case pickle.LONG_BINGET:
                self.stack.append(self.recall(self.number(4)))
            case pickle.GLOBAL | pickle.INST:
                module, name = self.line(), self.line()
                self.stack.append(self.label(module, name))
                if opcode == pickle.INST:
                    raise self.fail(f"the pickle creates an instance of {module}.{name}, which no tensor needs")
            case pickle.STACK_GLOBAL:
                name, module = self.pop(), self.pop()
                self.stack.append(self.label(module, name))
            case pickle.BINPERSID:
                self.stack.append(self.storage(self.pop()))
            case pickle.REDUCE:
                arguments, function = self.pop(), self.pop()
                self.stack.append(self.rebuild(function, arguments))
            case pickle.BUILD:
                # The attributes of an OrderedDict: a state dict carries module versions there.
                self.pop()
                self.top(dict)
            case _:
                raise self.fail(
                    f"instruction {opcode!r} at byte {self.position - 1} is none that torch.save writes for tensors "
                    "with pickle protocol 2 or later"
                )

    # The stream.

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > MAX_STRING:
            raise self.fail(f"the pickle holds a string of {count} bytes, at most {MAX_STRING} are allowed")
        found = self.data[self.position : self.position + count]
        if len(found) < count:
            raise self.fail("the pickle ends in the middle of an instruction; the file is truncated or damaged")
        self.position += count
        return found

    def number(self, count: int) -> int:
        """The next bytes as an unsigned integer."""
        return int.from_bytes(self.take(count), "little")

    def text(self, count: int) -> str:
        """The next bytes as a string."""
        found = self.take(count)
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"the string {found[:40]!r} is not UTF-8") from error

    def line(self) -> str:
        """The name up to the next newline."""
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME)
        if end < 0:
            raise self.fail("a name in the pickle does not end; the file is truncated or damaged")
        found = self.text(end - self.position)
        self.position += 1
        return found

    # The stack.

    def pop(self) -> Any:
        """Removes and returns the top of the stack, above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.fail("the pickle takes more from its stack than it put there; the file is damaged")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Removes the last mark and what lies above it, and returns that."""
        if not self.marks:
            raise self.fail("the pickle closes a sequence that it did not open; the file is damaged")
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def top(self, kind: type = object) -> Any:
        """The top of the stack, which must be of this kind."""
        value = self.pop()
        if not isinstance(value, kind):
            raise self.fail(f"the pickle treats a {type(value).__name__} as a {kind.__name__}; the file is damaged")
        self.stack.append(value)
        return value

    def recall(self, index: int) -> Any:
        """A value stored in the memo."""
        if index not in self.memo:
            raise self.fail(f"the pickle recalls value {index}, which it never stored; the file is damaged")
        return self.memo[index]

    def set_items(self, items: list[Any]) -> None:
        """Puts keys and values, alternating, into the dict on top of the stack."""
        if len(items) % 2:
            raise self.fail("a dict has a key without a value; the file is damaged")
        self.fill(self.top(dict), list(zip(items[::2], items[1::2], strict=True)))

    def fill(self, target: dict[Any, Any], pairs: list[Any]) -> None:
        """Puts pairs into a dict. Keys are plain values: hashing a nested tuple can take forever."""
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise self.fail("an OrderedDict is made of something else than pairs; the file is damaged")
            key, value = pair
            if not isinstance(key, (str, int, float, bytes, type(None))):
                raise self.fail(f"a dict has a key of type {type(key).__name__}; a number or string is expected")
            target[key] = value

    # The names.

    def label(self, module: Any, name: Any) -> Label:
        """What a name stands for, if it is one of those that tensors need."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.fail("the pickle imports something that is not a name; the file is damaged")
        found = _LABELS.get((module, name))
        if found is None:
            raise self.fail(
                f"the pickle names {module[:MAX_NAME]}.{name[:MAX_NAME]}; only tensors are read, "
                "nothing is imported or called. Save the state dict alone, best as safetensors"
            )
        return found

    def storage(self, identifier: Any) -> Storage:
        """The storage that a persistent identifier describes: ('storage', type, key, location, numel[, view])."""
        match identifier:
            case ("storage", Label("storage", dtype), str(key), _, int(numel), *view) if numel >= 0 and len(view) <= 1:
                match view:
                    case [] | [None]:
                        start, length = 0, numel
                    case [(str(), int(start), int(length))] if start >= 0 and 0 <= length <= numel - start:
                        pass
                    case _:
                        raise self.fail(f"storage {key!r} is a view that does not lie in its {numel} elements")
                found = Storage(key, dtype, numel, start, length)
                self.storages.setdefault(key, found)
                return found
        raise self.fail("the pickle refers to something that is not the storage of a tensor")

    def rebuild(self, function: Any, arguments: Any) -> Any:
        """What calling `function` would give."""
        match function, arguments:
            case Label("OrderedDict"), ():
                return {}
            case Label("OrderedDict"), ([*pairs],):
                made: dict[Any, Any] = {}
                self.fill(made, pairs)
                return made
            case Label("Size"), ([*shape],):
                return tuple(shape)
            case Label("_rebuild_parameter"), (StoredTensor() as tensor, _, _):
                return tensor
            case Label("_rebuild_tensor" | "_rebuild_tensor_v2"), (
                Storage(dtype=np.dtype() as dtype) as storage,
                offset,
                shape,
                strides,
                *rest,
            ):
                self.check_metadata(rest[2:])
                return StoredTensor(storage, dtype, offset, shape, strides)
            case Label("_rebuild_tensor_v3"), (
                Storage() as storage,
                offset,
                shape,
                strides,
                _,
                _,
                Label("dtype", np.dtype() as dtype),
                *rest,
            ):
                self.check_metadata(rest)
                return StoredTensor(storage, dtype, offset, shape, strides)
            case Label(name), _:
                raise self.fail(f"the pickle calls {name} with arguments that PyTorch does not write")
        raise self.fail(f"the pickle calls a {type(function).__name__}; the file is damaged")

    def check_metadata(self, rest: list[Any]) -> None:
        """Refuses the lazily conjugated or negated tensors that PyTorch marks with metadata."""
        if rest and rest[0]:
            raise self.fail("the tensor is lazily conjugated or negated; resolve it before saving")

    # Messages.

    def fail(self, problem: str) -> CheckpointError:
        """An error that names the file and, where one is being read, the key."""
        key = self.key()
        return CheckpointError(f"{self.path}: {problem}" if key is None else f"{self.path}: at key {key!r}: {problem}")

    def key(self) -> str | None:
        """The innermost dict key whose value is being read, as well as the stack shows it."""
        last = len(self.stack) - 1
        for index in range(last, max(last - SEARCHED, 0), -1):
            value = self.stack[index]
            if isinstance(value, str):
                below = bisect_right(self.marks, index)
                start = self.marks[below - 1] if below else 0
                in_pairs = start > 0 and isinstance(self.stack[start - 1], dict) and (index - start) % 2 == 0
                if in_pairs or isinstance(self.stack[index - 1], dict):
                    return value[:MAX_NAME]
        return None
