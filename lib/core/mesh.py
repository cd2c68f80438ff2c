"""Logical axes -> mesh axes, and the mesh that a program is traced for.

Parameters and activations name their dimensions ("batch", "embed", "heads", ...); an ordered list of rules says on
which mesh axis each is split. A dimension whose mesh axis is taken already, missing from the mesh, or does not divide
its size follows the next rule for it, else stays whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, str | tuple[str, ...]]]

# Rows of a batch are split over what there is of "data" and "fsdp"; weights along the model's inner axes over "tensor",
# and along what is left over "fsdp".
DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("batch", "fsdp"),
    ("batch", "data"),
    ("experts", "expert"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("conv_out", "tensor"),
    ("conv_in", "fsdp"),
    ("state", "tensor"),
)


def assign(
    axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int], rules: Rules
) -> tuple[PartitionSpec, dict[int, list[str]]]:
    """Where the dimensions of an array go: (partition, {dimension that stays whole: why, rule by rule})."""
    parts: list[Any] = [None] * len(shape)
    obstacles: dict[int, list[str]] = defaultdict(list)
    taken: set[str] = set()
    for logical, target in rules:
        names = (target,) if isinstance(target, str) else tuple(target)
        for i, axis in enumerate(axes):
            if axis != logical or parts[i] is not None:
                continue
            ways = math.prod(sizes.get(name, 1) for name in names)
            if not sizes.keys() >= set(names):
                obstacles[i].append(f"the mesh has no axis {', '.join(sorted(set(names) - sizes.keys()))}")
            elif taken & set(names):
                obstacles[i].append(f"mesh axis {', '.join(names)} is taken by another dimension")
            elif shape[i] % ways:
                obstacles[i].append(f"{shape[i]} is no multiple of {ways} ({', '.join(names)})")
            else:
                parts[i] = target
                taken |= set(names)
    return PartitionSpec(*parts), {i: why for i, why in obstacles.items() if parts[i] is None}


@dataclass(frozen=True)
class Placing:
    """A mesh (or an abstract one) and the rules by which arrays are split over it."""

    mesh: Any
    rules: Rules = DEFAULT_RULES

    def partition(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Where the dimensions of an array go; those that do not fit stay whole."""
        sizes = dict(zip(self.mesh.axis_names, self.mesh.axis_sizes, strict=True))
        return assign(axes, shape, sizes, self.rules)[0]


_current: ContextVar[Placing | None] = ContextVar("formax_placing", default=None)


@contextmanager
def placed(placing: Placing | None) -> Iterator[None]:
    """What is traced inside is for this mesh; None leaves it as it was."""
    if placing is None:
        yield
        return
    token = _current.set(placing)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Placing | None:
    """The mesh that is traced for: that of `placed`, else of `jax.set_mesh`; None for one device.

    None, too, inside a `shard_map`, where a program is one device's already.
    """
    ambient = jax.sharding.get_abstract_mesh()
    if any(kind == AxisType.Manual for kind in ambient.axis_types):
        return None
    found = _current.get() or (None if ambient.empty else Placing(ambient))
    return None if found is None or found.mesh.size == 1 else found


def of_arrays(arrays: Sequence[Any]) -> Placing | None:
    """The mesh over which the first array is split, if there are several devices."""
    sharding = getattr(arrays[0], "sharding", None) if arrays else None
    several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return Placing(sharding.mesh) if several else None  # type: ignore[union-attr]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` split by the names of its dimensions: `constrain(x, "batch", "length", "embed")`; itself without a mesh.

    Raises:
        ValueError: another number of names than dimensions.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} names ({', '.join(map(str, axes))}) for the {x.ndim} dimensions of {x.shape}")
    placing = current()
    if placing is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(placing.mesh, placing.partition(axes, x.shape)))
