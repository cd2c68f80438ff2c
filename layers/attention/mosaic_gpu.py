"""Attention on Hopper by way of Mosaic GPU: tensor-core products straight from shared memory, copies by TMA.

A program is two warp groups with a block of queries each, and a third that does nothing but fetch keys and values (Shah
et al. 2024, arXiv:2407.08608). While one of the two multiplies, the other makes weights of its scores: they take turns
at a barrier. The backward pass is two such kernels, one that keeps queries and fetches keys, and one the other way
round, whose tiles lie on their side: keys by queries, as the tensor cores want the left factor of what they sum up.

JAX's interpreter refuses these instructions. Off a device the kernels are lowered, and their arithmetic is run by the
tests' own reading of the instructions (`tests/hopper.py`), which knows no timing: what barriers are for is shown by a
device alone. They are not chosen by themselves before the tests have passed on one (`PROVEN`).
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from formax.layers.attention import pallas_gpu
from formax.layers.attention.bias import ALiBi, Bucketed
from formax.layers.attention.kernel import (
    DEAD,
    NOTHING,
    Facts,
    Kernels,
    Plan,
    attend,
    key_blocks,
    lengthened,
    needed,
    plan_of,
    query_blocks,
    scores,
    slopes_of,
    spans,
    weights_of,
)
from formax.layers.attention.problem import Problem, target

PROVEN = False  # tests/test_attention_backends.py on a Hopper
GROUPS = 2  # warp groups that compute
ROWS = 64  # queries of a warp group, or keys of one where keys stay
KEYS = {64: 128, 96: 128, 128: 128, 256: 64}  # of a tile, by channels: what shared memory and registers hold
FETCHED = 64  # keys or queries that a tile of the backward pass fetches
TWO_SUMS = 128  # channels up to which registers hold the sums of keys and of values
STAGES = 2  # tiles that are held at once
ONE_STAGE = 256  # channels of which the backward pass has room for a single tile


def supports(p: Problem) -> str | None:
    """Half precision, heads of 64 to 256 channels, masks and biases without arrays of pairs."""
    if importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None:
        return f"jax {jax.__version__} has no Mosaic GPU"
    if jax.default_backend() == "gpu" and not (capability := jax.devices()[0].compute_capability).startswith("9."):
        return f"is for Hopper (compute capability 9), this is {capability}"
    if target().interpret:
        return "the interpreter knows no warp-group products"
    if p.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 and float16, not {p.q.dtype}"
    d, dv = p.q.shape[3], p.v.shape[3]
    if d != dv or d not in KEYS:
        return f"heads of {d} and {dv} channels; both must be 64, 96, 128 or 256"
    if p.dropout:
        return "drops no weights"
    if p.mask.dense is not None or not (p.bias is None or isinstance(p.bias, ALiBi | Bucketed)):
        return "fetches no arrays of pairs, of a mask or a bias"
    return None


def suits(p: Problem) -> str | None:
    """Only once it is proven, and from two blocks of queries on."""
    if not PROVEN:
        return "its tests have not passed on a device yet"
    if p.q.shape[1] < GROUPS * ROWS:
        return f"{p.q.shape[1]} queries are less than {GROUPS} blocks of {ROWS}"
    return None


def attention(p: Problem) -> jax.Array:
    """See `formax.layers.attention.attention`."""
    plan = plan_of(p, GROUPS * ROWS, KEYS[p.q.shape[3]])
    return attend(KERNELS, p, plan)


def forward(plan: Plan, interpret: bool, given: dict[str, jax.Array]) -> Any:
    """Sums [B, T', H, D] and the logarithms of their denominators [B, H, T']."""
    mg = mosaic()
    q = given["q"]
    b, tp, h, d = q.shape
    shared = h // given["k"].shape[2]
    given = bounded(plan, given)
    names = beside(given)
    one = replace(plan, rows=ROWS)  # a warp group's tile

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, *more: Any) -> None:
        refs = dict(zip(names, more, strict=False))
        out, logs, own, own_logs, own_ids, arrived, turn = more[len(names) :]
        row, head, block, group = map(jax.lax.axis_index, ("row", "head", "block", "group"))
        first, count = steps(plan, refs, row, block)
        mine = block * GROUPS + group

        def take_turns() -> None:
            mg.barrier_arrive(turn)
            mg.barrier_wait(turn)

        def compute(run: Any) -> None:
            queries, part = own.at[group], pl.ds(mine * ROWS, ROWS)
            mg.copy_gmem_to_smem(q_ref.at[row, part, head], queries, arrived.at[group])
            if plan.ids:
                mg.copy_gmem_to_smem(refs["q_ids"].at[row, part], own_ids.at[group], arrived.at[group])
            mg.barrier_wait(arrived.at[group])
            start = refs["sinks"][head, 0] if plan.sinks else jnp.float32(NOTHING)
            carry = (
                jnp.zeros((ROWS, d), jnp.float32),
                jnp.full((ROWS,), start, jnp.float32),
                jnp.full((ROWS,), 1.0 if plan.sinks else 0.0, jnp.float32),
            )
            pl.when(group == 1)(take_turns)
            sums, most, total = run(carry)
            pl.when(group == 0)(take_turns)
            some = total > 0
            total = jnp.where(some, total, 1.0)
            own_logs.at[group][...] = jnp.where(some, most + jnp.log(total), 0.0)
            queries[...] = (sums / along(total, sums.shape, 0)).astype(q.dtype)
            mg.commit_smem()
            mg.copy_smem_to_gmem(queries, out.at[row, part, head])
            mg.copy_smem_to_gmem(own_logs.at[group], logs.at[row, head, part])
            mg.wait_smem_to_gmem(0)

        def tile(at: Any, keys: Any, values: Any, *more: Any) -> Any:
            k_ids, (keys_used, values_used, *ids_used), carry = parted(more, plan.ids)
            sums, most, total = carry
            j = first + at[0]

            def multiply(acc: Any) -> Any:
                mg.wgmma(acc, own.at[group], keys.transpose((1, 0)))
                take_turns()  # the tensor cores are the other's now
                return acc[...]

            raw = pl.run_scoped(multiply, mg.ACC(one.tile, jnp.float32))
            mg.barrier_arrive(keys_used)
            facts = facts_of(one, refs, row, head, own_ids.at[group], *k_ids)
            found, _, seen = scores(one, raw, mine, j, facts, whole=not plan.masked)
            for used in ids_used:
                mg.barrier_arrive(used)
            if seen is not None:
                found = jnp.where(seen, found, NOTHING)
            new = jnp.maximum(most, found.max(axis=1))
            weights = jnp.exp(found - along(new, found.shape, 0))
            if seen is not None:
                weights = jnp.where(seen, weights, 0.0)
            fade = jnp.exp(most - new)
            sums = sums * along(fade, sums.shape, 0)
            half = weights.astype(q.dtype)
            take_turns()
            total = fade * total + weights.sum(axis=1)
            sums = pl.run_state(lambda acc: mg.wgmma(acc, half, values))(mg.ACC.init(sums))
            mg.barrier_arrive(values_used)
            return sums, new, total

        fetched = keys_and_values(plan, refs, k_ref, v_ref, row, jax.lax.div(head, jnp.int32(shared)), first)
        stream(tile, compute, (count,), fetched)

    made = mg.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, tp), jnp.float32)],
        scratch_types=[
            mg.SMEM((GROUPS, ROWS, d), q.dtype),
            mg.SMEM((GROUPS, ROWS), jnp.float32),
            mg.SMEM((GROUPS, ROWS), jnp.int32),
            mg.Barrier(num_barriers=GROUPS, num_arrivals=1 + plan.ids),
            mg.Barrier(num_arrivals=GROUPS),
        ],
        **programs(h, tp // (GROUPS * ROWS), b),
    )
    return made(q, given["k"], given["v"], *(given[name] for name in names))


def backward(plan: Plan, interpret: bool, given: dict[str, jax.Array], wanted: frozenset[str]) -> dict[str, jax.Array]:
    """See `Kernels`. Slopes of what is learned of a bias need sums of whole tiles: those are `pallas_gpu`'s."""
    if wanted:
        return pallas_gpu.backward(plan, interpret, given, wanted)
    sp, d = given["k"].shape[1::2]
    block = GROUPS * ROWS
    found = {"q": slopes_of_queries(replace(plan, rows=block, keys=FETCHED), given)}
    more = -sp % block  # keys that do not exist, for the last pair of warp groups
    if more:
        given = {**given, **{name: lengthened(given[name], sp + more) for name in ("k", "v")}}
        if plan.ids:
            given["k_ids"] = jnp.pad(given["k_ids"], ((0, 0), (0, more)), constant_values=DEAD)
    turned = replace(plan, rows=FETCHED, keys=block)
    for names in [("k", "v")] if d <= TWO_SUMS else [("k",), ("v",)]:
        found |= zip(names, slopes_of_keys(turned, given, names), strict=True)
    return {name: x[:, :sp] if name in "kv" else x for name, x in found.items()}


def slopes_of_queries(plan: Plan, given: dict[str, jax.Array]) -> jax.Array:
    """Slopes of queries [B, T', H, D]: queries stay, keys and values are fetched."""
    mg = mosaic()
    q = given["q"]
    b, tp, h, d = q.shape
    shared = h // given["k"].shape[2]
    given = bounded(plan, given)
    names = beside(given)
    one = replace(plan, rows=ROWS)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, slope_ref: Any, logs_ref: Any, own_ref: Any, *more: Any) -> None:
        refs = dict(zip(names, more, strict=False))
        out, queries, slopes, logs, own, q_ids, arrived = more[len(names) :]
        row, head, block, group = map(jax.lax.axis_index, ("row", "head", "block", "group"))
        first, count = steps(plan, refs, row, block)
        mine = block * GROUPS + group
        queries, slopes, logs, own, q_ids, arrived = (x.at[group] for x in (queries, slopes, logs, own, q_ids, arrived))

        def compute(run: Any) -> None:
            part = pl.ds(mine * ROWS, ROWS)
            mg.copy_gmem_to_smem(q_ref.at[row, part, head], queries, arrived)
            mg.copy_gmem_to_smem(slope_ref.at[row, part, head], slopes, arrived)
            mg.copy_gmem_to_smem(logs_ref.at[row, head, part], logs, arrived)
            mg.copy_gmem_to_smem(own_ref.at[row, head, part], own, arrived)
            if plan.ids:
                mg.copy_gmem_to_smem(refs["q_ids"].at[row, part], q_ids, arrived)
            mg.barrier_wait(arrived)
            total = run(jnp.zeros((ROWS, d), jnp.float32))
            queries[...] = total.astype(q.dtype)
            mg.commit_smem()
            mg.copy_smem_to_gmem(queries, out.at[row, part, head])
            mg.wait_smem_to_gmem(0)

        def tile(at: Any, keys: Any, values: Any, *more: Any) -> Any:
            k_ids, (keys_used, values_used, *ids_used), total = parted(more, plan.ids)

            def multiply(raw: Any, dw: Any) -> Any:
                mg.wgmma(raw, queries, keys.transpose((1, 0)))
                mg.wgmma(dw, slopes, values.transpose((1, 0)))
                return raw[...], dw[...]

            raw, dw = pl.run_scoped(multiply, *[mg.ACC(one.tile, jnp.float32)] * 2)
            mg.barrier_arrive(values_used)
            facts = facts_of(one, refs, row, head, q_ids, *k_ids)
            wide = [along(x[...], one.tile, 0) for x in (logs, own)]
            _, _, du = slopes_of(one, raw, mine, first + at[0], facts, not plan.masked, wide[0], wide[1], dw)
            for used in ids_used:
                mg.barrier_arrive(used)
            half = du.astype(q.dtype)
            total = pl.run_state(lambda acc: mg.wgmma(acc, half, keys))(mg.ACC.init(total))
            mg.barrier_arrive(keys_used)
            return total

        fetched = keys_and_values(plan, refs, k_ref, v_ref, row, jax.lax.div(head, jnp.int32(shared)), first)
        stream(tile, compute, (count,), fetched, held(d))

    made = mg.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            *[mg.SMEM((GROUPS, ROWS, d), q.dtype)] * 2,
            *[mg.SMEM((GROUPS, ROWS), jnp.float32)] * 2,
            mg.SMEM((GROUPS, ROWS), jnp.int32),
            mg.Barrier(num_barriers=GROUPS, num_arrivals=4 + plan.ids),
        ],
        **programs(h, tp // (GROUPS * ROWS), b),
    )
    arrays = [given[name] for name in ("q", "k", "v", "slope", "logs", "own")]
    return made(*arrays, *(given[name] for name in names))


def slopes_of_keys(plan: Plan, given: dict[str, jax.Array], wanted: tuple[str, ...]) -> list[jax.Array]:
    """Slopes of keys, of values or of both [B, S', K, D]: they stay, queries of all heads that share them come by."""
    mg = mosaic()
    k = given["k"]
    b, sp, heads, d = k.shape
    shared = given["q"].shape[2] // heads
    given = bounded(plan, given, of_keys=True)
    names = beside(given)
    one = replace(plan, keys=ROWS, turned=True)
    streamed = [name for name in ("q", "slope", "logs", "own") if name != "own" or "k" in wanted]
    stay = ("k", "v") if "k" in wanted else ("k",)

    def kernel(*all_refs: Any) -> None:
        arrays = dict(zip((*stay, *streamed, *names), all_refs, strict=False))
        more = list(all_refs[len(arrays) :])
        outs, kept, (k_ids, arrived) = more[: len(wanted)], more[len(wanted) : -2], more[-2:]
        row, head, block, group = map(jax.lax.axis_index, ("row", "head", "block", "group"))
        first, count = steps(plan, arrays, row, block, of_keys=True)
        mine = block * GROUPS + group
        own = dict(zip(stay, (x.at[group] for x in kept), strict=True))
        k_ids, arrived = k_ids.at[group], arrived.at[group]

        def compute(run: Any) -> None:
            part = pl.ds(mine * ROWS, ROWS)
            for name in stay:
                mg.copy_gmem_to_smem(arrays[name].at[row, part, head], own[name], arrived)
            if plan.ids:
                mg.copy_gmem_to_smem(arrays["k_ids"].at[row, part], k_ids, arrived)
            mg.barrier_wait(arrived)
            found = run(tuple(jnp.zeros((ROWS, d), jnp.float32) for _ in wanted))
            for total, place, out in zip(found, own.values(), outs, strict=False):
                place[...] = total.astype(k.dtype)
                mg.commit_smem()
                mg.copy_smem_to_gmem(place, out.at[row, part, head])
            mg.wait_smem_to_gmem(0)

        def tile(at: Any, *more: Any) -> Any:
            parts, used, carry = parted(more, len(streamed) + plan.ids)
            of, free = dict(zip(streamed, parts, strict=False)), dict(zip(streamed, used, strict=False))
            q_ids, ids_used = parts[len(streamed) :], used[len(streamed) :]
            totals = dict(zip(wanted, carry, strict=True))
            facts = facts_of(one, arrays, row, head * shared + at[0], q_ids[0] if q_ids else None, k_ids)
            logs = along(of["logs"][...], one.tile, 1)
            place = first + at[1], mine, facts, not plan.masked

            if "k" in wanted:

                def multiply(raw: Any, dw: Any) -> Any:
                    mg.wgmma(raw, own["k"], of["q"].transpose((1, 0)))
                    mg.wgmma(dw, own["v"], of["slope"].transpose((1, 0)))
                    return raw[...], dw[...]

                raw, dw = pl.run_scoped(multiply, *[mg.ACC(one.tile, jnp.float32)] * 2)
                weights, _, du = slopes_of(one, raw, *place, logs, along(of["own"][...], one.tile, 1), dw)
            else:

                def product(raw: Any) -> Any:
                    mg.wgmma(raw, own["k"], of["q"].transpose((1, 0)))
                    return raw[...]

                weights, _ = weights_of(one, pl.run_scoped(product, mg.ACC(one.tile, jnp.float32)), *place, logs)
            for name in streamed[2:]:
                mg.barrier_arrive(free[name])
            for barrier in ids_used:
                mg.barrier_arrive(barrier)
            if "v" in wanted:
                half = weights.astype(k.dtype)
                totals["v"] = pl.run_state(lambda acc: mg.wgmma(acc, half, of["slope"]))(mg.ACC.init(totals["v"]))
            mg.barrier_arrive(free["slope"])
            if "k" in wanted:
                turned = du.astype(k.dtype)
                totals["k"] = pl.run_state(lambda acc: mg.wgmma(acc, turned, of["q"]))(mg.ACC.init(totals["k"]))
            mg.barrier_arrive(free["q"])
            return tuple(totals.values())

        fetched: dict[str, Any] = {}
        for name in streamed:
            spec: Any
            if name in ("q", "slope"):
                spec = (plan.rows, None, d), lambda g, i: (first + i, head * shared + g, 0)
            else:
                spec = (None, plan.rows), lambda g, i: (head * shared + g, first + i)
            fetched[name] = arrays[name].at[row], *spec
        if plan.ids:
            fetched["ids"] = arrays["q_ids"].at[row], (plan.rows,), lambda g, i: (first + i,)
        stream(tile, compute, (shared, count), fetched, held(d))

    made = mg.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype) for _ in wanted],
        scratch_types=[
            *[mg.SMEM((GROUPS, ROWS, d), k.dtype) for _ in stay],
            mg.SMEM((GROUPS, ROWS), jnp.int32),
            mg.Barrier(num_barriers=GROUPS, num_arrivals=len(stay) + plan.ids),
        ],
        **programs(heads, sp // (GROUPS * ROWS), b),
    )
    return made(*(given[name] for name in (*stay, *streamed, *names)))


# --- what the three share


def mosaic() -> Any:
    """Mosaic GPU's part of Pallas, which not every build of JAX has."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def programs(heads: int, blocks: int, rows: int) -> dict[str, Any]:
    """A program a head, block and row, of warp groups that compute and one that fetches."""
    mg = mosaic()
    return {
        "grid": (heads, blocks, rows),
        "grid_names": ("head", "block", "row"),
        "num_threads": GROUPS + 1,
        "thread_name": "group",
        "compiler_params": mg.CompilerParams(approx_math=True, lowering_semantics=mg.LoweringSemantics.Warpgroup),
    }


def stream(tile: Any, compute: Any, grid: tuple[Any, ...], fetched: dict[str, Any], stages: int = STAGES) -> None:
    """Runs `tile` for all steps of the grid, on blocks (array, shape, index map) that the last warp group fetches."""
    mg = mosaic()
    run = mg.emit_pipeline_warp_specialized(
        tile,
        grid=grid,
        max_concurrent_steps=stages,
        num_compute_wgs=GROUPS,
        memory_registers=40,
        wg_axis="group",
        manual_consumed_barriers=True,
        compute_context=compute,
        in_specs=[mg.BlockSpec(block_shape=shape, index_map=at) for _, shape, at in fetched.values()],
    )
    run(*(array for array, _, _ in fetched.values()))


def keys_and_values(
    plan: Plan, refs: dict[str, Any], k: Any, v: Any, row: Any, head: Any, first: Any
) -> dict[str, Any]:
    """What `stream` fetches where queries stay: blocks of keys, values and segments of a row, from the first needed."""
    shape = plan.keys, k.shape[-1]
    parts: dict[str, Any] = {
        x: (ref.at[row, :, head, :], shape, lambda j: (first + j, 0)) for x, ref in (("k", k), ("v", v))
    }
    return parts | ({"ids": (refs["k_ids"].at[row], shape[:1], lambda j: (first + j,))} if plan.ids else {})


def held(channels: int) -> int:
    """Tiles of the backward pass that shared memory has room for at once."""
    return 1 if channels >= ONE_STAGE else STAGES


def parted(more: tuple[Any, ...], n: int) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    """What a step of a pipeline is given, of which the first n are blocks: (blocks, barriers, carry)."""
    return more[:n], more[n:-1], more[-1]


def bounded(plan: Plan, given: dict[str, jax.Array], *, of_keys: bool = False) -> dict[str, jax.Array]:
    """With the first and last but one block that each block needs, if that takes a look at all segments."""
    if not plan.ids:
        return given
    found = needed(plan, {**given, **spans(plan, given)}, of_keys=of_keys)["bounds"]
    return {**given, "bounds": found.reshape(len(given["q"]), -1, 2)}


def beside(given: dict[str, jax.Array]) -> list[str]:
    """Names of arrays that kernels read as they need them."""
    return [name for name in ("numbers", "sinks", "edges", "learned", "q_ids", "k_ids", "bounds") if name in given]


def steps(plan: Plan, refs: dict[str, Any], row: Any, block: Any, *, of_keys: bool = False) -> tuple[Any, Any]:
    """First block that a pair of warp groups fetches, and how many: those that either of the two needs."""
    if plan.ids:
        first, last = (refs["bounds"][row, block, n] for n in range(2))
    else:
        numbers = (refs["numbers"][row, n] for n in range(3))
        first, *_, last = (query_blocks if of_keys else key_blocks)(plan, block, *numbers)
    return first, jnp.maximum(last - first, 0)


def facts_of(one: Plan, refs: dict[str, Any], row: Any, head: Any, q_ids: Any = None, k_ids: Any = None) -> Facts:
    """Of one row and head, with the segments of a tile's queries and keys."""

    def learned(r: Any) -> Any:
        return refs["learned"][head, r]

    offset, end, prefix = (refs["numbers"][row, n] for n in range(3))
    return Facts(
        offset,
        end,
        prefix,
        along(q_ids[...], one.tile, int(one.turned)) if one.ids else None,
        along(k_ids[...], one.tile, int(not one.turned)) if one.ids else None,
        slope=learned(0) if one.slopes else None,
        edge=lambda r: refs["edges"][r],
        value=learned,
        below=lambda far: sum((refs["edges"][r] <= far).astype(jnp.int32) for r in range(one.steps)),
    )


def along(x: Any, shape: tuple[int, ...], axis: int) -> Any:
    """A vector along an axis of that shape, the same on the other."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


KERNELS = Kernels(forward, backward)
