"""BART: the original Transformer with GELU and learned positions, pre-trained to restore damaged text.

Lewis et al. 2019, arXiv:1910.13461; original code facebookresearch/fairseq, whose position tables have two rows more
than positions. A bidirectional encoder with blocks as BERT's (its embeddings are normalised, too, but have no segments)
and a decoder that looks at the encoder's states; all of one word table, which is the output as well. Most
encoder-decoders of text descend from it, and differ in where the norms are and how positions are told.
"""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.frozen import FrozenDict
from formax.core.layout import Reshape
from formax.core.outputs import BaseModelOutput, Seq2SeqOutput
from formax.core.rng import split
from formax.core.spec import At, Ignored, Param, Spec, Tied, fold, normal, optional, stack_of
from formax.layers import embed, heads, mlp, norm, seq2seq_heads
from formax.layers.activations import check_activation
from formax.layers.attention import KVCache, attention_spec, cross_attention, from_attention_mask, self_attention
from formax.layers.dropout import dropout
from formax.layers.seq2seq import decoder_mask, shift_right, states_of

EPS = 1e-5  # of all norms
OFFSET = 2  # the position table's first rows are not positions


@config
class BartConfig(Config):
    """`config.json` of model type "bart"."""

    model_type: ClassVar[str] = "bart"
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "initializer_range": "init_std",
        "num_attention_heads": "encoder_attention_heads",
    }
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
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    d_model: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    classifier_dropout: float = 0.0
    scale_embedding: bool = False
    use_cache: bool = True
    id2label: FrozenDict = FrozenDict({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = 2
    forced_eos_token_id: int | None = 2

    def check(self) -> None:
        for part in ("encoder", "decoder"):
            check_multiple(self, "d_model", f"{part}_attention_heads")
        check_activation(self.activation_function, "activation_function")


def block_spec(c: Any, part: str, *, bias: bool | str = True) -> dict[str, Spec]:
    """One layer of the encoder or the decoder; `bias` says which projections of attention have one."""
    init, norm_spec = normal(c.init_std), partial(norm.layer_spec, size=c.d_model)
    count, width = getattr(c, f"{part}_attention_heads"), getattr(c, f"{part}_ffn_dim")
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    attn = attention_spec(c.d_model, count, c.d_model // count, names=names, init=init, bias=bias)
    spec: dict[str, Spec] = {
        "attn": At("self_attn", attn),
        "attn_norm": norm_spec("self_attn_layer_norm"),
        "mlp": mlp.dense_spec(c.d_model, width, ("fc1", "fc2"), init=init),
        "mlp_norm": norm_spec("final_layer_norm"),
    }
    if part == "decoder":
        spec |= {"cross": At("encoder_attn", attn), "cross_norm": norm_spec("encoder_attn_layer_norm")}
    return spec


def post_norm(p: Any, x: jax.Array, part: Any, rate: float, key: Any) -> Any:
    """What a part computes is added to its input, then normalised: [B, T, E] -> ([B, T, E], cache)."""
    h, cache = part(x)
    return norm.layer(p, x + dropout(h, rate, key), EPS), cache


def block(
    p: Any, c: Any, part: str, x: Any, mask: Any, memory: Any, memory_mask: Any, cache: Any, key: Any, around: Any
) -> Any:
    """Attention to itself, to the memory if there is one, and a network, each in a residual connection `around` it.

    [B, T, E] -> ([B, T, E], cache).
    """
    keys = split(key, 6)
    cache = cache or {"attn": None, "cross": None}
    shared = {"head_dim": c.d_model // getattr(c, f"{part}_attention_heads"), "dropout": c.attention_dropout}

    def own(x: jax.Array) -> Any:
        return self_attention(p["attn"], x, mask=mask, cache=cache["attn"], key=keys[0], **shared)

    def other(x: jax.Array) -> Any:
        return cross_attention(p["cross"], x, memory, mask=memory_mask, cache=cache["cross"], key=keys[1], **shared)

    def think(x: jax.Array) -> Any:
        return mlp.dense(p["mlp"], x, c.activation_function, rate=c.activation_dropout, key=keys[2]), None

    y, attn = around(p["attn_norm"], x, own, c.dropout, keys[3])
    cross = cache["cross"]
    if "cross" in p and (memory is not None or cross is not None):
        y, cross = around(p["cross_norm"], y, other, c.dropout, keys[4])
    y, _ = around(p["mlp_norm"], y, think, c.dropout, keys[5])
    rate = getattr(c, f"{part}_layerdrop")
    if key is not None and rate > 0:  # Fan et al. 2019, arXiv:1909.11556: a layer is left out now and then
        y = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 6), rate), x, y)
    return y, {"attn": attn, "cross": cross}


def part_spec(c: BartConfig, part: str) -> dict[str, Spec]:
    """Positions, first norm and layers of the encoder or the decoder."""
    rows, init = c.max_position_embeddings + OFFSET, normal(c.init_std)
    position = embed.embedding_spec("embed_positions", rows, c.d_model, init=init, axes=(None, "embed"))
    return {
        "embed": {"position": position, "norm": norm.layer_spec("layernorm_embedding", c.d_model)},
        "layers": stack_of("layers", [block_spec(c, part)] * getattr(c, f"{part}_layers")),
        "version": Ignored("version"),
    }


def model_spec(c: BartConfig) -> dict[str, Spec]:
    """Words, encoder and decoder. Untied, both have words of their own, and the shared ones are kept and never read."""
    table = partial(embed.embedding_spec, rows=c.vocab_size, size=c.d_model, init=normal(c.init_std))
    own = replace(table("embed_tokens"), flax="", tf="")
    word = Tied("embed_tokens.weight", "embed.word.embedding") if c.tie_word_embeddings else own
    spec: dict[str, Spec] = {"embed": {"word": replace(table("shared"), tf="/model.shared")}}
    for part in ("encoder", "decoder"):
        spec[part] = At(part, part_spec(c, part) | {"word": optional(word)})
    return spec


def embeddings(p: Any, c: BartConfig, part: str, ids: Any, vectors: Any, offset: Any, key: Any) -> jax.Array:
    """Word and position vectors, added and normalised: [B, T] -> [B, T, E]. Vectors that are given are not scaled."""
    prefix = "decoder_" if part == "decoder" and "encoder" in p else ""
    embed.check_inputs(ids, vectors, c.max_position_embeddings, prefix)
    own = p[part]["embed"]
    with tap.scope("embed"):
        scale = c.d_model**0.5 if c.scale_embedding else 1.0
        x = embed.embed(p[part].get("word", p["embed"]["word"]), ids) * scale if vectors is None else vectors
        x = x + embed.embed(own["position"], OFFSET + offset + jnp.arange(x.shape[1])[None])
        return tap.tap("out", dropout(norm.layer(own["norm"], x, EPS), c.dropout, key))


def encode(
    p: Any, c: BartConfig, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, key: Any = None
) -> BaseModelOutput:
    """The encoder's states of a text: ids [B, S] -> [B, S, E]."""
    k_embed, k_layers = split(key, 2)
    with tap.scope("encoder"):
        x = embeddings(p, c, "encoder", input_ids, inputs_embeds, 0, k_embed)
        mask = from_attention_mask(attention_mask)

        def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
            return block(p, c, "encoder", x, mask, None, None, cache, key, post_norm)

        x, _ = fold(run, p["encoder"].get("layers", ()), x, key=k_layers)
    return BaseModelOutput(last_hidden_state=x)


def decode(
    p: Any,
    c: BartConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """The decoder: ids [B, T] and an encoder's states [B, S, E], if there are any -> (states [B, T, E], cache)."""
    k_embed, k_layers = split(key, 2)
    mask = decoder_mask(attention_mask, cache)
    with tap.scope("decoder"):
        x = embeddings(p, c, "decoder", input_ids, inputs_embeds, mask.q_offset, k_embed)
        memory = encoder_hidden_states, from_attention_mask(encoder_attention_mask)

        def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
            return block(p, c, "decoder", x, mask, *memory, cache, key, post_norm)

        return fold(run, p["decoder"].get("layers", ()), x, cache=cache, key=k_layers)


def check_memory(cache: Any) -> None:
    """Raises ValueError for a cache without an encoder's states, in a call that has no others."""
    if cache[0]["cross"] is None:
        raise ValueError("the cache has no room for the encoder's states: make it with their encoder_length")


def run_both(
    p: Any,
    c: BartConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    decoder_input_ids: Any = None,
    decoder_attention_mask: Any = None,
    encoder_outputs: Any = None,
    inputs_embeds: Any = None,
    decoder_inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Seq2SeqOutput:
    """Encoder and decoder: ids [B, S] and [B, T] -> the decoder's states [B, T, E].

    In the place of `input_ids` the encoder's states [B, S, E] may be given, or a cache that has seen them. Without
    inputs of its own the decoder reads the text, shifted.
    """
    k_encoder, k_decoder = split(key, 2)
    if decoder_input_ids is None and decoder_inputs_embeds is None:
        if input_ids is None:
            raise ValueError("without input_ids the decoder needs decoder_input_ids or decoder_inputs_embeds")
        decoder_input_ids = shift_right(input_ids, c.decoder_start_token_id, c.pad_token_id)
    memory = None
    if encoder_outputs is not None:
        memory = states_of(encoder_outputs)
    elif input_ids is not None or inputs_embeds is not None or cache is None:
        memory = encode(p, c, input_ids, attention_mask, inputs_embeds, k_encoder).last_hidden_state
    else:
        check_memory(cache)
    own = decoder_input_ids, decoder_attention_mask
    x, cache = decode(p, c, *own, memory, attention_mask, decoder_inputs_embeds, cache, k_decoder)
    return Seq2SeqOutput(last_hidden_state=x, encoder_last_hidden_state=memory, cache=cache)


def _words(p: Any, c: BartConfig, x: jax.Array) -> jax.Array:
    logits = heads.lm_logits(p, x)
    return logits + p["bias"].astype(logits.dtype)


def init_cache(c: Any, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of the decoder's layers: room for `length` positions and an encoder's `encoder_length` states."""
    count = c.decoder_attention_heads
    empty = partial(KVCache.empty, batch, heads=count, head_dim=c.d_model // count, dtype=dtype)
    cross = (empty(length=encoder_length) if encoder_length else None for _ in range(c.decoder_layers))
    return tuple({"attn": empty(length=length), "cross": one} for one in cross)


def decoder_spec(c: BartConfig) -> dict[str, Spec]:
    """The decoder alone, with words that a whole model calls shared."""
    word = embed.embedding_spec("decoder.embed_tokens", c.vocab_size, c.d_model, init=normal(c.init_std))
    shared = Tied("shared.weight", "embed.word.embedding")
    return {"embed": {"word": word, "shared": shared}, "decoder": At("decoder", part_spec(c, "decoder"))}


def _bias(c: BartConfig) -> dict[str, Spec]:
    row = Reshape((1, c.vocab_size))
    return {"bias": Param((c.vocab_size,), ("vocab",), "final_logits_bias", layout=row, optional=True, buffer=True)}


def _labels(c: BartConfig) -> dict[str, Spec]:
    return seq2seq_heads.labels_spec(c.d_model, c.num_labels, init=normal(c.init_std))


_whole, _seq2seq = partial(heads.with_heads, "model", model_spec), partial(Architecture, methods={"encode": encode})

_BOTH = ("ForConditionalGeneration", "ForSequenceClassification")
_IDS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")

FAMILY = Family(
    "bart",
    BartConfig,
    base="model",
    inputs=run_both,
    init_cache=init_cache,
    architectures=(
        _seq2seq("BartModel", "", model_spec, run_both),
        _seq2seq(
            "BartForConditionalGeneration",
            "ForSeq2SeqLM",
            _whole(heads.lm_head(), _bias),
            seq2seq_heads.conditional_generation(run_both, _words),
            also=("ForMaskedLM", "ForPreTraining"),
        ),
        _seq2seq(
            "BartForSequenceClassification",
            "ForSequenceClassification",
            _whole(_labels),
            seq2seq_heads.sequence_classification(run_both),
        ),
        _seq2seq(
            "BartForQuestionAnswering",
            "ForQuestionAnswering",
            _whole(heads.linear_head("qa_outputs", 2)),
            seq2seq_heads.question_answering(run_both),
        ),
        Architecture(
            "BartForCausalLM",
            "ForCausalLM",
            heads.with_heads("model", decoder_spec, heads.lm_head()),
            heads.causal_lm(decode),
            inputs=decode,
        ),
    ),
    flax=Port(
        tuple(f"Bart{head}" for head in ("Model", *_BOTH, "ForQuestionAnswering", "ForCausalLM")),
        inputs=(*_IDS, "position_ids", "decoder_position_ids", "encoder_hidden_states", "encoder_attention_mask"),
    ),
    tf=Port(tuple(f"Bart{head}" for head in ("Model", *_BOTH)), numbered="."),
)
