"""ALBERT: BERT with few parameters, for layers are one layer over and over and word vectors are narrow.

Lan et al. 2019, arXiv:1909.11942; original code google-research/albert. `num_hidden_groups` says how many different
groups of layers there are (published: one), each of `inner_group_num` layers, and `num_hidden_layers` how many groups
are run through. Which sentence comes first takes the place of BERT's sentence pairs.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import SentenceOrderOutput
from formax.core.rng import split
from formax.core.spec import At, Spec, fold, normal, optional, stack_of
from formax.layers import embed, heads, mlp, norm, text_encoder
from formax.layers.attention import Mask, attention_spec, from_attention_mask
from formax.layers.attention.bias import relative_key_bias, relative_key_spec
from formax.layers.linear import linear, linear_spec
from formax.layers.text_encoder import TextEncoderConfig
from formax.models.text.bert import BertConfig


@config
class AlbertConfig(TextEncoderConfig):
    """`config.json` of model type "albert"."""

    model_type: ClassVar[str] = "albert"
    implemented: ClassVar = BertConfig.implemented

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0
    attention_probs_dropout_prob: float = 0
    classifier_dropout_prob: float = 0.1
    position_embedding_type: str = "absolute"
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 3

    def check(self) -> None:
        super().check()
        if not 1 <= self.num_hidden_groups <= max(self.num_hidden_layers, 1):
            raise ConfigError(f"num_hidden_groups={self.num_hidden_groups} must be 1 to num_hidden_layers")

    @property
    def word_size(self) -> int:
        return self.embedding_size

    @property
    def classifier_dropout(self) -> float:
        return self.classifier_dropout_prob

    def group_of(self, layer: int) -> int:
        """The group that is run through as the so many-th."""
        return int(layer / (self.num_hidden_layers / self.num_hidden_groups))


def layer_spec(c: AlbertConfig, layer: int) -> dict[str, Spec]:
    """One layer; it is counted over the groups, in which all are different."""
    names, init = ("query", "key", "value", "dense"), normal(c.initializer_range)
    own = attention_spec(c.hidden_size, c.heads_of(layer), c.head_dim, names=names, init=init)
    if c.position_embedding_type != "absolute":
        own["distance"] = relative_key_spec("distance_embedding", c.max_position_embeddings, c.head_dim, init)
    return {
        "attn": At("attention", own),
        "attn_norm": norm.layer_spec("attention.LayerNorm", c.hidden_size),
        "mlp": mlp.dense_spec(c.hidden_size, c.intermediate_size, ("ffn", "ffn_output"), init=init),
        "mlp_norm": norm.layer_spec("full_layer_layer_norm", c.hidden_size),
    }


def encoder_spec(c: AlbertConfig) -> dict[str, Spec]:
    """Embeddings, their projection, and the groups of layers."""
    init, inner = normal(c.initializer_range), c.inner_group_num
    groups = [
        stack_of("albert_layers", [layer_spec(c, group * inner + i) for i in range(inner)])
        for group in range(c.num_hidden_groups)
    ]
    project = linear_spec("embedding_hidden_mapping_in", c.word_size, c.hidden_size, (None, "embed"), init=init)
    return {
        "embed": At("embeddings", text_encoder.embeddings_spec(c)),
        "project": At("encoder", project),
        "groups": stack_of("encoder.albert_layer_groups", groups),
    }


def model_spec(c: AlbertConfig) -> dict[str, Spec]:
    """The encoder and the pooler, which checkpoints of heads that do not use it lack."""
    dense = linear_spec("pooler", c.hidden_size, c.hidden_size, ("embed", None), init=normal(c.initializer_range))
    return {**encoder_spec(c), "pooler": optional(dense)}


def distances(p: Any, c: AlbertConfig) -> dict[str, Any]:
    """What a layer is told of distances: BERT's scores, but not divided by sqrt(D) as the other ones are."""
    if "distance" not in p["attn"]:
        return {}
    both = c.position_embedding_type == "relative_key_query"

    def bias(q: jax.Array, k: jax.Array) -> jax.Array:
        return relative_key_bias(p["attn"]["distance"], q, k, key_too=both) * c.head_dim**0.5

    return {"bias": bias}


def encode(
    p: Any,
    c: AlbertConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings and all runs through layers: ids [B, T] -> (states [B, T, E], None).

    Layers are numbered as they are run through, those inside groups too: of more than one in a group, `hidden_states`
    has what is between them, which the reference leaves out.
    """
    embed.check_inputs(input_ids, inputs_embeds, c.max_position_embeddings)
    k_embed, k_layers = split(key, 2)
    mask = from_attention_mask(attention_mask)
    with tap.scope("embed"):
        x = text_encoder.embeddings(p, c, input_ids, token_type_ids, position_ids, inputs_embeds, 0, k_embed)
        x = tap.tap("out", linear(p["project"], x))
    # The same arrays again and again: what is shared stays one in memory, and its gradients are summed.
    layers = tuple(layer for i in range(c.num_hidden_layers) for layer in p["groups"][c.group_of(i)])

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return text_encoder.block(p, c, x, mask, Mask(), None, None, key, **distances(p, c))

    return fold(run, layers, x, key=k_layers)


def pretraining(p: Any, c: AlbertConfig, input_ids: Any = None, **inputs: Any) -> SentenceOrderOutput:
    """Masked words [B, T, V], and whether two segments are in order (0) or exchanged (1): [B, 2]."""
    x, _ = encode(p, c, input_ids, **inputs)
    order = heads.classify({"head": p["order"]}, c, text_encoder.pool(p, x), inputs.get("key"))
    return SentenceOrderOutput(prediction_logits=heads.words(p, c, x), sop_logits=order)


def _words(c: AlbertConfig) -> dict[str, Spec]:
    names = ("dense", "LayerNorm", "decoder")
    # TensorFlow has two biases, of which it adds the decoder's alone.
    return heads.words_spec("predictions", c, names=names, size=c.word_size, tf_bias="decoder/bias")


_plain, _pooled = partial(heads.with_heads, "albert", encoder_spec), partial(heads.with_heads, "albert", model_spec)
_order = heads.linear_head("sop_classifier.classifier", key="order")

FAMILY = Family(
    "albert",
    AlbertConfig,
    base="albert",
    inputs=encode,
    relative="bert",
    architectures=(
        Architecture("AlbertModel", "", model_spec, text_encoder.pooled(encode), also=("ForTextEncoding",)),
        Architecture("AlbertForPreTraining", "ForPreTraining", _pooled(_words, _order), pretraining),
        Architecture("AlbertForMaskedLM", "ForMaskedLM", _plain(_words), heads.masked_lm(encode)),
        *heads.label_heads("Albert", _plain, _pooled, encode, text_encoder.summarised(encode)),
    ),
    flax=Port(),
    tf=Port(
        repeats={"predictions": "albert/embeddings/"},
        copies={"predictions/bias:0": "predictions/decoder/bias:0"},
    ),
)
