"""Opens and writes checkpoints: one file or an index of several, in the layout of Hugging Face.

This is the door to the readers of the file formats. A checkpoint is a mapping from tensor names to shapes and dtypes;
the elements stay in the memory-mapped files until they are read. What a name means to a model is not known here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from formax.conversion.atomic import Change, Staging, leftovers_of
from formax.conversion.mapped import CheckpointError, MappedFile, Region, TensorFile, parse_json
from formax.conversion.safetensors import (
    TensorLike,
    check_storable,
    looks_like_safetensors,
    read_safetensors,
    write_safetensors,
)
from formax.conversion.torch_bin import PICKLE_MAGIC, ZIP_MAGIC, read_torch_bin

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "TensorLike", "open_checkpoint", "write_checkpoint"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

# What a directory may hold, the preferred first.
CANDIDATES = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# What it may hold besides, and what to say about it.
FOREIGN = {
    "tf_model.h5": "TensorFlow weights, which formax does not read yet",
    "flax_model.msgpack": "Flax weights, which formax does not read yet",
    "flax_model.msgpack.index.json": "Flax weights, which formax does not read yet",
    "adapter_model.safetensors": "an adapter, which needs the model it belongs to",
}
# How files begin that get saved in the place of weights, or that other formats have.
MISTAKEN = (
    (
        re.compile(rb"version https://git-lfs"),
        "a Git LFS pointer, not the weights; run `git lfs pull` in the repository or download the file itself",
    ),
    (
        re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE),
        "a web page saved in the place of the weights; download the file itself (hub addresses: 'resolve', not 'blob')",
    ),
    (re.compile(rb"\x89HDF\r\n"), "an HDF5 file (TensorFlow or Keras weights), which formax does not read yet"),
    (re.compile(rb"GGUF"), "a GGUF file, which formax does not read yet"),
)
MAX_INDEX = 100_000_000
PYTORCH_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
NO_FILES: Mapping[str, bytes] = MappingProxyType({})

UNITS = {"": 1, "B": 1}
UNITS |= {f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}IB": 2 ** (10 * power) for power, prefix in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Path


class Checkpoint(Mapping[str, TensorInfo]):
    """An opened checkpoint: a mapping from names to `TensorInfo`, in the order of its files, and a context manager.

    Attributes:
        path: What was opened.
        format: "safetensors" or "torch".
        metadata: The `__metadata__` of safetensors files, the first file counting if several disagree; for PyTorch
            files the entries that are no tensors, as `torch_bin.read_torch_bin` says.
    """

    def __init__(self, path: Path, parts: Sequence[TensorFile]) -> None:
        """Joins opened files that share no name."""
        self.path = path
        self.format = parts[0].format
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, tuple[TensorInfo, MappedFile, Region]] = {}
        self._closed = False
        for part in parts:
            self.metadata = part.metadata | self.metadata
            for name, region in part.tensors.items():
                self._tensors[name] = (TensorInfo(region.shape, region.dtype, part.file.path), part.file, region)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._entry(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {len(self)} tensors, {self.format}>"

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor in the mapped file: nothing is copied, and nothing read before it is touched.

        The strides may be any (PyTorch saves transposed matrices as such). The dtype is that of the file; bfloat16 and
        8-bit floats are those of `ml_dtypes`. The view stays valid after `close`.

        Raises:
            KeyError: if there is no tensor of that name.
            CheckpointError: if the checkpoint is closed.
        """
        _, file, region = self._entry(name)
        return file.array(region)

    def release(self, name: str) -> None:
        """Drops a tensor's pages from this process's memory. A hint: views stay valid and later reads work."""
        _, file, region = self._entry(name)
        file.release(region)

    def close(self) -> None:
        """Lets the files go; arrays that were read keep theirs."""
        self._tensors = {}
        self._closed = True

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> tuple[TensorInfo, MappedFile, Region]:
        if self._closed:
            raise CheckpointError(f"{self.path}: the checkpoint is closed; open it again to read {name!r}")
        return self._tensors[name]


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a weights file, an index, or a directory that holds one.

    In a directory the first of `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin` and
    `pytorch_model.bin.index.json` is taken. The format of a file is told by its first bytes, not by its name.

    Raises:
        CheckpointError: naming the file, and the tensor if one is at fault.
    """
    path = Path(path)
    file = _choose(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return Checkpoint(path, _open_index(file))
    return Checkpoint(path, [_open_file(file)])


def _choose(directory: Path) -> Path:
    """The file of a directory to open."""
    for name in CANDIDATES:
        if (directory / name).exists():
            return directory / name
    names = sorted(path.name for path in directory.iterdir())
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    notes = [f"{name} holds {what}" for name, what in FOREIGN.items() if name in names]
    if any(SHARD.fullmatch(name) for name in names):
        notes.append(f"the shards there need their {INDEX}")
    if left := [str(folder) for folder in leftovers_of(directory)]:
        notes.append(f"a save is under way or was interrupted, and its files are in {', '.join(left)}")
    if alone := [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]:
        notes.append(f"{alone[0]} is a weights file of another name; rename it to one of these")
    raise CheckpointError(
        f"{directory}: no weights; expected one of {', '.join(CANDIDATES)}, found {listed or 'nothing'}"
        + "".join(f"; {note}" for note in notes)
    )


def _map(path: Path) -> MappedFile:
    """Maps a file, unless it is of a kind that often lies where something else should."""
    file = MappedFile(path)
    head = file.data[:1024]
    for pattern, what in MISTAKEN:
        if pattern.match(head):
            raise CheckpointError(f"{path}: the file is {what}")
    return file


def _open_file(path: Path) -> TensorFile:
    """Opens one weights file, of whatever format."""
    file = _map(path)
    head = file.data[:1024]
    if head.startswith((ZIP_MAGIC, PICKLE_MAGIC)) and not looks_like_safetensors(head):
        return read_torch_bin(file)
    if looks_like_safetensors(head) or path.suffix == ".safetensors":
        return read_safetensors(file)
    raise CheckpointError(
        f"{path}: neither a safetensors file nor a PyTorch checkpoint; it begins with the bytes {head[:16]!r}"
    )


def _open_index(path: Path) -> list[TensorFile]:
    """Opens the files that an index names, and checks that they hold what it says."""
    file = _map(path)
    if file.size > MAX_INDEX:
        raise CheckpointError(f"{path}: the index is {file.size} bytes long, at most {MAX_INDEX} are read")
    places = parse_json(path, file.data[:], "the index").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: the index must hold 'weight_map', an object from tensor names to file names")
    for name, place in places.items():
        if not isinstance(place, str) or not _is_inside(place):
            raise CheckpointError(
                f"{path}: the index puts {name!r} into {place!r}; it must be the name of a file in the same directory"
            )
        if not (path.parent / place).exists():
            raise CheckpointError(
                f"{path}: the index puts {name!r} into {place!r}, which is missing; download or save it again"
            )

    parts = {place: _open_file(path.parent / place) for place in dict.fromkeys(places.values())}
    if len({part.format for part in parts.values()}) > 1:
        raise CheckpointError(f"{path}: the index mixes safetensors and PyTorch files")
    for name, place in places.items():
        if name not in parts[place].tensors:
            raise CheckpointError(f"{path}: the index puts {name!r} into {place!r}, which does not hold it")
    # A file may hold tensors that the index does not list: no other program minds, and the model judges by name.
    holders: dict[str, str] = {}
    for place, part in parts.items():
        for name in part.tensors:
            if name in holders:
                raise CheckpointError(f"{path}: both {holders[name]!r} and {place!r} hold the tensor {name!r}")
            holders[name] = place
    return list(parts.values())


def _is_inside(name: str) -> bool:
    """Whether a name from a file can only mean something below the directory it is in.

    Judged by the name: the cache of the Hugging Face hub is made of links that lead elsewhere.
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set("\\\0") & set(name)


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, TensorLike],
    fetch: Callable[[str], np.ndarray],
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] = PYTORCH_METADATA,
    files: Mapping[str, bytes] = NO_FILES,
) -> list[Path]:
    """Writes a checkpoint as safetensors, all of it or nothing, holding one tensor in memory at a time.

    Everything is written beside and then moved into place. A new directory appears whole. In an existing one the
    weights come first, then the index, then `files`; older weights that formax or `save_pretrained` wrote there are
    removed, nothing else. A process killed before the moves leaves the old checkpoint as it was. One killed among the
    moves, which take no longer than a few renames, leaves a checkpoint that opens with the old or the new weights, or
    an error, never a mixture of both.

    Args:
        directory: Where to; missing parents are created.
        tensors: Name, shape and dtype of all tensors; they are divided among files in this order.
        fetch: Gives the elements of a tensor when its turn comes.
        max_shard_size: Size of a file in bytes, or as "5GB" (10^9), "200MB", "1GiB" (2^30); a larger tensor has a file
            of its own.
        metadata: Strings for the header of each file.
        files: Contents of other files by their name (config.json and the like).

    Returns:
        The files written.

    Raises:
        CheckpointError: if a tensor cannot be stored or is not what it was declared to be, if a name in `files` leads
            out of the directory, or if the disk refuses. What `fetch` raises is passed on.
    """
    directory = Path(directory)
    limit = parse_size(max_shard_size)
    declared = {name: check_storable(name, tensor) for name, tensor in tensors.items()}
    shards = split(declared, limit)
    weights = list(shards)
    if len(shards) > 1:
        weights.append(INDEX)
    for name in files:
        if not _is_inside(name) or name in CANDIDATES or SHARD.fullmatch(name):
            raise CheckpointError(
                f"cannot save a file as {name!r}: it must lie in the directory and be none of the weights"
            )

    with Staging(directory) as staging:
        for shard, names in shards.items():
            with staging.open(shard) as write:
                write_safetensors(write, {name: declared[name] for name in names}, fetch, metadata)
        if len(shards) > 1:
            with staging.open(INDEX) as write:
                write(_index(declared, shards))
        for name, content in files.items():
            with staging.open(name) as write:
                write(content)
        staging.commit(_changes(directory, weights, list(files)))
    return [directory / name for name in (*weights, *files)]


def _changes(directory: Path, weights: list[str], files: list[str]) -> list[Change]:
    """In which order to move the new files to a directory and to remove its old weights.

    At each step the directory opens as the old checkpoint or as the new one, or not at all.
    """
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    stale = sorted(name for name in names if name in (SINGLE, INDEX) or SHARD.fullmatch(name))
    changes: list[Change] = []
    if INDEX in names and set(weights) & set(stale) - {INDEX, SINGLE}:
        # The old index would name new shards among old ones.
        changes.append(("remove", INDEX))
    changes += [("place", name) for name in weights]
    # A single file is preferred to an index: an old one has to go before the new weights are the ones that open.
    if SINGLE in stale and SINGLE not in weights:
        changes.append(("remove", SINGLE))
    changes += [("place", name) for name in files]
    changes += [("remove", name) for name in stale if name not in (*weights, SINGLE)]
    return changes


def _index(tensors: Mapping[str, Region], shards: Mapping[str, Sequence[str]]) -> bytes:
    """The text of the index of these shards."""
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: shard for shard, names in shards.items() for name in names},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")


def split(tensors: Mapping[str, Region], limit: int) -> dict[str, list[str]]:
    """Divides tensors among files as `save_pretrained` of Hugging Face does: in order, a new file when the next one
    does not fit.

    Returns:
        The names of the tensors of each file, by the name of the file.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > limit:
            shards.append([name])
            continue
        if size + tensor.nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += tensor.nbytes
    if current or not shards:
        shards.append(current)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, 1)}


def parse_size(size: int | str) -> int:
    """Bytes of a size like 5000, "5GB" (10^9), "200MB", "1.5GiB" (2^30).

    Raises:
        ValueError: if it is none, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*", str(size).upper())
    if match is None or match[2] not in UNITS or (found := int(float(match[1]) * UNITS[match[2]])) <= 0:
        raise ValueError(f"max_shard_size is {size!r}; give bytes, or a size such as '5GB', '200MB' or '1GiB'")
    return found
