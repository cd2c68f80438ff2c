"""Wav2Vec2: speech as waveforms; convolutions make frames of the samples, a BERT-like encoder makes states of them.

Baevski et al. 2020, arXiv:2006.11477; original code facebookresearch/fairseq. Positions come from one wide, grouped
convolution, with weight normalisation over its taps. Pre-training hides frames and tells their own codes, chosen by a
quantizer, from those of other frames. Beside BERT's blocks (post-norm) larger checkpoints have pre-norm ones
(`do_stable_layer_norm`), to which multilingual ones add a small adapter for each language (Pratap et al. 2023,
arXiv:2305.13516). Most speech encoders here descend from it.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.layout import CONV_1D, Reshape
from formax.core.outputs import LogitsOutput, Output, output
from formax.core.rng import split
from formax.core.spec import At, Entry, Ignored, Param, Spec, fold, normal, stack_of, table
from formax.layers import mlp, norm
from formax.layers.activations import activation, check_activation
from formax.layers.attention import Mask, attention_spec, self_attention
from formax.layers.conv import conv, conv_spec
from formax.layers.dropout import dropout
from formax.layers.heads import with_heads
from formax.layers.linear import linear, linear_spec
from formax.layers.spec_augment import span_mask

EPS = 1e-5  # of the norms that do not follow `layer_norm_eps`
HE = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
UNIFORM = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # up to 1 / sqrt(fan_in)
UNIT = jax.nn.initializers.uniform(1.0)  # 0 to 1
constant = lru_cache(jax.nn.initializers.constant)


@config
class Wav2Vec2Config(Config):
    """`config.json` of model type "wav2vec2"."""

    model_type: ClassVar[str] = "wav2vec2"
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
    feat_quantizer_dropout: float = 0.0
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
    do_stable_layer_norm: bool = False
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    num_codevectors_per_group: int = 320
    num_codevector_groups: int = 2
    contrastive_logits_temperature: float = 0.1
    num_negatives: int = 100
    codevector_dim: int = 256
    proj_codevector_dim: int = 256
    diversity_loss_weight: float = 0.1
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    tdnn_dim: tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    add_adapter: bool = False
    adapter_kernel_size: int = 3
    adapter_stride: int = 2
    num_adapter_layers: int = 3
    output_hidden_size: int | None = None  # None: hidden_size
    adapter_attn_dim: int | None = None

    def check(self) -> None:
        for whole, part in (
            ("hidden_size", "num_attention_heads"),
            ("hidden_size", "num_conv_pos_embedding_groups"),
            ("codevector_dim", "num_codevector_groups"),
        ):
            a, b = getattr(self, whole), getattr(self, part)
            if b < 1 or a % b:
                raise ConfigError(f"{whole}={a} is no multiple of {part}={b}")
        for dims, *others in (("conv_dim", "conv_stride", "conv_kernel"), ("tdnn_dim", "tdnn_kernel", "tdnn_dilation")):
            for other in others:
                a, b = getattr(self, dims), getattr(self, other)
                if len(a) != len(b) or not a:
                    raise ConfigError(f"{dims}={a} and {other}={b} must have one entry a layer")
        if self.num_feat_extract_layers not in (None, len(self.conv_dim)):
            raise ConfigError(f"num_feat_extract_layers={self.num_feat_extract_layers}, but conv_dim={self.conv_dim}")
        for name in ("hidden_act", "feat_extract_activation"):
            check_activation(getattr(self, name), name)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def states_size(self) -> int:
        """Width of the last hidden state."""
        return (self.output_hidden_size or self.hidden_size) if self.add_adapter else self.hidden_size


@output
class SpeechOutput(Output):
    """States [B, T, H] of frames, and the features [B, T, C] that they were made of."""

    last_hidden_state: jax.Array
    extract_features: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@output
class QuantizedOutput(Output):
    """Projected states and their codes, each [B, T, P]; perplexity [] is how many codes are in use."""

    projected_states: jax.Array
    projected_quantized_states: jax.Array
    codevector_perplexity: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@output
class XVectorOutput(Output):
    """`embeddings` and `logits` [B, X] of voices; `cosines` [B, labels] of the logits with each speaker's weights."""

    logits: jax.Array
    embeddings: jax.Array
    cosines: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


# ---- samples to frames


def frame_lengths(c: Wav2Vec2Config, samples: Any, *, adapter: bool = False) -> Any:
    """How many frames (behind the adapter, if asked and if there is one) so many samples make; numbers or arrays."""
    for kernel, stride in zip(c.conv_kernel, c.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    for _ in range(c.num_adapter_layers if adapter and c.add_adapter else 0):
        samples = (samples - 1) // c.adapter_stride + 1
    return samples


def least_samples(c: Wav2Vec2Config) -> int:
    """How many samples one frame is made of."""
    samples = 1
    for kernel, stride in zip(reversed(c.conv_kernel), reversed(c.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def real_frames(c: Wav2Vec2Config, attention_mask: Any, frames: int) -> jax.Array:
    """Which frames are made of samples that are no padding: [B, samples] -> [B, frames]."""
    return jnp.arange(frames) < frame_lengths(c, (attention_mask != 0).sum(-1))[:, None]


def features_spec(c: Wav2Vec2Config) -> tuple[Spec, ...]:
    """The convolutions; all with a norm ("layer"), or the first alone ("group")."""

    def layer(i: int) -> Spec:
        size = c.conv_dim[i]
        made = conv_spec("conv", (1, *c.conv_dim)[i], size, c.conv_kernel[i : i + 1], init=HE, bias=c.conv_bias)
        normed = i == 0 or c.feat_extract_norm == "layer"
        return {"conv": made, "norm": norm.layer_spec("layer_norm", size)} if normed else {"conv": made}

    return stack_of("feature_extractor.conv_layers", [layer(i) for i in range(len(c.conv_dim))])


def features(p: Any, c: Wav2Vec2Config, samples: jax.Array) -> jax.Array:
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


def position_spec(c: Wav2Vec2Config) -> Spec:
    """Each tap of the kernel is a direction, divided by its norm, times a magnitude."""
    e, k, groups = c.hidden_size, c.num_conv_pos_embeddings, c.num_conv_pos_embedding_groups
    std = 2 / (e * k) ** 0.5
    old, new = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")
    size = constant(std * e / groups**0.5)  # the norm that such a direction has
    magnitude = Param((k, 1, 1), (None, None, None), new[0], size, CONV_1D, (old[0],))
    direction = Param((k, e // groups, e), (None, "conv_in", "conv_out"), new[1], normal(std), CONV_1D, (old[1],))
    bias = Param((e,), ("conv_out",), "bias")
    return At("encoder.pos_conv_embed.conv", {"magnitude": magnitude, "direction": direction, "bias": bias})


def positions(p: Any, c: Wav2Vec2Config, x: jax.Array) -> jax.Array:
    """What is added to tell places apart, made of the frames around: [B, T, E] -> [B, T, E]."""
    v = p["direction"].astype(jnp.float32)
    kernel = v * (p["magnitude"] / jnp.sqrt(jnp.square(v).sum((1, 2), keepdims=True)))
    k = c.num_conv_pos_embeddings
    # k // 2 on both sides would make one frame too many of an even k: the last is left out
    pads, made = [(k // 2, (k - 1) // 2)], {"kernel": kernel, "bias": p["bias"]}
    return activation(c.feat_extract_activation)(conv(made, x, padding=pads, groups=c.num_conv_pos_embedding_groups))


# ---- layers


def block_spec(c: Wav2Vec2Config) -> dict[str, Spec]:
    """One layer, of either order."""
    init, e = normal(c.initializer_range), c.hidden_size
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    dense = ("intermediate_dense", "output_dense")
    spec: dict[str, Spec] = {
        "attn": At("attention", attention_spec(e, c.num_attention_heads, c.head_dim, names=names, init=init)),
        "attn_norm": norm.layer_spec("layer_norm", e),
        "mlp": At("feed_forward", mlp.dense_spec(e, c.intermediate_size, dense, init=init)),
        "mlp_norm": norm.layer_spec("final_layer_norm", e),
    }
    if c.do_stable_layer_norm and c.adapter_attn_dim is not None:
        adapter = mlp.dense_spec(e, c.adapter_attn_dim, ("linear_1", "linear_2"), init=init)
        spec["adapter"] = At("adapter_layer", {"norm": norm.layer_spec("norm", e), **adapter}, flax="", tf="")
    return spec


def attend(p: Any, c: Wav2Vec2Config, x: jax.Array, mask: Mask, key: Any) -> jax.Array:
    """Attention with its dropouts: [B, T, E] -> [B, T, E]."""
    inner, outer = split(key, 2)
    h, _ = self_attention(p["attn"], x, c.head_dim, mask=mask, dropout=c.attention_dropout, key=inner)
    return dropout(h, c.hidden_dropout, outer)


def feed(p: Any, c: Wav2Vec2Config, x: jax.Array, key: Any) -> jax.Array:
    """Feed-forward with its dropouts: [B, T, E] -> [B, T, E]."""
    inner, outer = split(key, 2)
    h = mlp.dense(p["mlp"], x, c.hidden_act, rate=c.activation_dropout, key=inner)
    return dropout(h, c.hidden_dropout, outer)


def block(p: Any, c: Wav2Vec2Config, x: jax.Array, mask: Mask, key: Any) -> jax.Array:
    """Post-norm: what each part computes is added to its input, then normalised. [B, T, E] -> [B, T, E]."""
    keys = split(key, 2)
    x = norm.layer(p["attn_norm"], x + attend(p, c, x, mask, keys[0]), c.layer_norm_eps)
    return norm.layer(p["mlp_norm"], x + feed(p, c, x, keys[1]), c.layer_norm_eps)


def stable_block(p: Any, c: Wav2Vec2Config, x: jax.Array, mask: Mask, key: Any) -> jax.Array:
    """Pre-norm: each part computes from its normalised input; then the language's adapter. [B, T, E] -> [B, T, E]."""
    keys = split(key, 2)
    x = x + attend(p, c, norm.layer(p["attn_norm"], x, c.layer_norm_eps), mask, keys[0])
    x = x + feed(p, c, norm.layer(p["mlp_norm"], x, c.layer_norm_eps), keys[1])
    if "adapter" in p:
        x = x + mlp.dense(p["adapter"], norm.layer(p["adapter"]["norm"], x, EPS), "relu", name="adapter")
    return x


def adapter_spec(c: Wav2Vec2Config) -> dict[str, Spec]:
    """Convolutions that shorten the sequence of states, for a decoder to read; a projection if their width differs."""
    size, init = c.states_size, normal(c.initializer_range)
    one = {"conv": conv_spec("conv", size, 2 * size, (c.adapter_kernel_size,), init=HE)}
    spec: dict[str, Spec] = {"layers": stack_of("layers", [one] * c.num_adapter_layers)}
    if size != c.hidden_size:
        spec["project"] = linear_spec("proj", c.hidden_size, size, ("embed", None), init=init)
        spec["norm"] = norm.layer_spec("proj_layer_norm", size)
    return spec


def adapt(p: Any, c: Wav2Vec2Config, x: jax.Array) -> jax.Array:
    """[B, T, E] -> [B, T', E']. Layers are not dropped here: the length would change with them."""
    if "project" in p:
        x = norm.layer(p["norm"], linear(p["project"], x), EPS)
    for layer in p.get("layers", ()):
        x = jax.nn.glu(conv(layer["conv"], x, stride=c.adapter_stride, padding=1))
    return tap.tap("adapter", x)


# ---- the model


def model_spec(c: Wav2Vec2Config) -> dict[str, Spec]:
    """Convolutions, projection, positions and layers; the norm comes before the layers, or in stable models after."""
    width, e = c.conv_dim[-1], c.hidden_size
    first: dict[str, Spec] = {
        "conv": features_spec(c),
        "features_norm": norm.layer_spec("feature_projection.layer_norm", width),
        "project": linear_spec("feature_projection.projection", width, e, ("conv_out", "embed"), init=UNIFORM),
        "position": position_spec(c),
    }
    if c.mask_time_prob > 0 or c.mask_feature_prob > 0:
        first["masked"] = Param((e,), ("embed",), "masked_spec_embed", UNIT, optional=True)
    else:
        first["masked"] = Ignored("masked_spec_embed")
    spec: dict[str, Spec] = {
        "embed": first,
        "layers": stack_of("encoder.layers", [block_spec(c)] * c.num_hidden_layers),
    }
    (spec if c.do_stable_layer_norm else first)["norm"] = norm.layer_spec("encoder.layer_norm", e)
    return spec | ({"adapter": At("adapter", adapter_spec(c), tf="")} if c.add_adapter else {})


def hide(p: Any, c: Wav2Vec2Config, x: jax.Array, given: Any, real: Any, key: Any) -> jax.Array:
    """SpecAugment: given frames [B, T], or under a key random ones, become one vector, random features 0. [B, T, E]."""
    if not c.apply_spec_augment:
        return x
    rows, frames, size = x.shape
    if given is not None and given.shape != (rows, frames):
        raise ValueError(f"mask_time_indices must be [batch, frames] {(rows, frames)}, got shape {given.shape}")
    zeroed = None
    if key is not None:
        k_time, k_feature = jax.random.split(key)
        lengths = None if real is None else real.sum(-1)
        time, feature = (c.mask_time_prob, c.mask_time_length), (c.mask_feature_prob, c.mask_feature_length)
        if given is None and c.mask_time_prob > 0:
            given = span_mask(k_time, rows, frames, *time, min_spans=c.mask_time_min_masks, lengths=lengths)
        if c.mask_feature_prob > 0:
            zeroed = span_mask(k_feature, rows, size, *feature, min_spans=c.mask_feature_min_masks)
    if given is not None:
        if "masked" not in p:
            raise ValueError("masked frames have a vector only where mask_time_prob or mask_feature_prob is above 0")
        x = jnp.where(given[..., None] != 0, p["masked"].astype(x.dtype), x)
    return x if zeroed is None else jnp.where(zeroed[:, None], 0, x)


def encode(
    p: Any,
    c: Wav2Vec2Config,
    input_values: Any = None,
    attention_mask: Any = None,
    mask_time_indices: Any = None,
    key: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Waveforms [B, samples] -> (states [B, T, E], features [B, T, C]).

    The states are the weighted sum of all layers' where `p` has weights for it; T and E are the adapter's where there
    is one. `attention_mask` is of samples; `mask_time_indices` [B, T], which frames to hide, is of frames.
    """
    shape, least = getattr(input_values, "shape", None), least_samples(c)
    if shape is None or len(shape) != 2 or shape[1] < least:
        raise ValueError(f"input_values must be [batch, samples], at least {least} of them; got shape {shape}")
    frames, keys = frame_lengths(c, shape[1]), split(key, 4)
    real = None if attention_mask is None else real_frames(c, attention_mask, frames)
    with tap.scope("embed"):
        own = p["embed"]
        found = tap.tap("features", features(own["conv"], c, input_values))
        found = norm.layer(own["features_norm"], found, c.layer_norm_eps)
        x = dropout(linear(own["project"], found), c.feat_proj_dropout, keys[0])
        x = hide(own, c, x, mask_time_indices, real, keys[1])
        if real is not None:
            x = jnp.where(real[..., None], x, 0)
        x = x + tap.tap("position", positions(own["position"], c, x))
        if "norm" in own:
            x = norm.layer(own["norm"], x, c.layer_norm_eps)
        x = tap.tap("out", dropout(x, c.hidden_dropout, keys[2]))
    mask, one = Mask(keys=real), stable_block if c.do_stable_layer_norm else block

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        inner, skip = split(key, 2)
        y = one(p, c, x, mask, inner)
        if skip is not None:  # a layer as a whole is left out now and then (Fan et al. 2019, arXiv:1909.11556)
            y = jnp.where(jax.random.bernoulli(skip, c.layerdrop), x, y)
        return y, x

    layers = p.get("layers", ())
    x, before = fold(run, layers, x, cache=(None,) * len(layers) if isinstance(layers, tuple) else {}, key=keys[3])
    if "norm" in p:
        x = tap.tap("last", norm.layer(p["norm"], x, c.layer_norm_eps))
    if "layer_weights" in p:
        return jnp.tensordot(jax.nn.softmax(p["layer_weights"]).astype(x.dtype), jnp.stack([*before, x]), 1), found
    return adapt(p["adapter"], c, x) if "adapter" in p else x, found


def model(p: Any, c: Wav2Vec2Config, input_values: Any = None, **inputs: Any) -> SpeechOutput:
    """States [B, T, E] and features [B, T, C]."""
    x, found = encode(p, c, input_values, **inputs)
    return SpeechOutput(last_hidden_state=x, extract_features=found)


# ---- heads


def ctc(p: Any, c: Wav2Vec2Config, input_values: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
    """Scores of all tokens at every frame [B, T, V]; `pad_token_id` is the blank."""
    inner, outer = split(key, 2)
    x, _ = encode(p, c, input_values, key=inner, **inputs)
    return LogitsOutput(logits=linear(p["head"], dropout(x, c.final_dropout, outer)))


def masked_lm(p: Any, c: Wav2Vec2Config, input_values: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
    """As `ctc`, but padding counts as speech: the reference passes its mask over."""
    return ctc(p, c, input_values, **inputs)


def quantizer_spec(c: Wav2Vec2Config) -> dict[str, Spec]:
    """Groups of codes, and the scores by which they are chosen."""
    groups, count = c.num_codevector_groups, c.num_codevectors_per_group
    shape = (groups, count, c.codevector_dim // groups)
    layout = Reshape((1, groups * count, shape[-1]))
    scores = linear_spec("weight_proj", c.conv_dim[-1], groups * count, ("conv_out", None), init=normal(1.0))
    return {
        "quantizer": At(
            "quantizer", {"codes": Param(shape, (None,) * 3, "codevectors", UNIT, layout), "scores": scores}
        ),
        "state_head": linear_spec("project_hid", c.hidden_size, c.proj_codevector_dim, ("embed", None), init=UNIFORM),
        "code_head": linear_spec("project_q", c.codevector_dim, c.proj_codevector_dim, (None, None), init=UNIFORM),
    }


def quantize(p: Any, x: jax.Array, masked: Any, temperature: Any, key: Any) -> tuple[jax.Array, jax.Array]:
    """A code of each group for every frame: [B, T, C] -> ([B, T, D], perplexity [] over masked frames, or all).

    The one of highest score; under a key one drawn by the scores, through which gradients pass (Gumbel-softmax; Jang et
    al. 2016, arXiv:1611.01144).
    """
    groups, count, _ = p["codes"].shape
    scores = linear(p["scores"], x).astype(jnp.float32).reshape(*x.shape[:2], groups, count)
    chosen = shares = jax.nn.one_hot(scores.argmax(-1), count)
    if key is not None:
        soft = jax.nn.softmax((scores + jax.random.gumbel(key, scores.shape)) / temperature)
        chosen = jax.nn.one_hot(soft.argmax(-1), count) + soft - jax.lax.stop_gradient(soft)
        shares = jax.nn.softmax(scores)
    weights = jnp.ones(x.shape[:2]) if masked is None else (masked != 0).astype(jnp.float32)
    mean = jnp.einsum("btgv,bt->gv", shares, weights) / weights.sum()
    perplexity = jnp.exp(-(mean * jnp.log(mean + 1e-7)).sum(-1)).sum()
    codes = jnp.einsum("btgv,gvd->btgd", chosen.astype(x.dtype), p["codes"].astype(x.dtype))
    return codes.reshape(*x.shape[:2], -1), perplexity.astype(x.dtype)


def pretraining(
    p: Any,
    c: Wav2Vec2Config,
    input_values: Any = None,
    attention_mask: Any = None,
    mask_time_indices: Any = None,
    gumbel_temperature: Any = 2.0,
    key: Any = None,
) -> QuantizedOutput:
    """States of all frames, and codes of what the frames were before some were hidden: [B, T, P] each."""
    inner, drop, choose = split(key, 3)
    x, found = encode(p, c, input_values, attention_mask, mask_time_indices, inner)
    found = dropout(found, c.feat_quantizer_dropout, drop)
    codes, perplexity = quantize(p["quantizer"], found, mask_time_indices, gumbel_temperature, choose)
    return QuantizedOutput(
        projected_states=linear(p["state_head"], x),
        projected_quantized_states=linear(p["code_head"], codes),
        codevector_perplexity=perplexity,
    )


def audio_classification(
    p: Any, c: Wav2Vec2Config, input_values: Any = None, attention_mask: Any = None, **inputs: Any
) -> LogitsOutput:
    """A label for every recording, from the mean over its frames: [B, labels]."""
    x, _ = encode(p, c, input_values, attention_mask, **inputs)
    x = linear(p["projector"], x)
    shape = x.shape[:2]
    real = jnp.ones(shape, bool) if attention_mask is None else real_frames(c, attention_mask, shape[1])
    return LogitsOutput(logits=linear(p["head"], _mean(x, real[..., None])))


def frame_classification(p: Any, c: Wav2Vec2Config, input_values: Any = None, **inputs: Any) -> LogitsOutput:
    """A label for every frame: [B, T, labels]."""
    return LogitsOutput(logits=linear(p["head"], encode(p, c, input_values, **inputs)[0]))


def xvector_spec(c: Wav2Vec2Config) -> dict[str, Spec]:
    """Time-delay layers (dilated convolutions, stored as linear maps), a vector of the pooled, scores of speakers."""
    init, size = normal(c.initializer_range), c.xvector_output_dim
    widths = zip((c.tdnn_dim[0], *c.tdnn_dim), c.tdnn_dim, c.tdnn_kernel, strict=False)
    layers = [linear_spec("kernel", k * a, b, ("conv_in", "conv_out"), init=init) for a, b, k in widths]
    return {
        "projector": linear_spec("projector", c.hidden_size, c.tdnn_dim[0], ("embed", None), init=init),
        "tdnn": stack_of("tdnn", layers),
        "pooled": linear_spec("feature_extractor", 2 * c.tdnn_dim[-1], size, (None, None), init=init),
        "head": linear_spec("classifier", size, size, (None, None), init=init),
        "speakers": At("objective", {"kernel": Param((size, c.num_labels), (None, None), "weight", normal(1.0))}),
    }


def xvector(
    p: Any, c: Wav2Vec2Config, input_values: Any = None, attention_mask: Any = None, **inputs: Any
) -> XVectorOutput:
    """Vectors that tell voices apart, from mean and deviation over frames [B, X] (Snyder et al. 2018)."""
    x = linear(p["projector"], encode(p, c, input_values, attention_mask, **inputs)[0])
    least = 1 + sum(dilation * (k - 1) for k, dilation in zip(c.tdnn_kernel, c.tdnn_dilation, strict=True))
    if x.shape[1] < least:
        raise ValueError(
            f"the time-delay layers need {least} frames, input_values {input_values.shape} make {x.shape[1]}"
        )
    for layer, k, dilation in zip(p["tdnn"], c.tdnn_kernel, c.tdnn_dilation, strict=True):
        kernel = layer["kernel"].reshape(k, -1, layer["kernel"].shape[-1])
        x = jax.nn.relu(conv({**layer, "kernel": kernel}, x, dilation=dilation))
    count = jnp.full(x.shape[:1], x.shape[1])
    if attention_mask is not None:
        # as the reference counts them: without the dilation, so that frames of padding are among them
        lost = sum(c.tdnn_kernel) - len(c.tdnn_kernel)
        count = jnp.minimum(count, frame_lengths(c, (attention_mask != 0).sum(-1), adapter=True) - lost)
    real = (jnp.arange(x.shape[1]) < count[:, None])[..., None]
    mean = _mean(x, real)
    var = _mean(jnp.square(x - mean[:, None]), real, lost=1)
    deviation = jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), 0)  # a root of 0 has no gradient
    vectors = linear(p["pooled"], jnp.concatenate([mean, deviation], -1))
    y = linear(p["head"], vectors)
    cosines = _unit(y, -1) @ _unit(p["speakers"]["kernel"].astype(y.dtype), 0)
    return XVectorOutput(logits=y, embeddings=vectors, cosines=cosines)


def language_leaves(spec: Spec) -> list[Entry]:
    """What `adapter.<language>.safetensors` holds, under the names there: every layer's small adapter, and the head.

    Raises:
        ValueError: the model has no such adapters.
    """
    entries = table(spec).entries
    adapters = [entry for entry in entries if entry.path[0] == "layers" and entry.path[2] == "adapter"]
    if not adapters:
        raise ValueError("an adapter for each language needs adapter_attn_dim, and do_stable_layer_norm=True")
    return adapters + [entry for entry in entries if entry.path[0] == "head"]


def _mean(x: jax.Array, real: jax.Array, lost: int = 0) -> jax.Array:
    """Sum of the real frames over their number less `lost`, or over 1: [B, T, E] and [B, T, 1] -> [B, E]."""
    return jnp.where(real, x, 0).sum(1) / jnp.maximum(real.sum(1) - lost, 1).astype(x.dtype)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), 1e-12)


def _linear(key: str, name: str, d_in: str, d_out: str) -> Callable[[Wav2Vec2Config], dict[str, Spec]]:
    """A linear map between widths that the configuration names."""

    def spec(c: Wav2Vec2Config) -> dict[str, Spec]:
        init = normal(c.initializer_range)
        axes = (None, "vocab" if d_out == "vocab_size" else None)
        return {key: linear_spec(name, getattr(c, d_in), getattr(c, d_out), axes, init=init)}

    return spec


def _weights(c: Wav2Vec2Config) -> dict[str, Spec]:
    """Weights of the states before and after every layer, all alike at first."""
    shape = (c.num_hidden_layers + 1,)
    return {"layer_weights": Param(shape, (None,), "layer_weights")} if c.use_weighted_layer_sum else {}


def _no_adapter(spec: Callable[[Wav2Vec2Config], Spec]) -> Callable[[Wav2Vec2Config], Spec]:
    """The spec of a head that the reference has on states of full length only."""

    def checked(c: Wav2Vec2Config) -> Spec:
        if c.add_adapter:
            raise ConfigError("add_adapter=True: classifiers of recordings and of frames have no adapter before them")
        return spec(c)

    return checked


_with = partial(with_heads, "wav2vec2", model_spec)
_labels = _linear("head", "classifier", "hidden_size", "num_labels")
_recording = _linear("projector", "projector", "hidden_size", "classifier_proj_size")
_projected = _linear("head", "classifier", "classifier_proj_size", "num_labels")

FAMILY = Family(
    "wav2vec2",
    Wav2Vec2Config,
    base="wav2vec2",
    inputs=encode,
    architectures=(
        Architecture("Wav2Vec2Model", "", model_spec, model),
        Architecture(
            "Wav2Vec2ForPreTraining", "ForPreTraining", _with(quantizer_spec), pretraining, inputs=pretraining
        ),
        Architecture("Wav2Vec2ForCTC", "ForCTC", _with(_linear("head", "lm_head", "states_size", "vocab_size")), ctc),
        Architecture(
            "Wav2Vec2ForMaskedLM",
            "ForMaskedLM",
            _with(_linear("head", "lm_head", "hidden_size", "vocab_size")),
            masked_lm,
        ),
        Architecture(
            "Wav2Vec2ForSequenceClassification",
            "ForAudioClassification",
            _no_adapter(_with(_weights, _recording, _projected)),
            audio_classification,
        ),
        Architecture(
            "Wav2Vec2ForAudioFrameClassification",
            "ForAudioFrameClassification",
            _no_adapter(_with(_weights, _labels)),
            frame_classification,
        ),
        Architecture("Wav2Vec2ForXVector", "ForAudioXVector", _with(_weights, xvector_spec), xvector),
    ),
    flax=Port(
        ("Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining"),
        lacks=lambda c: {"do_stable_layer_norm": not c.do_stable_layer_norm},
    ),
    tf=Port(
        ("Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForSequenceClassification"),
        numbered=".",
        lacks=lambda c: {"conv_dim": len(set(c.conv_dim)) > 1},
    ),
)
