"""Two towers of any families, trained as CLIP is: LiT, Italian CLIP, any image encoder with any text encoder.

Zhai et al. 2021, arXiv:2111.07991 (LiT: the image tower stays as it is). The frame is that of `layers/towers.py`. Each
tower is the bare model of its family; its pooled vector is mapped into the common space.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

from formax.core import registry
from formax.core.config import Config, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput
from formax.core.spec import Param, Spec, constant, inside, normal, under
from formax.layers import towers
from formax.layers.composite import AnyConfig, CompositeConfig, bert, reader, size_of
from formax.layers.linear import linear_spec


@config
class TowerOfAnyConfig(AnyConfig):
    """A tower's configuration; of a whole CLIP its vision tower's."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config", **overrides: Any) -> Any:
        found = super().from_dict(values, source=source, **overrides)
        return getattr(found, "vision_config", found)


@config
class VisionTextDualEncoderConfig(CompositeConfig):
    """`config.json` of model type "vision-text-dual-encoder"."""

    model_type: ClassVar[str] = "vision-text-dual-encoder"
    sub_configs: ClassVar = {"text_config": AnyConfig, "vision_config": TowerOfAnyConfig}

    text_config: Config = field(default_factory=bert)
    vision_config: Config = field(default_factory=lambda: registry.family("vit").config())
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        return self.text_config.max_position_embeddings


def _tower(p: Any, c: Config, **inputs: Any) -> BaseModelOutput:
    return reader(c).apply(p, c, **{name: x for name, x in inputs.items() if x is not None})


def text_model(
    p: Any,
    c: Config,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    token_type_ids: Any = None,
    key: Any = None,
) -> BaseModelOutput:
    """The text tower: ids [B, T] -> pooled [B, E]."""
    own = {"attention_mask": attention_mask, "position_ids": position_ids, "token_type_ids": token_type_ids}
    return _tower(p, c, input_ids=input_ids, **own, key=key)


def vision_model(p: Any, c: Config, pixel_values: Any = None, key: Any = None) -> BaseModelOutput:
    """The image tower: [B, C, H, W] -> pooled [B, E]."""
    return _tower(p, c, pixel_values=pixel_values, key=key)


def model_spec(c: VisionTextDualEncoderConfig) -> dict[str, Spec]:
    """Both towers, each with its projection, and the scale of similarities (its logarithm)."""

    def tower(key: str, own: Any, projection: str) -> dict[str, Spec]:
        sizes = size_of(own), c.projection_dim
        head = linear_spec(projection, *sizes, ("embed", None), init=normal(0.02), bias=False)
        part: Mapping[str, Spec] = inside(key, reader(own).spec(own))  # type: ignore[assignment]
        return {**under(f"{key}_model", part, family=own.model_type), "head": head}

    return {
        "text": tower("text", c.text_config, "text_projection"),
        "vision": tower("vision", c.vision_config, "visual_projection"),
        "logit_scale": Param((), (), "logit_scale", constant(c.logit_scale_init_value)),
    }


model = towers.both(text_model, vision_model)
text_features, image_features = towers.features(text_model, "text"), towers.features(vision_model, "vision")

FAMILY = Family(
    "vision-text-dual-encoder",
    VisionTextDualEncoderConfig,
    base="",
    inputs=model,
    relative="clip",
    architectures=(
        Architecture(
            "VisionTextDualEncoderModel",
            "",
            model_spec,
            model,
            methods={"get_text_features": text_features, "get_image_features": image_features},
            collected=towers.TRACES,
        ),
    ),
    parts=lambda c: tuple((reader(own), own) for own in (c.text_config, c.vision_config)),
    flax=Port(),
    tf=Port(own=("logit_scale:0",)),
)
