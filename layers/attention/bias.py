"""Terms added to the attention scores, as structure: kernels compute them where they need them.

`ALiBi` and `Bucketed` depend on the distance of key and query alone, so that no T x S table is made; `Indexed` looks
numbers up by pair (two-dimensional positions), and an array [B, H, T, S], or what broadcasts to it, is taken as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.spec import At, Initializer, Param, Spec
from formax.layers.attention.mask import check_pairs


@partial(jax.tree_util.register_dataclass, data_fields=["slopes"], meta_fields=["both_ways"])
@dataclass(frozen=True)
class ALiBi:
    """Scores fall with the distance (Press et al. 2021, arXiv:2108.12409): slope * (key - query) of each head.

    Attributes:
        slopes: [H], usually positive; `alibi_slopes` has the paper's.
        both_ways: keys after the query are as far as those before it; else the later a key the higher its score, which
            only a causal mask makes sense of.
    """

    slopes: jax.Array
    both_ways: bool = False

    def of_distance(self, ahead: jax.Array) -> jax.Array:
        """Terms for keys so many positions after their query: [...] -> [H, ...]."""
        far = -jnp.abs(ahead) if self.both_ways else ahead
        return self.slopes.reshape(-1, *[1] * ahead.ndim) * far


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["max_distance", "both_ways"])
@dataclass(frozen=True)
class Bucketed:
    """A learned number for every bucket of distances and every head (Raffel et al. 2019, arXiv:1910.10683).

    Attributes:
        table: [buckets, H].
        max_distance: distances from this one on share the last bucket.
        both_ways: half of the buckets are for keys after the query; else those are all at distance 0.
    """

    table: jax.Array
    max_distance: int
    both_ways: bool

    def of_distance(self, ahead: jax.Array) -> jax.Array:
        """Terms for keys so many positions after their query: [...] -> [H, ...]."""
        count = self.table.shape[0] // 2 if self.both_ways else self.table.shape[0]
        distance = jnp.abs(ahead) if self.both_ways else jnp.maximum(-ahead, 0)
        found = jnp.take(jnp.asarray(buckets(self.max_distance + 1, count, self.max_distance)), distance, mode="clip")
        if self.both_ways:
            found = found + jnp.where(ahead > 0, count, 0)
        return jnp.moveaxis(jnp.take(self.table, found, axis=0, mode="clip"), -1, 0)

    def steps(self) -> tuple[tuple[int, ...], jax.Array]:
        """The same as a function that is constant between edges: (edges, [H, edges + 1] values).

        Value r holds for keys at least edges[r - 1] and less than edges[r] after their query; the first has no lower
        end, the last no upper one.
        """
        count = self.table.shape[0] // 2 if self.both_ways else self.table.shape[0]
        ahead = np.arange(-self.max_distance, self.max_distance + 1 if self.both_ways else 1)
        found = buckets(self.max_distance + 1, count, self.max_distance)[np.abs(ahead)]
        rows = np.where(ahead > 0, found + count, found) if self.both_ways else found
        starts = np.flatnonzero(np.diff(rows)) + 1
        return tuple(int(d) for d in ahead[starts]), self.table[rows[np.array([0, *starts])]].T


@partial(jax.tree_util.register_dataclass, data_fields=["table", "index"], meta_fields=[])
@dataclass(frozen=True)
class Indexed:
    """A number for every row of a table and every head, looked up by pair: positions of two dimensions.

    Attributes:
        table: [rows, H].
        index: [T, S] integers, the row of each pair.
    """

    table: jax.Array
    index: jax.Array


Bias = ALiBi | Bucketed | Indexed | jax.Array


def check_bias(bias: Bias | None, batch: int, heads: int, t: int, s: int) -> None:
    """Raises ValueError for a bias that is not for so many heads, queries and keys."""
    match bias:
        case ALiBi(slopes=slopes) if slopes.shape != (heads,):
            raise ValueError(f"bias.slopes has shape {slopes.shape}, but there are {heads} heads: [H]")
        case Bucketed(table=table) | Indexed(table=table) if table.ndim != 2 or table.shape[1] != heads:
            raise ValueError(f"bias.table has shape {table.shape}, but there are {heads} heads: [rows, H]")
        case Indexed(index=index) if index.shape != (t, s):
            raise ValueError(f"bias.index has shape {index.shape}, but there are {t} queries and {s} keys: [T, S]")
        case ALiBi() | Bucketed() | Indexed() | None:
            return
        case _:
            check_pairs("bias", bias, batch, heads, t, s)


def by_pairs(bias: Bias, t: int, s: int, q_offset: Any = 0) -> jax.Array:
    """The terms of all pairs, queries from position `q_offset` (a number, or [B]) on: broadcasts to [B, H, t, s]."""
    match bias:
        case ALiBi() | Bucketed():
            first = jnp.reshape(q_offset, (-1, 1, 1))
            ahead = jnp.arange(s) - (jnp.arange(t)[:, None] + first)  # [B or 1, t, s]
            return jnp.moveaxis(bias.of_distance(ahead), 0, 1)
        case Indexed():
            return jnp.moveaxis(jnp.take(bias.table, bias.index, axis=0), -1, 0)[None]
        case _:
            return bias.reshape((1,) * (4 - bias.ndim) + bias.shape)


def by_distance(bias: ALiBi | Bucketed, t: int, s: int, q_offset: Any = 0) -> jax.Array:
    """The terms of all distances that t queries from `q_offset` on and s keys have: [B or 1, H, t + s - 1].

    The number of query i and key j is the one at j - i + t - 1.
    """
    ahead = jnp.arange(t + s - 1) - (t - 1) - jnp.reshape(q_offset, (-1, 1))
    return jnp.moveaxis(bias.of_distance(ahead), 0, 1)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of the paper, [H]: powers of 2^(-8 / H); in between, where H is no power of two, those of 2H."""
    whole = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8.0 / whole * np.arange(1, whole + 1))
    between = 2.0 ** (-4.0 / whole * np.arange(1, 2 * (heads - whole) + 1, 2))
    return np.concatenate([slopes, between]).astype(np.float32)


def buckets(distances: int, count: int, max_distance: int) -> np.ndarray:
    """Bucket of the distances 0 to `distances` - 1: half of the `count` hold one distance each, the rest ever more.

    Distances from `max_distance` on share the last one. Made here rather than in the program, since the logarithm of
    another compiler may fall on the other side of a whole number.
    """
    exact = count // 2
    n = np.arange(distances)
    log = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    far = exact + (log * np.float32(count - exact)).astype(np.int32)
    return np.where(n < exact, n, np.minimum(far, count - 1)).astype(np.int32)


def bucketed_spec(name: str, buckets: int, heads: int, init: Initializer) -> Spec:
    """The table of `Bucketed`."""
    return At(name, {"embedding": Param((buckets, heads), (None, "heads"), "weight", init)})


def relative_key_spec(name: str, max_positions: int, head_dim: int, init: Initializer) -> Spec:
    """A vector for every distance from -(max_positions - 1) to max_positions - 1, shared by all heads."""
    table = Param((2 * max_positions - 1, head_dim), (None, None), "weight", init)
    return At(name, {"embedding": table}, flax="", tf="")


def relative_key_bias(p: dict[str, Any], q: jax.Array, k: jax.Array, *, key_too: bool, q_offset: Any = 0) -> jax.Array:
    """Scores of queries (and keys) against the vector of their distance, scaled as the other scores: [B, H, T, S].

    Shaw et al. 2018, arXiv:1803.02155 (queries); Huang et al. 2020, arXiv:2009.13658 (queries and keys: `key_too`).
    Every vector is scored once and then picked by distance, so that nothing of size T x S x D is made.
    """
    table = p["embedding"].astype(q.dtype)
    t, s = q.shape[1], k.shape[1]
    distance = jnp.arange(t)[:, None] + q_offset - jnp.arange(s)[None, :] + (table.shape[0] - 1) // 2  # [T, S]
    bias = jnp.take_along_axis(jnp.einsum("bthd,rd->bhtr", q, table), distance[None, None], axis=-1, mode="clip")
    if key_too:
        of_keys = jnp.einsum("bshd,rd->bhsr", k, table)
        bias = bias + jnp.take_along_axis(of_keys, distance.T[None, None], axis=-1, mode="clip").swapaxes(-1, -2)
    return bias * q.shape[-1] ** -0.5
