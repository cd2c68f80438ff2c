"""A few queries against a long cache on a GPU: the keys are split over programs, whose sums are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from formax.layers.attention import pallas_gpu
from formax.layers.attention.bias import ALiBi
from formax.layers.attention.decode import as_xla_slopes, few_keys, fold_heads, odd_pages, unfold_heads
from formax.layers.attention.kernel import NOTHING, Facts, Plan, key_blocks, operands, plan_of, scores, spans
from formax.layers.attention.pallas_gpu import added, dot, load, triton, unless_apart
from formax.layers.attention.problem import Problem, target

ROWS = 64  # queries of all heads that share keys, at most
KEYS = 128  # of a tile, at most
PROGRAMS = 264  # two for each multiprocessor of a large GPU


def supports(p: Problem) -> str | None:
    """Few queries, without arrays of pairs."""
    reason = pallas_gpu.supports(p) or odd_pages(p)
    if reason is not None:
        return reason
    _, t, s, h, heads = p.sizes
    if t * (h // heads) > ROWS:
        return f"{t} queries of {h // heads} heads that share keys are more than {ROWS} rows"
    if p.mask.dense is not None or not (p.bias is None or isinstance(p.bias, ALiBi)):
        return "adds up no bias but ALiBi's, and reads no dense mask"
    if s % 16:
        return f"{s} keys are no multiple of 16, so that the cache would be copied"
    return None


def suits(p: Problem) -> str | None:
    """Worth it when there is much to read."""
    return few_keys(p)


def attend(p: Problem) -> jax.Array:
    """See `formax.layers.attention.attention`."""
    folded, groups = fold_heads(p)
    _, t, s, heads, _ = folded.sizes
    rows = max(16, pl.next_power_of_2(t))
    keys = p.k.shape[1] if p.table is not None else next(n for n in (KEYS, 64, 32, 16) if s % n == 0)
    plan = replace(plan_of(replace(folded, bias=None, sinks=None), rows, keys), shared=groups)
    given = operands(replace(folded, bias=None, sinks=None), plan)
    if isinstance(p.bias, ALiBi):  # a slope for each row
        plan = replace(plan, slopes="both ways" if p.bias.both_ways else "one way")
        slopes = jnp.tile(p.bias.slopes.astype(jnp.float32).reshape(heads, groups), (1, -(-rows // groups)))
        given["slopes"] = slopes[:, :rows]
    q = jnp.pad(folded.q, ((0, 0), (0, rows - t), (0, 0), (0, 0)))
    arrays = {"q": q, **given, **spans(plan, given), "k": p.k, "v": p.v}
    if p.table is not None:
        arrays["table"] = p.table.astype(jnp.int32)
    out, most, total = _split(plan, target().interpret, arrays)  # [B, K, parts, rows, Dv], [B, K, parts, rows] twice
    if p.sinks is not None:
        own = jnp.tile(p.sinks.astype(jnp.float32).reshape(heads, 1, groups), (1, 1, -(-rows // groups)))[..., :rows]
        own = jnp.broadcast_to(own, (len(out), *own.shape))
        most, total = jnp.concatenate([most, own], 2), jnp.concatenate([total, jnp.ones_like(own)], 2)
        out = jnp.concatenate([out, jnp.zeros((*own.shape, out.shape[-1]))], 2)
    factors = jnp.exp(most - most.max(2, keepdims=True))
    total = (total * factors).sum(2)
    summed = (out * factors[..., None]).sum(2) / jnp.where(total > 0, total, 1)[..., None]
    return unfold_heads(jnp.moveaxis(summed, 1, 2)[:, :t, :, : p.v.shape[3]].astype(p.q.dtype), groups)


attention = as_xla_slopes(attend)


def kernel(plan: Plan, inputs: tuple[str, ...], channels: Mapping[str, int], each: int, *all_refs: Any) -> None:
    """One part of the keys, for all rows: sums that are not divided, the largest scores, the denominators."""
    refs = dict(zip(inputs, all_refs, strict=False))
    out, most_ref, total_ref = all_refs[len(inputs) :]
    offset, end, prefix = (refs["numbers"][n] for n in range(3))
    part = pl.program_id(0)
    q = load(refs["q"], channels["q"])

    def tile(j: Any, carry: Any) -> Any:
        where = pl.ds(j * plan.keys, plan.keys)

        def read(name: str) -> Any:
            if "table" in refs:
                return load(refs[name].at[refs["table"][j]], channels[name])
            return load(refs[name].at[where, :], channels[name])

        def run(carry: Any) -> Any:
            facts = Facts(
                offset,
                end,
                prefix,
                refs["q_ids"][...][:, None] if plan.ids else None,
                refs["k_ids"][where][None] if plan.ids else None,
                slope=refs["slopes"][...][:, None] if plan.slopes else None,
            )
            found, _, seen = scores(plan, dot(q, read("k").T), 0, j, facts, whole=not plan.masked)
            return added(carry, found, seen, read("v"))

        if not plan.ids:
            return run(carry)
        meeting = [[refs["q_span"][n] for n in (0, 1)], [refs["k_span"][j, n] for n in (0, 1)]]
        return unless_apart(meeting, run, carry)

    first, *_, last = key_blocks(plan, 0, offset, end, prefix)
    bounds = jnp.maximum(first, part * each), jnp.minimum(last, (part + 1) * each)
    zero = jnp.zeros((plan.rows, out.shape[-1]), jnp.float32)
    nothing = jnp.full((plan.rows, 1), NOTHING, jnp.float32)
    sums, most, total = jax.lax.fori_loop(*bounds, tile, (zero, nothing, jnp.zeros_like(nothing)))
    out[...] = sums
    most_ref[...] = most[:, 0]
    total_ref[...] = total[:, 0]


def _split(plan: Plan, interpret: bool, given: dict[str, jax.Array]) -> list[jax.Array]:
    """The sums of all parts [B, K, parts, rows, Dv], and their largest scores and denominators [B, K, parts, rows]."""
    b, rows, heads, d = given["q"].shape
    tiles, dv = plan.blocks[1], given["v"].shape[3]
    each = -(-tiles // min(tiles, max(1, -(-PROGRAMS // (b * heads)))))
    parts = -(-tiles // each)
    width, deep = (pl.next_power_of_2(max(16, n)) for n in (d, dv))
    whole, paged = plan.s, "table" in given
    pool = given["k"].shape[:2]

    def cache(wide: int) -> pl.BlockSpec:
        if paged:
            return pl.BlockSpec((*pool, None, wide), lambda i, h, b: (0, 0, h, 0))
        return pl.BlockSpec((None, whole, None, wide), lambda i, h, b: (b, 0, h, 0))

    specs = {
        "q": pl.BlockSpec((None, rows, None, width), lambda i, h, b: (b, 0, h, 0)),
        "k": cache(width),
        "v": cache(deep),
        "table": pl.BlockSpec((None, tiles), lambda i, h, b: (b, 0)),
        "numbers": pl.BlockSpec((None, 4), lambda i, h, b: (b, 0)),
        "q_ids": pl.BlockSpec((None, rows), lambda i, h, b: (b, 0)),
        "k_ids": pl.BlockSpec((None, whole), lambda i, h, b: (b, 0)),
        "q_span": pl.BlockSpec((None, None, 2), lambda i, h, b: (b, 0, 0)),
        "k_span": pl.BlockSpec((None, tiles, 2), lambda i, h, b: (b, 0, 0)),
        "slopes": pl.BlockSpec((None, rows), lambda i, h, b: (h, 0)),
    }
    row = pl.BlockSpec((None, None, None, rows), lambda i, h, b: (b, h, i, 0))
    return pl.pallas_call(
        partial(kernel, plan, tuple(given), {name: given[name].shape[3] for name in ("q", "k", "v")}, each),
        grid=(parts, heads, b),
        in_specs=[specs[name] for name in given],
        out_specs=[pl.BlockSpec((None, None, None, rows, deep), lambda i, h, b: (b, h, i, 0, 0)), row, row],
        out_shape=[
            jax.ShapeDtypeStruct((b, heads, parts, rows, deep), jnp.float32),
            *[jax.ShapeDtypeStruct((b, heads, parts, rows), jnp.float32)] * 2,
        ],
        compiler_params=None if interpret else triton().CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="attention_decode",
    )(*given.values())
