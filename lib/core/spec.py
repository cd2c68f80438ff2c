"""A parameter is declared once; everything else about it follows.

A *spec* is a tree of dicts and tuples with `Param` leaves. It has the shape of the parameter tree and says, for every
leaf, its shape, logical axes, initialiser, and where and how a checkpoint stores it. From the spec alone come the
initial values (`init`), the shapes (`abstract`), the logical axes, the names and layouts in checkpoint files (`Table`)
and the printed parameter table (`describe`).

    spec = {"mlp": At("intermediate.dense", {"kernel": Param((8, 32), ("embed", "mlp"), "weight", layout=TRANSPOSE)})}
    init(spec, jax.random.key(0))["mlp"]["kernel"].shape        # (8, 32), stored as "intermediate.dense.weight" (32, 8)

Keys of the tree are ours and the same in every family; the checkpoint's names are attributes, collected along the path
by `At`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from formax.core import rng, tap
from formax.core.layout import SAME, Layout, Part

Initializer: TypeAlias = Callable[[jax.Array, Sequence[int], Any], jax.Array]
Path: TypeAlias = tuple[str | int, ...]
Tree: TypeAlias = Any  # nested dicts and tuples with one kind of leaf

AXES = (
    "batch",
    "length",
    "embed",
    "vocab",
    "heads",
    "kv_heads",
    "mlp",
    "experts",
    "layers",
    "conv_in",
    "conv_out",
    "state",
)

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


@dataclass(frozen=True)
class Random:
    """An initialiser of independent numbers around 0: standard normal, or uniform from -1 to 1, times a factor.

    Attributes:
        uniform: which of the two.
        factor: `factor(shape, dtype)`.
    """

    uniform: bool
    factor: Callable[[Sequence[int], Any], Any]

    def __call__(self, key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Draws `shape`."""
        return self._drawn(key, tuple(shape), dtype) * self.factor(shape, dtype)

    def in_a_row(self, key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        """The same numbers, drawn as one row, which compiles several times faster than the windows of convolutions."""
        return self._drawn(key, (math.prod(shape),), dtype).reshape(shape) * self.factor(shape, dtype)

    def _drawn(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1) if self.uniform else jax.random.normal(key, shape, dtype)


@lru_cache(maxsize=256)
def normal(std: float) -> Initializer:
    """Normal with standard deviation `std` and mean 0."""
    return Random(False, lambda shape, dtype: jnp.array(std, dtype))


@lru_cache(maxsize=256)
def scaled(scale: float, fan: str, *, uniform: bool = False) -> Initializer:
    """Of variance `scale` over the number of inputs ("in"), of outputs ("out"), or their mean ("average").

    Glorot & Bengio 2010 (scale 1, "average"); He et al. 2015, arXiv:1502.01852 (2, "in"). The last two dimensions are
    inputs and outputs, those before a window.
    """

    def factor(shape: Sequence[int], dtype: Any) -> jax.Array:
        *window, inputs, outputs = shape
        size = {"in": inputs, "out": outputs, "average": (inputs + outputs) / 2}[fan] * math.prod(window)
        return jnp.sqrt((3 if uniform else 1) * jnp.array(scale / size, dtype))

    return Random(uniform, factor)


@lru_cache(maxsize=256)
def constant(value: float) -> Initializer:
    """Every element is `value`."""
    return jax.nn.initializers.constant(value)


@dataclass(frozen=True)
class Param:
    """One array of the parameter tree.

    Attributes:
        shape: shape of our leaf (not of the stored tensor).
        axes: a logical axis name of `AXES`, or None, per dimension; sharding rules speak of these.
        name: last part of the checkpoint's name, appended to the enclosing `At` prefixes.
        init: initialiser `(key, shape, dtype) -> array`.
        layout: how the stored tensor becomes the leaf.
        also: older last parts under which checkpoints of the wild hold the same tensor (read, never written).
        optional: a checkpoint may lack it; it is then initialised, and said so.
        buffer: state rather than weight (running statistics): read and written, never trained.
        stored_as: integer dtype of the stored tensor ("int64"). The leaf is then float32 whatever the model's dtype, so
            that gradients of whole models exist; it is exact up to 2**24.
        flax: last part of the name in Flax's checkpoints, where `formax.core.frameworks` has no rule for it; "" says
            that Flax has no such parameter.
        tf: the same for TensorFlow's.
        computed: of a checkpoint that has no place for it: it is what it begins as, which is nothing to say.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    name: str
    init: Initializer = field(default=zeros, repr=False)
    layout: Layout = SAME
    also: tuple[str, ...] = ()
    optional: bool = False
    buffer: bool = False
    stored_as: str | None = None
    flax: str | None = None
    tf: str | None = None
    computed: bool = False

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"parameter {self.name!r}: {len(self.axes)} axes {self.axes} for shape {self.shape}")
        unknown = [axis for axis in self.axes if axis is not None and axis not in AXES]
        if unknown:
            raise ValueError(f"parameter {self.name!r}: unknown logical axes {unknown}; known are {', '.join(AXES)}")

    def dtype(self, dtype: Any) -> Any:
        """Dtype of the leaf in a tree of `dtype`."""
        return dtype if self.stored_as is None else jnp.float32


@dataclass(frozen=True)
class At:
    """Puts `prefix` before the checkpoint names of everything in `spec`; leaves the tree as it is.

    `flax` and `tf` take its place in those frameworks' checkpoints where they differ: "" says that there is nothing of
    it there, a name that begins with a slash stands alone, without the prefixes around. `family` is the model type of
    what is a whole model in a larger one: the frameworks' rules for that family hold below.
    """

    prefix: str
    spec: Spec
    flax: str | None = None
    tf: str | None = None
    family: str | None = None


@dataclass(frozen=True)
class Tied:
    """A checkpoint name that repeats the leaf at `to` ("embed.word.embedding"): no leaf of our tree.

    It is not written (`save_pretrained` of the reference drops shared tensors); in a file it stands for the leaf
    when the leaf's own name is missing, and is passed over otherwise.
    """

    name: str
    to: str


@dataclass(frozen=True)
class Ignored:
    """A checkpoint name that older versions wrote and that holds nothing we need, such as `position_ids`."""

    name: str


Spec: TypeAlias = "Param | At | Tied | Ignored | Mapping[str, Spec] | tuple[Spec, ...]"


def under(prefix: str, spec: Mapping[str, Spec], family: str | None = None) -> dict[str, Spec]:
    """`At` over every entry of a dict, so that heads can be declared beside the base model's parts."""
    return {key: At(prefix, part, family=family) for key, part in spec.items()}


def stack_of(prefix: str, specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """Layers numbered in the checkpoint: `prefix.0`, `prefix.1`, ...; a tuple in the tree."""
    return tuple(At(f"{prefix}.{i}", spec) for i, spec in enumerate(specs))


def optional(spec: Spec) -> Spec:
    """Everything in `spec` may be missing from a checkpoint; it is then initialised and reported."""
    if isinstance(spec, Param):
        return replace(spec, optional=True)
    if isinstance(spec, At):
        return replace(spec, spec=optional(spec.spec))
    if isinstance(spec, Mapping):
        return {key: optional(part) for key, part in spec.items()}
    if isinstance(spec, tuple):
        return tuple(optional(part) for part in spec)
    return spec


def inside(key: str, spec: Spec) -> Spec:
    """The spec of a whole model as the part `key` of a larger tree: its ties say where things are in that."""
    if isinstance(spec, Tied):
        return replace(spec, to=f"{key}.{spec.to}")
    if isinstance(spec, At):
        return replace(spec, spec=inside(key, spec.spec))
    if isinstance(spec, Mapping):
        return {name: inside(key, part) for name, part in spec.items()}
    return tuple(inside(key, part) for part in spec) if isinstance(spec, tuple) else spec


def dotted(path: Path) -> str:
    """("layers", 0, "attn") -> "layers.0.attn"."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Entry:
    """A leaf with its place in the tree and its full checkpoint names."""

    path: Path
    name: str
    also: tuple[str, ...]
    param: Param

    @property
    def key(self) -> str:
        return dotted(self.path)

    @property
    def stored_names(self) -> tuple[str, ...]:
        return self.param.layout.names(self.name)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.param.layout.stored_shape(self.param.shape)


@dataclass(frozen=True)
class Table:
    """A spec read as a list: its leaves in tree order, its ties (name -> leaf key) and its ignored names."""

    entries: tuple[Entry, ...]
    tied: Mapping[str, str]
    ignored: frozenset[str]

    def stored(self) -> dict[str, list[Entry]]:
        """Every tensor of a checkpoint file -> the leaves that it holds (several when fused), in order."""
        out: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            for name in entry.stored_names:
                out[name].append(entry)
        return {name: sorted(found, key=_part_index) for name, found in out.items()}

    def known_names(self) -> set[str]:
        """Every name that a checkpoint of this spec may hold: leaves, older names, ties, ignored ones."""
        names = set(self.tied) | self.ignored
        for entry in self.entries:
            for name in (entry.name, *entry.also):
                names.update(entry.param.layout.names(name))
        return names


def _part_index(entry: Entry) -> int:
    layout = entry.param.layout
    return layout.index if isinstance(layout, Part) else 0


def table(spec: Spec) -> Table:
    """Flattens a spec.

    Raises:
        ValueError: two leaves claim the same checkpoint tensor, parts of one do not make it up, or a tie names no leaf.
    """
    entries: list[Entry] = []
    tied: dict[str, str] = {}
    ignored: set[str] = set()

    def visit(node: Spec, path: Path, prefix: str) -> None:
        if isinstance(node, At):
            visit(node.spec, path, _join(prefix, node.prefix))
        elif isinstance(node, Param):
            also = tuple(_join(prefix, name) for name in node.also)
            entries.append(Entry(path, _join(prefix, node.name), also, node))
        elif isinstance(node, Tied):
            tied[_join(prefix, node.name)] = node.to
        elif isinstance(node, Ignored):
            ignored.add(_join(prefix, node.name))
        elif isinstance(node, tuple):
            for i, part in enumerate(node):
                visit(part, (*path, i), prefix)
        else:
            for key, part in node.items():
                visit(part, (*path, key), prefix)

    visit(spec, (), "")
    keys = {entry.key for entry in entries}
    for name, target in tied.items():
        if target not in keys:
            raise ValueError(f"{name!r} is declared tied to {target!r}, which is no parameter of this tree")
    out = Table(tuple(entries), tied, frozenset(ignored))
    for name, found in out.stored().items():
        layouts = [entry.param.layout for entry in found]
        if len(found) > 1 and not all(isinstance(layout, Part) for layout in layouts):
            raise ValueError(f"{', '.join(entry.key for entry in found)} all claim the checkpoint tensor {name!r}")
        if isinstance(layouts[0], Part):
            whole = [replace(layouts[0], index=i) for i in range(len(layouts[0].sizes))]
            if layouts != whole:
                parts = ", ".join(f"{entry.key} ({entry.param.layout})" for entry in found)
                raise ValueError(f"the checkpoint tensor {name!r} must be made of all its parts, once each: {parts}")
    return out


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def build(spec: Spec, leaf: Callable[[Entry], Any]) -> Tree:
    """A tree of the spec's shape with `leaf(entry)` at every parameter (no ties, no empty branches)."""
    values = {entry.path: leaf(entry) for entry in table(spec).entries}
    return unflatten(values)


def unflatten(values: Mapping[Path, Any]) -> Tree:
    """{path: value} -> nested dicts (string keys) and tuples (integer keys)."""
    if () in values:
        return values[()]
    groups: dict[str | int, dict[Path, Any]] = defaultdict(dict)
    for path, value in values.items():
        groups[path[0]][path[1:]] = value
    if groups and all(isinstance(key, int) for key in groups):
        if groups.keys() != set(range(len(groups))):
            raise ValueError(f"a tuple cannot have the places {sorted(groups, key=int)} only")
        return tuple(unflatten(groups[i]) for i in range(len(groups)))
    return {key: unflatten(group) for key, group in groups.items()}


def flatten(tree: Tree) -> dict[Path, Any]:
    """Inverse of `unflatten`: nested dicts and tuples -> {path: leaf}, in tree order."""
    if isinstance(tree, Mapping):
        return {(key, *path): leaf for key, part in tree.items() for path, leaf in flatten(part).items()}
    if isinstance(tree, tuple | list):
        return {(i, *path): leaf for i, part in enumerate(tree) for path, leaf in flatten(part).items()}
    return {(): tree}


def abstract(spec: Spec, dtype: Any = jnp.float32) -> Tree:
    """The parameter tree as `jax.ShapeDtypeStruct`s: what `jax.eval_shape` of a forward pass takes."""
    return build(spec, lambda entry: jax.ShapeDtypeStruct(entry.param.shape, entry.param.dtype(dtype)))


def logical_axes(spec: Spec) -> Tree:
    """The parameter tree with the tuple of logical axis names at every leaf."""
    return build(spec, lambda entry: entry.param.axes)


def trainable(spec: Spec) -> Tree:
    """The parameter tree with True at weights and False at buffers: a mask for optimisers."""
    return build(spec, lambda entry: not entry.param.buffer)


def init(spec: Spec, key: jax.Array, dtype: Any = jnp.float32, shardings: Tree | None = None) -> Tree:
    """Initial parameters, made by one compiled program.

    Every leaf draws from a key of its own, folded from its path, so that a change of one parameter changes no other.
    Leaves of one shape and initialiser are drawn together, which keeps the program small.

    Args:
        spec: the declaration.
        key: a `jax.random.key`.
        dtype: dtype of the leaves.
        shardings: a tree of shardings; each device then makes its own part alone, of the same random numbers (the last
            bit may differ, as arithmetic is vectorised by the shape of a part).
    """
    places = None if shardings is None else flatten(shardings)
    return unflatten(init_entries(table(spec).entries, key, dtype, places))


def init_entries(
    entries: Sequence[Entry], key: jax.Array, dtype: Any = jnp.float32, shardings: Mapping[Path, Any] | None = None
) -> dict[Path, jax.Array]:
    """`init` for some leaves only: {path: array}, the same values as in the whole tree."""
    if not isinstance(key, jax.Array):
        raise TypeError(f"key must be a jax.random.key, got {type(key).__name__}; write key=jax.random.key(0)")
    plan = tuple(
        (entry.key, entry.param.shape, entry.param.init, jnp.dtype(entry.param.dtype(dtype))) for entry in entries
    )
    places = None if shardings is None else tuple(shardings[entry.path] for entry in entries)
    return dict(zip((entry.path for entry in entries), _draw(plan, places)(key), strict=True))


@lru_cache(maxsize=128)
def _draw(
    plan: tuple[tuple[str, tuple[int, ...], Initializer, np.dtype], ...], shardings: tuple[Any, ...] | None
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """The compiled program that draws leaves of these names, shapes, initialisers and dtypes from a key."""
    groups: dict[tuple[tuple[int, ...], Initializer, np.dtype], list[str]] = defaultdict(list)
    for name, *kind in plan:
        groups[tuple(kind)].append(name)  # type: ignore[index]

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        values: dict[str, jax.Array] = {}
        for (shape, initializer, dtype), names in groups.items():
            keys = jnp.stack([rng.fold_path(key, name) for name in names])
            # A row is split over devices in no way that the shape could be.
            in_a_row = shardings is None and isinstance(initializer, Random)
            make = initializer.in_a_row if in_a_row else initializer  # type: ignore[attr-defined]
            drawn = jax.vmap(lambda k, make=make, shape=shape, dtype=dtype: make(k, shape, dtype))(keys)
            values.update({name: drawn[i] for i, name in enumerate(names)})
        return tuple(values[name] for name, *_ in plan)

    return jax.jit(draw, out_shardings=shardings)


def count(spec: Spec) -> int:
    """Number of scalar parameters, buffers included, tied ones once."""
    return sum(math.prod(entry.param.shape) for entry in table(spec).entries)


def describe(spec: Spec, params: Tree | None = None) -> str:
    """The parameter table as text: our path, shape, dtype, logical axes, checkpoint name; then the total.

    Args:
        spec: the declaration.
        params: the parameters, for their dtypes; without them the column is left out.
    """
    leaves = flatten(params) if params is not None else {}
    rows = [("parameter", "shape", "dtype", "axes", "checkpoint")]
    for entry in table(spec).entries:
        leaf = leaves.get(entry.path)
        axes = ", ".join(axis or "-" for axis in entry.param.axes)
        shape = " x ".join(map(str, entry.param.shape)) or "scalar"
        rows.append((entry.key, shape, "" if leaf is None else str(leaf.dtype), axes, entry.name))
    keep = [i for i in range(5) if i != 2 or params is not None]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(row[i].ljust(widths[i]) for i in keep).rstrip() for row in rows]
    return "\n".join([*lines, f"{count(spec):,} parameters in {len(rows) - 1} arrays"])


# --- layers


def stack(layers: Sequence[Tree]) -> Tree:
    """Equal layers -> one tree whose leaves have a leading layer axis, for `fold` to scan over.

    Raises:
        ValueError: the layers differ in structure or shape, naming the first difference.
    """
    if not layers:
        raise ValueError("no layers to stack")
    first = flatten(layers[0])
    for i, layer in enumerate(layers[1:], 1):
        other = flatten(layer)
        for path in first.keys() | other.keys():
            a, b = first.get(path), other.get(path)
            if a is None or b is None or np.shape(a) != np.shape(b):
                shapes = [None if leaf is None else np.shape(leaf) for leaf in (a, b)]
                raise ValueError(
                    f"layers 0 and {i} differ at {dotted(path)!r}: {shapes[0]} and {shapes[1]}; only equal layers stack"
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack(layers: Tree) -> tuple[Tree, ...]:
    """Inverse of `stack`."""
    count = len(jax.tree.leaves(layers)[0])
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count))


def stack_layers(tree: Tree) -> Tree:
    """The tree with every tuple under a key `layers`, which is what `fold` runs over, stacked.

    Raises:
        ValueError: some layers differ.
    """
    if not isinstance(tree, Mapping):
        return tree
    stacks = {key: key == "layers" and isinstance(part, tuple) for key, part in tree.items()}
    return {key: stack(part) if stacks[key] else stack_layers(part) for key, part in tree.items()}


def unstack_layers(tree: Tree) -> Tree:
    """Inverse of `stack_layers`."""
    if not isinstance(tree, Mapping):
        return tree
    stacks = {key: key == "layers" and isinstance(part, Mapping) for key, part in tree.items()}
    return {key: unstack(part) if stacks[key] else unstack_layers(part) for key, part in tree.items()}


def as_held(spec: Spec, tree: Tree) -> Spec:
    """The spec of a tree whose layers may be stacked: parameters of a stack have a first axis "layers".

    It says shapes, axes and what is trained. Checkpoints hold layers one by one, so the names of a stack, with `*` for
    the layer's number, are for reading only.
    """
    if isinstance(spec, At):
        return replace(spec, spec=as_held(spec.spec, tree))
    if isinstance(spec, tuple) and isinstance(tree, Mapping):
        return _stack_spec(spec)
    if isinstance(spec, tuple) and isinstance(tree, tuple):
        return (*map(as_held, spec, tree), *spec[len(tree) :])
    if isinstance(spec, Mapping) and isinstance(tree, Mapping):
        return {key: as_held(part, tree[key]) if key in tree else part for key, part in spec.items()}
    return spec


def _stack_spec(layers: Sequence[Spec]) -> Spec:
    """The spec of equal layers that are stacked."""

    def visit(node: Spec) -> Spec:
        if isinstance(node, Param):
            shape, axes = (len(layers), *node.shape), ("layers", *node.axes)
            return replace(node, shape=shape, axes=axes, init=_each(node.init))
        if isinstance(node, At):
            return replace(node, spec=visit(node.spec))
        if isinstance(node, Mapping):
            return {key: visit(part) for key, part in node.items()}
        return tuple(map(visit, node)) if isinstance(node, tuple) else node

    first = layers[0]
    return visit(replace(first, prefix=re.sub(r"\b0$", "*", first.prefix)) if isinstance(first, At) else first)


@lru_cache(maxsize=256)
def _each(init: Initializer) -> Initializer:
    """The initialiser of a stack of what `init` makes."""

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        return jax.vmap(lambda one: init(one, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return draw


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["value"])
@dataclass(frozen=True)
class Static:
    """What differs from layer to layer and is no array, such as the kind of its attention, as `data` of `fold`."""

    value: Any


_remat: ContextVar[bool] = ContextVar("formax_remat", default=False)


@contextmanager
def rematerialised(on: bool) -> Iterator[None]:
    """Every `fold` that is traced inside recomputes its blocks in the backward pass, if `on`.

    What was compiled before does not look here again: `on` must be part of what a program is compiled for, as
    `Model.remat` is.
    """
    token = _remat.set(on)
    try:
        yield
    finally:
        _remat.reset(token)


def fold(
    block: Callable[..., tuple[Any, Any]],
    layers: Tree,
    x: Any,
    *,
    cache: Any = None,
    key: jax.Array | None = None,
    data: Any = None,
    remat: bool | None = None,
    name: str = "layers",
) -> tuple[Any, Any]:
    """Runs `x` through all layers: unrolled over a tuple of them, scanned over a stacked tree (`stack`).

    Args:
        block: `block(p, x, cache, key) -> (x, cache)`, or `block(p, x, cache, key, data)` when `data` is given.
        layers: tuple of per-layer parameters, or one stacked tree.
        x: what flows through, any pytree of arrays.
        cache: per-layer caches, a tuple or stacked as the layers are; None for none.
        key: random key for dropout, folded with the layer's number; None turns dropout off.
        data: what differs from layer to layer besides parameters, a tuple with an entry a layer. What a program is
            compiled for is `Static`; scanned layers then take turns, as many as there are until it comes again.
        remat: recompute the block in the backward pass instead of storing its activations; None does what the model
            is set to (`Model.remat`).
        name: scope of the taps inside, "layers" -> "layers.0.attn.weights".

    Returns:
        `x` after the last layer, and what the blocks gave beside it (the new caches), a tuple or stacked as the layers
        are; None if there is nothing.

    Raises:
        ValueError: another number of caches or data than of layers.
    """
    remat = _remat.get() if remat is None else remat

    def run(p: Tree, x: Any, cache: Any, key: jax.Array | None, data: Any) -> tuple[Any, Any]:
        out, cache = block(p, x, cache, key) if data is None else block(p, x, cache, key, data)
        return tap.tap("out", out), cache

    if isinstance(layers, tuple | list):
        for what, given in (("caches", cache), ("data", data)):
            if given is not None and len(given) != len(layers):
                raise ValueError(f"{len(layers)} layers need as many {what}, got {len(given)}")
        caches = []
        for i, p in enumerate(layers):
            with tap.scope(name), tap.scope(str(i)):
                step = tap.isolate(run, remat=remat)
                layer_key = None if key is None else jax.random.fold_in(key, i)
                x, new = step(p, x, None if cache is None else cache[i], layer_key, None if data is None else data[i])
            caches.append(new)
        return x, tuple(caches) if jax.tree.leaves(caches) else None

    depth, period, turns = len(jax.tree.leaves(layers)[0]), 1, (data,)
    if isinstance(data, tuple | list):
        period = _period([jax.tree.structure(one) for one in data])
        turns = tuple(jax.tree.map(lambda *values: jnp.stack(values), *data[j::period]) for j in range(period))
    layers, cache = (_in_turns(tree, period) for tree in (layers, cache))
    with tap.scope(name):

        def scanned(x: Any, item: tuple[Any, ...]) -> tuple[Any, Any]:
            i, layers, caches, data = item
            out = []
            for j, (p, cache) in enumerate(_turns((layers, caches), period)):
                at = i * period + j
                layer_key = None if key is None else jax.random.fold_in(key, at)
                with tap.loop(at, depth) as seen:
                    x, cache = run(p, x, cache, layer_key, data[j])
                out.append((cache, seen))
            return x, out[0] if period == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *out)

        body = jax.checkpoint(scanned) if remat else scanned
        x, out = jax.lax.scan(body, x, (jnp.arange(depth // period), layers, cache, turns))
        new, seen = out if period == 1 else jax.tree.map(lambda leaf: leaf.reshape(depth, *leaf.shape[2:]), out)
        tap.emit(seen, depth)
    return x, new if jax.tree.leaves(new) else None


def _period(kinds: Sequence[Any]) -> int:
    """After how many layers their kinds come again in the same order, which may be all of them."""
    depth = len(kinds)
    whole = (n for n in range(1, depth + 1) if depth % n == 0)
    return next(n for n in whole if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def _in_turns(tree: Tree, period: int) -> Tree:
    """Stacked layers [L, ...] as [L / period, period, ...]."""
    return tree if period == 1 else jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), tree)


def _turns(tree: Tree, period: int) -> list[Tree]:
    """The layers of one round of `_in_turns`."""
    return [tree] if period == 1 else [jax.tree.map(lambda leaf, j=j: leaf[j], tree) for j in range(period)]
