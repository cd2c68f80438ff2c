"""Encoder-decoders from images to texts, made of any encoder and any decoder: TrOCR, Donut, ViT and GPT-2.

Li et al. 2021, arXiv:2109.10282 (TrOCR). The parts are those of `layers/composite.py`; here is how an image is read.
"""

from functools import partial
from typing import Any, ClassVar

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput, Seq2SeqLogitsOutput
from formax.core.rng import split
from formax.layers import composite, seq2seq


@config
class VisionEncoderDecoderConfig(composite.EncoderDecoderConfig):
    """`config.json` of model type "vision-encoder-decoder"."""

    model_type: ClassVar[str] = "vision-encoder-decoder"


def encode(p: Any, c: VisionEncoderDecoderConfig, pixel_values: Any = None, key: Any = None) -> BaseModelOutput:
    """The encoder's states: images [B, C, H, W] -> [B, S, E]."""
    return composite.read(p, c, key, pixel_values=pixel_values)


def conditional_generation(
    p: Any,
    c: VisionEncoderDecoderConfig,
    pixel_values: Any = None,
    decoder_input_ids: Any = None,
    decoder_attention_mask: Any = None,
    encoder_outputs: Any = None,
    decoder_inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Seq2SeqLogitsOutput:
    """Scores of the next word: images [B, C, H, W] and ids [B, T] -> logits [B, T, V].

    In the place of images the encoder's states [B, S, E] may be given, or a cache that has seen them.
    """
    k_encoder, k_decoder = split(key, 2)
    encoded = partial(encode, p, c, pixel_values, k_encoder)
    memory = seq2seq.memory_of(encoded, (pixel_values,), encoder_outputs, cache)
    own = {"attention_mask": decoder_attention_mask, "inputs_embeds": decoder_inputs_embeds, "cache": cache}
    return composite.write(p, c, memory, k_decoder, input_ids=decoder_input_ids, **own)


FAMILY = Family(
    "vision-encoder-decoder",
    VisionEncoderDecoderConfig,
    base="",
    inputs=conditional_generation,
    init_cache=composite.init_cache,
    architectures=(
        Architecture(
            "VisionEncoderDecoderModel",
            "ForVision2Seq",
            composite.model_spec,
            conditional_generation,
            also=("ForImageTextToText",),
            methods={"encode": encode},
        ),
    ),
    parts=composite.parts,
    flax=Port(lacks=composite.lacks),
    tf=Port(lacks=composite.lacks),
)
