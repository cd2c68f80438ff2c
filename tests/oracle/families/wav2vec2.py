"""Wav2Vec2: both orders of norm, both norms of the feature encoder, adapters of both kinds, seven heads, old names.

311 samples become 25 frames (strides 3, 2, 2), a row of 203 becomes 16. Nothing is divided evenly: 4 heads of 9, 3
groups of positional channels, 2 groups of 5 codes. `layer_norm_eps` is large, and the norms of the feature encoder and
of the adapters, which do not follow it, show that. Where the reference is odd, the case says so.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    Array,
    Tensors,
    change,
    change_input,
    configure,
    ending,
    floats,
    heads_last,
    ids,
    mask,
    swap,
    zero,
)
from oracle.families import Bug, Case

SAMPLES, FRAMES = 311, 25

SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 53,
    "layer_norm_eps": 0.05,
    "conv_dim": (11, 13, 10),
    "conv_stride": (3, 2, 2),
    "conv_kernel": (5, 3, 2),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 3,
    "num_codevectors_per_group": 5,
    "num_codevector_groups": 2,
    "codevector_dim": 14,
    "proj_codevector_dim": 9,
    "classifier_proj_size": 15,
    "tdnn_dim": (12, 9, 15),
    "tdnn_kernel": (5, 3, 1),
    "tdnn_dilation": (1, 2, 1),
    "xvector_output_dim": 8,
}
STABLE = SIZES | {
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "num_conv_pos_embeddings": 5,
}
# A vector for masked frames is there when masking is configured; heads read it in training alone.
UNMASKED = {"mask_time_prob": 0.0}
# What decides the shapes of the outputs, for those who trace a golden's call at another size.
KEPT = (
    "conv_dim",
    "conv_kernel",
    "conv_stride",
    "add_adapter",
    "adapter_kernel_size",
    "adapter_stride",
    "num_adapter_layers",
)


def speech(name: str, *lengths: int) -> Tensors:
    """Returns waveforms and their padding mask, each `[rows, SAMPLES]`; padding is silence."""
    seen = mask(*lengths, width=SAMPLES)
    return {
        "input_values": floats(f"{name}.input_values", *seen.shape) * seen.astype(np.float32),
        "attention_mask": seen,
    }


def loud(name: str, rows: int) -> Tensors:
    """Returns waveforms `[rows, SAMPLES]` without a mask."""
    return {"input_values": floats(f"{name}.input_values", rows, SAMPLES)}


def frames(name: str, rows: int) -> Array:
    """Returns which frames are masked, `[rows, FRAMES]`: about half of the first 16."""
    return (ids(name, rows, FRAMES, low=0, high=2) == 1) & (np.arange(FRAMES) < 16)


PADDED = speech("padded", 311, 203)
MASKED = {"mask_time_indices": frames("masked", 2)}
# A pair of equal neighbours, which needs a blank between; and gaps, which are dropped wherever they are.
TRANSCRIPTS = np.array([[3, 3, 16, 1, 9, 4, 12], [8, -100, 2, 2, 11, -100, -100]])


def negatives(name: str) -> Array:
    """Returns frames `[2, FRAMES, 3]` to tell each frame from, numbered over both rows; the last is the frame itself.

    It is passed over, being no wrong answer. Another frame with the same codes should be, too, but the reference finds
    it by comparing rows of a product, which need not round alike; so the name is one for which there is none.
    """
    others = ids(name, 2, FRAMES, 2, low=0, high=FRAMES) + FRAMES * np.arange(2)[:, None, None]
    return np.concatenate([others, np.arange(2 * FRAMES).reshape(2, FRAMES, 1)], axis=-1)


# ---- the base model -------------------------------------------------------------------------------------------------

MODELS = (
    Case("model", "Wav2Vec2Model", SIZES, PADDED, ("last_hidden_state", "extract_features")),
    Case("stable", "Wav2Vec2Model", STABLE, PADDED, ("last_hidden_state", "extract_features")),
    # Given frames are masked without being in training; the features for the quantizer stay as they were.
    Case("masked", "Wav2Vec2Model", SIZES, PADDED | MASKED, ("last_hidden_state", "extract_features")),
    Case(
        "spec_augment_off",
        "Wav2Vec2Model",
        STABLE | {"apply_spec_augment": False},
        PADDED | MASKED,
        ("last_hidden_state",),
    ),
    Case(
        "traces",
        "Wav2Vec2Model",
        SIZES | UNMASKED | {"feat_extract_activation": "relu", "hidden_act": "gelu_new"},
        loud("traces", 1),
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
    # The last of the hidden states has gone through the final norm, which none of the others has.
    Case(
        "stable_traces",
        "Wav2Vec2Model",
        STABLE | UNMASKED | {"feat_extract_norm": "group", "conv_bias": False},
        loud("stable_traces", 1),
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
    # The convolutions of the adapter read padded frames as they are.
    Case(
        "adapter",
        "Wav2Vec2Model",
        SIZES | {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 14, "adapter_kernel_size": 4},
        PADDED | MASKED,
        ("last_hidden_state",),
    ),
)

# ---- the heads, each with its loss ----------------------------------------------------------------------------------

HEADS = (
    Case(
        "ctc",
        "Wav2Vec2ForCTC",
        SIZES | UNMASKED | {"pad_token_id": 5},
        PADDED | {"labels": TRANSCRIPTS},
        ("loss", "logits"),
    ),
    # Four frames cannot hold five letters: that row's loss is infinite, and counts as 0 when asked to.
    Case(
        "ctc_mean",
        "Wav2Vec2ForCTC",
        STABLE | UNMASKED | {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True},
        speech("ctc_mean", 311, 203, 60) | {"labels": np.concatenate([TRANSCRIPTS, [[1, 2, 3, 4, 5, -100, -100]]])},
        ("loss", "logits"),
    ),
    # As the multilingual checkpoints are: a small adapter a layer, exchanged with the language.
    Case(
        "ctc_language_adapter",
        "Wav2Vec2ForCTC",
        STABLE | UNMASKED | {"adapter_attn_dim": 7},
        PADDED | {"labels": TRANSCRIPTS},
        ("loss", "logits"),
    ),
    # Without a mask all samples count; the adapter shortens what the loss aligns.
    Case(
        "ctc_adapter",
        "Wav2Vec2ForCTC",
        SIZES | UNMASKED | {"add_adapter": True, "num_adapter_layers": 1, "adapter_stride": 2},
        loud("ctc_adapter", 2) | {"labels": TRANSCRIPTS[:, :4]},
        ("loss", "logits"),
    ),
    Case(
        "pre_training",
        "Wav2Vec2ForPreTraining",
        STABLE | {"num_codevectors_per_group": 11, "diversity_loss_weight": 3.0, "contrastive_logits_temperature": 0.3},
        PADDED | MASKED | {"sampled_negative_indices": negatives("negatives 17")},
        ("loss", "projected_states", "projected_quantized_states", "codevector_perplexity"),
    ),
    # Without masked frames the codes of all frames are counted, padding too.
    Case(
        "pre_training_unmasked",
        "Wav2Vec2ForPreTraining",
        SIZES,
        PADDED,
        ("projected_states", "projected_quantized_states", "codevector_perplexity"),
    ),
    # It takes a mask and does not look at it, takes labels and has no loss, and has no adapter before its head.
    Case("masked_lm", "Wav2Vec2ForMaskedLM", SIZES | UNMASKED, PADDED, ("logits",)),
    Case(
        "sequence_classification",
        "Wav2Vec2ForSequenceClassification",
        SIZES | UNMASKED | {"num_labels": 3},
        PADDED | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    Case(
        "sequence_classification_of_layers",
        "Wav2Vec2ForSequenceClassification",
        STABLE | UNMASKED | {"num_labels": 3, "use_weighted_layer_sum": True},
        loud("sequence_classification_of_layers", 2) | {"labels": np.array([1, 2])},
        ("loss", "logits"),
    ),
    # Labels are one-hot: several speakers at once are given, and the first of them counts.
    Case(
        "audio_frame_classification",
        "Wav2Vec2ForAudioFrameClassification",
        SIZES | UNMASKED | {"num_labels": 3},
        PADDED | {"labels": ids("audio_frame_classification", 2, FRAMES, 3, low=0, high=2)},
        ("loss", "logits"),
    ),
    Case(
        "audio_frame_classification_of_layers",
        "Wav2Vec2ForAudioFrameClassification",
        STABLE | UNMASKED | {"num_labels": 3, "use_weighted_layer_sum": True},
        PADDED,
        ("logits",),
    ),
    # Which frames are pooled is counted as if the layers had no dilation: for a padded row a few too many.
    Case(
        "xvector",
        "Wav2Vec2ForXVector",
        SIZES | UNMASKED | {"num_labels": 3},
        PADDED | {"labels": np.array([2, 0])},
        ("loss", "logits", "embeddings"),
    ),
    Case(
        "xvector_of_layers",
        "Wav2Vec2ForXVector",
        SIZES | UNMASKED | {"num_labels": 3, "use_weighted_layer_sum": True},
        loud("xvector_of_layers", 2) | {"labels": np.array([1, 1])},
        ("loss", "logits", "embeddings"),
    ),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

# As wav2vec2-base-960h has it, but for the sizes.
CONFIG_2021: dict[str, Any] = {
    "activation_dropout": 0.1,
    "apply_spec_augment": True,
    "architectures": ["Wav2Vec2ForCTC"],
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "codevector_dim": 14,
    "contrastive_logits_temperature": 0.1,
    "conv_bias": False,
    "conv_dim": [11, 13, 10],
    "conv_kernel": [5, 3, 2],
    "conv_stride": [3, 2, 2],
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "diversity_loss_weight": 0.1,
    "do_stable_layer_norm": False,
    "eos_token_id": 2,
    "feat_extract_activation": "gelu",
    "feat_extract_dropout": 0.0,
    "feat_extract_norm": "group",
    "feat_proj_dropout": 0.1,
    "feat_quantizer_dropout": 0.0,
    "final_dropout": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "hidden_size": 36,
    "initializer_range": 0.02,
    "intermediate_size": 53,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_feature_length": 10,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_prob": 0.05,
    "model_type": "wav2vec2",
    "num_attention_heads": 4,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 5,
    "num_conv_pos_embedding_groups": 3,
    "num_conv_pos_embeddings": 6,
    "num_feat_extract_layers": 3,
    "num_hidden_layers": 2,
    "num_negatives": 100,
    "pad_token_id": 0,
    "proj_codevector_dim": 9,
    "transformers_version": "4.7.0.dev0",
    "vocab_size": 17,
}
WEIGHT_NORM = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))
QUANTIZER_KEYS = (
    "project_hid.bias",
    "project_hid.weight",
    "project_q.bias",
    "project_q.weight",
    "quantizer.codevectors",
    "quantizer.weight_proj.bias",
    "quantizer.weight_proj.weight",
)

CHECKPOINTS = (
    # As on the hub: magnitude and direction of the positional kernel under the names of PyTorch before 2.0, and no
    # vector for masked frames, though the configuration has them masked in training.
    Case(
        "old_names",
        "Wav2Vec2ForCTC",
        CONFIG_2021,
        PADDED,
        ("logits",),
        literal_config=True,
        rename=WEIGHT_NORM,
        drop=("wav2vec2.masked_spec_embed",),
        missing=("wav2vec2.masked_spec_embed",),
    ),
    # Fine-tuning begins so: the quantizer stays behind, the head is new.
    Case(
        "head_on_pre_training",
        "Wav2Vec2ForCTC",
        SIZES,
        loud("head_on_pre_training", 1),
        ("hidden_states",),
        {"output_hidden_states": True},
        writer="Wav2Vec2ForPreTraining",
        missing=("lm_head.bias", "lm_head.weight"),
        unexpected=QUANTIZER_KEYS,
    ),
)

CASES = MODELS + HEADS + CHECKPOINTS


# ---- mistakes that the cases above must show ------------------------------------------------------------------------


def _swap_norms(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    for key in (key for key in ending(tensors, ".layer_norm.weight", ".layer_norm.bias") if ".layers." in key):
        other = key.replace(".layer_norm", ".final_layer_norm")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def _not_normalised(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    """The magnitude multiplies the direction as it is stored."""
    (magnitude,) = ending(tensors, "weight.original0")
    direction = tensors[magnitude.replace("original0", "original1")]
    tensors[magnitude] = tensors[magnitude] * np.linalg.norm(direction, axis=(0, 1))


def _normalised_by_channel(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    """Weight normalisation as it usually is: the norm of each output channel, over inputs and taps."""
    (magnitude,) = ending(tensors, "weight.original0")
    direction = magnitude.replace("original0", "original1")
    g, v = tensors[magnitude], tensors[direction]
    wrong = g * v / np.linalg.norm(v, axis=(1, 2), keepdims=True)
    tensors[magnitude] = np.linalg.norm(wrong, axis=(0, 1), keepdims=True).astype(np.float32)
    tensors[direction] = wrong.astype(np.float32)


def _biased_deviation(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    """The deviation of 17 frames divided by their number."""
    (key,) = (key for key in ending(tensors, "feature_extractor.weight"))
    tensors[key] = tensors[key] * np.repeat([1.0, np.sqrt(16 / 17)], tensors[key].shape[1] // 2).astype(np.float32)


def _halves(array: Array) -> Array:
    return np.roll(array, array.shape[0] // 2, 0)


def _width_last(kernel: Array) -> Array:
    """Reads rows `(width, in)` as if they were `(in, width)`."""
    out, rows = kernel.shape
    width = {60: 5, 36: 3}[rows]
    return kernel.reshape(out, rows // width, width).swapaxes(1, 2).reshape(out, rows)


EVERY = tuple(case.name for case in CASES if case.name not in ("old_names", "head_on_pre_training"))
STABLE_CASES = tuple(case.name for case in CASES if case.config.get("do_stable_layer_norm"))
EVEN = tuple(case.name for case in CASES if case.config.get("num_conv_pos_embeddings") == 6)
MASKLESS = ("masked_lm", "adapter")  # the adapter's few frames are mostly padding
PAD = tuple(case.name for case in CASES if "attention_mask" in case.inputs and case.name not in MASKLESS)
QKV = tuple(f"{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias"))
LAYERS = tuple(case.name for case in CASES if case.config.get("use_weighted_layer_sum"))
CTC = ("ctc", "ctc_mean", "ctc_language_adapter", "ctc_adapter")
# Codes are chosen from features that no layer has touched.
SEEN = ("projected_states",)


def layered(name: str, *arguments: Any, **more: Any) -> tuple[Bug, ...]:
    """Returns a mistake inside the layers for all cases: of a pre-training, what the quantizer gives cannot show it."""
    cases, apply = arguments[:2]
    least = arguments[2] if len(arguments) > 2 else 1e-2
    own = tuple(case for case in cases if case.startswith("pre_training"))
    rest = tuple(case for case in cases if case not in own and case not in ("model", "stable", "masked"))
    bare = tuple(case for case in cases if case in ("model", "stable", "masked"))
    split = ((rest, ()), (bare, ("last_hidden_state",)), (own, SEEN))
    return tuple(Bug(name, some, apply, least, outputs, **more) for some, outputs in split if some)


TRACED = ("traces", "stable_traces", "head_on_pre_training")  # what comes before the mistake is right
WHOLE = tuple(name for name in EVERY if name not in TRACED)

BUGS = (
    *layered("query and key exchanged", WHOLE, swap("q_proj", "k_proj", "weight", "bias"), 5e-3),
    *layered("heads split the wrong way round", WHOLE, change(heads_last(SIZES["num_attention_heads"]), *QKV)),
    *layered("square kernels not transposed", WHOLE, change(np.transpose, "v_proj.weight")),
    *layered("scores not divided by sqrt(d)", WHOLE, change(lambda w: w * 3.0, "q_proj.weight", "q_proj.bias")),
    *layered("the norms of a layer exchanged", WHOLE, _swap_norms),
    *layered("layer_norm_eps 1e-5 hard-coded", WHOLE, configure(layer_norm_eps=1e-5), 5e-3),
    *layered(
        "post-norm read as pre-norm",
        tuple(name for name in WHOLE if name not in STABLE_CASES),
        configure(do_stable_layer_norm=True),
    ),
    *layered(
        "pre-norm read as post-norm",
        tuple(name for name in WHOLE if name in STABLE_CASES and name != "ctc_language_adapter"),
        configure(do_stable_layer_norm=False),
    ),
    *layered("positional convolution forgotten", WHOLE, zero("pos_conv_embed.conv.bias", "weight.original0")),
    *layered("magnitude left out", WHOLE, change(np.ones_like, "weight.original0")),
    *layered("direction not normalised", WHOLE, _not_normalised),
    *layered("weight norm by output channel", WHOLE, _normalised_by_channel, 5e-3),
    *layered(
        "the first frame cut instead of the last",
        tuple(name for name in EVEN if name in WHOLE),
        change(lambda w: np.roll(w, 1, -1), "weight.original0", "weight.original1"),
        5e-3,
    ),
    *layered("groups of the positional convolution exchanged", WHOLE, change(_halves, "weight.original1")),
    *layered("gelu by tanh instead of erf", ("model",), configure(hidden_act="gelu_new"), 2e-4),
    *layered("gelu in the convolutions by tanh", ("model",), configure(feat_extract_activation="gelu_new"), 2e-4),
    Bug("relu taken for gelu", ("traces",), configure(feat_extract_activation="gelu")),
    *layered("padding attended to", PAD, change_input("attention_mask", np.ones_like)),
    *layered(
        "masked frames ignored",
        ("masked", "adapter", "pre_training"),
        change_input("mask_time_indices", np.zeros_like),
    ),
    *layered("masked frames zeroed", ("masked", "adapter", "pre_training"), zero("masked_spec_embed")),
    Bug("masking though it is off", ("spec_augment_off",), configure(apply_spec_augment=True)),
    Bug("halves of the gate exchanged", ("adapter", "ctc_adapter"), change(_halves, "adapter.layers.0.conv.weight")),
    Bug("language adapter left out", ("ctc_language_adapter",), zero("adapter_layer.linear_2.weight")),
    Bug("layers summed evenly", LAYERS, zero("layer_weights"), 5e-3),
    Bug("blank is token 0", ("ctc",), configure(pad_token_id=0), outputs=("loss",)),
    Bug("letter 3 is the blank", CTC[1:], configure(pad_token_id=3), 5e-3, ("loss",)),
    Bug("mean instead of sum", ("ctc", "ctc_adapter"), configure(ctc_loss_reduction="mean"), outputs=("loss",)),
    Bug("sum instead of mean", ("ctc_mean",), configure(ctc_loss_reduction="sum"), outputs=("loss",)),
    Bug("infinite losses kept", ("ctc_mean",), configure(ctc_zero_infinity=False), outputs=("loss",)),
    Bug("gaps read as letter 1", CTC[:3], change_input("labels", lambda y: np.where(y < 0, 1, y)), outputs=("loss",)),
    Bug(
        "groups of codes exchanged",
        ("pre_training",),
        change(lambda v: v[:, ::-1], "codevectors"),
        outputs=("projected_quantized_states",),
    ),
    Bug(
        "temperature 0.1 hard-coded",
        ("pre_training",),
        configure(contrastive_logits_temperature=0.1),
        outputs=("loss",),
    ),
    Bug("diversity weight 0.1 hard-coded", ("pre_training",), configure(diversity_loss_weight=0.1), outputs=("loss",)),
    Bug(
        "negatives of the wrong frame",
        ("pre_training",),
        change_input("sampled_negative_indices", lambda at: np.roll(at, 1, 1)),
        outputs=("loss",),
    ),
    Bug("dilation ignored", ("xvector", "xvector_of_layers"), configure(tdnn_dilation=[1, 1, 1])),
    Bug(
        "frames of a TDNN kernel after its channels",
        ("xvector", "xvector_of_layers"),
        change(_width_last, "tdnn.0.kernel.weight", "tdnn.1.kernel.weight"),
    ),
    Bug("deviation over n", ("xvector_of_layers",), _biased_deviation, 5e-3),
    Bug(
        "speaker weights by row",
        ("xvector", "xvector_of_layers"),
        change(lambda w: w / np.linalg.norm(w, axis=1, keepdims=True), "objective.weight"),
        outputs=("loss",),
    ),
    Bug(
        "labels of the last speaker",
        ("audio_frame_classification",),
        change_input("labels", lambda y: y[..., ::-1]),
        outputs=("loss",),
    ),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away. Codes are chosen by an argmax,
# through which no gradient comes (in training a straight-through estimate takes its place).
INVISIBLE = (r"\.k_proj\.bias$", r"quantizer\.weight_proj\.")
