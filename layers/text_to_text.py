"""T5's encoder-decoder (Raffel et al. 2019, arXiv:1910.10683), as all of its line have it and name it in checkpoints.

Pre-norm blocks with RMS norms and no biases; scores are not scaled, and positions are told by a bias on them. Where
families differ is in how a stack attends to itself: a family writes `attend(p, c, mask, both_ways) -> own` of the
stack's parameters `p`, where `own(p, x, cache, key) -> ([B, T, E], cache)` is the attention of one layer; T5's is
`bucketed`. Words are in `p["embed"]["word"]`; `p[part]`, of "encoder" or "decoder", has `layers`, `norm` and the tables
that `attend` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from formax.core import tap
from formax.core.outputs import BaseModelOutput
from formax.core.rng import split
from formax.core.spec import At, Ignored, Spec, Tied, fold, normal, stack_of
from formax.layers import embed, mlp, norm, seq2seq
from formax.layers.attention import (
    Bucketed,
    Mask,
    attention_spec,
    causal_mask,
    cross_attention,
    from_attention_mask,
    self_attention,
)
from formax.layers.attention.bias import bucketed_spec
from formax.layers.dropout import dropout

Own = Callable[..., Any]
Attend = Callable[[Any, Any, Mask, bool], Own]


# --- layers


def attn_spec(c: Any) -> dict[str, Spec]:
    """Projections of one attention."""
    factor, inner = c.initializer_factor, c.num_heads * c.d_kv
    init = normal(factor * c.d_model**-0.5)
    # Queries start smaller, in the place of a scale on the scores.
    own = {"q": normal(factor * (c.d_model * c.d_kv) ** -0.5), "k": init, "v": init, "o": normal(factor * inner**-0.5)}
    return attention_spec(c.d_model, c.num_heads, c.d_kv, names=("q", "k", "v", "o"), init=own, bias=False)


def feed_spec(c: Any) -> dict[str, Spec]:
    """A feed-forward network, gated or not."""
    factor = c.initializer_factor
    shared: dict[str, Any] = {
        "init": normal(factor * c.d_model**-0.5),
        "out_init": normal(factor * c.d_ff**-0.5),
        "bias": False,
    }
    if c.is_gated:
        return mlp.gated_spec(c.d_model, c.d_ff, ("wi_0", "wi_1", "wo"), **shared)
    return mlp.dense_spec(c.d_model, c.d_ff, ("wi", "wo"), **shared)


def block_spec(c: Any, part: str, own: Spec) -> dict[str, Spec]:
    """One layer of either stack, which attends to itself by `own`."""
    last = 2 if part == "decoder" else 1
    spec: dict[str, Spec] = {
        "attn_norm": norm.rms_spec("layer.0.layer_norm", c.d_model),
        "attn": At("layer.0", own),
        "mlp_norm": norm.rms_spec(f"layer.{last}.layer_norm", c.d_model),
        "mlp": At(f"layer.{last}.DenseReluDense", feed_spec(c)),
    }
    if part == "decoder":
        dead = {"bias": Ignored("relative_attention_bias.weight")}  # in the checkpoints of 2020, read by nobody
        spec["cross_norm"] = norm.rms_spec("layer.1.layer_norm", c.d_model)
        spec["cross"] = At("layer.1.EncDecAttention", attn_spec(c) | dead)
    return spec


def block(p: Any, c: Any, x: Any, own: Own, memory: Any, memory_mask: Any, cache: Any, key: Any) -> Any:
    """Pre-norm: each part sees its input normalised, and adds to it. [B, T, E] -> ([B, T, E], cache)."""
    keys = split(key, 6)
    cache = cache or {"attn": None, "cross": None}

    def read(name: str) -> jax.Array:
        return norm.rms(p[name], x, c.layer_norm_epsilon)

    h, attn = own(p["attn"], read("attn_norm"), cache["attn"], keys[0])
    x = x + dropout(h, c.dropout_rate, keys[1])
    cross = cache["cross"]
    if "cross" in p:
        other: dict[str, Any] = {"scale": 1.0, "dropout": c.dropout_rate, "key": keys[2]}
        h, cross = cross_attention(
            p["cross"], read("cross_norm"), memory, c.d_kv, mask=memory_mask, cache=cross, **other
        )
        x = x + dropout(h, c.dropout_rate, keys[3])
    feed = mlp.gated if c.is_gated else mlp.dense
    h = feed(p["mlp"], read("mlp_norm"), c.activation, rate=c.dropout_rate, key=keys[4])
    return x + dropout(h, c.dropout_rate, keys[5]), {"attn": attn, "cross": cross}


def depth(c: Any, part: str) -> int:
    """How many layers the encoder or the decoder has; as many, if nothing is said of the decoder."""
    return (c.num_decoder_layers or c.num_layers) if part == "decoder" else c.num_layers


def stack_spec(c: Any, part: str, own: Spec, tables: Mapping[str, Spec]) -> dict[str, Spec]:
    """Encoder or decoder of layers that attend to themselves by `own`, with the `tables` that they share."""
    stack = {
        "words": Tied("embed_tokens.weight", "embed.word.embedding"),
        **tables,
        "layers": stack_of("block", [block_spec(c, part, own)] * depth(c, part)),
        "norm": norm.rms_spec("final_layer_norm", c.d_model),
    }
    return {part: At(part, stack)}


def run_stack(
    p: Any, c: Any, x: Any, own: Own, memory: Any = None, memory_mask: Any = None, cache: Any = None, key: Any = None
) -> Any:
    """All layers of a stack `p` and its last norm: [B, T, E] -> ([B, T, E], cache)."""
    k_in, k_layers, k_out = split(key, 3)
    x = tap.tap("embed.out", dropout(x, c.dropout_rate, k_in))

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, own, memory, memory_mask, cache, key)

    x, cache = fold(run, p.get("layers", ()), x, cache=cache, key=k_layers)
    return tap.tap("last", dropout(norm.rms(p["norm"], x, c.layer_norm_epsilon), c.dropout_rate, k_out)), cache


def init_cache(c: Any, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of the decoder, with room for `length` positions and the encoder's `encoder_length` states."""
    counts = [c.num_heads] * depth(c, "decoder")
    return seq2seq.caches(counts, batch, length, encoder_length, dtype, head_dim=c.d_kv, cross_heads=c.num_heads)


# --- T5's attention


def distance_spec(c: Any, name: str, *, table: str = "relative_attention_bias") -> Spec:
    """The table of a stack's distances, which is stored in its first layer, whose attention is called `name`."""
    init = normal(c.initializer_factor * c.d_model**-0.5)
    return bucketed_spec(f"block.0.layer.0.{name}.{table}", c.relative_attention_num_buckets, c.num_heads, init)


def bucketed_stack_spec(c: Any, part: str) -> dict[str, Spec]:
    """A stack that `bucketed` attends in."""
    own = At("SelfAttention", attn_spec(c))
    return stack_spec(c, part, own, {"distance": distance_spec(c, "SelfAttention")})


def distances(c: Any, table: Any, both_ways: bool) -> Bucketed:
    """The bias of a table [buckets, H] of distances; of the decoder's all are of keys before the query."""
    return Bucketed(table["embedding"], max_distance=c.relative_attention_max_distance, both_ways=both_ways)


def bucketed(p: Any, c: Any, mask: Mask, both_ways: bool) -> Own:
    """Attention to all that `mask` allows, with a bias by bucketed distance, of one table a stack."""
    bias = distances(c, p["distance"], both_ways)

    def own(p: Any, x: Any, cache: Any, key: Any) -> Any:
        how: dict[str, Any] = {"mask": mask, "bias": bias, "scale": 1.0, "dropout": c.dropout_rate}
        return self_attention(p, x, c.d_kv, cache=cache, key=key, **how)

    return own


# --- texts


def encoder_spec(c: Any, stack: Callable[[Any, str], dict[str, Spec]] = bucketed_stack_spec) -> dict[str, Spec]:
    """Words and the encoder."""
    word = embed.embedding_spec("shared", c.vocab_size, c.d_model, init=normal(c.initializer_factor))
    return {"embed": {"word": word}, **stack(c, "encoder")}


def model_spec(c: Any, stack: Callable[[Any, str], dict[str, Spec]] = bucketed_stack_spec) -> dict[str, Spec]:
    """Words, the encoder, and a decoder that is T5's."""
    return {**encoder_spec(c, stack), **bucketed_stack_spec(c, "decoder")}


def text_encoder(attend: Attend) -> Callable[..., BaseModelOutput]:
    """The encoder of texts whose layers attend to themselves by `attend`."""

    def encode(
        p: Any, c: Any, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, key: Any = None
    ) -> BaseModelOutput:
        """The encoder's states of a text: ids [B, S] -> [B, S, E]."""
        embed.check_inputs(input_ids, inputs_embeds, None)
        with tap.scope("encoder"):
            x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
            own = attend(p["encoder"], c, from_attention_mask(attention_mask), True)
            x, _ = run_stack(p["encoder"], c, x, own, key=key)
        return BaseModelOutput(last_hidden_state=x)

    return encode


def text_decoder(attend: Attend) -> Callable[..., Any]:
    """The decoder of texts whose layers attend to themselves by `attend`."""

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
        """The decoder: ids [B, T] and the encoder's states [B, S, E] -> (states [B, T, E], cache)."""
        embed.check_inputs(input_ids, inputs_embeds, None, "decoder_")
        memory = encoder_hidden_states, from_attention_mask(encoder_attention_mask)
        with tap.scope("decoder"):
            x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
            own = attend(p["decoder"], c, causal_mask(attention_mask, cache), False)
            return run_stack(p["decoder"], c, x, own, *memory, cache, key)

    return decode
