"""What can be seen of a forward pass without computing it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from battery.goldens import Golden
from formax.core import spec as specs


def traced(golden: Golden, config: Any, dtype: Any) -> tuple[Any, Any]:
    """The forward pass with the golden's inputs and a configuration: (jaxpr, output shapes)."""
    inputs = {name: jnp.asarray(array) for name, array in golden.inputs.items() if name != "head_mask"}
    if "encoder_hidden_states" in inputs:
        inputs["encoder_hidden_states"] = jnp.zeros(
            (*inputs["encoder_hidden_states"].shape[:2], config.hidden_size), dtype
        )
    params = specs.abstract(golden.architecture.spec(config), dtype)
    return jax.make_jaxpr(lambda p: golden.architecture.apply(p, config, **inputs), return_shape=True)(params)


def unused(golden: Golden) -> set[str]:
    """Parameters, by their keys in the tree, that no output of the golden's call depends on."""
    closed, _ = traced(golden, golden.config, jnp.float32)
    jaxpr = closed.jaxpr
    live = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if live.intersection(eqn.outvars):
            live.update(var for var in eqn.invars if not isinstance(var, Literal))
    # the leaves of a tree are in the order of its keys, which is not that of the table
    keys = specs.build(golden.architecture.spec(golden.config), lambda entry: entry.key)
    return {key for key, var in zip(jax.tree.leaves(keys), jaxpr.invars, strict=True) if var not in live}
