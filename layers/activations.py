"""Activation functions under the names that `hidden_act` uses."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def _gelu_accurate(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_10": lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10),
    "gelu_accurate": _gelu_accurate,
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_python": partial(jax.nn.gelu, approximate=False),
    "gelu_python_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "laplace": lambda x: 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def check_activation(name: str, field: str = "hidden_act") -> None:
    """Raises ValueError when a configuration's `field` names no activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{field}={name!r} is none of {', '.join(ACTIVATIONS)}")


def activation(name: str) -> Activation:
    """The function of that name.

    Raises:
        ValueError: an unknown name, with the nearest ones.
    """
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, n=3) or sorted(ACTIVATIONS)
        raise ValueError(f"unknown activation {name!r}; try {', '.join(near)}")
    return ACTIVATIONS[name]
