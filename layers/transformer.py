"""The encoder-decoder of Vaswani et al. 2017 (arXiv:1706.03762) as BART's line has it, and names it in checkpoints.

BART, Marian, Pegasus and most encoder-decoders of texts share these layers, also those of speech (Whisper) and the
detectors (DETR); some have a decoder alone. Where they differ is in where the norms are, `post_norm` or `pre_norm`
around every part of a layer, and in what goes into the first one: a family writes its own
`embeddings(p, c, part, ids, vectors, offset, key) -> [B, T, E]`. `part` is "encoder" or "decoder" throughout, and
`p[part]` has `embed`, `layers` and, where a norm comes after the last layer, `norm`. Words are in
`p["embed"]["word"]`, and in `p[part]["word"]` where a stack has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import Config, check_multiple, config
from formax.core.outputs import BaseModelOutput
from formax.core.rng import split
from formax.core.spec import At, Spec, Tied, fold, normal, optional, stack_of
from formax.layers import embed, mlp, norm, seq2seq
from formax.layers.activations import check_activation
from formax.layers.attention import attention_spec, causal_mask, cross_attention, from_attention_mask, self_attention
from formax.layers.dropout import dropout, layer_drop

EPS = 1e-5  # of all norms
# What Flax's classes of texts are called with, in their order.
FLAX_INPUTS = (
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "position_ids",
    "decoder_position_ids",
)

Around = Callable[..., Any]
Embeddings = Callable[..., jax.Array]


@config
class TransformerConfig(Config):
    """The fields that all configurations of the line have."""

    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "initializer_range": "init_std",
        "num_attention_heads": "encoder_attention_heads",
    }

    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    is_encoder_decoder: bool = True
    activation_function: str = "gelu"
    d_model: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02

    def check(self) -> None:
        super().check()
        for part in ("encoder", "decoder"):
            check_multiple(self, "d_model", f"{part}_attention_heads")
        check_activation(self.activation_function, "activation_function")


# --- layers


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


def layers_spec(c: Any, part: str) -> tuple[Spec, ...]:
    """All layers of the encoder or the decoder."""
    return stack_of("layers", [block_spec(c, part)] * getattr(c, f"{part}_layers"))


def positions_spec(c: Any, rows: int) -> Spec:
    """A table of learned positions."""
    return embed.embedding_spec("embed_positions", rows, c.d_model, init=normal(c.init_std), axes=(None, "embed"))


def post_norm(p: Any, x: jax.Array, part: Any, rate: float, key: Any) -> Any:
    """What a part computes is added to its input, then normalised: [B, T, E] -> ([B, T, E], cache)."""
    h, cache = part(x)
    return norm.layer(p, x + dropout(h, rate, key), EPS), cache


def pre_norm(p: Any, x: jax.Array, part: Any, rate: float, key: Any) -> Any:
    """A part sees its input normalised, and adds to it: [B, T, E] -> ([B, T, E], cache)."""
    h, cache = part(norm.layer(p, x, EPS))
    return x + dropout(h, rate, key), cache


def block(
    p: Any, c: Any, part: str, x: Any, mask: Any, memory: Any, memory_mask: Any, cache: Any, key: Any, around: Around
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
    k_drop = None if key is None else jax.random.fold_in(key, 6)
    return layer_drop(x, y, getattr(c, f"{part}_layerdrop"), k_drop), {"attn": attn, "cross": cross}


def last_norm(p: Any, x: jax.Array) -> jax.Array:
    """The norm after the last layer of a stack `p`, if it has one: [B, T, E] -> [B, T, E]."""
    return tap.tap("last", norm.layer(p["norm"], x, EPS)) if "norm" in p else x


def decoder_layers(
    p: Any, c: Any, x: Any, mask: Any, memory: Any, memory_mask: Any, cache: Any, key: Any, around: Around
) -> Any:
    """All layers of the decoder and its last norm: [B, T, E], memory [B, S, E] or None -> ([B, T, E], cache)."""

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, "decoder", x, mask, memory, memory_mask, cache, key, around)

    x, cache = fold(run, p["decoder"].get("layers", ()), x, cache=cache, key=key)
    return last_norm(p["decoder"], x), cache


def init_cache(c: Any, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of the decoder's layers: room for `length` positions and an encoder's `encoder_length` states."""
    count = c.decoder_attention_heads
    sizes = {"head_dim": c.d_model // count, "cross_heads": count}
    return seq2seq.caches([count] * c.decoder_layers, batch, length, encoder_length or None, dtype, **sizes)


# --- texts

SHARED = Tied("embed_tokens.weight", "embed.word.embedding")


def text_spec(part_spec: Callable[[Any, str], dict[str, Spec]], c: Any) -> dict[str, Spec]:
    """Words, encoder and decoder. Untied, both have words of their own, and the shared ones are kept and never read."""
    table = embed.embedding_spec("embed_tokens", c.vocab_size, c.d_model, init=normal(c.init_std))
    own = optional(replace(table, flax="", tf=""))
    return _text_spec(part_spec, c, SHARED if c.tie_word_embeddings else own)


def one_table_spec(part_spec: Callable[[Any, str], dict[str, Spec]], c: Any) -> dict[str, Spec]:
    """Words, encoder and decoder, which read the same words also where the head has a table of its own."""
    return _text_spec(part_spec, c, SHARED)


def _text_spec(part_spec: Callable[[Any, str], dict[str, Spec]], c: Any, word: Spec) -> dict[str, Spec]:
    shared = embed.embedding_spec("shared", c.vocab_size, c.d_model, init=normal(c.init_std))
    spec: dict[str, Spec] = {"embed": {"word": replace(shared, tf="/model.shared")}}
    for part in ("encoder", "decoder"):
        spec[part] = At(part, part_spec(c, part) | {"word": word})
    return spec


def lone_decoder_spec(part_spec: Callable[[Any, str], dict[str, Spec]], c: Any) -> dict[str, Spec]:
    """The decoder alone, with words that a whole model calls shared."""
    word = embed.embedding_spec("decoder.embed_tokens", c.vocab_size, c.d_model, init=normal(c.init_std))
    shared = Tied("shared.weight", "embed.word.embedding")
    return {"embed": {"word": word, "shared": shared}, "decoder": At("decoder", part_spec(c, "decoder"))}


def plain_words(p: Any, part: str, ids: Any, vectors: Any, limit: int | None) -> jax.Array:
    """Vectors of words: ids [B, T] -> [B, T, E]; given ones as they are.

    Raises:
        ValueError: not exactly one of ids and vectors, or more positions than the `limit`.
    """
    embed.check_inputs(ids, vectors, limit, "decoder_" if part == "decoder" and "encoder" in p else "")
    own = p[part] if "word" in p[part] else p["embed"]
    return embed.embed(own["word"], ids) if vectors is None else vectors


def words(p: Any, c: Any, part: str, ids: Any, vectors: Any, limit: int | None) -> jax.Array:
    """`plain_words`, of which those of ids are scaled where the configuration says so."""
    x = plain_words(p, part, ids, vectors, limit)
    return x * c.d_model**0.5 if c.scale_embedding and vectors is None else x


def text_encoder(embeddings: Embeddings, around: Around) -> Callable[..., BaseModelOutput]:
    """The encoder of texts with a family's embeddings, its norms `around` the parts of a layer."""

    def encode(
        p: Any,
        c: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        key: Any = None,
    ) -> BaseModelOutput:
        """The encoder's states of a text: ids [B, S] -> [B, S, E]."""
        k_embed, k_layers = split(key, 2)
        mask = from_attention_mask(attention_mask)

        def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
            return block(p, c, "encoder", x, mask, None, None, cache, key, around)

        with tap.scope("encoder"):
            x = embeddings(p, c, "encoder", input_ids, inputs_embeds, 0, k_embed)
            x, _ = fold(run, p["encoder"].get("layers", ()), x, key=k_layers)
            return BaseModelOutput(last_hidden_state=last_norm(p["encoder"], x))

    return encode


def text_decoder(embeddings: Embeddings, around: Around) -> Callable[..., Any]:
    """The decoder of texts with a family's embeddings, its norms `around` the parts of a layer."""

    def decode(
        p: Any,
        c: Any,
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
        mask = causal_mask(attention_mask, cache)
        memory = encoder_hidden_states, from_attention_mask(encoder_attention_mask)
        with tap.scope("decoder"):
            x = embeddings(p, c, "decoder", input_ids, inputs_embeds, mask.q_offset, k_embed)
            return decoder_layers(p, c, x, mask, *memory, cache, k_layers, around)

    return decode
