"""Which goldens stand for others: heads differ after the layers, and relatives run in the frame of a line's first."""

from functools import cache
from typing import Any

import jax

from battery.goldens import Golden, one_each
from formax.core import registry
from formax.core import spec as specs
from formax.core.family import Family

# Families whose layers are not run as those of their relative: what is kept of maps, experts, kinds that take turns,
# tables beside the layers.
OF_THEIR_OWN = {"detr", "mixtral", "gpt_neo", "longt5"}
# Families with layers of BART's frame (layers/transformer.py), though they are no relatives of it.
OF_BARTS = {"detr", "whisper"}


@cache
def stacks(golden: Golden) -> frozenset[str]:
    """Where the tree has layers, if they are all equal."""
    shapes = specs.abstract(golden.architecture.spec(golden.config))
    places = {specs.dotted(path[: path.index("layers")]) for path in specs.flatten(shapes) if "layers" in path}
    try:
        jax.eval_shape(specs.stack_layers, shapes)
    except ValueError:
        return frozenset()
    return frozenset(places)


def one_a_kind() -> list[Golden]:
    """Of each family one golden for every combination of stacks, the smallest."""
    found: dict[Any, Golden] = {}
    for golden in one_each():
        if own := stacks(golden):
            kind = golden.family_name, own
            found[kind] = min(found.get(kind, golden), golden, key=lambda one: len(one.saved_keys))
    return list(found.values())


def has_a_frame(golden: Golden) -> bool:
    """Whether its layers are run in a frame of the family's own: not that of its parts, or of a relative.

    A relative of another kind (text, vision, ...) does not count.
    """
    family = golden.family
    if family.parts(golden.config):
        return False
    return family.relative is None or family.model_type in OF_THEIR_OWN or _kind(family) != _kind(_relative(family))


def _relative(family: Family) -> Family:
    assert family.relative is not None
    return registry.family(family.relative)


def _kind(family: Family) -> str:
    return family.config.__module__.split(".")[2]


def one_a_frame() -> list[Golden]:
    """Of every frame the golden with most stacks."""
    found: dict[str, Golden] = {}
    for golden in (one for one in one_a_kind() if has_a_frame(one) and one.family_name not in OF_BARTS):
        before = found.get(golden.family_name, golden)
        found[golden.family_name] = max(before, golden, key=lambda one: len(stacks(one)))
    return list(found.values())


def each_of_a_frame() -> list[Golden]:
    """A golden of every architecture; of families without a frame of their own one alone, that with most parameters."""
    found: dict[str, Golden] = {}
    for golden in one_each():
        name = golden.architecture.name if has_a_frame(golden) else golden.family_name
        found[name] = max(found.get(name, golden), golden, key=lambda one: len(one.saved_keys))
    return list(found.values())
