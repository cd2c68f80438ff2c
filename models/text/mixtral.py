"""Mixtral: Mistral's decoder with a mixture of experts in the place of its feed-forward networks.

Jiang et al. 2024, arXiv:2401.04088. Beside Llama: every token goes through two of eight gated networks, which a router
of each layer chooses, and attention may be to a window of positions. Training adds a loss that keeps the experts evenly
used (`layers.moe.load_balancing_loss`); models return it when they are asked for the routers' logits.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.frozen import FrozenDict
from formax.core.outputs import MoeLogitsOutput, MoeModelOutput
from formax.core.rng import split
from formax.core.spec import At, Spec, normal
from formax.layers import decoder, heads, moe, norm
from formax.layers.attention import self_attention
from formax.layers.decoder import RotaryDecoderConfig


@config
class MixtralConfig(RotaryDecoderConfig):
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
        super().check()
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be from 1 to "
                f"num_local_experts={self.num_local_experts}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be null, or at least 1")


def block_spec(c: MixtralConfig) -> dict[str, Spec]:
    """One layer."""
    names = ("gate", "experts.{}.w1", "experts.{}.w3", "experts.{}.w2")
    init = normal(c.initializer_range)
    experts = moe.gated_spec(c.hidden_size, c.intermediate_size, c.num_local_experts, names, init=init)
    return {
        "attn_norm": norm.rms_spec("input_layernorm", c.hidden_size),
        "attn": decoder.attn_spec(c),
        "mlp_norm": norm.rms_spec("post_attention_layernorm", c.hidden_size),
        "mlp": At("block_sparse_moe", experts),
    }


def block(p: Any, c: MixtralConfig, x: Any, rotate: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Pre-norm attention and experts: [B, T, E] -> ([B, T, E], (cache, router logits [B, T, X]))."""
    k_attn, k_moe = split(key, 2)
    h = norm.rms(p["attn_norm"], x, c.rms_norm_eps)
    own = {"mask": mask, "rotate": rotate, "cache": cache, "dropout": c.attention_dropout, "key": k_attn}
    h, cache = self_attention(p["attn"], h, c.head_size, **own)
    x = x + h
    h = norm.rms(p["mlp_norm"], x, c.rms_norm_eps)
    h, logits = moe.gated(p["mlp"], h, c.hidden_act, c.num_experts_per_tok, noise=c.router_jitter_noise, key=k_moe)
    return x + h, (cache, logits)


model_spec = partial(decoder.model_spec, block_spec)


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
    inputs = input_ids, attention_mask, position_ids, inputs_embeds
    x, seen = decoder.decode(block, p, c, *inputs, cache, key, window=c.sliding_window)
    # layers one by one give a tuple of pairs, scanned ones a pair of stacks
    caches, logits = seen if isinstance(p.get("layers"), dict) else zip(*(seen or [((), ())]), strict=True)
    asked = c.output_router_logits if output_router_logits is None else output_router_logits
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


_words, *_labels = heads.decoder_heads("Mixtral", "model", model_spec, states)

FAMILY = Family(
    "mixtral",
    MixtralConfig,
    base="model",
    inputs=decode,
    relative="llama",
    init_cache=decoder.init_cache,
    architectures=(
        Architecture("MixtralModel", "", model_spec, model),
        replace(_words, apply=causal_lm),
        *_labels,
    ),
)
