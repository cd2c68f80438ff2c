"""Logical axes -> mesh axes: declared once for every family.

Parameters name their dimensions ("embed", "heads", "mlp", ...); an ordered list of rules says on which mesh axis each
is split. A dimension whose mesh axis is taken already, missing from the mesh, or does not divide its size follows the
next rule for it, else stays whole, and `report` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from formax.core import spec as specs
from formax.core.mesh import DEFAULT_RULES, Rules, assign, constrain
from formax.core.spec import Spec, Tree
from formax.model import Model

__all__ = [
    "DEFAULT_RULES",
    "Placement",
    "Rules",
    "constrain",
    "make_mesh",
    "placements",
    "report",
    "shard",
    "shard_batch",
    "shardings",
]

# Mesh axes over which the rows of a batch are split, of those that a mesh has.
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class Placement:
    """How one parameter is split, and why some dimension is not."""

    key: str
    shape: tuple[int, ...]
    partition: PartitionSpec
    remarks: tuple[str, ...]


def placements(spec: Spec, mesh: Any, rules: Rules = DEFAULT_RULES) -> list[Placement]:
    """One `Placement` a parameter; `mesh` is a `Mesh` or an `AbstractMesh`.

    Raises:
        ValueError: a rule for something that is no logical axis.
    """
    unknown = [logical for logical, _ in rules if logical not in specs.AXES]
    if unknown:
        raise ValueError(f"rule for {unknown[0]!r}, which is no logical axis; there are {', '.join(specs.AXES)}")
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    return [_place(entry, sizes, rules) for entry in specs.table(spec).entries]


def _place(entry: specs.Entry, sizes: dict[str, int], rules: Rules) -> Placement:
    axes = entry.param.axes
    partition, obstacles = assign(axes, entry.param.shape, sizes, rules)
    remarks = tuple(f"{axes[i]} is whole: {'; '.join(why)}" for i, why in obstacles.items())
    return Placement(entry.key, entry.param.shape, partition, remarks)


def shardings(spec: Spec, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Tree:
    """The parameter tree with a `NamedSharding` at every leaf."""
    found = placements(spec, mesh, rules)
    entries = specs.table(spec).entries
    return specs.unflatten({e.path: NamedSharding(mesh, p.partition) for e, p in zip(entries, found, strict=True)})


def report(spec: Spec, mesh: Any, rules: Rules = DEFAULT_RULES) -> str:
    """What is split where, and what stayed whole and why, as text."""
    lines = []
    for place in placements(spec, mesh, rules):
        shape = " x ".join(map(str, place.shape))
        lines.append(
            f"{place.key}  {shape}  {tuple(place.partition)}" + "".join(f"\n    {remark}" for remark in place.remarks)
        )
    return "\n".join(lines)


def make_mesh(**axes: int) -> Mesh:
    """A device mesh with automatic axes: `make_mesh(fsdp=4, tensor=2)`."""
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def shard(model: Model, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Model:
    """A copy of a model whose parameters are split over a mesh; `formax.from_pretrained` can read it so, too."""
    return model.replace(params=jax.device_put(model.params, shardings(model.spec, mesh, rules)))


def shard_batch(batch: Mapping[str, Any], mesh: Mesh, axes: Sequence[str] = BATCH_AXES) -> dict[str, jax.Array]:
    """A batch whose rows, the first dimension of every array, are split over those of `axes` that the mesh has.

    Raises:
        ValueError: rows that cannot be split evenly.
    """
    names = tuple(name for name in axes if name in mesh.axis_names)
    ways = math.prod(mesh.shape[name] for name in names)
    for name, x in batch.items():
        if jnp.ndim(x) == 0 or len(x) % ways:
            raise ValueError(f"{name} {jnp.shape(x)} has no rows for {ways} devices ({', '.join(names)})")
    return jax.device_put(dict(batch), NamedSharding(mesh, PartitionSpec(names)))
