"""CLIP: a text tower and a vision tower, trained so that an image and its caption end up close to each other.

Radford et al. 2021, arXiv:2103.00020; original code openai/CLIP. Both towers are pre-layer-norm encoders as in ViT. The
text tower reads left to right, and the state of a text's end stands for it; the vision tower normalises what goes into
its layers, too. Each tower's vector is projected into the space that both share; similarities are cosines, scaled. A
tower alone is a model type of its own; its parameters are `params["text"]` and `params["vision"]` here.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.frozen import FrozenDict
from formax.core.outputs import Array, BaseModelOutput, LogitsOutput, Output, output
from formax.core.rng import split
from formax.core.spec import At, Ignored, Param, Spec, constant, fold, normal, optional, stack_of, under
from formax.layers import embed, mlp, norm
from formax.layers.activations import check_activation
from formax.layers.attention import Mask, attention_spec, from_attention_mask, self_attention
from formax.layers.conv import embed_patches, patch_spec
from formax.layers.linear import linear, linear_spec
from formax.layers.resize import check_pixels, grid_of, pair, stretch_positions
from formax.models.vision.vit import class_token_first


@config
class TowerConfig(Config):
    """What the configurations of both towers share."""

    implemented: ClassVar = {"pruned_heads": (FrozenDict(),)}

    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def check(self) -> None:
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@config
class CLIPTextConfig(TowerConfig):
    """`config.json` of model type "clip_text_model"."""

    model_type: ClassVar[str] = "clip_text_model"

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407


@config
class CLIPVisionConfig(TowerConfig):
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
class CLIPConfig(Config):
    """`config.json` of model type "clip"."""

    model_type: ClassVar[str] = "clip"
    sub_configs: ClassVar = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0

    @classmethod
    def _named(cls, values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """As everywhere; and what old files say of a tower under `text_config_dict` goes before its `text_config`."""
        new = dict(values)
        for key, tower in cls.sub_configs.items():
            said = new.pop(f"{key}_dict", None)
            if said is not None:
                new[key] = (new.get(key) or {}) | tower.from_dict(said, source=f"{key}_dict").to_dict()
            elif key in new and new[key] is None:
                del new[key]
        return super()._named(new, before)

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        return self.text_config.max_position_embeddings


def layers_spec(c: TowerConfig) -> tuple[Spec, ...]:
    """All layers of a tower."""

    def layer() -> dict[str, Spec]:
        size, std = c.hidden_size, c.initializer_factor * c.hidden_size**-0.5
        deep = normal(std * (2 * c.num_hidden_layers) ** -0.5)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        attn = attention_spec(size, c.num_attention_heads, c.head_dim, names=names, init=deep)
        attn["o"] = linear_spec("out_proj", size, size, ("heads", "embed"), init=normal(std))
        feed = mlp.dense_spec(size, c.intermediate_size, ("fc1", "fc2"), init=normal(std * 2**-0.5), out_init=deep)
        return {
            "attn_norm": norm.layer_spec("layer_norm1", size),
            "attn": At("self_attn", attn),
            "mlp_norm": norm.layer_spec("layer_norm2", size),
            "mlp": At("mlp", feed),
        }

    return stack_of("encoder.layers", [layer() for _ in range(c.num_hidden_layers)])


def layers(p: Any, c: TowerConfig, x: jax.Array, mask: Mask, key: Any) -> jax.Array:
    """All layers of a tower, pre-norm, [B, T, E] -> [B, T, E]; the only dropout is on attention weights."""

    def run(p: Any, x: jax.Array, cache: Any, key: Any) -> Any:
        h = norm.layer(p["attn_norm"], x, c.layer_norm_eps)
        x = x + self_attention(p["attn"], h, c.head_dim, mask=mask, dropout=c.attention_dropout, key=key)[0]
        return x + mlp.dense(p["mlp"], norm.layer(p["mlp_norm"], x, c.layer_norm_eps), c.hidden_act), cache

    return fold(run, p.get("layers", ()), x, key=key)[0]


def projection(name: str, c: TowerConfig, size: int) -> Spec:
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


def read(
    p: Any,
    c: CLIPTextConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    key: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """States of the tokens, and of the text's end: ids [B, T] -> ([B, T, E], [B, E]).

    The end is the first `eos_token_id` (in a text without one, the first token). Old checkpoints have a number
    that was never right, 2: there the end is the largest token, which it is in the original vocabulary.
    """
    if input_ids is None:
        raise ValueError("give input_ids [batch, length]")
    embed.check_inputs(input_ids, None, c.max_position_embeddings)
    with tap.scope("embed"):
        positions = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        x = tap.tap("out", embed.embed(p["embed"]["word"], input_ids) + embed.embed(p["embed"]["position"], positions))
    x = layers(p, c, x, from_attention_mask(attention_mask, causal=True), key)
    x = norm.layer(p["norm"], x, c.layer_norm_eps)
    end = jnp.argmax(input_ids if c.eos_token_id == 2 else input_ids == c.eos_token_id, axis=-1)
    return x, tap.tap("pooler", x[jnp.arange(len(x)), end])


def text_model(p: Any, c: CLIPTextConfig, *args: Any, **inputs: Any) -> BaseModelOutput:
    """States [B, T, E] and pooled [B, E]."""
    x, pooled = read(p, c, *args, **inputs)
    return BaseModelOutput(last_hidden_state=x, pooler_output=pooled)


@output
class TextEmbedsOutput(Output):
    """`text_embeds` [B, D] in the space of both towers, not normalised, and `last_hidden_state` [B, T, E]."""

    text_embeds: Array
    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


def text_projection(p: Any, c: CLIPTextConfig, *args: Any, **inputs: Any) -> TextEmbedsOutput:
    """Projected [B, D] and states [B, T, E]."""
    x, pooled = read(p, c, *args, **inputs)
    return TextEmbedsOutput(text_embeds=linear(p["head"], pooled), last_hidden_state=x)


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
    grid = check_pixels(pixel_values, c, interpolate_pos_encoding)
    with tap.scope("embed"):
        e = p["embed"]
        x = embed_patches(e["patch"], pixel_values.astype(e["patch"]["kernel"].dtype), pair(c.patch_size))
        table = stretch_positions(e["position"]["embedding"], grid_of(c.image_size, c.patch_size), grid)
        x = class_token_first(e["cls"], x) + table.astype(x.dtype)
        x = tap.tap("out", norm.layer(e["norm"], x, c.layer_norm_eps))
    return layers(p, c, x, Mask(), key)


def pool(p: Any, c: CLIPVisionConfig, x: jax.Array) -> jax.Array:
    """The class token's state, normalised: [B, 1 + N, E] -> [B, E]."""
    return tap.tap("pooler", norm.layer(p["norm"], x[:, 0], c.layer_norm_eps))


def vision_model(p: Any, c: CLIPVisionConfig, *args: Any, **inputs: Any) -> BaseModelOutput:
    """States [B, 1 + N, E] and pooled [B, E]."""
    x = see(p, c, *args, **inputs)
    return BaseModelOutput(last_hidden_state=x, pooler_output=pool(p, c, x))


@output
class ImageEmbedsOutput(Output):
    """`image_embeds` [B, D] in the space of both towers, not normalised, and `last_hidden_state` [B, 1 + N, E]."""

    image_embeds: Array
    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


def vision_projection(p: Any, c: CLIPVisionConfig, *args: Any, **inputs: Any) -> ImageEmbedsOutput:
    """Projected [B, D] and states [B, 1 + N, E]."""
    x = see(p, c, *args, **inputs)
    return ImageEmbedsOutput(image_embeds=linear(p["head"], pool(p, c, x)), last_hidden_state=x)


# --- both


def model_spec(c: CLIPConfig) -> dict[str, Spec]:
    """Both towers, each with its projection, and the scale of similarities (its logarithm)."""
    text, vision = c.text_config, c.vision_config
    return {
        "text": {**text_spec(text), "head": projection("text_projection", text, c.projection_dim)},
        "vision": {**vision_spec(vision), "head": projection("visual_projection", vision, c.projection_dim)},
        "logit_scale": Param((), (), "logit_scale", constant(c.logit_scale_init_value)),
    }


@output
class CLIPOutput(Output):
    """Similarities of I images and T texts, [I, T] and [T, I]; their vectors, of length 1; what the towers return."""

    logits_per_image: Array
    logits_per_text: Array
    text_embeds: Array
    image_embeds: Array
    text_model_output: BaseModelOutput
    vision_model_output: BaseModelOutput


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1, [..., D]."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True))).astype(x.dtype)


def model(
    p: Any,
    c: CLIPConfig,
    input_ids: Any = None,
    pixel_values: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    interpolate_pos_encoding: bool = False,
    key: Any = None,
) -> CLIPOutput:
    """Texts [T, length] and images [I, channels, height, width] -> similarities of each with each."""
    k_text, k_vision = split(key, 2)
    with tap.scope("text"):
        text, end = read(p["text"], c.text_config, input_ids, attention_mask, position_ids, k_text)
        text_embeds = unit(linear(p["text"]["head"], end))
    with tap.scope("vision"):
        image = see(p["vision"], c.vision_config, pixel_values, interpolate_pos_encoding, k_vision)
        pooled = pool(p["vision"], c.vision_config, image)
        image_embeds = unit(linear(p["vision"]["head"], pooled))
    logits = text_embeds @ image_embeds.T * jnp.exp(p["logit_scale"]).astype(text_embeds.dtype)
    return CLIPOutput(
        logits_per_image=logits.T,
        logits_per_text=logits,
        text_embeds=text_embeds,
        image_embeds=image_embeds,
        text_model_output=BaseModelOutput(last_hidden_state=text, pooler_output=end),
        vision_model_output=BaseModelOutput(last_hidden_state=image, pooler_output=pooled),
    )


def text_features(
    p: Any, c: CLIPConfig, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, key: Any = None
) -> jax.Array:
    """Texts [T, length] -> their vectors in the common space [T, D], not normalised."""
    with tap.scope("text"):
        return text_projection(p["text"], c.text_config, input_ids, attention_mask, position_ids, key).text_embeds


def image_features(
    p: Any, c: CLIPConfig, pixel_values: Any = None, interpolate_pos_encoding: bool = False, key: Any = None
) -> jax.Array:
    """Images [I, channels, height, width] -> their vectors in the common space [I, D], not normalised."""
    with tap.scope("vision"):
        return vision_projection(p["vision"], c.vision_config, pixel_values, interpolate_pos_encoding, key).image_embeds


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


TRACES = {
    f"{tower}_model_output.{name}": (f"output_{name}", tuple(f"{tower}.{place}" for place in places))
    for tower in ("text", "vision")
    for name, places in (("hidden_states", ("embed.out", "layers.*.out")), ("attentions", ("layers.*.attn.weights",)))
}
TEXT = Family(
    "clip_text_model",
    CLIPTextConfig,
    base="",
    inputs=read,
    architectures=(
        Architecture("CLIPTextModel", "", text_spec, text_model, also=("ForTextEncoding",)),
        Architecture(
            "CLIPTextModelWithProjection",
            "WithProjection",
            lambda c: {**text_spec(c), "head": optional(projection("text_projection", c, c.projection_dim))},
            text_projection,
        ),
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
        Architecture(
            "CLIPVisionModelWithProjection",
            "WithProjection",
            lambda c: {**vision_spec(c), "head": optional(projection("visual_projection", c, c.projection_dim))},
            vision_projection,
        ),
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
            collected=TRACES,
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
