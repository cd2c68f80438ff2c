"""One call of attention, checked: what every backend is asked about and given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.layers.attention.bias import Bias, check_bias
from formax.layers.attention.mask import Mask


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "mask", "bias", "sinks", "key", "table"],
    meta_fields=["scale", "softcap", "dropout"],
)
@dataclass(frozen=True)
class Problem:
    """Arguments of `attention`, with the defaults filled in. Arrays may be shapes alone (`jax.ShapeDtypeStruct`).

    B rows, T queries, S keys, H heads of queries, K of keys and values, in groups of G = H / K; heads of D and Dv
    channels. With no `dropout` there is no `key`. With a `table` [B, N] keys and values are in pages, [pages, page, K,
    D] and [.., Dv], of which it names those of each row in order: S is N * page.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: Mask
    bias: Bias | None
    sinks: jax.Array | None
    key: jax.Array | None
    scale: float
    softcap: float | None
    dropout: float
    table: jax.Array | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, T, S, H, K."""
        b, t, h, _ = self.q.shape
        s = self.k.shape[1] * (1 if self.table is None else self.table.shape[1])
        return b, t, s, h, self.k.shape[2]

    def gathered(self) -> Problem:
        """The same without pages: keys and values of each row, copied together."""
        if self.table is None:
            return self
        k, v = (jnp.take(x, self.table, axis=0, mode="clip") for x in (self.k, self.v))  # [B, N, page, K, D]
        b, _, s, _, _ = self.sizes
        k, v = (x.reshape(b, s, *x.shape[3:]) for x in (k, v))
        return replace(self, k=k, v=v, table=None)

    @property
    def table_bytes(self) -> int:
        """What a table of all scores would take, in float32."""
        b, t, s, h, _ = self.sizes
        return 4 * b * h * t * s

    @property
    def watched(self) -> bool:
        """Whether somebody looks at the scores or the weights, or changes them."""
        return tap.watched("scores", "weights")


def problem(
    q: jax.Array,
    k: Any,
    v: Any,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout: float | None = None,
    key: jax.Array | None = None,
) -> Problem:
    """The arguments of `attention`, checked.

    Raises:
        ValueError: ranks, sizes, masks, numbers that do not fit, with both shapes.
        TypeError: dtypes that do not.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, length, heads, head_dim], got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must hold floating-point numbers, got {x.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} must agree in batch, length and heads")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and head_dim")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must be of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads of q {q.shape} cannot share {k.shape[2]} key heads of k {k.shape}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap} must be a number above 0, or None for none")
    if dropout is not None and not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout} is no probability")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks has shape {sinks.shape}, but there are {q.shape[2]} heads of queries: [H]")
    mask = mask or Mask()
    sizes = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    mask.check(*sizes)
    check_bias(bias, *sizes)
    rate = (dropout or 0.0) if key is not None else 0.0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Problem(q, k, v, mask, bias, sinks, key if rate else None, scale, softcap, rate)


def fewer_queries_than(block: int, p: Problem) -> str | None:
    """Why a kernel is not worth it for queries that do not fill a block; None if they do."""
    t = p.q.shape[1]
    return f"{t} queries are less than a block of {block}" if t < block else None


@dataclass(frozen=True)
class Target:
    """What programs are made for: a platform of JAX ("cpu", "cuda", "tpu", ..), or its kernels interpreted here."""

    platform: str
    interpret: bool = False


_target: ContextVar[Target | None] = ContextVar("formax_attention_target", default=None)


def target() -> Target:
    """What programs are made for at the moment: the default device, unless `compile_for` says otherwise."""
    if (said := _target.get()) is not None:
        return said
    backend = jax.default_backend()
    if backend == "gpu":  # of either maker
        backend = "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
    return Target(backend)


@contextmanager
def compile_for(platform: str, *, interpret: bool = False) -> Iterator[None]:
    """Backends are chosen as on another platform, while a program is traced inside.

    For programs that are lowered for a device that is not at hand, and with `interpret` for kernels that are to run on
    this machine, slowly. What `jax.jit` has traced before is not traced again.

    Args:
        platform: "cpu", "cuda" or "tpu".
        interpret: Pallas kernels are interpreted.

    Raises:
        ValueError: another platform.
    """
    if platform not in ("cpu", "cuda", "tpu"):
        raise ValueError(f"platform {platform!r} is none of cpu, cuda, tpu")
    token = _target.set(Target(platform, interpret))
    try:
        yield
    finally:
        _target.reset(token)


def names(given: Any) -> str:
    """What a mask or a bias consists of, for messages: "causal, window"."""
    if isinstance(given, Mask):
        parts = ("causal", "window", "kv_length", "keys", "segments", "prefix", "dense")
        found = [name for name in parts if getattr(given, name) is not None and getattr(given, name) is not False]
        return ", ".join(found) or "none"
    return "none" if given is None else type(given).__name__
