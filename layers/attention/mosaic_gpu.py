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
from formax.layers.attention.kernel import NOTHING, Facts, Kernels, Plan, attend, key_blocks, plan_of, scores
from formax.layers.attention.problem import Problem, target

PROVEN = False  # tests/test_attention_backends.py on a Hopper
GROUPS = 2  # warp groups that compute
ROWS, KEYS = 64, 128  # queries of a warp group, keys of a tile
STAGES = 2  # tiles of keys that are held at once


def supports(p: Problem) -> str | None:
    """Half precision, heads of 64 or 128 channels, masks and biases without arrays."""
    if importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None:
        return f"jax {jax.__version__} has no Mosaic GPU"
    if jax.default_backend() == "gpu" and not (capability := jax.devices()[0].compute_capability).startswith("9."):
        return f"is for Hopper (compute capability 9), this is {capability}"
    if target().interpret:
        return "the interpreter knows no warp-group products"
    if p.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 and float16, not {p.q.dtype}"
    d, dv = p.q.shape[3], p.v.shape[3]
    if d != dv or d not in (64, 128):
        return f"heads of {d} and {dv} channels; both must be 64 or 128"
    if p.dropout:
        return "drops no weights"
    m = p.mask
    if m.dense is not None or m.keys is not None or m.segments is not None:
        return "a mask with arrays (dense, keys, segments) is not fetched"
    if p.bias is not None:
        return "adds up no bias"
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
    plan = plan_of(p, GROUPS * ROWS, KEYS)
    return attend(KERNELS, p, plan)


def forward(plan: Plan, interpret: bool, given: dict[str, jax.Array]) -> Any:
    """Sums [B, T', H, D] and the logarithms of their denominators [B, H, T']."""
    mg = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    q, k, v = (given[name] for name in "qkv")
    b, tp, h, d = q.shape
    shared = h // k.shape[2]
    sinks = given.get("sinks", jnp.zeros((h, 1), jnp.float32))
    one = replace(plan, rows=ROWS)  # a warp group's tile

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, numbers: Any, sinks: Any, out: Any, logs: Any, *scratch: Any
    ) -> None:
        own, own_logs, arrived, turn = scratch
        row, head, group = jax.lax.axis_index("row"), jax.lax.axis_index("head"), jax.lax.axis_index("group")
        block = jax.lax.axis_index("block")
        offset, end, prefix = (numbers[row, n] for n in range(3))
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
            start = sinks[head, 0] if plan.sinks else jnp.float32(NOTHING)
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

        def tile(at: Any, keys: Any, values: Any, keys_used: Any, values_used: Any, carry: Any) -> Any:
            sums, most, total = carry
            j = first + at[0]

            def multiply(acc: Any) -> Any:
                mg.wgmma(acc, own.at[group], keys.transpose((1, 0)))
                take_turns()  # the tensor cores are the other's now
                return acc[...]

            raw = pl.run_scoped(multiply, mg.ACC((ROWS, KEYS), jnp.float32))
            mg.barrier_arrive(keys_used)
            found, _, seen = scores(one, raw, mine, j, Facts(offset, end, prefix), whole=not plan.masked)
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

        part = mg.BlockSpec(block_shape=(KEYS, d), index_map=lambda j: (first + j, 0))
        run = mg.emit_pipeline_warp_specialized(
            tile,
            grid=(count,),
            max_concurrent_steps=STAGES,
            num_compute_wgs=GROUPS,
            memory_registers=40,
            wg_axis="group",
            manual_consumed_barriers=True,
            compute_context=compute,
            in_specs=[part, part],
        )
        of_keys = jax.lax.div(head, jnp.int32(shared))
        run(k_ref.at[row, :, of_keys, :], v_ref.at[row, :, of_keys, :])

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
            mg.Barrier(num_barriers=GROUPS),
            mg.Barrier(num_arrivals=GROUPS),
        ],
        compiler_params=mg.CompilerParams(approx_math=True, lowering_semantics=mg.LoweringSemantics.Warpgroup),
    )
    return made(q, k, v, given["numbers"], sinks)


KERNELS = Kernels(forward, pallas_gpu.backward)
