"""What every architecture must satisfy before anything is computed: names, shapes, types and placements."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from battery.frames import each_of_a_frame
from battery.goldens import ROOT, Golden, goldens, one_each
from battery.trace import never_read, traced
from formax.core import registry
from formax.core import spec as specs
from formax.sharding import placements


def test_every_architecture_has_a_golden() -> None:
    declared = {arch.name for name in registry.MODULES for arch in registry.family(name).architectures}
    files = [path for path in ROOT.glob("*/*.json") if path.parent.name != "real"]  # all, whatever FORMAX_FAMILIES says
    assert declared - {Golden(path.parent.name, path.stem).meta["architecture"] for path in files} == set()


def test_every_family_has_goldens_and_no_other_has() -> None:
    modules = {place.partition(":")[0].rpartition(".")[2] for place in registry.MODULES.values()}
    assert {path.name for path in ROOT.iterdir()} - {"real"} == modules


@pytest.mark.parametrize("golden", goldens(), ids=str)
def test_the_spec_is_the_key_list(golden: Golden) -> None:
    stored = specs.table(golden.architecture.spec(golden.config)).stored()
    declared = {name: entries[0].stored_shape for name, entries in stored.items()}
    assert declared == {name: shape for name, (shape, _) in golden.saved_keys.items()}


@pytest.mark.parametrize("golden", one_each(), ids=str)
def test_full_size_forward_in_bfloat16(golden: Golden) -> None:
    given = golden.meta["config"]
    names = ("is_decoder", "add_cross_attention", "pad_token_id", "decoder_start_token_id")
    kept: dict[str, Any] = {name: given[name] for name in names if name in given}
    for name in getattr(golden.hooks, "KEPT", ()):
        part, _, inner = name.rpartition(".")
        source = given.get(part, {}) if part else given
        if inner in source:
            (kept.setdefault(part, {}) if part else kept)[inner] = source[inner]
    _, out = traced(golden, golden.family.config.from_dict(kept, source=str(golden)), jnp.bfloat16)
    for name in golden.outputs.keys() & dict(out.items()).keys():
        expected = golden.outputs[name].shape
        made = getattr(out, name)
        axes = max(1, len(expected) - 1)  # the last is the hidden size, the vocabulary or the labels
        assert (len(made.shape), made.shape[:axes]) == (len(expected), expected[:axes]), name
        assert made.dtype == jnp.bfloat16, name


# Gradients show it of the others (test_steps.py).
TRACED = {golden.architecture.name for golden in goldens()} - {one.architecture.name for one in each_of_a_frame()}


@pytest.mark.parametrize("architecture", sorted(TRACED))
def test_no_parameter_is_dead(architecture: str) -> None:
    """Every parameter is read by some golden's call, or in training."""
    assert never_read(architecture) == set()


@pytest.mark.parametrize("golden", one_each(), ids=str)
def test_full_size_shardings(golden: Golden) -> None:
    mesh = AbstractMesh((4, 16), ("fsdp", "tensor"))
    places = placements(golden.architecture.spec(golden.family.config()), mesh)
    # shard_shape raises for a dimension that its mesh axes do not divide
    parts = [np.prod(NamedSharding(mesh, place.partition).shard_shape(place.shape)) for place in places]
    # a vocabulary that sixteen devices cannot share evenly is most of what is not split 64 ways
    assert sum(parts) < 0.3 * sum(np.prod(place.shape) for place in places)
