"""The classes of transformers' Flax and TensorFlow, whose names follow from the table of families.

A class is the architecture's name behind "Flax" or "TF", an Auto class that of formax behind the same. So no list of
them is kept, and a family that is registered has its classes, too. What belongs to `generate` has names of its own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from formax import auto
from formax.compat import generation, outputs
from formax.compat.auto import Auto
from formax.compat.composed import OF_TWO
from formax.core import registry
from formax.core.family import Architecture, Family


def families() -> Iterator[Family]:
    """Every family once, in the order of the table."""
    seen: set[int] = set()
    for model_type in dict.fromkeys((*registry.MODULES, *registry.model_types())):
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


# How transformers spells tasks in the names of its tables, where it is not word by word.
SPELT = {
    "ForSeq2SeqLM": "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "ForSpeechSeq2Seq": "FOR_SPEECH_SEQ_2_SEQ",
    "ForVision2Seq": "FOR_VISION_2_SEQ",
    "ForPreTraining": "FOR_PRETRAINING",
}


def tables(prefix: str) -> dict[str, str]:
    """{name of a table of classes: its task}, such as FLAX_MODEL_FOR_MASKED_LM_MAPPING."""
    found = {}
    for task in tasks().values():
        words = SPELT.get(task, re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", task).upper())
        found["_".join(filter(None, (prefix.upper(), "MODEL", words, "MAPPING")))] = task
    return found


@dataclass(frozen=True)
class Surface:
    """A module of classes as another framework has them.

    Attributes:
        module: its name.
        prefix: what its classes' names begin with.
        base: what they inherit from.
        fields: what a class has of its own, beside its family and its architecture.
    """

    module: str
    prefix: str
    base: type
    fields: Callable[[Family, Architecture], dict[str, Any]]

    def listed(self) -> list[str]:
        """Every name that `find` knows."""
        plain = [*tasks(), *generation.listed()]
        for family in families():
            plain += [*(arch.name for arch in family.architectures), *family.old_names]
        written = [name for name in outputs.WRITTEN if name.startswith(self.prefix)]
        return sorted([*(f"{self.prefix}{name}" for name in plain), *written, *tables(self.prefix), "CONFIG_MAPPING"])

    def find(self, name: str) -> Any:
        """The class of a name, or a table of classes: what the module's `__getattr__` gives.

        Raises:
            AttributeError: there is no such class; the message has the nearest.
        """
        if name == "CONFIG_MAPPING":
            return {family.model_type: family.config for family in families()}
        if name.endswith("_MAPPING") and (task := tables(self.prefix).get(name)) is not None:
            serve = ((family, family.for_task(task)) for family in families())
            return {family.config: _class(self, family, found) for family, found in serve if found is not None}
        if not name.startswith(self.prefix):
            raise AttributeError(f"module {self.module!r} has no attribute {name!r}")
        plain = name.removeprefix(self.prefix)
        if (task := tasks().get(plain)) is not None:
            return _auto_class(self, name, task)
        if (made := outputs.written(name) or generation.find(name, self.prefix)) is not None:
            return made
        if (found := find(plain)) is not None:
            return _class(self, *found)
        near = difflib.get_close_matches(name, self.listed(), n=3)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise AttributeError(
            f"module {self.module!r} has no class {name!r}, for formax has no such family or head{hint}"
        )


@lru_cache(maxsize=4096)
def _class(surface: Surface, family: Family, architecture: Architecture) -> Any:
    """The class of an architecture, one whatever it is called by."""
    name = f"{surface.prefix}{architecture.name}"
    fields = {
        "family": family,
        "architecture": architecture,
        "config_class": family.config,
        "__module__": surface.module,
        "__doc__": f"transformers' {name}: `{architecture.name}` of the family {family.model_type}.",
    }
    more = (OF_TWO[family.model_type],) if family.model_type in OF_TWO else ()
    return type(name, (surface.base, *more), fields | surface.fields(family, architecture))


@lru_cache(maxsize=256)
def _auto_class(surface: Surface, name: str, task: str) -> Any:
    """The Auto class of a task."""

    def make(family: Family, architecture: Architecture) -> Any:
        return _class(surface, family, architecture)

    fields = {"make": staticmethod(make), "task": task, "__module__": surface.module, "__doc__": Auto.__doc__}
    return type(name, (Auto,), fields)
