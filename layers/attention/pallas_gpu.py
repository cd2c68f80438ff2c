"""Attention as one Pallas kernel on a GPU, forward and backward, by way of Triton: from Ampere on.

Written in what both Triton's lowering and Pallas's interpreter understand, so that its values and slopes are tested on
any machine (Dao 2023, arXiv:2307.08691, has the order of the loops). A program is a block of queries of one head, or in
the backward pass also one of keys; what the mask rules out is not loaded, tiles that are seen whole are not masked, and
terms that depend on the distance are computed in place.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from formax.layers.attention.kernel import (
    NOTHING,
    Facts,
    Kernels,
    Plan,
    attend,
    key_blocks,
    learned_slopes,
    meet,
    plan_of,
    query_blocks,
    scores,
    slopes_of,
    spans,
)
from formax.layers.attention.problem import Problem, fewer_queries_than

# Queries and keys of a tile: forward, and backward, where more is held at once. Chosen by occupancy on Hopper.
FORWARD, BACKWARD = (128, 64), (64, 64)
LOG2E = 1.4426950408889634


def supports(p: Problem) -> str | None:
    """Heads up to 256 wide, without dropout."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"jax {jax.__version__} cannot lower Pallas kernels by way of Triton"
    widest = max(p.q.shape[3], p.v.shape[3])
    if widest > 256:
        return f"heads of {widest} channels do not fit; 256 do"
    if p.q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"{p.q.dtype} is none of float32, bfloat16, float16"
    if p.dropout:
        return "drops no weights"
    return None


def suits(p: Problem) -> str | None:
    """Worth it from a block of queries on."""
    return fewer_queries_than(16, p)


def attention(p: Problem) -> jax.Array:
    """See `formax.layers.attention.attention`."""
    _, t, s, _, _ = p.sizes
    plan = plan_of(p, block(t, FORWARD[0]), block(s, FORWARD[1]))
    return attend(KERNELS, p, plan)


def block(length: int, most: int) -> int:
    """Tiles are powers of two, from 16 on."""
    return min(most, max(16, pl.next_power_of_2(length)))


def reads(plan: Plan, given: Mapping[str, jax.Array], groups: int, *, of_keys: bool) -> dict[str, pl.BlockSpec]:
    """Which part of each array a program sees: grid (block, head, row).

    A program is a block of queries of a head, which looks through all keys; or, `of_keys`, one of the keys that a group
    of heads shares, which looks through all queries of the group.
    """
    tp, sp = given["q"].shape[1], given["k"].shape[1]
    queries, keys = tp // plan.rows, sp // plan.keys
    rows, columns = (tp, plan.keys) if of_keys else (plan.rows, sp)
    heads = groups if of_keys else None

    def part(shape: tuple[Any, ...], *places: str | None) -> pl.BlockSpec:
        """A block whose place along each axis is that of the program's block, head or row; None for the start."""

        def at(i: Any, h: Any, b: Any) -> tuple[Any, ...]:
            where = {"block": i, "head": h, "shared": h if of_keys else jax.lax.div(h, jnp.int32(groups)), "row": b}
            return tuple(0 if place is None else where[place] for place in places)

        return pl.BlockSpec(shape, at)

    def pairs(x: jax.Array) -> pl.BlockSpec:
        """Of something [B or 1, H or 1, T' or 1, S' or 1]."""
        many = [n > 1 for n in x.shape]
        shape = (None, heads if many[1] else None, rows if many[2] else 1, columns if many[3] else 1)
        return part(
            shape,
            "row" if many[0] else None,
            "head" if many[1] else None,
            "block" if many[2] and not of_keys else None,
            "block" if many[3] and of_keys else None,
        )

    mine, other = ("block", None) if not of_keys else (None, "block")
    width, deep = (pl.next_power_of_2(max(16, given[name].shape[3])) for name in ("q", "v"))
    found = {
        "q": part((None, rows, heads, width), "row", mine, "head", None),
        "k": part((None, columns, None, width), "row", other, "shared", None),
        "v": part((None, columns, None, deep), "row", other, "shared", None),
        "slope": part((None, rows, heads, deep), "row", mine, "head", None),
        "logs": part((None, heads, rows), "row", "head", mine),
        "own": part((None, heads, rows), "row", "head", mine),
        "numbers": part((None, 4), "row", None),
        "q_ids": part((None, rows), "row", mine),
        "k_ids": part((None, columns), "row", other),
        "q_span": part((None, queries if of_keys else None, 2), "row", mine, None),
        "k_span": part((None, None if of_keys else keys, 2), "row", other, None),
        "learned": part((heads, plan.width), "head", None),
        "edges": part((plan.width,), None),
        "sinks": part((heads, 1), "head", None),
    }
    return {name: pairs(x) if name in ("dense", "added") else found[name] for name, x in given.items()}


class Tiles:
    """What a program reads, tile by tile.

    `at(ref, i, j, g)` methods take the numbers of the blocks and, in a program of keys, that of the head in its group.
    """

    def __init__(self, plan: Plan, refs: Mapping[str, Any], channels: Mapping[str, int]) -> None:
        self.plan, self.refs, self.channels = plan, refs, channels
        self.offset, self.end, self.prefix = (refs["numbers"][n] for n in range(3))
        self.edges = refs["edges"][...] if "edges" in refs else None

    def rows(self, name: str, block: Any = None, g: Any = None) -> Any:
        """A block of queries, keys, values or slopes [rows or keys, channels]; the program's own without a number."""
        ref, count = self.refs[name], self.plan.rows if name in ("q", "slope") else self.plan.keys
        where = slice(None) if block is None else pl.ds(block * count, count)
        ref = ref.at[where, :] if g is None else ref.at[where, g, :]
        return load(ref, self.channels[name])

    def row(self, name: str, block: Any = None, g: Any = None) -> Any:
        """Numbers of a block of queries [rows, 1]."""
        ref, count = self.refs[name], self.plan.rows
        where = slice(None) if block is None else pl.ds(block * count, count)
        return (ref[where] if g is None else ref[g, where])[:, None]

    def facts(self, i: Any, j: Any, g: Any = None, *, of_keys: bool = False) -> Facts:
        """Of the tile of blocks i and j."""
        refs, plan = self.refs, self.plan
        queries = pl.ds(i * plan.rows, plan.rows) if of_keys else slice(None)
        keys = slice(None) if of_keys else pl.ds(j * plan.keys, plan.keys)

        def pairs(name: str) -> Any:
            if name not in refs:
                return None
            ref = refs[name]
            where = (queries if ref.shape[-2] > 1 else slice(None), keys if ref.shape[-1] > 1 else slice(None))
            return ref[where] if len(ref.shape) == 2 else ref[(g, *where)]

        learned = (lambda r: refs["learned"][r]) if g is None else (lambda r: refs["learned"][g, r])
        return Facts(
            self.offset,
            self.end,
            self.prefix,
            refs["q_ids"][queries][:, None] if plan.ids else None,
            refs["k_ids"][keys][None] if plan.ids else None,
            pairs("dense"),
            pairs("added"),
            learned(0) if plan.slopes else None,
            lambda r: refs["edges"][r],
            learned,
            lambda d: jnp.sum((self.edges <= d).astype(jnp.int32)),
        )


def load(ref: Any, channels: int) -> Any:
    """[..., channels] of a block that is as wide as the next power of two, the rest zero."""
    width = ref.shape[-1]
    if width == channels:
        return ref[...]
    return triton().load(ref, mask=(jnp.arange(width) < channels)[None], other=0.0)


def store(ref: Any, x: Any, channels: int) -> None:
    """Writes a block of which so many channels are there."""
    if ref.shape[-1] == channels:
        ref[...] = x.astype(ref.dtype)
    else:
        triton().store(ref, x.astype(ref.dtype), mask=(jnp.arange(ref.shape[-1]) < channels)[None])


def triton() -> Any:
    """Pallas's module for Triton; imported when a kernel is traced, for it is deprecated and may go."""
    return importlib.import_module("jax.experimental.pallas.triton")


def dot(a: Any, b: Any) -> Any:
    """A product of tiles, summed in float32, and exact for factors in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=exact)


def loop(plan: Plan, tile: Any, carry: Any, bounds: tuple[Any, Any, Any, Any]) -> Any:
    """`tile(whole, j, carry)` for all blocks of keys: those seen in part, those seen whole, the others in part."""
    start, whole_from, whole_to, stop = bounds
    if not plan.masked:
        return jax.lax.fori_loop(start, stop, partial(tile, True), carry)
    if not plan.plain:
        return jax.lax.fori_loop(start, stop, partial(tile, False), carry)
    carry = jax.lax.fori_loop(start, whole_from, partial(tile, False), carry)
    carry = jax.lax.fori_loop(whole_from, whole_to, partial(tile, True), carry)
    return jax.lax.fori_loop(whole_to, stop, partial(tile, False), carry)


def unless_apart(spans: Any, run: Callable[[Any], Any], carry: Any) -> Any:
    """`run(carry)`; `carry` where no segment of the queries can be one of the keys', by the `spans` of both."""
    return jax.lax.cond(meet(*spans), run, lambda carry: carry, carry)


def added(carry: tuple[Any, Any, Any], found: Any, seen: Any, values: Any) -> tuple[Any, Any, Any]:
    """A tile's values, by the weights of its scores, added to what the tiles before gave.

    (sums [rows, Dv] not divided, largest scores [rows, 1], denominators [rows, 1]), the same after it.
    """
    sums, most, total = carry
    if seen is not None:
        found = jnp.where(seen, found, NOTHING)
    new = jnp.maximum(most, jnp.max(found, axis=1, keepdims=True))
    weights = jnp.exp(found - new)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    fade = jnp.exp(most - new)
    total = fade * total + jnp.sum(weights, axis=1, keepdims=True)
    return fade * sums + dot(weights.astype(values.dtype), values), new, total


def forward_kernel(plan: Plan, inputs: tuple[str, ...], channels: Mapping[str, int], *all_refs: Any) -> None:
    """A block of queries of one head, through all keys that it sees."""
    refs = dict(zip(inputs, all_refs, strict=False))
    out, logs = all_refs[len(inputs) :]
    tiles, i = Tiles(plan, refs, channels), pl.program_id(0)
    q = tiles.rows("q")

    def tile(whole: bool, j: Any, carry: Any) -> Any:
        def run(carry: Any) -> Any:
            raw = dot(q, tiles.rows("k", j).T)
            found, _, seen = scores(plan, raw, i, j, tiles.facts(i, j), whole=whole)
            return added(carry, found, seen, tiles.rows("v", j))

        if not plan.ids:
            return run(carry)
        spans = [[refs["q_span"][n] for n in (0, 1)], [refs["k_span"][j, n] for n in (0, 1)]]
        return unless_apart(spans, run, carry)

    zero = jnp.zeros((plan.rows, out.shape[-1]), jnp.float32)
    if plan.sinks:
        most = jnp.zeros((plan.rows, 1), jnp.float32) + refs["sinks"][0]
        total = jnp.ones((plan.rows, 1), jnp.float32)
    else:
        most = jnp.full((plan.rows, 1), NOTHING, jnp.float32)
        total = jnp.zeros((plan.rows, 1), jnp.float32)
    bounds = key_blocks(plan, i, tiles.offset, tiles.end, tiles.prefix)
    found, most, total = loop(plan, tile, (zero, most, total), bounds)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    store(out, found / total, channels["v"])
    logs[...] = jnp.where(some, most + jnp.log(total), 0.0)[:, 0]


def queries_kernel(plan: Plan, inputs: tuple[str, ...], channels: Mapping[str, int], *all_refs: Any) -> None:
    """Slopes of a block of queries of one head, and of what is learned of the bias."""
    refs = dict(zip(inputs, all_refs, strict=False))
    dq, *more = all_refs[len(inputs) :]
    tiles, i = Tiles(plan, refs, channels), pl.program_id(0)
    q, slope, logs, own = tiles.rows("q"), tiles.rows("slope"), tiles.row("logs"), tiles.row("own")

    def tile(whole: bool, j: Any, carry: Any) -> Any:
        def run(carry: Any) -> Any:
            total, learned = carry
            keys, facts = tiles.rows("k", j), tiles.facts(i, j)
            dw = dot(slope, tiles.rows("v", j).T)
            _, ds, du = slopes_of(plan, dot(q, keys.T), i, j, facts, whole, logs, own, dw)
            if learned is not None:
                learned = learned + learned_slopes(plan, ds, i, j, facts)
            if more and not wants:
                more[0][:, pl.ds(j * plan.keys, plan.keys)] = ds
            return total + dot(du.astype(keys.dtype), keys), learned

        if not plan.ids:
            return run(carry)
        spans = [[refs["q_span"][n] for n in (0, 1)], [refs["k_span"][j, n] for n in (0, 1)]]
        return unless_apart(spans, run, carry)

    wants = bool(more) and "learned" in refs
    if more and not wants:  # tiles that are not computed have no slopes

        def clear(j: Any, _: Any) -> None:
            more[0][:, pl.ds(j * plan.keys, plan.keys)] = jnp.zeros((plan.rows, plan.keys), jnp.float32)

        jax.lax.fori_loop(0, refs["k"].shape[0] // plan.keys, clear, None)
    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros((1, plan.width), jnp.float32) if wants else None
    total, learned = loop(plan, tile, start, key_blocks(plan, i, tiles.offset, tiles.end, tiles.prefix))
    store(dq, total, channels["q"])
    if wants:
        more[0][...] = learned


def keys_kernel(plan: Plan, inputs: tuple[str, ...], channels: Mapping[str, int], *all_refs: Any) -> None:
    """Slopes of a block of keys and values, from all heads of queries that share them."""
    refs = dict(zip(inputs, all_refs, strict=False))
    dk, dv = all_refs[len(inputs) :]
    tiles, j = Tiles(plan, refs, channels), pl.program_id(0)
    keys, values = tiles.rows("k"), tiles.rows("v")
    bounds = query_blocks(plan, j, tiles.offset, tiles.end, tiles.prefix)

    def head(g: Any, carry: Any) -> Any:
        def tile(i: Any, carry: Any) -> Any:
            def run(carry: Any) -> Any:
                dk, dv = carry
                q, slope = tiles.rows("q", i, g), tiles.rows("slope", i, g)
                facts = tiles.facts(i, j, g, of_keys=True)
                given = tiles.row("logs", i, g), tiles.row("own", i, g), dot(slope, values.T)
                weights, _, du = slopes_of(plan, dot(q, keys.T), i, j, facts, not plan.masked, *given)
                return dk + dot(du.astype(q.dtype).T, q), dv + dot(weights.astype(slope.dtype).T, slope)

            if not plan.ids:
                return run(carry)
            spans = [[refs["q_span"][i, n] for n in (0, 1)], [refs["k_span"][n] for n in (0, 1)]]
            return unless_apart(spans, run, carry)

        return jax.lax.fori_loop(*bounds, tile, carry)

    start = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    found = jax.lax.fori_loop(0, refs["q"].shape[1], head, start)
    store(dk, found[0], channels["k"])
    store(dv, found[1], channels["v"])


def call(
    kernel: Any,
    plan: Plan,
    given: Mapping[str, jax.Array],
    outputs: Mapping[str, tuple[Any, pl.BlockSpec]],
    *,
    of_keys: bool,
    interpret: bool,
    warps: int,
) -> list[jax.Array]:
    """Runs a kernel on the arrays that are `given`; `outputs` are shapes, and the part that each program writes."""
    b, h, heads = len(given["q"]), given["q"].shape[2], given["k"].shape[2]
    blocks = given["k"].shape[1] // plan.keys if of_keys else given["q"].shape[1] // plan.rows
    channels = {name: given[name].shape[3] for name in ("q", "k", "v", "slope") if name in given}
    specs = reads(plan, given, h // heads, of_keys=of_keys)
    return pl.pallas_call(
        partial(kernel, plan, tuple(given), channels),
        grid=(blocks, heads if of_keys else h, b),
        in_specs=[specs[name] for name in given],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=None if interpret else triton().CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=kernel.__name__,
    )(*given.values())


def forward(plan: Plan, interpret: bool, given: dict[str, jax.Array]) -> Any:
    """See `Kernels`."""
    q, v = given["q"], given["v"]
    b, tp, h, _ = q.shape
    deep = pl.next_power_of_2(max(16, v.shape[3]))
    outputs = {
        "out": (
            jax.ShapeDtypeStruct((b, tp, h, v.shape[3]), q.dtype),
            pl.BlockSpec((None, plan.rows, None, deep), lambda i, h, b: (b, i, h, 0)),
        ),
        "logs": (
            jax.ShapeDtypeStruct((b, h, tp), jnp.float32),
            pl.BlockSpec((None, None, plan.rows), lambda i, h, b: (b, h, i)),
        ),
    }
    arrays = {**given, **spans(plan, given)}
    warps = 4 if max(q.shape[3], v.shape[3]) <= 64 else 8
    return call(forward_kernel, plan, arrays, outputs, of_keys=False, interpret=interpret, warps=warps)


def backward(plan: Plan, interpret: bool, given: dict[str, jax.Array], wanted: frozenset[str]) -> dict[str, jax.Array]:
    """See `Kernels`."""
    b, tp, h, d = given["q"].shape
    _, sp, _, dv = given["v"].shape
    plan = replace(plan, rows=min(plan.rows, BACKWARD[0]), keys=min(plan.keys, BACKWARD[1]))
    arrays = {**given, **spans(plan, given)}
    run = partial(call, plan=plan, interpret=interpret, warps=4 if max(d, dv) <= 64 else 8)
    width, deep = (pl.next_power_of_2(max(16, n)) for n in (d, dv))

    def like(x: jax.Array, rows: int, width: int) -> Any:
        return (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            pl.BlockSpec((None, rows, None, width), lambda i, h, b: (b, i, h, 0)),
        )

    outputs = {"q": like(given["q"], plan.rows, width)}
    if "learned" in wanted:
        outputs["learned"] = (
            jax.ShapeDtypeStruct((b, h, tp // plan.rows, 1, plan.width), jnp.float32),
            pl.BlockSpec((None, None, None, 1, plan.width), lambda i, h, b: (b, h, i, 0, 0)),
        )
    if "added" in wanted:
        outputs["added"] = (
            jax.ShapeDtypeStruct((b, h, tp, sp), jnp.float32),
            pl.BlockSpec((None, None, plan.rows, sp), lambda i, h, b: (b, h, i, 0)),
        )
    found = dict(zip(outputs, run(queries_kernel, given=arrays, outputs=outputs, of_keys=False), strict=True))
    outputs = {"k": like(given["k"], plan.keys, width), "v": like(given["v"], plan.keys, deep)}
    found |= zip(outputs, run(keys_kernel, given=arrays, outputs=outputs, of_keys=True), strict=True)
    return found


KERNELS = Kernels(forward, backward)
