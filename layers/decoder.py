"""What decoders of the Llama line have in common: rotary positions, RMS norms, heads that share keys, one causal stack.

A family writes its own block, `block(p, c, x, rotate, mask, cache, key) -> (x, cache)`, and its own configuration over
`RotaryDecoderConfig`; the way from ids through the blocks to normalised states is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.rng import split
from formax.core.spec import At, Spec, fold, normal, stack_of
from formax.layers import embed, norm, rope
from formax.layers.activations import check_activation
from formax.layers.attention import KVCache, Mask, attention_spec, causal_mask


@config
class RotaryDecoderConfig(Config):
    """Sizes of heads, for configurations with these fields under these names."""

    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_size: int = 4096
    head_dim: int | None = None
    hidden_act: str = "silu"

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

    @property
    def rope(self) -> rope.Rope:
        """How queries and keys are turned."""
        return rope.Rope(self.rope_parameters, self.head_size, self.max_position_embeddings)


def attn_spec(c: Any, *, bias: bool | str = False, **more: Spec) -> Spec:
    """Projections of attention under the names of the line, and what else the family keeps there."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    own = attention_spec(
        c.hidden_size,
        c.num_attention_heads,
        c.head_size,
        names=names,
        init=normal(c.initializer_range),
        kv_heads=c.kv_heads,
        bias=bias,
    )
    return At("self_attn", {**own, **more})


def model_spec(block_spec: Callable[[Any], dict[str, Spec]], c: Any) -> dict[str, Spec]:
    """Word table, layers and the last norm."""
    word = embed.embedding_spec("embed_tokens", c.vocab_size, c.hidden_size, init=normal(c.initializer_range))
    return {
        "embed": {"word": word},
        "layers": stack_of("layers", [block_spec(c)] * c.num_hidden_layers),
        "norm": norm.rms_spec("norm", c.hidden_size),
    }


def decode(
    block: Callable[..., Any],
    p: Any,
    c: Any,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    cache: Any,
    key: Any,
    *,
    window: int | None = None,
    last_norm: Callable[..., jax.Array] = norm.rms,
) -> tuple[jax.Array, Any]:
    """Word vectors, all blocks, the last norm: ids [B, T] -> (states [B, T, E], what the blocks gave beside them).

    With a `window`, a position sees that many: itself and those right before it. `last_norm` is the function of it.
    """
    embed.check_inputs(input_ids, inputs_embeds, None)
    with tap.scope("embed"):
        x = tap.tap("out", embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds)
    mask = causal_mask(attention_mask, cache)
    if window is not None and mask.causal:  # pairs [B, T, S] say everything, the window too
        mask = mask & Mask(window=(window - 1, None), q_offset=mask.q_offset)
    positions = embed.positions(mask.q_offset, x) if position_ids is None else position_ids
    rotate = c.rope.at(positions)

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, rotate, mask, cache, key)

    x, seen = fold(run, p.get("layers", ()), x, cache=cache, key=split(key, 1)[0])
    return tap.tap("last", last_norm(p["norm"], x, c.rms_norm_eps)), seen


def init_cache(c: Any, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of all layers, with room for `length` positions."""
    return tuple(KVCache.empty(batch, length, c.kv_heads, c.head_size, dtype) for _ in range(c.num_hidden_layers))


def own_caches(c: Any, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """`init_cache` where every head has keys of its own, as in GPT's line."""
    size = batch, length, c.num_attention_heads, c.head_dim, dtype
    return tuple(KVCache.empty(*size) for _ in range(c.num_hidden_layers))
