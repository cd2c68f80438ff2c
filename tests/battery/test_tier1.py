"""What every architecture must satisfy in numbers, compared with the reference: outputs, losses, files."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.compare import error, visible
from safetensors import safe_open

from battery.families_page import MEASURES
from battery.goldens import TOLERANCE, Golden, field, goldens
from formax.core import spec as specs
from formax.core.config import ROPE_KEYS
from formax.training import objective

# Names that the reference itself changes when it saves: (pattern, what it makes of it).
RENAMED = (
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)

ALL = pytest.mark.parametrize("golden", goldens(), ids=str)


@ALL
def test_outputs_and_losses_are_the_references(golden: Golden, tmp_path: Path) -> None:
    model, report = golden.open(tmp_path)
    out = model(**golden.inputs, **golden.switches)
    far = {
        name: error(visible(expected, golden.inputs), visible(field(out, name), golden.inputs))
        for name, expected in golden.outputs.items()
    }
    assert max(far.values()) < TOLERANCE, far
    MEASURES[golden.family_name].parity[str(golden)] = max(far.values())
    if "out.loss" in golden.arrays:
        batch = {name: jnp.asarray(array) for name, array in (golden.given | golden.switches).items()}
        loss = jax.jit(lambda out, batch: objective.loss_of(model, out, batch))(out, batch)
        np.testing.assert_allclose(loss, golden.arrays["out.loss"], rtol=1e-5)
    names = {entry.key: entry.name for entry in specs.table(model.spec).entries}
    prefix, silent = f"{golden.family.base}.", getattr(golden.hooks, "SILENT", ())

    def told(found: Iterable[str]) -> set[str]:
        """What is not passed over without a word by the reference, which names things without the base's prefix."""
        return {name.removeprefix(prefix) for name in found if not any(re.search(one, name) for one in silent)}

    assert told(names[key] for key in report.initialised) == told(golden.meta.get("missing", ()))
    assert told(report.left_out) == told(golden.meta.get("unexpected", ()))


def timeless(name: str, prefix: str) -> str:
    """A key without what versions and heads change: the base model's prefix, old names of parameters."""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name.removeprefix(prefix)


def agree(written: Any, given: Any) -> bool:
    """Whether two configurations say the same where both speak, word for word."""
    if not isinstance(written, dict) or not isinstance(given, dict):
        return bool(written == given)
    both = written.keys() & given.keys() - set(ROPE_KEYS)  # rotary settings have several spellings
    return all(agree(written[name], given[name]) for name in both)


@ALL
def test_saving_gives_the_references_files(golden: Golden, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    model, report = golden.open(source)
    model.save_pretrained(target)

    with safe_open(target / "model.safetensors", "np") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    assert {name: (array.shape, array.dtype.name) for name, array in saved.items()} == golden.saved_keys
    prefix, moved = f"{golden.family.base}.", getattr(golden.hooks, "MOVED", {})
    found = {name: array.tobytes() for name, array in golden.tensors().items()}
    held = {timeless(name, prefix): given for name, given in found.items()} | found
    fresh = {
        name
        for entry in specs.table(model.spec).entries
        for name in entry.stored_names
        if entry.key in report.initialised
    }
    for name in saved.keys() - fresh:
        plain = timeless(name, prefix)
        assert saved[name].tobytes() == held.get(name, held.get(plain, held.get(moved.get(plain, plain)))), name

    written = json.loads((target / "config.json").read_text())
    assert written["architectures"] == [golden.meta["architecture"]]
    told = {"architectures": written["architectures"], "dtype": written["dtype"]}
    again = golden.family.config.from_dict(golden.meta["config"] | told, source=str(golden))
    assert golden.family.config.from_dict(written, source="what was written") == again
    assert agree(written, golden.meta["config"] | told)
    MEASURES[golden.family_name].export.add(str(golden))
