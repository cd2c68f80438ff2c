"""A few queries against a long cache, and caches in pages.

In decoding there is next to nothing to compute, and all keys and values to read: the heads that share keys become rows
of one query, so that keys are read once for all of them, and the keys are split over many programs whose sums are put
together afterwards (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from formax.layers.attention import backends, xla
from formax.layers.attention.mask import Mask
from formax.layers.attention.problem import Problem, problem


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "table", "length"], meta_fields=[])
@dataclass(frozen=True)
class Pages:
    """Keys and values of many texts in pages of one pool (Kwon et al. 2023, arXiv:2309.06180).

    Attributes:
        k: [pages, page, K, D].
        v: [pages, page, K, Dv].
        table: [B, N] the pages of each text, in order; what lies beyond its length is not read, and may be any page.
        length: [B] positions of each text, those of the queries included.
    """

    k: jax.Array
    v: jax.Array
    table: jax.Array
    length: jax.Array

    def check(self, q: jax.Array) -> None:
        """Raises ValueError for parts that do not fit each other or the queries [B, T, H, D], with both shapes."""
        b, n = q.shape[0], self.table.shape
        if self.k.ndim != 4 or self.k.shape[:3] != self.v.shape[:3]:
            raise ValueError(f"keys {self.k.shape} and values {self.v.shape} must be [pages, page, heads, width]")
        if q.ndim != 4 or self.k.shape[3] != q.shape[3] or q.shape[2] % self.k.shape[2]:
            raise ValueError(f"q {q.shape} and pages of keys {self.k.shape} must agree in head_dim and share heads")
        if len(n) != 2 or n[0] != b or self.length.shape != (b,):
            raise ValueError(f"table {n} must be [batch, pages] and length {self.length.shape} [batch], batch is {b}")


def paged_attention(
    q: jax.Array,
    pages: Pages,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of the last positions of each text to it, up to themselves.

    Args:
        q: the last T positions of each text [B, T, H, D].
        pages: keys and values, those of these positions included.
        window: how many positions a query sees, itself included; None for all.
        scale: as in `attention`.
        softcap: as in `attention`.
        sinks: as in `attention`.
        backend: as in `attention`. "decode_gpu" and "decode_tpu" read pages where they are; for the others those of
            each text are copied together first.

    Returns:
        [B, T, H, Dv]; zero for texts of length 0.

    Raises:
        ValueError: shapes that do not fit; a named backend that does not exist.
        NotImplementedError: a named backend that cannot do this, with the reason.
    """
    p = in_pages(q, pages, window=window, scale=scale, softcap=softcap, sinks=sinks)
    return backends.run(p, backend)


def explain_paged_attention(q: Any, pages: Any, **options: Any) -> str:
    """As `explain_attention`, for the arguments of `paged_attention`."""
    named = options.pop("backend", None)
    return backends.explain(jax.eval_shape(partial(in_pages, **options), q, pages), named)


def in_pages(q: jax.Array, pages: Pages, *, window: int | None = None, **options: Any) -> Problem:
    """The arguments of `paged_attention`, checked."""
    pages.check(q)
    n, page = pages.table.shape[1], pages.k.shape[1]
    k, v = (jax.ShapeDtypeStruct((q.shape[0], n * page, *x.shape[2:]), x.dtype) for x in (pages.k, pages.v))
    mask = Mask(
        causal=True,
        window=None if window is None else (window - 1, None),
        q_offset=pages.length - q.shape[1],
        kv_length=pages.length,
    )
    p = problem(q, k, v, mask=mask, **options)
    return replace(p, k=pages.k, v=pages.v, table=pages.table)


def odd_pages(p: Problem) -> str | None:
    """Why pages of their size cannot be read by a kernel, if there are any."""
    page = p.k.shape[1]
    if p.table is None or (page >= 16 and page & (page - 1) == 0):
        return None
    return f"pages of {page} positions are no power of two from 16 on"


def few_keys(p: Problem) -> str | None:
    """Why reading them is no work for a kernel of its own."""
    s = p.sizes[2]
    return None if s >= 256 else f"{s} keys are few"


def as_xla_slopes(attend: Callable[[Problem], jax.Array]) -> Callable[[Problem], jax.Array]:
    """A way to attend, with the slopes of XLA's: decoding does not ask for any."""

    @jax.custom_vjp
    def attention(p: Problem) -> jax.Array:
        """See `formax.layers.attention.attention`."""
        return attend(p)

    def by_xla(p: Problem) -> jax.Array:
        return xla.attention(p.gathered())

    attention.defvjp(lambda p: (attend(p), p), lambda p, slope: jax.vjp(by_xla, p)[1](slope))
    return attention


def fold_heads(p: Problem) -> tuple[Problem, int]:
    """The heads that share keys as rows of one query, [B, T * G, K, D]: (the call, G)."""
    b, t, _, h, heads = p.sizes
    groups = h // heads
    q = jnp.moveaxis(p.q.reshape(b, t, heads, groups, -1), 3, 2).reshape(b, t * groups, heads, -1)
    segments: Any = p.mask.segments
    if segments is not None:
        segments = jnp.repeat(segments[0], groups, axis=1), segments[1]
    return replace(p, q=q, mask=replace(p.mask, segments=segments)), groups


def unfold_heads(x: jax.Array, groups: int) -> jax.Array:
    """Of the sums, inverse of `fold_heads`: [B, T * G, K, Dv] -> [B, T, H, Dv]."""
    b, rows, heads, width = x.shape
    x = jnp.moveaxis(x.reshape(b, rows // groups, groups, heads, width), 2, 3)
    return x.reshape(b, rows // groups, heads * groups, width)
