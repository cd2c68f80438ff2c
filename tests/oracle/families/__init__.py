"""What the reference is asked to compute: one module a family, each a table of cases as plain data.

A family module defines `CASES`, and `BUGS`: mistakes that its cases must be able to show (`make_goldens.py
--sensitivity` tries them on the reference). Neither needs anything but numpy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One checkpoint, opened by one architecture of the reference and called once.

    Attributes:
        name: the golden's file name, unique in its family.
        architecture: the class that opens the checkpoint.
        config: keyword arguments of the configuration class.
        inputs: the call's arrays.
        outputs: fields of the output to record.
        call: the call's scalar arguments.
        writer: the class that wrote the checkpoint, where it is another.
        literal_config: `config` itself is the config.json, as old files were, not what the reference makes of it.
        rename: `(old, new)` parts of key names, for checkpoints written by older versions.
        copies: keys that repeat the tensor of another one, as `{key: other}`.
        buffers: keys with a given value.
        drop: keys that the writer stores and this checkpoint lacks.
        missing: what the reference must report as absent, and initialises.
        unexpected: what the reference must report as unused.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    inputs: Arrays
    outputs: tuple[str, ...]
    call: Mapping[str, Any] = field(default_factory=dict)
    writer: str = ""
    literal_config: bool = False
    rename: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    buffers: Arrays = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bug:
    """A mistake that an implementation could make, put into a copy of what the reference is given.

    Attributes:
        name: what the mistake is.
        cases: names of the cases that must show it.
        apply: changes the config.json, the checkpoint and the inputs in place.
        least: the smallest error (`compare.error`) that counts as shown.
        outputs: the outputs that must show it; if empty, all but the loss, which is a mean in which much is lost.
    """

    name: str
    cases: tuple[str, ...]
    apply: Callable[[dict[str, Any], dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]], None]
    least: float = 1e-2
    outputs: tuple[str, ...] = ()
