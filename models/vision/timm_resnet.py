"""A detector's backbone: the reference's ResNet, or timm's plain ones under timm's names, all norms frozen.

No family of its own. The backbone is the reference's ResNet (`use_timm_backbone=False`) or timm's, by whose names
`facebook/detr-*` are stored: `backbone.conv_encoder.model.conv1`, `.bn1`, `.layer1.0.conv1`, `.layer1.0.downsample.0`,
... Those names, the strides and the dilation of `output_stride` (DC5) were compared with timm's source,
`timm/models/resnet.py` (`make_blocks`, `BasicBlock`, `Bottleneck`, `downsample_conv`); timm itself was not run.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.frozen import FrozenDict
from formax.core.spec import Spec
from formax.layers import norm
from formax.models.vision import resnet
from formax.models.vision.resnet import ResNetConfig

TIMM = {  # timm's plain ResNets: kind of layers, layers of each stage
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet26": ("bottleneck", (2, 2, 2, 2)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
TIMM_NAMES = resnet.Names(
    stem=("conv1", "bn1"),
    layer="layer{one}.{layer}",
    part=("conv{one}", "bn{one}"),
    shortcut=("downsample.0", "downsample.1"),
)
TIMM_OPTIONS = ("out_indices", "in_chans", "output_stride", "layers", "channels")


@config
class ResNetInsideConfig(Config):
    """The fields of a detector's configuration that say what its backbone is."""

    sub_configs: ClassVar = {"backbone_config": ResNetConfig}

    use_timm_backbone: bool = True
    backbone_config: ResNetConfig | None = None
    num_channels: int = 3
    backbone: str | None = "resnet50"
    use_pretrained_backbone: bool = True
    backbone_kwargs: FrozenDict | None = None
    dilation: bool | None = False

    def check(self) -> None:
        super().check()
        kind = None if self.backbone_config is None else self.backbone_config.extra.get("model_type")
        if kind is not None:
            raise ConfigError(f"backbone_config has model_type={kind!r}; formax has {self.model_type} over 'resnet'")
        if self.use_timm_backbone and self.backbone_config is not None:
            raise ConfigError("backbone_config is for use_timm_backbone=False; timm's backbones go by name (backbone)")
        if self.use_timm_backbone and self.backbone not in TIMM:
            raise ConfigError(f"backbone={self.backbone!r} is none of timm's that formax has: {', '.join(TIMM)}")
        if not self.use_timm_backbone and self.backbone_config is None and self.backbone not in (None, "resnet50"):
            raise ConfigError(f"backbone={self.backbone!r} names another checkpoint; give its backbone_config instead")
        if unknown := set(self.timm) - set(TIMM_OPTIONS):
            raise ConfigError(f"backbone_kwargs has {min(unknown)!r}; formax has {', '.join(TIMM_OPTIONS)}")
        if self.shrink not in (8, 16, 32):
            raise ConfigError(f"output_stride={self.shrink} of backbone_kwargs must be 8, 16 or 32")
        if 0 in self.resnet.features and self.use_timm_backbone:
            raise ConfigError("out_indices of backbone_kwargs may be 1 to 4: maps of the stem are not implemented")

    @property
    def timm(self) -> Mapping[str, Any]:
        """What timm's backbone is made with."""
        return self.backbone_kwargs or {} if self.use_timm_backbone else {}

    @property
    def shrink(self) -> int:
        """How many times smaller than the image the last map is, for timm's backbone."""
        return self.timm.get("output_stride", 16 if self.dilation else 32)

    @property
    def resnet(self) -> ResNetConfig:
        """The backbone, whoever's it is."""
        if not self.use_timm_backbone:
            return self.backbone_config or ResNetConfig(out_features=("stage4",))
        kind, depths = TIMM[self.backbone or ""]
        widths = self.timm.get("channels", (64, 128, 256, 512))
        picked = tuple(self.timm.get("out_indices", (1, 2, 3, 4)))
        last = max(picked, default=0)  # timm leaves out the stages after it
        return ResNetConfig(
            num_channels=self.timm.get("in_chans", self.num_channels),
            hidden_sizes=tuple(width * (1 if kind == "basic" else 4) for width in widths)[:last],
            depths=tuple(self.timm.get("layers", depths))[:last],
            layer_type=kind,
            out_indices=picked,
        )


def maps_of(c: ResNetInsideConfig) -> list[int]:
    """Channels of the maps that the backbone gives."""
    sizes = (c.resnet.embedding_size, *c.resnet.hidden_sizes)
    return [sizes[i] for i in c.resnet.features]


def backbone_spec(c: ResNetInsideConfig) -> dict[str, Spec]:
    """Stem and stages, with frozen norms."""
    names = TIMM_NAMES if c.use_timm_backbone else resnet.Names()
    return resnet.features_spec(c.resnet, names, norm.frozen_batch_spec)


def backbone(p: Any, c: ResNetInsideConfig, pixel_values: Any) -> list[jax.Array]:
    """Images [B, C, H, W] -> the maps that the backbone gives, each [B, H', W', C']."""
    x = resnet.to_maps(p, c.resnet, pixel_values)
    with tap.scope("backbone"):
        found = resnet.features(p, c.resnet, x, shrink=c.shrink if c.use_timm_backbone else None)
    return [found[i] for i in c.resnet.features]
