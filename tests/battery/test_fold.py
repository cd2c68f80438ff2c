"""Layers run one by one, in a loop, or computed again in the backward pass: the same model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.compare import error
from safetensors import safe_open

from battery.goldens import Golden, one_each
from formax.core import spec as specs

# Relative to the standard deviation; of a gradient that is almost nothing, to that of an average one.
TOLERANCE = 1e-5
KEY = jax.random.key(0)


def stacks(golden: Golden) -> frozenset[str]:
    """Where the tree has layers, if they are all equal."""
    shapes = specs.abstract(golden.architecture.spec(golden.config))
    places = {specs.dotted(path[: path.index("layers")]) for path in specs.flatten(shapes) if "layers" in path}
    try:
        jax.eval_shape(specs.stack_layers, shapes)
    except ValueError:
        return frozenset()
    return frozenset(places)


def deepest() -> list[Golden]:
    """One golden a family and way to be stacked: heads differ after the layers."""
    found: dict[tuple[str, frozenset[str]], Golden] = {}
    for golden in one_each():
        if where := stacks(golden):
            found.setdefault((golden.family_name, where), golden)
    return list(found.values())


STACKED = pytest.mark.parametrize("golden", [golden for golden in one_each() if stacks(golden)], ids=str)


@STACKED
def test_stacked_layers_compute_the_same(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    stacked = model.stack_layers()
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(model))
    expected, out = (one(**golden.inputs, **golden.switches) for one in (model, stacked))
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    far = [error(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (expected, out)), strict=True)]
    assert max(far) < TOLERANCE, far


@pytest.mark.parametrize("golden", deepest(), ids=str)
def test_gradients_of_stacked_and_rematerialised_layers(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    given = {name: jnp.asarray(x) for name, x in golden.inputs.items()}

    def loss(model: Any, inputs: Any, key: Any) -> jax.Array:
        arrays = jax.tree.leaves(model(**inputs, key=key))
        draws = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(arrays)]
        return sum(map(jnp.vdot, draws, arrays), start=jnp.zeros(()))

    gradient = jax.jit(jax.grad(loss))
    expected = specs.flatten(gradient(model, given, KEY).params)
    least = np.sqrt(np.mean([np.var(leaf) for leaf in expected.values()]))
    for one in (model.stack_layers(), model.replace(remat=True), model.stack_layers().replace(remat=True)):
        found = specs.flatten(gradient(one, given, KEY).unstack_layers().params)
        assert found.keys() == expected.keys()
        far = {path: np.abs(found[path] - x).max() / max(np.std(x), least) for path, x in expected.items()}
        worst = max(far, key=lambda path: far[path])
        print(golden, one.remat, specs.dotted(worst), far[worst])
        assert far[worst] < TOLERANCE, (specs.dotted(worst), far[worst])
