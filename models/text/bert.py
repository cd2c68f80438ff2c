"""BERT: a bidirectional encoder with post-layer-norm blocks, pre-trained on masked words and sentence pairs.

Devlin et al. 2018, arXiv:1810.04805; original code google-research/bert. With `is_decoder` it reads left to right, with
`add_cross_attention` it looks at an encoder's states too. Relative positions: `relative_key` is Shaw et al. 2018
(arXiv:1803.02155), `relative_key_query` Huang et al. 2020 (arXiv:2009.13658). Most text encoders here descend from it.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput, LogitsOutput, PreTrainingOutput
from formax.core.rng import split
from formax.core.spec import At, Ignored, Spec, fold, normal, optional, stack_of
from formax.layers import embed, heads, mlp, norm, seq2seq
from formax.layers.activations import check_activation
from formax.layers.attention import attention_spec, causal_mask, cross_attention, from_attention_mask, self_attention
from formax.layers.attention.bias import relative_key_bias, relative_key_spec
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec


@config
class BertConfig(Config):
    """`config.json` of model type "bert"."""

    model_type: ClassVar[str] = "bert"
    implemented: ClassVar = {"position_embedding_type": ("absolute", "relative_key", "relative_key_query")}

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    use_cache: bool = True
    classifier_dropout: float | None = None

    def check(self) -> None:
        check_multiple(self, "hidden_size", "num_attention_heads")
        if self.add_cross_attention and not self.is_decoder:
            raise ConfigError("add_cross_attention=True needs is_decoder=True")
        check_activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def heads_of(self, layer: int) -> int:
        """Attention heads that are left in a layer."""
        return self.num_attention_heads - len(self.pruned_heads.get(layer, ()))


def block_spec(c: BertConfig, layer: int, *, bias: bool | str = True) -> dict[str, Spec]:
    """One layer; `bias` says which projections of attention have one."""
    init = normal(c.initializer_range)
    names = ("self.query", "self.key", "self.value", "output.dense")
    attn = partial(attention_spec, c.hidden_size, head_dim=c.head_dim, names=names, init=init, bias=bias)
    own = attn(c.heads_of(layer))
    if c.position_embedding_type != "absolute":
        own["distance"] = relative_key_spec("self.distance_embedding", c.max_position_embeddings, c.head_dim, init)
    spec: dict[str, Spec] = {
        "attn": At("attention", own),
        "attn_norm": norm.layer_spec("attention.output.LayerNorm", c.hidden_size),
        "mlp": mlp.dense_spec(c.hidden_size, c.intermediate_size, ("intermediate.dense", "output.dense"), init=init),
        "mlp_norm": norm.layer_spec("output.LayerNorm", c.hidden_size),
    }
    if c.add_cross_attention:
        spec["cross"] = At("crossattention", attn(c.num_attention_heads))
        spec["cross_norm"] = norm.layer_spec("crossattention.output.LayerNorm", c.hidden_size)
    return spec


def block(p: Any, c: BertConfig, x: Any, mask: Any, cross_mask: Any, memory: Any, cache: Any, key: Any) -> Any:
    """Post-norm: what each part computes is added to its input, then normalised. [B, T, E] -> ([B, T, E], cache)."""
    keys = split(key, 5)
    cache = cache or {"attn": None, "cross": None}
    own = {"mask": mask, "cache": cache["attn"], "dropout": c.attention_probs_dropout_prob, "key": keys[0]}
    other = {"mask": cross_mask, "cache": cache["cross"], "dropout": c.attention_probs_dropout_prob, "key": keys[2]}
    bias = None
    if c.position_embedding_type != "absolute":
        both = c.position_embedding_type == "relative_key_query"
        bias = partial(relative_key_bias, p["attn"]["distance"], key_too=both, q_offset=mask.q_offset)

    def add(name: str, h: jax.Array, key: Any) -> jax.Array:
        return norm.layer(p[name], x + dropout(h, c.hidden_dropout_prob, key), c.layer_norm_eps)

    h, attn = self_attention(p["attn"], x, c.head_dim, bias=bias, **own)
    x = add("attn_norm", h, keys[1])
    cross = cache["cross"]
    if "cross" in p and (memory is not None or cross is not None):
        h, cross = cross_attention(p["cross"], x, memory, c.head_dim, **other)
        x = add("cross_norm", h, keys[3])
    x = add("mlp_norm", mlp.dense(p["mlp"], x, c.hidden_act), keys[4])
    return x, {"attn": attn, "cross": cross}


def embeddings_spec(c: BertConfig) -> Spec:
    """Tables of words, positions and segments, and their norm."""
    table = partial(embed.embedding_spec, size=c.hidden_size, init=normal(c.initializer_range))
    parts = {
        "word": table("word_embeddings", c.vocab_size, tf="weight"),
        "position": table("position_embeddings", c.max_position_embeddings, axes=(None, "embed")),
        "token_type": table("token_type_embeddings", c.type_vocab_size, axes=(None, "embed")),
        "norm": norm.layer_spec("LayerNorm", c.hidden_size),
        "position_ids": Ignored("position_ids"),
    }
    return At("embeddings", parts)


def encoder_spec(c: BertConfig) -> dict[str, Spec]:
    """Embeddings and layers."""
    layers = [block_spec(c, i) for i in range(c.num_hidden_layers)]
    return {"embed": embeddings_spec(c), "layers": stack_of("encoder.layer", layers)}


def model_spec(c: BertConfig) -> dict[str, Spec]:
    """The encoder and the pooler, which checkpoints of heads that do not use it lack."""
    dense = linear_spec("pooler.dense", c.hidden_size, c.hidden_size, ("embed", None), init=normal(c.initializer_range))
    return {**encoder_spec(c), "pooler": optional(dense)}


def embeddings(p: Any, c: BertConfig, ids: Any, types: Any, positions: Any, vectors: Any, offset: Any, key: Any) -> Any:
    """Word, position and segment vectors, added and normalised: [B, T] -> [B, T, E]."""
    with tap.scope("embed"):
        x = embed.embed(p["word"], ids) if vectors is None else vectors
        x = x + embed.embed(p["token_type"], jnp.zeros((1, 1), jnp.int32) if types is None else types)
        if c.position_embedding_type == "absolute":
            positions = embed.positions(offset, x) if positions is None else positions
            x = x + embed.embed(p["position"], positions)
        return tap.tap("out", dropout(norm.layer(p["norm"], x, c.layer_norm_eps), c.hidden_dropout_prob, key))


def encode(
    p: Any,
    c: BertConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings and all layers: ids [B, T] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, c.max_position_embeddings)
    if cache is not None and not c.is_decoder:
        raise ValueError("a cache needs is_decoder=True: an encoder's states change with every token that follows")
    k_embed, k_layers = split(key, 2)
    mask = causal_mask(attention_mask, cache) if c.is_decoder else from_attention_mask(attention_mask)
    x = embeddings(p["embed"], c, input_ids, token_type_ids, position_ids, inputs_embeds, mask.q_offset, k_embed)
    cross_mask = from_attention_mask(encoder_attention_mask)

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, mask, cross_mask, encoder_hidden_states, cache, key)

    return fold(run, p.get("layers", ()), x, cache=cache, key=k_layers)  # a tree has no empty branches


def pool(p: Any, x: jax.Array) -> jax.Array:
    """The first token's state through a tanh layer: [B, T, E] -> [B, E]."""
    return tap.tap("pooler", jnp.tanh(linear(p["pooler"], x[:, 0])))


def summary(p: Any, c: BertConfig, input_ids: Any = None, **inputs: Any) -> jax.Array:
    """A vector for every text: ids [B, T] -> [B, E]."""
    return pool(p, encode(p, c, input_ids, **inputs)[0])


def model(p: Any, c: BertConfig, input_ids: Any = None, **inputs: Any) -> BaseModelOutput:
    """States [B, T, E] and pooled [B, E]."""
    x, cache = encode(p, c, input_ids, **inputs)
    return BaseModelOutput(last_hidden_state=x, pooler_output=pool(p, x), cache=cache)


def masked_lm(p: Any, c: BertConfig, input_ids: Any = None, **inputs: Any) -> LogitsOutput:
    """Scores of all words at every position [B, T, V]; as a decoder, of the next word."""
    x, cache = encode(p, c, input_ids, **inputs)
    return LogitsOutput(logits=heads.words(p, c, x), cache=cache)


def next_sentence(p: Any, c: BertConfig, input_ids: Any = None, **inputs: Any) -> LogitsOutput:
    """Whether the second segment follows the first (0) or not (1): [B, 2]."""
    return LogitsOutput(logits=linear(p["pair"], summary(p, c, input_ids, **inputs)))


def pretraining(p: Any, c: BertConfig, input_ids: Any = None, **inputs: Any) -> PreTrainingOutput:
    """Masked words [B, T, V] and next sentence [B, 2]."""
    x, _ = encode(p, c, input_ids, **inputs)
    pair = linear(p["pair"], pool(p, x))
    return PreTrainingOutput(prediction_logits=heads.words(p, c, x), seq_relationship_logits=pair)


def init_cache(c: BertConfig, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of a decoder's layers, with room for `length` positions and an encoder's `encoder_length` states."""
    if not c.is_decoder:
        return None
    counts = list(map(c.heads_of, range(c.num_hidden_layers)))
    sizes = {"head_dim": c.head_dim, "cross_heads": c.num_attention_heads}
    return seq2seq.caches(counts, batch, length, encoder_length or None, dtype, **sizes)


_plain, _pooled = partial(heads.with_heads, "bert", encoder_spec), partial(heads.with_heads, "bert", model_spec)
_names = ("transform.dense", "transform.LayerNorm", "decoder")
_words = partial(heads.words_spec, "cls.predictions", names=_names, tf="mlm___cls.predictions")
_pair = heads.linear_head("cls.seq_relationship", 2, key="pair", tf="nsp___cls.seq_relationship")
_FIRST = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "head_mask")

FAMILY = Family(
    "bert",
    BertConfig,
    base="bert",
    inputs=encode,
    init_cache=init_cache,
    old_names={"BertForCausalLM": "BertLMHeadModel"},
    architectures=(
        Architecture("BertModel", "", model_spec, model, also=("ForTextEncoding",)),
        Architecture("BertForPreTraining", "ForPreTraining", _pooled(_words, _pair), pretraining),
        Architecture("BertForMaskedLM", "ForMaskedLM", _plain(_words), masked_lm),
        Architecture("BertLMHeadModel", "ForCausalLM", _plain(_words), masked_lm),
        Architecture("BertForNextSentencePrediction", "ForNextSentencePrediction", _pooled(_pair), next_sentence),
        *heads.label_heads("Bert", _plain, _pooled, encode, summary),
    ),
    flax=Port(inputs=(*_FIRST, "encoder_hidden_states", "encoder_attention_mask")),
    tf=Port(repeats={"mlm___cls": "bert/embeddings/"}),
)
