"""ViT: an image cut into patches, read as a text by a bidirectional encoder with pre-layer-norm blocks.

Dosovitskiy et al. 2020, arXiv:2010.11929; original code google-research/vision_transformer. Nearest relative: BERT,
whose layers these are with the norms before each part. A learned class token goes first and stands for the image.
Images of other sizes get their positions stretched. Masked image modelling is SimMIM's (Xie et al. 2021,
arXiv:2111.09886).
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput, LogitsOutput, MaskedImageModelingOutput
from formax.core.rng import split
from formax.core.spec import At, Spec, fold, normal, optional, stack_of
from formax.layers import heads, image_heads, mlp, norm
from formax.layers.activations import activation, check_activation
from formax.layers.attention import Mask, attention_spec, self_attention
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec
from formax.layers.patches import PatchesConfig, embed_image, image_spec
from formax.layers.resize import grid_of


@config
class ViTConfig(PatchesConfig):
    """`config.json` of model type "vit"."""

    model_type: ClassVar[str] = "vit"

    intermediate_size: int = 3072
    qkv_bias: bool = True
    encoder_stride: int = 16
    pooler_output_size: int | None = None  # hidden_size
    pooler_act: str = "tanh"

    def check(self) -> None:
        super().check()
        check_activation(self.pooler_act, "pooler_act")


def block_spec(c: ViTConfig, layer: int) -> dict[str, Spec]:
    """One layer."""
    init = normal(c.initializer_range)
    names = ("attention.query", "attention.key", "attention.value", "output.dense")
    bias = True if c.qkv_bias else "o"
    attn = attention_spec(c.hidden_size, c.heads_of(layer), c.head_dim, names=names, init=init, bias=bias)
    return {
        "attn_norm": norm.layer_spec("layernorm_before", c.hidden_size),
        "attn": At("attention", attn),
        "mlp_norm": norm.layer_spec("layernorm_after", c.hidden_size),
        "mlp": mlp.dense_spec(c.hidden_size, c.intermediate_size, ("intermediate.dense", "output.dense"), init=init),
    }


def block(p: Any, c: ViTConfig, x: jax.Array, key: Any) -> jax.Array:
    """Pre-norm: each part works on what was normalised, and adds to what was not. [B, T, E] -> [B, T, E]."""
    keys = split(key, 3)
    h = norm.layer(p["attn_norm"], x, c.layer_norm_eps)
    h, _ = self_attention(p["attn"], h, c.head_dim, mask=Mask(), dropout=c.attention_probs_dropout_prob, key=keys[0])
    x = x + dropout(h, c.hidden_dropout_prob, keys[1])
    h = mlp.dense(p["mlp"], norm.layer(p["mlp_norm"], x, c.layer_norm_eps), c.hidden_act)
    return x + dropout(h, c.hidden_dropout_prob, keys[2])


def encoder_spec(c: ViTConfig, *, masked: bool = False) -> dict[str, Spec]:
    """Embeddings, layers and the last norm; with a token for `masked` patches, which a base model's file lacks."""
    embeddings = image_spec(c, init=normal(c.initializer_range), mask=(1, 1, c.hidden_size) if masked else ())
    if masked:
        embeddings["mask"] = optional(embeddings["mask"])
    layers = [block_spec(c, i) for i in range(c.num_hidden_layers)]
    return {
        "embed": At("embeddings", embeddings),
        "layers": stack_of("encoder.layer", layers),
        "norm": norm.layer_spec("layernorm", c.hidden_size),
    }


def model_spec(c: ViTConfig) -> dict[str, Spec]:
    """The encoder and the pooler, which checkpoints of heads lack: none of them uses it."""
    size = c.pooler_output_size or c.hidden_size
    dense = linear_spec("pooler.dense", c.hidden_size, size, ("embed", None), init=normal(c.initializer_range))
    return {**encoder_spec(c), "pooler": optional(dense)}


def encode(
    p: Any,
    c: ViTConfig,
    pixel_values: Any = None,
    bool_masked_pos: Any = None,
    interpolate_pos_encoding: bool = False,
    key: Any = None,
) -> jax.Array:
    """States of the class token and of the patches, row by row: [B, C, height, width] -> [B, 1 + N, E]."""
    k_embed, k_layers = split(key, 2)
    with tap.scope("embed"):
        x = embed_image(p["embed"], c, pixel_values, stretch=interpolate_pos_encoding, hidden=bool_masked_pos)
        x = tap.tap("out", dropout(x, c.hidden_dropout_prob, k_embed))

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, key), cache

    x, _ = fold(run, p.get("layers", ()), x, key=k_layers)
    return norm.layer(p["norm"], x, c.layer_norm_eps)


def model(p: Any, c: ViTConfig, pixel_values: Any = None, **inputs: Any) -> BaseModelOutput:
    """States [B, 1 + N, E] and pooled [B, E']."""
    x = encode(p, c, pixel_values, **inputs)
    pooled = activation(c.pooler_act)(linear(p["pooler"], x[:, 0]))
    return BaseModelOutput(last_hidden_state=x, pooler_output=tap.tap("pooler", pooled))


def image_classification(
    p: Any, c: ViTConfig, pixel_values: Any = None, interpolate_pos_encoding: bool = False, key: Any = None
) -> LogitsOutput:
    """A label for every image, from the class token: logits [B, labels] (without labels, its state [B, E])."""
    x = encode(p, c, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, key=key)[:, 0]
    return LogitsOutput(logits=linear(p["head"], x) if "head" in p else x)


def masked_image_modeling(
    p: Any, c: ViTConfig, pixel_values: Any = None, bool_masked_pos: Any = None, **inputs: Any
) -> MaskedImageModelingOutput:
    """Pixels of all patches, `encoder_stride` x `encoder_stride` for each: [B, C, height', width'].

    Raises:
        ValueError: patches are masked, and what is made of them would not have the size of the image.
    """
    if bool_masked_pos is not None:
        image_heads.check_stride(c)
    x = encode(p, c, pixel_values, bool_masked_pos, **inputs)[:, 1:]
    grid = grid_of(pixel_values.shape[2:], c.patch_size)
    return MaskedImageModelingOutput(reconstruction=image_heads.pixels(p, c, x, grid))


_PORTED = ("ViTModel", "ViTForImageClassification")

FAMILY = Family(
    "vit",
    ViTConfig,
    base="vit",
    inputs=encode,
    relative="bert",
    architectures=(
        Architecture("ViTModel", "", model_spec, model),
        Architecture(
            "ViTForImageClassification",
            "ForImageClassification",
            heads.with_heads("vit", encoder_spec, image_heads.labels_spec),
            image_classification,
            inputs=image_classification,
        ),
        Architecture(
            "ViTForMaskedImageModeling",
            "ForMaskedImageModeling",
            heads.with_heads("vit", partial(encoder_spec, masked=True), image_heads.pixels_spec),
            masked_image_modeling,
        ),
    ),
    flax=Port(_PORTED, inputs=("pixel_values",)),
    tf=Port(_PORTED),
)
