"""LongT5: T5 1.1 for long texts, whose encoder attends to what is near, or also to sums of what is not.

Guo et al. 2021, arXiv:2112.07916; original code google-research/longt5 (google/flaxformer). With "local" attention a
token sees `local_radius` tokens to either side; with "transient-global" also the normalised sums of `global_block_size`
tokens each, which every layer makes anew of what it reads, under distances of their own. The decoder is T5's.
"""

from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp

from formax.core import tap
from formax.core.config import ConfigError, config
from formax.core.family import Family, Port
from formax.core.spec import At, Spec
from formax.layers import norm, seq2seq, text_to_text
from formax.layers.attention import Mask
from formax.layers.attention.api import merge_heads, split_heads
from formax.layers.block_attention import block_attention, block_sums, summed_blocks
from formax.layers.linear import linear
from formax.models.text import t5

# Kinds of the encoder's attention, and their names in checkpoints.
LOCAL, GLOBAL = "local", "transient-global"
NAMES = {LOCAL: "LocalSelfAttention", GLOBAL: "TransientGlobalSelfAttention"}


@config
class LongT5Config(t5.T5Config):
    """`config.json` of model type "longt5"."""

    model_type: ClassVar[str] = "longt5"

    local_radius: int = 127
    global_block_size: int = 16
    encoder_attention_type: str = LOCAL

    def check(self) -> None:
        super().check()
        if self.encoder_attention_type not in NAMES:
            known = " or ".join(map(repr, NAMES))
            raise ConfigError(f"encoder_attention_type={self.encoder_attention_type!r} is not {known}")
        if self.global_block_size < 1:
            raise ConfigError(f"global_block_size={self.global_block_size} must be 1 or more")


def stack_spec(c: LongT5Config, part: str) -> dict[str, Spec]:
    """The encoder, whose first layer stores the tables of distances; the decoder is T5's."""
    if part == "decoder":
        return text_to_text.bucketed_stack_spec(c, part)
    name = NAMES[c.encoder_attention_type]
    own, tables = text_to_text.attn_spec(c), {"distance": text_to_text.distance_spec(c, name)}
    if c.encoder_attention_type == GLOBAL:
        own["side_norm"] = norm.rms_spec("global_input_layer_norm", c.d_model)
        tables["side"] = text_to_text.distance_spec(c, name, table="global_relative_attention_bias")
    return text_to_text.stack_spec(c, part, At(name, own), tables)


def attend(p: Any, c: LongT5Config, mask: Mask, both_ways: bool) -> text_to_text.Own:
    """Attention of the encoder: to what is near, and to sums where the configuration says so."""
    if mask.dense is not None:
        raise ValueError("attention in blocks takes a padding mask, attention_mask [batch, length], not one of pairs")
    near = text_to_text.distances(c, p["distance"], both_ways).of_distance
    shared: dict[str, Any] = {"keys": mask.keys, "bias": near, "rate": c.dropout_rate}

    def own(p_layer: Any, x: Any, cache: Any, key: Any) -> Any:
        def heads(part: str, x: Any) -> Any:
            return split_heads(linear(p_layer[part], x), c.d_kv)

        with tap.scope("attn"):
            q, k, v = (tap.tap(part, heads(part, x)) for part in ("q", "k", "v"))
            side = None
            if "side" in p:
                which, there = summed_blocks(mask.keys, x.shape[1], c.global_block_size)
                count = there.shape[1]
                sums = norm.rms(p_layer["side_norm"], block_sums(x, which, count), c.layer_norm_epsilon)
                ahead = jnp.arange(count) - which[..., None]
                terms = text_to_text.distances(c, p["side"], both_ways).of_distance(ahead)
                side = heads("k", sums), heads("v", sums), jnp.moveaxis(terms, 0, 1), there
            out = block_attention(q, k, v, c.local_radius + 1, side=side, key=key, **shared)
            return tap.tap("out", linear(p_layer["o"], merge_heads(out))), cache

    return own


encode = text_to_text.text_encoder(attend)
_parts: tuple[Any, ...] = (
    partial(text_to_text.encoder_spec, stack=stack_spec),
    partial(text_to_text.model_spec, stack=stack_spec),
    encode,
    t5.decode,
)
# Weights of the encoder as the reference has them, block by block.
_BLOCKS = dict.fromkeys(("attentions", "encoder_attentions"), ("output_attentions", ("encoder.layers.*.attn.blocks",)))

FAMILY = Family(
    "longt5",
    LongT5Config,
    base="transformer",
    inputs=seq2seq.both(encode, t5.decode),
    init_cache=text_to_text.init_cache,
    relative="t5",
    architectures=t5.word_heads("LongT5", *_parts, collected=_BLOCKS),
    flax=Port(("LongT5Model", "LongT5ForConditionalGeneration")),
)
