"""DETR: objects found by a transformer, one per query, without anchors and without suppression of doubles.

Carion et al. 2020, arXiv:2005.12872; original code facebookresearch/detr. A ResNet with frozen batch norms, BART's
post-norm encoder over the places of its last map, and a decoder whose inputs are learned queries. Unlike in BART,
positions are added to what queries and keys of every attention are made from, never to values; queries see all others.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.outputs import DetectionModelOutput, DetectionOutput
from formax.core.rng import fold_path, split
from formax.core.spec import At, Spec, fold, normal, stack_of, under
from formax.layers import detection, embed, mlp, norm, transformer
from formax.layers.attention import from_attention_mask
from formax.layers.conv import conv, conv_spec
from formax.layers.detection import DetectionConfig, attend
from formax.layers.dropout import dropout, layer_drop
from formax.layers.maps import learned_positions, learned_spec, seen_places, sine_positions
from formax.layers.mask_head import check_mask_head, mask_head_spec, masks, object_attention
from formax.layers.seq2seq import states_of
from formax.layers.transformer import EPS, TransformerConfig
from formax.models.vision.timm_resnet import ResNetInsideConfig, backbone, backbone_spec, maps_of

GRID = 50  # rows and columns that learned positions know


@config
class DetrConfig(TransformerConfig, ResNetInsideConfig, DetectionConfig):
    """`config.json` of model type "detr"."""

    model_type: ClassVar[str] = "detr"
    attribute_map: ClassVar = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"}
    implemented: ClassVar = {"position_embedding_type": ("sine", "learned"), "scale_embedding": (False,)}

    num_queries: int = 100
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    activation_function: str = "relu"
    d_model: int = 256
    init_xavier_std: float = 1.0
    auxiliary_loss: bool = False
    position_embedding_type: str = "sine"
    mask_loss_coefficient: float = 1
    dice_loss_coefficient: float = 1
    eos_coefficient: float = 0.1
    num_hidden_layers: int = 6  # the encoder's once more, which nothing reads

    def check(self) -> None:
        super().check()
        if self.position_embedding_type == "sine" and self.d_model % 4:
            raise ConfigError(f"d_model={self.d_model} is no multiple of 4: sine and cosine of rows and of columns")


# ---- encoder and decoder --------------------------------------------------------------------------------------------


def layers(
    p: Any,
    c: DetrConfig,
    part: str,
    x: Any,
    place: Any,
    mask: Any,
    memory: Any = None,
    around: Any = None,
    key: Any = None,
) -> Any:
    """All layers of the encoder (`memory` is None) or the decoder: [B, T, E] -> ([B, T, E], those after every layer).

    `place` is of x, `around` of the memory; `mask` is about the map's places. With `auxiliary_loss` the decoder's last
    norm comes after every layer, before the next one reads it.
    """
    heads = getattr(c, f"{part}_attention_heads")

    def run(q: Any, x: jax.Array, _: Any, key: Any) -> Any:
        keys, before = split(key, 6), x

        def add(name: str, h: jax.Array, key: Any) -> jax.Array:
            return norm.layer(q[name], x + dropout(h, c.dropout, key), EPS)

        how = {"mask": from_attention_mask(None if "cross" in q else mask), "dropout": c.attention_dropout}
        x = add("attn_norm", attend(q["attn"], x, place, x, place, heads, "attn", key=keys[0], **how), keys[1])
        if "cross" in q:
            how["mask"] = from_attention_mask(mask)
            h = attend(q["cross"], x, place, memory, around, heads, "cross", key=keys[2], **how)
            x = add("cross_norm", h, keys[3])
        h = mlp.dense(q["mlp"], x, c.activation_function, rate=c.activation_dropout, key=keys[4])
        x = add("mlp_norm", h, keys[5])
        if "cross" in q and c.auxiliary_loss:
            x = norm.layer(p["norm"], x, EPS)
        k_drop = None if key is None else fold_path(key, "layerdrop")
        x = layer_drop(before, x, getattr(c, f"{part}_layerdrop"), k_drop)
        return x, x

    with tap.scope(part):
        x = tap.tap("embed.out", x)
        x, states = fold(run, p.get("layers", ()), x, key=key)
        return transformer.last_norm(p, x), states


# ---- the models -----------------------------------------------------------------------------------------------------


def model_spec(c: DetrConfig) -> dict[str, Spec]:
    """Backbone, projection and queries, encoder and decoder."""
    init, size = normal(c.init_std), c.hidden_size
    table = partial(embed.embedding_spec, axes=(None, "embed"))
    inner: dict[str, Spec] = {
        "project": conv_spec("input_projection", maps_of(c)[-1], size, (1, 1), init=init, axes=("conv_in", "embed")),
        "queries": table("query_position_embeddings", c.num_queries, size, init=init),
    }
    if c.position_embedding_type == "learned":
        inner |= under("backbone.position_embedding", learned_spec(size, GRID))
    parts = {
        part: stack_of("layers", [transformer.block_spec(c, part)] * getattr(c, f"{part}_layers"))
        for part in ("encoder", "decoder")
    }
    return {
        "backbone": At("backbone.conv_encoder.model", backbone_spec(c)),
        "embed": inner,
        "encoder": At("encoder", {"layers": parts["encoder"]}),
        "decoder": At("decoder", {"layers": parts["decoder"], "norm": norm.layer_spec("layernorm", size)}),
    }


def run(p: Any, c: DetrConfig, pixel_values: Any, pixel_mask: Any, encoder_outputs: Any, key: Any) -> Any:
    """Everything below the heads -> (output, maps of the backbone, the last one projected, its mask)."""
    k_embed, k_encoder, k_decoder = split(key, 3)
    found = backbone(p["backbone"], c, pixel_values)
    projected = conv(p["embed"]["project"], found[-1])
    b, h, w, size = projected.shape
    seen = seen_places(pixel_mask, (b, *pixel_values.shape[2:]), (h, w))
    if c.position_embedding_type == "learned":
        place = learned_positions(p["embed"], seen)
    else:
        place = sine_positions(seen, size)
    place, mask = place.astype(projected.dtype).reshape(b, h * w, size), seen.reshape(b, h * w)
    if encoder_outputs is None:
        flat = dropout(projected.reshape(b, h * w, size), c.dropout, k_embed)
        memory, _ = layers(p["encoder"], c, "encoder", flat, place, mask, key=k_encoder)
    else:
        memory = states_of(encoder_outputs)
    queries = jnp.broadcast_to(
        p["embed"]["queries"]["embedding"].astype(projected.dtype)[None], (b, c.num_queries, size)
    )
    start = jnp.zeros_like(queries)
    states, every = layers(p["decoder"], c, "decoder", start, queries, mask, memory, place, k_decoder)
    out = DetectionModelOutput(
        last_hidden_state=states,
        encoder_last_hidden_state=memory,
        intermediate_hidden_states=jnp.stack(every) if c.auxiliary_loss else None,
    )
    return out, found, projected, seen


def model(
    p: Any,
    c: DetrConfig,
    pixel_values: Any = None,
    pixel_mask: Any = None,
    encoder_outputs: Any = None,
    key: Any = None,
) -> DetectionModelOutput:
    """Images [B, C, H, W], with 1 in `pixel_mask` [B, H, W] where they are no padding -> states [B, Q, E]."""
    return run(p, c, pixel_values, pixel_mask, encoder_outputs, key)[0]


def detection_spec(c: DetrConfig) -> dict[str, Spec]:
    """The model and its heads; the last class is that there is no object."""
    return under("model", model_spec(c)) | detection.heads_spec(c, c.num_labels + 1)


def object_detection(p: Any, c: DetrConfig, pixel_values: Any = None, **inputs: Any) -> DetectionOutput:
    """Classes and boxes of the objects in images [B, C, H, W]."""
    return detection.found(p["head"], model(p, c, pixel_values, **inputs))


def segmentation_spec(c: DetrConfig) -> dict[str, Spec]:
    """The detector and a mask head."""
    return under("detr", detection_spec(c)) | mask_head_spec(c, maps_of(c))


def segmentation(
    p: Any,
    c: DetrConfig,
    pixel_values: Any = None,
    pixel_mask: Any = None,
    encoder_outputs: Any = None,
    key: Any = None,
) -> DetectionOutput:
    """Classes, boxes and masks of the objects in images [B, C, H, W].

    Raises:
        ValueError: sizes that a mask head cannot have.
    """
    check_mask_head(p, maps_of(c))
    out, maps, projected, seen = run(p, c, pixel_values, pixel_mask, encoder_outputs, key)
    assert out.encoder_last_hidden_state is not None
    memory = out.encoder_last_hidden_state.reshape(projected.shape)
    where = object_attention(p["attn"], out.last_hidden_state, memory, seen, c.encoder_attention_heads)
    return detection.found(p["head"], out, masks(p["masks"], projected, where, maps[2::-1]))


FAMILY = Family(
    "detr",
    DetrConfig,
    base="model",
    inputs=model,
    relative="resnet",
    architectures=(
        Architecture("DetrModel", "", model_spec, model),
        Architecture("DetrForObjectDetection", "ForObjectDetection", detection_spec, object_detection),
        Architecture("DetrForSegmentation", "ForImageSegmentation", segmentation_spec, segmentation),
    ),
)
