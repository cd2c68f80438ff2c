"""From checkpoint files to a parameter tree and back, by the spec alone.

Everything is checked against the files' headers before a single tensor is read: a checkpoint that does not fit fails
with nothing allocated. Tensors are then read one by one, each straight to its place on its devices.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.conversion.checkpoint import Checkpoint, CheckpointError
from formax.core import spec as specs
from formax.core.layout import Part, Stacked
from formax.core.spec import Entry, Spec, Tree

# How many names are searched for the nearest one: comparing with all of an absurd number would look like a hang.
SEARCHED = 2000
# Bytes; what XLA asks of memory that it uses in place.
ALIGNMENT = 64
# Threads that read tensors; each may hold a copy of the tensor it is at.
READERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class LoadReport:
    """What did not come from the file as it was.

    Attributes:
        initialised: parameters (our paths) that the file does not hold, such as a new head.
        mismatched: parameters whose shape in the file is another, initialised because that was allowed.
        left_out: tensors of the file that this architecture has no use for, such as another head.
    """

    initialised: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Where every parameter comes from.

    Attributes:
        found: leaf -> its name in the file (with `{}` where the layout has many).
        fresh: leaves that are initialised.
        report: the same for people.
    """

    found: dict[Entry, str]
    fresh: tuple[Entry, ...]
    report: LoadReport


def load_params(
    checkpoint: Checkpoint,
    spec: Spec,
    *,
    bases: tuple[str, ...] = (),
    siblings: Callable[[], set[str]] = set,
    dtype: Any = None,
    shardings: Tree | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    key: jax.Array | None = None,
) -> tuple[Tree, LoadReport]:
    """Reads the parameters that `spec` declares.

    Args:
        checkpoint: an open checkpoint.
        spec: the declaration.
        bases: prefixes of the bare model's tensors; a file may have one where the spec has another, or none.
        siblings: names that other architectures of the family would read; such tensors are left out without complaint.
        dtype: floating-point dtype of the leaves; None keeps what is on disk (but float64, unless JAX has it enabled).
        shardings: a tree of shardings; every device reads its own slices alone.
        strict: complain about tensors that nothing explains.
        ignore_mismatched_sizes: initialise parameters whose shape differs instead of raising.
        key: random key for what the file does not hold; `jax.random.key(0)` by default.

    Raises:
        CheckpointError: missing or unexplained tensors (with the nearest names), wrong shapes or dtypes.
        ValueError: `dtype` is no floating-point type.
    """
    dtype = None if dtype is None else floating(dtype)
    table = specs.table(spec)
    plan = make_plan(checkpoint, table, bases, siblings, strict, ignore_mismatched_sizes)
    places = {} if shardings is None else specs.flatten(shardings)

    def read(item: tuple[Entry, str]) -> tuple[specs.Path, jax.Array]:
        entry, name = item
        return entry.path, _read(checkpoint, entry, name, dtype, places.get(entry.path))

    # Copying is bound by the page faults of new memory, which one thread takes one after the other.
    with ThreadPoolExecutor(READERS) as pool:
        leaves = dict(pool.map(read, plan.found.items()))
    if plan.fresh:
        # Not in 8 bits: what is quantised is the file's business, a new head is going to be trained.
        found = (leaf.dtype for leaf in leaves.values() if leaf.dtype.itemsize > 1)
        fill = next(found, jnp.float32) if dtype is None else dtype
        key = jax.random.key(0) if key is None else key
        # Waited for, so that sizes beyond the memory fail here and not when the model is first used.
        leaves |= jax.block_until_ready(specs.init_entries(plan.fresh, key, fill, places or None))
    return specs.unflatten({entry.path: leaves[entry.path] for entry in table.entries}), plan.report


def floating(dtype: Any) -> np.dtype:
    """The dtype of that name, for parameters.

    Raises:
        ValueError: there is none, it is not floating-point, or JAX would silently make another of it.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype={dtype!r} is no dtype; give one such as 'float32' or 'bfloat16'") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype={dtype!r} is not floating-point; give one such as 'float32' or 'bfloat16'")
    if found == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("dtype='float64' needs jax.config.update('jax_enable_x64', True)")
    return found


def make_plan(
    checkpoint: Checkpoint,
    table: specs.Table,
    bases: tuple[str, ...],
    siblings: Callable[[], set[str]],
    strict: bool,
    ignore_mismatched: bool,
) -> Plan:
    """Decides for every leaf where it comes from, and refuses what does not fit; arguments as in `load_params`."""
    bases = tuple(f"{base}{checkpoint.separator}" for base in bases)
    base, held = _base_of([entry.name for entry in table.entries], bases), _base_of(checkpoint, bases)

    def rename(name: str) -> str:
        """The spec's name -> the file's name: another prefix of the bare model, or none."""
        if base == held or not (base == "" or name.startswith(base)):
            return name
        return held + name.removeprefix(base)

    found: dict[Entry, str] = {}
    missing: list[Entry] = []
    fresh: list[Entry] = []
    mismatched: list[str] = []
    for entry in table.entries:
        name = _find(checkpoint, entry, table, rename)
        if name is None:
            is_head = base != "" and not entry.name.startswith(base)
            (fresh if is_head or entry.param.optional else missing).append(entry)
        elif _has_misfit(checkpoint, entry, name, ignore_mismatched):
            mismatched.append(entry.key)
            fresh.append(entry)
        else:
            found[entry] = name
    used = {name for entry, one in found.items() for name in entry.param.layout.names(one)}
    explained = used | {rename(name) for name in table.known_names()}
    rest = [name for name in checkpoint if name not in explained]
    left_out: list[str] = []
    # A file without most of the model is another model, or the configuration is absurd: no head explains the rest.
    if rest and len(missing) <= len(found):
        others = siblings()
        plain = {name.removeprefix(one) for one in bases for name in others}
        others |= plain | {f"{one}{name}" for one in bases for name in plain}
        left_out = [name for name in rest if name in others]
        rest = [name for name in rest if name not in others]
    if missing or (rest and strict):
        wanted = dict.fromkeys(name for entry in missing for name in entry.param.layout.names(rename(entry.name)))
        absent = [name for name in wanted if name not in checkpoint]
        raise CheckpointError(_complaint(checkpoint, absent, rest if strict else [], sorted(explained)))
    # A count that no file holds starts at 0, and what a framework computes is computed: nothing to report, let alone to
    # train.
    new = (entry for entry in fresh if entry.param.stored_as is None and not entry.param.computed)
    initialised = tuple(entry.key for entry in new if entry.key not in mismatched)
    return Plan(found, tuple(fresh), LoadReport(initialised, tuple(mismatched), tuple(left_out + rest)))


def _base_of(names: Iterable[str], bases: Sequence[str]) -> str:
    """The prefix under which these names hold the bare model; "" if they hold it without one."""
    held = list(names)
    return next((base for base in bases if any(name.startswith(base) for name in held)), "")


def _find(checkpoint: Checkpoint, entry: Entry, table: specs.Table, rename: Callable[[str], str]) -> str | None:
    """The name under which the file holds this leaf: its own, an older one, or one that is tied to it."""
    tied = [name for name, target in table.tied.items() if target == entry.key]
    for name in (entry.name, *entry.also, *tied):
        if all(one in checkpoint for one in entry.param.layout.names(rename(name))):
            return rename(name)
    return None


def _has_misfit(checkpoint: Checkpoint, entry: Entry, name: str, ignored: bool) -> bool:
    """Whether the stored tensor(s) have another shape; that, unless `ignored`, and another kind of dtype raise."""
    for one in entry.param.layout.names(name):
        info = checkpoint[one]
        if entry.param.stored_as is None and not jnp.issubdtype(info.dtype, jnp.floating):
            raise CheckpointError(f"{info.file}: {one!r} has dtype {info.dtype}, a floating-point one is needed")
        if info.shape != entry.stored_shape:
            if ignored:
                return True
            raise CheckpointError(
                f"{info.file}: {one!r} has shape {info.shape}, the configuration asks for {entry.stored_shape}; "
                "ignore_mismatched_sizes=True initialises it instead"
            )
    return False


def _complaint(checkpoint: Checkpoint, missing: list[str], unexplained: list[str], known: list[str]) -> str:
    """What to say of tensors that are `missing` or `unexplained`, where the architecture knows the names `known`."""
    files = {info.file for info in checkpoint.values()}
    lines = [f"{files.pop() if len(files) == 1 else checkpoint.path} does not fit this architecture"]
    for title, names, pool in (
        ("missing", missing, list(checkpoint)),
        ("unexplained", unexplained, missing or known),
    ):
        for name in names[:5]:
            near = difflib.get_close_matches(name, pool[:SEARCHED], n=1, cutoff=0.6)
            lines.append(f"  {title}: {name!r}" + (f" (nearest: {near[0]!r})" if near else ""))
        if len(names) > 5:
            lines.append(f"  ... and {len(names) - 5} more {title}")
    if unexplained and not missing:
        lines.append("  strict=False reads the checkpoint without them")
    return "\n".join(lines)


def _read(checkpoint: Checkpoint, entry: Entry, name: str, dtype: Any, sharding: Any) -> jax.Array:
    """One leaf, from the mapped file to its devices; the file's pages are let go afterwards."""
    layout, shape = entry.param.layout, entry.param.shape
    if entry.param.stored_as is not None:
        dtype = entry.param.dtype(None)

    def part(index: tuple[slice, ...] | None = None) -> np.ndarray:
        view = layout.read(checkpoint.read, name, shape, index or (slice(None),) * len(shape))
        # A strided view goes to the runtime as it is: its blocked transpose is several times faster than NumPy's.
        return _owned(view) if dtype is None else view.astype(dtype)

    leaf = jax.device_put(part()) if sharding is None else jax.make_array_from_callback(shape, sharding, part)
    leaf.block_until_ready()
    for one in layout.names(name):
        checkpoint.release(one)
    return leaf


def _owned(view: np.ndarray) -> np.ndarray:
    """A copy of what a CPU device would otherwise use in place: a parameter must not change with the file.

    Where `jax.device_put(may_alias=False)` is given an aligned NumPy array, the array on a CPU device is a view of it.
    """
    if not view.flags.c_contiguous or view.flags.writeable:
        return view
    # Aligned, so that the device takes this memory over instead of copying once more.
    memory = np.empty(view.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + view.nbytes].view(view.dtype).reshape(view.shape)
    copy[...] = view
    return copy


@dataclass(frozen=True)
class Stored:
    """Shape and dtype of a tensor that is going to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype


def stored_tensors(spec: Spec, params: Tree) -> tuple[dict[str, Stored], Callable[[str], np.ndarray]]:
    """The checkpoint that a parameter tree makes: {name: shape and dtype}, and a function that gives a tensor by name.

    Raises:
        ValueError: the tree lacks a declared parameter, has another shape, or holds one that is not declared.
    """
    leaves: Mapping[specs.Path, Any] = specs.flatten(params)
    table = specs.table(spec)
    for entry in table.entries:
        if entry.path not in leaves:
            raise ValueError(f"the parameters lack {entry.key}, which the configuration declares")
        if tuple(leaves[entry.path].shape) != entry.param.shape:
            shape = tuple(leaves[entry.path].shape)
            raise ValueError(f"{entry.key} has shape {shape}, the configuration declares {entry.param.shape}")
    undeclared = leaves.keys() - {entry.path for entry in table.entries}
    if undeclared:
        raise ValueError(
            f"{specs.dotted(min(undeclared, key=str))} is no parameter of this configuration; it would be lost"
        )
    holders = table.stored()
    tensors = {
        name: Stored(held[0].stored_shape, np.dtype(held[0].param.stored_as or leaves[held[0].path].dtype))
        for name, held in holders.items()
    }

    def fetch(name: str) -> np.ndarray:
        held = holders[name]
        layout = held[0].param.layout
        arrays = [np.asarray(leaves[entry.path]) for entry in held]
        if isinstance(layout, Part):
            return layout.join(arrays)
        if isinstance(layout, Stacked):
            return layout.then.store(arrays[0][held[0].stored_names.index(name)])
        return layout.store(arrays[0]).astype(tensors[name].dtype, copy=False)

    return tensors, fetch
