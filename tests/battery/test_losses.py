"""Losses are the reference's, on the goldens that record one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from battery.goldens import Golden, goldens
from formax.training import losses, objective


@pytest.mark.parametrize("golden", [one for one in goldens() if "out.loss" in one.arrays], ids=str)
def test_losses_are_the_references(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    batch = {name: jnp.asarray(array) for name, array in (golden.given | golden.switches).items()}
    # The call is the one of the output's test, which is compiled already; `test_train_step.py` has both in one.
    out = model(**golden.inputs, **golden.switches)
    loss = jax.jit(lambda out, batch: objective.loss_of(model, out, batch))(out, batch)
    np.testing.assert_allclose(loss, golden.arrays["out.loss"], rtol=1e-5)


def test_nothing_to_count_is_no_loss() -> None:
    assert losses.cross_entropy(jnp.ones((2, 3)), jnp.array([-100, -100])) == 0


def test_unknown_problem_type() -> None:
    with pytest.raises(ValueError, match="'ranking' is none of regression"):
        losses.sequence_classification(jnp.ones((2, 3)), jnp.array([0, 1]), "ranking")
