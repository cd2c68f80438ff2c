"""Class names of transformers' Flax and TensorFlow, which follow from the table of families.

A class is the architecture's name behind "Flax" or "TF", an Auto class that of formax behind the same. So no list of
them is kept, and a family that is registered has its classes, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from formax import auto
from formax.core import registry
from formax.core.family import Architecture, Family


def families() -> Iterator[Family]:
    """Every family once, in the order of the table."""
    seen: set[int] = set()
    for model_type in registry.model_types():
        family = registry.family(model_type)
        if id(family) not in seen:
            seen.add(id(family))
            yield family


def find(name: str) -> tuple[Family, Architecture] | None:
    """The architecture of that name (without "Flax" or "TF"), with its family.

    Families are imported until it is found, first those whose model type the name begins with.
    """
    squashed = name.lower()

    def is_likely(model_type: str) -> bool:
        return squashed.startswith(model_type.replace("_", "").replace("-", ""))

    for model_type in sorted(registry.model_types(), key=is_likely, reverse=True):
        family = registry.family(model_type)
        if (found := family.find(name)) is not None:
            return family, found
    return None


def check_config(name: str, family: Family, config: Any) -> None:
    """Raises TypeError where the class `name` of a family is given what is not its configuration."""
    if not isinstance(config, family.config):
        raise TypeError(
            f"{name} needs a {family.config.__name__}, as formax.AutoConfig.for_model({family.model_type!r}) makes it, "
            f"not a {type(config).__name__}"
        )


def tasks() -> dict[str, str]:
    """{name of an Auto class: its task}."""
    kinds = ((name, kind) for name, kind in vars(auto).items() if name.startswith("AutoModel"))
    return {name: kind.task for name, kind in kinds}


def class_names(prefix: str) -> list[str]:
    """Every name that `resolve` knows."""
    plain = [*tasks()]
    for family in families():
        plain += [*(arch.name for arch in family.architectures), *family.old_names]
    return sorted(f"{prefix}{name}" for name in plain)


def resolve(
    module: str,
    prefix: str,
    name: str,
    make: Callable[[Family, Architecture], Any],
    make_auto: Callable[[str, str], Any],
) -> Any:
    """The class of a name: what a module's `__getattr__` gives.

    Args:
        module: the module's own name, for messages.
        prefix: "Flax" or "TF".
        name: what is asked for.
        make: (family, architecture) -> class.
        make_auto: (name of the class, task) -> Auto class.

    Raises:
        AttributeError: there is no such class; the message has the nearest.
    """
    if not name.startswith(prefix):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    plain = name.removeprefix(prefix)
    if (task := tasks().get(plain)) is not None:
        return make_auto(name, task)
    if (found := find(plain)) is not None:
        return make(*found)
    near = difflib.get_close_matches(name, class_names(prefix), n=3)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise AttributeError(f"module {module!r} has no class {name!r}, for formax has no such family or head{hint}")
