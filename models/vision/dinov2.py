"""DINOv2: a ViT taught without labels, whose states say as they are what is where in an image.

Oquab et al. 2023, arXiv:2304.07193; original code facebookresearch/dinov2. Nearest relative: ViT, with a factor for
every channel on what a layer's parts add (LayerScale). The largest model's feed-forward network is a SwiGLU. Positions
are always stretched to the image, a vector for hidden patches is always there, and labels come from the class token
beside the mean of the patches. As a backbone it gives the states of any layers as maps.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BackboneOutput, BaseModelOutput, LogitsOutput
from formax.core.rng import split
from formax.core.spec import At, Spec, normal, stack_of
from formax.layers import heads, mlp, norm
from formax.layers.attention import Mask, attention_spec, self_attention
from formax.layers.backbone import PatchBackboneConfig, all_states, as_map
from formax.layers.dropout import drop_path, dropout
from formax.layers.linear import fused_spec, linear, linear_spec
from formax.layers.patches import embed_image, image_spec
from formax.layers.resize import Size, grid_of


@config
class Dinov2Config(PatchBackboneConfig):
    """`config.json` of model type "dinov2"."""

    model_type: ClassVar[str] = "dinov2"

    mlp_ratio: float = 4
    layer_norm_eps: float = 1e-6
    patch_size: Size = 14
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    use_mask_token: bool = True


def mlp_spec(c: Dinov2Config) -> dict[str, Spec]:
    """The feed-forward network; a gated one has two thirds of the width, up to the next multiple of 8."""
    size, inner, init = c.hidden_size, int(c.hidden_size * c.mlp_ratio), normal(c.initializer_range)
    if not c.use_swiglu_ffn:
        return mlp.dense_spec(size, inner, ("fc1", "fc2"), init=init)
    inner = (int(inner * 2 / 3) + 7) // 8 * 8
    both = fused_spec("weights_in", size, {"gate": (inner, "mlp"), "up": (inner, "mlp")}, init=init)
    return {**both, "down": linear_spec("weights_out", inner, size, ("mlp", "embed"), init=init)}


def block_spec(c: Dinov2Config, layer: int) -> dict[str, Spec]:
    """One layer."""
    names = ("attention.query", "attention.key", "attention.value", "output.dense")
    bias, init = True if c.qkv_bias else "o", normal(c.initializer_range)
    attn = attention_spec(c.hidden_size, c.heads_of(layer), c.head_dim, names=names, init=init, bias=bias)
    scale = norm.layer_scale_spec("lambda1", c.hidden_size, c.layerscale_value)
    return {
        "attn_norm": norm.layer_spec("norm1", c.hidden_size),
        "attn": At("attention", attn),
        "attn_scale": At("layer_scale1", scale),
        "mlp_norm": norm.layer_spec("norm2", c.hidden_size),
        "mlp": At("mlp", mlp_spec(c)),
        "mlp_scale": At("layer_scale2", scale),
    }


def block(p: Any, c: Dinov2Config, x: jax.Array, key: Any) -> jax.Array:
    """Pre-norm; what each part adds is scaled by channel. [B, T, E] -> [B, T, E]."""
    keys = split(key, 4)
    h = norm.layer(p["attn_norm"], x, c.layer_norm_eps)
    h, _ = self_attention(p["attn"], h, c.head_dim, mask=Mask(), dropout=c.attention_probs_dropout_prob, key=keys[0])
    h = dropout(h, c.hidden_dropout_prob, keys[1])
    x = x + drop_path(norm.layer_scale(p["attn_scale"], h), c.drop_path_rate, keys[2])
    h = norm.layer(p["mlp_norm"], x, c.layer_norm_eps)
    h = mlp.gated(p["mlp"], h, "silu") if "gate" in p["mlp"] else mlp.dense(p["mlp"], h, c.hidden_act)
    return x + drop_path(norm.layer_scale(p["mlp_scale"], h), c.drop_path_rate, keys[3])


def model_spec(c: Dinov2Config) -> dict[str, Spec]:
    """Embeddings, layers and the last norm."""
    mask = (1, c.hidden_size) if c.use_mask_token else ()
    return {
        "embed": At("embeddings", image_spec(c, init=normal(c.initializer_range), mask=mask)),
        "layers": stack_of("encoder.layer", [block_spec(c, i) for i in range(c.num_hidden_layers)]),
        "norm": norm.layer_spec("layernorm", c.hidden_size),
    }


def states(p: Any, c: Dinov2Config, pixel_values: Any, hidden: Any, key: Any) -> list[jax.Array]:
    """What goes into each layer and what comes out of the last, not normalised: [B, 1 + N, E] times L + 1."""
    k_embed, k_layers = split(key, 2)
    with tap.scope("embed"):
        x = embed_image(p["embed"], c, pixel_values, stretch=True, hidden=hidden)
        x = tap.tap("out", dropout(x, c.hidden_dropout_prob, k_embed))
    return all_states(lambda p, x, key: block(p, c, x, key), p.get("layers", ()), x, key=k_layers)


def encode(
    p: Any, c: Dinov2Config, pixel_values: Any = None, bool_masked_pos: Any = None, key: Any = None
) -> jax.Array:
    """States of the class token and of the patches, row by row: [B, C, height, width] -> [B, 1 + N, E]."""
    return norm.layer(p["norm"], states(p, c, pixel_values, bool_masked_pos, key)[-1], c.layer_norm_eps)


def model(p: Any, c: Dinov2Config, pixel_values: Any = None, **inputs: Any) -> BaseModelOutput:
    """States [B, 1 + N, E], and the class token's [B, E] again as what stands for the image."""
    x = encode(p, c, pixel_values, **inputs)
    return BaseModelOutput(last_hidden_state=x, pooler_output=tap.tap("pooler", x[:, 0]))


def labels_spec(c: Dinov2Config) -> dict[str, Spec]:
    """A linear map to the labels from two states; none when there are none."""
    axes, init = ("embed", None), normal(c.initializer_range)
    return {"head": linear_spec("classifier", 2 * c.hidden_size, c.num_labels, axes, init=init)} if c.num_labels else {}


def image_classification(p: Any, c: Dinov2Config, pixel_values: Any = None, key: Any = None) -> LogitsOutput:
    """A label for every image: [B, C, H, W] -> logits [B, labels]; without labels what they come from, [B, 2 E]."""
    x = encode(p, c, pixel_values, key=key)
    x = jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=-1)
    return LogitsOutput(logits=linear(p["head"], x) if "head" in p else x)


def backbone(p: Any, c: Dinov2Config, pixel_values: Any = None, key: Any = None) -> BackboneOutput:
    """The states that `out_features` or `out_indices` ask for, as maps [B, E, H, W] (or as they are: [B, 1 + N, E])."""
    every = states(p, c, pixel_values, None, key)
    found = [every[i] for i in c.features]
    if c.apply_layernorm:
        found = [norm.layer(p["norm"], x, c.layer_norm_eps) for x in found]
    if c.reshape_hidden_states:
        grid = grid_of(pixel_values.shape[2:], c.patch_size)
        found = [as_map(x, grid) for x in found]
    return BackboneOutput(feature_maps=tuple(found))


FAMILY = Family(
    "dinov2",
    Dinov2Config,
    base="dinov2",
    inputs=encode,
    relative="vit",
    architectures=(
        Architecture("Dinov2Model", "", model_spec, model),
        Architecture(
            "Dinov2ForImageClassification",
            "ForImageClassification",
            heads.with_heads("dinov2", model_spec, labels_spec),
            image_classification,
            inputs=image_classification,
        ),
        Architecture("Dinov2Backbone", "Backbone", model_spec, backbone, inputs=backbone),
    ),
    # Flax multiplies by `layerscale_value` what is already a parameter, twice.
    flax=Port(
        ("Dinov2Model", "Dinov2ForImageClassification"),
        lacks=lambda c: {"layerscale_value": c.layerscale_value != 1},
        inputs=("pixel_values",),
    ),
)
