"""Gemma: Llama's decoder with heads of a size of their own, a GELU for a gate, and scales counted from one.

Gemma team 2024, arXiv:2403.08295; original code google-deepmind/gemma. Words are read from the table that they are
written with, times the square root of its width. Norms multiply by 1 + scale, before they leave float32.
"""

from typing import Any, ClassVar

import jax.numpy as jnp

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.spec import At, Spec, normal
from formax.layers import decoder, embed, heads, mlp, norm
from formax.layers.attention import self_attention
from formax.models.text.llama import ROPE, LlamaConfig


@config
class GemmaConfig(LlamaConfig):
    """`config.json` of model type "gemma"."""

    model_type: ClassVar[str] = "gemma"
    implemented: ClassVar = {"mlp_bias": (False,)}  # Llama's alone

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_activation: str | None = (
        None  # says what was meant where `hidden_act` does not; PyTorch's class passes it over
    )
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    tie_word_embeddings: bool = True


def block_spec(c: GemmaConfig) -> dict[str, Spec]:
    """One layer."""
    names, init = ("gate_proj", "up_proj", "down_proj"), normal(c.initializer_range)
    return {
        "attn_norm": norm.rms_plus_one_spec("input_layernorm", c.hidden_size),
        "attn": decoder.attn_spec(c, bias=c.attention_bias),
        "mlp_norm": norm.rms_plus_one_spec("post_attention_layernorm", c.hidden_size),
        "mlp": At("mlp", mlp.gated_spec(c.hidden_size, c.intermediate_size, names, init=init)),
    }


def block(p: Any, c: GemmaConfig, x: Any, rotate: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Pre-norm: each part sees its input normalised, and adds to it. [B, T, E] -> ([B, T, E], cache)."""
    h = norm.rms_plus_one(p["attn_norm"], x, c.rms_norm_eps)
    own = {"mask": mask, "rotate": rotate, "cache": cache, "dropout": c.attention_dropout, "key": key}
    h, cache = self_attention(p["attn"], h, c.head_size, **own)
    x = x + h
    return x + mlp.gated(p["mlp"], norm.rms_plus_one(p["mlp_norm"], x, c.rms_norm_eps), c.hidden_act), cache


def model_spec(c: GemmaConfig) -> dict[str, Spec]:
    """Word table, layers and the last norm."""
    return {**decoder.model_spec(block_spec, c), "norm": norm.rms_plus_one_spec("norm", c.hidden_size)}


def scaled(c: GemmaConfig, x: Any) -> Any:
    """Vectors of words times the square root of their width, which is rounded to their dtype first."""
    return x * jnp.asarray(c.hidden_size**0.5, x.dtype)


def decode(
    p: Any,
    c: GemmaConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, None)
    # Vectors that are given are scaled as well.
    x = scaled(c, embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds)
    return decoder.decode(block, p, c, None, attention_mask, position_ids, x, cache, key, last_norm=norm.rms_plus_one)


def _flax_lacks(c: GemmaConfig) -> dict[str, bool]:
    """Its activation is the other field's, the tanh GELU if there is none."""
    return {
        "hidden_act": c.hidden_act != (c.hidden_activation or "gelu_pytorch_tanh"),
        "rope_parameters": c.rope_parameters != ROPE,
    }


FAMILY = Family(
    "gemma",
    GemmaConfig,
    base="model",
    inputs=decode,
    relative="llama",
    init_cache=decoder.init_cache,
    architectures=(
        Architecture("GemmaModel", "", model_spec, heads.bare(decode)),
        *heads.decoder_heads("Gemma", "model", model_spec, decode)[:3],
    ),
    flax=Port(("GemmaModel", "GemmaForCausalLM"), lacks=_flax_lacks),
)
