"""RoFormer: BERT whose positions turn queries and keys (and values, if `rotary_value`), of neighbouring channels each.

Su et al. 2021, arXiv:2104.09864, where rotary positions come from; original code ZhuiyiTechnology/roformer. Word
vectors may be narrower than the states, as ELECTRA's; there is no pooler. Sines and cosines are a table, and stored.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.spec import At, Param, Spec
from formax.layers import embed, heads, norm, rope, text_encoder
from formax.layers.dropout import dropout
from formax.layers.text_encoder import TextEncoderConfig
from formax.models.text import electra


@config
class RoFormerConfig(TextEncoderConfig):
    """`config.json` of model type "roformer"."""

    model_type: ClassVar[str] = "roformer"

    vocab_size: int = 50000
    embedding_size: int | None = None
    max_position_embeddings: int = 1536
    rotary_value: bool = False
    use_cache: bool = True

    @property
    def word_size(self) -> int:
        return self.embedding_size or self.hidden_size


def encoder_spec(c: RoFormerConfig) -> dict[str, Spec]:
    """Words and segments, their projection, the table of angles, and layers."""
    tables = {key: part for key, part in text_encoder.embeddings_spec(c).items() if not key.startswith("position")}
    shape = (c.max_position_embeddings, c.head_dim)
    name, tf = "encoder.embed_positions.weight", "encoder.embed_positions.embeddings"
    angles = Param(shape, (None, None), name, embed.vaswani, buffer=True, flax="", tf=tf)
    return {**electra.projected_spec(c), "embed": At("embeddings", tables), "angles": {"embedding": angles}}


def embeddings(
    p: Any, c: RoFormerConfig, ids: Any, types: Any, positions: Any, vectors: Any, offset: Any, key: Any
) -> jax.Array:
    """Word and segment vectors, added, normalised and projected: [B, T] -> [B, T, E]."""
    tables = p["embed"]
    x = embed.embed(tables["word"], ids) if vectors is None else vectors
    x = x + embed.embed(tables["token_type"], jnp.zeros((1, 1), jnp.int32) if types is None else types)
    x = dropout(norm.layer(tables["norm"], x, c.layer_norm_eps), c.hidden_dropout_prob, key)
    return electra.projected(p, x)


def rotation(p: Any, c: RoFormerConfig, x: jax.Array, offset: Any) -> dict[str, Any]:
    """What turns queries and keys, and values where the configuration says so."""
    angles = embed.embed(p["angles"], embed.positions(offset, x))[:, :, None]  # [B or 1, T, 1, D]
    sin, cos = jnp.split(angles, 2, axis=-1)
    turn = partial(rope.rotate_neighbours, cos=cos, sin=sin)
    return {"rotate": turn, "rotate_values": turn if c.rotary_value else None}


layers = text_encoder.encoder(embeddings, text_encoder.block, rotation)


def encode(
    p: Any,
    c: RoFormerConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    inputs_embeds: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings and all layers: ids [B, T] -> (states [B, T, E], cache). Positions are those of the columns."""
    given = input_ids, attention_mask, token_type_ids, None, inputs_embeds
    return layers(p, c, *given, encoder_hidden_states, encoder_attention_mask, cache, key)


_plain = partial(heads.with_heads, "roformer", encoder_spec)
_names = ("transform.dense", "transform.LayerNorm", "decoder")


def _words(c: RoFormerConfig) -> dict[str, Spec]:
    return heads.words_spec("cls.predictions", c, names=_names, size=c.word_size, tf="mlm___cls.predictions")


_text = _plain(heads.deep_head()), heads.deep_classification(encode, lambda c: c.hidden_act)
_choice = heads.summary_choice("roformer", encoder_spec, encode)
_labels = heads.label_heads("RoFormer", _plain, _plain, encode, encode, text=_text, choice=_choice)

FAMILY = Family(
    "roformer",
    RoFormerConfig,
    base="roformer",
    inputs=encode,
    init_cache=text_encoder.init_cache,
    relative="bert",
    architectures=(
        Architecture("RoFormerModel", "", encoder_spec, heads.bare(encode), also=("ForTextEncoding",)),
        Architecture("RoFormerForMaskedLM", "ForMaskedLM", _plain(_words), heads.masked_lm(encode)),
        Architecture("RoFormerForCausalLM", "ForCausalLM", _plain(_words), heads.causal_lm(encode, heads.words)),
        *_labels,
    ),
    flax=Port(
        ("RoFormerModel", "RoFormerForMaskedLM", *(one.name for one in _labels)),
        inputs=("input_ids", "attention_mask", "token_type_ids", "head_mask"),
        lacks=lambda c: {"embedding_size": c.word_size != c.hidden_size},
    ),
    tf=Port(repeats={"mlm___cls": "roformer/embeddings/"}),
)
