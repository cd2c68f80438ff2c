"""CLIP: a text tower and a vision tower, trained so that an image and its caption end up close to each other.

Radford et al. 2021, arXiv:2103.00020; original code openai/CLIP. Both towers are pre-layer-norm encoders as in ViT. The
text tower reads left to right, and the state of a text's end stands for it; the vision tower normalises what goes into
its layers, too. Each tower's vector is projected into the space that both share; similarities are cosines, scaled. A
tower alone is a model type of its own; its parameters are `params["text"]` and `params["vision"]` here.
"""

from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.frozen import FrozenDict
from formax.core.outputs import BaseModelOutput, ImageEmbedsOutput, LogitsOutput, TextEmbedsOutput
from formax.core.spec import At, Ignored, Param, Spec, constant, normal, optional, under
from formax.layers import embed, norm, towers
from formax.layers.attention import Mask, from_attention_mask
from formax.layers.conv import patch_spec
from formax.layers.linear import linear, linear_spec
from formax.layers.patches import embed_image
from formax.layers.resize import grid_of, pair
from formax.layers.towers import TowerConfig, TwoTowersConfig


@config
class CLIPTowerConfig(TowerConfig):
    """What the configurations of both towers share."""

    implemented: ClassVar = {"pruned_heads": (FrozenDict(),)}

    projection_dim: int = 512
    initializer_range: float = 0.02
    initializer_factor: float = 1.0


@config
class CLIPTextConfig(CLIPTowerConfig):
    """`config.json` of model type "clip_text_model"."""

    model_type: ClassVar[str] = "clip_text_model"

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407


@config
class CLIPVisionConfig(CLIPTowerConfig):
    """`config.json` of model type "clip_vision_model"."""

    model_type: ClassVar[str] = "clip_vision_model"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    def check(self) -> None:
        super().check()
        grid_of(self.image_size, self.patch_size)


@config
class CLIPConfig(TwoTowersConfig):
    """`config.json` of model type "clip"."""

    model_type: ClassVar[str] = "clip"
    sub_configs: ClassVar = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0


def layers_spec(c: CLIPTowerConfig) -> tuple[Spec, ...]:
    """All layers of a tower."""
    std = c.initializer_factor * c.hidden_size**-0.5
    deep = normal(std * (2 * c.num_hidden_layers) ** -0.5)
    return towers.layers_spec(c, {"q": deep, "k": deep, "v": deep, "o": normal(std)}, normal(std * 2**-0.5), deep)


def projection(name: str, c: CLIPTowerConfig, size: int) -> Spec:
    """The map of a tower's vector into the common space."""
    init = normal(c.initializer_factor * c.hidden_size**-0.5)
    return linear_spec(name, c.hidden_size, size, ("embed", None), init=init, bias=False)


# --- the text tower


def text_spec(c: CLIPTextConfig) -> dict[str, Spec]:
    """Embeddings, layers and the last norm."""
    init = normal(c.initializer_factor * 0.02)
    embeddings: dict[str, Spec] = {
        "word": embed.embedding_spec("token_embedding", c.vocab_size, c.hidden_size, init=init, tf="weight"),
        "position": embed.embedding_spec(
            "position_embedding", c.max_position_embeddings, c.hidden_size, init=init, axes=(None, "embed")
        ),
        "position_ids": Ignored("position_ids"),
    }
    last = norm.layer_spec("final_layer_norm", c.hidden_size)
    return under("text_model", {"embed": At("embeddings", embeddings), "layers": layers_spec(c), "norm": last})


def text_model(
    p: Any,
    c: CLIPTextConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    key: Any = None,
) -> BaseModelOutput:
    """States [B, T, E] of the tokens, and pooled [B, E], that of the text's end: ids [B, T].

    The end is the first `eos_token_id` (in a text without one, the first token). Old checkpoints have a number
    that was never right, 2: there the end is the largest token, which it is in the original vocabulary.
    """
    if input_ids is None:
        raise ValueError("give input_ids [batch, length]")
    embed.check_inputs(input_ids, None, c.max_position_embeddings)
    with tap.scope("embed"):
        positions = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        x = tap.tap("out", embed.embed(p["embed"]["word"], input_ids) + embed.embed(p["embed"]["position"], positions))
    x = towers.layers(p, c, x, from_attention_mask(attention_mask, causal=True), key)
    x = norm.layer(p["norm"], x, c.layer_norm_eps)
    end = jnp.argmax(input_ids if c.eos_token_id == 2 else input_ids == c.eos_token_id, axis=-1)
    return BaseModelOutput(last_hidden_state=x, pooler_output=tap.tap("pooler", x[jnp.arange(len(x)), end]))


def text_projection_spec(c: CLIPTextConfig) -> dict[str, Spec]:
    """The text tower with its projection, which checkpoints of the tower alone lack."""
    return {**text_spec(c), "head": optional(projection("text_projection", c, c.projection_dim))}


text_projection = towers.projected(text_model, TextEmbedsOutput, "text_embeds")

# --- the vision tower


def vision_spec(c: CLIPVisionConfig) -> dict[str, Spec]:
    """Embeddings with a norm, layers and the last norm."""
    size, init = c.hidden_size, normal(c.initializer_factor * c.initializer_range)
    rows, columns = grid_of(c.image_size, c.patch_size)
    cls = Param((size,), ("embed",), "class_embedding", normal(c.initializer_factor * size**-0.5))
    embeddings = {
        "cls": {"embedding": cls},
        "patch": patch_spec("patch_embedding", c.num_channels, size, pair(c.patch_size), init=init, bias=False),
        "position": embed.embedding_spec(
            "position_embedding", 1 + rows * columns, size, init=init, axes=(None, "embed")
        ),
        "position_ids": Ignored("position_ids"),
    }
    first, last = norm.layer_spec("pre_layrnorm", size), norm.layer_spec("post_layernorm", size)
    spec = {"embed": {**under("embeddings", embeddings), "norm": first}, "layers": layers_spec(c), "norm": last}
    return under("vision_model", spec)


def see(
    p: Any, c: CLIPVisionConfig, pixel_values: Any = None, interpolate_pos_encoding: bool = False, key: Any = None
) -> jax.Array:
    """States of the class token and of the patches, row by row, before the last norm: [B, C, H, W] -> [B, 1 + N, E]."""
    with tap.scope("embed"):
        x = embed_image(p["embed"], c, pixel_values, stretch=interpolate_pos_encoding)
        x = tap.tap("out", norm.layer(p["embed"]["norm"], x, c.layer_norm_eps))
    return towers.layers(p, c, x, Mask(), key)


def vision_model(
    p: Any, c: CLIPVisionConfig, pixel_values: Any = None, interpolate_pos_encoding: bool = False, key: Any = None
) -> BaseModelOutput:
    """States [B, 1 + N, E], and pooled [B, E], that of the class token, normalised."""
    x = see(p, c, pixel_values, interpolate_pos_encoding, key)
    pooled = tap.tap("pooler", norm.layer(p["norm"], x[:, 0], c.layer_norm_eps))
    return BaseModelOutput(last_hidden_state=x, pooler_output=pooled)


def vision_projection_spec(c: CLIPVisionConfig) -> dict[str, Spec]:
    """The vision tower with its projection, which checkpoints of the tower alone lack."""
    return {**vision_spec(c), "head": optional(projection("visual_projection", c, c.projection_dim))}


vision_projection = towers.projected(vision_model, ImageEmbedsOutput, "image_embeds")

# --- both


def model_spec(c: CLIPConfig) -> dict[str, Spec]:
    """Both towers, each with its projection, and the scale of similarities (its logarithm)."""
    text, vision = c.text_config, c.vision_config
    return {
        "text": {**text_spec(text), "head": projection("text_projection", text, c.projection_dim)},
        "vision": {**vision_spec(vision), "head": projection("visual_projection", vision, c.projection_dim)},
        "logit_scale": Param((), (), "logit_scale", constant(c.logit_scale_init_value)),
    }


model = towers.both(text_model, vision_model)
text_features, image_features = towers.features(text_model, "text"), towers.features(vision_model, "vision")


def classifier_spec(c: CLIPConfig) -> dict[str, Spec]:
    """The vision tower (with its last norm, which nothing uses) and a classifier, which checkpoints of CLIP lack."""
    vision = c.vision_config
    init = normal(vision.initializer_factor * vision.hidden_size**-0.5)
    head = linear_spec("classifier", vision.hidden_size, c.num_labels, ("embed", None), init=init)
    return {**vision_spec(vision), "head": optional(head)}


def image_classification(p: Any, c: CLIPConfig, pixel_values: Any = None, key: Any = None) -> LogitsOutput:
    """A label for every image, from the mean of its patches: logits [B, labels]."""
    x = see(p, c.vision_config, pixel_values, key=key)[:, 1:]
    return LogitsOutput(logits=linear(p["head"], x.mean(1)))


TEXT = Family(
    "clip_text_model",
    CLIPTextConfig,
    base="",
    inputs=text_model,
    architectures=(
        Architecture("CLIPTextModel", "", text_spec, text_model, also=("ForTextEncoding",)),
        Architecture("CLIPTextModelWithProjection", "WithProjection", text_projection_spec, text_projection),
    ),
    flax=Port(("CLIPTextModel", "CLIPTextModelWithProjection")),
    tf=Port(("CLIPTextModel",), base="clip"),
)
VISION = Family(
    "clip_vision_model",
    CLIPVisionConfig,
    base="",
    inputs=see,
    architectures=(
        Architecture("CLIPVisionModel", "", vision_spec, vision_model),
        Architecture("CLIPVisionModelWithProjection", "WithProjection", vision_projection_spec, vision_projection),
    ),
    flax=Port(("CLIPVisionModel",)),
    tf=Port(("CLIPVisionModel",), base="clip"),
)
FAMILY = Family(
    "clip",
    CLIPConfig,
    base="",
    inputs=model,
    relative="vit",
    architectures=(
        Architecture(
            "CLIPModel",
            "",
            model_spec,
            model,
            also=("ForZeroShotImageClassification",),
            methods={"get_text_features": text_features, "get_image_features": image_features},
            collected=towers.TRACES,
        ),
        Architecture(
            "CLIPForImageClassification",
            "ForImageClassification",
            classifier_spec,
            image_classification,
            inputs=image_classification,
        ),
    ),
    flax=Port(("CLIPModel",)),
    tf=Port(("CLIPModel",), base="clip"),
)
