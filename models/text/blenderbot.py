"""Blenderbot: an encoder-decoder for conversations, with a short encoder and a long decoder.

Roller et al. 2020, arXiv:2004.13637; original code facebookresearch/ParlAI. As mBART it normalises what each part of a
layer reads, and what comes out of both stacks, but not its embeddings; its table of positions has no rows to spare.
Parts share one table of words whether the head has its own or not.
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
from formax.layers.transformer import FLAX_INPUTS, TransformerConfig, pre_norm


@config
class BlenderbotConfig(TransformerConfig):
    """`config.json` of model type "blenderbot"."""

    model_type: ClassVar[str] = "blenderbot"
    # Switches of the first code, which had BART's relatives in one.
    implemented: ClassVar = {
        "add_bias_logits": (False,),
        "add_final_layer_norm": (True,),
        "do_blenderbot_90_layernorm": (True, False),  # of the other one
        "extra_layer_norm": (False,),
        "extra_pos_embeddings": (0,),
        "layernorm_variant": ("prelayernorm",),
        "normalize_before": (True,),
        "normalize_embedding": (False,),
        "static_position_embeddings": (False,),
    }

    vocab_size: int = 8008
    max_position_embeddings: int = 128
    encoder_layers: int = 2
    encoder_ffn_dim: int = 10240
    encoder_attention_heads: int = 32
    decoder_layers: int = 24
    decoder_ffn_dim: int = 10240
    decoder_attention_heads: int = 32
    d_model: int = 2560
    scale_embedding: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    decoder_start_token_id: int | None = 1
    forced_eos_token_id: int | None = 2
    encoder_no_repeat_ngram_size: int | None = 3


def part_spec(c: BlenderbotConfig, part: str) -> dict[str, Spec]:
    """Positions, layers and last norm of the encoder or the decoder."""
    return {
        "embed": {"position": transformer.positions_spec(c, c.max_position_embeddings)},
        "layers": transformer.layers_spec(c, part),
        "norm": norm.layer_spec("layer_norm", c.d_model),
    }


def embeddings(p: Any, c: BlenderbotConfig, part: str, ids: Any, vectors: Any, offset: Any, key: Any) -> jax.Array:
    """Word and position vectors, added: [B, T] -> [B, T, E]."""
    with tap.scope("embed"):
        x = transformer.words(p, c, part, ids, vectors, c.max_position_embeddings)
        x = x + embed.embed(p[part]["embed"]["position"], embed.positions(offset, x))
        return tap.tap("out", dropout(x, c.dropout, key))


model_spec = partial(transformer.one_table_spec, part_spec)
decoder_spec = partial(transformer.lone_decoder_spec, part_spec)
encode = transformer.text_encoder(embeddings, pre_norm)
decode = transformer.text_decoder(embeddings, pre_norm)
run_both = seq2seq.both(encode, decode)

_PORTED = ("BlenderbotModel", "BlenderbotForConditionalGeneration")

FAMILY = Family(
    "blenderbot",
    BlenderbotConfig,
    base="model",
    inputs=run_both,
    init_cache=transformer.init_cache,
    relative="mbart",
    architectures=(
        *seq2seq_heads.word_heads("Blenderbot", model_spec, run_both, methods={"encode": encode}),
        seq2seq_heads.lone_decoder("Blenderbot", "model", decoder_spec, decode),
    ),
    flax=Port(_PORTED, inputs=FLAX_INPUTS),
    tf=Port(_PORTED, numbered="."),
)
