"""What can be seen of a forward pass without computing it."""

import re
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from battery.goldens import Golden, goldens
from formax.core import spec as specs
from formax.model import HEAD_MASKS

# Inputs that are states of a model, as wide as the model is.
STATES = {"encoder_hidden_states", "encoder_outputs", "inputs_embeds", "decoder_inputs_embeds"}


def traced(golden: Golden, config: Any, dtype: Any, key: jax.Array | None = None) -> tuple[Any, Any]:
    """The forward pass with the golden's inputs and a configuration: (jaxpr, output shapes)."""
    inputs = {name: jnp.asarray(array) for name, array in golden.inputs.items() if name not in HEAD_MASKS}
    inputs = {name: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in inputs.items()}
    for name in STATES & inputs.keys():
        # vectors of words may be narrower than states
        width = getattr(config, "word_size" if name == "inputs_embeds" else "hidden_size", config.hidden_size)
        inputs[name] = jnp.zeros((*inputs[name].shape[:-1], width), dtype)
    given: dict[str, Any] = inputs if key is None else {**inputs, "key": key}
    params = specs.abstract(golden.architecture.spec(config), dtype)
    switches = golden.switches
    apply = golden.architecture.apply
    taken = {name: value for name, value in switches.items() if not name.startswith("output_")}
    return jax.make_jaxpr(lambda p: apply(p, config, **given, **taken), return_shape=True)(params)


def unread(golden: Golden, key: jax.Array | None) -> set[str]:
    """Parameters, by their keys, that no output of the golden's call depends on (with a key: in training)."""
    closed, _ = traced(golden, golden.config, jnp.float32, key)
    jaxpr = closed.jaxpr
    live = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if live.intersection(eqn.outvars):
            live.update(var for var in eqn.invars if not isinstance(var, Literal))
    # the leaves of a tree are in the order of its keys, which is not that of the table
    keys = specs.build(golden.architecture.spec(golden.config), lambda entry: entry.key)
    return {key for key, var in zip(jax.tree.leaves(keys), jaxpr.invars, strict=True) if var not in live}


def never_read(architecture: str, shown: Container[str] = ()) -> set[str]:
    """Parameters, by their keys, that no call of an architecture's goldens reads, nor training; `shown` are read."""
    read: set[str] = set()
    declared: set[str] = set()
    for golden in goldens():
        if golden.architecture.name == architecture:
            excused = getattr(golden.hooks, "DEAD", {}).get(architecture)
            entries = specs.table(golden.architecture.spec(golden.config)).entries
            weights = {entry.key for entry in entries if entry.param.stored_as is None}
            declared |= {key for key in weights if key not in shown and not (excused and re.search(excused, key))}
            for key in (None, jax.random.key(0)):
                if weights & declared - read:  # else nothing is left to be seen
                    read |= weights - unread(golden, key)
    return declared - read
