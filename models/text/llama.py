"""Llama 1 to 3: a decoder with RMS norms, rotary positions, grouped heads and gated feed-forward networks.

Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288; Llama 3: arXiv:2407.21783; original code meta-llama/llama.
Most decoders since descend from it: pre-norm blocks without biases, no table of positions, an untied head.
"""

from functools import partial
from typing import Any, ClassVar

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.frozen import FrozenDict
from formax.core.spec import At, Ignored, Spec, normal
from formax.layers import decoder, heads, mlp, norm
from formax.layers.attention import self_attention
from formax.layers.decoder import RotaryDecoderConfig

ROPE = FrozenDict(rope_type="default", rope_theta=10000.0)


@config
class LlamaConfig(RotaryDecoderConfig):
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
    rope_parameters: FrozenDict = ROPE
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False


def block_spec(c: LlamaConfig) -> dict[str, Spec]:
    """One layer."""
    names, init = ("gate_proj", "up_proj", "down_proj"), normal(c.initializer_range)
    frequencies = Ignored("rotary_emb.inv_freq")  # written until 2023
    return {
        "attn_norm": norm.rms_spec("input_layernorm", c.hidden_size),
        "attn": decoder.attn_spec(c, bias=c.attention_bias, frequencies=frequencies),
        "mlp_norm": norm.rms_spec("post_attention_layernorm", c.hidden_size),
        "mlp": At("mlp", mlp.gated_spec(c.hidden_size, c.intermediate_size, names, init=init, bias=c.mlp_bias)),
    }


def block(p: Any, c: LlamaConfig, x: Any, rotate: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Pre-norm: each part sees its input normalised, and adds to it. [B, T, E] -> ([B, T, E], cache)."""
    h = norm.rms(p["attn_norm"], x, c.rms_norm_eps)
    own = {"mask": mask, "rotate": rotate, "cache": cache, "dropout": c.attention_dropout, "key": key}
    h, cache = self_attention(p["attn"], h, c.head_size, **own)
    x = x + h
    return x + mlp.gated(p["mlp"], norm.rms(p["mlp_norm"], x, c.rms_norm_eps), c.hidden_act), cache


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
    return decoder.decode(block, p, c, input_ids, attention_mask, position_ids, inputs_embeds, cache, key)


model = heads.bare(decode)


def _flax_lacks(c: LlamaConfig) -> dict[str, bool]:
    return {
        "head_dim": c.head_size * c.num_attention_heads != c.hidden_size,
        "mlp_bias": c.mlp_bias,
        "rope_parameters": c.rope_parameters != ROPE,
        "tie_word_embeddings": c.tie_word_embeddings,
    }


model_spec = partial(decoder.model_spec, block_spec)

FAMILY = Family(
    "llama",
    LlamaConfig,
    base="model",
    inputs=decode,
    init_cache=decoder.init_cache,
    old_names={"LLaMAForCausalLM": "LlamaForCausalLM"},
    architectures=(
        Architecture("LlamaModel", "", model_spec, model),
        *heads.decoder_heads("Llama", "model", model_spec, decode, span="transformer"),
    ),
    flax=Port(("LlamaModel", "LlamaForCausalLM"), lacks=_flax_lacks),
)
