"""Mixtures of experts: a router gives every token to a few of many feed-forward networks (Shazeer et al. 2017).

No expert runs on a token that was not given to it. Tokens are sorted by their expert and multiplied group by group
(`grouped`), so the work grows with the tokens and not with the experts, and no token is dropped. Letters beside those
of the package: X experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from formax.core import tap
from formax.core.layout import TRANSPOSE, Stacked
from formax.core.spec import Initializer, Param, Spec
from formax.layers.activations import activation
from formax.layers.linear import linear, linear_spec

# Rows of one matrix product on a CPU: fewer, and copying the weights is most of the work; more, and padding is.
BLOCK = (8, 64)


def gated_spec(
    size: int, inner: int, experts: int, names: tuple[str, str, str, str], *, init: Initializer
) -> dict[str, Spec]:
    """`router` (size -> experts), and `experts.{gate,up,down}` of all experts, one leaf a matrix [X, in, out].

    `names` are the checkpoint's for the router and the three matrices, these with `{}` for the expert's number.
    """

    def matrices(name: str, d_in: int, d_out: int, axes: tuple[str, str]) -> Spec:
        layout = Stacked(experts, TRANSPOSE)
        return {"kernel": Param((experts, d_in, d_out), ("experts", *axes), f"{name}.weight", init, layout)}

    return {
        "router": linear_spec(names[0], size, experts, ("embed", "experts"), init=init, bias=False),
        "experts": {
            "gate": matrices(names[1], size, inner, ("embed", "mlp")),
            "up": matrices(names[2], size, inner, ("embed", "mlp")),
            "down": matrices(names[3], inner, size, ("mlp", "embed")),
        },
    }


def gated(
    p: dict[str, Any], x: jax.Array, act: str, k: int, *, noise: float = 0.0, key: Any = None, name: str = "mlp"
) -> tuple[jax.Array, jax.Array]:
    """Every token through the k gated networks of its best experts: [B, T, E] -> ([B, T, E], logits [B, T, X]).

    The results are weighed by the softmax of the k best logits. With a key, the input is multiplied by numbers between
    1 - noise and 1 + noise. Taps, under `name`: `router` [B, T, X], `experts` (the chosen ones, best first) [B, T, k],
    `shares` [B, T, k], `out`.
    """
    with tap.scope(name):
        if key is not None and noise > 0:
            x = x * jax.random.uniform(key, x.shape, x.dtype, 1 - noise, 1 + noise)
        logits = tap.tap("router", linear(p["router"], x))
        chosen = tap.tap("experts", jax.lax.top_k(logits, k)[1])
        best = jnp.take_along_axis(logits, chosen, axis=-1).astype(jnp.float32)
        shares = tap.tap("shares", jax.nn.softmax(best, axis=-1).astype(x.dtype))
        y = run_experts(p["experts"], x.reshape(-1, x.shape[-1]), shares.reshape(-1, k), chosen.reshape(-1, k), act)
        return tap.tap("out", y.reshape(x.shape)), logits


def run_experts(p: dict[str, Any], x: jax.Array, shares: jax.Array, chosen: jax.Array, act: str) -> jax.Array:
    """The sum of what the chosen experts [N, k] make of their rows, times their shares [N, k]: [N, E] -> [N, E]."""
    gate, up, down = (p[part]["kernel"].astype(x.dtype) for part in ("gate", "up", "down"))
    k = chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=len(gate))
    rows = x[order // k]
    hidden = activation(act)(grouped(rows, gate, sizes)) * grouped(rows, up, sizes)
    y = grouped(hidden, down, sizes)[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("nk,nke->ne", shares, y)


def load_balancing_loss(logits: Sequence[jax.Array], k: int, mask: jax.Array | None = None) -> jax.Array:
    """How unevenly the experts are used, 1 at best times k (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6).

    Args:
        logits: of every layer's router, [B, T, X]; they count together.
        k: experts a token.
        mask: [B, T], ones where there is a token.
    """
    scores = jnp.stack([*logits]).astype(jnp.float32)
    count = scores.shape[-1]
    weights = jnp.ones(scores.shape[:-1]) if mask is None else jnp.broadcast_to(mask != 0, scores.shape[:-1])
    chosen = jax.nn.one_hot(jax.lax.top_k(scores, k)[1], count).sum(-2)
    used, wanted = (
        jnp.einsum("lbt,lbtx->x", weights.astype(jnp.float32), each) / jnp.maximum(weights.sum(), 1)
        for each in (chosen, jax.nn.softmax(scores, axis=-1))
    )
    return count * jnp.vdot(used, wanted)


# ---- products of groups of rows with a matrix each ------------------------------------------------------------------


def grouped(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows [M, in] in consecutive groups of `sizes` [X], each times its matrix of w [X, in, out]: [M, out].

    The sizes must add up to M. A TPU has an instruction for it. Elsewhere XLA multiplies all rows with all matrices, so
    there blocks of rows are multiplied one after the other, about a quarter more rows than there are.
    """
    return _times(x, w, sizes, False)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _times(x: jax.Array, w: jax.Array, sizes: jax.Array, transposed: bool) -> jax.Array:
    """`grouped`, with w [X, out, in] if `transposed`."""
    numbers = RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), (0,), (0,))

    def blocked(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        size, (first, group, total), _ = _blocks(sizes, len(x))
        padded = jnp.pad(x, ((0, size), (0, 0)))
        product = "mi,oi->mo" if transposed else "mi,io->mo"

        def step(i: jax.Array, out: jax.Array) -> jax.Array:
            # A group's last block runs on into the next group, whose own blocks come later and overwrite that.
            rows = jax.lax.dynamic_slice_in_dim(padded, first[i], size)
            rows = jnp.einsum(product, rows, jax.lax.dynamic_index_in_dim(w, group[i], keepdims=False))
            return jax.lax.dynamic_update_slice_in_dim(out, rows, first[i], 0)

        out = jnp.zeros((len(padded), w.shape[1 if transposed else 2]), jnp.result_type(x, w))
        return jax.lax.fori_loop(0, total, step, out)[: len(x)]

    at_once = partial(jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=numbers)
    return jax.lax.platform_dependent(x, w, sizes, tpu=at_once, default=blocked)


@jax.custom_vjp
def _outer(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    """The sum of the outer products of the rows of every group: [M, in], [M, out] -> [X, in, out]."""
    numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())

    def blocked(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
        size, (first, group, total), ends = _blocks(sizes, len(x))
        x, y = (jnp.pad(each, ((0, size), (0, 0))) for each in (x, y))

        def step(i: jax.Array, out: jax.Array) -> jax.Array:
            a, b = (jax.lax.dynamic_slice_in_dim(each, first[i], size) for each in (x, y))
            own = first[i] + jnp.arange(size) < ends[group[i]]
            old = jax.lax.dynamic_index_in_dim(out, group[i], keepdims=False)
            new = old + jnp.einsum("mi,mo->io", jnp.where(own[:, None], a, 0), b)
            return jax.lax.dynamic_update_index_in_dim(out, new, group[i], 0)

        out = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.result_type(x, y))
        return jax.lax.fori_loop(0, total, step, out)

    at_once = partial(jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=numbers)
    return jax.lax.platform_dependent(x, y, sizes, tpu=at_once, default=blocked)


def _blocks(sizes: jax.Array, rows: int) -> tuple[int, tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Cuts groups into blocks of rows: (size, (first row and group of every block, how many there are), group ends)."""
    low, high = BLOCK
    mean = max(1, rows // (2 * len(sizes)))
    size = min(high, max(low, 1 << (mean.bit_length() - 1)))
    ends, counts = jnp.cumsum(sizes), -(-sizes // size)
    last = jnp.cumsum(counts)
    number = jnp.arange((rows + min(len(sizes), rows) * (size - 1)) // size)  # as many as there can be
    group = jnp.minimum(jnp.searchsorted(last, number, side="right"), len(sizes) - 1)
    first = (ends - sizes)[group] + (number - (last - counts)[group]) * size
    return size, (first, group, last[-1]), ends


def _times_forward(x: Any, w: Any, sizes: Any, transposed: bool) -> Any:
    return _times(x, w, sizes, transposed), (x, w, sizes)


def _times_backward(transposed: bool, saved: Any, dy: jax.Array) -> Any:
    x, w, sizes = saved
    dw = _outer(dy, x, sizes) if transposed else _outer(x, dy, sizes)
    return _times(dy, w, sizes, not transposed), dw, None


def _outer_forward(x: Any, y: Any, sizes: Any) -> Any:
    return _outer(x, y, sizes), (x, y, sizes)


def _outer_backward(saved: Any, dw: jax.Array) -> Any:
    x, y, sizes = saved
    return _times(y, dw, sizes, True), _times(x, dw, sizes, False), None


_times.defvjp(_times_forward, _times_backward)
_outer.defvjp(_outer_forward, _outer_backward)
