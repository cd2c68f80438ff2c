"""Parameter trees as transformers' Flax has them: nested dicts under the names and layouts of `flax_model.msgpack`.

Both directions follow from the spec, as files do (`formax.core.frameworks`), and work on traced arrays: gradients with
respect to such a tree are such a tree. Most leaves lie the same on both sides, so that nothing is computed for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from formax.conversion.flax_msgpack import COLLECTIONS, full_names
from formax.core import frameworks
from formax.core import spec as specs
from formax.core.config import Config
from formax.core.family import Architecture, Family
from formax.core.layout import SAME, Part
from formax.core.spec import Entry, Tree

Path = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Spelling:
    """A parameter tree under Flax's names.

    Attributes:
        stored: {place in Flax's tree: the leaves of ours that it holds}, in order.
        counts: leaves that Flax has no place for: counts, and buffers that never change from what they begin as.
    """

    stored: Mapping[Path, list[Entry]]
    counts: tuple[Entry, ...]

    @property
    def statistics(self) -> dict[Path, Entry]:
        """Running statistics of batch norms: {place in Flax's tree: leaf}."""
        return {path: held[0] for path, held in self.stored.items() if path[0] == COLLECTIONS[1]}

    def theirs(self, tree: Tree) -> dict[str, Any]:
        """Our tree -> Flax's."""
        leaves = specs.flatten(tree)
        out: dict[Path, Any] = {}
        for path, held in self.stored.items():
            layout, arrays = held[0].param.layout, [leaves[entry.path] for entry in held]
            out[path] = layout.join(arrays) if isinstance(layout, Part) else layout.store(arrays[0])
        return nested(out)

    def ours(self, params: Mapping[str, Any], dtype: Any = None, frozen: str | None = None) -> Tree:
        """Flax's tree -> ours.

        Args:
            params: nested mappings; what has no place in the model is passed over, as Flax does.
            dtype: floating-point dtype of the result; None for that of each leaf.
            frozen: a part of names below which no gradients are wanted.

        Raises:
            ValueError: a leaf is missing, or has another shape.
        """
        given = flat(params)
        if missing := [path for path in self.stored if path not in given]:
            raise ValueError(
                f"params lacks {', '.join(map('/'.join, missing[:5]))}{' and others' if len(missing) > 5 else ''}"
            )
        out: dict[specs.Path, Any] = {}
        for path, held in self.stored.items():
            leaf = given[path]
            if tuple(leaf.shape) != held[0].stored_shape:
                shape = tuple(leaf.shape)
                raise ValueError(f"params: {'/'.join(path)} has shape {shape}, the model {held[0].stored_shape}")
            if frozen is not None and frozen in path:
                leaf = jax.lax.stop_gradient(leaf)
            if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
                leaf = leaf.astype(dtype)
            out |= {entry.path: entry.param.layout.load(leaf, entry.param.shape) for entry in held}
        if self.counts:
            out |= specs.init_entries(self.counts, jax.random.key(0), dtype or jnp.float32)
        return specs.unflatten(out)


def flat(tree: Any) -> dict[Path, Any]:
    """{place: leaf} of nested mappings."""
    return {tuple(map(str, path)): leaf for path, leaf in specs.flatten(tree).items()}


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Inverse of `flat`."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return out


@lru_cache(maxsize=256)
def spelling(family: Family, architecture: Architecture, config: Config) -> Spelling:
    """How Flax calls the parameters of an architecture, and how it keeps them.

    A parameter that Flax's class has no place for keeps PyTorch's name. Families that transformers never had in Flax
    are named in the same words, and their parameters lie as ours do.
    """
    spec = architecture.spec(config)
    if family.flax is None:
        return _new(specs.table(spec).entries)
    found = frameworks.respell(spec, family, "flax")
    entries, uncounted = specs.table(found.spec), found.uncounted
    plain = {
        name.replace(".", "/") if name in found.nowhere else name: held
        for name, held in entries.stored().items()
        if name not in uncounted
    }
    counts = tuple(entry for entry in entries.entries if entry.name in uncounted)
    return Spelling({tuple(there.split("/")): plain[name] for name, there in full_names(plain).items()}, counts)


def _new(entries: Sequence[Entry]) -> Spelling:
    """The spelling of what Flax never had: PyTorch's modules, Flax's words for leaves, a place for every leaf."""
    plain: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.param.stored_as is None:
            *modules, last = entry.name.replace("{}.", "").split(".")
            word = str(entry.path[-1])
            # Of parameters that are one tensor in PyTorch each has the name that it has here.
            inner = [str(entry.path[-2])] if isinstance(entry.param.layout, Part) else []
            name = "/".join(
                [*modules, *inner, frameworks.FLAX.get(word, last) if last in frameworks.STANDARD else last]
            )
            plain[name if name not in plain else f"{name}/{entry.key}"] = [
                replace(entry, param=replace(entry.param, layout=SAME))
            ]
    counts = tuple(entry for entry in entries if entry.param.stored_as is not None)
    return Spelling({tuple(there.split("/")): plain[name] for name, there in full_names(plain).items()}, counts)
