"""Attention as Pallas kernels on a TPU, forward and backward, by way of Mosaic.

The innermost axes of the grid go over the tiles of a block of queries (in the backward pass also of a block of keys),
whose sums stay in the core's memory (Dao 2023, arXiv:2307.08691). Tiles that the mask rules out are neither computed
nor fetched: which blocks a block needs is known beforehand, and a window makes the grid shorter. Terms that depend on
the distance are computed in place. Written in what both Mosaic and Pallas's interpreter understand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from formax.core import mesh
from formax.layers.attention.kernel import (
    NOTHING,
    Facts,
    Kernels,
    Plan,
    attend,
    learned_slopes,
    meet,
    needed,
    plan_of,
    scores,
    slopes_of,
    spans,
)
from formax.layers.attention.problem import Problem, fewer_queries_than, target

LANES = 128  # a register's width; what is smaller takes as much


def supports(p: Problem) -> str | None:
    """Heads up to 256 wide, without dropout."""
    widest = max(p.q.shape[3], p.v.shape[3])
    if widest > 256:
        return f"heads of {widest} channels do not fit; 256 do"
    if p.q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{p.q.dtype} is none of float32, bfloat16"
    if p.dropout:
        return "drops no weights"
    return None


def suits(p: Problem) -> str | None:
    """Worth it from a block of queries on, where it is known over which devices a program is split."""
    return fewer_queries_than(LANES, p) or undivided()


def undivided() -> str | None:
    """Why a kernel had to be split by XLA, which cannot."""
    several = target().platform == jax.default_backend() and jax.device_count() > 1
    if several and mesh.current() is None and jax.sharding.get_abstract_mesh().empty:
        return f"one of {jax.device_count()} devices, or all? XLA cannot split it, jax.set_mesh can"
    return None


def attention(p: Problem) -> jax.Array:
    """See `formax.layers.attention.attention`."""
    _, t, s, _, _ = p.sizes
    rows, keys = largest(max(p.q.shape[3], p.v.shape[3]), p.q.dtype.itemsize)
    plan = plan_of(p, block(t, rows), block(s, keys))
    return attend(KERNELS, p, replace(plan, width=max(plan.width, LANES)))


def largest(channels: int, itemsize: int) -> tuple[int, int]:
    """Queries and keys of a tile that fit a core's memory with all features, by the wider head's channels.

    16 MiB up to the fifth generation of the chip, which the compiler is tried with for one that is not at hand.
    """
    if whole(channels, LANES) * itemsize > 512:
        return 256, 512
    return 512, 512 if generation() < 6 else 1024


def generation() -> int:
    """Of the chip at hand; 0 where there is none."""
    found = re.match(r"TPU v?(\d+)", jax.devices()[0].device_kind)
    return int(found[1]) if found else 0


def block(length: int, most: int) -> int:
    """Blocks are of whole registers, and of one size, so that little is filled up."""
    return whole(pl.cdiv(length, pl.cdiv(length, most)), min(most, LANES))


def whole(n: int, unit: int) -> int:
    """The next multiple."""
    return pl.cdiv(n, unit) * unit


# --- where a step is


@dataclass(frozen=True)
class Grid:
    """Steps of a kernel: (row, head, block of queries, tile), or (row, head of keys, block of keys, head, tile).

    Attributes:
        plan: of all tiles.
        groups: heads of queries that share one of keys.
        of_keys: a block is one of keys, and its tiles those of all queries and heads that share it.
        every: all tiles have a step, also those that are not computed.
    """

    plan: Plan
    groups: int
    of_keys: bool = False
    every: bool = False

    @property
    def blocks(self) -> int:
        """How many there are, of queries or of keys."""
        return self.plan.blocks[self.of_keys]

    @property
    def tiles(self) -> int:
        """Steps for a block: the most tiles that any needs."""
        plan = self.plan
        mine, other = (plan.keys, plan.rows) if self.of_keys else (plan.rows, plan.keys)
        all_of_them = plan.blocks[not self.of_keys]
        right = 0 if plan.causal and not plan.prefix else plan.right
        if self.every or plan.left is None or right is None:
            return all_of_them
        return min(all_of_them, pl.cdiv(mine + plan.left + right - 1, other) + 1)

    def place(self, ids: tuple[Any, ...], bounds: Any) -> dict[str, Any]:
        """Of the step with these numbers, from the `bounds` that `needed` finds: row, heads, blocks, and what to load.

        `load` is the other side's block: where a step has nothing to do, it is the last one that was needed.
        """
        b, head, mine, *more = ids
        at = 2 * (b * self.blocks + mine)
        start, stop = bounds[at], bounds[at + 1]
        other = more[-1] if self.every else start + more[-1]
        load = jnp.clip(other, jnp.minimum(start, jnp.maximum(stop - 1, 0)), jnp.maximum(stop - 1, 0))
        shared = head if self.of_keys else jax.lax.div(head, jnp.int32(self.groups))
        head = head * self.groups + more[0] if self.of_keys else head
        i, j = (other, mine) if self.of_keys else (mine, other)
        load_i, load_j = (load, mine) if self.of_keys else (mine, load)
        active = (other >= start) & (other < stop)
        return {"row": b, "head": head, "shared": shared, "i": i, "j": j, "query": load_i, "key": load_j,
                "active": active}  # fmt: skip

    def parts(self, given: Mapping[str, Any]) -> dict[str, pl.BlockSpec]:
        """Which part of each array a step sees."""
        rows, keys = self.plan.rows, self.plan.keys

        def part(shape: tuple[int | None, ...], *places: str | None) -> pl.BlockSpec:
            """A block whose place along each axis is that of the step; None for the start."""

            def at(*ids: Any) -> tuple[Any, ...]:
                count = 5 if self.of_keys else 4
                where = self.place(ids[:count], ids[count])
                return tuple(0 if place is None else where[place] for place in places)

            return pl.BlockSpec(shape, at)

        def pairs(x: jax.Array) -> pl.BlockSpec:
            """Of something [B or 1, H or 1, T' or 1, S' or 1]."""
            many = [n > 1 for n in x.shape]
            places = [name if some else None for name, some in zip(("row", "head", "query", "key"), many, strict=True)]
            return part((None, None, rows if many[2] else 1, keys if many[3] else 1), *places)

        kinds: dict[str, Callable[[Any], pl.BlockSpec]] = {
            "of queries": lambda x: part((None, None, rows, x.shape[3]), "row", "head", "query", None),
            "of keys": lambda x: part((None, None, keys, x.shape[3]), "row", "shared", "key", None),
            "of numbers": lambda x: part((None, None, 1, rows), "row", "head", None, "query"),
            "q_ids": lambda x: part((None, 1, rows), "row", None, "query"),
            "k_ids": lambda x: part((None, 1, keys), "row", None, "key"),
            "pairs": pairs,
        }
        names = {"q": "of queries", "slope": "of queries", "k": "of keys", "v": "of keys", "logs": "of numbers",
                 "own": "of numbers", "dense": "pairs", "added": "pairs"}  # fmt: skip
        return {name: kinds[names.get(name, name)](x) for name, x in given.items()}


class Step:
    """What one step of a kernel is about, and what it reads; `refs` by name."""

    def __init__(self, grid: Grid, refs: Mapping[str, Any]) -> None:
        self.grid, self.plan, self.refs = grid, grid.plan, refs
        ids = tuple(pl.program_id(axis) for axis in range(5 if grid.of_keys else 4))
        at = grid.place(ids, refs["bounds"])
        self.row, self.head, self.i, self.j, self.active = (at[n] for n in ("row", "head", "i", "j", "active"))
        self.first, self.last = ids[-1] == 0, ids[-1] == grid.tiles - 1
        if grid.of_keys:
            self.first, self.last = self.first & (ids[3] == 0), self.last & (ids[3] == grid.groups - 1)
        queries, keys = self.plan.blocks
        if self.plan.ids:  # not all between the first and the last
            of_q, of_k = ((2 * (self.row * n + jnp.clip(x, 0, n - 1)), refs[name])
                          for x, n, name in ((self.i, queries, "q_span"), (self.j, keys, "k_span")))  # fmt: skip
            q_span, k_span = ([ref[at], ref[at + 1]] for at, ref in (of_q, of_k))
            self.active = self.active & meet(q_span, k_span)

    def run(self, tile: Callable[[bool], None]) -> None:
        """`tile(whole)`, if the step has one."""
        if not self.plan.masked or not self.plan.plain:
            pl.when(self.active)(partial(tile, not self.plan.masked))
            return
        at = 2 * (self.row * self.plan.blocks[0] + jnp.clip(self.i, 0, self.plan.blocks[0] - 1))
        whole = (self.j >= self.refs["whole"][at]) & (self.j < self.refs["whole"][at + 1])
        pl.when(self.active & whole)(partial(tile, True))
        pl.when(self.active & jnp.logical_not(whole))(partial(tile, False))

    def facts(self) -> Facts:
        """Of the step's tile."""
        refs, plan = self.refs, self.plan
        offset, end, prefix = (refs["numbers"][4 * self.row + n] for n in range(3))

        def learned(r: Any) -> Any:
            return refs["learned"][self.head * plan.width + r]

        def below(distance: Any) -> Any:
            """Edges that are not above it, of those that are sorted."""
            return sum((refs["edges"][r] <= distance).astype(jnp.int32) for r in range(plan.steps))

        return Facts(
            offset,
            end,
            prefix,
            spread(column(refs["q_ids"][...]), plan.keys) if plan.ids else None,
            refs["k_ids"][...] if plan.ids else None,
            refs["dense"][...] if "dense" in refs else None,
            refs["added"][...] if "added" in refs else None,
            learned(0) if plan.slopes else None,
            lambda r: refs["edges"][r],
            learned,
            below,
        )


# --- registers


def column(x: Any) -> Any:
    """[1, rows] -> [rows, 128], each number in all lanes: what broadcasts to tiles at no cost."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def spread(x: Any, n: int) -> Any:
    """[rows, 128] of one number in all lanes -> [rows, n]."""
    return x[:, :n] if n <= LANES else jnp.tile(x, (1, pl.cdiv(n, LANES)))[:, :n]


def dot(a: Any, b: Any, of_a: int, of_b: int) -> Any:
    """A product of tiles over an axis of each, summed in float32, and exact for factors in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32, precision=exact)


# --- kernels


def forward_kernel(grid: Grid, names: tuple[str, ...], *all_refs: Any) -> None:
    """A tile of one head; sums are written with the last of a block of queries."""
    refs = dict(zip(names, all_refs, strict=False))
    out, logs, sums, most, total = all_refs[len(names) :]
    plan, at = grid.plan, Step(grid, refs)

    @pl.when(at.first)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        most[...] = jnp.full(most.shape, refs["sinks"][at.head] if plan.sinks else NOTHING, jnp.float32)
        total[...] = jnp.full(total.shape, 1.0 if plan.sinks else 0.0, jnp.float32)

    def tile(whole: bool) -> None:
        raw = dot(refs["q"][...], refs["k"][...], 1, 1)
        found, _, seen = scores(plan, raw, at.i, at.j, at.facts(), whole=whole)
        if seen is not None:
            found = jnp.where(seen, found, NOTHING)
        old = most[...]
        new = jnp.maximum(old, jnp.max(found, axis=1, keepdims=True))
        weights = jnp.exp(found - spread(new, plan.keys))
        if seen is not None:
            weights = jnp.where(seen, weights, 0.0)
        fade, values = jnp.exp(old - new), refs["v"][...]
        most[...] = new
        total[...] = fade * total[...] + jnp.sum(weights, axis=1, keepdims=True)
        more = dot(weights.astype(values.dtype), values, 1, 0)
        sums[...] = spread(fade, sums.shape[1]) * sums[...] + more

    at.run(tile)

    @pl.when(at.last)
    def _() -> None:
        some = total[...] > 0
        count = jnp.where(some, total[...], 1.0)
        out[...] = (sums[...] / spread(count, sums.shape[1])).astype(out.dtype)
        logs[...] = jnp.where(some, most[...] + jnp.log(count), 0.0).T[:1]


def slopes_of_tile(at: Step, whole: bool) -> tuple[Any, Any, Any, Facts]:
    """See `slopes_of`, and what is known of the tile."""
    refs, facts = at.refs, at.facts()
    raw, dw = dot(refs["q"][...], refs["k"][...], 1, 1), dot(refs["slope"][...], refs["v"][...], 1, 1)
    logs, own = (spread(column(refs[name][...]), at.plan.keys) for name in ("logs", "own"))
    return *slopes_of(at.plan, raw, at.i, at.j, facts, whole, logs, own, dw), facts


def queries_kernel(grid: Grid, names: tuple[str, ...], *all_refs: Any) -> None:
    """Slopes of a block of queries of one head, tile by tile; of what is learned of the bias, and of pairs' terms."""
    refs = dict(zip(names, all_refs, strict=False))
    dq, *more, sums = all_refs[len(names) :]
    at, wants = Step(grid, refs), "learned" in refs and bool(more)

    @pl.when(at.first)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        if wants:
            more[0][...] = jnp.zeros(more[0].shape, jnp.float32)

    def tile(whole: bool) -> None:
        _, ds, du, facts = slopes_of_tile(at, whole)
        keys = refs["k"][...]
        sums[...] += dot(du.astype(keys.dtype), keys, 1, 0)
        if wants:
            more[0][...] += learned_slopes(grid.plan, ds, at.i, at.j, facts)
        elif more:
            more[0][...] = ds

    at.run(tile)
    if more and not wants:  # tiles that are not computed have no slopes

        @pl.when(jnp.logical_not(at.active))
        def clear() -> None:
            more[0][...] = jnp.zeros(more[0].shape, jnp.float32)

    @pl.when(at.last)
    def _() -> None:
        dq[...] = sums[...].astype(dq.dtype)


def keys_kernel(grid: Grid, names: tuple[str, ...], *all_refs: Any) -> None:
    """Slopes of a block of keys and values, tile by tile of all heads of queries that share them."""
    refs = dict(zip(names, all_refs, strict=False))
    dk, dv, of_k, of_v = all_refs[len(names) :]
    at = Step(grid, refs)

    @pl.when(at.first)
    def _() -> None:
        of_k[...] = jnp.zeros(of_k.shape, jnp.float32)
        of_v[...] = jnp.zeros(of_v.shape, jnp.float32)

    def tile(whole: bool) -> None:
        weights, _, du, _ = slopes_of_tile(at, whole)
        q, slope = refs["q"][...], refs["slope"][...]
        of_k[...] += dot(du.astype(q.dtype), q, 0, 0)
        of_v[...] += dot(weights.astype(slope.dtype), slope, 0, 0)

    at.run(tile)

    @pl.when(at.last)
    def _() -> None:
        dk[...] = of_k[...].astype(dk.dtype)
        dv[...] = of_v[...].astype(dv.dtype)


# --- calls

SCALARS = ("bounds", "whole", "numbers", "q_span", "k_span", "edges", "learned", "sinks")


def call(
    kernel: Any,
    grid: Grid,
    given: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: tuple[tuple[int, int], ...],
    *,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel on the arrays that are `given`; `outputs` are named as what is placed like them.

    `scratch` are shapes of what is kept from step to step, in float32.
    """
    given = {**given, **spans(grid.plan, given)}
    given |= needed(grid.plan, given, of_keys=grid.of_keys)
    scalars = {name: given[name].reshape(-1) for name in SCALARS if name in given}
    arrays = {name: x for name, x in given.items() if name not in SCALARS}
    b, h, heads = len(given["q"]), given["q"].shape[1], given["k"].shape[1]
    steps = (b, heads, grid.blocks, grid.groups, grid.tiles) if grid.of_keys else (b, h, grid.blocks, grid.tiles)
    inputs, placed = grid.parts(arrays), grid.parts({k: v for k, v in outputs.items() if k not in ("learned", "added")})
    if "learned" in outputs:
        width = grid.plan.width
        placed["learned"] = pl.BlockSpec((None, None, None, 1, width), lambda b, h, i, *_: (b, h, i, 0, 0))
    if "added" in outputs:
        tile = (None, None, grid.plan.rows, grid.plan.keys)
        placed["added"] = pl.BlockSpec(tile, lambda b, h, i, j, *_: (b, h, i, j))
    return pl.pallas_call(
        partial(kernel, grid, (*scalars, *arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=steps,
            in_specs=[inputs[name] for name in arrays],
            out_specs=[placed[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[pltpu.PARALLEL] * 3 + [pltpu.ARBITRARY] * (len(steps) - 3)
        ),
        interpret=interpret,
        name=kernel.__name__,
    )(*scalars.values(), *arrays.values())


def arranged(given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Heads before positions, [B, H, T', D], and whole registers of channels; rows of numbers as [.., 1, n]."""
    found = dict(given)
    for name in ("q", "k", "v", "slope"):
        if name in given:
            x = jnp.moveaxis(given[name], 1, 2)
            found[name] = jnp.pad(x, ((0, 0),) * 3 + ((0, whole(x.shape[3], LANES) - x.shape[3]),))
    for name in ("logs", "own", "q_ids", "k_ids"):
        if name in given:
            found[name] = jnp.expand_dims(given[name], -2)
    for name, wide in (("dense", jnp.int32), ("added", jnp.float32)):
        if name in given and 1 in given[name].shape[2:]:  # registers of narrow types hold several rows
            found[name] = given[name].astype(wide)
    return found


def restored(x: jax.Array, channels: int) -> jax.Array:
    """The other way round, [B, T', H, D]."""
    return jnp.moveaxis(x[..., :channels], 1, 2)


def forward(plan: Plan, interpret: bool, given: dict[str, jax.Array]) -> Any:
    """See `Kernels`."""
    channels, given = given["v"].shape[3], arranged(given)
    b, h, tp, _ = given["q"].shape
    width = given["v"].shape[3]
    outputs = {
        "q": jax.ShapeDtypeStruct((b, h, tp, width), given["q"].dtype),
        "logs": jax.ShapeDtypeStruct((b, h, 1, tp), jnp.float32),
    }
    scratch = (plan.rows, width), (plan.rows, LANES), (plan.rows, LANES)
    grid = Grid(plan, h // given["k"].shape[1])
    out, logs = call(forward_kernel, grid, given, outputs, scratch, interpret=interpret)
    return restored(out, channels), logs[:, :, 0]


def backward(plan: Plan, interpret: bool, given: dict[str, jax.Array], wanted: frozenset[str]) -> dict[str, jax.Array]:
    """See `Kernels`."""
    channels, given = {name: given[name].shape[3] for name in ("q", "k", "v")}, arranged(given)
    shape = {name: given[name].shape for name in ("q", "k", "v")}
    (b, h, tp, width), sp = shape["q"], shape["k"][2]
    outputs = {"q": jax.ShapeDtypeStruct(shape["q"], given["q"].dtype)}
    if "learned" in wanted:
        outputs["learned"] = jax.ShapeDtypeStruct((b, h, plan.blocks[0], 1, plan.width), jnp.float32)
    if "added" in wanted:
        outputs["added"] = jax.ShapeDtypeStruct((b, h, tp, sp), jnp.float32)
    grid = Grid(plan, h // shape["k"][1], every="added" in wanted)
    scratch: tuple[tuple[int, int], ...] = ((plan.rows, width),)
    found = dict(zip(outputs, call(queries_kernel, grid, given, outputs, scratch, interpret=interpret), strict=True))
    outputs = {name: jax.ShapeDtypeStruct(shape[name], given[name].dtype) for name in ("k", "v")}
    scratch = (plan.keys, width), (plan.keys, shape["v"][3])
    grid = replace(grid, of_keys=True, every=False)
    found |= zip(outputs, call(keys_kernel, grid, given, outputs, scratch, interpret=interpret), strict=True)
    return found | {name: restored(found[name], n) for name, n in channels.items()}


KERNELS = Kernels(forward, backward)
