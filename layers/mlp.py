"""Position-wise feed-forward networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax

from formax.core import tap
from formax.core.layout import TRANSPOSE, Layout
from formax.core.spec import At, Initializer, Spec
from formax.layers.activations import activation
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec


def dense_spec(
    size: int,
    inner: int,
    names: tuple[str, str],
    *,
    init: Initializer,
    out_init: Initializer | None = None,
    bias: bool = True,
    layout: Layout = TRANSPOSE,
) -> dict[str, Spec]:
    """`up` (size -> inner) and `down` (inner -> size, drawn by `out_init` if given), stored under the two `names`."""
    shared: dict[str, Any] = {"bias": bias, "layout": layout}
    return {
        "up": linear_spec(names[0], size, inner, ("embed", "mlp"), init=init, **shared),
        "down": linear_spec(names[1], inner, size, ("mlp", "embed"), init=out_init or init, **shared),
    }


def gated_spec(
    size: int,
    inner: int,
    names: tuple[str, str, str],
    *,
    init: Initializer,
    out_init: Initializer | None = None,
    bias: bool = False,
) -> dict[str, Spec]:
    """`gate` beside the `up` and `down` of `dense_spec`, stored under the three `names`."""
    gate = linear_spec(names[0], size, inner, ("embed", "mlp"), init=init, bias=bias)
    return {"gate": gate, **dense_spec(size, inner, names[1:], init=init, out_init=out_init, bias=bias)}


def gated(
    p: dict[str, Any], x: jax.Array, act: str, *, rate: float = 0.0, key: jax.Array | None = None, name: str = "mlp"
) -> jax.Array:
    """down(act(gate(x)) * up(x)), [B, T, E] -> [B, T, E] (Shazeer 2020, arXiv:2002.05202); otherwise as `dense`."""
    with tap.scope(name):
        hidden = tap.tap("hidden", activation(act)(linear(p["gate"], x)) * linear(p["up"], x))
        hidden = dropout(hidden, rate, key)
        return tap.tap("out", linear(p["down"], hidden))


def dense(
    p: dict[str, Any], x: jax.Array, act: str, *, rate: float = 0.0, key: jax.Array | None = None, name: str = "mlp"
) -> jax.Array:
    """down(act(up(x))), [B, T, E] -> [B, T, E], with dropout at `rate` inside under a key.

    Taps: `mlp.hidden` [B, T, inner] and `mlp.out`.
    """
    with tap.scope(name):
        hidden = dropout(tap.tap("hidden", activation(act)(linear(p["up"], x))), rate, key)
        return tap.tap("out", linear(p["down"], hidden))


def perceptron_spec(name: str, widths: Sequence[int], *, init: Initializer) -> Spec:
    """Linear maps one after the other, from `widths[0]` to `widths[-1]`, stored as `name.layers.0`, ..."""
    pairs = enumerate(pairwise(widths))
    return At(name, tuple(linear_spec(f"layers.{i}", d_in, d, ("embed", None), init=init) for i, (d_in, d) in pairs))


def perceptron(p: Sequence[Any], x: jax.Array) -> jax.Array:
    """The maps of `perceptron_spec` with a ReLU after each but the last: [..., widths[0]] -> [..., widths[-1]]."""
    *inner, last = p
    for layer in inner:
        x = jax.nn.relu(linear(layer, x))
    return linear(last, x)
