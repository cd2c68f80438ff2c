"""Whisper: four heads, the convolutions, SpecAugment's silence without training, three head masks, untied output.

Sizes are asymmetric on purpose: 3 layers of 4 heads of 9 listen, 2 layers of 3 heads of 12 write; 50 frames of 11 bands
become 25 states, of which 27 tokens are made. The epsilon of the norms is a constant of the reference, so a case with
tiny inputs shows it. `scale_embedding` is a switch that the reference stores and never reads.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    Tensors,
    U,
    both,
    change,
    change_input,
    configure,
    floats,
    heads_last,
    ids,
    ignored_labels_count,
    labels,
    labels_off_by_one,
    mask,
    not_causal,
    swap,
    swap_head_masks,
    written,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_mel_bins": 11,
    "d_model": 36,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 53,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 47,
    "max_source_positions": 25,
    "max_target_positions": 40,
    "pad_token_id": 3,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "decoder_start_token_id": 5,
    "begin_suppress_tokens": [7, 2],
}
SHORT = SIZES | {"max_source_positions": 13}
LABELS = {"num_labels": 5, "classifier_proj_size": 19}


SOUND = {"input_features": floats("input_features", 2, 11, 50)}
WRITTEN = written("written")
PAIR = SOUND | WRITTEN
TEXT = {"input_ids": ids("input_ids", 2, T), "attention_mask": mask(25, 17)}
LEFT = {"input_ids": ids("left", 2, T), "attention_mask": mask(25, 18, left=True)}
STATES = floats("encoder_outputs", 2, 13, 36)
SEEN = ("last_hidden_state", "encoder_last_hidden_state")
HEAD_MASK = np.array([[1, 0, 1], [0.5, 1, 0.25]], np.float32)
CROSS_HEAD_MASK = np.array([[0, 1, 1], [1, 0.75, 0.5]], np.float32)

# ---- the four heads, each with its loss ------------------------------------------------------------------------------

HEADS = (
    Case("model", "WhisperModel", SIZES, PAIR, SEEN),
    # The decoder reads the labels, shifted by one, and padding for those that do not count.
    Case(
        "conditional_generation",
        "WhisperForConditionalGeneration",
        SIZES,
        SOUND | {"labels": labels("conditional_generation", VOCAB, mask(U, 20, width=U))},
        ("loss", "logits", "encoder_last_hidden_state"),
    ),
    # SpecAugment is for training, a mask of the frames is for SpecAugment, and the words are not scaled.
    Case(
        "conditional_generation_of_ids",
        "WhisperForConditionalGeneration",
        SIZES | {"scale_embedding": True, "apply_spec_augment": True, "mask_feature_prob": 0.3},
        PAIR
        | {
            "attention_mask": mask(50, 41, width=50),
            "decoder_position_ids": ids("decoder_position_ids", 2, U, low=0, high=40),
            "labels": labels("conditional_generation_of_ids", VOCAB, WRITTEN["decoder_attention_mask"]),
        },
        ("loss", "logits"),
    ),
    # The decoder alone, which passes over its cross-attention; its labels are not shifted, unlike other models'.
    Case(
        "causal_lm",
        "WhisperForCausalLM",
        SIZES,
        TEXT | {"labels": labels("causal_lm", VOCAB, TEXT["attention_mask"])},
        ("loss", "logits"),
    ),
    # With a cache of its own, the reference fails on states to look at. Positions are not shifted for left padding.
    Case(
        "causal_lm_cross",
        "WhisperForCausalLM",
        SIZES,
        LEFT | {"encoder_outputs": STATES, "head_mask": HEAD_MASK, "cross_attn_head_mask": CROSS_HEAD_MASK},
        ("logits",),
        {"use_cache": False},
    ),
    Case(
        "audio_classification",
        "WhisperForAudioClassification",
        SIZES | LABELS,
        SOUND
        | {
            "head_mask": np.array([[1, 0, 0.5, 1], [0, 1, 1, 0.25], [0.75, 1, 0, 1]], np.float32),
            "labels": np.array([4, 0]),
        },
        ("loss", "logits"),
    ),
    Case(
        "audio_classification_weighted",
        "WhisperForAudioClassification",
        SIZES | LABELS | {"use_weighted_layer_sum": True},
        SOUND | {"labels": np.array([1, 3])},
        ("loss", "logits"),
    ),
)

# ---- what can be passed in -------------------------------------------------------------------------------------------

INPUTS = (
    Case("inputs_embeds", "WhisperModel", SIZES, SOUND | {"decoder_inputs_embeds": floats("embeds", 2, U, 36)}, SEEN),
    Case(
        "encoder_outputs",
        "WhisperForConditionalGeneration",
        SIZES,
        WRITTEN | {"encoder_outputs": STATES[None]},  # the reference takes a tuple, of which this is the first
        ("logits",),
    ),
    Case(
        "head_masks",
        "WhisperModel",
        SIZES,
        PAIR
        | {
            "head_mask": np.array([[1, 0, 0.5, 1], [0, 1, 1, 0.25], [0.75, 1, 0, 1]], np.float32),
            "decoder_head_mask": HEAD_MASK,
            "cross_attn_head_mask": CROSS_HEAD_MASK,
        },
        SEEN,
    ),
    # The last state of each is normalised.
    Case(
        "traces",
        "WhisperModel",
        SHORT,
        {"input_features": floats("traces.features", 1, 11, 26), "decoder_input_ids": ids("traces", 1, 15)},
        (
            *SEEN,
            "encoder_hidden_states",
            "encoder_attentions",
            "decoder_hidden_states",
            "decoder_attentions",
            "cross_attentions",
        ),
        TRACES,
    ),
    Case(
        "traces_of_a_classifier",
        "WhisperForAudioClassification",
        SHORT | LABELS,
        {"input_features": floats("traces_of_a_classifier", 1, 11, 26)},
        ("logits", "hidden_states", "attentions"),
        TRACES,
    ),
    Case(
        "traces_of_a_decoder",
        "WhisperForCausalLM",
        SIZES,
        {"input_ids": ids("traces_of_a_decoder", 1, 15), "encoder_outputs": STATES[:1]},
        ("logits", "hidden_states", "attentions", "cross_attentions"),
        TRACES | {"use_cache": False},
    ),
    # Inputs so small that the epsilon of the first norms, 1e-5, is what they are measured against.
    Case(
        "tiny_inputs",
        "WhisperModel",
        SIZES,
        {
            "input_features": 0.005 * floats("tiny.features", 1, 11, 50),
            "decoder_inputs_embeds": 0.002 * floats("tiny.embeds", 1, U, 36),
        },
        SEEN,
        buffers={
            "encoder.conv1.bias": 0.005 * floats("tiny.conv1", 36),
            "encoder.conv2.bias": 0.002 * floats("tiny.conv2", 36),
            "encoder.embed_positions.weight": 0.002 * floats("tiny.encoder.positions", 25, 36),
            "decoder.embed_positions.weight": 0.002 * floats("tiny.decoder.positions", 40, 36),
        },
    ),
)

# ---- what a configuration can ask for --------------------------------------------------------------------------------

CONFIGS = (
    # The convolutions keep their gelu.
    Case("act_relu", "WhisperModel", SIZES | {"activation_function": "relu"}, PAIR, SEEN),
    Case(
        "untied",
        "WhisperForConditionalGeneration",
        SIZES | {"tie_word_embeddings": False},
        PAIR,
        ("logits", "encoder_last_hidden_state"),
    ),
    Case("causal_lm_untied", "WhisperForCausalLM", SIZES | {"tie_word_embeddings": False}, TEXT, ("logits",)),
    # The reference counts the layers of its cache by the encoder's, so a deeper decoder only runs without one.
    Case(
        "deeper_decoder",
        "WhisperForConditionalGeneration",
        SHORT | {"encoder_layers": 1, "output_hidden_states": True},
        {"input_features": floats("deeper.features", 1, 11, 26), "decoder_input_ids": ids("deeper", 1, U)},
        ("logits", "decoder_hidden_states"),
        {"use_cache": False},
    ),
)

# ---- checkpoints as they are found -----------------------------------------------------------------------------------

# As openai/whisper-tiny had it in 2022, sizes aside, with the settings of the generation.
CONFIG_2022: dict[str, Any] = {
    "_name_or_path": "openai/whisper-tiny",
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "architectures": ["WhisperForConditionalGeneration"],
    "attention_dropout": 0.0,
    "begin_suppress_tokens": [7, 2],
    "bos_token_id": 2,
    "d_model": 36,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 47,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 5,
    "dropout": 0.0,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 53,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 3,
    "eos_token_id": 2,
    "forced_decoder_ids": [[1, 50], [2, 51], [3, 52]],
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_length": 40,
    "max_source_positions": 25,
    "max_target_positions": 40,
    "model_type": "whisper",
    "num_hidden_layers": 3,
    "num_mel_bins": 11,
    "pad_token_id": 2,
    "scale_embedding": False,
    "suppress_tokens": [1, 7, 8, 9],
    "torch_dtype": "float32",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 61,
}
ENCODER_KEYS = (
    "embed_positions.weight",
    *(f"{part}.{leaf}" for part in ("conv1", "conv2", "layer_norm") for leaf in ("bias", "weight")),
    *(
        f"layers.{i}.{part}.{leaf}"
        for i in range(3)
        for part in ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2", "self_attn.q_proj", "self_attn.v_proj")
        for leaf in ("bias", "weight")
    ),
    *(
        f"layers.{i}.self_attn.{leaf}"
        for i in range(3)
        for leaf in ("k_proj.weight", "out_proj.bias", "out_proj.weight")
    ),
)
DECODER_KEYS = (
    "embed_positions.weight",
    "embed_tokens.weight",
    "layer_norm.bias",
    "layer_norm.weight",
    *(
        f"layers.{i}.{part}.{leaf}"
        for i in range(2)
        for part in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "fc1", "fc2")
        for leaf in ("bias", "weight")
    ),
    *(
        f"layers.{i}.{part}.{leaf}"
        for i in range(2)
        for part in ("self_attn", "encoder_attn")
        for leaf in (
            "k_proj.weight",
            *(f"{name}_proj.{end}" for name in ("q", "v", "out") for end in ("bias", "weight")),
        )
    ),
)

CHECKPOINTS = (
    # Files of 2022 repeat the table of words under the output's name.
    Case(
        "old_names",
        "WhisperForConditionalGeneration",
        CONFIG_2022,
        PAIR,
        ("logits",),
        literal_config=True,
        copies={"proj_out.weight": "model.decoder.embed_tokens.weight"},
    ),
    # A head put on a base model; the decoder, and the encoder, out of a whole model's file.
    Case(
        "head_on_base_model",
        "WhisperForConditionalGeneration",
        SIZES,
        PAIR,
        ("logits",),
        writer="WhisperModel",
    ),
    Case(
        "decoder_of_a_model",
        "WhisperForCausalLM",
        SIZES,
        TEXT,
        ("logits",),
        writer="WhisperForConditionalGeneration",
        unexpected=tuple(f"model.encoder.{key}" for key in ENCODER_KEYS),
    ),
    Case(
        "encoder_of_a_model",
        "WhisperForAudioClassification",
        SIZES,
        SOUND,
        ("hidden_states",),
        {"output_hidden_states": True},
        writer="WhisperForConditionalGeneration",
        missing=("classifier.bias", "classifier.weight", "projector.bias", "projector.weight"),
        unexpected=tuple(f"decoder.{key}" for key in DECODER_KEYS),
    ),
)

CASES = HEADS + INPUTS + CONFIGS + CHECKPOINTS


# ---- mistakes that the cases above must show -------------------------------------------------------------------------


def _labels_as_the_end(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    given = inputs["labels"]
    shifted = np.concatenate([np.full_like(given[:, :1], 5), given[:, :-1]], axis=1)
    inputs["decoder_input_ids"] = np.where(shifted == -100, 2, shifted)


def _start_with_the_end(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    _labels_as_the_end(config, tensors, inputs)
    inputs["decoder_input_ids"] = np.where(inputs["labels"] == -100, 3, inputs["decoder_input_ids"])
    inputs["decoder_input_ids"][:, 0] = 2


def _qkv(part: str, layers: int, *kinds: str) -> tuple[str, ...]:
    leaves = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias")
    return tuple(f"{part}.layers.{i}.{kind}.{leaf}" for i in range(layers) for kind in kinds for leaf in leaves)


WHOLE = ("model", "act_relu")
WORDS = ("conditional_generation", "conditional_generation_of_ids", "untied")
LABELLED = ("audio_classification", "audio_classification_weighted")
ENCODERS = (*WHOLE, *WORDS, *LABELLED)
DECODERS = (*WHOLE, *WORDS, "causal_lm", "causal_lm_cross")
EVERY = (*ENCODERS, "causal_lm", "causal_lm_cross")


def _of_decoder(name: str, apply: Any, *, cases: tuple[str, ...] = DECODERS) -> tuple[Bug, ...]:
    """A mistake that leaves the encoder as it is."""
    whole = tuple(case for case in cases if case in (*WHOLE, "head_masks"))
    words = tuple(case for case in cases if case not in whole)
    outputs = {whole: ("last_hidden_state",), words: ("logits",)}
    return tuple(Bug(name, given, apply, outputs=judged) for given, judged in outputs.items() if given)


BUGS = (
    Bug("positions of the encoder forgotten", ENCODERS, zero("encoder.embed_positions.weight")),
    *_of_decoder("positions of the decoder forgotten", zero("decoder.embed_positions.weight")),
    *_of_decoder(
        "positions off by one",
        change(lambda w: np.roll(w, 1, 0), "decoder.embed_positions.weight"),
    ),
    *_of_decoder(
        "position_ids ignored",
        change_input("decoder_position_ids", lambda p: np.arange(U)[None] + 0 * p),
        cases=("conditional_generation_of_ids",),
    ),
    Bug("convolutions flipped", ENCODERS, change(lambda w: w[:, :, ::-1], "conv1.weight", "conv2.weight")),
    Bug("square convolution not transposed", ENCODERS, change(lambda w: w.swapaxes(0, 1), "conv2.weight")),
    # 0, 2, 4, ... against 1, 3, 5, ...
    Bug("the other half of the frames taken", ENCODERS, change_input("input_features", lambda x: np.roll(x, 1, 2))),
    Bug(
        "query and key exchanged",
        EVERY,
        swap("q_proj.weight", "k_proj.weight"),
    ),
    Bug("scores not divided by sqrt(d)", EVERY, change(lambda w: w * 3.0, "q_proj.weight", "q_proj.bias")),
    Bug(
        "heads of the encoder split the wrong way round",
        ENCODERS,
        change(heads_last(4), *_qkv("encoder", 3, "self_attn")),
    ),
    *_of_decoder(
        "heads of the decoder split the wrong way round",
        change(heads_last(3), *_qkv("decoder", 2, "self_attn", "encoder_attn")),
    ),
    Bug(
        "the encoder has the decoder's heads",
        tuple(name for name in ENCODERS if name != "audio_classification"),
        configure(encoder_attention_heads=3),
    ),
    *_of_decoder(
        "the decoder has the encoder's heads",
        configure(decoder_attention_heads=4),
        cases=tuple(name for name in DECODERS if name != "causal_lm_cross"),
    ),
    Bug("square kernels not transposed", EVERY, change(np.transpose, "v_proj.weight")),
    Bug("norms of a layer exchanged", EVERY, swap("self_attn_layer_norm.weight", "final_layer_norm.weight")),
    Bug("bias of the last norm forgotten", EVERY, zero("coder.layer_norm.bias")),
    *_of_decoder(
        "cross-attention's norm taken for its own",
        swap("encoder_attn_layer_norm.weight", "self_attn_layer_norm.weight"),
    ),
    # The two curves are within 5e-4 of each other everywhere.
    Bug(
        "gelu by tanh instead of erf",
        tuple(name for name in EVERY if name not in ("act_relu", *LABELLED)),
        configure(activation_function="gelu_new"),
        least=2e-4,
    ),
    Bug("gelu for every activation", ("act_relu",), configure(activation_function="gelu")),
    # With inputs a thousand times as large the epsilon is none.
    Bug(
        "epsilon forgotten",
        ("tiny_inputs",),
        both(
            change_input("decoder_inputs_embeds", lambda x: 1000 * x),
            change(lambda w: 1000 * w, "decoder.embed_positions.weight"),
        ),
        outputs=("last_hidden_state",),
    ),
    *_of_decoder(
        "decoder's padding attended to",
        change_input("decoder_attention_mask", np.ones_like),
        cases=(*WHOLE, "conditional_generation_of_ids", "untied"),
    ),
    *_of_decoder(
        "padding of the decoder alone attended to",
        change_input("attention_mask", np.ones_like),
        cases=("causal_lm_cross",),
    ),
    *_of_decoder(
        "decoder not causal",
        not_causal,
        cases=("model", "untied", "causal_lm", "causal_lm_cross"),
    ),
    *_of_decoder("cross-attention left out", zero("encoder_attn.out_proj.weight"), cases=("model", "causal_lm_cross")),
    *_of_decoder("labels that do not count read as the end", _labels_as_the_end, cases=("conditional_generation",)),
    *_of_decoder("decoder starts with the end", _start_with_the_end, cases=("conditional_generation",)),
    *_of_decoder(
        "words scaled", change(lambda w: w * 6.0, "embed_tokens.weight"), cases=("conditional_generation_of_ids",)
    ),
    Bug("layers weighed alike", ("audio_classification_weighted",), zero("layer_weights")),
    Bug(
        "layers weighed by each other's weights",
        ("audio_classification_weighted",),
        change(lambda w: np.roll(w, 1), "layer_weights"),
    ),
    Bug("head masks ignored", ("head_masks", "audio_classification"), change_input("head_mask", np.ones_like)),
    *_of_decoder(
        "head masks of the decoder ignored", change_input("decoder_head_mask", np.ones_like), cases=("head_masks",)
    ),
    *_of_decoder(
        "head masks of own and cross-attention exchanged", swap_head_masks, cases=("head_masks", "causal_lm_cross")
    ),
    *_of_decoder(
        "head masks of layers exchanged",
        change_input("cross_attn_head_mask", lambda m: m[::-1]),
        cases=("head_masks", "causal_lm_cross"),
    ),
    *_of_decoder(
        "the output read from the table of words",
        change(lambda w: w[::-1], "proj_out.weight"),
        cases=("untied", "causal_lm_untied"),
    ),
    ignored_labels_count("conditional_generation_of_ids", "causal_lm"),
    labels_off_by_one("conditional_generation_of_ids", "causal_lm", least=5e-3),
)

# Losses of the next word whose labels are not shifted.
UNSHIFTED = ("WhisperForCausalLM",)
# What the shape of the inputs depends on.
KEPT = ("num_mel_bins", "max_source_positions", "use_weighted_layer_sum")

INVISIBLE = ()
