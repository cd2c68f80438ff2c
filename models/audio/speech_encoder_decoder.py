"""Encoder-decoders from speech to texts, made of any encoder and any decoder: wav2vec 2.0 and mBART that translates it.

Wang et al. 2021, arXiv:2104.06678 (translation by wav2vec 2.0 and a pre-trained decoder). The parts are those of
`layers/composite.py`; here is how a recording is read.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput, Seq2SeqLogitsOutput
from formax.core.rng import split
from formax.layers import composite, seq2seq, speech


@config
class SpeechEncoderDecoderConfig(composite.EncoderDecoderConfig):
    """`config.json` of model type "speech-encoder-decoder"."""

    model_type: ClassVar[str] = "speech-encoder-decoder"


def encode(
    p: Any, c: SpeechEncoderDecoderConfig, input_values: Any = None, attention_mask: Any = None, key: Any = None
) -> BaseModelOutput:
    """The encoder's states: recordings [B, samples] -> [B, S, E]."""
    return composite.read(p, c, key, input_values=input_values, attention_mask=attention_mask)


def frame_mask(c: SpeechEncoderDecoderConfig, attention_mask: jax.Array, frames: int) -> jax.Array:
    """Which states are of samples that are no padding: [B, samples] -> bool [B, S]."""
    encoder: Any = c.encoder
    return jnp.arange(frames) < speech.frame_lengths(encoder, attention_mask.sum(-1), adapter=True)[:, None]


def conditional_generation(
    p: Any,
    c: SpeechEncoderDecoderConfig,
    input_values: Any = None,
    attention_mask: Any = None,
    decoder_input_ids: Any = None,
    decoder_attention_mask: Any = None,
    encoder_outputs: Any = None,
    decoder_inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Seq2SeqLogitsOutput:
    """Scores of the next word: recordings [B, samples] and ids [B, T] -> logits [B, T, V].

    In the place of recordings the encoder's states [B, S, E] may be given, or a cache that has seen them.
    """
    k_encoder, k_decoder = split(key, 2)
    encoded = partial(encode, p, c, input_values, attention_mask, k_encoder)
    memory = seq2seq.memory_of(encoded, (input_values,), encoder_outputs, cache)
    frames = cache[0]["cross"].room if memory is None else memory.shape[1]
    mask = None if attention_mask is None else frame_mask(c, attention_mask, frames)
    own = {"attention_mask": decoder_attention_mask, "inputs_embeds": decoder_inputs_embeds, "cache": cache}
    return composite.write(p, c, memory, k_decoder, input_ids=decoder_input_ids, encoder_attention_mask=mask, **own)


FAMILY = Family(
    "speech-encoder-decoder",
    SpeechEncoderDecoderConfig,
    base="",
    inputs=conditional_generation,
    init_cache=composite.init_cache,
    architectures=(
        Architecture(
            "SpeechEncoderDecoderModel",
            "ForSpeechSeq2Seq",
            composite.model_spec,
            conditional_generation,
            methods={"encode": encode},
        ),
    ),
    parts=composite.parts,
    flax=Port(lacks=composite.lacks),
)
