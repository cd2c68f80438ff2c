"""What `generate` returns when it is asked for more than texts, with the reference's names.

B texts (inputs times sequences for each), T columns with the prompt's, N new tokens, K beams, V tokens of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from formax.core.outputs import Array, Output, output


class _Generated(Output):
    cache: Any

    @property
    def past_key_values(self) -> Any:
        """The cache, as the reference calls it."""
        return self.cache


@output
class GenerateDecoderOnlyOutput(_Generated):
    """`sequences` [B, T]; for every new token `scores` and `logits` [B, V], and `attentions`, `hidden_states`.

    The latter two hold a tuple over layers for every token, the first of them about the whole prompt.
    """

    sequences: Array
    scores: tuple[Array, ...] | None = None
    logits: tuple[Array, ...] | None = None
    attentions: tuple[tuple[Array, ...], ...] | None = None
    hidden_states: tuple[tuple[Array, ...], ...] | None = None
    cache: Any = None


@output
class GenerateEncoderDecoderOutput(_Generated):
    """As `GenerateDecoderOnlyOutput`, of a decoder, with what was seen of the encoder."""

    sequences: Array
    scores: tuple[Array, ...] | None = None
    logits: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[tuple[Array, ...], ...] | None = None
    cross_attentions: tuple[tuple[Array, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[Array, ...], ...] | None = None
    cache: Any = None


@output
class GenerateBeamDecoderOnlyOutput(_Generated):
    """As `GenerateDecoderOnlyOutput`, where `scores` and the rest are of all K beams of every input.

    `sequences_scores` [B] are sums of log-probabilities over a power of the length; `beam_indices` [B, N] says which
    row of `scores` each token was chosen from, -1 after the end.
    """

    sequences: Array
    sequences_scores: Array | None = None
    scores: tuple[Array, ...] | None = None
    logits: tuple[Array, ...] | None = None
    beam_indices: Array | None = None
    attentions: tuple[tuple[Array, ...], ...] | None = None
    hidden_states: tuple[tuple[Array, ...], ...] | None = None
    cache: Any = None


@output
class GenerateBeamEncoderDecoderOutput(_Generated):
    """As `GenerateBeamDecoderOnlyOutput`, of a decoder, with what was seen of the encoder."""

    sequences: Array
    sequences_scores: Array | None = None
    scores: tuple[Array, ...] | None = None
    logits: tuple[Array, ...] | None = None
    beam_indices: Array | None = None
    encoder_attentions: tuple[Array, ...] | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[tuple[Array, ...], ...] | None = None
    cross_attentions: tuple[tuple[Array, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[Array, ...], ...] | None = None
    cache: Any = None


def transition_scores(
    sequences: Any, scores: Sequence[Any], beam_indices: Any = None, *, normalize: bool = False
) -> Array:
    """Of every new token the score that it was chosen by, [B, N].

    Args:
        sequences: [B, T] as `generate` returned them.
        scores: for each of the N steps [rows, V].
        beam_indices: [B, N] the row of each token, -1 after the end; each text's own by default.
        normalize: logarithms of probabilities, in the place of scores.

    Returns:
        float32 [B, N]; 0 where `beam_indices` says that the text has ended.

    Raises:
        ValueError: scores and texts of different lengths.
    """
    sequences, table = jnp.asarray(sequences), jnp.stack([jnp.asarray(one) for one in scores])
    rows = jnp.arange(len(sequences))[:, None] if beam_indices is None else jnp.asarray(beam_indices)
    steps = len(table) if beam_indices is None else int((rows >= 0).sum(-1).max())
    if steps > min(len(table), sequences.shape[1]):
        raise ValueError(f"{steps} steps are more than the {len(table)} scores, or the tokens {sequences.shape}")
    rows, table = jnp.broadcast_to(rows[:, :steps], (len(sequences), steps)), table[:steps]
    if normalize:
        table = jax.nn.log_softmax(table, axis=-1)
    found = table[jnp.arange(steps), jnp.maximum(rows, 0), sequences[:, sequences.shape[1] - steps :]]
    return jnp.where(rows < 0, 0, found)


# What there was before, one class for every way of generating.
GreedySearchDecoderOnlyOutput = GenerateDecoderOnlyOutput
SampleDecoderOnlyOutput = GenerateDecoderOnlyOutput
ContrastiveSearchDecoderOnlyOutput = GenerateDecoderOnlyOutput
GreedySearchEncoderDecoderOutput = GenerateEncoderDecoderOutput
SampleEncoderDecoderOutput = GenerateEncoderDecoderOutput
ContrastiveSearchEncoderDecoderOutput = GenerateEncoderDecoderOutput
BeamSearchDecoderOnlyOutput = GenerateBeamDecoderOnlyOutput
BeamSampleDecoderOnlyOutput = GenerateBeamDecoderOnlyOutput
BeamSearchEncoderDecoderOutput = GenerateBeamEncoderDecoderOutput
BeamSampleEncoderDecoderOutput = GenerateBeamEncoderDecoderOutput
