"""BART: the original Transformer with GELU and learned positions, pre-trained to restore damaged text.

Lewis et al. 2019, arXiv:1910.13461; original code facebookresearch/fairseq, whose position tables have two rows more
than positions. A bidirectional encoder with blocks as BERT's (its embeddings are normalised, too, but have no segments)
and a decoder that looks at the encoder's states; all of one word table, which is the output as well. Most
encoder-decoders of text descend from it, and differ in where the norms are and how positions are told.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import config
from formax.core.family import Family, Port
from formax.core.frozen import FrozenDict
from formax.core.spec import Ignored, Spec
from formax.layers import embed, norm, seq2seq, seq2seq_heads, transformer
from formax.layers.dropout import dropout
from formax.layers.transformer import EPS, FLAX_INPUTS, TransformerConfig, post_norm

OFFSET = 2  # the position table's first rows are not positions


@config
class BartConfig(TransformerConfig):
    """`config.json` of model type "bart"."""

    model_type: ClassVar[str] = "bart"
    # The first code had switches for BART's relatives, which became families of their own.
    implemented: ClassVar = {
        "add_bias_logits": (False,),
        "add_final_layer_norm": (False,),
        "extra_pos_embeddings": (OFFSET,),
        "normalize_before": (False,),
        "normalize_embedding": (True,),
        "pruned_heads": (FrozenDict(),),
        "static_position_embeddings": (False,),
    }

    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    classifier_dropout: float = 0.0
    scale_embedding: bool = False
    use_cache: bool = True
    id2label: FrozenDict = FrozenDict({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    decoder_start_token_id: int | None = 2
    forced_eos_token_id: int | None = 2


def part_spec(c: BartConfig, part: str) -> dict[str, Spec]:
    """Positions, first norm and layers of the encoder or the decoder."""
    return {
        "embed": {
            "position": transformer.positions_spec(c, c.max_position_embeddings + OFFSET),
            "norm": norm.layer_spec("layernorm_embedding", c.d_model),
        },
        "layers": transformer.layers_spec(c, part),
        "version": Ignored("version"),
    }


def embeddings(p: Any, c: BartConfig, part: str, ids: Any, vectors: Any, offset: Any, key: Any) -> jax.Array:
    """Word and position vectors, added and normalised: [B, T] -> [B, T, E]."""
    own = p[part]["embed"]
    with tap.scope("embed"):
        x = transformer.words(p, c, part, ids, vectors, c.max_position_embeddings)
        x = x + embed.embed(own["position"], OFFSET + embed.positions(offset, x))
        return tap.tap("out", dropout(norm.layer(own["norm"], x, EPS), c.dropout, key))


model_spec = partial(transformer.text_spec, part_spec)
decoder_spec = partial(transformer.lone_decoder_spec, part_spec)
encode = transformer.text_encoder(embeddings, post_norm)
decode = transformer.text_decoder(embeddings, post_norm)
run_both = seq2seq.both(encode, decode, shifted=seq2seq.after_start)  # a decoder without inputs reads the text, too

_methods = {"encode": encode}
_BOTH = ("ForConditionalGeneration", "ForSequenceClassification")

FAMILY = Family(
    "bart",
    BartConfig,
    base="model",
    inputs=run_both,
    init_cache=transformer.init_cache,
    architectures=(
        *seq2seq_heads.word_heads(
            "Bart", model_spec, run_both, also=("ForMaskedLM", "ForPreTraining"), methods=_methods
        ),
        *seq2seq_heads.label_heads("Bart", "model", model_spec, run_both, methods=_methods),
        seq2seq_heads.lone_decoder("Bart", "model", decoder_spec, decode),
    ),
    flax=Port(
        tuple(f"Bart{head}" for head in ("Model", *_BOTH, "ForQuestionAnswering", "ForCausalLM")),
        inputs=(*FLAX_INPUTS, "encoder_hidden_states", "encoder_attention_mask"),
    ),
    tf=Port(tuple(f"Bart{head}" for head in ("Model", *_BOTH)), numbered="."),
)
