"""What speech encoders of the wav2vec 2.0 line have in common, from samples to the input of their layers.

Convolutions make frames of a waveform, one wide convolution tells where a frame is, spans of frames are hidden in
training, and some shorten their states for a decoder. Configurations have the fields of `SpeechConfig`; B batch, T
frames, C channels of the last convolution. Baevski et al. 2020, arXiv:2006.11477; HuBERT, WavLM, UniSpeech, SEW,
data2vec and the conformers keep these parts, and their names in checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, check_multiple, config
from formax.core.layout import CONV_1D
from formax.core.spec import At, Ignored, Param, Spec, constant, normal, scaled, stack_of
from formax.layers import norm
from formax.layers.activations import activation, check_activation
from formax.layers.conv import conv, conv_spec
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec
from formax.layers.spec_augment import SpecAugmentConfig, drawn_spans

EPS = 1e-5  # of the norms that do not follow `layer_norm_eps`
HE = scaled(2.0, "in")
UNIFORM = scaled(1 / 3, "in", uniform=True)  # up to 1 / sqrt(fan_in)
UNIT = jax.nn.initializers.uniform(1.0)  # 0 to 1


@config
class SpeechConfig(SpecAugmentConfig):
    """The fields that all configurations of the line have."""

    implemented: ClassVar = {"feat_extract_norm": ("group", "layer")}

    vocab_size: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    layerdrop: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_feat_extract_layers: int | None = None  # None: as many as the three above have
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def check(self) -> None:
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_multiple(self, "hidden_size", "num_conv_pos_embedding_groups")
        check_lengths(self, "conv_dim", "conv_stride", "conv_kernel")
        check_positive(self, "hidden_size", "num_conv_pos_embeddings")
        if self.num_feat_extract_layers not in (None, len(self.conv_dim)):
            raise ConfigError(f"num_feat_extract_layers={self.num_feat_extract_layers}, but conv_dim={self.conv_dim}")
        for name in ("hidden_act", "feat_extract_activation"):
            check_activation(getattr(self, name), name)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def adapter_strides(self) -> tuple[int, ...]:
        """By how much each convolution behind the layers shortens the states; there are none."""
        return ()

    @property
    def states_size(self) -> int:
        """Width of the last hidden state."""
        return self.hidden_size


@config
class AdaptedSpeechConfig(SpeechConfig):
    """Those of models that may have an adapter of convolutions behind their layers."""

    add_adapter: bool = False
    adapter_kernel_size: int = 3
    adapter_stride: int = 2
    num_adapter_layers: int = 3
    output_hidden_size: int | None = None  # None: hidden_size

    def check(self) -> None:
        super().check()
        if self.add_adapter:
            check_positive(self, "adapter_kernel_size", "adapter_stride")

    @property
    def adapter_strides(self) -> tuple[int, ...]:
        """By how much each of its convolutions shortens the states."""
        return (self.adapter_stride,) * self.num_adapter_layers if self.add_adapter else ()

    @property
    def states_size(self) -> int:
        """Width of the last hidden state."""
        return (self.output_hidden_size or self.hidden_size) if self.add_adapter else self.hidden_size


def check_lengths(c: Config, first: str, *others: str) -> None:
    """Raises ConfigError unless all of these fields have the same number of entries, at least one, all above 0."""
    for other in others:
        a, b = getattr(c, first), getattr(c, other)
        if len(a) != len(b) or not a:
            raise ConfigError(f"{first}={a} and {other}={b} must have one entry a layer")
    check_positive(c, first, *others)


def check_positive(c: Config, *names: str) -> None:
    """Raises ConfigError unless these fields, or all their entries, are above 0."""
    for name in names:
        value = getattr(c, name)
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ConfigError(f"{name}={value} must be above 0")


# ---- samples to frames


def frame_lengths(c: SpeechConfig, samples: Any, *, adapter: bool = False) -> Any:
    """How many frames (behind the adapter, if asked and if there is one) so many samples make; numbers or arrays."""
    for kernel, stride in zip(c.conv_kernel, c.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    for stride in c.adapter_strides if adapter else ():
        samples = (samples - 1) // stride + 1
    return samples


def least_samples(c: SpeechConfig) -> int:
    """How many samples one frame is made of."""
    samples = 1
    for kernel, stride in zip(reversed(c.conv_kernel), reversed(c.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def check_samples(c: SpeechConfig, input_values: Any) -> None:
    """Raises ValueError for waveforms that are not [B, samples], or too short for a frame."""
    shape, least = getattr(input_values, "shape", None), least_samples(c)
    if shape is None or len(shape) != 2 or shape[1] < least:
        raise ValueError(f"input_values must be [batch, samples], at least {least} of them; got shape {shape}")


def real_frames(c: SpeechConfig, attention_mask: Any, frames: int) -> jax.Array:
    """Which frames are made of samples that are no padding: [B, samples] -> [B, frames]."""
    return jnp.arange(frames) < frame_lengths(c, (attention_mask != 0).sum(-1))[:, None]


def features_spec(c: SpeechConfig) -> tuple[Spec, ...]:
    """The convolutions; all with a norm ("layer"), or the first alone ("group")."""

    def layer(i: int) -> Spec:
        size = c.conv_dim[i]
        made = conv_spec("conv", (1, *c.conv_dim)[i], size, c.conv_kernel[i : i + 1], init=HE, bias=c.conv_bias)
        normed = i == 0 or c.feat_extract_norm == "layer"
        return {"conv": made, "norm": norm.layer_spec("layer_norm", size)} if normed else {"conv": made}

    return stack_of("feature_extractor.conv_layers", [layer(i) for i in range(len(c.conv_dim))])


def features(p: Any, c: SpeechConfig, samples: jax.Array) -> jax.Array:
    """Waveforms [B, samples] -> features of frames [B, T, C]; a group norm is one channel's, over padding too."""
    x = samples.astype(p[0]["conv"]["kernel"].dtype)[..., None]
    for layer, stride in zip(p, c.conv_stride, strict=True):
        x = conv(layer["conv"], x, stride=stride)
        if "norm" in layer and c.feat_extract_norm == "layer":
            x = norm.layer(layer["norm"], x, EPS)
        elif "norm" in layer:
            x = norm.group(layer["norm"], x, x.shape[-1], EPS)
        x = activation(c.feat_extract_activation)(x)
    return x


def position_spec(c: SpeechConfig) -> Spec:
    """Each tap of the kernel is a direction, divided by its norm, times a magnitude."""
    e, k, groups = c.hidden_size, c.num_conv_pos_embeddings, c.num_conv_pos_embedding_groups
    std = 2 / (e * k) ** 0.5
    old, new = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")
    size = constant(std * e / groups**0.5)  # the norm that such a direction has
    magnitude = Param((k, 1, 1), (None, None, None), new[0], size, CONV_1D, (old[0],))
    direction = Param((k, e // groups, e), (None, "conv_in", "conv_out"), new[1], normal(std), CONV_1D, (old[1],))
    bias = Param((e,), ("conv_out",), "bias")
    return At("encoder.pos_conv_embed.conv", {"magnitude": magnitude, "direction": direction, "bias": bias})


def positions(p: Any, c: SpeechConfig, x: jax.Array) -> jax.Array:
    """What is added to tell places apart, made of the frames around: [B, T, E] -> [B, T, E].

    The kernel is weight-normalised over all but its taps (Salimans and Kingma 2016, arXiv:1602.07868).
    """
    v = p["direction"].astype(jnp.float32)
    kernel = v * (p["magnitude"] / jnp.sqrt(jnp.square(v).sum((1, 2), keepdims=True)))
    k = c.num_conv_pos_embeddings
    # k // 2 on both sides would make one frame too many of an even k: the last is left out
    pads, made = [(k // 2, (k - 1) // 2)], {"kernel": kernel, "bias": p["bias"]}
    return activation(c.feat_extract_activation)(conv(made, x, padding=pads, groups=c.num_conv_pos_embedding_groups))


# ---- frames hidden in training


def masked_spec(c: SpeechConfig) -> Spec:
    """The vector of frames that are hidden, where a configuration hides any."""
    if c.mask_time_prob > 0 or c.mask_feature_prob > 0:
        return Param((c.hidden_size,), ("embed",), "masked_spec_embed", UNIT, optional=True)
    return Ignored("masked_spec_embed")


def hide(p: Any, c: SpeechConfig, x: jax.Array, given: Any, real: Any, key: Any) -> jax.Array:
    """SpecAugment: given frames [B, T], or under a key random ones, become one vector, random features 0. [B, T, E]."""
    if not c.apply_spec_augment:
        return x
    rows, frames, size = x.shape
    if given is not None and given.shape != (rows, frames):
        raise ValueError(f"mask_time_indices must be [batch, frames] {(rows, frames)}, got shape {given.shape}")
    zeroed = None
    if key is not None:
        lengths = None if real is None else real.sum(-1)
        given, zeroed = drawn_spans(key, c, rows, frames, size, lengths=lengths, given=given)
    if given is not None:
        if "masked" not in p:
            raise ValueError("masked frames have a vector only where mask_time_prob or mask_feature_prob is above 0")
        x = jnp.where(given[..., None] != 0, p["masked"].astype(x.dtype), x)
    return x if zeroed is None else jnp.where(zeroed[:, None], 0, x)


# ---- all that comes before the layers


def embed_waveform(
    p: Any, c: SpeechConfig, samples: Any, attention_mask: Any, hidden: Any, keys: Sequence[Any]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Waveforms [B, samples] -> (frames as vectors [B, T, E], their features [B, T, C], which are real [B, T]).

    Args:
        p: `conv`, `features_norm`, `project`, `position`, and where they are wanted `masked` and a last `norm`.
        c: the configuration.
        samples: the waveforms.
        attention_mask: [B, samples], 0 where there is padding; or None, and then it is not known which are real.
        hidden: [B, T], which frames to hide; or None.
        keys: three random keys, or three None: of the features' dropout, of what is hidden, of the last dropout.
    """
    check_samples(c, samples)
    real = None if attention_mask is None else real_frames(c, attention_mask, frame_lengths(c, samples.shape[1]))
    with tap.scope("embed"):
        found = norm.layer(p["features_norm"], tap.tap("features", features(p["conv"], c, samples)), c.layer_norm_eps)
        x = dropout(linear(p["project"], found), c.feat_proj_dropout, keys[0])
        x = hide(p, c, x, hidden, real, keys[1])
        if real is not None:
            x = jnp.where(real[..., None], x, 0)
        x = x + tap.tap("position", positions(p["position"], c, x))
        if "norm" in p:
            x = norm.layer(p["norm"], x, c.layer_norm_eps)
        return tap.tap("out", dropout(x, c.hidden_dropout, keys[2])), found, real


# ---- states of all layers, and states made fewer


def weighted(weights: jax.Array, before: Any, x: jax.Array) -> jax.Array:
    """States before every layer and after the last, summed by the softmax of `weights` [layers + 1]: [B, T, E]."""
    return jnp.tensordot(jax.nn.softmax(weights).astype(x.dtype), jnp.stack([*before, x]), 1)


def adapter_spec(c: AdaptedSpeechConfig) -> dict[str, Spec]:
    """Convolutions that shorten the sequence of states, for a decoder to read; a projection if their width differs."""
    size, init = c.states_size, normal(c.initializer_range)
    one = conv_spec("conv", size, 2 * size, (c.adapter_kernel_size,), init=HE)
    spec: dict[str, Spec] = {"convs": stack_of("layers", [one] * c.num_adapter_layers)}
    if size != c.hidden_size:
        spec["project"] = linear_spec("proj", c.hidden_size, size, ("embed", None), init=init)
        spec["norm"] = norm.layer_spec("proj_layer_norm", size)
    return spec


def adapt(p: Any, c: AdaptedSpeechConfig, x: jax.Array) -> jax.Array:
    """[B, T, E] -> [B, T', E']. Layers are not dropped here: the length would change with them."""
    if "project" in p:
        x = norm.layer(p["norm"], linear(p["project"], x), EPS)
    for one in p.get("convs", ()):
        x = jax.nn.glu(conv(one, x, stride=c.adapter_stride, padding=1))
    return tap.tap("adapter", x)
