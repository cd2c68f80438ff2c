"""Encoder-decoders of texts, made of any encoder and any decoder: BERT that reads and GPT-2 that writes about it.

Rothe et al. 2020, "Leveraging Pre-trained Checkpoints for Sequence Generation Tasks", arXiv:1907.12461. The parts are
those of `layers/composite.py`; here is how a text is read.
"""

from functools import partial
from typing import Any, ClassVar

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput, Seq2SeqLogitsOutput
from formax.core.rng import split
from formax.layers import composite, seq2seq


@config
class EncoderDecoderConfig(composite.EncoderDecoderConfig):
    """`config.json` of model type "encoder-decoder"."""

    model_type: ClassVar[str] = "encoder-decoder"


def encode(
    p: Any,
    c: EncoderDecoderConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    inputs_embeds: Any = None,
    key: Any = None,
) -> BaseModelOutput:
    """The encoder's states: ids [B, S] -> [B, S, E]."""
    own = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "inputs_embeds": inputs_embeds}
    return composite.read(p, c, key, input_ids=input_ids, **own)


def conditional_generation(
    p: Any,
    c: EncoderDecoderConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    decoder_input_ids: Any = None,
    decoder_attention_mask: Any = None,
    encoder_outputs: Any = None,
    token_type_ids: Any = None,
    inputs_embeds: Any = None,
    decoder_inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Seq2SeqLogitsOutput:
    """Scores of the next word: ids [B, S] and [B, T] -> logits [B, T, V].

    In the place of `input_ids` the encoder's states [B, S, E] may be given, or a cache that has seen them.
    """
    k_encoder, k_decoder = split(key, 2)
    encoded = partial(encode, p, c, input_ids, attention_mask, token_type_ids, inputs_embeds, k_encoder)
    memory = seq2seq.memory_of(encoded, (input_ids, inputs_embeds), encoder_outputs, cache)
    own = {"attention_mask": decoder_attention_mask, "inputs_embeds": decoder_inputs_embeds, "cache": cache}
    return composite.write(
        p, c, memory, k_decoder, input_ids=decoder_input_ids, encoder_attention_mask=attention_mask, **own
    )


FAMILY = Family(
    "encoder-decoder",
    EncoderDecoderConfig,
    base="",
    inputs=conditional_generation,
    init_cache=composite.init_cache,
    architectures=(
        Architecture(
            "EncoderDecoderModel",
            "ForSeq2SeqLM",
            composite.model_spec,
            conditional_generation,
            methods={"encode": encode},
        ),
    ),
    parts=composite.parts,
    flax=Port(lacks=composite.lacks),
    tf=Port(lacks=composite.lacks),
)
