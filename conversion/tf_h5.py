"""Reads and writes TensorFlow's checkpoints (`tf_model.h5`), which are HDF5 files of Keras, with h5py.

Keras has a group a layer, whose attribute `weight_names` lists datasets below it by the variables' names; the model's
own name comes first in these and is of no account. A file that is one of several has its datasets under the names
themselves, listed as `layer_names`. Datasets that lie in one piece, as Keras writes them, are mapped in place; what
would have to be unpacked, or leads to another file, is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from formax.conversion.mapped import CheckpointError, MappedFile, Region, TensorFile, shape_problem

MAGIC = b"\x89HDF\r\n\x1a\n"
# An object's attributes take at most so many bytes; longer lists are divided among attributes with numbers.
MAX_ATTRIBUTE = 64512
# A file lists at most one name for so many bytes of it; a variable alone takes more, and is listed once or twice.
BYTES_A_NAME = 16
# The version of Keras whose files these are like.
KERAS = b"2.21.0"


def _h5py() -> Any:
    """The library, which only these files need."""
    try:
        import h5py
    except ImportError:
        raise ImportError(
            'TensorFlow weights (tf_model.h5) need h5py; install it with pip install "formax[tf]"'
        ) from None
    return h5py


def read_tf(file: MappedFile) -> TensorFile:
    """Finds the datasets of a Keras file; they are called as in TensorFlow, without the model's name before.

    Raises:
        CheckpointError: naming the file, and the variable if one is at fault.
        ImportError: h5py is not installed.
    """
    h5py = _h5py()
    tensors: dict[str, Region] = {}
    try:
        with h5py.File(file.path, "r", locking=False) as opened:
            for count, (group, name) in enumerate(_listed(h5py, file, opened)):
                if count * BYTES_A_NAME > file.size:  # groups that are one group under many names, say
                    raise CheckpointError(f"{file.path}: lists more names than a file of {file.size} bytes has")
                found = group if name is None else _child(h5py, file, group, name)
                plain = plain_name((found.name or "").lstrip("/")) if name is None else _without_model(name)
                if plain not in tensors:  # a layer that holds another lists its variables, too
                    tensors[plain] = _region(h5py, file, found, plain)
    except CheckpointError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{file.path}: cannot be read as HDF5 ({text}); it is truncated or damaged, save or download it again"
        ) from error
    return TensorFile(file, "tf", tensors, {})


def plain_name(name: str) -> str:
    """A variable's name as an index or a file that is one of several has it -> without the model's name.

    Such a file lacks it already, but for tables that are shared.
    """
    return _without_model(name) if name.startswith("model.") else name


def index_name(name: str) -> str:
    """A variable's full name, as an index has it, without the model's."""
    return _without_model(name)


def _without_model(name: str) -> str:
    return name.partition("/")[2] or name


def _listed(h5py: Any, file: MappedFile, opened: Any) -> Iterator[tuple[Any, str | None]]:
    """The groups and the names in them of all variables; datasets themselves, and None, in one file of several."""
    layers = list(dict.fromkeys(_names(file, opened, "layer_names")))
    if not layers:
        raise CheckpointError(f"{file.path}: no weights of Keras: the attribute 'layer_names' is missing or empty")
    if "top_level_model_weights" in opened and "top_level_model_weights" not in layers:
        layers.append("top_level_model_weights")
    for layer in layers:
        found = _child(h5py, file, opened, layer)
        if isinstance(found, h5py.Dataset):
            yield found, None
        else:
            for name in _names(file, found, "weight_names"):
                yield found, name


def _names(file: MappedFile, node: Any, attribute: str) -> Iterator[str]:
    """The strings of an attribute, which may be divided among several with numbers."""
    attributes = [attribute]
    if attribute not in node.attrs:
        attributes = []
        while f"{attribute}{len(attributes)}" in node.attrs:
            attributes.append(f"{attribute}{len(attributes)}")
    for one in attributes:
        stored = node.attrs.get_id(one)
        if math.prod(stored.shape) * stored.dtype.itemsize > file.size:
            raise CheckpointError(f"{file.path}: the attribute {one!r} of {node.name!r} is longer than the file")
        for name in np.ravel(node.attrs[one]):
            if not isinstance(name, bytes | str):
                raise CheckpointError(f"{file.path}: the attribute {one!r} of {node.name!r} must hold names")
            yield name.decode("utf-8") if isinstance(name, bytes) else name


def _child(h5py: Any, file: MappedFile, group: Any, name: str) -> Any:
    """What a group holds under a path, by links that cannot leave the file or turn round."""
    node = group
    for part in name.split("/"):
        if not isinstance(node, h5py.Group) or part in ("", ".") or part not in node:
            raise CheckpointError(f"{file.path}: {group.name!r} lists {name!r}, which the file does not hold")
        if not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise CheckpointError(
                f"{file.path}: {name!r} is a link to somewhere else; copy the file with what it means"
            )
        node = node[part]
    return node


def _region(h5py: Any, file: MappedFile, found: Any, name: str) -> Region:
    """Where a dataset lies in the file."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: {name!r} {problem}")

    if not isinstance(found, h5py.Dataset):
        raise fail("is a group, not an array")
    dtype, shape = found.dtype, found.shape
    if shape is None or dtype.kind not in "fiub" or not dtype.isnative:
        raise fail(f"holds {dtype} elements, not little-endian numbers")
    if problem := shape_problem(shape, dtype.itemsize):
        raise fail(problem)
    if 0 in shape:
        return Region(shape, dtype, 0)
    settings = found.id.get_create_plist()
    if settings.get_layout() != h5py.h5d.CONTIGUOUS or settings.get_external_count():
        raise fail("does not lie in the file in one piece, as Keras writes it; save the checkpoint again")
    offset = found.id.get_offset()
    region = Region(shape, dtype, offset if offset is not None else file.size)
    if region.offset + region.nbytes > file.size:
        raise fail(f"takes {region.nbytes} bytes, which end behind the file of {file.size}; it is truncated")
    return region


# --- writing


@dataclass(frozen=True)
class Keras:
    """What only Keras knows of a model.

    Attributes:
        model: its name there, as of `model_name`.
        repeats: {layer: prefix of names}: layers that list another's variables as theirs, too.
        own: names of variables that are the model's itself, and no layer's.
    """

    model: str
    repeats: Mapping[str, str] = field(default_factory=dict)
    own: tuple[str, ...] = ()


def model_name(architecture: str) -> str:
    """What Keras calls a model of the class "TF" + architecture: TFBertForMaskedLM -> tf_bert_for_masked_lm."""
    apart = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", f"TF{architecture}")
    return re.sub("([a-z])([A-Z])", r"\1_\2", apart).lower()


def full_name(name: str, model: str) -> str:
    """A variable's name as Keras has it: with the model's before, but for tables in a scope of their own and biases."""
    first, *rest = name.split("/")
    if not rest:
        return name
    return f"{first}/{name}" if rest == ["embeddings:0"] else f"{model}/{name}"


def layer_of(name: str) -> str:
    """The layer of the model that a variable belongs to."""
    first = name.partition("/")[0].removesuffix(":0")
    return "model" if first.startswith("model.") else first


def write_tf(path: Path, tensors: Mapping[str, Region], fetch: Callable[[str], np.ndarray], keras: Keras) -> None:
    """Writes a whole checkpoint as Keras does, holding one array at a time.

    Args:
        path: a file that does not exist.
        tensors: shape and dtype of every variable, named without the model's name.
        fetch: gives the elements of a variable when its turn comes.
        keras: the model.

    Raises:
        ImportError: h5py is not installed.
    """
    layers: dict[str, list[str]] = {}
    for name in tensors:
        if name not in keras.own:
            layers.setdefault(layer_of(name), []).append(name)
    with _h5py().File(path, "x") as out:
        _set_names(out, "layer_names", list(layers))
        out.attrs["backend"] = b"tensorflow"
        out.attrs["keras_version"] = KERAS
        for layer in sorted(layers):
            group = out.create_group(layer)
            for name in layers[layer]:
                _put(group, full_name(name, keras.model), tensors[name], fetch(name))
        for layer, own in layers.items():
            prefix = keras.repeats.get(layer)
            others = [name for name in tensors if prefix is not None and name.startswith(prefix)]
            for name in others:  # the same array under a second name
                full = full_name(name, keras.model)
                out[layer][full] = out[layer_of(name)][full]
            _set_names(out[layer], "weight_names", [full_name(name, keras.model) for name in own + others])
        top, own = out.create_group("top_level_model_weights"), [name for name in keras.own if name in tensors]
        for name in own:
            _put(top, f"{keras.model}/{name}", tensors[name], fetch(name))
        _set_names(top, "weight_names", [f"{keras.model}/{name}" for name in own])


def write_tf_shard(path: Path, tensors: Mapping[str, Region], fetch: Callable[[str], np.ndarray], keras: Keras) -> None:
    """Writes one file of several; arguments as in `write_tf`."""
    places = {name: full_name(name, keras.model) if name.startswith("model.") else name for name in tensors}
    with _h5py().File(path, "x") as out:
        for name, place in sorted(places.items(), key=lambda item: item[1]):
            _put(out, place, tensors[name], fetch(name))
        _set_names(out, "layer_names", sorted(places.values()))


def _put(group: Any, name: str, declared: Region, value: np.ndarray) -> None:
    value = np.asarray(value)
    if value.shape != declared.shape or value.dtype != declared.dtype:
        raise CheckpointError(
            f"{name!r} was declared as {declared.dtype} of shape {declared.shape}, "
            f"it is {value.dtype} of shape {value.shape}"
        )
    group.create_dataset(name, data=value)


def _set_names(node: Any, attribute: str, names: list[str]) -> None:
    """Lists names in an attribute, or in several with numbers."""
    encoded = [name.encode("utf-8") for name in names]
    data = np.asarray(encoded)
    if data.itemsize > MAX_ATTRIBUTE:
        raise CheckpointError(f"a name of {data.itemsize} bytes is longer than HDF5 can list: {names[0]!r:.60}")
    if data.nbytes <= MAX_ATTRIBUTE:
        node.attrs[attribute] = encoded
        return
    count = 2
    while max(part.nbytes for part in np.array_split(data, count)) > MAX_ATTRIBUTE:
        count += 1
    for i, part in enumerate(np.array_split(data, count)):
        node.attrs[f"{attribute}{i}"] = part


def check_storable(name: str, dtype: np.dtype[Any]) -> None:
    """Refuses elements that HDF5 has no type for.

    Raises:
        CheckpointError: naming the variable.
    """
    if dtype.kind not in "fiub":
        raise CheckpointError(f"{name!r}: HDF5 cannot hold {dtype}; convert the model first, with astype('float32')")
