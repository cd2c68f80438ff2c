"""Affine maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from formax.core.layout import SAME, TRANSPOSE, Layout, Part
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
) -> At:
    """`kernel` (d_in, d_out) and `bias` (d_out,), stored as PyTorch's `name.weight` (d_out, d_in) and `name.bias`."""
    spec: dict[str, Spec] = {"kernel": Param((d_in, d_out), axes, "weight", init, layout)}
    if bias:
        spec["bias"] = Param((d_out,), axes[1:], "bias", zeros)
    return At(name, spec)


def fused_spec(
    name: str,
    d_in: int,
    parts: Mapping[str, tuple[int, str]],
    *,
    init: Initializer,
    bias: bool = True,
    layout: Layout = TRANSPOSE,
    groups: int = 1,
) -> dict[str, Spec]:
    """Several affine maps of one input whose kernels a checkpoint keeps as one, such as q, k and v.

    Args:
        name: of the fused tensor.
        d_in: width of the input.
        parts: {key in the tree: (width of the output, its logical axis)}, in the order of the file.
        init: initialiser of the kernels.
        bias: whether there are biases.
        layout: `TRANSPOSE` for a tensor (d_out, d_in), `SAME` for (d_in, d_out).
        groups: the parts are interleaved in so many runs (see `Part`).
    """
    sizes = tuple(size for size, _ in parts.values())
    spec: dict[str, Spec] = {}
    for i, (key, (size, axis)) in enumerate(parts.items()):
        kernel = Part(i, sizes, 0 if layout == TRANSPOSE else 1, groups, layout)
        leaves: dict[str, Spec] = {"kernel": Param((d_in, size), ("embed", axis), "weight", init, kernel)}
        if bias:
            leaves["bias"] = Param((size,), (axis,), "bias", zeros, Part(i, sizes, 0, groups, SAME))
        spec[key] = At(name, leaves)
    return spec


def linear(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """[..., d_in] -> [..., d_out]."""
    # Not an einsum, which is a function of its own to trace, at each of a model's hundred places.
    y = jax.lax.dot_general(x, p["kernel"].astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
    return y + p["bias"].astype(x.dtype) if "bias" in p else y
