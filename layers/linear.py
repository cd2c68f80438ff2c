"""Affine maps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from formax.core.layout import TRANSPOSE, Layout
from formax.core.spec import At, Initializer, Param, Spec, zeros


def linear_spec(
    name: str,
    d_in: int,
    d_out: int,
    axes: tuple[str | None, str | None],
    *,
    init: Initializer,
    bias: bool = True,
    layout: Layout = TRANSPOSE,
) -> Spec:
    """`kernel` (d_in, d_out) and `bias` (d_out,), stored as PyTorch's `name.weight` (d_out, d_in) and `name.bias`."""
    spec: dict[str, Spec] = {"kernel": Param((d_in, d_out), axes, "weight", init, layout)}
    if bias:
        spec["bias"] = Param((d_out,), axes[1:], "bias", zeros)
    return At(name, spec)


def linear(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """[..., d_in] -> [..., d_out]."""
    y = jnp.einsum("...i,io->...o", x, p["kernel"].astype(x.dtype))
    return y + p["bias"].astype(x.dtype) if "bias" in p else y
