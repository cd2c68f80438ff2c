"""Mixtral: Mistral's decoder with a mixture of experts in the place of its feed-forward networks.

Jiang et al. 2024, arXiv:2401.04088. Beside Llama: every token goes through two of eight gated networks, which a router
of each layer chooses, and attention may be to a window of positions. Training adds a loss that keeps the experts evenly
used (`layers.moe.load_balancing_loss`); models return it when they are asked for the routers' logits.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.frozen import FrozenDict
from formax.core.outputs import Array, Output, output
from formax.core.rng import split
from formax.core.spec import At, Spec, fold, normal, stack_of
from formax.layers import embed, heads, moe, norm, rope
from formax.layers.activations import check_activation
from formax.layers.attention import KVCache, Mask, attention_spec, from_attention_mask, self_attention


@config
class MixtralConfig(Config):
    """`config.json` of model type "mixtral"."""

    model_type: ClassVar[str] = "mixtral"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096 * 32
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: FrozenDict = FrozenDict(rope_type="default", rope_theta=1e6)
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    num_experts_per_tok: int = 2
    num_local_experts: int = 8
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0

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
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be from 1 to "
                f"num_local_experts={self.num_local_experts}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be null, or at least 1")
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


@output
class MoeModelOutput(Output):
    """Decoder states [B, T, E]; `router_logits`, when asked for, one [B * T, experts] a layer."""

    last_hidden_state: Array
    cache: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    router_logits: tuple[Array, ...] | None = None


@output
class MoeLogitsOutput(Output):
    """`logits` [B, T, V]; `router_logits` and `aux_loss`, how unevenly the experts are used, when asked for."""

    logits: Array
    aux_loss: Array | None = None
    cache: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    router_logits: tuple[Array, ...] | None = None


def block_spec(c: MixtralConfig) -> dict[str, Spec]:
    """One layer."""
    init = normal(c.initializer_range)
    attn = attention_spec(
        c.hidden_size,
        c.num_attention_heads,
        c.head_size,
        names=("q_proj", "k_proj", "v_proj", "o_proj"),
        init=init,
        kv_heads=c.kv_heads,
        bias=False,
    )
    names = ("gate", "experts.{}.w1", "experts.{}.w3", "experts.{}.w2")
    experts = moe.gated_spec(c.hidden_size, c.intermediate_size, c.num_local_experts, names, init=init)
    return {
        "attn_norm": norm.rms_spec("input_layernorm", c.hidden_size),
        "attn": At("self_attn", attn),
        "mlp_norm": norm.rms_spec("post_attention_layernorm", c.hidden_size),
        "moe": At("block_sparse_moe", experts),
    }


def block(p: Any, c: MixtralConfig, x: Any, rotate: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Pre-norm attention and experts: [B, T, E] -> ([B, T, E], (cache, router logits [B, T, X]))."""
    k_attn, k_moe = split(key, 2)
    h = norm.rms(p["attn_norm"], x, c.rms_norm_eps)
    own = {"mask": mask, "rotate": rotate, "cache": cache, "dropout": c.attention_dropout, "key": k_attn}
    h, cache = self_attention(p["attn"], h, c.head_size, **own)
    x = x + h
    h = norm.rms(p["mlp_norm"], x, c.rms_norm_eps)
    h, logits = moe.gated(p["moe"], h, c.hidden_act, c.num_experts_per_tok, noise=c.router_jitter_noise, key=k_moe)
    return x + h, (cache, logits)


def model_spec(c: MixtralConfig) -> dict[str, Spec]:
    """Word table, layers and the last norm."""
    word = embed.embedding_spec("embed_tokens", c.vocab_size, c.hidden_size, init=normal(c.initializer_range))
    return {
        "embed": {"word": word},
        "layers": stack_of("layers", [block_spec(c) for _ in range(c.num_hidden_layers)]),
        "norm": norm.rms_spec("norm", c.hidden_size),
    }


def decode(
    p: Any,
    c: MixtralConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    output_router_logits: bool | None = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers, the last norm: ids [B, T] -> (states [B, T, E], cache, router logits or None)."""
    embed.check_inputs(input_ids, inputs_embeds, None)
    with tap.scope("embed"):
        x = tap.tap("out", embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds)
    offset, room = (0, None) if cache is None else (cache[0].length, cache[0].k.shape[1])
    mask = from_attention_mask(attention_mask, causal=True, q_offset=offset, keys=room)
    if c.sliding_window is not None and mask.causal:  # pairs take the place of the window, too
        mask = mask & Mask(window=(c.sliding_window - 1, None), q_offset=offset)
    positions = offset + jnp.arange(x.shape[1])[None] if position_ids is None else position_ids
    cos, sin = rope.cos_sin(c.rope_parameters, c.head_size, c.max_position_embeddings, positions)
    rotate = partial(rope.rotate, cos=cos, sin=sin)

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, rotate, mask, cache, key)

    x, seen = fold(run, p.get("layers", ()), x, cache=cache, key=split(key, 1)[0])
    # layers one by one give a tuple of pairs, scanned ones a pair of stacks
    caches, logits = seen if isinstance(p.get("layers"), dict) else zip(*(seen or [((), ())]), strict=True)
    asked = c.output_router_logits if output_router_logits is None else output_router_logits
    x = tap.tap("last", norm.rms(p["norm"], x, c.rms_norm_eps))
    return x, None if cache is None else caches, tuple(logits) if asked else None


def states(p: Any, c: MixtralConfig, input_ids: Any = None, **inputs: Any) -> Any:
    """`decode` without router logits: (states [B, T, E], cache)."""
    return decode(p, c, input_ids, **inputs)[:2]


def flat(logits: Sequence[Any] | None) -> tuple[Any, ...] | None:
    """Router logits [B, T, X] of every layer as the reference returns them, [B * T, X]."""
    return None if logits is None else tuple(each.reshape(-1, each.shape[-1]) for each in logits)


def model(p: Any, c: MixtralConfig, input_ids: Any = None, **inputs: Any) -> MoeModelOutput:
    """States [B, T, E]."""
    x, cache, logits = decode(p, c, input_ids, **inputs)
    return MoeModelOutput(last_hidden_state=x, cache=cache, router_logits=flat(logits))


def causal_lm(
    p: Any, c: MixtralConfig, input_ids: Any = None, attention_mask: Any = None, **inputs: Any
) -> MoeLogitsOutput:
    """Scores of the next word at every position [B, T, V]."""
    x, cache, logits = decode(p, c, input_ids, attention_mask, **inputs)
    aux = None
    if logits is not None:
        seen = None if attention_mask is None or attention_mask.shape != x.shape[:2] else attention_mask
        aux = moe.load_balancing_loss(logits, c.num_experts_per_tok, seen)
    return MoeLogitsOutput(logits=heads.lm_logits(p, x), aux_loss=aux, cache=cache, router_logits=flat(logits))


def init_cache(c: MixtralConfig, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of all layers, with room for `length` positions."""
    return tuple(KVCache.empty(batch, length, c.kv_heads, c.head_size, dtype) for _ in range(c.num_hidden_layers))


_words, *_labels = heads.decoder_heads("Mixtral", "model", model_spec, states)

FAMILY = Family(
    "mixtral",
    MixtralConfig,
    base="model",
    inputs=decode,
    init_cache=init_cache,
    architectures=(
        Architecture("MixtralModel", "", model_spec, model),
        replace(_words, apply=causal_lm),
        *_labels,
    ),
)
