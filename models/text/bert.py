"""BERT: a bidirectional transformer encoder with post-layer-norm blocks, pre-trained on masked words and sentence pairs.

Devlin et al. 2018, arXiv:1810.04805; original code google-research/bert. With `is_decoder` it reads left to right, with
`add_cross_attention` it looks at an encoder's states as well. The relative position tables of `relative_key` are Shaw et al.
2018 (arXiv:1803.02155), those of `relative_key_query` Huang et al. 2020 (arXiv:2009.13658). Base of most text encoders here.
"""

from functools import partial
from typing import ClassVar

import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.outputs import BaseModelOutput, LogitsOutput, PreTrainingOutput, QuestionAnsweringOutput
from formax.core.rng import fold_path, split
from formax.core.spec import At, Ignored, Param, Spec, Tied, fold, normal, optional, stack_of, under
from formax.layers import embed, mlp, norm
from formax.layers.activations import activation
from formax.layers.attention import KVCache, attention_spec, cross_attention, from_attention_mask, self_attention
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

    def check(self):
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}")
        if self.add_cross_attention and not self.is_decoder:
            raise ConfigError("add_cross_attention=True needs is_decoder=True")
        activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def attn_spec(c: BertConfig, heads: int) -> dict[str, Spec]:
    names = ("self.query", "self.key", "self.value", "output.dense")
    return attention_spec(c.hidden_size, heads, c.head_dim, names=names, init=normal(c.initializer_range))


def block_spec(c: BertConfig, layer: int) -> Spec:
    init = normal(c.initializer_range)
    attn = attn_spec(c, c.num_attention_heads - len(c.pruned_heads.get(layer, ())))
    if c.position_embedding_type != "absolute":
        attn["distance"] = relative_key_spec("self.distance_embedding", c.max_position_embeddings, c.head_dim, init)
    spec = {
        "attn": At("attention", attn),
        "attn_norm": norm.layer_spec("attention.output.LayerNorm", c.hidden_size),
        "mlp": mlp.dense_spec(c.hidden_size, c.intermediate_size, names=("intermediate.dense", "output.dense"), init=init),
        "mlp_norm": norm.layer_spec("output.LayerNorm", c.hidden_size),
    }
    if c.add_cross_attention:
        spec["cross"] = At("crossattention", attn_spec(c, c.num_attention_heads))
        spec["cross_norm"] = norm.layer_spec("crossattention.output.LayerNorm", c.hidden_size)
    return spec


def block(p, c: BertConfig, x, mask, cross_mask, memory, cache, key):
    """Post-norm: the output of every part is added to its input, then normalised. [B, T, E] -> [B, T, E]."""
    keys = split(key, 5)
    cache = cache or {"attn": None, "cross": None}
    add = lambda name, x, h, key: norm.layer(p[name], x + dropout(h, c.hidden_dropout_prob, key), c.layer_norm_eps)  # noqa: E731
    rate = c.attention_probs_dropout_prob
    bias = None
    if c.position_embedding_type != "absolute":
        key_too = c.position_embedding_type == "relative_key_query"
        bias = partial(relative_key_bias, p["attn"]["distance"], key_too=key_too, q_offset=mask.q_offset)

    h, attn = self_attention(p["attn"], x, c.head_dim, mask=mask, bias=bias, cache=cache["attn"], dropout=rate, key=keys[0])
    x = add("attn_norm", x, h, keys[1])
    cross = cache["cross"]
    if "cross" in p and (memory is not None or cross is not None):
        h, cross = cross_attention(p["cross"], x, memory, c.head_dim, mask=cross_mask, cache=cross, dropout=rate, key=keys[2])
        x = add("cross_norm", x, h, keys[3])
    x = add("mlp_norm", x, mlp.dense(p["mlp"], x, c.hidden_act), keys[4])
    return x, {"attn": attn, "cross": cross}


def encoder_spec(c: BertConfig) -> dict[str, Spec]:
    init = normal(c.initializer_range)
    table = partial(embed.embedding_spec, size=c.hidden_size, init=init)
    return {
        "embed": At(
            "embeddings",
            {
                "word": table("word_embeddings", c.vocab_size),
                "position": table("position_embeddings", c.max_position_embeddings, axes=(None, "embed")),
                "token_type": table("token_type_embeddings", c.type_vocab_size, axes=(None, "embed")),
                "norm": norm.layer_spec("LayerNorm", c.hidden_size),
                "position_ids": Ignored("position_ids"),
            },
        ),
        "layers": stack_of("encoder.layer", [block_spec(c, i) for i in range(c.num_hidden_layers)]),
    }


def model_spec(c: BertConfig) -> dict[str, Spec]:
    square = linear_spec("pooler.dense", c.hidden_size, c.hidden_size, ("embed", None), init=normal(c.initializer_range))
    return {**encoder_spec(c), "pooler": optional(square)}


def embeddings(p, c: BertConfig, input_ids, token_type_ids, position_ids, inputs_embeds, offset, key):
    """Word, position and segment vectors, added and normalised: [B, T] -> [B, T, E]."""
    with tap.scope("embed"):
        x = embed.embed(p["word"], input_ids) if inputs_embeds is None else inputs_embeds
        x = x + embed.embed(p["token_type"], jnp.zeros((1, 1), jnp.int32) if token_type_ids is None else token_type_ids)
        if c.position_embedding_type == "absolute":
            position_ids = offset + jnp.arange(x.shape[1])[None] if position_ids is None else position_ids
            x = x + embed.embed(p["position"], position_ids)
        return tap.tap("out", dropout(norm.layer(p["norm"], x, c.layer_norm_eps), c.hidden_dropout_prob, key))


def encode(
    p,
    c: BertConfig,
    input_ids=None,
    attention_mask=None,
    token_type_ids=None,
    position_ids=None,
    inputs_embeds=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    cache=None,
    key=None,
):
    """Embeddings and all layers: ids [B, T] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, c.max_position_embeddings)
    k_embed, k_layers = split(key, 2)
    offset = 0 if cache is None else cache[0]["attn"].length
    x = embeddings(p["embed"], c, input_ids, token_type_ids, position_ids, inputs_embeds, offset, k_embed)
    room = x.shape[1] if cache is None else cache[0]["attn"].k.shape[1]
    mask = from_attention_mask(attention_mask, causal=c.is_decoder, q_offset=offset, keys=room)
    cross_mask = from_attention_mask(encoder_attention_mask)
    run = lambda p, x, cache, key: block(p, c, x, mask, cross_mask, encoder_hidden_states, cache, key)  # noqa: E731
    return fold(run, p["layers"], x, cache=cache, key=k_layers)


def pool(p, x):
    """The first token's state through a tanh layer: [B, T, E] -> [B, E]."""
    return tap.tap("pooler", jnp.tanh(linear(p["pooler"], x[:, 0])))


def model(p, c: BertConfig, input_ids=None, **inputs):
    x, cache = encode(p, c, input_ids, **inputs)
    return BaseModelOutput(last_hidden_state=x, pooler_output=pool(p, x), cache=cache)


# ------------------------------------------------------------------------------------------------------------------ heads


def words_spec(c: BertConfig) -> dict[str, Spec]:
    """Masked-word head: a transform, then the word table again (unless untied) and a bias for every word."""
    init = normal(c.initializer_range)
    spec: dict[str, Spec] = {
        "dense": linear_spec("transform.dense", c.hidden_size, c.hidden_size, ("embed", None), init=init),
        "norm": norm.layer_spec("transform.LayerNorm", c.hidden_size),
        "bias": Param((c.vocab_size,), ("vocab",), "bias"),
        "decoder_bias": Tied("decoder.bias", "head.bias"),
    }
    if c.tie_word_embeddings:
        spec["decoder"] = Tied("decoder.weight", "embed.word.embedding")
    else:
        spec["decoder"] = linear_spec("decoder", c.hidden_size, c.vocab_size, ("embed", "vocab"), init=init, bias=False)
    return {"head": At("cls.predictions", spec)}


def words(p, c: BertConfig, x):
    """[B, T, E] -> [B, T, V]."""
    head = p["head"]
    x = norm.layer(head["norm"], activation(c.hidden_act)(linear(head["dense"], x)), c.layer_norm_eps)
    y = linear(head["decoder"], x) if "decoder" in head else embed.logits(p["embed"]["word"], x)
    return y + head["bias"].astype(y.dtype)


def label_spec(name: str, c: BertConfig, labels: int) -> dict[str, Spec]:
    return {"head": linear_spec(name, c.hidden_size, labels, ("embed", None), init=normal(c.initializer_range))}


def classify(p, c: BertConfig, x, key):
    """Dropout and the linear head: [..., E] -> [..., labels]."""
    rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
    return linear(p["head"], dropout(x, rate, None if key is None else fold_path(key, "head")))


def masked_lm(p, c: BertConfig, input_ids=None, **inputs):
    x, cache = encode(p, c, input_ids, **inputs)
    return LogitsOutput(logits=words(p, c, x), cache=cache)


def pretraining(p, c: BertConfig, input_ids=None, **inputs):
    x, _ = encode(p, c, input_ids, **inputs)
    pair = linear(p["pair"], pool(p, x))
    return PreTrainingOutput(prediction_logits=words(p, c, x), seq_relationship_logits=pair)


def pooled_classification(p, c: BertConfig, input_ids=None, key=None, **inputs):
    x, _ = encode(p, c, input_ids, key=key, **inputs)
    return LogitsOutput(logits=classify(p, c, pool(p, x), key))


def next_sentence(p, c: BertConfig, input_ids=None, **inputs):
    x, _ = encode(p, c, input_ids, **inputs)
    return LogitsOutput(logits=linear(p["pair"], pool(p, x)))


def multiple_choice(p, c: BertConfig, input_ids=None, key=None, **inputs):
    """All choices of a question as rows of one batch: ids [B, choices, T] -> logits [B, choices]."""
    inputs = {"input_ids": input_ids, **inputs}
    shape = next(x for x in (input_ids, inputs.get("inputs_embeds")) if x is not None).shape[:2]
    rows = {name: None if x is None else x.reshape(-1, *x.shape[2:]) for name, x in inputs.items()}
    x, _ = encode(p, c, key=key, **rows)
    return LogitsOutput(logits=classify(p, c, pool(p, x), key).reshape(shape))


def token_classification(p, c: BertConfig, input_ids=None, key=None, **inputs):
    x, _ = encode(p, c, input_ids, key=key, **inputs)
    return LogitsOutput(logits=classify(p, c, x, key))


def question_answering(p, c: BertConfig, input_ids=None, **inputs):
    x, _ = encode(p, c, input_ids, **inputs)
    start, end = jnp.moveaxis(linear(p["head"], x)[..., :2], -1, 0)
    return QuestionAnsweringOutput(start_logits=start, end_logits=end)


def init_cache(c: BertConfig, batch: int, length: int, encoder_length: int = 0, dtype=jnp.float32):
    """Empty caches of all layers, with room for `length` positions and an encoder's `encoder_length` states."""
    made = []
    for i in range(c.num_hidden_layers):
        heads = c.num_attention_heads - len(c.pruned_heads.get(i, ()))
        cross = KVCache.empty(batch, encoder_length, c.num_attention_heads, c.head_dim, dtype) if encoder_length else None
        made.append({"attn": KVCache.empty(batch, length, heads, c.head_dim, dtype), "cross": cross})
    return tuple(made)


def _with(base, *heads):
    """Spec of an architecture with heads: the base model's parameters under "bert", then the heads' own."""
    return lambda c: {**under("bert", base(c)), **{k: v for head in heads for k, v in head(c).items()}}


def _pair(c):
    return {"pair": linear_spec("cls.seq_relationship", c.hidden_size, 2, ("embed", None), init=normal(c.initializer_range))}


_labels = lambda c: label_spec("classifier", c, c.num_labels)  # noqa: E731

FAMILY = Family(
    "bert",
    config=BertConfig,
    base="bert",
    inputs=encode,
    init_cache=init_cache,
    architectures=(
        Architecture("BertModel", "", model_spec, model),
        Architecture("BertForPreTraining", "ForPreTraining", _with(model_spec, words_spec, _pair), pretraining),
        Architecture("BertForMaskedLM", "ForMaskedLM", _with(encoder_spec, words_spec), masked_lm),
        Architecture("BertLMHeadModel", "ForCausalLM", _with(encoder_spec, words_spec), masked_lm),
        Architecture("BertForNextSentencePrediction", "ForNextSentencePrediction", _with(model_spec, _pair), next_sentence),
        Architecture("BertForSequenceClassification", "ForSequenceClassification", _with(model_spec, _labels), pooled_classification),
        Architecture(
            "BertForMultipleChoice", "ForMultipleChoice", _with(model_spec, lambda c: label_spec("classifier", c, 1)), multiple_choice
        ),
        Architecture("BertForTokenClassification", "ForTokenClassification", _with(encoder_spec, _labels), token_classification),
        Architecture(
            "BertForQuestionAnswering",
            "ForQuestionAnswering",
            _with(encoder_spec, lambda c: label_spec("qa_outputs", c, c.num_labels)),
            question_answering,
        ),
    ),
)
