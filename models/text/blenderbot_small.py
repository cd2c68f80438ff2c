"""The small Blenderbot of 90 million parameters, which is BART but for how it begins.

Roller et al. 2020, arXiv:2004.13637; original code facebookresearch/ParlAI. It normalises what each part of a layer
puts out, as BART does. The encoder normalises the sum of words and positions; the decoder normalises words, and adds
positions to that.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import config
from formax.core.family import Family, Port
from formax.core.spec import Spec
from formax.layers import embed, norm, seq2seq, seq2seq_heads, transformer
from formax.layers.dropout import dropout
from formax.layers.transformer import EPS, FLAX_INPUTS, post_norm
from formax.models.text import blenderbot


@config
class BlenderbotSmallConfig(blenderbot.BlenderbotConfig):
    """`config.json` of model type "blenderbot-small"."""

    model_type: ClassVar[str] = "blenderbot-small"
    implemented: ClassVar = blenderbot.BlenderbotConfig.implemented | {
        "add_final_layer_norm": (False,),
        "layernorm_variant": ("xlm",),
        "normalize_before": (False,),
        "normalize_embedding": (True,),
    }

    vocab_size: int = 50265
    max_position_embeddings: int = 512
    encoder_layers: int = 8
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 16
    decoder_layers: int = 8
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 16
    d_model: int = 512
    encoder_no_repeat_ngram_size: int | None = None


def part_spec(c: BlenderbotSmallConfig, part: str) -> dict[str, Spec]:
    """Positions, first norm and layers of the encoder or the decoder."""
    return {
        "embed": {
            "position": transformer.positions_spec(c, c.max_position_embeddings),
            "norm": norm.layer_spec("layernorm_embedding", c.d_model),
        },
        "layers": transformer.layers_spec(c, part),
    }


def embeddings(p: Any, c: BlenderbotSmallConfig, part: str, ids: Any, vectors: Any, offset: Any, key: Any) -> jax.Array:
    """Word and position vectors, added; normalised before that in the decoder, else after: [B, T] -> [B, T, E]."""
    own, limit = p[part]["embed"], c.max_position_embeddings
    with tap.scope("embed"):
        if part == "encoder":
            x = transformer.words(p, c, part, ids, vectors, limit)
            x = norm.layer(own["norm"], x + embed.embed(own["position"], embed.positions(offset, x)), EPS)
        else:
            # Scaled words would be the same after the norm, but for its epsilon; the reference does not scale them.
            x = transformer.plain_words(p, part, ids, vectors, limit)
            x = norm.layer(own["norm"], x, EPS) + embed.embed(own["position"], embed.positions(offset, x))
        return tap.tap("out", dropout(x, c.dropout, key))


model_spec = partial(transformer.one_table_spec, part_spec)
decoder_spec = partial(transformer.lone_decoder_spec, part_spec)
encode = transformer.text_encoder(embeddings, post_norm)
decode = transformer.text_decoder(embeddings, post_norm)
run_both = seq2seq.both(encode, decode)

_PORTED = ("BlenderbotSmallModel", "BlenderbotSmallForConditionalGeneration")

FAMILY = Family(
    "blenderbot-small",
    BlenderbotSmallConfig,
    base="model",
    inputs=run_both,
    init_cache=transformer.init_cache,
    relative="bart",
    architectures=(
        *seq2seq_heads.word_heads("BlenderbotSmall", model_spec, run_both, methods={"encode": encode}),
        seq2seq_heads.lone_decoder("BlenderbotSmall", "model", decoder_spec, decode),
    ),
    flax=Port(_PORTED, inputs=FLAX_INPUTS),
    tf=Port(_PORTED, numbered="."),
)
