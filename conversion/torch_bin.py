"""Opens what `torch.save` writes (`pytorch_model.bin`, `*.pt`, `*.pth`), without PyTorch and without running the
pickle.

Two formats exist. Since PyTorch 1.6 the file is a zip archive: a record `data.pkl` describes the tensors and records
`data/0`, `data/1`, ... hold their elements, uncompressed, so that they are mapped in place. Before, it was a stream:
three short pickles (magic number, version, system), the description, the list of storages, and their elements.

Tensors may share a storage (tied weights), lie in it with any strides (a transposed matrix) or at an offset. All of it
is kept: a tensor is a view into the file. The description says where; here it is checked that this lies inside its
storage.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from typing import IO, Any, cast

from formax.conversion.mapped import (
    CheckpointError,
    MappedFile,
    Region,
    TensorFile,
    extent,
    shape_problem,
)
from formax.conversion.torch_pickle import Storage, StoredTensor, load_pickle

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
MAX_PICKLE = 256 * 2**20
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"

# Under which keys training programs put the state dict, for files that nest several.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")

# A tensor expanded by zero strides may be this much larger than the whole file it is in.
EXPANSION = 2**20


@dataclass(frozen=True)
class Record:
    """Where the elements of a storage lie in the file, in bytes."""

    offset: int
    nbytes: int


def read_torch_bin(file: MappedFile) -> TensorFile:
    """Reads the description of a PyTorch checkpoint; the tensors come in the order of the state dict.

    The state dict is the dict of tensors in the file, or the only one nested in it (`{"state_dict": {...}, "epoch":
    3}`). Entries beside the tensors are not read; `metadata` says what they are: the value of strings and numbers, the
    type and length of containers.

    Raises:
        CheckpointError: naming the file, and the tensor if one is at fault.
    """
    if file.data[:4] == ZIP_MAGIC:
        value, records = _read_zip(file)
    else:
        value, records = _read_stream(file)
    tensors, metadata = _state_dict(file, value)
    return TensorFile(
        file, "torch", {name: _region(file, name, tensor, records) for name, tensor in tensors.items()}, metadata
    )


def _read_zip(file: MappedFile) -> tuple[Any, dict[str, Record]]:
    """Value of the pickle in an archive, and its storages by key."""
    path = file.path
    try:
        # Through the map, which hands out no more than the file has, whatever a length field claims.
        with zipfile.ZipFile(cast(IO[bytes], file.data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path}: begins like a PyTorch checkpoint, but its zip directory cannot be read ({error}); "
            "the file is truncated or damaged, save or download it again"
        ) from error
    found: dict[str, Record] = {}
    for entry in entries:
        if entry.filename in found:
            raise CheckpointError(f"{path}: the archive holds the record {entry.filename!r} twice")
        found[entry.filename] = _record(file, entry)

    pickles = [name for name in found if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path}: a zip archive with {len(pickles)} records named 'data.pkl'; a PyTorch checkpoint has one"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in found:
        raise CheckpointError(f"{path}: a TorchScript program, not a state dict; save its state_dict() instead")
    order = found.get(f"{root}byteorder")
    if order is not None and file.data[order.offset : order.offset + min(order.nbytes, 16)] != b"little":
        raise CheckpointError(f"{path}: saved on a big-endian machine; save it again as safetensors")
    record = found[pickles[0]]
    if record.nbytes > MAX_PICKLE:
        raise CheckpointError(f"{path}: its pickle is {record.nbytes} bytes long, at most {MAX_PICKLE} are read")
    value, _ = load_pickle(path, file.data[record.offset : record.offset + record.nbytes])
    data = f"{root}data/"
    return value, {name.removeprefix(data): record for name, record in found.items() if name.startswith(data)}


def _record(file: MappedFile, entry: zipfile.ZipInfo) -> Record:
    """Where the bytes of a record lie: behind its local header, whose length the directory does not tell."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: record {entry.filename!r} {problem}")

    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise fail("is compressed or encrypted, which torch.save never does; save the checkpoint again")
    start = entry.header_offset
    header = file.data[start : start + 30] if start >= 0 else b""
    if len(header) < 30 or header[:4] != ZIP_MAGIC:
        raise fail("has no header where the directory says; the file is damaged")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    offset = start + 30 + name_length + extra_length
    if offset + entry.file_size > file.size:
        raise fail(f"ends at byte {offset + entry.file_size}, the file at byte {file.size}; it is truncated")
    return Record(offset, entry.file_size)


def _read_stream(file: MappedFile) -> tuple[Any, dict[str, Record]]:
    """Value of the main pickle of a file from before PyTorch 1.6, and its storages by key."""
    path = file.path
    magic, position = load_pickle(path, file.data)
    if magic != MAGIC_NUMBER:
        raise CheckpointError(f"{path}: a pickle, but not one that torch.save wrote; save the weights as safetensors")
    version, position = load_pickle(path, file.data, position)
    if version != PROTOCOL_VERSION:
        raise CheckpointError(f"{path}: not version {PROTOCOL_VERSION} of the PyTorch format, the only one there is")
    system, position = load_pickle(path, file.data, position)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: saved on a big-endian machine; save it again as safetensors")
    storages: dict[str, Storage] = {}
    value, position = load_pickle(path, file.data, position, storages)
    keys, position = load_pickle(path, file.data, position)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: the list of storages must hold strings; the file is damaged")

    records: dict[str, Record] = {}
    for key in keys:
        if key not in storages or key in records:
            raise CheckpointError(f"{path}: storage {key!r} is listed twice or used by no tensor; the file is damaged")
        dtype, numel = storages[key].dtype, storages[key].numel
        nbytes = numel * (1 if dtype is None else dtype.itemsize)
        if position + 8 + nbytes > file.size:
            raise CheckpointError(
                f"{path}: storage {key!r} ends at byte {position + 8 + nbytes}, the file at byte {file.size}; "
                "it is truncated"
            )
        stored = int.from_bytes(file.data[position : position + 8], "little")
        if stored != numel:
            raise CheckpointError(
                f"{path}: storage {key!r} has {stored} elements, the pickle says {numel}; the file is damaged"
            )
        records[key] = Record(position + 8, nbytes)
        position += 8 + nbytes
    return value, records


def _state_dict(file: MappedFile, value: Any) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Picks the dict of tensors out of what was saved; also describes what stands beside the tensors."""
    path = file.path
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {_describe(value)}, not a dict of tensors; save the state dict")
    metadata: dict[str, str] = {}
    if not _has_tensors(value):
        nested = {key: item for key, item in value.items() if isinstance(item, dict) and _has_tensors(item)}
        known = [key for key in STATE_DICT_KEYS if key in nested]
        if not nested:
            raise CheckpointError(f"{path}: holds no dict of tensors; its keys are {_some(value)}")
        if len(nested) > 1 and len(known) != 1:
            raise CheckpointError(
                f"{path}: holds several dicts of tensors, {_some(nested)}; save the one you want alone"
            )
        chosen = known[0] if len(nested) > 1 else next(iter(nested))
        metadata = {str(key): _describe(item) for key, item in value.items() if key != chosen}
        value = nested[chosen]
    tensors = {}
    for key, item in value.items():
        if not isinstance(item, StoredTensor):
            metadata[str(key)] = _describe(item)
        elif not isinstance(key, str):
            raise CheckpointError(f"{path}: a tensor has the key {key!r}, which is not a string")
        else:
            tensors[key] = item
    return tensors, metadata


def _has_tensors(value: dict[Any, Any]) -> bool:
    return any(isinstance(item, StoredTensor) for item in value.values())


def _some(value: dict[Any, Any]) -> str:
    """The first keys of a dict, for messages."""
    return ", ".join(repr(key)[:80] for key in list(value)[:10]) + (", ..." if len(value) > 10 else "") or "none"


def _describe(value: Any) -> str:
    """A short text about an entry that is no tensor: a plain value itself, the kind and length of a container."""
    if value is None or isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, (dict, list, tuple, bytes)):
        return f"{type(value).__name__} of length {len(value)}"
    return {StoredTensor: "tensor", Storage: "storage"}.get(type(value), "name")


def _region(file: MappedFile, name: str, tensor: StoredTensor, records: dict[str, Record]) -> Region:
    """Where a tensor lies in the file, once it is sure that it lies inside its storage."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: tensor {name!r}: {problem}")

    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    record = records.get(storage.key)
    if record is None:
        raise fail(f"its storage {storage.key!r} is not in the file, which is truncated or damaged")
    unit = 1 if storage.dtype is None else storage.dtype.itemsize
    if record.nbytes < storage.numel * unit:
        raise fail(f"its storage {storage.key!r} has {record.nbytes} bytes, {storage.numel * unit} are needed")

    if problem := shape_problem(tensor.shape, itemsize):
        raise fail(problem)
    shape, strides, offset = tuple(tensor.shape), tensor.strides, tensor.offset
    if not isinstance(strides, tuple) or not all(type(stride) is int and stride >= 0 for stride in strides):
        raise fail("its strides must be integers, none negative")
    if len(strides) != len(shape):
        raise fail(f"it has {len(shape)} dimensions and {len(strides)} strides")
    if type(offset) is not int or offset < 0:
        raise fail("its offset must be an integer, not negative")
    if 0 in shape:
        return Region(shape, tensor.dtype, record.offset)
    end = (offset + extent(shape, strides) + 1) * itemsize
    if end > storage.length * unit:
        raise fail(f"shape {shape}, strides {strides} and offset {offset} reach outside its storage")
    region = Region(
        shape,
        tensor.dtype,
        record.offset + storage.start * unit + offset * itemsize,
        # Along an axis of one element the stride is never used, and may be any number.
        tuple(stride * itemsize if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)),
    )
    if region.nbytes > file.size + EXPANSION:
        raise fail(f"expanded to shape {shape} it takes {region.nbytes} bytes, the whole file has {file.size}")
    return region
