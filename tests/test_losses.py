"""Losses beyond those of the goldens, which the battery holds against the reference's."""

import jax.numpy as jnp
import pytest

from formax.training import losses


def test_nothing_to_count_is_no_loss() -> None:
    assert losses.cross_entropy(jnp.ones((2, 3)), jnp.array([-100, -100])) == 0


def test_unknown_problem_type() -> None:
    with pytest.raises(ValueError, match="'ranking' is none of regression"):
        losses.sequence_classification(jnp.ones((2, 3)), jnp.array([0, 1]), "ranking")
