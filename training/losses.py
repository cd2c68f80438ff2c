"""Losses of the heads: pure functions of logits and labels, each the mean that transformers trains with in PyTorch.

A label of -100 marks a position that does not count. Everything is computed in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from formax.layers.resize import bilinear

IGNORED = -100


def cross_entropy(logits: jax.Array, labels: jax.Array, *, ignored: int = IGNORED) -> jax.Array:
    """Mean negative log-likelihood of integer labels.

    Args:
        logits: [..., classes].
        labels: [...]; positions equal to `ignored` are left out of the mean.
        ignored: see above.

    Returns:
        A scalar; 0 when no position counts.
    """
    counts = labels != ignored
    picked = jnp.where(counts, labels, 0)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    losses = -jnp.take_along_axis(log_probs, picked[..., None], axis=-1)[..., 0]
    return jnp.where(counts, losses, 0).sum() / jnp.maximum(counts.sum(), 1)


def next_token(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`cross_entropy` of each token given those before it: logits [..., T, V], labels [..., T] (the input ids)."""
    return cross_entropy(logits[..., :-1, :], labels[..., 1:])


def sequence_classification(logits: jax.Array, labels: jax.Array, problem_type: str | None = None) -> jax.Array:
    """Loss of a classification or regression head.

    Args:
        logits: [B, labels].
        labels: [B] classes for "single_label_classification"; [B, labels] zeros and ones for
            "multi_label_classification"; [B] or [B, labels] numbers for "regression".
        problem_type: one of these; None decides by the number of labels (one: regression) and the dtype of `labels`
            (integers: one class), as the reference does.

    Raises:
        ValueError: another problem type.
    """
    if problem_type is None:
        single = jnp.issubdtype(labels.dtype, jnp.integer)
        kinds = ("single_label_classification", "multi_label_classification")
        problem_type = "regression" if logits.shape[-1] == 1 else kinds[0] if single else kinds[1]
    y = logits.astype(jnp.float32)
    match problem_type:
        case "regression":
            return jnp.square(y.reshape(labels.shape) - labels).mean()
        case "single_label_classification":
            return cross_entropy(y, labels)
        case "multi_label_classification":
            return binary(y, labels)
    raise ValueError(
        f"problem_type={problem_type!r} is none of regression, single_label_classification, multi_label_classification"
    )


def binary(logits: jax.Array, labels: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Mean negative log-likelihood of zeros and ones [...] given their logits [...], where `seen` [...] is not 0."""
    y = logits.astype(jnp.float32)
    losses = jax.nn.softplus(y) - labels * y
    if seen is None:
        return losses.mean()
    return jnp.where(seen != 0, losses, 0).sum() / jnp.maximum((seen != 0).sum(), 1)


def span(start_logits: jax.Array, end_logits: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """Mean of the losses of an answer's first and last position: logits [B, T], positions [B].

    A position outside the text means that the answer is not in it: that row does not count.
    """
    length = start_logits.shape[1]

    def one(logits: jax.Array, at: jax.Array) -> jax.Array:
        return cross_entropy(logits, jnp.where((at >= 0) & (at < length), at, IGNORED))

    return (one(start_logits, start) + one(end_logits, end)) / 2


def masked_pixels(
    reconstruction: jax.Array, pixels: jax.Array, masked: jax.Array, patch: int | tuple[int, int]
) -> jax.Array:
    """Mean absolute difference of the pixels under masked patches (SimMIM, Xie et al. 2021, arXiv:2111.09886).

    Args:
        reconstruction: [B, C, height, width].
        pixels: the images, of the same shape.
        masked: [B, patches], true where a patch was hidden.
        patch: height and width of a patch.

    Returns:
        A scalar; the reference adds 1e-5 to the number of masked pixels, so that nothing masked is no loss.
    """
    b, channels, height, width = pixels.shape
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    hidden = (masked != 0).reshape(b, height // rows, width // columns)
    hidden = hidden.repeat(rows, 1).repeat(columns, 2)[:, None].astype(jnp.float32)
    far = jnp.abs(pixels.astype(jnp.float32) - reconstruction.astype(jnp.float32))
    return (far * hidden).sum() / (hidden.sum() + 1e-5) / channels


def semantic(logits: jax.Array, labels: jax.Array, *, ignored: int) -> jax.Array:
    """`cross_entropy` of every pixel's class, for which the logits are stretched to the size of the labels.

    Args:
        logits: [B, classes, height, width], usually of a smaller size.
        labels: [B, height', width'].
        ignored: the label of pixels that do not count.
    """
    stretched = bilinear(jnp.moveaxis(logits.astype(jnp.float32), 1, -1), *labels.shape[1:])
    return cross_entropy(stretched, labels, ignored=ignored)


def contrastive(logits: jax.Array) -> jax.Array:
    """Finding each row's partner among the columns and each column's among the rows (CLIP): [B, B], partners diagonal.

    Raises:
        ValueError: there are not as many rows as columns.
    """
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(f"pairs need as many of the one as of the other, the logits are {logits.shape}")
    partners = jnp.arange(len(logits))
    return (cross_entropy(logits, partners) + cross_entropy(logits.T, partners)) / 2
