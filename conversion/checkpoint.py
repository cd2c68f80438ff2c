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

from formax.conversion import flax_msgpack, tf_h5
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


@dataclass(frozen=True)
class Format:
    """What the files of a checkpoint are called.

    Attributes:
        stem: of all of them.
        suffix: of the weights, with its dot.
    """

    stem: str
    suffix: str

    @property
    def single(self) -> str:
        """The only file of weights."""
        return self.stem + self.suffix

    @property
    def index(self) -> str:
        """What says which of several files holds what."""
        return f"{self.single}.index.json"

    def shard(self, number: int, count: int) -> str:
        """One of several files, counted from 1."""
        return f"{self.stem}-{number:05d}-of-{count:05d}{self.suffix}"

    def is_shard(self, name: str) -> bool:
        """Whether a file is one of several."""
        return re.fullmatch(rf"{re.escape(self.stem)}-\d{{5}}-of-\d{{5}}{re.escape(self.suffix)}", name) is not None


# By framework, as that which `save_pretrained` writes.
FORMATS = {
    "pytorch": Format("model", ".safetensors"),
    "flax": Format("flax_model", ".msgpack"),
    "tf": Format("tf_model", ".h5"),
}
SINGLE, INDEX = FORMATS["pytorch"].single, FORMATS["pytorch"].index
# What a directory may hold, by framework, the preferred first.
FILES: dict[str, tuple[str, ...]] = {name: (one.single, one.index) for name, one in FORMATS.items()}
FILES["pytorch"] += ("pytorch_model.bin", "pytorch_model.bin.index.json")
CANDIDATES: tuple[str, ...] = sum(FILES.values(), ())
# What it may hold besides, and what to say about it.
FOREIGN = {
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
    (re.compile(rb"GGUF"), "a GGUF file, which formax does not read yet"),
)
TITLES = {"safetensors": "safetensors", "torch": "PyTorch", "flax": "Flax", "tf": "TensorFlow"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5")
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
        format: "safetensors", "torch", "flax" or "tf".
        framework: "pytorch", "flax" or "tf": whose names and layouts these are.
        separator: what stands between the parts of a name.
        metadata: The `__metadata__` of safetensors files, the first file counting if several disagree; for PyTorch
            files the entries that are no tensors, as `torch_bin.read_torch_bin` says.
    """

    def __init__(self, path: Path, parts: Sequence[TensorFile]) -> None:
        """Joins opened files that share no name."""
        self.path = path
        self.format = parts[0].format
        self.framework = self.format if self.format in FORMATS else "pytorch"
        self.separator = "." if self.framework == "pytorch" else "/"
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


def open_checkpoint(path: Path, framework: str | None = None) -> Checkpoint:
    """Opens a weights file, an index, or a directory that holds one.

    In a directory the first of `CANDIDATES` is taken: safetensors, then PyTorch's pickles, Flax's MessagePack,
    TensorFlow's HDF5; each as one file, or an index of several. The format of a file is told by its first bytes, not by
    its name.

    Args:
        path: What to open.
        framework: "pytorch", "flax" or "tf", to look for the files of that one alone.

    Raises:
        CheckpointError: naming the file, and the tensor if one is at fault.
        ImportError: the format needs a package that is not installed.
    """
    path = Path(path)
    file = _choose(path, CANDIDATES if framework is None else FILES[framework]) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return Checkpoint(path, _open_index(file))
    return Checkpoint(path, [_open_file(file)])


def _choose(directory: Path, candidates: tuple[str, ...]) -> Path:
    """The file of a directory to open."""
    for name in candidates:
        if (directory / name).exists():
            return directory / name
    names = sorted(path.name for path in directory.iterdir())
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    notes = [f"{name} holds {what}" for name, what in FOREIGN.items() if name in names]
    for one in FORMATS.values():
        if one.index in candidates and any(map(one.is_shard, names)):
            notes.append(f"the shards there need their {one.index}")
    if others := [name for name in CANDIDATES if name in names]:
        notes.append(f"without from_pt=, from_flax= and from_tf= it opens {others[0]}")
    if left := [str(folder) for folder in leftovers_of(directory)]:
        notes.append(f"a save is under way or was interrupted, and its files are in {', '.join(left)}")
    if alone := [name for name in names if name.endswith(WEIGHTS) and name not in CANDIDATES]:
        notes.append(f"{alone[0]} is a weights file of another name; rename it to one of these")
    raise CheckpointError(
        f"{directory}: no weights; expected one of {', '.join(candidates)}, found {listed or 'nothing'}"
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
    if head.startswith(tf_h5.MAGIC):
        return tf_h5.read_tf(file)
    if looks_like_safetensors(head) or path.suffix == ".safetensors":
        return _as_framework(read_safetensors(file))
    if flax_msgpack.looks_like_flax(head):
        return flax_msgpack.read_flax(file)
    raise CheckpointError(
        f"{path}: neither a safetensors file nor a PyTorch checkpoint, nor one of Flax or TensorFlow; it begins with "
        f"the bytes {head[:16]!r}"
    )


def _as_framework(part: TensorFile) -> TensorFile:
    """A safetensors file as what its metadata says that it is: Flax's and TensorFlow's classes wrote some, too."""
    match part.metadata.get("format"):
        case "flax":
            names = {name: flax_msgpack.plain_name(name.replace(".", "/")) for name in part.tensors}
        case "tf":
            names = {name: tf_h5.plain_name(name) for name in part.tensors}
        case _:
            return part
    tensors = {names[name]: region for name, region in part.tensors.items()}
    return TensorFile(part.file, part.metadata["format"], tensors, part.metadata)


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
    if len(formats := sorted({TITLES[part.format] for part in parts.values()}, key=str.swapcase)) > 1:
        raise CheckpointError(f"{path}: the index mixes {' and '.join(formats)} files")
    plain = {"flax": flax_msgpack.plain_name, "tf": tf_h5.index_name}.get(next(iter(parts.values())).format, str)
    for name, place in places.items():
        if plain(name) not in parts[place].tensors:
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
    framework: str = "pytorch",
    keras: tf_h5.Keras | None = None,
) -> list[Path]:
    """Writes a checkpoint, all of it or nothing, holding one tensor in memory at a time.

    Everything is written beside and then moved into place. A new directory appears whole. In an existing one the
    weights come first, then the index, then `files`; older weights in the same format that formax or `save_pretrained`
    wrote there are removed, nothing else. A process killed before the moves leaves the old checkpoint as it was. One
    killed among the moves, which take no longer than a few renames, leaves a checkpoint that opens with the old or the
    new weights, or an error, never a mixture of both.

    Args:
        directory: Where to; missing parents are created.
        tensors: Name, shape and dtype of all tensors; they are divided among files in this order.
        fetch: Gives the elements of a tensor when its turn comes.
        max_shard_size: Size of a file in bytes, or as "5GB" (10^9), "200MB", "1GiB" (2^30); a larger tensor has a file
            of its own.
        metadata: Strings for the header of each file.
        files: Contents of other files by their name (config.json and the like).
        framework: "pytorch" for safetensors, "flax" for MessagePack, "tf" for HDF5.
        keras: What the files of "tf" say besides.

    Returns:
        The files written.

    Raises:
        CheckpointError: if a tensor cannot be stored or is not what it was declared to be, if a name in `files` leads
            out of the directory, or if the disk refuses. What `fetch` raises is passed on.
    """
    directory = Path(directory)
    limit, format = parse_size(max_shard_size), FORMATS[framework]
    declared = {name: check_storable(name, tensor) for name, tensor in tensors.items()}
    shards = split(declared, limit, format)
    weights = list(shards)
    if len(shards) > 1:
        weights.append(format.index)
    full = {name: name for name in declared}
    if framework == "flax":
        full = flax_msgpack.full_names(declared)
    if framework == "tf":
        keras = keras or tf_h5.Keras("model")
        full = {name: tf_h5.full_name(name, keras.model) for name in declared}
        for name, tensor in declared.items():
            tf_h5.check_storable(name, tensor.dtype)
    plain = {there: name for name, there in full.items()}
    for name in files:
        if not _is_inside(name) or name in CANDIDATES or any(one.is_shard(name) for one in FORMATS.values()):
            raise CheckpointError(
                f"cannot save a file as {name!r}: it must lie in the directory and be none of the weights"
            )

    with Staging(directory) as staging:
        for shard, names in shards.items():
            part = {name: declared[name] for name in names}
            if keras is not None:
                write_keras = tf_h5.write_tf if len(shards) == 1 else tf_h5.write_tf_shard
                with staging.create(shard) as path:
                    write_keras(path, part, fetch, keras)
                continue
            with staging.open(shard) as write:
                if framework == "flax":
                    there = {full[name]: tensor for name, tensor in part.items()}
                    flax_msgpack.write_flax(write, there, lambda name: fetch(plain[name]))
                else:
                    write_safetensors(write, part, fetch, metadata)
        if len(shards) > 1:
            with staging.open(format.index) as write:
                write(
                    _index(
                        {full[name]: tensor for name, tensor in declared.items()},
                        {shard: [full[name] for name in names] for shard, names in shards.items()},
                    )
                )
        for name, content in files.items():
            with staging.open(name) as write:
                write(content)
        staging.commit(_changes(directory, weights, list(files), format))
    return [directory / name for name in (*weights, *files)]


def _changes(directory: Path, weights: list[str], files: list[str], format: Format) -> list[Change]:
    """In which order to move the new files to a directory and to remove its old weights.

    At each step the directory opens as the old checkpoint or as the new one, or not at all.
    """
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    stale = sorted(name for name in names if name in (format.single, format.index) or format.is_shard(name))
    changes: list[Change] = []
    if format.index in names and set(weights) & set(stale) - {format.index, format.single}:
        # The old index would name new shards among old ones.
        changes.append(("remove", format.index))
    changes += [("place", name) for name in weights]
    # A single file is preferred to an index: an old one has to go before the new weights are the ones that open.
    if format.single in stale and format.single not in weights:
        changes.append(("remove", format.single))
    changes += [("place", name) for name in files]
    changes += [("remove", name) for name in stale if name not in (*weights, format.single)]
    return changes


def _index(tensors: Mapping[str, Region], shards: Mapping[str, Sequence[str]]) -> bytes:
    """The text of the index of these shards."""
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: shard for shard, names in shards.items() for name in names},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")


def split(tensors: Mapping[str, Region], limit: int, format: Format = FORMATS["pytorch"]) -> dict[str, list[str]]:
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
        return {format.single: shards[0]}
    return {format.shard(number, len(shards)): names for number, names in enumerate(shards, 1)}


def parse_size(size: int | str) -> int:
    """Bytes of a size like 5000, "5GB" (10^9), "200MB", "1.5GiB" (2^30).

    Raises:
        ValueError: if it is none, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*", str(size).upper())
    if match is None or match[2] not in UNITS or (found := int(float(match[1]) * UNITS[match[2]])) <= 0:
        raise ValueError(f"max_shard_size is {size!r}; give bytes, or a size such as '5GB', '200MB' or '1GiB'")
    return found
