"""Text encoders of BERT's line: layers stored as BERT's, their run, and the pooler.

Devlin et al. 2018, arXiv:1810.04805. RoBERTa, ELECTRA, RoFormer and others differ in how words and positions are made
vectors, in what is around a part of a layer, or in their heads; a family hands its own function to `encoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, check_multiple, config
from formax.core.outputs import BaseModelOutput
from formax.core.rng import split
from formax.core.spec import At, Ignored, Spec, fold, normal, optional, stack_of
from formax.layers import embed, mlp, norm, seq2seq
from formax.layers.activations import check_activation
from formax.layers.attention import attention_spec, causal_mask, cross_attention, from_attention_mask, self_attention
from formax.layers.attention.bias import relative_key_bias, relative_key_spec
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec

# What Flax's classes take, in their order.
FLAX_INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "head_mask"),
    *("encoder_hidden_states", "encoder_attention_mask"),
)


@config
class TextEncoderConfig(Config):
    """The fields that configurations of BERT's line have."""

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

    def check(self) -> None:
        check_multiple(self, "hidden_size", "num_attention_heads")
        if self.add_cross_attention and not self.is_decoder:
            raise ConfigError("add_cross_attention=True needs is_decoder=True")
        check_activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def word_size(self) -> int:
        """Width of the vectors of words, which in BERT is that of the states."""
        return self.hidden_size

    def heads_of(self, layer: int) -> int:
        """Attention heads that are left in a layer."""
        return self.num_attention_heads - len(self.pruned_heads.get(layer, ()))


def block_spec(c: Any, layer: int, *, bias: bool | str = True) -> dict[str, Spec]:
    """One layer; `bias` says which projections of attention have one."""
    init = normal(c.initializer_range)
    names = ("self.query", "self.key", "self.value", "output.dense")
    attn = partial(attention_spec, c.hidden_size, head_dim=c.head_dim, names=names, init=init, bias=bias)
    own = attn(c.heads_of(layer))
    if getattr(c, "position_embedding_type", "absolute") != "absolute":
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


def post_norm(p: Any, c: Any, x: jax.Array, part: Any, key: Any) -> Any:
    """What a part computes is added to its input, then normalised: [B, T, E] -> ([B, T, E], cache)."""
    h, cache = part(x)
    return norm.layer(p, x + dropout(h, c.hidden_dropout_prob, key), c.layer_norm_eps), cache


def block(
    p: Any,
    c: Any,
    x: Any,
    mask: Any,
    cross_mask: Any,
    memory: Any,
    cache: Any,
    key: Any,
    *,
    around: Callable[..., Any] = post_norm,
    **told: Any,
) -> Any:
    """Attention to itself, to the memory if there is one, and a network, each in a residual connection `around` it.

    [B, T, E] -> ([B, T, E], cache). `told` is what attention to itself is told besides.
    """
    keys = split(key, 5)
    cache = cache or {"attn": None, "cross": None}
    if "distance" in p["attn"]:
        both = c.position_embedding_type == "relative_key_query"
        bias = partial(relative_key_bias, p["attn"]["distance"], key_too=both, q_offset=mask.q_offset)
        told = {"bias": bias, **told}
    shared = {"head_dim": c.head_dim, "dropout": c.attention_probs_dropout_prob}

    def own(x: jax.Array) -> Any:
        return self_attention(p["attn"], x, mask=mask, cache=cache["attn"], key=keys[0], **shared, **told)

    def other(x: jax.Array) -> Any:
        return cross_attention(p["cross"], x, memory, mask=cross_mask, cache=cache["cross"], key=keys[2], **shared)

    def think(x: jax.Array) -> Any:
        return mlp.dense(p["mlp"], x, c.hidden_act), None

    x, attn = around(p["attn_norm"], c, x, own, keys[1])
    cross = cache["cross"]
    if "cross" in p and (memory is not None or cross is not None):
        x, cross = around(p["cross_norm"], c, x, other, keys[3])
    x, _ = around(p["mlp_norm"], c, x, think, keys[4])
    return x, {"attn": attn, "cross": cross}


def embeddings_spec(c: Any) -> dict[str, Spec]:
    """Tables of words, positions and segments, and their norm."""
    table = partial(embed.embedding_spec, size=c.word_size, init=normal(c.initializer_range))
    return {
        "word": table("word_embeddings", c.vocab_size, tf="weight"),
        "position": table("position_embeddings", c.max_position_embeddings, axes=(None, "embed")),
        "token_type": table("token_type_embeddings", c.type_vocab_size, axes=(None, "embed")),
        "norm": norm.layer_spec("LayerNorm", c.word_size),
        "position_ids": Ignored("position_ids"),
    }


def encoder_spec(c: Any, block_spec: Callable[[Any, int], dict[str, Spec]] = block_spec) -> dict[str, Spec]:
    """Embeddings and layers."""
    layers = [block_spec(c, i) for i in range(c.num_hidden_layers)]
    return {"embed": At("embeddings", embeddings_spec(c)), "layers": stack_of("encoder.layer", layers)}


def pooler_spec(c: Any) -> dict[str, Spec]:
    """The pooler, which checkpoints of heads that do not use it lack."""
    dense = linear_spec("pooler.dense", c.hidden_size, c.hidden_size, ("embed", None), init=normal(c.initializer_range))
    return {"pooler": optional(dense)}


def embeddings(p: Any, c: Any, ids: Any, types: Any, positions: Any, vectors: Any, offset: Any, key: Any) -> Any:
    """Word, position and segment vectors, added and normalised: [B, T] -> [B, T, E]."""
    tables = p["embed"]
    x = embed.embed(tables["word"], ids) if vectors is None else vectors
    x = x + embed.embed(tables["token_type"], jnp.zeros((1, 1), jnp.int32) if types is None else types)
    if c.position_embedding_type == "absolute":
        positions = embed.positions(offset, x) if positions is None else positions
        x = x + embed.embed(tables["position"], positions)
    return dropout(norm.layer(tables["norm"], x, c.layer_norm_eps), c.hidden_dropout_prob, key)


def encoder(
    embeddings: Callable[..., jax.Array],
    block: Callable[..., Any],
    told: Callable[..., dict[str, Any]] = lambda p, c, x, offset: {},
) -> Callable[..., Any]:
    """Embeddings and all layers of BERT's line.

    Args:
        embeddings: a family's own, as those here.
        block: its own layer, as the one here.
        told: `told(p, c, x, offset)`, what layers are told besides: {argument of `block`: value}.
    """

    def encode(
        p: Any,
        c: Any,
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
        given = input_ids, token_type_ids, position_ids, inputs_embeds
        with tap.scope("embed"):
            x = tap.tap("out", embeddings(p, c, *given, mask.q_offset, k_embed))
        cross_mask = from_attention_mask(encoder_attention_mask)

        more = told(p, c, x, mask.q_offset)

        def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
            return block(p, c, x, mask, cross_mask, encoder_hidden_states, cache, key, **more)

        return fold(run, p.get("layers", ()), x, cache=cache, key=k_layers)  # a tree has no empty branches

    return encode


def pool(p: Any, x: jax.Array) -> jax.Array:
    """The first token's state through a tanh layer: [B, T, E] -> [B, E]."""
    return tap.tap("pooler", jnp.tanh(linear(p["pooler"], x[:, 0])))


def summarised(encode: Callable[..., Any]) -> Callable[..., jax.Array]:
    """What makes a vector of every text by `encode` and the pooler."""

    def summary(p: Any, c: Any, input_ids: Any = None, **inputs: Any) -> jax.Array:
        """A vector for every text: ids [B, T] -> [B, E]."""
        return pool(p, encode(p, c, input_ids, **inputs)[0])

    return summary


def pooled(encode: Callable[..., Any]) -> Callable[..., BaseModelOutput]:
    """The model without a head, of a family that has a pooler."""

    def model(p: Any, c: Any, input_ids: Any = None, **inputs: Any) -> BaseModelOutput:
        """States [B, T, E] and pooled [B, E]."""
        x, cache = encode(p, c, input_ids, **inputs)
        return BaseModelOutput(last_hidden_state=x, pooler_output=pool(p, x), cache=cache)

    return model


def init_cache(c: Any, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of a decoder's layers, with room for `length` positions and an encoder's `encoder_length` states."""
    if not c.is_decoder:
        return None
    counts = list(map(c.heads_of, range(c.num_hidden_layers)))
    sizes = {"head_dim": c.head_dim, "cross_heads": c.num_attention_heads}
    return seq2seq.caches(counts, batch, length, encoder_length or None, dtype, **sizes)
