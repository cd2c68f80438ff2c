"""What the Pallas kernels share: one call of attention as static facts and arrays, both passes, and one tile's scores.

A tile is `rows` queries by `keys` keys of one row and head. Nothing here knows the chip: kernels bring the arrays'
parts as values (`Facts`), and get scores, who is seen, and the slopes of the terms' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from formax.layers.attention.bias import ALiBi, Bucketed, by_pairs
from formax.layers.attention.problem import Problem, target

NOTHING = -1e30  # the score of a pair that is not seen
DEAD = np.int32(-(2**31))  # the segment of keys that do not exist
FAR = np.int32(2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Which tiles there are, as far as it is known when a program is made.

    Attributes:
        t: number of queries.
        s: number of keys.
        rows: queries of a tile.
        keys: keys of a tile.
        scale: factor on the scores.
        softcap: of the scores.
        causal: as in `Mask`; `left`, `right`, `dilation`, too.
        prefix: there is one.
        bounded: keys end before the last tile does, or by row.
        shared: rows that are one query's, those of heads that share keys; more than one in decoding.
    """

    t: int
    s: int
    rows: int
    keys: int
    scale: float
    softcap: float | None
    causal: bool
    left: int | None
    right: int | None
    dilation: int
    prefix: bool
    bounded: bool
    shared: int = 1

    @property
    def blocks(self) -> tuple[int, int]:
        """Tiles along the queries, and along the keys."""
        return -(-self.t // self.rows), -(-self.s // self.keys)

    @property
    def padded(self) -> tuple[int, int]:
        """Lengths that the tiles make up."""
        return self.blocks[0] * self.rows, self.blocks[1] * self.keys

    @property
    def plain(self) -> bool:
        """Whether a tile is seen whole unless its edges say otherwise."""
        return self.dilation == 1


@dataclass(frozen=True, kw_only=True)
class Plan(Tiles):
    """What is known of all tiles when a kernel is made.

    Attributes:
        ids: queries and keys have segments.
        pairs: which of "dense" (booleans) and "added" (terms) there are.
        slopes: "one way" or "both ways" for ALiBi.
        steps: edges of a bias that is constant between them (0 for none), filled up to `width` numbers.
        width: of what is learned of a bias by distance, a power of two.
        sinks: there are some.
        heads: columns that are one key's, those of several heads, of which a row sees its own; then `Facts` say what
            is where.
        turned: a tile is keys by queries, and so is all that `Facts` have of it.
    """

    ids: bool
    pairs: tuple[str, ...]
    slopes: str | None
    steps: int
    width: int
    sinks: bool
    heads: int = 1
    turned: bool = False

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile's scores."""
        return (self.keys, self.rows) if self.turned else (self.rows, self.keys * self.heads)

    @property
    def masked(self) -> bool:
        """Whether any pair may not be seen."""
        bound = self.left is not None or self.right is not None
        return self.causal or bound or self.bounded or not self.plain

    @property
    def plain(self) -> bool:
        return super().plain and not self.ids and "dense" not in self.pairs and self.heads == 1


@dataclass(frozen=True)
class Facts:
    """Of one row and head, and of one tile where it says so.

    Attributes:
        offset: position of the first query.
        end: number of keys.
        prefix: keys that all see.
        q_ids: [rows, 1] segments of the tile's queries.
        k_ids: [1, keys] segments of the tile's keys.
        dense: [rows or 1, keys or 1] of the tile, not zero where pairs are seen.
        added: [rows or 1, keys or 1] of the tile, terms.
        slope: ALiBi's, of all rows or [rows, 1].
        edge: `edge(r)`, the distance from which value r + 1 holds.
        value: `value(r)` between edges, of all rows or [rows, 1].
        below: `below(d)`, how many edges are not above d.
        query: [rows, 1] number of each row's query, where columns are of several heads.
        key: [1, columns] number in the tile of each column's key, likewise.
        heads: [rows, 1] and [1, columns] whose they are, likewise.
    """

    offset: Any
    end: Any
    prefix: Any = None
    q_ids: Any = None
    k_ids: Any = None
    dense: Any = None
    added: Any = None
    slope: Any = None
    edge: Callable[[Any], Any] | None = None
    value: Callable[[Any], Any] | None = None
    below: Callable[[Any], Any] | None = None
    query: Any = None
    key: Any = None
    heads: tuple[Any, Any] | None = None


def tiles_of(p: Problem, rows: int, keys: int) -> dict[str, Any]:
    """What `Tiles` of so many queries and keys have, for a call."""
    m, (_, t, s, _, _) = p.mask, p.sizes
    left, right = m.window or (None, None)
    return {"t": t, "s": s, "rows": rows, "keys": keys, "scale": p.scale, "softcap": p.softcap, "causal": m.causal,
            "left": left, "right": right, "dilation": m.dilation, "prefix": m.prefix is not None,
            "bounded": m.kv_length is not None or s % keys > 0}  # fmt: skip


def plan_of(p: Problem, rows: int, keys: int) -> Plan:
    """The static part of a call, for tiles of so many queries and keys."""
    pairs = ("dense",) * (p.mask.dense is not None)
    slopes, steps = None, 0
    match p.bias:
        case None:
            pass
        case ALiBi(both_ways=both):
            slopes = "both ways" if both else "one way"
        case Bucketed():
            steps = len(p.bias.steps()[0])
        case _:
            pairs += ("added",)
    width = max(16, 1 << steps.bit_length())
    ids, sinks = p.mask.segments is not None or p.mask.keys is not None, p.sinks is not None
    tiles = tiles_of(p, rows, keys)
    return Plan(**tiles, ids=ids, pairs=pairs, slopes=slopes, steps=steps, width=width, sinks=sinks)


def operands(p: Problem, plan: Plan) -> dict[str, jax.Array]:
    """The arrays beside q, k and v, by name; what a plan does not have is missing.

    `numbers` [B, 4]: offset, end and prefix. `q_ids` [B, T'], `k_ids` [B, S']. `dense` (8-bit) and `added` [B or 1,
    H or 1, T' or 1, S' or 1]. `learned` [H, width]: values between `edges` [width], or one slope. `sinks` [H, 1].
    """
    m, (_, t, s, h, _) = p.mask, p.sizes
    found = {"numbers": numbers_of(p), **ids_of(p, plan)}
    if "dense" in plan.pairs:
        found["dense"] = filled(m.dense, plan.padded).astype(jnp.int8)
    if p.bias is not None and "added" in plan.pairs:
        found["added"] = filled(by_pairs(p.bias, t, s), plan.padded)
    if isinstance(p.bias, ALiBi):
        found["learned"] = jnp.pad(p.bias.slopes.astype(jnp.float32)[:, None], ((0, 0), (0, plan.width - 1)))
    if isinstance(p.bias, Bucketed):
        edges, values = p.bias.steps()
        found["edges"] = jnp.asarray([*edges, *[FAR] * (plan.width - len(edges))], jnp.int32)
        found["learned"] = jnp.pad(values.astype(jnp.float32), ((0, 0), (0, plan.width - values.shape[1])))
    if p.sinks is not None:
        found["sinks"] = p.sinks.astype(jnp.float32).reshape(h, 1)
    return found


def numbers_of(p: Problem) -> jax.Array:
    """Position of the first query, number of keys, and length of the prefix of each row, and a zero: [B, 4]."""
    m, (b, _, s, _, _) = p.mask, p.sizes
    given = m.q_offset, s if m.kv_length is None else jnp.minimum(m.kv_length, s), 0 if m.prefix is None else m.prefix
    columns = [jnp.broadcast_to(jnp.asarray(x, jnp.int32).reshape(-1), b) for x in (*given, 0)]
    return jnp.stack(columns, axis=1)


def ids_of(p: Problem, tiles: Tiles) -> dict[str, jax.Array]:
    """Segments, if there are any, as long as the tiles are: `q_ids`, `k_ids`, of keys that do not exist `DEAD`."""
    m, (b, t, s, _, _), (tp, sp) = p.mask, p.sizes, tiles.padded
    if m.segments is None and m.keys is None:
        return {}
    of_q, of_k = m.segments or (jnp.zeros((1, t), jnp.int32), jnp.zeros((1, s), jnp.int32))
    of_k = of_k.astype(jnp.int32) if m.keys is None else jnp.where(m.keys, of_k.astype(jnp.int32), DEAD)
    of_q, of_k = (jnp.broadcast_to(x, (b, x.shape[1])) for x in (of_q.astype(jnp.int32), of_k))
    return {
        "q_ids": jnp.pad(of_q, ((0, 0), (0, tp - t)), mode="edge"),
        "k_ids": jnp.pad(of_k, ((0, 0), (0, sp - s)), constant_values=DEAD),
    }


def spans(tiles: Tiles, given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The least and the largest segment of each block, `q_span` and `k_span` [B, blocks, 2], if there are segments."""
    if "q_ids" not in given:
        return {}
    of_q, of_k = (
        given[name].reshape(len(given[name]), -1, n) for name, n in (("q_ids", tiles.rows), ("k_ids", tiles.keys))
    )
    least = jnp.where(of_k == DEAD, FAR, of_k).min(-1)
    return {"q_span": jnp.stack([of_q.min(-1), of_q.max(-1)], -1), "k_span": jnp.stack([least, of_k.max(-1)], -1)}


def filled(x: Any, padded: tuple[int, int]) -> jax.Array:
    """Something of all pairs, with four axes and as long as the tiles are."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    (tp, sp), (t, s) = padded, x.shape[2:]
    return jnp.pad(x, ((0, 0), (0, 0), (0, tp - t if t > 1 else 0), (0, sp - s if s > 1 else 0)))


def lengthened(x: jax.Array, length: int) -> jax.Array:
    """[B, T, H, D] with zeros after the last position, as long as the tiles are."""
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


# --- which tiles there are


def key_blocks(plan: Tiles, i: Any, offset: Any, end: Any, prefix: Any) -> tuple[Any, Any, Any, Any]:
    """Blocks of keys that block i of queries sees: (first, first whole, last whole + 1, last + 1).

    Those between the second and the third are seen whole, the others in part; where nothing is plain, none is whole.
    """
    first = offset + div(i * plan.rows, plan.shared)
    last = offset + div(i * plan.rows + plan.rows - 1, plan.shared)
    start, stop = jnp.int32(0), end
    whole_from, whole_to = jnp.int32(0), end
    if plan.causal:
        stop = jnp.minimum(stop, jnp.maximum(last + 1, prefix) if plan.prefix else last + 1)
        whole_to = jnp.minimum(whole_to, jnp.maximum(first + 1, prefix) if plan.prefix else first + 1)
    if plan.right is not None:
        stop, whole_to = jnp.minimum(stop, last + plan.right + 1), jnp.minimum(whole_to, first + plan.right + 1)
    if plan.left is not None:
        start, whole_from = jnp.maximum(0, first - plan.left), jnp.maximum(0, last - plan.left)
    start, stop = div(start, plan.keys), div(jnp.maximum(stop, 0) + plan.keys - 1, plan.keys)
    if not plan.plain:
        return start, stop, stop, stop
    whole_from = jnp.clip(div(whole_from + plan.keys - 1, plan.keys), start, jnp.maximum(start, stop))
    return start, whole_from, jnp.clip(div(jnp.maximum(whole_to, 0), plan.keys), whole_from, stop), stop


def query_blocks(plan: Tiles, j: Any, offset: Any, end: Any, prefix: Any) -> tuple[Any, Any]:
    """First and last but one block of queries that see anything of block j of keys."""
    first = j * plan.keys
    start, stop = jnp.int32(0), jnp.int32(plan.t)
    if plan.causal:
        start = first - offset
        start = jnp.where(first < prefix, 0, start) if plan.prefix else start
    if plan.right is not None:
        start = jnp.maximum(start, first - plan.right - offset)
    if plan.left is not None:
        stop = jnp.minimum(stop, first + plan.keys + plan.left - offset)
    stop = jnp.where(first < end, stop, 0)
    return div(jnp.maximum(start, 0), plan.rows), div(jnp.maximum(stop, 0) + plan.rows - 1, plan.rows)


def needed(plan: Plan, given: Mapping[str, jax.Array], *, of_keys: bool = False) -> dict[str, jax.Array]:
    """`bounds`, first and last but one block that each block needs, and `whole`, keys that are seen whole: [n].

    From `numbers` and, if there are segments, `spans`: for blocks of queries in each row, or `of_keys`.
    """
    queries, keys = plan.blocks
    offset, end, prefix = (given["numbers"][:, n, None] for n in range(3))
    of_queries = key_blocks(plan, jnp.arange(queries), offset, end, prefix)
    bounds = query_blocks(plan, jnp.arange(keys), offset, end, prefix) if of_keys else of_queries[::3]
    start, stop = (jnp.broadcast_to(x, (len(given["numbers"]), plan.blocks[of_keys])) for x in bounds)
    if plan.ids:  # the segments may say more
        q, k = (jnp.moveaxis(given[name], -1, 0) for name in ("q_span", "k_span"))
        met = meet(q[:, :, :, None], k[:, :, None])
        met = jnp.moveaxis(met, 1, 2) if of_keys else met
        any_met, first = met.any(-1), jnp.argmax(met, -1)
        last = met.shape[-1] - jnp.argmax(met[..., ::-1], -1)
        start, stop = jnp.maximum(start, first), jnp.where(any_met, jnp.minimum(stop, last), 0)
    found = {"bounds": jnp.stack([start, stop], -1).astype(jnp.int32).reshape(-1)}
    if plan.masked and plan.plain:
        shape = len(given["numbers"]), queries
        found["whole"] = jnp.stack([jnp.broadcast_to(x, shape) for x in of_queries[1:3]], -1).reshape(-1)
    return found


def div(a: Any, b: int) -> Any:
    """The quotient of numbers that are not negative (kernels have no other division)."""
    return a if b == 1 else jax.lax.div(jnp.asarray(a, jnp.int32), jnp.int32(b))


def meet(q_span: Any, k_span: Any) -> Any:
    """Whether segments of a block of queries and of one of keys overlap: pairs of their least and largest."""
    return (q_span[0] <= k_span[1]) & (k_span[0] <= q_span[1])


# --- one tile


def scores(plan: Plan, raw: jax.Array, i: Any, j: Any, facts: Facts, *, whole: bool = False) -> tuple[Any, Any, Any]:
    """Of products [rows, keys] of queries and keys: (scores, those before the bias, who is seen or None for all).

    A tile that is `whole` needs not be asked who is seen.
    """
    capped = raw * plan.scale
    if plan.softcap is not None:
        capped = plan.softcap * jnp.tanh(capped * (1 / plan.softcap))
    out = capped
    shape = plan.tile
    if plan.slopes is not None or plan.steps:
        ahead = _ahead(plan, i, j, facts)
        if plan.slopes is not None:
            out = out + facts.slope * far(plan, ahead)
        else:
            out = out + _between(plan, i, j, ahead, facts)
    if "added" in plan.pairs:
        out = out + facts.added.astype(jnp.float32)
    if whole:
        return out, capped, None
    q = facts.offset + _query(plan, i, facts)
    k = j * plan.keys + _key(plan, facts)
    parts = in_sight(plan, q, k, facts.end, facts.prefix)
    if facts.heads is not None:
        parts.append(jnp.broadcast_to(facts.heads[0], shape) == jnp.broadcast_to(facts.heads[1], shape))
    if plan.ids:
        parts.append(jnp.broadcast_to(facts.q_ids, shape) == jnp.broadcast_to(facts.k_ids, shape))
    if "dense" in plan.pairs:
        parts.append(jnp.broadcast_to(facts.dense.astype(jnp.int32), shape) != 0)
    return out, capped, all_of(parts)


def in_sight(tiles: Tiles, q: Any, k: Any, end: Any, prefix: Any) -> list[Any]:
    """What has to hold for queries at positions q to see keys at k, without arrays."""
    parts = []
    if tiles.causal:
        parts.append((k <= q) | (k < prefix) if tiles.prefix else k <= q)
    if tiles.left is not None:
        parts.append(k >= q - tiles.left)
    if tiles.right is not None:
        parts.append(k <= q + tiles.right)
    if tiles.dilation > 1:
        parts.append(jax.lax.rem(jnp.abs(q - k), jnp.int32(tiles.dilation)) == 0)
    if tiles.bounded:
        parts.append(k < end)
    return parts


def all_of(parts: list[Any]) -> Any:
    """Whether all of these hold; None if there are none."""
    seen = None
    for part in parts:
        seen = part if seen is None else seen & part
    return seen


def _ahead(plan: Plan, i: Any, j: Any, facts: Facts) -> Any:
    """How far each key is after each query: [rows, columns]."""
    return _key(plan, facts) + (j * plan.keys - facts.offset) - _query(plan, i, facts)


def _query(plan: Plan, i: Any, facts: Facts) -> Any:
    """The number of each row's query: [rows, columns]."""
    if facts.query is not None:
        return jnp.broadcast_to(facts.query, plan.tile)
    row = i * plan.rows + jax.lax.broadcasted_iota(jnp.int32, plan.tile, int(plan.turned))
    return row if plan.shared == 1 else div(row, plan.shared)


def _key(plan: Plan, facts: Facts) -> Any:
    """The number in the tile of each column's key: [rows, columns]."""
    if facts.key is not None:
        return jnp.broadcast_to(facts.key, plan.tile)
    return jax.lax.broadcasted_iota(jnp.int32, plan.tile, int(not plan.turned))


def far(plan: Plan, ahead: Any) -> Any:
    """What ALiBi's slope is a factor of."""
    return (-jnp.abs(ahead) if plan.slopes == "both ways" else ahead).astype(jnp.float32)


def _edges(plan: Plan, i: Any, j: Any, facts: Facts) -> tuple[Any, Any]:
    """Edges within a tile: from the first to the last but one. Few tiles have any: far away all is one bucket."""
    first, last = (j * plan.keys - facts.offset - div(i * plan.rows + n, plan.shared) for n in (plan.rows - 1, 0))
    assert facts.below is not None
    return facts.below(first), facts.below(last + plan.keys - 1)


def _between(plan: Plan, i: Any, j: Any, ahead: Any, facts: Facts) -> Any:
    """Terms of a bias that is constant between edges, [rows, columns]."""
    first, last = _edges(plan, i, j, facts)
    edge, value = facts.edge, facts.value
    assert edge is not None
    assert value is not None

    def step(r: Any, out: Any) -> Any:
        return out + jnp.where(ahead >= edge(r), value(r + 1) - value(r), 0.0)

    return jax.lax.fori_loop(first, last, step, jnp.broadcast_to(value(first), plan.tile))


def learned_slopes(plan: Plan, ds: Any, i: Any, j: Any, facts: Facts) -> Any:
    """Slopes of what is learned of a bias by distance, from those of a tile's scores: [rows, keys] -> [1, width]."""
    ahead, place = _ahead(plan, i, j, facts), jax.lax.broadcasted_iota(jnp.int32, (1, plan.width), 1)
    if plan.slopes is not None:
        return jnp.where(place == 0, total(ds * far(plan, ahead)), 0.0)
    first, last = _edges(plan, i, j, facts)
    edge = facts.edge
    assert edge is not None

    def step(r: Any, out: Any) -> Any:  # what lies beyond an edge belongs to the value after it
        beyond = total(jnp.where(ahead >= edge(r), ds, 0.0))
        return out + jnp.where(place == r + 1, beyond, 0.0) - jnp.where(place == r, beyond, 0.0)

    return jax.lax.fori_loop(first, last, step, jnp.where(place == first, total(ds), 0.0))


def total(x: jax.Array) -> jax.Array:
    """The sum of a tile, [1, 1]: one axis after the other, as kernels can."""
    return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True)


def weights_of(plan: Plan, raw: Any, i: Any, j: Any, facts: Facts, whole: bool, logs: Any) -> tuple[Any, Any]:
    """Of a tile, from the logarithms of the denominators: (weights, scores before the bias)."""
    found, capped, seen = scores(plan, raw, i, j, facts, whole=whole)
    weights = jnp.exp(found - logs)
    return (weights if seen is None else jnp.where(seen, weights, 0.0)), capped


def slopes_of(plan: Plan, raw: Any, i: Any, j: Any, facts: Facts, whole: bool, logs: Any, own: Any, dw: Any) -> Any:
    """Of a tile, from the slopes `dw` of its weights: (weights, slopes of the scores, of the products)."""
    weights, capped = weights_of(plan, raw, i, j, facts, whole, logs)
    ds = weights * (dw - own)
    if plan.softcap is None:
        return weights, ds, ds * plan.scale
    bend = capped * (1 / plan.softcap)
    return weights, ds, ds * (plan.scale * (1 - bend * bend))


# --- both passes


@dataclass(frozen=True)
class Kernels:
    """Those of a backend. Arrays are q, k and v [B, T' or S', H or K, D] and what `operands` has, by name.

    Attributes:
        forward: `forward(plan, interpret, arrays)` -> sums [B, T', H, Dv], the logarithms of denominators [B, H, T'].
        backward: `backward(plan, interpret, arrays, wanted)` -> slopes by name, for arrays that have `slope` (of the
            sums), `logs` and `own` (slopes times sums, [B, H, T']), too: of q, k and v, and as `wanted` has it
            "learned" [B, H, blocks, 1, width] and "added" [B, H, T', S'].
    """

    forward: Callable[[Plan, bool, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]
    backward: Callable[[Plan, bool, dict[str, jax.Array], frozenset[str]], dict[str, jax.Array]]


def attend(kernels: Kernels, p: Problem, plan: Plan) -> jax.Array:
    """A call of attention by way of a backend's kernels, with the slopes that they give."""
    given = operands(p, plan)
    tp, sp = plan.padded
    live = {"q": lengthened(p.q, tp), "k": lengthened(p.k, sp), "v": lengthened(p.v, sp)}
    live |= {name: given.pop(name) for name in ("learned", "added", "sinks") if name in given}
    return _attend(kernels, plan, target().interpret, live, given)[:, : plan.t]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(kernels: Kernels, plan: Plan, interpret: bool, live: Any, given: Any) -> jax.Array:
    return kernels.forward(plan, interpret, {**live, **given})[0]


def _remember(kernels: Kernels, plan: Plan, interpret: bool, live: Any, given: Any) -> Any:
    # An empty tuple for a name: what is kept between the passes are arrays.
    wanted = {name: () for name in ("learned", "added") if name in live and live[name].perturbed}
    live, given = ({name: x.value for name, x in each.items()} for each in (live, given))
    out, logs = kernels.forward(plan, interpret, {**live, **given})
    return out, (live, given, out, logs, wanted)


def _backward(kernels: Kernels, plan: Plan, interpret: bool, kept: Any, slope: Any) -> Any:
    live, given, out, logs, wanted = kept
    if isinstance(slope, SymbolicZero):
        return None, None
    own = jnp.einsum("bthd,bthd->bht", slope, out, preferred_element_type=jnp.float32)
    arrays = {**live, **given, "slope": slope, "logs": logs, "own": own}
    found = kernels.backward(plan, interpret, arrays, frozenset(wanted))
    slopes = dict.fromkeys(live) | found
    if "learned" in found:
        slopes["learned"] = found["learned"].sum((0, 2, 3))
    if "added" in found:
        once = tuple(a for a in range(4) if live["added"].shape[a] == 1)
        slopes["added"] = found["added"].sum(once, keepdims=True).astype(live["added"].dtype)
    if "sinks" in live:  # a sink has no value, so that all its slope is the sum's
        slopes["sinks"] = -(jnp.exp(live["sinks"][None] - logs) * own).sum((0, 2))[:, None]
    return slopes, None


_attend.defvjp(_remember, _backward, symbolic_zeros=True)
