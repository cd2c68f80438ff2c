"""Losses of speech models: pure functions of outputs and labels, equal to what transformers trains with in PyTorch.

Everything is computed in float32. The last four put them together for a head: `objective(output, config, batch)`, where
the batch has inputs and labels under the reference's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from formax.layers.speech import frame_lengths
from formax.training.losses import cross_entropy

Batch = Mapping[str, Any]


def ctc(
    logits: jax.Array,
    labels: jax.Array,
    lengths: jax.Array | None = None,
    *,
    blank: int = 0,
    reduction: str = "sum",
    zero_infinity: bool = False,
) -> jax.Array:
    """Connectionist temporal classification (Graves et al. 2006): minus the log-likelihood of the labels.

    Args:
        logits: [B, T, V].
        labels: [B, N]; negative ones are no labels, wherever they stand.
        lengths: [B] frames of each row; all T by default.
        blank: the token that stands for no label (`pad_token_id` of the configuration).
        reduction: "sum" over rows; "mean" of the rows' losses, each divided by its number of labels; "none".
        zero_infinity: whether rows with fewer frames than their labels need count as 0 and not as infinity.

    Returns:
        A scalar; [B] for "none".

    Raises:
        ValueError: another reduction.
    """
    import optax  # of the extra "training"

    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction={reduction!r} is none of 'sum', 'mean', 'none'")
    t, real = logits.shape[1], labels >= 0
    lengths = jnp.full(labels.shape[:1], t) if lengths is None else lengths
    first = jnp.argsort(~real, axis=-1, stable=True)  # labels to the left, in their order
    y = jnp.take_along_axis(jnp.where(real, labels, 0), first, axis=-1)
    count = real.sum(-1)
    padding = jnp.arange(y.shape[1]) >= count[:, None]
    late = (jnp.arange(t) >= lengths[:, None]).astype(jnp.float32)
    loss = optax.ctc_loss(logits.astype(jnp.float32), late, y, padding.astype(jnp.float32), blank_id=blank)
    # Equal neighbours need a blank between them.
    needed = count + ((y[:, 1:] == y[:, :-1]) & ~padding[:, 1:]).sum(-1)
    loss = jnp.where(needed > lengths, 0.0 if zero_infinity else jnp.inf, loss)
    if reduction == "mean":
        return (loss / jnp.maximum(count, 1)).mean()
    return loss.sum() if reduction == "sum" else loss


def contrastive(
    states: jax.Array, targets: jax.Array, negatives: jax.Array, masked: jax.Array, *, temperature: float = 0.1
) -> jax.Array:
    """How well the state of each masked frame picks out its own target among others (Baevski et al. 2020, eq. 3).

    Args:
        states: [B, T, E] projected states.
        targets: [B, T, E] projected codes.
        negatives: [B, T, K] frames of the whole batch, numbered row by row, to tell the own one from.
        masked: [B, T], true where the frame was masked.
        temperature: divides the cosines.

    Returns:
        The sum over masked frames.
    """
    x, y = states.astype(jnp.float32), targets.astype(jnp.float32)
    others = y.reshape(-1, y.shape[-1])[negatives]  # [B, T, K, E]
    cosines = _cosine(x[:, :, None], jnp.concatenate([y[:, :, None], others], axis=2)) / temperature
    same = (others == y[:, :, None]).all(-1)  # the same code is no wrong answer
    cosines = cosines.at[:, :, 1:].set(jnp.where(same, -jnp.inf, cosines[:, :, 1:]))
    return -jnp.where(masked.astype(bool), jax.nn.log_softmax(cosines)[..., 0], 0).sum()


def diversity(perplexity: jax.Array, codes: int, masked: jax.Array) -> jax.Array:
    """The part of all `codes` that stays unused, times the number of masked frames: `perplexity` [] -> []."""
    return (codes - perplexity.astype(jnp.float32)) / codes * masked.astype(bool).sum()


def sample_negatives(key: jax.Array, masked: jax.Array, count: int) -> jax.Array:
    """`count` other masked frames of the same row for every masked frame, with replacement: [B, T] -> [B, T, count].

    Frames are numbered over the whole batch, as `contrastive` takes them; those of frames not masked mean nothing. A
    row with one masked frame has no others, and gives that frame itself.
    """
    b, t = masked.shape
    seen = masked.astype(bool)
    total = seen.sum(-1)[:, None, None]
    rank = (jnp.cumsum(seen, -1) - 1)[..., None]
    drawn = jax.random.randint(key, (b, t, count), 0, jnp.maximum(total - 1, 1))
    drawn = jnp.clip(drawn + (drawn >= rank), 0, jnp.maximum(total - 1, 0))
    frames = jnp.argsort(~seen, axis=-1, stable=True)  # the masked ones, then the others
    picked = jnp.take_along_axis(frames[:, None], drawn.reshape(b, 1, -1), axis=-1).reshape(b, t, count)
    return picked + t * jnp.arange(b)[:, None, None]


def frame_classification(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of all frames, padding too: logits [B, T, L], labels [B, T, L] with a one for the class."""
    return cross_entropy(logits, labels.argmax(-1))


def am_softmax(cosines: jax.Array, labels: jax.Array, *, scale: float = 30.0, margin: float = 0.4) -> jax.Array:
    """Additive-margin softmax (Wang et al. 2018, arXiv:1801.05599): mean over rows.

    Args:
        cosines: [B, L] of each row with each class.
        labels: [B] the right class, whose cosine is lowered by `margin`.
        scale: factor on the cosines.
        margin: see above.
    """
    own = jnp.arange(cosines.shape[-1]) == labels[:, None]
    return cross_entropy(scale * (cosines.astype(jnp.float32) - margin * own), labels)


def ctc_objective(out: Any, c: Any, batch: Batch) -> jax.Array:
    """`ctc` of the logits by the options of the configuration, where frames are counted from the padding mask."""
    samples = batch["input_values"].shape
    mask = batch.get("attention_mask")
    count = jnp.full(samples[:1], samples[1]) if mask is None else (mask != 0).sum(-1)
    lengths = frame_lengths(c, count, adapter=True)
    options: dict[str, Any] = {"reduction": c.ctc_loss_reduction, "zero_infinity": c.ctc_zero_infinity}
    return ctc(out.logits, batch["labels"], lengths, blank=c.pad_token_id, **options)


def pretraining_objective(out: Any, c: Any, batch: Batch) -> jax.Array:
    """`contrastive` of the masked frames, and `diversity` by its weight."""
    masked, temperature = batch["mask_time_indices"], c.contrastive_logits_temperature
    states, codes = out.projected_states, out.projected_quantized_states
    found = contrastive(states, codes, batch["sampled_negative_indices"], masked, temperature=temperature)
    count = c.num_codevector_groups * c.num_codevectors_per_group
    return found + c.diversity_loss_weight * diversity(out.codevector_perplexity, count, masked)


def frame_objective(out: Any, c: Any, batch: Batch) -> jax.Array:
    """`frame_classification` of the logits."""
    return frame_classification(out.logits, batch["labels"])


def speaker_objective(out: Any, c: Any, batch: Batch) -> jax.Array:
    """`am_softmax` of the cosines."""
    return am_softmax(out.cosines, batch["labels"])


def _cosine(x: jax.Array, y: jax.Array, eps: float = 1e-8) -> jax.Array:
    """[..., E] and [..., E] -> [...]."""
    square = (jnp.maximum(jnp.square(z).sum(-1), eps**2) for z in (x, y))
    return (x * y).sum(-1) * jax.lax.rsqrt(next(square)) * jax.lax.rsqrt(next(square))
