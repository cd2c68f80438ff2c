"""A few queries against a long cache on a TPU, or against one in pages: keys and values are read once, where they are.

A step is a block of keys of one row of the batch, of all heads at once: its scores are a product of all heads' queries
with all heads' keys, of which those between different heads are not seen. That is no more work for the matrix unit,
which takes in every key once in any case, and little for the vector unit as long as rows are few. The list of steps is
made beforehand, and as long as what rows and their masks let see: of a buffer that is filled in part, or of pages that
a table names, nothing else is fetched.

Nothing is copied before, as a cache in another order of axes would be, whole, for every token. How an array of more
than two axes lies in a TPU's memory depends on its sizes (what XLA does with a program's arguments, which its compiler
tells), and each kind is looked at as it lies:

- channels a multiple of 128, heads 1, 2, 4 or a multiple of 8: as in the shape, positions by heads by channels;
- other numbers of heads: heads by positions by channels;
- other numbers of channels: heads by channels by positions, so that nothing is filled up to 128.

Pages of less than 128 positions with such channels lie with the axis of the pages innermost, which no kernel can read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from formax.layers.attention.bias import ALiBi, Bucketed
from formax.layers.attention.decode import as_xla_slopes, few_keys, fold_heads, odd_pages, unfold_heads
from formax.layers.attention.kernel import NOTHING, Facts, Plan, meet, needed, operands, plan_of, scores, spans
from formax.layers.attention.pallas_tpu import LANES, dot, spread, undivided, whole
from formax.layers.attention.problem import Problem, target

ROWS = 128  # queries of all heads, at most
# Of a tile, in bytes of keys or values, and in scores; twice as many still fit the 16 MiB that older chips have, with
# what is fetched meanwhile.
BYTES, SCORES = 2**20, 2**18
PAGES = 8  # read in one step, each by a copy of its own
NUMBERS = 2**17  # of steps and pages, in the memory for scalars
AXES = {"positions": 0, "heads": 1, "channels": 2}  # that of the positions in a row's `view`
SCALARS = ("numbers", "q_span", "k_span", "edges", "table")


def supports(p: Problem) -> str | None:
    """Few queries, without arrays of pairs."""
    b, t, s, h, heads = p.sizes
    widths = p.q.shape[3], p.v.shape[3]
    if p.q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{p.q.dtype} is none of float32, bfloat16"
    if p.dropout:
        return "drops no weights"
    if t * h > ROWS:
        return f"{t} queries of {h} heads are more than {ROWS} rows"
    if p.mask.dense is not None or not (p.bias is None or isinstance(p.bias, ALiBi | Bucketed)):
        return "adds up no bias but ALiBi's and buckets', and reads no dense mask"
    if s < LANES:
        return f"{s} keys are less than a block of {LANES}"
    first = orders(p)
    if first != tuple(order(x) for x in (p.k, p.v)):
        return f"keys of {widths[0]} channels and values of {widths[1]} lie in different orders"
    if p.table is None:
        least = unit(p)
    else:
        least = p.k.shape[1]
        if least < LANES and "channels" in first:
            return f"pages of {least} positions lie apart where channels are no multiple of {LANES}"
    if max(least * heads * max(widths) * p.q.dtype.itemsize / BYTES, least * heads * whole(t * h, 16) / SCORES) > 2:
        return f"{least} keys of {heads} heads of {max(widths)} channels do not fit"
    count = 4 * b * pl.cdiv(s, math.prod(tile_of(p))) + (0 if p.table is None else p.table.size)
    if count > NUMBERS:
        return f"a list of {count} numbers, of steps and pages, does not fit the memory for scalars"
    return odd_pages(p)


def suits(p: Problem) -> str | None:
    """Worth it when there is much to read, where it is known over which devices a program is split."""
    return few_keys(p) or undivided()


def order(x: jax.Array) -> str:
    """In which order an array [.., positions, heads, channels] lies: named by what comes first."""
    heads, channels = x.shape[2:]
    if channels % LANES:
        return "channels"
    return "positions" if heads in (1, 2, 4) or heads % 8 == 0 else "heads"


def orders(p: Problem) -> tuple[str, str]:
    """In which keys and values are read: as they lie, unless columns of scores would be others than rows of values."""
    first = order(p.k), order(p.v)
    if p.k.shape[2] > 1 and "positions" in first and first[0] != first[1]:
        return "heads", "heads"  # copied, where what `supports` was asked about has been split since
    return first


def unit(p: Problem) -> int:
    """What the keys of a tile are a multiple of: of whole registers."""
    return LANES if "channels" in orders(p) else 16


def tile_of(p: Problem) -> tuple[int, int]:
    """Keys of a copy, and copies of a tile, which is one unless there are pages."""
    _, t, s, h, heads = p.sizes
    per_key = heads * max(p.q.shape[3], p.v.shape[3]) * p.q.dtype.itemsize
    most, of = min(BYTES // per_key, SCORES // (heads * whole(t * h, 16))), unit(p)
    if p.table is not None:
        page, count = p.k.shape[1], p.table.shape[1]
        return page, max(1, min(most // page, PAGES, count))
    left, right = p.mask.window or (None, None)
    if left is not None and (p.mask.causal or right is not None):  # no more than two tiles, of no more than it takes
        most = min(most, whole(left + (0 if p.mask.causal else right or 0) + t, of))
    most = max(of, min(most, s) // of * of)
    return min(whole(pl.cdiv(s, pl.cdiv(s, most)), of), s // of * of), 1


def attend(p: Problem) -> jax.Array:
    """See `formax.layers.attention.attention`."""
    b, t, _, h, heads = p.sizes
    piece, pieces = tile_of(p)
    folded, groups = fold_heads(p)  # queries by heads of a group by heads of keys are the rows
    q = folded.q.reshape(b, t * h, 1, -1)
    segments: Any = p.mask.segments
    if segments is not None:
        segments = jnp.repeat(segments[0], h, axis=1), segments[1]
    rows = whole(t * h, 16)
    flat = replace(p, q=q, mask=replace(p.mask, segments=segments))
    plan = replace(plan_of(flat, rows, piece * pieces), shared=h, heads=heads)
    plan = replace(plan, width=max(plan.width, LANES))
    given = operands(replace(flat, bias=None, sinks=None), plan)

    def by_row(x: jax.Array) -> jax.Array:
        """[H, n], of every head, as [rows, n]."""
        x = x.astype(jnp.float32).reshape(heads, groups, -1).swapaxes(0, 1).reshape(h, -1)
        return jnp.resize(x, (rows, x.shape[1]))

    match p.bias:
        case ALiBi(slopes=slopes):
            given["learned"] = by_row(jnp.pad(slopes[:, None], ((0, 0), (0, plan.width - 1))))
        case Bucketed():
            edges, values = p.bias.steps()
            given["edges"] = jnp.asarray(edges, jnp.int32)
            given["learned"] = by_row(jnp.pad(values, ((0, 0), (0, plan.width - values.shape[1]))))
    if p.sinks is not None:
        given["sinks"] = by_row(p.sinks[:, None])
    given["q"] = jnp.pad(q[:, :, 0], ((0, 0), (0, rows - t * h), (0, 0)))
    if p.table is not None:  # the copy of a page that does not exist would stop the chip
        given["table"] = jnp.clip(p.table, 0, len(p.k) - 1)
    first = orders(p)
    live = {name: view(x, way) for name, x, way in zip("kv", (p.k, p.v), first, strict=True)}
    out = _call(plan, pieces, first, target().interpret, given | live)
    return unfold_heads(out[:, : t * h].reshape(b, t * groups, heads, -1), groups)


attention = as_xla_slopes(attend)


# --- what is read


def steps(plan: Plan, pieces: int, given: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    """Numbers of all steps, and how many there are: those of rows one after the other, at least one of each.

    `row` and `tile` [most steps that there can be], and `bounds` [2 B], the first and last but one piece that each row
    needs, all of which lie in its tiles.
    """
    tiles, exact = plan.blocks[1], replace(plan, rows=plan.t, keys=plan.keys // pieces)
    bounds = needed(exact, given)["bounds"].reshape(-1, 2)
    first, stop = jnp.minimum(bounds[:, 0] // pieces, tiles - 1), -(-bounds[:, 1] // pieces)
    count = jnp.maximum(stop - first, 1)
    ends = jnp.cumsum(count)
    n = jnp.arange(len(ends) * tiles)
    row = jnp.minimum((n[:, None] >= ends).sum(1), len(ends) - 1)
    tile = jnp.minimum(n - (ends - count)[row] + first[row], tiles - 1)
    return {"row": row, "tile": tile, "bounds": bounds.reshape(-1)}, ends[-1]


def columns(plan: Plan, pieces: int, first: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a tile's columns: the number of each one's key, and that of its head."""
    piece, c = plan.keys // pieces, np.arange(plan.tile[1])
    if first == "positions":
        return c // plan.heads, c % plan.heads
    return c // (plan.heads * piece) * piece + c % piece, c // piece % plan.heads


def view(x: jax.Array, first: str) -> jax.Array:
    """[.., positions, heads, channels] in that order."""
    n, s, heads, channels = x.shape
    if first != "positions":
        return x.transpose(*((0, 2, 3, 1) if first == "channels" else (0, 2, 1, 3)))
    flat = channels == LANES or heads % 8 == 0 or (heads == 1 and x.dtype.itemsize == 2)
    return x.reshape(n, s * heads, channels) if flat else x


def place(plan: Plan, pieces: int, number: int, n: Any, scalars: Mapping[str, Any]) -> tuple[Any, Any]:
    """Row (or page) and number in it of the piece that a step's copy of that number brings.

    For one that nobody sees the copy stays with what it brought before: what a step does not need is not fetched.
    """
    row = scalars["row"][n]
    first, stop = scalars["bounds"][2 * row], scalars["bounds"][2 * row + 1]
    at = scalars["tile"][n] * pieces + number
    at = jnp.where(at < stop, at, at - pieces)
    some = (at >= first) & (at < stop)
    if "table" not in scalars:
        return jnp.where(some, row, 0), jnp.where(some, at, 0)
    count = plan.s // (plan.keys // pieces)  # pages of a row
    return jnp.where(some, scalars["table"][row * count + jnp.where(some, at, 0)], 0), 0


# --- the kernel


def kernel(plan: Plan, pieces: int, orders: tuple[str, str], names: tuple[str, ...], *all_refs: Any) -> None:
    """A tile of all heads; sums are written with the last of a row."""
    refs = dict(zip(names, all_refs, strict=False))
    out, sums, most, total = all_refs[len(names) :]
    keys, values = ([refs[f"{name}{p}"] for p in range(pieces)] for name in "kv")
    piece, n = plan.keys // pieces, pl.program_id(0)
    row, j = refs["row"][n], refs["tile"][n]
    first, stop = refs["bounds"][2 * row], refs["bounds"][2 * row + 1]
    offset, end, prefix = (refs["numbers"][4 * row + x] for x in range(3))
    begins = j == jnp.minimum(jax.lax.div(first, jnp.int32(pieces)), plan.blocks[1] - 1)
    active = (j * pieces < stop) & (first < stop)
    ends = (j + 1) * pieces >= stop
    if plan.ids:
        q_span, k_span = ([refs[name][at], refs[name][at + 1]] for name, at in (
            ("q_span", 2 * row), ("k_span", 2 * (row * plan.blocks[1] + j))))  # fmt: skip
        active = active & meet(q_span, k_span)

    @pl.when(begins)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        most[...] = jnp.broadcast_to(refs["sinks"][...] if plan.sinks else jnp.float32(NOTHING), most.shape)
        total[...] = jnp.full(total.shape, 1.0 if plan.sinks else 0.0, jnp.float32)

    def learned(r: Any) -> Any:
        place = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.width), 1)
        return jnp.sum(jnp.where(place == r, refs["learned"][...], 0.0), axis=1, keepdims=True)

    @pl.when(active)
    def _() -> None:
        q = refs["q"][...]
        raw = jnp.concatenate([x for ref in keys for x in with_keys(plan, orders[0], q, ref[...])], axis=1)
        facts = Facts(
            offset,
            end,
            prefix,
            refs["q_ids"][...] if plan.ids else None,
            refs["k_ids"][...] if plan.ids else None,
            slope=learned(0) if plan.slopes else None,
            edge=lambda r: refs["edges"][r],
            value=learned,
            below=lambda far: sum((refs["edges"][r] <= far).astype(jnp.int32) for r in range(plan.steps)),
            query=refs["query"][...],
            key=refs["key"][...],
            heads=(refs["q_head"][...], refs["k_head"][...]) if plan.heads > 1 else None,
        )
        found, _, seen = scores(plan, raw, 0, j, facts, whole=not plan.masked)
        if seen is not None:
            found = jnp.where(seen, found, NOTHING)
        old = most[...]
        new = jnp.maximum(old, jnp.max(found, axis=1, keepdims=True))
        weights = jnp.exp(found - spread(new, plan.tile[1]))
        if seen is not None:
            weights = jnp.where(seen, weights, 0.0)
        fade, more = jnp.exp(old - new), jnp.zeros(sums.shape, jnp.float32)
        most[...] = new
        total[...] = fade * total[...] + jnp.sum(weights, axis=1, keepdims=True)
        for number, (own, ref) in enumerate(zip(jnp.split(weights, pieces, axis=1), values, strict=True)):
            at, x = j * pieces + number, ref[...]
            if plan.bounded:  # what lies there may be no number
                x = existing(plan, orders[1], x, jnp.where(at >= first, end - at * piece, 0))
            more += with_values(plan, orders[1], own.astype(x.dtype), x)
        sums[...] = spread(fade, sums.shape[1]) * sums[...] + more

    @pl.when(ends)
    def _() -> None:
        count = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (sums[...] / spread(count, sums.shape[1])).astype(out.dtype)


def with_keys(plan: Plan, first: str, q: Any, x: Any) -> list[Any]:
    """Products of queries [rows, D] with a piece of a `view`, [rows, columns] in one or several parts."""
    if first == "channels":
        return [dot(q, x[head], 1, 0) for head in range(plan.heads)]
    return [dot(q, x.reshape(-1, x.shape[-1]), 1, 1)]


def with_values(plan: Plan, first: str, weights: Any, x: Any) -> Any:
    """Products of weights [rows, columns] with a piece of a `view`, [rows, Dv]."""
    if first == "channels":
        parts = jnp.split(weights, plan.heads, axis=1)
        return sum(dot(own, x[head], 1, 1) for head, own in enumerate(parts))
    return dot(weights, x.reshape(-1, x.shape[-1]), 1, 0)


def existing(plan: Plan, first: str, x: Any, limit: Any) -> Any:
    """A piece of a `view` with zeros from position `limit` on."""
    per_position = plan.heads if first == "positions" and x.ndim == 2 else 1
    at = jax.lax.broadcasted_iota(jnp.int32, x.shape, AXES[first])
    return jnp.where(at < limit * per_position, x, jnp.zeros_like(x))


def _call(plan: Plan, pieces: int, first: tuple[str, str], interpret: bool, given: dict[str, jax.Array]) -> jax.Array:
    """[B, rows, Dv], of keys and values in a `view`."""
    b, rows, _ = given["q"].shape
    deep = given["v"].shape[2 if first[1] == "channels" else -1]
    given |= spans(plan, given)
    numbers, count = steps(plan, pieces, given)
    numbers |= {name: given[name] for name in SCALARS if name in given}
    scalars = {name: x.astype(jnp.int32).reshape(-1) for name, x in numbers.items()}
    key, head = columns(plan, pieces, first[0])
    row = np.arange(rows)
    query = np.minimum(row, plan.t - 1) // plan.shared  # those that only fill up see what the last one does
    arrays: dict[str, jax.Array] = {name: given[name] for name in ("q", "learned", "sinks") if name in given}
    arrays |= {"query": jnp.asarray(query[:, None], jnp.int32), "key": jnp.asarray(key[None], jnp.int32)}
    if plan.heads > 1:
        heads = {"q_head": row[:, None] % plan.heads, "k_head": head[None]}
        arrays |= {name: jnp.asarray(x, jnp.int32) for name, x in heads.items()}
    if plan.ids:
        ids = given["k_ids"].reshape(b, plan.blocks[1], 1, plan.keys)  # in one piece, without pages
        ids = jnp.repeat(ids, plan.heads, axis=3) if first[0] == "positions" else jnp.tile(ids, plan.heads)
        arrays |= {"q_ids": given["q_ids"][..., None], "k_ids": ids}

    def whole_of(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda n, *_: (0,) * x.ndim)

    def of_row(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda n, row, *_: (row[n], 0, 0))

    specs = {name: (of_row if name in ("q", "q_ids") else whole_of)(x) for name, x in arrays.items()}
    if plan.ids:
        tile = (None, None, 1, plan.tile[1])
        specs["k_ids"] = pl.BlockSpec(tile, lambda n, row, tile, *_: (row[n], tile[n], 0, 0))

    def piece_of(x: jax.Array, axis: int, number: int) -> pl.BlockSpec:
        shape = list(x.shape[1:])
        shape[axis] = plan.keys // pieces * (plan.heads if axis == 0 and x.ndim == 3 else 1)

        def at(n: Any, *refs: Any) -> tuple[Any, ...]:
            row, piece = place(plan, pieces, number, n, dict(zip(scalars, refs, strict=True)))
            return row, *(piece if a == axis else 0 for a in range(len(shape)))

        return pl.BlockSpec((None, *shape), at)

    for name, way in zip("kv", first, strict=True):
        for number in range(pieces):
            arrays[f"{name}{number}"] = given[name]
            specs[f"{name}{number}"] = piece_of(given[name], AXES[way], number)
    shape = jax.ShapeDtypeStruct((b, rows, deep), given["q"].dtype)
    return pl.pallas_call(
        partial(kernel, plan, pieces, first, (*scalars, *arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(count,),
            in_specs=list(specs.values()),
            out_specs=of_row(shape),
            scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (deep, LANES, LANES)],
        ),
        out_shape=shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=[pltpu.ARBITRARY]),
        interpret=interpret,
        name="attention_decode",
    )(*scalars.values(), *arrays.values())
