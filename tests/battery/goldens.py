"""The stored answers of the reference, and the checkpoints they are about. `tests/oracle/README.md` has the format."""

import importlib
import json
import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from oracle import weights
from safetensors.numpy import save_file

from formax import loading
from formax.core import registry
from formax.core.config import Config
from formax.core.family import Architecture, Family
from formax.training import objective

ROOT = Path(os.environ.get("FORMAX_GOLDENS", Path(__file__).resolve().parent.parent / "goldens"))
# Whether there is a cache is said by passing one, and losses are functions of their own.
SWITCHES = {"use_cache", "return_loss"}

# Relative to the standard deviation of the output, float32, where tokens are real (tests/oracle/compare.py).
TOLERANCE = 1e-4

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Golden:
    """One case of a family."""

    family_name: str
    name: str

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((ROOT / self.family_name / f"{self.name}.json").read_text())

    @cached_property
    def arrays(self) -> Tensors:
        with np.load(ROOT / self.family_name / f"{self.name}.npz") as file:
            return dict(file)

    def _under(self, prefix: str) -> Tensors:
        return {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}

    @property
    def inputs(self) -> Tensors:
        """Arrays of the call; where the reference makes the decoder's ids of labels, these."""
        return dict(self._inputs)

    @cached_property
    def _inputs(self) -> Tensors:
        with jax.ensure_compile_time_eval():  # also where somebody traces
            made = objective.inputs_of(self.architecture, self.config, self.given)
            return {name: np.asarray(array) for name, array in made.items()}

    @property
    def hooks(self) -> ModuleType:
        """The module of the family's cases, which may say what the battery must know; `tests/oracle/README.md`."""
        return importlib.import_module(f"oracle.families.{self.family_name}")

    @property
    def given(self) -> Tensors:
        """Arrays of the reference's call: inputs, and what its loss takes."""
        return self._under("in.")

    @property
    def switches(self) -> dict[str, Any]:
        """Scalars of the call."""
        return {name: value for name, value in self.meta["call"].items() if name not in SWITCHES}

    @property
    def outputs(self) -> Tensors:
        """What the reference answers; of a tuple, `hidden_states.0` and so on."""
        return {name: array for name, array in self._under("out.").items() if not name.startswith("loss")}

    @property
    def saved_keys(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Names, shapes and dtypes of what the reference saves, having opened this checkpoint."""
        keys = self.meta.get("saved_keys", self.meta["keys"])
        return {name: (tuple(shape), dtype) for name, (shape, dtype) in keys.items()}

    @property
    def family(self) -> Family:
        return registry.family(self.meta["config"]["model_type"])

    @property
    def architecture(self) -> Architecture:
        found = self.family.find(self.meta["architecture"])
        assert found is not None, f"{self.family_name} has no {self.meta['architecture']}"
        return found

    @cached_property
    def config(self) -> Config:
        return self.family.config.from_dict(self.meta["config"], source=f"{self.family_name}/{self.name}")

    def tensors(self) -> Tensors:
        """What the checkpoint holds."""
        given, copies = self._under("key."), self.meta.get("copies", {})
        return {
            name: given[name] if name in given else weights.tensor(copies.get(name, name), shape, dtype)
            for name, (shape, dtype) in self.meta["keys"].items()
        }

    def checkpoint(self, folder: Path) -> Path:
        """Writes the checkpoint into `folder`, which it returns."""
        (folder / "config.json").write_text(json.dumps(self.meta["config"]))
        save_file(self.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def open(self, folder: Path) -> tuple[Any, Any]:
        """Writes the checkpoint and opens it as a user would: (model, loading report)."""
        named = self.meta["config"]["architectures"] == [self.meta["architecture"]]
        name = None if named else self.architecture.name
        return loading.load(self.checkpoint(folder), None, architecture=name, output_loading_info=True)

    def __str__(self) -> str:
        return f"{self.family_name}/{self.name}"


def goldens() -> list[Golden]:
    """All goldens of families, those of real checkpoints aside; of FORMAX_FAMILIES ("gpt2,t5") only, if it is set."""
    return _of_families(os.environ.get("FORMAX_FAMILIES", ""))


@cache  # one object a golden, which reads its files once
def _of_families(some: str) -> list[Golden]:
    families = set(some.split(",")) if some else {path.name for path in ROOT.iterdir()} - {"real"}
    files = sorted(path for path in ROOT.glob("*/*.json") if path.parent.name in families)
    return [Golden(path.parent.name, path.stem) for path in files]


def field(out: Any, name: str) -> np.ndarray:
    """`hidden_states.0` of an output."""
    for part in name.split("."):
        out = out[int(part)] if part.isdigit() else getattr(out, part)
    return np.asarray(out)


def weighted(out: Any) -> jax.Array:
    """A number that every element of an output moves, each by a weight of its own.

    The weights are random, for a plain sum, or one of squares, is flat after a normalisation. NumPy draws them: the
    programs of `jax.random` would be a third of what is compiled for a gradient.
    """
    arrays = jax.tree.leaves(out)
    draws = (np.random.default_rng(i).standard_normal(x.shape, np.float32) for i, x in enumerate(arrays))
    return sum(map(jnp.vdot, draws, arrays), start=jnp.zeros(()))


def one_each() -> list[Golden]:
    """For every architecture the golden with most parameters, none of them newly initialised."""
    best: dict[str, Golden] = {}
    for golden in goldens():
        if "missing" not in golden.meta:
            name = golden.architecture.name
            best[name] = max(best.get(name, golden), golden, key=lambda one: len(one.saved_keys))
    return list(best.values())
