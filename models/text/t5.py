"""T5: an encoder-decoder without absolute positions, whose every task is text in, text out.

Raffel et al. 2019, arXiv:1910.10683; original code google-research/text-to-text-transfer-transformer. Pre-norm blocks
with RMS norms and no biases; scores are not scaled, and a bias by bucketed distance, one table a stack, is added to
them. T5 1.1 and Flan-T5 (Shazeer 2020, arXiv:2002.05202) have gated feed-forward networks and a head of their own.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput, LogitsOutput
from formax.core.rng import split
from formax.core.spec import At, Ignored, Spec, Tied, fold, normal, optional, stack_of
from formax.layers import embed, heads, mlp, norm, seq2seq, seq2seq_heads
from formax.layers.activations import check_activation
from formax.layers.attention import (
    Bucketed,
    attention_spec,
    causal_mask,
    cross_attention,
    from_attention_mask,
    self_attention,
)
from formax.layers.attention.bias import bucketed_spec
from formax.layers.dropout import dropout
from formax.layers.linear import linear_spec


@config
class T5Config(Config):
    """`config.json` of model type "t5"."""

    model_type: ClassVar[str] = "t5"
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    classifier_dropout: float = 0.0

    def check(self) -> None:
        try:
            check_activation(self.activation, "feed_forward_proj")
        except ValueError:
            raise ConfigError(
                f'feed_forward_proj={self.feed_forward_proj!r} is no activation and no "gated-" one'
            ) from None
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ConfigError(
                f"relative_attention_max_distance={self.relative_attention_max_distance} must be more than half of "
                f"relative_attention_num_buckets={self.relative_attention_num_buckets}"
            )

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward networks are gated; where a file says so beside `feed_forward_proj`, it counts."""
        return self.extra.get("is_gated_act", self.feed_forward_proj.startswith("gated-"))

    @property
    def activation(self) -> str:
        """The activation of the feed-forward networks; "gated-gelu" was trained with the tanh form."""
        plain = self.feed_forward_proj.removeprefix("gated-")
        return self.extra.get("dense_act_fn", "gelu_new" if self.feed_forward_proj == "gated-gelu" else plain)


def block_spec(c: T5Config, *, is_decoder: bool) -> dict[str, Spec]:
    """One layer of either stack."""
    factor, inner = c.initializer_factor, c.num_heads * c.d_kv
    init = normal(factor * c.d_model**-0.5)
    # Queries start smaller, in the place of a scale on the scores.
    own = {"q": normal(factor * (c.d_model * c.d_kv) ** -0.5), "k": init, "v": init, "o": normal(factor * inner**-0.5)}
    attn = partial(attention_spec, c.d_model, c.num_heads, c.d_kv, names=("q", "k", "v", "o"), init=own, bias=False)
    shared: dict[str, Any] = {"init": init, "out_init": normal(factor * c.d_ff**-0.5), "bias": False}
    if c.is_gated:
        feed = mlp.gated_spec(c.d_model, c.d_ff, ("wi_0", "wi_1", "wo"), **shared)
    else:
        feed = mlp.dense_spec(c.d_model, c.d_ff, ("wi", "wo"), **shared)
    last = 2 if is_decoder else 1
    spec: dict[str, Spec] = {
        "attn_norm": norm.rms_spec("layer.0.layer_norm", c.d_model),
        "attn": At("layer.0.SelfAttention", attn()),
        "mlp_norm": norm.rms_spec(f"layer.{last}.layer_norm", c.d_model),
        "mlp": At(f"layer.{last}.DenseReluDense", feed),
    }
    if is_decoder:
        dead = {"bias": Ignored("relative_attention_bias.weight")}  # in the checkpoints of 2020, read by nobody
        spec["cross_norm"] = norm.rms_spec("layer.1.layer_norm", c.d_model)
        spec["cross"] = At("layer.1.EncDecAttention", attn() | dead)
    return spec


def block(
    p: Any, c: T5Config, x: Any, bias: Any, mask: Any, memory: Any, memory_mask: Any, cache: Any, key: Any
) -> Any:
    """Pre-norm: each part sees its input normalised, and adds to it. [B, T, E] -> ([B, T, E], cache)."""
    keys = split(key, 6)
    cache = cache or {"attn": None, "cross": None}
    shared: dict[str, Any] = {"scale": 1.0, "dropout": c.dropout_rate}

    def read(name: str) -> jax.Array:
        return norm.rms(p[name], x, c.layer_norm_epsilon)

    own = {"mask": mask, "bias": bias, "cache": cache["attn"], "key": keys[0]}
    h, attn = self_attention(p["attn"], read("attn_norm"), c.d_kv, **own, **shared)
    x = x + dropout(h, c.dropout_rate, keys[1])
    cross = cache["cross"]
    if "cross" in p:
        other = {"mask": memory_mask, "cache": cross, "key": keys[2]}
        h, cross = cross_attention(p["cross"], read("cross_norm"), memory, c.d_kv, **other, **shared)
        x = x + dropout(h, c.dropout_rate, keys[3])
    feed = mlp.gated if c.is_gated else mlp.dense
    h = feed(p["mlp"], read("mlp_norm"), c.activation, rate=c.dropout_rate, key=keys[4])
    return x + dropout(h, c.dropout_rate, keys[5]), {"attn": attn, "cross": cross}


def stack_spec(c: T5Config, *, is_decoder: bool) -> Spec:
    """Encoder or decoder; the table of distances is stored in the first layer."""
    depth = (c.num_decoder_layers or c.num_layers) if is_decoder else c.num_layers
    table = "block.0.layer.0.SelfAttention.relative_attention_bias"
    init = normal(c.initializer_factor * c.d_model**-0.5)
    return At(
        "decoder" if is_decoder else "encoder",
        {
            "words": Tied("embed_tokens.weight", "embed.word.embedding"),
            "distance": bucketed_spec(table, c.relative_attention_num_buckets, c.num_heads, init),
            "layers": stack_of("block", [block_spec(c, is_decoder=is_decoder)] * depth),
            "norm": norm.rms_spec("final_layer_norm", c.d_model),
        },
    )


def run_stack(
    p: Any,
    c: T5Config,
    x: Any,
    mask: Any,
    memory: Any = None,
    memory_mask: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """All layers of a stack and its last norm: [B, T, E] -> ([B, T, E], cache)."""
    k_in, k_layers, k_out = split(key, 3)
    x = tap.tap("embed.out", dropout(x, c.dropout_rate, k_in))
    table = p["distance"]["embedding"]
    bias = Bucketed(table, max_distance=c.relative_attention_max_distance, both_ways=memory_mask is None)

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, bias, mask, memory, memory_mask, cache, key)

    x, cache = fold(run, p.get("layers", ()), x, cache=cache, key=k_layers)
    return tap.tap("last", dropout(norm.rms(p["norm"], x, c.layer_norm_epsilon), c.dropout_rate, k_out)), cache


def encode(
    p: Any, c: T5Config, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, key: Any = None
) -> BaseModelOutput:
    """The encoder's states of a text: ids [B, S] -> [B, S, E]."""
    embed.check_inputs(input_ids, inputs_embeds, None)
    with tap.scope("encoder"):
        x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
        x, _ = run_stack(p["encoder"], c, x, from_attention_mask(attention_mask), key=key)
    return BaseModelOutput(last_hidden_state=x)


def decode(
    p: Any,
    c: T5Config,
    input_ids: Any = None,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """The decoder: ids [B, T] and the encoder's states [B, S, E] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, None, "decoder_")
    mask, memory_mask = causal_mask(attention_mask, cache), from_attention_mask(encoder_attention_mask)
    with tap.scope("decoder"):
        x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
        return run_stack(p["decoder"], c, x, mask, encoder_hidden_states, memory_mask, cache, key)


run_both = seq2seq.both(encode, decode)
_decoded = seq2seq.both(encode, decode, shifted=seq2seq.after_start)  # of the heads that give labels


def encoder_spec(c: T5Config) -> dict[str, Spec]:
    """Words and the encoder."""
    word = embed.embedding_spec("shared", c.vocab_size, c.d_model, init=normal(c.initializer_factor))
    return {"embed": {"word": word}, "encoder": stack_spec(c, is_decoder=False)}


def model_spec(c: T5Config) -> dict[str, Spec]:
    """Words, encoder and decoder."""
    return {**encoder_spec(c), "decoder": stack_spec(c, is_decoder=True)}


def words_spec(c: T5Config) -> dict[str, Spec]:
    """The whole model with a head for words: the table again, or one of its own."""
    init = normal(c.initializer_factor)
    own = optional(linear_spec("lm_head", c.d_model, c.vocab_size, ("embed", "vocab"), init=init, bias=False))
    return {**model_spec(c), "head": Tied("lm_head.weight", "embed.word.embedding") if c.tie_word_embeddings else own}


def _words(p: Any, c: T5Config, x: jax.Array) -> jax.Array:
    # The table's rows are as long as the states are wide, which a head of its own need not undo.
    return heads.lm_logits(p, x * c.d_model**-0.5 if c.tie_word_embeddings else x)


conditional_generation = seq2seq_heads.conditional_generation(run_both, _words)
sequence_classification = seq2seq_heads.sequence_classification(_decoded)
question_answering = seq2seq_heads.question_answering(_decoded)


def token_classification(p: Any, c: T5Config, input_ids: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
    """A label for every token, from the encoder's states: [B, S, labels]."""
    x = encode(p, c, input_ids, key=key, **inputs).last_hidden_state
    return LogitsOutput(logits=heads.classify(p, c, x, key))


def _labels(c: T5Config) -> dict[str, Spec]:
    init = normal(c.initializer_factor * c.d_model**-0.5)
    return seq2seq_heads.labels_spec(c.d_model, c.num_labels, init=init)


def _linear(name: str, c: T5Config, *, std: float) -> dict[str, Spec]:
    init = normal(c.initializer_factor * std)
    return {"head": optional(linear_spec(name, c.d_model, c.num_labels, ("embed", None), init=init))}


def spans_spec(c: T5Config) -> dict[str, Spec]:
    """The whole model with a head for spans."""
    return {**model_spec(c), **_linear("qa_outputs", c, std=c.d_model**-0.5)}


texts_spec = heads.with_heads("transformer", model_spec, _labels)
tokens_spec = heads.with_heads("transformer", encoder_spec, partial(_linear, "classifier", std=1.0))


def init_cache(c: T5Config, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of the decoder, with room for `length` positions and the encoder's `encoder_length` states."""
    counts = [c.num_heads] * (c.num_decoder_layers or c.num_layers)
    return seq2seq.caches(counts, batch, length, encoder_length, dtype, head_dim=c.d_kv, cross_heads=c.num_heads)


_seq2seq = partial(Architecture, methods={"encode": encode})

_PORTED = ("T5Model", "T5ForConditionalGeneration", "T5EncoderModel")

FAMILY = Family(
    "t5",
    T5Config,
    base="transformer",
    inputs=run_both,
    init_cache=init_cache,
    old_names={"T5WithLMHeadModel": "T5ForConditionalGeneration"},
    architectures=(
        _seq2seq("T5Model", "", model_spec, run_both),
        _seq2seq(
            "T5ForConditionalGeneration", "ForSeq2SeqLM", words_spec, conditional_generation, also=("ForPreTraining",)
        ),
        Architecture("T5EncoderModel", "ForTextEncoding", encoder_spec, encode, inputs=encode),
        _seq2seq("T5ForSequenceClassification", "ForSequenceClassification", texts_spec, sequence_classification),
        Architecture(
            "T5ForTokenClassification", "ForTokenClassification", tokens_spec, token_classification, inputs=encode
        ),
        _seq2seq("T5ForQuestionAnswering", "ForQuestionAnswering", spans_spec, question_answering),
    ),
    flax=Port(_PORTED),
    tf=Port(_PORTED, base="", repeats={"encoder": "shared/", "decoder": "shared/"}),
)
