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


# ---- samples to frames


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


def masked_lm(p: Any, c: Wav2Vec2Config, input_values: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
    """As `ctc`, but padding counts as speech: the reference passes its mask over."""
    return ctc(p, c, input_values, **inputs)


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
        # Its weights of layers are saved where they are not looked for.
        lacks=lambda c: {"conv_dim": len(set(c.conv_dim)) > 1, "use_weighted_layer_sum": c.use_weighted_layer_sum},
    ),
)
