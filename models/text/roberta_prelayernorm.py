"""RoBERTa-PreLayerNorm: RoBERTa whose layers see their input normalised, and a norm after the last one.

Ott et al. 2019, arXiv:1904.01038 (fairseq's `--encoder-normalize-before`); checkpoints of Wettig et al. 2022,
arXiv:2202.08005; original code princeton-nlp/DinkyTrain. The embeddings keep their norm.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import config
from formax.core.family import Family, Port
from formax.core.spec import Spec
from formax.layers import norm, text_encoder
from formax.layers.dropout import dropout
from formax.models.text import roberta
from formax.models.text.roberta import RobertaConfig


@config
class RobertaPreLayerNormConfig(RobertaConfig):
    """`config.json` of model type "roberta-prelayernorm"."""

    model_type: ClassVar[str] = "roberta-prelayernorm"


def block_spec(c: RobertaPreLayerNormConfig, layer: int) -> dict[str, Spec]:
    """One layer: BERT's, its norms stored with what they come before."""
    spec = text_encoder.block_spec(c, layer)
    places = {"attn_norm": "attention", "cross_norm": "crossattention", "mlp_norm": "intermediate"}
    norms = {key: norm.layer_spec(f"{place}.LayerNorm", c.hidden_size) for key, place in places.items() if key in spec}
    return {**spec, **norms}


def pre_norm(p: Any, c: Any, x: jax.Array, part: Any, key: Any) -> Any:
    """A part sees its input normalised, and adds to it: [B, T, E] -> ([B, T, E], cache)."""
    h, cache = part(norm.layer(p, x, c.layer_norm_eps))
    return x + dropout(h, c.hidden_dropout_prob, key), cache


def encoder_spec(c: RobertaPreLayerNormConfig) -> dict[str, Spec]:
    """Embeddings, layers and the last norm."""
    return {**text_encoder.encoder_spec(c, block_spec), "norm": norm.layer_spec("LayerNorm", c.hidden_size)}


layers = text_encoder.encoder(roberta.embeddings, partial(text_encoder.block, around=pre_norm))


def encode(p: Any, c: RobertaPreLayerNormConfig, input_ids: Any = None, **inputs: Any) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache).

    The norm's place is not called `last`: the reference's `hidden_states` end with what goes into it.
    """
    x, cache = layers(p, c, input_ids, **inputs)
    return tap.tap("norm", norm.layer(p["norm"], x, c.layer_norm_eps)), cache


FAMILY = Family(
    "roberta-prelayernorm",
    RobertaPreLayerNormConfig,
    base="roberta_prelayernorm",
    inputs=layers,
    init_cache=text_encoder.init_cache,
    relative="roberta",
    architectures=roberta.architectures("RobertaPreLayerNorm", "roberta_prelayernorm", encode, encoder_spec),
    counts_tokens=True,
    flax=Port(inputs=text_encoder.FLAX_INPUTS),
    tf=Port(repeats={"lm_head": "roberta_prelayernorm/embeddings/"}),
)
