"""Attention in tiles of queries by keys, in XLA operations: memory grows with the length and not with its square.

A softmax over tiles (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682; Dao et al.
2022, arXiv:2205.14135): of what was seen so far only the largest score, the sum of the exponentials and the weighted
values are kept, and the backward pass makes the scores once more. Tiles that the mask rules out are not computed. On a
CPU a tile is as large as a core's cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from formax.layers.attention.bias import ALiBi, Bucketed, by_distance, by_pairs
from formax.layers.attention.kernel import (
    NOTHING,
    Tiles,
    all_of,
    filled,
    ids_of,
    in_sight,
    key_blocks,
    meet,
    numbers_of,
    query_blocks,
    spans,
    tiles_of,
)
from formax.layers.attention.problem import Problem, target

ROWS, KEYS, STREAMS = 512, 512, 2  # of a tile: queries (of all heads that share keys), keys, heads at once
# Tables of scores, in bytes, up to which they are better made at once (benchmarks/attention.py).
SMALL, SMALL_ON_CPU = 2**28, 2**19


def supports(p: Problem) -> str | None:
    """Everything."""
    return None


def suits(p: Problem) -> str | None:
    """Worth it where the table of scores is large, and the queries are not one or two."""
    limit = SMALL_ON_CPU if target().platform == "cpu" else SMALL
    if p.table_bytes <= limit:
        return f"a table of scores of {p.table_bytes / 2**20:.3g} MiB is made at once up to {limit / 2**20:.3g} MiB"
    if p.q.shape[1] < 8:
        return f"{p.q.shape[1]} queries are no block"
    return None


@dataclass(frozen=True, kw_only=True)
class Form(Tiles):
    """What is known of the tiles when the program is made.

    C chunks, each of N `streams` (heads of keys) of one row of the batch; in a tile R = G * `rows` queries (those of
    the G heads that share keys, head by head) and `keys` keys.
    """

    groups: int
    streams: int
    per_row: int  # chunks of a row of the batch
    dropout: float


def attention(p: Problem) -> jax.Array:
    """See `formax.layers.attention.attention`."""
    b, t, s, h, heads = p.sizes
    groups = h // heads
    streams = max(n for n in range(1, heads + 1) if heads % n == 0 and n * groups <= max(STREAMS, groups))
    rows, keys = even(t, max(8, ROWS // groups)), even(s, KEYS)
    tiles = tiles_of(p, rows, keys)
    form = Form(**tiles, groups=groups, streams=streams, per_row=heads // streams, dropout=p.dropout)
    blocks, (tp, sp) = form.blocks, form.padded

    def by_stream(x: jax.Array, length: int) -> jax.Array:
        """[B, S, K, D] -> [C, N, S', D]."""
        x = jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))
        return x.reshape(-1, streams, length, x.shape[-1])

    q = by_stream(p.q, tp).reshape(b * form.per_row, streams, groups, blocks[0], rows, -1)
    given: dict[str, Any] = {
        "q": jnp.moveaxis(q, 3, 1).reshape(len(q), blocks[0], streams, groups * rows, -1),
        "k": by_stream(p.k, sp),
        "v": by_stream(p.v, sp),
        "bias": _bias(p, form),
        "sinks": None if p.sinks is None else p.sinks.astype(jnp.float32).reshape(-1, streams, groups),
    }
    out = _attend(form, given, _facts(p, form))  # [C, blocks, N, G * rows, Dv]
    out = jnp.moveaxis(out.reshape(b, form.per_row, blocks[0], streams, groups, rows, -1), 2, 4)
    return jnp.moveaxis(out.reshape(b, h, tp, -1), 1, 2)[:, :t]


def even(length: int, most: int) -> int:
    """The size of blocks of at most about `most` that cover the length evenly."""
    count = -(-length // most)
    return -(-length // (8 * count)) * 8 if count > 1 else length


def _bias(p: Problem, form: Form) -> dict[str, jax.Array] | None:
    """The terms by distance [B or 1, H, tp + sp - 1], or by pairs (axes of one number stay so)."""
    if p.bias is None:
        return None
    (tp, sp), offset = form.padded, p.mask.q_offset
    if isinstance(p.bias, ALiBi | Bucketed):
        return {"distance": by_distance(p.bias, tp, sp, offset).astype(jnp.float32)}
    return {"pairs": filled(by_pairs(p.bias, form.t, form.s), form.padded)}


def _facts(p: Problem, form: Form) -> dict[str, Any]:
    """What the mask says, by row of the batch; whatever is None is not asked about in any tile."""
    ids: Any = ids_of(p, form)
    if ids:
        ids |= spans(form, ids)
        ids |= {
            name: ids[name].reshape(len(ids[name]), -1, n) for name, n in (("q_ids", form.rows), ("k_ids", form.keys))
        }
    dense = None if p.mask.dense is None else filled(p.mask.dense, form.padded)
    return {"numbers": numbers_of(p)[:, :3], "dense": dense, "key": p.key, "ids": ids or None}


# --- one tile


def _tile(form: Form, given: Any, facts: Any, c: Any, i: Any, j: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Scores of a tile [N, R, keys]: (all terms added, before the bias, which pairs are seen or None for all)."""
    q, k = given["q"][c, i], _keys(form, given["k"][c], j)
    scores = jnp.einsum("nrd,nsd->nrs", q, k, preferred_element_type=jnp.float32) * form.scale
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    capped = scores
    if given["bias"] is not None:
        grouped = scores.reshape(len(scores), form.groups, form.rows, form.keys)
        scores = (grouped + _bias_tile(form, given, c, i, j)).reshape(scores.shape)
    seen = _seen(form, facts, c, i, j)
    return scores, capped, None if seen is None else _by_rows(form, seen, scores.shape)


def _by_rows(form: Form, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[N or 1, G or 1, rows or 1, keys or 1] -> what broadcasts to the tile's [N, R, keys]."""
    if x.shape[1] == 1 and x.shape[2] == 1:
        return x[:, 0]
    x = jnp.broadcast_to(x, (x.shape[0], form.groups, form.rows, x.shape[3]))
    return x.reshape(x.shape[0], form.groups * form.rows, x.shape[3])


def _keys(form: Form, x: jax.Array, j: Any) -> jax.Array:
    """Block j of keys or values [N, S', D]."""
    return jax.lax.dynamic_slice_in_dim(x, j * form.keys, form.keys, axis=1)


def _part(form: Form, x: jax.Array, c: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Where the rows and heads of chunk c begin in something [B or 1, H or 1, ...], and how many they are."""
    row = c // form.per_row if x.shape[0] > 1 else 0
    head = (c % form.per_row) * (form.streams * form.groups) if x.shape[1] > 1 else 0
    return (row, head), (1, form.streams * form.groups if x.shape[1] > 1 else 1)


def _pairs_place(form: Form, x: jax.Array, c: Any, i: Any, j: Any) -> Any:
    """Where a tile is in something [B or 1, H or 1, T' or 1, S' or 1]: (start, size)."""
    start, size = _part(form, x, c)
    return (
        (*start, i * form.rows if x.shape[2] > 1 else 0, j * form.keys if x.shape[3] > 1 else 0),
        (*size, form.rows if x.shape[2] > 1 else 1, form.keys if x.shape[3] > 1 else 1),
    )


def _pairs_tile(form: Form, x: jax.Array, c: Any, i: Any, j: Any) -> jax.Array:
    """A tile of it: [N or 1, G or 1, rows or 1, keys or 1]."""
    tile = jax.lax.dynamic_slice(x, *_pairs_place(form, x, c, i, j))[0]
    return tile.reshape(-1, form.groups if x.shape[1] > 1 else 1, *tile.shape[1:])


def _distance_place(form: Form, x: jax.Array, c: Any, i: Any, j: Any) -> Any:
    """Where a tile's distances are in those of all pairs, [B or 1, H, tp + sp - 1]: (start, size)."""
    start, size = _part(form, x, c)
    first = (form.blocks[0] - 1 - i) * form.rows + j * form.keys
    return (*start, first), (*size, form.rows + form.keys - 1)


def _bias_tile(form: Form, given: Any, c: Any, i: Any, j: Any) -> jax.Array:
    """[N or 1, G or 1, rows or 1, keys or 1]."""
    bias = given["bias"]
    if "pairs" in bias:
        return _pairs_tile(form, bias["pairs"], c, i, j).astype(jnp.float32)
    x = bias["distance"]
    x = jax.lax.dynamic_slice(x, *_distance_place(form, x, c, i, j))[0]
    return spread(x, form.rows, form.keys).reshape(form.streams, form.groups, form.rows, form.keys)


def spread(x: jax.Array, rows: int, keys: int) -> jax.Array:
    """Numbers by distance -> by pair: [..., rows + keys - 1] -> [..., rows, keys], (i, j) from j - i + rows - 1.

    No gather: the numbers one after the other, `rows` times, are rows that are shifted when cut one too short.
    """
    width = rows + keys
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    flat = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], rows, width)).reshape(*x.shape[:-1], rows * width)
    flat = flat[..., rows - 1 : rows - 1 + rows * (width - 1)]
    return flat.reshape(*x.shape[:-1], rows, width - 1)[..., :keys]


def gather_up(x: jax.Array) -> jax.Array:
    """Sums by distance, the transpose of `spread`: [..., rows, keys] -> [..., rows + keys - 1]."""
    *outer, rows, keys = x.shape
    width, ends = rows + keys, [(0, 0)] * len(outer)
    flat = jnp.pad(x, [*ends, (0, 0), (0, width - 1 - keys)]).reshape(*outer, rows * (width - 1))
    flat = jnp.pad(flat, [*ends, (rows - 1, 1)])
    return flat.reshape(*outer, rows, width).sum(-2)[..., :-1]


def _seen(form: Form, facts: Any, c: Any, i: Any, j: Any) -> jax.Array | None:
    """Which pairs of a tile are seen, [N or 1, G or 1, rows or 1, keys or 1]."""
    b = c // form.per_row
    offset, end, prefix = facts["numbers"][b]
    q = (offset + i * form.rows + jnp.arange(form.rows))[:, None]
    k = j * form.keys + jnp.arange(form.keys)[None]
    parts = in_sight(form, q, k, end, prefix)
    if facts["ids"] is not None:
        parts.append(facts["ids"]["q_ids"][b, i][:, None] == facts["ids"]["k_ids"][b, j][None])
    parts = [part[None, None] for part in parts]
    if facts["dense"] is not None:
        parts.append(_pairs_tile(form, facts["dense"], c, i, j))
    return all_of(parts)


# --- which tiles there are


def _key_blocks(form: Form, facts: Any, c: Any, i: Any) -> tuple[Any, Any]:
    """First and last but one block of keys that block i of queries sees anything of."""
    first, *_, last = key_blocks(form, i, *facts["numbers"][c // form.per_row])
    return first, last


def _query_blocks(form: Form, facts: Any, c: Any, j: Any) -> tuple[Any, Any]:
    """First and last but one block of queries that see anything of block j of keys."""
    return query_blocks(form, j, *facts["numbers"][c // form.per_row])


def _unless_apart(form: Form, facts: Any, c: Any, i: Any, j: Any, run: Any, carry: Any) -> Any:
    """`run(carry)`, or `carry` where the segments of the tile's queries and keys do not even overlap."""
    if facts["ids"] is None:
        return run(carry)
    ids, b = facts["ids"], c // form.per_row
    return jax.lax.cond(meet(ids["q_span"][b, i], ids["k_span"][b, j]), run, lambda carry: carry, carry)


def _kept(form: Form, facts: Any, c: Any, i: Any, j: Any, shape: tuple[int, ...]) -> jax.Array:
    """Factors on the weights of a tile: 0 for those dropped, 1 / (1 - rate) for the others."""
    tile = (c * form.blocks[0] + i) * form.blocks[1] + j
    kept = jax.random.bernoulli(jax.random.fold_in(facts["key"], tile), 1.0 - form.dropout, shape)
    return kept * (1.0 / (1.0 - form.dropout) if form.dropout < 1 else 0.0)


# --- all tiles


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: Form, given: Any, facts: Any) -> jax.Array:
    return _forward(form, given, facts)[0]


def _forward(form: Form, given: Any, facts: Any) -> tuple[jax.Array, jax.Array]:
    """The sums [C, blocks, N, R, Dv], and the logarithms of their denominators [C, blocks, N, R]."""
    chunks, blocks, streams, r, _ = given["q"].shape
    dtype, width = given["v"].dtype, given["v"].shape[-1]

    def row(c: Any, i: Any) -> tuple[jax.Array, jax.Array]:
        def tile(j: Any, carry: Any) -> Any:
            def run(carry: Any) -> Any:
                out, most, total = carry
                scores, _, seen = _tile(form, given, facts, c, i, j)
                if seen is not None:
                    scores = jnp.where(seen, scores, NOTHING)
                new = jnp.maximum(most, scores.max(-1))
                weights = jnp.exp(scores - new[..., None])
                if seen is not None:
                    weights = jnp.where(seen, weights, 0)
                fade = jnp.exp(most - new)
                total = fade * total + weights.sum(-1)
                if form.dropout:
                    weights = weights * _kept(form, facts, c, i, j, weights.shape)
                values = _keys(form, given["v"][c], j)
                more = jnp.einsum("nrs,nsd->nrd", weights.astype(dtype), values, preferred_element_type=jnp.float32)
                return fade[..., None] * out + more, new, total

            return _unless_apart(form, facts, c, i, j, run, carry)

        if given["sinks"] is None:
            most, total = jnp.full((streams, r), NOTHING, jnp.float32), jnp.zeros((streams, r), jnp.float32)
        else:  # a key that has a score and no value
            most, total = _sink_rows(form, given, c), jnp.ones((streams, r), jnp.float32)
        zero = jnp.zeros((streams, r, width), jnp.float32)
        out, most, total = jax.lax.fori_loop(*_key_blocks(form, facts, c, i), tile, (zero, most, total))
        some = total > 0
        total = jnp.where(some, total, 1)
        return (out / total[..., None]).astype(dtype), jnp.where(some, most + jnp.log(total), 0)

    return jax.lax.map(lambda c: jax.lax.map(lambda i: row(c, i), jnp.arange(blocks)), jnp.arange(chunks))


def _sink_rows(form: Form, given: Any, c: Any) -> jax.Array:
    """The sinks' scores for the rows of a tile: [N, R]."""
    return jnp.repeat(given["sinks"][c % form.per_row], form.rows, axis=-1)


def _remember(form: Form, given: Any, facts: Any) -> Any:
    told = jax.tree.map(lambda x: x.perturbed, given, is_leaf=lambda x: hasattr(x, "perturbed"))
    given, facts = (
        jax.tree.map(lambda x: x.value, each, is_leaf=lambda x: hasattr(x, "perturbed")) for each in (given, facts)
    )
    out, logs = _forward(form, given, facts)
    # An empty tuple says yes, and None no: what is kept between the passes are arrays.
    wanted = () if any(jax.tree.leaves(told["bias"])) else None
    return out, (given, facts, out, logs, wanted)


def _backward(form: Form, kept: Any, slope: Any) -> Any:
    given, facts, out, logs, wanted = kept
    if isinstance(slope, SymbolicZero):
        return None, None
    chunks, blocks, streams, _, _ = given["q"].shape
    q, k, v, dtype = given["q"], given["k"], given["v"], given["q"].dtype
    own = (slope.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [C, blocks, N, R]
    bias = None if wanted is None else jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), given["bias"])
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def chunk(bias: Any, c: Any) -> Any:
        def column(carry: Any, j: Any) -> Any:
            keys, values = _keys(form, k[c], j), _keys(form, v[c], j)

            def tile(i: Any, carry: Any) -> Any:
                def run(carry: Any) -> Any:
                    dq, dk, dv, bias = carry
                    scores, capped, seen = _tile(form, given, facts, c, i, j)
                    weights = jnp.exp(scores - logs[c, i][..., None])
                    if seen is not None:
                        weights = jnp.where(seen, weights, 0)
                    dw = dot("nrd,nsd->nrs", slope[c, i], values)
                    used = weights
                    if form.dropout:
                        factors = _kept(form, facts, c, i, j, weights.shape)
                        used, dw = weights * factors, dw * factors
                    dv = dv + dot("nrs,nrd->nsd", used.astype(dtype), slope[c, i])
                    ds = weights * (dw - own[c, i][..., None])
                    if bias is not None:
                        bias = _add_bias(form, bias, ds, c, i, j)
                    if form.softcap is not None:
                        ds = ds * (1 - (capped / form.softcap) ** 2)
                    ds = (ds * form.scale).astype(dtype)
                    dq = dq.at[i].add(dot("nrs,nsd->nrd", ds, keys))
                    return dq, dk + dot("nrs,nrd->nsd", ds, q[c, i]), dv, bias

                return _unless_apart(form, facts, c, i, j, run, carry)

            dq, bias = carry
            zeros = (jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
            dq, dk, dv, bias = jax.lax.fori_loop(*_query_blocks(form, facts, c, j), tile, (dq, *zeros, bias))
            return (dq, bias), (dk.astype(dtype), dv.astype(dtype))

        start = jnp.zeros(q.shape[1:], jnp.float32), bias
        (dq, bias), (dk, dv) = jax.lax.scan(column, start, jnp.arange(form.blocks[1]))
        dk, dv = (jnp.moveaxis(x, 0, 1).reshape(streams, -1, x.shape[-1]) for x in (dk, dv))
        return bias, (dq.astype(dtype), dk, dv)

    bias, (dq, dk, dv) = jax.lax.scan(chunk, bias, jnp.arange(chunks))
    sinks = None
    if given["sinks"] is not None:
        rows = jax.vmap(lambda c: _sink_rows(form, given, c))(jnp.arange(chunks))  # [C, N, R]
        lost = -jnp.exp(rows[:, None] - logs) * own  # a sink has no value, so that all its slope is the sum's
        lost = lost.reshape(-1, form.per_row, blocks, streams, form.groups, form.rows)
        sinks = _true_rows(form, lost).sum((0, 2, 5))
    if bias is not None:
        bias = jax.tree.map(lambda new, old: new.astype(old.dtype), bias, given["bias"])
    return {"q": dq, "k": dk, "v": dv, "bias": bias, "sinks": sinks}, None


def _true_rows(form: Form, x: jax.Array) -> jax.Array:
    """Zero for the queries that only fill up the last block: [B, ..., blocks, N, G, rows]."""
    at = jnp.arange(form.blocks[0])[:, None, None, None] * form.rows + jnp.arange(form.rows)
    return jnp.where(at < form.t, x, 0)


def _add_bias(form: Form, bias: Any, ds: jax.Array, c: Any, i: Any, j: Any) -> Any:
    """The slopes of a tile [N, R, keys], added to those of the terms."""
    ds = ds.reshape(form.streams, form.groups, form.rows, form.keys)
    if "distance" in bias:
        x = bias["distance"]
        start, size = _distance_place(form, x, c, i, j)
        more = gather_up(ds).reshape(size)
    else:
        x = bias["pairs"]
        start, size = _pairs_place(form, x, c, i, j)
        ds = ds.reshape(1, -1, form.rows, form.keys)
        more = ds.sum([a for a in range(4) if size[a] == 1 and ds.shape[a] > 1], keepdims=True)
    old = jax.lax.dynamic_slice(x, start, size)
    return dict.fromkeys(bias, jax.lax.dynamic_update_slice(x, old + more, start))


_attend.defvjp(_remember, _backward, symbolic_zeros=True)
