"""ResNet: convolutions with a short cut around every few of them, the backbone of most detectors.

He et al. 2015, arXiv:1512.03385; the stride of a bottleneck is in its 3 x 3 convolution, as in torchvision ("v1.5"),
unless `downsample_in_bottleneck`. A stem, then stages of basic (two 3 x 3) or bottleneck (1 x 1, 3 x 3, 1 x 1) layers.
Maps are channels-last inside, and [B, C, H, W] where they go in and come out. With `key` the norms use the batch's own
statistics and hand out the new running ones (`formax.layers.norm.batch`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BackboneOutput, BaseModelOutput, LogitsOutput
from formax.core.spec import At, Spec, scaled
from formax.layers import norm
from formax.layers.activations import activation, check_activation
from formax.layers.backbone import BackboneConfig
from formax.layers.conv import channels_first, channels_last, conv, conv_spec, max_pool
from formax.layers.heads import with_heads
from formax.layers.linear import linear, linear_spec

HE = scaled(2.0, "out")
LINEAR = scaled(1 / 3, "in", uniform=True)


@config
class ResNetConfig(BackboneConfig):
    """`config.json` of model type "resnet"."""

    model_type: ClassVar[str] = "resnet"
    implemented: ClassVar = {"layer_type": ("basic", "bottleneck")}

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False

    def check(self) -> None:
        check_activation(self.hidden_act)
        if not self.depths or len(self.depths) != len(self.hidden_sizes) or min(self.depths) < 1:
            raise ConfigError(f"depths={self.depths} must be a number of layers for each of {self.hidden_sizes}")
        super().check()


@dataclass(frozen=True)
class Names:
    """Checkpoint names: convolution and norm of the stem, a layer, the same two of its parts and of its short cut."""

    stem: tuple[str, str] = ("embedder.embedder.convolution", "embedder.embedder.normalization")
    layer: str = "encoder.stages.{stage}.layers.{layer}"
    part: tuple[str, str] = ("layer.{part}.convolution", "layer.{part}.normalization")
    shortcut: tuple[str, str] = ("shortcut.convolution", "shortcut.normalization")

    def of_part(self, part: int) -> tuple[str, str]:
        """The names of a layer's part."""
        kernel, scale = (name.format(part=part, one=part + 1) for name in self.part)
        return kernel, scale


def part_spec(names: tuple[str, str], d_in: int, d_out: int, window: int, norm_spec: Any) -> dict[str, At]:
    """A convolution and its norm."""
    kernel = conv_spec(names[0], d_in, d_out, (window, window), init=HE, bias=False)
    return {"conv": kernel, "norm": norm_spec(names[1], d_out)}


def part(p: Any, x: jax.Array, stride: int, dilation: int, key: Any, name: str) -> jax.Array:
    """Convolution, in the groups that its kernel is for, and norm, [B, H, W, C] -> [B, H / stride, W / stride, C']."""
    window, _, channels, _ = p["conv"]["kernel"].shape
    padding, groups = window // 2 * dilation, x.shape[-1] // channels
    x = conv(p["conv"], x, stride=stride, padding=padding, dilation=dilation, groups=groups)
    with tap.scope(name):
        return norm.batch(p["norm"], x, key=key)


def features_spec(c: ResNetConfig, names: Names = Names(), norm_spec: Any = norm.batch_spec) -> dict[str, Spec]:
    """Stem and stages."""

    def layer(stage: int, i: int) -> Spec:
        d_out = c.hidden_sizes[stage]
        before = c.hidden_sizes[stage - 1] if stage else c.embedding_size
        d_in = before if i == 0 else d_out
        basic = c.layer_type == "basic"
        widths = (d_in, d_out, d_out) if basic else (d_in, d_out // 4, d_out // 4, d_out)
        parts = [
            part_spec(names.of_part(k), widths[k], widths[k + 1], window, norm_spec)
            for k, window in enumerate((3, 3) if basic else (1, 3, 1))
        ]
        if basic:  # Flax calls these parts otherwise
            parts = [
                {k: replace(at, flax=at.prefix.replace("layer.", "layer.layer_")) for k, at in p.items()} for p in parts
            ]
        spec: dict[str, Spec] = {"parts": tuple(parts)}
        if d_in != d_out or (i == 0 and strides(c)[stage] > 1):
            spec["shortcut"] = part_spec(names.shortcut, d_in, d_out, 1, norm_spec)
        return At(names.layer.format(stage=stage, layer=i, one=stage + 1), spec)

    stages = tuple(tuple(layer(stage, i) for i in range(depth)) for stage, depth in enumerate(c.depths))
    return {"stem": part_spec(names.stem, c.num_channels, c.embedding_size, 7, norm_spec), "stages": stages}


def strides(c: ResNetConfig) -> list[int]:
    """By how much each stage shrinks the map."""
    return [2 if stage or c.downsample_in_first_stage else 1 for stage in range(len(c.depths))]


def layer(p: Any, c: ResNetConfig, x: jax.Array, stride: int, dilations: tuple[int, int], key: Any) -> jax.Array:
    """What the parts compute, added to the input: [B, H, W, C] -> [B, H / stride, W / stride, C'].

    `dilations` are those of the first 3 x 3 window and of a second one. Between the parts is always a ReLU: in the
    reference `hidden_act` is what follows the stem and the sum.
    """
    h, last = x, len(p["parts"]) - 1
    strided = 0 if last == 1 or c.downsample_in_bottleneck else 1
    with tap.scope("parts"):
        for i, q in enumerate(p["parts"]):
            dilation = dilations[1 if last == 1 and i == 1 else 0]
            h = part(q, h, stride if i == strided else 1, dilation, key, str(i))
            h = jax.nn.relu(h) if i < last else h
    return activation(c.hidden_act)(h + (part(p["shortcut"], x, stride, 1, key, "shortcut") if "shortcut" in p else x))


def features(p: Any, c: ResNetConfig, x: jax.Array, *, shrink: int | None = None, key: Any = None) -> list[jax.Array]:
    """Maps of the stem and of every stage: [B, H, W, C] -> [B, H / 4, W / 4, C'], ...

    From where the map is `shrink` times smaller than the image, stages keep its size and widen their windows instead
    ("a trous", Yu et al. 2017, arXiv:1705.09914); the first window of such a stage still has the width before.
    """
    x = activation(c.hidden_act)(part(p["stem"], x, 2, 1, key, "stem"))
    x = max_pool(x, 3, stride=2, padding=1)
    maps, reached, wide = [shown("stem.out", x)], 4, 1
    for stage, (layers, stride) in enumerate(zip(p["stages"], strides(c), strict=True)):
        before, keeps = wide, shrink is not None and reached >= shrink
        wide, reached, stride = (wide * stride, reached, 1) if keeps else (wide, reached * stride, stride)
        x = maps[-1]
        for i, q in enumerate(layers):
            with tap.scope("stages"), tap.scope(str(stage)), tap.scope(str(i)):
                x = shown("out", layer(q, c, x, 1 if i else stride, (wide if i else before, wide), key))
        maps.append(shown(f"stages.{stage}.out", x))
    return maps


def shown(place: str, x: jax.Array) -> jax.Array:
    """A place that shows maps as the reference does, [B, C, H, W]."""
    return channels_last(tap.tap(place, channels_first(x)))


def to_maps(p: Any, c: Any, pixel_values: Any) -> jax.Array:
    """Images [B, C, H, W] -> [B, H, W, C], in the dtype of the parameters.

    Raises:
        ValueError: other dimensions, or another number of channels than the configuration has.
    """
    if pixel_values is None or pixel_values.ndim != 4 or pixel_values.shape[1] != c.num_channels:
        given = "nothing" if pixel_values is None else f"shape {pixel_values.shape}"
        raise ValueError(f"pixel_values must be [batch, {c.num_channels} channels, height, width], got {given}")
    return channels_last(pixel_values).astype(p["stem"]["conv"]["kernel"].dtype)


def heads_of(features: Callable[..., list[jax.Array]]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The bare model and the head for labels over `features(p, c, x, key=...) -> maps`, of which the last counts."""

    def model(p: Any, c: Any, pixel_values: Any = None, key: Any = None) -> BaseModelOutput:
        """Images [B, C, H, W] -> the last map [B, C', H / 32, W / 32] and its mean over all places [B, C', 1, 1]."""
        last = channels_first(features(p, c, to_maps(p, c, pixel_values), key=key)[-1])
        return BaseModelOutput(last_hidden_state=last, pooler_output=last.mean((2, 3), keepdims=True))

    def image_classification(p: Any, c: Any, pixel_values: Any = None, key: Any = None) -> LogitsOutput:
        """A label for every image: [B, C, H, W] -> logits [B, labels]; without labels the pooled maps [B, C']."""
        pooled = features(p, c, to_maps(p, c, pixel_values), key=key)[-1].mean((1, 2))
        return LogitsOutput(logits=linear(p["head"], pooled) if "head" in p else pooled)

    return model, image_classification


model, image_classification = heads_of(features)


def labels_spec(c: Any) -> dict[str, Spec]:
    """A linear map from the pooled maps to the labels, if there are any."""
    head = linear_spec("classifier.1", c.hidden_sizes[-1], c.num_labels, ("embed", None), init=LINEAR)
    return {"head": head} if c.num_labels else {}


def backbone(p: Any, c: ResNetConfig, pixel_values: Any = None, key: Any = None) -> BackboneOutput:
    """The maps that `out_features` or `out_indices` ask for: [B, C, H, W] -> feature_maps, each [B, C', H', W']."""
    maps = features(p, c, to_maps(p, c, pixel_values), key=key)
    return BackboneOutput(feature_maps=tuple(channels_first(maps[i]) for i in c.features))


STATES = {"hidden_states": ("output_hidden_states", ("stem.out", "stages.*.out"))}

_PORTED = ("ResNetModel", "ResNetForImageClassification")

FAMILY = Family(
    "resnet",
    ResNetConfig,
    base="resnet",
    inputs=model,
    architectures=(
        Architecture("ResNetModel", "", features_spec, model, collected=STATES),
        Architecture(
            "ResNetForImageClassification",
            "ForImageClassification",
            with_heads("resnet", features_spec, labels_spec),
            image_classification,
            collected=STATES,
        ),
        Architecture("ResNetBackbone", "Backbone", features_spec, backbone, collected=STATES),
    ),
    flax=Port(_PORTED),
    tf=Port(_PORTED, numbered="."),
)
