"""BLOOM: GPT-2 without positions, whose scores fall with the distance (ALiBi), and whose words are normalised first.

BigScience 2022, arXiv:2211.05100; ALiBi: Press et al. 2021, arXiv:2108.12409; original code bigscience-workshop/
Megatron-DeepSpeed, which keeps q, k and v of a head together. The reference counts distances in tokens that are no
padding, so that a text means the same wherever padding stands.
"""

from typing import Any, ClassVar

import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.rng import split
from formax.core.spec import At, Spec, fold, normal, stack_of
from formax.layers import decoder, embed, heads, mlp, norm
from formax.layers.attention import ALiBi, Mask, alibi_slopes, causal_mask, self_attention
from formax.layers.dropout import dropout
from formax.layers.linear import fused_spec, linear_spec


@config
class BloomConfig(Config):
    """`config.json` of model type "bloom"."""

    model_type: ClassVar[str] = "bloom"
    attribute_map: ClassVar = {
        "hidden_dropout_prob": "hidden_dropout",
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    implemented: ClassVar = {"slow_but_exact": (False,)}  # the parts of a sum one by one, but without its bias

    vocab_size: int = 250880
    hidden_size: int = 64
    n_layer: int = 2
    n_head: int = 8
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    pretraining_tp: int = 1  # how often projections were cut in training; the sums are the same
    slow_but_exact: bool = False

    def check(self) -> None:
        check_multiple(self, "hidden_size", "n_head")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_head


def block_spec(c: BloomConfig) -> dict[str, Spec]:
    """One layer."""
    init, size = normal(c.initializer_range), c.hidden_size
    parts = {"q": (size, "heads"), "k": (size, "kv_heads"), "v": (size, "kv_heads")}
    attn = fused_spec("query_key_value", size, parts, init=init, groups=c.n_head)
    out = linear_spec("dense", size, size, ("heads", "embed"), init=init)
    return {
        "attn_norm": norm.layer_spec("input_layernorm", size),
        "attn": At("self_attention", {**attn, "o": out}),
        "mlp_norm": norm.layer_spec("post_attention_layernorm", size),
        "mlp": At("mlp", mlp.dense_spec(size, 4 * size, ("dense_h_to_4h", "dense_4h_to_h"), init=init)),
    }


def block(p: Any, c: BloomConfig, x: Any, bias: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Pre-norm; what is added to may be the normalised states. [B, T, E] -> ([B, T, E], cache)."""
    keys, normalised = split(key, 3), c.apply_residual_connection_post_layernorm
    y = norm.layer(p["attn_norm"], x, c.layer_norm_epsilon)
    own = {"mask": mask, "bias": bias, "cache": cache, "dropout": c.attention_dropout, "key": keys[0]}
    h, cache = self_attention(p["attn"], y, c.head_dim, **own)
    x = (y if normalised else x) + dropout(h, c.hidden_dropout, keys[1])
    y = norm.layer(p["mlp_norm"], x, c.layer_norm_epsilon)
    h = mlp.dense(p["mlp"], y, "gelu_new")
    return (y if normalised else x) + dropout(h, c.hidden_dropout, keys[2]), cache


def model_spec(c: BloomConfig) -> dict[str, Spec]:
    """Words and their norm, layers and the last norm."""
    word = embed.embedding_spec("word_embeddings", c.vocab_size, c.hidden_size, init=normal(c.initializer_range))
    return {
        "embed": {"word": word, "norm": norm.layer_spec("word_embeddings_layernorm", c.hidden_size)},
        "layers": stack_of("h", [block_spec(c)] * c.n_layer),
        "norm": norm.layer_spec("ln_f", c.hidden_size),
    }


def alibi(c: BloomConfig, mask: Mask) -> Any:
    """What distances take from the scores; with padding, that of a key's number among those that are none [B, H, 1, S].

    A query's own number would be the same for all its keys, which the softmax takes away. Padding at one end moves all
    numbers alike, but between a text and what is written after it it does not count.
    """
    slopes = jnp.asarray(alibi_slopes(c.n_head))
    if mask.keys is None:
        return ALiBi(slopes)
    return slopes[:, None, None] * (jnp.cumsum(mask.keys, axis=-1) - 1)[:, None, None]


def decode(
    p: Any,
    c: BloomConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, None)
    mask = causal_mask(attention_mask, cache)
    with tap.scope("embed"):
        x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
        x = tap.tap("out", norm.layer(p["embed"]["norm"], x, c.layer_norm_epsilon))
    bias = alibi(c, mask)

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, bias, mask, cache, key)

    x, cache = fold(run, p.get("layers", ()), x, cache=cache, key=split(key, 1)[0])
    return tap.tap("last", norm.layer(p["norm"], x, c.layer_norm_epsilon)), cache


def _flax_lacks(c: BloomConfig) -> dict[str, bool]:
    """It has slopes only for a power of two."""
    return {"n_head": c.n_head & (c.n_head - 1) != 0}


FAMILY = Family(
    "bloom",
    BloomConfig,
    base="transformer",
    inputs=decode,
    relative="gpt2",
    init_cache=decoder.own_caches,
    architectures=(
        Architecture("BloomModel", "", model_spec, heads.bare(decode)),
        *heads.decoder_heads("Bloom", "transformer", model_spec, decode, token="classifier"),
    ),
    flax=Port(("BloomModel", "BloomForCausalLM"), lacks=_flax_lacks),
)
