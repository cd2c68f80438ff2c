"""Attention on Hopper by way of Mosaic GPU: tensor-core products straight from shared memory, copies by TMA.

A program is two warp groups with a block of queries each, and a third that does nothing but fetch keys and values (Shah
et al. 2024, arXiv:2407.08608). While one of the two multiplies, the other makes weights of its scores: they take turns
at a barrier. The backward pass is that of `pallas_gpu`.

The interpreter refuses these instructions, so that off a device the kernel is only lowered. It is not chosen by itself
before the tests have passed on one (`PROVEN`).
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
    NOTHING,
    Facts,
    Kernels,
    Plan,
    attend,
    key_blocks,
    needed,
    plan_of,
    scores,
    spans,
)
from formax.layers.attention.problem import Problem, target

PROVEN = False  # tests/test_attention_backends.py on a Hopper
GROUPS = 2  # warp groups that compute
ROWS = 64  # queries of a warp group
KEYS = {64: 128, 96: 128, 128: 128, 256: 64}  # of a tile, by channels: what shared memory and registers hold
STAGES = 2  # tiles of keys that are held at once


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
    mg = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    q, k, v = (given[name] for name in "qkv")
    b, tp, h, d = q.shape
    shared = h // k.shape[2]
    if plan.ids:  # which keys it needs takes a look at all segments
        found = needed(plan, {**given, **spans(plan, given)})["bounds"]
        given = {**given, "bounds": found.reshape(b, -1, 2)}
    names = [name for name in ("numbers", "sinks", "edges", "learned", "q_ids", "k_ids", "bounds") if name in given]
    one, tile_of = replace(plan, rows=ROWS), (ROWS, plan.keys)  # a warp group's tile

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, *more: Any) -> None:
        refs = dict(zip(names, more, strict=False))
        out, logs, own, own_logs, own_ids, arrived, turn = more[len(names) :]
        numbers = refs["numbers"]
        row, head, group = jax.lax.axis_index("row"), jax.lax.axis_index("head"), jax.lax.axis_index("group")
        block = jax.lax.axis_index("block")
        offset, end, prefix = (numbers[row, n] for n in range(3))
        if plan.ids:
            first, last = (refs["bounds"][row, block, n] for n in range(2))
        else:
            first, *_, last = key_blocks(plan, block, offset, end, prefix)
        # Both warp groups see the same tiles: those that either of them needs.
        count = jnp.maximum(last - first, 0)
        mine = block * GROUPS + group

        def take_turns() -> None:
            mg.barrier_arrive(turn)
            mg.barrier_wait(turn)

        def compute(run: Any) -> None:
            queries = own.at[group]
            mg.copy_gmem_to_smem(q_ref.at[row, pl.ds(mine * ROWS, ROWS), head], queries, arrived.at[group])
            mg.barrier_wait(arrived.at[group])
            if plan.ids:
                mg.copy_gmem_to_smem(
                    refs["q_ids"].at[row, pl.ds(mine * ROWS, ROWS)], own_ids.at[group], arrived.at[group]
                )
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
            queries[...] = (sums / jax.lax.broadcast_in_dim(total, sums.shape, [0])).astype(q.dtype)
            mg.commit_smem()
            mg.copy_smem_to_gmem(queries, out.at[row, pl.ds(mine * ROWS, ROWS), head])
            mg.copy_smem_to_gmem(own_logs.at[group], logs.at[row, head, pl.ds(mine * ROWS, ROWS)])
            mg.wait_smem_to_gmem(0)

        def learned(r: Any) -> Any:
            return refs["learned"][head, r]

        def tile(at: Any, keys: Any, values: Any, *more: Any) -> Any:
            n = len(parts) - 2  # what is fetched beside keys and values
            k_ids, (keys_used, values_used, *ids_used), carry = more[:n], more[n:-1], more[-1]
            sums, most, total = carry
            j = first + at[0]

            def multiply(acc: Any) -> Any:
                mg.wgmma(acc, own.at[group], keys.transpose((1, 0)))
                take_turns()  # the tensor cores are the other's now
                return acc[...]

            raw = pl.run_scoped(multiply, mg.ACC(tile_of, jnp.float32))
            mg.barrier_arrive(keys_used)
            facts = Facts(
                offset,
                end,
                prefix,
                jax.lax.broadcast_in_dim(own_ids.at[group][...], tile_of, [0]) if plan.ids else None,
                jax.lax.broadcast_in_dim(k_ids[0][...], tile_of, [1]) if plan.ids else None,
                slope=learned(0) if plan.slopes else None,
                edge=lambda r: refs["edges"][r],
                value=learned,
                below=lambda far: sum((refs["edges"][r] <= far).astype(jnp.int32) for r in range(plan.steps)),
            )
            found, _, seen = scores(one, raw, mine, j, facts, whole=not plan.masked)
            for used in ids_used:
                mg.barrier_arrive(used)
            if seen is not None:
                found = jnp.where(seen, found, NOTHING)
            new = jnp.maximum(most, found.max(axis=1))
            weights = jnp.exp(found - jax.lax.broadcast_in_dim(new, found.shape, [0]))
            if seen is not None:
                weights = jnp.where(seen, weights, 0.0)
            fade = jnp.exp(most - new)
            sums = sums * jax.lax.broadcast_in_dim(fade, sums.shape, [0])
            half = weights.astype(q.dtype)
            take_turns()
            total = fade * total + weights.sum(axis=1)
            sums = pl.run_state(lambda acc: mg.wgmma(acc, half, values))(mg.ACC.init(sums))
            mg.barrier_arrive(values_used)
            return sums, new, total

        part = mg.BlockSpec(block_shape=(plan.keys, d), index_map=lambda j: (first + j, 0))
        parts = [part, part]
        if plan.ids:
            parts.append(mg.BlockSpec(block_shape=(plan.keys,), index_map=lambda j: (first + j,)))
        run = mg.emit_pipeline_warp_specialized(
            tile,
            grid=(count,),
            max_concurrent_steps=STAGES,
            num_compute_wgs=GROUPS,
            memory_registers=40,
            wg_axis="group",
            manual_consumed_barriers=True,
            compute_context=compute,
            in_specs=parts,
        )
        of_keys = jax.lax.div(head, jnp.int32(shared))
        arrays = [k_ref.at[row, :, of_keys, :], v_ref.at[row, :, of_keys, :]]
        run(*arrays, *([refs["k_ids"].at[row]] if plan.ids else []))

    made = mg.kernel(
        kernel,
        grid=(h, tp // (GROUPS * ROWS), b),
        grid_names=("head", "block", "row"),
        num_threads=GROUPS + 1,
        thread_name="group",
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, tp), jnp.float32)],
        scratch_types=[
            mg.SMEM((GROUPS, ROWS, d), q.dtype),
            mg.SMEM((GROUPS, ROWS), jnp.float32),
            mg.SMEM((GROUPS, ROWS), jnp.int32),
            mg.Barrier(num_barriers=GROUPS),
            mg.Barrier(num_arrivals=GROUPS),
        ],
        compiler_params=mg.CompilerParams(approx_math=True, lowering_semantics=mg.LoweringSemantics.Warpgroup),
    )
    return made(q, k, v, *(given[name] for name in names))


KERNELS = Kernels(forward, pallas_gpu.backward)
