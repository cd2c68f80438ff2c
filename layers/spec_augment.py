"""SpecAugment: spans of time or of features hidden from a model in training.

Park et al. 2019, arXiv:1904.08779, with the counts of wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from formax.core.config import Config, config


@config
class SpecAugmentConfig(Config):
    """The fields that say what is hidden."""

    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0


def span_mask(
    key: jax.Array,
    rows: int,
    size: int,
    probability: float,
    length: int,
    *,
    min_spans: int = 0,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Random spans, True where something is hidden: [rows, size].

    About `probability * n / length` spans for a row of `n` places, at starts that all differ and are equally likely;
    spans may overlap, so that a smaller part than `probability` is hidden. What the count has after the point decides
    by one draw for all rows whether there is one span more.

    Args:
        key: random key.
        rows: number of rows.
        size: places of a row.
        probability: the part of a row that spans would hide if none overlapped.
        length: places of a span.
        min_spans: at least so many, where they fit.
        lengths: [rows] places of each row that are real; spans lie within them.

    Raises:
        ValueError: a span without places, or longer than a row.
    """
    if not 1 <= length <= size:
        raise ValueError(f"spans of {length} do not fit into {size} places; the length must be 1 to {size}")
    k_count, k_start = jax.random.split(key)
    real = jnp.full((rows,), size) if lengths is None else lengths
    starts = jnp.maximum(real - (length - 1), 0)  # places where a span can begin
    wanted = jnp.floor(probability * real / length + jax.random.uniform(k_count)).astype(jnp.int32)
    count = jnp.minimum(jnp.minimum(jnp.maximum(wanted, min_spans), size // length), starts)
    # Spans begin at the first `count` of these places in a random order.
    place = jnp.arange(size - length + 1)
    order = jnp.where(place < starts[:, None], jax.random.uniform(k_start, (rows, place.size)), 2.0)
    begins = jnp.argsort(jnp.argsort(order)) < count[:, None]
    begun = jnp.cumsum(jnp.pad(begins, ((0, 0), (0, length - 1))), axis=-1)
    ended = jnp.pad(begun, ((0, 0), (length, 0)))[:, :size]
    return begun > ended


def drawn_spans(
    key: jax.Array,
    c: Any,
    rows: int,
    frames: int,
    size: int,
    *,
    lengths: jax.Array | None = None,
    given: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The spans that the `mask_time_*` and `mask_feature_*` fields of a configuration ask for.

    Returns:
        Frames [rows, frames] to hide, the `given` ones or random ones within the `lengths` [rows] of each row; and
        features [rows, size]. None where there are none given and the probability is 0.
    """
    k_time, k_feature = jax.random.split(key)
    time, feature = given, None
    if given is None and c.mask_time_prob > 0:
        span, least = (c.mask_time_prob, c.mask_time_length), c.mask_time_min_masks
        time = span_mask(k_time, rows, frames, *span, min_spans=least, lengths=lengths)
    if c.mask_feature_prob > 0:
        span, least = (c.mask_feature_prob, c.mask_feature_length), c.mask_feature_min_masks
        feature = span_mask(k_feature, rows, size, *span, min_spans=least)
    return time, feature


def augment(c: SpecAugmentConfig, features: jax.Array, attention_mask: Any, key: Any) -> jax.Array:
    """A spectrogram [B, mels, frames] with spans of frames and of mels at 0, under a key: what training hears.

    Frames are of those that `attention_mask` [B, frames] has.
    """
    if key is None or not c.apply_spec_augment:
        return features
    rows, mels, frames = features.shape
    real = None if attention_mask is None else attention_mask.sum(-1)
    hidden, zeroed = drawn_spans(key, c, rows, frames, mels, lengths=real)
    if hidden is not None:
        features = jnp.where(hidden[:, None], 0, features)
    return features if zeroed is None else jnp.where(zeroed[:, :, None], 0, features)
