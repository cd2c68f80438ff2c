"""Heads of speech encoders: tokens and labels of frames and of recordings, codes of a quantizer, voices.

Each is made from the family's own `encode(p, c, input_values, attention_mask, ..., key) -> (states [B, T, E], features
[B, T, C])` and has the signature of an architecture's `apply`. Configurations have the fields of
`formax.layers.speech.SpeechConfig`, and what a head needs beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from formax.core.config import ConfigError
from formax.core.family import Architecture
from formax.core.layout import Reshape
from formax.core.outputs import LogitsOutput, QuantizedOutput, XVectorOutput
from formax.core.rng import split
from formax.core.spec import At, Param, Spec, normal, stack_of
from formax.layers.conv import conv
from formax.layers.dropout import dropout
from formax.layers.heads import with_heads
from formax.layers.linear import linear, linear_spec
from formax.layers.speech import UNIFORM, UNIT, frame_lengths, real_frames

Apply = Callable[..., Any]
Made = Callable[[Any], dict[str, Spec]]


def between(key: str, name: str, d_in: str, d_out: str) -> Made:
    """A linear map between widths that the configuration names, stored as `name`."""

    def spec(c: Any) -> dict[str, Spec]:
        init = normal(c.initializer_range)
        axes = (None, "vocab" if d_out == "vocab_size" else None)
        return {key: linear_spec(name, getattr(c, d_in), getattr(c, d_out), axes, init=init)}

    return spec


def layer_weights(c: Any) -> dict[str, Spec]:
    """Weights of the states before and after every layer, all alike at first."""
    shape = (c.num_hidden_layers + 1,)
    return {"layer_weights": Param(shape, (None,), "layer_weights")} if c.use_weighted_layer_sum else {}


# ---- tokens and labels


def ctc(encode: Apply) -> Apply:
    """Scores of all tokens at every frame: logits [B, T, V]; `pad_token_id` is the blank."""

    def apply(p: Any, c: Any, input_values: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
        inner, outer = split(key, 2)
        x, _ = encode(p, c, input_values, key=inner, **inputs)
        return LogitsOutput(logits=linear(p["head"], dropout(x, c.final_dropout, outer)))

    return apply


def audio_classification(encode: Apply) -> Apply:
    """A label for every recording, from the mean over its frames: logits [B, labels]."""

    def apply(p: Any, c: Any, input_values: Any = None, attention_mask: Any = None, **inputs: Any) -> LogitsOutput:
        x = linear(p["projector"], encode(p, c, input_values, attention_mask, **inputs)[0])
        b, frames, _ = x.shape
        real = jnp.ones((b, frames), bool) if attention_mask is None else real_frames(c, attention_mask, frames)
        return LogitsOutput(logits=linear(p["head"], mean(x, real[..., None])))

    return apply


def frame_classification(encode: Apply) -> Apply:
    """A label for every frame: logits [B, T, labels]."""

    def apply(p: Any, c: Any, input_values: Any = None, **inputs: Any) -> LogitsOutput:
        return LogitsOutput(logits=linear(p["head"], encode(p, c, input_values, **inputs)[0]))

    return apply


# ---- codes


def quantizer_spec(c: Any) -> dict[str, Spec]:
    """Groups of codes, the scores by which they are chosen, and projections of states and of codes."""
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
    average = jnp.einsum("btgv,bt->gv", shares, weights) / weights.sum()
    perplexity = jnp.exp(-(average * jnp.log(average + 1e-7)).sum(-1)).sum()
    codes = jnp.einsum("btgv,gvd->btgd", chosen.astype(x.dtype), p["codes"].astype(x.dtype))
    return codes.reshape(*x.shape[:2], -1), perplexity.astype(x.dtype)


def pretraining(encode: Apply) -> Apply:
    """States of all frames, and codes of what the frames were before some were hidden: [B, T, P] each."""

    def apply(
        p: Any,
        c: Any,
        input_values: Any = None,
        attention_mask: Any = None,
        mask_time_indices: Any = None,
        gumbel_temperature: Any = 2.0,
        key: Any = None,
    ) -> QuantizedOutput:
        inner, drop, choose = split(key, 3)
        x, found = encode(p, c, input_values, attention_mask, mask_time_indices, inner)
        found = dropout(found, c.feat_quantizer_dropout, drop)
        codes, perplexity = quantize(p["quantizer"], found, mask_time_indices, gumbel_temperature, choose)
        return QuantizedOutput(
            projected_states=linear(p["state_head"], x),
            projected_quantized_states=linear(p["code_head"], codes),
            codevector_perplexity=perplexity,
        )

    return apply


# ---- voices


def xvector_spec(c: Any) -> dict[str, Spec]:
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


def time_delay(p: Any, c: Any, x: jax.Array) -> jax.Array:
    """The time-delay layers, each with a ReLU: [B, T, E] -> [B, T', E'], shorter by what their windows span."""
    for layer, k, dilation in zip(p, c.tdnn_kernel, c.tdnn_dilation, strict=True):
        kernel = layer["kernel"].reshape(k, -1, layer["kernel"].shape[-1])
        x = jax.nn.relu(conv({**layer, "kernel": kernel}, x, dilation=dilation))
    return x


def xvector(encode: Apply) -> Apply:
    """Vectors that tell voices apart, from mean and deviation over frames [B, X] (Snyder et al. 2018)."""

    def apply(p: Any, c: Any, input_values: Any = None, attention_mask: Any = None, **inputs: Any) -> XVectorOutput:
        x = linear(p["projector"], encode(p, c, input_values, attention_mask, **inputs)[0])
        least = 1 + sum(dilation * (k - 1) for k, dilation in zip(c.tdnn_kernel, c.tdnn_dilation, strict=True))
        if x.shape[1] < least:
            raise ValueError(
                f"the time-delay layers need {least} frames, input_values {input_values.shape} make {x.shape[1]}"
            )
        x = time_delay(p["tdnn"], c, x)
        count = jnp.full(x.shape[:1], x.shape[1])
        if attention_mask is not None:
            # as the reference counts them: without the dilation, so that frames of padding are among them
            lost = sum(c.tdnn_kernel) - len(c.tdnn_kernel)
            count = jnp.minimum(count, frame_lengths(c, (attention_mask != 0).sum(-1), adapter=True) - lost)
        real = (jnp.arange(x.shape[1]) < count[:, None])[..., None]
        middle = mean(x, real)
        var = mean(jnp.square(x - middle[:, None]), real, lost=1)
        deviation = jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), 0)  # a root of 0 has no gradient
        vectors = linear(p["pooled"], jnp.concatenate([middle, deviation], -1))
        y = linear(p["head"], vectors)
        cosines = _unit(y, -1) @ _unit(p["speakers"]["kernel"].astype(y.dtype), 0)
        return XVectorOutput(logits=y, embeddings=vectors, cosines=cosines)

    return apply


def mean(x: jax.Array, real: jax.Array, lost: int = 0) -> jax.Array:
    """Sum of the real frames over their number less `lost`, or over 1: [B, T, E] and [B, T, 1] -> [B, E]."""
    return jnp.where(real, x, 0).sum(1) / jnp.maximum(real.sum(1) - lost, 1).astype(x.dtype)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), 1e-12)


# ---- all of them


def without_adapter(spec: Made) -> Made:
    """The spec of a head that the reference has on states of full length only."""

    def checked(c: Any) -> dict[str, Spec]:
        if getattr(c, "add_adapter", False):
            raise ConfigError("add_adapter=True: classifiers of recordings and of frames have no adapter before them")
        return spec(c)

    return checked


def encoder_heads(name: str, base: str, spec: Made, encode: Apply) -> tuple[Architecture, ...]:
    """The heads for tokens, for labels of recordings and of frames, and for voices, in this order, as wav2vec 2.0's.

    Args:
        name: what the class names begin with.
        base: the bare model's prefix in checkpoints.
        spec: of the bare model.
        encode: see above.
    """
    tokens = between("head", "lm_head", "states_size", "vocab_size")
    recordings = (
        layer_weights,
        between("projector", "projector", "hidden_size", "classifier_proj_size"),
        between("head", "classifier", "classifier_proj_size", "num_labels"),
    )
    frames = (layer_weights, between("head", "classifier", "hidden_size", "num_labels"))

    def made(head: str, task: str, spec: Made, apply: Apply) -> Architecture:
        return Architecture(name + head, task, spec, apply)

    def over(*heads: Made) -> Made:
        return with_heads(base, spec, *heads)

    return (
        made("ForCTC", "ForCTC", over(tokens), ctc(encode)),
        made(
            "ForSequenceClassification",
            "ForAudioClassification",
            without_adapter(over(*recordings)),
            audio_classification(encode),
        ),
        made(
            "ForAudioFrameClassification",
            "ForAudioFrameClassification",
            without_adapter(over(*frames)),
            frame_classification(encode),
        ),
        made("ForXVector", "ForAudioXVector", over(layer_weights, xvector_spec), xvector(encode)),
    )
