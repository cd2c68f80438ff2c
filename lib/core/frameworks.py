"""The names and layouts of Flax's and TensorFlow's checkpoints, which follow from the spec by kind.

transformers had its models in three frameworks. Their checkpoints hold the same numbers; what differs is how a name is
put together and which way a kernel lies, and that a leaf's kind decides: our own word for it (`kernel`, `scale`, ...),
its neighbours, and its layout in PyTorch's files. `respell` writes a spec anew for such a checkpoint; reading and
writing then work as for any other. Where the reference keeps to no rule, an `At` or a `Param` says so (`flax=`, `tf=`).

    Flax          bert/encoder/layer/0/output/dense/kernel, kernels as ours
    TensorFlow    bert/encoder/layer_._0/output/dense/kernel:0, in groups named after the layers
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from formax.core import registry
from formax.core.config import Config
from formax.core.family import Architecture, Family, Port
from formax.core.layout import SAME, TRANSPOSE, Layout, Part, Patch, Permute, Reshape
from formax.core.spec import At, Ignored, Param, Path, Spec, Tied, dotted, table

Names = tuple[str, ...]

TITLES = {"pytorch": "PyTorch", "flax": "Flax", "tf": "TensorFlow"}
# Our word for a leaf -> its name, where PyTorch's is one of these.
STANDARD = ("weight", "bias", "running_mean", "running_var")
FLAX = {"kernel": "kernel", "embedding": "embedding", "scale": "scale", "bias": "bias", "mean": "mean", "var": "var"}
TF = {
    "kernel": "kernel",
    "embedding": "embeddings",
    "scale": "gamma",
    "bias": "bias",
    "mean": "moving_mean",
    "var": "moving_variance",
}
# Weight normalisation; both frameworks keep the names that PyTorch had for them until 2023.
WEIGHT_NORM = {"magnitude": "weight_g", "direction": "weight_v"}


class FrameworkError(ValueError):
    """A framework that has no such model, or no place for one of its parameters."""


@dataclass(frozen=True)
class Spelling:
    """A spec as another framework's checkpoints hold it.

    Attributes:
        spec: the same tree; names and layouts are the framework's.
        nowhere: names in it for which the checkpoint has no place: {name: our path}. They are optional there.
    """

    spec: Spec
    nowhere: Mapping[str, str]

    @property
    def uncounted(self) -> frozenset[str]:
        """Those of them that are buffers, such as counts, which are left out when written."""
        return frozenset(entry.name for entry in table(self.spec).entries if entry.param.computed)


def port(family: Family, framework: str) -> Port:
    """What the framework has of a family.

    Raises:
        FrameworkError: nothing.
    """
    found: Port | None = getattr(family, framework)
    if found is None:
        has = " and ".join(title for name, title in TITLES.items() if name == "pytorch" or getattr(family, name))
        raise FrameworkError(f"{family.model_type} does not exist in {TITLES[framework]}; it exists in {has}")
    return found


def check_writable(family: Family, architecture: Architecture, config: Config, framework: str) -> None:
    """Refuses to write what the framework could not open, or would compute otherwise.

    Raises:
        FrameworkError: the family, this architecture or a switch of its configuration does not exist there.
    """
    there = port(family, framework)
    if there.has(architecture):
        for part, its in family.parts(config):
            check_writable(registry.family(its.model_type), part, its, framework)
        lacking = {"pruned_heads": bool(config.pruned_heads), **there.lacks(config)}
        if fields := [f"{name}={getattr(config, name)!r}" for name, lacks in lacking.items() if lacks]:
            raise FrameworkError(f"{family.model_type} with {', '.join(fields)} does not exist in {TITLES[framework]}")
        return
    ports = {"flax": family.flax, "tf": family.tf}
    has = ["pytorch", *(name for name, one in ports.items() if one is not None and one.has(architecture))]
    raise FrameworkError(
        f"{architecture.name} does not exist in {TITLES[framework]}; it exists in "
        f"{' and '.join(TITLES[name] for name in has)}: format={' or '.join(map(repr, has))}"
    )


def respell(spec: Spec, family: Family, framework: str) -> Spelling:
    """The spec of an architecture of `family` for checkpoints of a framework; for those of "pytorch" as it is.

    Raises:
        FrameworkError: the family does not exist there.
    """
    if framework == "pytorch":
        return Spelling(spec, {})
    nowhere: dict[str, str] = {}
    every = [entry.name for entry in table(spec).entries]

    def model(spec: Spec, there: Port, base: str, place: Names, plain: Names, path: Path) -> Spec:
        """A whole model's spec anew: `place` is the framework's prefix before its names, `plain` PyTorch's."""
        base = base if there.base is None else there.base
        begins = ".".join((*plain, base, ""))
        # In TensorFlow the bare model is a layer of a model, too, and its names begin as in those with heads.
        bare = framework == "tf" and base and not any(name.startswith(begins) for name in every)

        def visit(node: Spec, place: Names | None, plain: Names, path: Path) -> Spec:
            """The node's spec anew; no `place` where the framework has nothing of it."""
            if isinstance(node, At):
                own = getattr(node, framework)
                inside = None if place is None or own == "" else _below(place, node.prefix if own is None else own)
                below = _below(plain, node.prefix)
                if node.family is None or inside is None or framework == "flax":  # whose rules are the same for all
                    return visit(node.spec, inside, below, path)
                own_family = registry.family(node.family)
                return model(node.spec, port(own_family, framework), own_family.base, inside, below, path)
            if isinstance(node, tuple):
                return tuple(visit(part, place, plain, (*path, i)) for i, part in enumerate(node))
            if isinstance(node, Tied):
                return {} if place is None else tie(node, place)
            if isinstance(node, Ignored):
                return {} if place is None else passed_over(_below(place, node.name))
            if not isinstance(node, Mapping):
                raise TypeError(f"{dotted(path)}: a parameter must stand in a dict, under a word for what it is")
            made: dict[str, Spec] = {}
            for key, part in node.items():
                if isinstance(part, Param):
                    made[key] = leaf(key, part, node, place, plain, (*path, key))
                else:
                    made[key] = visit(part, place, plain, (*path, key))
            return made

        def leaf(
            key: str, p: Param, around: Mapping[str, Spec], place: Names | None, plain: Names, path: Path
        ) -> Param:
            own = getattr(p, framework)
            if place is None or own == "" or p.stored_as is not None:
                name = ".".join((*plain, p.name))
                nowhere[name] = dotted(path)
                return replace(p, name=name, also=(), optional=True, computed=p.stored_as is not None or p.buffer)
            name, layout = _kind(key, p, around, framework)
            name = name if own is None else own
            # Which tables of TensorFlow's are called which has changed over the years.
            also = {"embeddings": ("weight",), "weight": ("embeddings",)}.get(name, ()) if key == "embedding" else ()
            older = [join((*place, one)) for one in also]
            name = join(_below(place, name))
            older += [copy for copy, of in there.copies.items() if of == name]
            return replace(p, name=name, also=tuple(older), layout=layout)

        def tie(tied: Tied, place: Names) -> Spec:
            # A table that repeats another one. Kernels that repeat a table are in no file: what is there counts.
            *inside, last = tied.name.split(".")
            last = (FLAX if framework == "flax" else TF)["embedding"] if last == "weight" else last
            return Tied(join((*place, *inside, last)), tied.to)

        def passed_over(name: Names) -> Spec:
            if framework == "tf" and name[-1] == "weight":  # tables that are computed are kept there, too
                return {"weight": Ignored(join(name)), "table": Ignored(join((*name[:-1], TF["embedding"])))}
            return Ignored(join(name))

        def join(parts: Names) -> str:
            if framework == "flax":
                return "/".join(parts)
            out = parts[0]
            for part in parts[1:]:
                out += (there.numbered if part.isdigit() else "/") + part
            return out + ":0"

        return visit(spec, (*place, base) if bare else place, plain, path)

    return Spelling(model(spec, port(family, framework), family.base, (), (), ()), nowhere)


def _below(place: Names, name: str) -> Names:
    """The parts of a name and those of the dotted `name` after it; a name that begins with a slash stands alone."""
    return tuple(name[1:].split("/")) if name.startswith("/") else (*place, *(part for part in name.split(".") if part))


def _kind(key: str, p: Param, around: Mapping[str, Spec], framework: str) -> tuple[str, Layout]:
    """Last part of the name and layout of our leaf `key` beside the leaves `around`, by what it is."""
    if key in WEIGHT_NORM:
        # TensorFlow has the magnitudes along the first axis.
        return WEIGHT_NORM[key], SAME if framework == "tf" and key == "magnitude" else p.layout
    if p.name not in STANDARD or key not in FLAX:
        # A parameter by itself: everybody calls and keeps it the same, but that TensorFlow has no scalars.
        return p.name, Reshape((1,)) if framework == "tf" and p.shape == () else p.layout
    kernel = around.get("kernel")
    if key == "scale" and "bias" not in around:
        return "weight", p.layout  # root-mean-square norms are the frameworks' users' own
    if framework == "flax":
        return FLAX[key], _turned(p) if key == "kernel" else p.layout
    if isinstance(kernel, Param) and _is_conv_1d(kernel):
        return ("weight", p.layout) if key == "kernel" else ("bias", _as_row(p))
    if key == "bias" and "scale" in around:
        return "beta", p.layout
    return TF[key], _turned(p) if key == "kernel" else p.layout


def _is_conv_1d(p: Param) -> bool:
    """Whether this is a kernel of GPT-2's `Conv1D`, which PyTorch already has as (in, out)."""
    layout = p.layout.then if isinstance(p.layout, Part) else p.layout
    return layout == SAME and len(p.shape) == 2


def _turned(p: Param) -> Layout:
    """Layout of a kernel that is PyTorch's tensor with its axes turned: ours, where the spec keeps to the kinds."""
    layout = p.layout
    if isinstance(layout, Part):
        then = TRANSPOSE if layout.then == SAME else SAME
        return replace(layout, axis=1 - layout.axis, then=then)
    if isinstance(layout, Patch):
        rows, out = p.shape
        return Reshape((*layout.patch, rows // math.prod(layout.patch), out))
    if layout == SAME and len(p.shape) == 2:
        return TRANSPOSE
    if isinstance(layout, Permute) or layout == SAME:
        return SAME
    raise TypeError(f"{p.name}: no other framework has a kernel stored as {layout}")


def _as_row(p: Param) -> Layout:
    """Layout of a bias that is stored as a row (1, size)."""
    row = Reshape((1, *p.shape))
    return replace(p.layout, axis=1, then=row) if isinstance(p.layout, Part) else row


def to_write(
    spec: Spec, family: Family, architecture: Architecture, config: Config, framework: str
) -> tuple[Spec, frozenset[str]]:
    """The spec of an architecture as the framework's checkpoints hold it, and the names in it that they lack.

    Raises:
        FrameworkError: the framework has no such architecture, or no place for one of its parameters.
    """
    check_writable(family, architecture, config, framework)
    found = respell(spec, family, framework)
    uncounted = found.uncounted
    if lost := [key for name, key in found.nowhere.items() if name not in uncounted]:
        raise FrameworkError(
            f"{architecture.name} of this configuration does not exist in {TITLES[framework]}, whose class has no place"
            f" for {', '.join(lost[:5])}{' and others' if len(lost) > 5 else ''}"
        )
    return found.spec, uncounted


def known_names(family: Family, config: Config, framework: str) -> set[str]:
    """Every name that some architecture of the family reads in checkpoints of a framework."""
    if framework == "pytorch":
        return family.known_names(config)
    return {
        name
        for arch in family.architectures
        if port(family, framework).has(arch)
        for name in table(respell(arch.spec(config), family, framework).spec).known_names()
    }
