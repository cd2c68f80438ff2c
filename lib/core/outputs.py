"""What models return: frozen pytree dataclasses with Hugging Face's field names.

A field is read as an attribute (`out.logits`), by name (`out["logits"]`) or by position among the fields that are not
None (`out[0]`), as users of transformers expect. Shapes use B batch, T length, H hidden size, V vocabulary, N heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar, dataclass_transform

import jax

Array = jax.Array
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def output(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and a pytree whose children are all its fields."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    return jax.tree_util.register_dataclass(made)


class Output:
    """Access by name, position and iteration over the fields that are set."""

    def items(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of the fields that are not None, in order."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        return [name for name, _ in self.items()]

    def to_tuple(self) -> tuple[Any, ...]:
        """Values of the fields that are not None."""
        return tuple(value for _, value in self.items())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            found = dict(self.items())
            if key not in found:
                raise KeyError(f"{key!r} is not set; this {type(self).__name__} has {', '.join(found)}")
            return found[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@output
class BaseModelOutput(Output):
    """Encoder states: `last_hidden_state` [B, T, H]; the rest when asked for."""

    last_hidden_state: Array
    pooler_output: Array | None = None
    cache: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None


@output
class LogitsOutput(Output):
    """`logits` of a head: [B, T, V] for language models, [B, labels] for classifiers, [B, T, labels] for taggers."""

    logits: Array
    cache: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None


@output
class DoubleHeadsOutput(Output):
    """`logits` [B, choices, T, V] of the next word and `mc_logits` [B, choices] of the best continuation."""

    logits: Array
    mc_logits: Array
    cache: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@output
class PreTrainingOutput(Output):
    """BERT's two objectives: `prediction_logits` [B, T, V] and `seq_relationship_logits` [B, 2]."""

    prediction_logits: Array
    seq_relationship_logits: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None


@output
class SentenceOrderOutput(Output):
    """ALBERT's two objectives: `prediction_logits` [B, T, V] and `sop_logits` [B, 2]."""

    prediction_logits: Array
    sop_logits: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@output
class MoeModelOutput(Output):
    """States [B, T, H] of a mixture of experts; `router_logits`, when asked for, one [B * T, experts] a layer."""

    last_hidden_state: Array
    cache: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    router_logits: tuple[Array, ...] | None = None


@output
class MoeLogitsOutput(Output):
    """`logits` [B, T, V]; `router_logits` and `aux_loss`, how unevenly the experts are used, when asked for."""

    logits: Array
    aux_loss: Array | None = None
    cache: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    router_logits: tuple[Array, ...] | None = None


@output
class MaskedImageModelingOutput(Output):
    """`reconstruction` [B, C, height, width] of the pixels, the masked ones among them."""

    reconstruction: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@output
class SemanticSegmentationOutput(Output):
    """`logits` [B, labels, height, width] of every place; `auxiliary_logits` of a head that only training needs."""

    logits: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    auxiliary_logits: Array | None = None


@output
class TextEmbedsOutput(Output):
    """`text_embeds` [B, D] in the space of both towers, not normalised, and `last_hidden_state` [B, T, E]."""

    text_embeds: Array
    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@output
class ImageEmbedsOutput(Output):
    """`image_embeds` [B, D] in the space of both towers, not normalised, and `last_hidden_state` [B, 1 + N, E]."""

    image_embeds: Array
    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@output
class TwoTowersOutput(Output):
    """Similarities of I images and T texts, [I, T] and [T, I]; their vectors, of length 1; what the towers return."""

    logits_per_image: Array
    logits_per_text: Array
    text_embeds: Array
    image_embeds: Array
    text_model_output: BaseModelOutput
    vision_model_output: BaseModelOutput


@output
class Seq2SeqOutput(Output):
    """An encoder-decoder's `last_hidden_state` [B, T, H] of the decoder, and the encoder's [B, S, H]."""

    last_hidden_state: Array
    cache: Any = None
    decoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None


@output
class Seq2SeqLogitsOutput(Output):
    """`logits` of a head of an encoder-decoder: [B, T, V] of the decoder's words, [B, labels] of a classifier."""

    logits: Array
    cache: Any = None
    decoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None


@output
class Seq2SeqQuestionAnsweringOutput(Output):
    """`start_logits` and `end_logits` [B, T] of the answer span, over the decoder's positions."""

    start_logits: Array
    end_logits: Array
    cache: Any = None
    decoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None


@output
class DetectionModelOutput(Output):
    """States of the queries [B, Q, E] and of the map's places [B, S, E]; of all layers [L, B, Q, E] if auxiliary."""

    last_hidden_state: Array
    decoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None
    intermediate_hidden_states: Array | None = None


@output
class FoundOutput(Output):
    """Classes and boxes that one layer's states give; see `DetectionOutput`."""

    logits: Array
    pred_boxes: Array


@output
class DetectionOutput(Output):
    """`logits` [B, Q, labels + 1] (the last: no object), `pred_boxes` [B, Q, 4]: centre, width, height in 0 to 1.

    `pred_masks` [B, Q, H / 4, W / 4] of a segmentation; `auxiliary_outputs` of all decoder layers but the last.
    """

    logits: Array
    pred_boxes: Array
    pred_masks: Array | None = None
    auxiliary_outputs: tuple[FoundOutput, ...] | None = None
    last_hidden_state: Array | None = None
    decoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None


@output
class BackboneOutput(Output):
    """`feature_maps`, one [B, C, height, width] for each stage that was asked for."""

    feature_maps: tuple[Array, ...]
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@output
class QuestionAnsweringOutput(Output):
    """`start_logits` and `end_logits` [B, T] of the answer span."""

    start_logits: Array
    end_logits: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None


@output
class SpeechOutput(Output):
    """States [B, T, H] of frames, and the features [B, T, C] that they were made of."""

    last_hidden_state: Array
    extract_features: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@output
class QuantizedOutput(Output):
    """Projected states and their codes, each [B, T, P]; perplexity [] is how many codes are in use."""

    projected_states: Array
    projected_quantized_states: Array
    codevector_perplexity: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@output
class XVectorOutput(Output):
    """`embeddings` and `logits` [B, X] of voices; `cosines` [B, labels] of the logits with each speaker's weights."""

    logits: Array
    embeddings: Array
    cosines: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
