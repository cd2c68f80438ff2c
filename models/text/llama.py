"""Llama 1 to 3: a decoder with RMS norms, rotary positions, grouped heads and gated feed-forward networks.

Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288; Llama 3: arXiv:2407.21783; original code meta-llama/llama.
Most decoders since descend from it: pre-norm blocks without biases, no table of positions, an untied head.
"""

from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.frozen import FrozenDict
from formax.core.outputs import BaseModelOutput
from formax.core.rng import split
from formax.core.spec import At, Ignored, Spec, fold, normal, stack_of
from formax.layers import embed, heads, mlp, norm, rope
from formax.layers.activations import check_activation
from formax.layers.attention import KVCache, attention_spec, from_attention_mask, self_attention


@config
class LlamaConfig(Config):
    """`config.json` of model type "llama"."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pretraining_tp: int = 1  # how often projections were cut in training; the sums are the same
    tie_word_embeddings: bool = False
    rope_parameters: FrozenDict = FrozenDict(rope_type="default", rope_theta=10000.0)
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    def check(self) -> None:
        if self.num_attention_heads < 1 or self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of num_key_value_heads={self.kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}; "
                "give head_dim"
            )
        check_activation(self.hidden_act)
        rope.check_rope(self.rope_parameters)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, shared by groups of query heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def block_spec(c: LlamaConfig) -> dict[str, Spec]:
    """One layer."""
    init = normal(c.initializer_range)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    attn = partial(attention_spec, names=names, init=init, kv_heads=c.kv_heads, bias=c.attention_bias)
    inverse_frequencies: dict[str, Spec] = {"frequencies": Ignored("rotary_emb.inv_freq")}  # written until 2023
    return {
        "attn_norm": norm.rms_spec("input_layernorm", c.hidden_size),
        "attn": At("self_attn", attn(c.hidden_size, c.num_attention_heads, c.head_size) | inverse_frequencies),
        "mlp_norm": norm.rms_spec("post_attention_layernorm", c.hidden_size),
        "mlp": At(
            "mlp",
            mlp.gated_spec(
                c.hidden_size, c.intermediate_size, ("gate_proj", "up_proj", "down_proj"), init=init, bias=c.mlp_bias
            ),
        ),
    }


def block(p: Any, c: LlamaConfig, x: Any, rotate: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Pre-norm: each part sees its input normalised, and adds to it. [B, T, E] -> ([B, T, E], cache)."""
    h = norm.rms(p["attn_norm"], x, c.rms_norm_eps)
    own = {"mask": mask, "rotate": rotate, "cache": cache, "dropout": c.attention_dropout, "key": key}
    h, cache = self_attention(p["attn"], h, c.head_size, **own)
    x = x + h
    return x + mlp.gated(p["mlp"], norm.rms(p["mlp_norm"], x, c.rms_norm_eps), c.hidden_act), cache


def model_spec(c: LlamaConfig) -> dict[str, Spec]:
    """Word table, layers and the last norm."""
    word = embed.embedding_spec("embed_tokens", c.vocab_size, c.hidden_size, init=normal(c.initializer_range))
    return {
        "embed": {"word": word},
        "layers": stack_of("layers", [block_spec(c) for _ in range(c.num_hidden_layers)]),
        "norm": norm.rms_spec("norm", c.hidden_size),
    }


def decode(
    p: Any,
    c: LlamaConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, None)
    with tap.scope("embed"):
        x = tap.tap("out", embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds)
    offset, room = (0, None) if cache is None else (cache[0].length, cache[0].k.shape[1])
    mask = from_attention_mask(attention_mask, causal=True, q_offset=offset, keys=room)
    positions = offset + jnp.arange(x.shape[1])[None] if position_ids is None else position_ids
    cos, sin = rope.cos_sin(c.rope_parameters, c.head_size, c.max_position_embeddings, positions)
    rotate = partial(rope.rotate, cos=cos, sin=sin)

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, rotate, mask, cache, key)

    x, cache = fold(run, p.get("layers", ()), x, cache=cache, key=split(key, 1)[0])
    return tap.tap("last", norm.rms(p["norm"], x, c.rms_norm_eps)), cache


def model(p: Any, c: LlamaConfig, input_ids: Any = None, **inputs: Any) -> BaseModelOutput:
    """States [B, T, E]."""
    x, cache = decode(p, c, input_ids, **inputs)
    return BaseModelOutput(last_hidden_state=x, cache=cache)


def init_cache(c: LlamaConfig, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of all layers, with room for `length` positions."""
    return tuple(KVCache.empty(batch, length, c.kv_heads, c.head_size, dtype) for _ in range(c.num_hidden_layers))


FAMILY = Family(
    "llama",
    LlamaConfig,
    base="model",
    inputs=decode,
    init_cache=init_cache,
    architectures=(
        Architecture("LlamaModel", "", model_spec, model),
        *heads.decoder_heads("Llama", "model", model_spec, decode, span="transformer"),
    ),
)
