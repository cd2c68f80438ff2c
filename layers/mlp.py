"""Position-wise feed-forward networks."""

from __future__ import annotations

from typing import Any

import jax

from formax.core import tap
from formax.core.spec import Initializer, Spec
from formax.layers.activations import activation
from formax.layers.linear import linear, linear_spec


def dense_spec(
    size: int, inner: int, names: tuple[str, str], *, init: Initializer, bias: bool = True
) -> dict[str, Spec]:
    """`up` (size -> inner) and `down` (inner -> size), stored under the two `names`."""
    return {
        "up": linear_spec(names[0], size, inner, ("embed", "mlp"), init=init, bias=bias),
        "down": linear_spec(names[1], inner, size, ("mlp", "embed"), init=init, bias=bias),
    }


def dense(p: dict[str, Any], x: jax.Array, act: str, *, name: str = "mlp") -> jax.Array:
    """down(act(up(x))), [B, T, E] -> [B, T, E]. Taps: `mlp.hidden` [B, T, inner] and `mlp.out`."""
    with tap.scope(name):
        hidden = tap.tap("hidden", activation(act)(linear(p["up"], x)))
        return tap.tap("out", linear(p["down"], hidden))
