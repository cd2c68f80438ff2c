"""RegNet: a ResNet whose widths and depths follow a simple rule, and whose bottlenecks narrow nothing but are grouped.

Radosavovic et al. 2020, arXiv:2003.13678; original code facebookresearch/pycls. Nearest relative: ResNet. The stem is
one 3 x 3 convolution without pooling, every stage halves the map, and the 3 x 3 convolution of a layer works in groups
of `groups_width` channels. "y" layers weigh the channels by what the whole map shows before the last convolution
(squeeze-and-excitation, Hu et al. 2017, arXiv:1709.01507), "x" layers do not. `hidden_act` also stands between the
parts.
"""

from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.spec import At, Spec
from formax.layers import norm
from formax.layers.activations import activation, check_activation
from formax.layers.conv import conv, conv_spec
from formax.layers.heads import with_heads
from formax.models.vision.resnet import HE, STATES, heads_of, labels_spec, part, part_spec, shown


@config
class RegNetConfig(Config):
    """`config.json` of model type "regnet"."""

    model_type: ClassVar[str] = "regnet"
    implemented: ClassVar = {"layer_type": ("y", "x")}

    num_channels: int = 3
    embedding_size: int = 32
    hidden_sizes: tuple[int, ...] = (128, 192, 512, 1088)
    depths: tuple[int, ...] = (2, 6, 12, 2)
    groups_width: int = 64
    layer_type: str = "y"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = True  # written by the reference, which does so whatever a file says

    def check(self) -> None:
        check_activation(self.hidden_act)
        if not self.depths or len(self.depths) != len(self.hidden_sizes) or min(self.depths) < 1:
            raise ConfigError(f"depths={self.depths} must be a number of layers for each of {self.hidden_sizes}")
        if self.groups_width < 1 or any(size % self.groups_of(size) for size in self.hidden_sizes):
            raise ConfigError(
                f"hidden_sizes={self.hidden_sizes} must divide into groups of groups_width={self.groups_width}"
            )

    def groups_of(self, size: int) -> int:
        """Into how many groups the 3 x 3 convolution of so many channels is divided."""
        return max(1, size // self.groups_width)


def layer_spec(c: RegNetConfig, d_in: int, d_out: int, *, first: bool) -> dict[str, Spec]:
    """A layer, with a short cut if it is the `first` of its stage."""
    last = 3 if c.layer_type == "y" else 2
    names = [(f"layer.{i}.convolution", f"layer.{i}.normalization") for i in (0, 1, last)]
    grouped = conv_spec(names[1][0], d_out, d_out, (3, 3), init=HE, bias=False, groups=c.groups_of(d_out))
    parts = (
        part_spec(names[0], d_in, d_out, 1, norm.batch_spec),
        {"conv": grouped, "norm": norm.batch_spec(names[1][1], d_out)},
        part_spec(names[2], d_out, d_out, 1, norm.batch_spec),
    )
    spec: dict[str, Spec] = {"parts": parts}
    if c.layer_type == "y":
        inner = round(d_in / 4)  # of halves the even neighbour, as in the reference
        squeeze = {
            "down": conv_spec("0", d_out, inner, (1, 1), init=HE),
            "up": conv_spec("2", inner, d_out, (1, 1), init=HE),
        }
        spec["squeeze"] = At("layer.2.attention", squeeze)
    if first:
        shortcut = ("shortcut.convolution", "shortcut.normalization")
        spec["shortcut"] = part_spec(shortcut, d_in, d_out, 1, norm.batch_spec)
    return spec


def squeeze(p: Any, x: jax.Array) -> jax.Array:
    """Each channel times a number in 0 to 1 that is made of the means of all channels, [B, H, W, C] -> the same."""
    h = jax.nn.relu(conv(p["down"], x.mean((1, 2), keepdims=True)))
    return x * jax.nn.sigmoid(conv(p["up"], h))


def layer(p: Any, c: RegNetConfig, x: jax.Array, stride: int, key: Any) -> jax.Array:
    """What the parts compute, added to the input: [B, H, W, C] -> [B, H / stride, W / stride, C']."""
    act, (first, grouped, last) = activation(c.hidden_act), p["parts"]
    with tap.scope("parts"):
        h = act(part(first, x, 1, 1, key, "0"))
        h = act(part(grouped, h, stride, 1, key, "1"))
        h = squeeze(p["squeeze"], h) if "squeeze" in p else h
        h = part(last, h, 1, 1, key, "2")
    return act(h + (part(p["shortcut"], x, stride, 1, key, "shortcut") if "shortcut" in p else x))


def features_spec(c: RegNetConfig) -> dict[str, Spec]:
    """Stem and stages."""
    widths = (c.embedding_size, *c.hidden_sizes)

    def stage(n: int) -> tuple[Spec, ...]:
        d_in, d_out = widths[n : n + 2]
        layers = [layer_spec(c, d_out if i else d_in, d_out, first=i == 0) for i in range(c.depths[n])]
        return tuple(At(f"encoder.stages.{n}.layers.{i}", spec) for i, spec in enumerate(layers))

    names = ("embedder.embedder.convolution", "embedder.embedder.normalization")
    stem = part_spec(names, c.num_channels, c.embedding_size, 3, norm.batch_spec)
    return {"stem": stem, "stages": tuple(map(stage, range(len(c.depths))))}


def features(p: Any, c: RegNetConfig, x: jax.Array, *, key: Any = None) -> list[jax.Array]:
    """Maps of the stem and of every stage: [B, H, W, C] -> [B, H / 2, W / 2, C'], ..."""
    x = activation(c.hidden_act)(part(p["stem"], x, 2, 1, key, "stem"))
    maps = [shown("stem.out", x)]
    for stage, layers in enumerate(p["stages"]):
        x = maps[-1]
        for i, q in enumerate(layers):
            with tap.scope("stages"), tap.scope(str(stage)), tap.scope(str(i)):
                x = shown("out", layer(q, c, x, 1 if i else 2, key))
        maps.append(shown(f"stages.{stage}.out", x))
    return maps


model, image_classification = heads_of(features)

FAMILY = Family(
    "regnet",
    RegNetConfig,
    base="regnet",
    inputs=model,
    relative="resnet",
    architectures=(
        Architecture("RegNetModel", "", features_spec, model, collected=STATES),
        Architecture(
            "RegNetForImageClassification",
            "ForImageClassification",
            with_heads("regnet", features_spec, labels_spec),
            image_classification,
            collected=STATES,
        ),
    ),
    flax=Port(),
    tf=Port(numbered="."),
)
