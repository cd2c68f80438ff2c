"""Who may look at whom, as structure rather than as a T x S table.

The fields of a `Mask` combine by "and". Kernels read the structure and skip what it rules out; the XLA backend turns
it into booleans (`materialise`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_offset", "kv_length", "keys", "segments", "prefix", "dense"],
    meta_fields=["causal", "window", "dilation"],
)
@dataclass(frozen=True, kw_only=True)
class Mask:
    """The pairs (query i, key j) that attention may use; with no field set, all of them.

    Attributes:
        causal: key j only if its position is not after the query's.
        window: (left, right): keys from i - left to i + right, both included; None on a side leaves it open.
        dilation: of these keys every so many-th, counted from the query itself (Beltagy et al. 2020, arXiv:2004.05150).
        q_offset: absolute position of the first query, an int, a scalar array, or [B] (keys start at 0).
        kv_length: [B] number of valid keys of each row.
        keys: [B, S] booleans, the keys that exist: a padding mask of any form.
        segments: (q_ids [B, T], kv_ids [B, S]): only equal ids see each other.
        prefix: [B] length of a prefix whose keys every query sees, though `causal`.
        dense: booleans that broadcast to [B, H, T, S], the last resort.
    """

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    dilation: int = 1
    q_offset: Any = 0
    kv_length: jax.Array | None = None
    keys: jax.Array | None = None
    segments: tuple[jax.Array, jax.Array] | None = None
    prefix: jax.Array | None = None
    dense: jax.Array | None = None

    def __and__(self, other: Mask) -> Mask:
        """Both masks at once, field by field: `q_offset` and `prefix` of either then hold for the whole.

        Raises:
            ValueError: a field other than `causal`, `keys` and `dense` is set in both, with different values.
        """
        merged: dict[str, Any] = {"causal": self.causal or other.causal}
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if f.name == "causal":
                continue
            if a is f.default:
                merged[f.name] = b
            elif b is f.default or b is a or (_is_static(a) and _is_static(b) and a == b):
                merged[f.name] = a
            elif f.name in ("keys", "dense"):
                merged[f.name] = a & b
            else:
                raise ValueError(f"both masks set {f.name}; merge it before combining them")
        return Mask(**merged)

    def check(self, batch: int, heads: int, t: int, s: int) -> None:
        """Raises ValueError for a field that does not speak of `batch` rows, `heads`, t queries and s keys."""
        left, right = self.window or (None, None)
        if (left or 0) < 0 or (right or 0) < 0:
            raise ValueError(f"mask.window={self.window} must be (left, right), each not negative, or None for open")
        if self.dilation < 1:
            raise ValueError(f"mask.dilation={self.dilation} must be 1 or more")
        if self.dilation > 1 and self.window is None:
            raise ValueError(f"mask.dilation={self.dilation} thins out a window: give mask.window, too")
        if self.prefix is not None and not self.causal:
            raise ValueError("mask.prefix says what is seen though causal: set mask.causal, too")
        q_ids, kv_ids = self.segments or (None, None)
        expected: dict[str, tuple[Any, tuple[int, ...], str]] = {
            "kv_length": (self.kv_length, (batch,), "[batch]"),
            "prefix": (self.prefix, (batch,), "[batch]"),
            "keys": (self.keys, (batch, s), "[batch, key]"),
            "segments[0]": (q_ids, (batch, t), "[batch, query]"),
            "segments[1]": (kv_ids, (batch, s), "[batch, key]"),
        }
        for name, (given, shape, axes) in expected.items():
            if given is not None and not _fits(jnp.shape(given), shape):
                raise ValueError(f"mask.{name} has shape {jnp.shape(given)}, but {axes} is {shape} here")
        if jnp.shape(self.q_offset) not in ((), (1,), (batch,)):
            raise ValueError(
                f"mask.q_offset has shape {jnp.shape(self.q_offset)}; it is one number, or [batch] {batch}"
            )
        check_pairs("mask.dense", self.dense, batch, heads, t, s)
        if self.dense is not None and self.dense.dtype != bool:
            raise ValueError(f"mask.dense has dtype {self.dense.dtype}; it is booleans, True where attention may look")

    def picked(self, positions: jax.Array) -> Mask:
        """The mask with what it says of single keys said of those at other `positions` [S]; the rest as it was.

        A key beyond those it speaks of is no padding, and is in no pair.
        """

        def pick(x: jax.Array) -> jax.Array:
            return jnp.take(x, positions, axis=-1, mode="clip")

        keys, dense, segments = self.keys, self.dense, self.segments
        if keys is not None:
            keys = pick(keys) | (positions >= keys.shape[-1])
        if dense is not None and dense.shape[-1] > 1:
            dense = pick(dense) & (positions < dense.shape[-1])
        if segments is not None:
            segments = segments[0], pick(segments[1])
        return replace(self, keys=keys, dense=dense, segments=segments)

    def since(self, first: jax.Array, s: int) -> Mask:
        """The mask of `s` keys of which the first is at position `first`, one number; those before 0 do not exist."""
        positions = first + jnp.arange(s)
        mask = self.picked(positions)
        exist = (positions >= 0)[None]
        return replace(
            mask,
            keys=exist if mask.keys is None else mask.keys & exist,
            q_offset=self.q_offset - first,
            kv_length=None if self.kv_length is None else jnp.maximum(self.kv_length - first, 0),
            prefix=None if self.prefix is None else jnp.maximum(self.prefix - first, 0),
        )

    def materialise(self, t: int, s: int, at: jax.Array | None = None) -> jax.Array | None:
        """Booleans that broadcast to [B, H, t, s], True where attention may look; None where everything may.

        With `at` [s], the keys are those of these positions.
        """
        if at is not None:
            self = self.picked(at)
        q = _column(self.q_offset) + jnp.arange(t)[:, None]  # [B or 1, 1, t, 1]
        k = jnp.arange(s) if at is None else at
        parts: list[jax.Array] = []
        if self.causal:
            seen = k <= q
            parts.append(seen if self.prefix is None else seen | (k < _column(self.prefix)))
        if self.window is not None:
            left, right = self.window
            if left is not None:
                parts.append(k >= q - left)
            if right is not None:
                parts.append(k <= q + right)
        if self.dilation > 1:
            parts.append((q - k) % self.dilation == 0)
        if self.kv_length is not None:
            parts.append(k < _column(self.kv_length))
        if self.keys is not None:
            parts.append(self.keys[:, None, None, :])
        if self.segments is not None:
            q_ids, kv_ids = self.segments
            parts.append((q_ids[:, :, None] == kv_ids[:, None, :])[:, None])
        if self.dense is not None:
            parts.append(self.dense)
        if not parts:
            return None
        out = parts[0]
        for part in parts[1:]:
            out = out & part
        return out


def check_pairs(name: str, given: Any, batch: int, heads: int, t: int, s: int) -> None:
    """Raises ValueError for an array that does not broadcast to [batch, heads, t, s]."""
    if given is None:
        return
    whole = (batch, heads, t, s)
    if given.ndim > 4 or not _fits(given.shape, whole[4 - given.ndim :]):
        raise ValueError(f"{name} has shape {given.shape}, which does not broadcast to [B, H, T, S] = {whole}")


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(shape) == len(whole) and all(a in (1, b) for a, b in zip(shape, whole, strict=True))


def _column(x: Any) -> jax.Array:
    """One number, or one a row of the batch, to compare with [t, s] pairs: [B or 1, 1, 1, 1]."""
    return jnp.reshape(x, (-1, 1, 1, 1))


def _is_static(value: Any) -> bool:
    """Whether the value is numbers of Python, which can be compared while a program is traced."""
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(x, int | None) for x in value))


def from_attention_mask(
    attention_mask: jax.Array | None, *, causal: bool = False, q_offset: Any = 0, keys: int | None = None
) -> Mask:
    """Hugging Face's `attention_mask`.

    Args:
        attention_mask: [B, S] of ones and zeros (padding), to which `causal` is added; or pairs [B, T, S] or
            [B, H, T, S], which say everything and take the place of `causal`; None for no padding. Floating-point
            pairs [B, H, T, S] are what others add to the scores: 0 where attention may look.
        causal: keys after the query are hidden.
        q_offset: absolute position of the first query.
        keys: length of the key buffer, when it is longer than what the mask speaks of: a padding mask goes on with ones
            (`causal` hides what is not filled yet), pairs with zeros.

    Raises:
        ValueError: another number of dimensions.
    """
    if attention_mask is None:
        return Mask(causal=causal, q_offset=q_offset)
    added = attention_mask.ndim == 4 and jnp.issubdtype(attention_mask.dtype, jnp.floating)
    seen = attention_mask == 0 if added else attention_mask.astype(bool)
    if seen.ndim not in (2, 3, 4):
        raise ValueError(
            f"attention_mask must be [batch, key], [batch, query, key] or [batch, heads, query, key], got {seen.shape}"
        )
    if keys is not None and seen.shape[-1] < keys:
        width = [(0, 0)] * (seen.ndim - 1) + [(0, keys - seen.shape[-1])]
        seen = jnp.pad(seen, width, constant_values=seen.ndim == 2)
    if seen.ndim == 2:
        return Mask(causal=causal, q_offset=q_offset, keys=seen)
    return Mask(q_offset=q_offset, dense=seen[:, None] if seen.ndim == 3 else seen)
