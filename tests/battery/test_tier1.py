"""What every architecture must satisfy in numbers: outputs and files of the reference, own steps and gradients."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.compare import error, visible
from safetensors import safe_open

from battery.goldens import Golden, goldens, one_each
from battery.trace import unused
from formax.core import spec as specs

# Relative to the standard deviation of the output, float32, where tokens are real (tests/oracle/compare.py).
TOLERANCE = 1e-4
PREFILL = 17

ALL = pytest.mark.parametrize("golden", goldens(), ids=str)


def field(out: Any, name: str) -> np.ndarray:
    """`hidden_states.0` of an output."""
    for part in name.split("."):
        out = out[int(part)] if part.isdigit() else getattr(out, part)
    return np.asarray(out)


@ALL
def test_outputs_are_the_references(golden: Golden, tmp_path: Path) -> None:
    model, report = golden.open(tmp_path)
    out = model(**golden.inputs, **golden.switches)
    far = {
        name: error(visible(expected, golden.inputs), visible(field(out, name), golden.inputs))
        for name, expected in golden.outputs.items()
    }
    assert max(far.values()) < TOLERANCE, far
    names = {entry.key: entry.name for entry in specs.table(model.spec).entries}
    assert {names[key] for key in report.initialised} == set(golden.meta.get("missing", ()))
    assert set(report.left_out) == set(golden.meta.get("unexpected", ()))


def timeless(name: str, prefix: str) -> str:
    """A key without what versions and heads change: the base model's prefix, the first names of a norm's parameters."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name.removeprefix(prefix)))


@ALL
def test_saving_gives_the_references_files(golden: Golden, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    model, _ = golden.open(source)
    model.save_pretrained(target)

    with safe_open(target / "model.safetensors", "np") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    assert {name: (array.shape, array.dtype.name) for name, array in saved.items()} == golden.saved_keys
    prefix = f"{golden.family.base}."
    held = {timeless(name, prefix): array.tobytes() for name, array in golden.tensors().items()}
    kept = {name: array.tobytes() for name, array in saved.items() if name not in golden.meta.get("missing", ())}
    assert [name for name, stored in kept.items() if stored != held[timeless(name, prefix)]] == []

    written = json.loads((target / "config.json").read_text())
    assert written["architectures"] == [golden.meta["architecture"]]
    told = {"architectures": written["architectures"], "dtype": written["dtype"]}
    again = golden.family.config.from_dict(golden.meta["config"] | told, source=str(golden))
    assert golden.family.config.from_dict(written, source="what was written") == again
    # word for word, too, but for what is told anew
    both = written.keys() & golden.meta["config"].keys() - told.keys()
    assert {name: written[name] for name in both} == {name: golden.meta["config"][name] for name in both}


def decodes(golden: Golden) -> bool:
    mask = golden.inputs.get("attention_mask")
    return bool(golden.meta["config"].get("is_decoder")) and (mask is None or mask.ndim == 2)


@pytest.mark.parametrize("golden", [golden for golden in goldens() if decodes(golden)], ids=str)
def test_decoding_with_a_cache_is_the_full_forward(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    inputs = golden.inputs
    rows, length = inputs["input_ids"].shape
    memory = inputs.pop("encoder_hidden_states", None)
    output = "logits" if "logits" in golden.outputs else "last_hidden_state"
    # what is about keys, not about these tokens; a mask [B, T, S] is about both
    masks = ("attention_mask", "encoder_attention_mask", "head_mask")
    whole = {name: inputs.pop(name) for name in masks if name in inputs and inputs[name].ndim == 2}
    cache = model.init_cache(rows, length, 0 if memory is None else memory.shape[1])
    parts = []
    for start, stop in ((0, PREFILL), *((i, i + 1) for i in range(PREFILL, length))):
        step = {name: array[:, start:stop] for name, array in inputs.items()}
        # the encoder's states are given once, then their keys and values are in the cache
        out = model(**step, **whole, cache=cache, encoder_hidden_states=memory if start == 0 else None)
        cache = out.cache
        parts.append(field(out, output))
    far = error(*(visible(x, golden.inputs) for x in (golden.outputs[output], np.concatenate(parts, axis=1))))
    assert far < TOLERANCE


@pytest.mark.parametrize("golden", one_each(), ids=str)
def test_gradients_are_finite_and_not_zero(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)

    def loss(model: Any) -> jax.Array:
        # weighted at random: a plain sum, or a sum of squares, is flat after a normalisation
        arrays = jax.tree.leaves(model(**golden.inputs))
        draws = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(arrays)]
        return sum(map(jnp.vdot, draws, arrays), start=jnp.zeros(()))

    found = specs.flatten(jax.jit(jax.grad(loss))(model).params)
    invisible = importlib.import_module(f"oracle.families.{golden.family_name}").INVISIBLE
    dead = unused(golden)
    for entry in specs.table(model.spec).entries:
        largest = np.abs(found[entry.path]).max()
        assert np.isfinite(largest), entry.key
        if entry.key not in dead and not any(re.search(pattern, entry.name) for pattern in invisible):
            assert largest > 1e-4, entry.key
