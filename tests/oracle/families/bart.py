"""BART: five heads, an encoder and a decoder of different shapes, shifted inputs, three head masks, old checkpoints.

Sizes are asymmetric on purpose: 3 layers of 4 heads of 9 read, 2 layers of 3 heads of 12 write; texts of 25 tokens
become texts of 27. The decoder's first token, the end of a text and padding are three different tokens. The epsilon of
the norms is a constant of the reference, so a case with tiny inputs shows it.
"""

from typing import Any

import numpy as np

from oracle.bart_line import INSIDE, LEFT, MEMORY, PADDED, PAIR, SEEN, SIZES, WRITTEN, shifted, text
from oracle.cases import (
    TRACES,
    VOCAB,
    Array,
    T,
    Tensors,
    U,
    answers_cut_off,
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

# The state at the last end-of-text token is classified: two in every row, in different places.
ENDED = {
    "input_ids": PADDED["input_ids"].copy(),
    "attention_mask": PADDED["attention_mask"],
}
ENDED["input_ids"][[0, 0, 1, 1], [9, 24, 5, 16]] = SIZES["eos_token_id"]
STATES = floats("encoder_outputs", 1, 2, 13, 36)  # the reference takes a tuple, of which this array is the first

# ---- the five heads, each with its loss ------------------------------------------------------------------------------

HEADS = (
    Case("model", "BartModel", SIZES, PAIR, SEEN),
    # The decoder reads the labels, shifted by one, and padding for those that do not count.
    Case(
        "conditional_generation",
        "BartForConditionalGeneration",
        SIZES,
        PADDED | {"labels": labels("conditional_generation", VOCAB, mask(U, 20, width=U))},
        ("loss", "logits", "encoder_last_hidden_state"),
    ),
    Case(
        "conditional_generation_of_ids",
        "BartForConditionalGeneration",
        SIZES,
        PAIR | {"labels": labels("conditional_generation_of_ids", VOCAB, WRITTEN["decoder_attention_mask"])},
        ("loss", "logits"),
    ),
    Case(
        "sequence_classification",
        "BartForSequenceClassification",
        SIZES,
        ENDED | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    Case(
        "question_answering",
        "BartForQuestionAnswering",
        SIZES,
        PADDED | {"start_positions": np.array([4, 9]), "end_positions": np.array([11, 300])},
        ("loss", "start_logits", "end_logits"),
    ),
    # The decoder alone, which passes over its cross-attention; its labels are not shifted, unlike other models'.
    Case(
        "causal_lm",
        "BartForCausalLM",
        SIZES,
        PADDED | {"labels": labels("causal_lm", VOCAB, PADDED["attention_mask"])},
        ("loss", "logits"),
    ),
    # Positions are not shifted for left padding: the first real token of a padded row is not at position 0.
    Case(
        "causal_lm_cross",
        "BartForCausalLM",
        SIZES,
        LEFT
        | MEMORY
        | {
            "head_mask": np.array([[1, 0, 1], [0.5, 1, 0.25]], np.float32),
            "cross_attn_head_mask": np.array([[0, 1, 1], [1, 0.75, 0.5]], np.float32),
        },
        ("logits",),
    ),
    # With the states given, the ids only say where the texts end.
    Case(
        "sequence_regression",
        "BartForSequenceClassification",
        SIZES | {"num_labels": 1},
        {"input_ids": ENDED["input_ids"], "encoder_outputs": STATES, "labels": floats("sequence_regression", 2)},
        ("loss", "logits"),
    ),
)

# ---- what can be passed in -------------------------------------------------------------------------------------------

INPUTS = (
    # Only token ids, as many as there are positions: the decoder reads the same text, shifted.
    Case("ids_only", "BartModel", SIZES, {"input_ids": ids("ids_only", 1, 40)}, SEEN),
    Case(
        "inputs_embeds",
        "BartModel",
        SIZES | {"scale_embedding": True},  # which scales the vectors of the table, not those that are given
        {
            "inputs_embeds": floats("inputs_embeds", 2, T, 36),
            "attention_mask": PADDED["attention_mask"],
            "decoder_inputs_embeds": floats("decoder_inputs_embeds", 2, U, 36),
            "decoder_attention_mask": WRITTEN["decoder_attention_mask"],
        },
        SEEN,
    ),
    # The padding mask of the encoder's states is the one of the text.
    Case(
        "encoder_outputs",
        "BartForConditionalGeneration",
        SIZES,
        WRITTEN | {"encoder_outputs": STATES, "attention_mask": mask(13, 8, width=13)},
        ("logits",),
    ),
    Case(
        "head_masks",
        "BartModel",
        SIZES,
        PAIR
        | {
            "head_mask": np.array([[1, 0, 0.5, 1], [0, 1, 1, 0.25], [0.75, 1, 0, 1]], np.float32),
            "decoder_head_mask": np.array([[1, 0, 1], [0.5, 1, 0.25]], np.float32),
            "cross_attn_head_mask": np.array([[0, 1, 1], [1, 0.75, 0.5]], np.float32),
        },
        SEEN,
    ),
    Case(
        "traces",
        "BartModel",
        SIZES,
        text("traces", 13) | {"decoder_input_ids": ids("traces", 1, 15)},
        (*SEEN, *INSIDE, "cross_attentions"),
        TRACES,
    ),
    Case(
        "traces_of_a_decoder",
        "BartForCausalLM",
        SIZES,
        text("traces_of_a_decoder", 15) | {"encoder_hidden_states": MEMORY["encoder_hidden_states"][:1]},
        ("logits", "hidden_states", "attentions", "cross_attentions"),
        TRACES,
    ),
    # Vectors so small that the epsilon of the first norms, 1e-5, is what they are measured against.
    Case(
        "tiny_inputs",
        "BartModel",
        SIZES,
        {
            "inputs_embeds": 0.002 * floats("tiny.inputs_embeds", 1, T, 36),
            "decoder_inputs_embeds": 0.002 * floats("tiny.decoder_inputs_embeds", 1, U, 36),
        },
        SEEN,
        buffers={
            "encoder.embed_positions.weight": 0.002 * floats("tiny.encoder.positions", 42, 36),
            "decoder.embed_positions.weight": 0.002 * floats("tiny.decoder.positions", 42, 36),
        },
    ),
)

# ---- what a configuration can ask for --------------------------------------------------------------------------------

CONFIGS = (
    Case(
        "scaled",
        "BartForConditionalGeneration",
        SIZES | {"scale_embedding": True},
        PAIR,
        ("logits", "encoder_last_hidden_state"),
    ),
    # The reference counts the layers of its cache by the encoder's, so a deeper decoder only runs without one.
    Case(
        "deeper_decoder",
        "BartForConditionalGeneration",
        SIZES | {"encoder_layers": 1, "output_hidden_states": True},
        text("deeper_decoder", 21) | written("deeper_decoder", 1),
        ("logits", "decoder_hidden_states"),
        {"use_cache": False},
    ),
    Case("act_relu", "BartModel", SIZES | {"activation_function": "relu"}, LEFT | WRITTEN, SEEN),
    # Untied, the reference has three tables of words, of which it never reads the one that is called shared.
    Case(
        "untied",
        "BartForConditionalGeneration",
        SIZES | {"tie_word_embeddings": False},
        PAIR,
        ("logits", "encoder_last_hidden_state"),
        buffers={
            "model.encoder.embed_tokens.weight": 0.5 * floats("untied.encoder", VOCAB, 36),
            "model.decoder.embed_tokens.weight": 0.5 * floats("untied.decoder", VOCAB, 36),
        },
    ),
    Case(
        "causal_lm_untied",
        "BartForCausalLM",
        SIZES | {"tie_word_embeddings": False, "scale_embedding": True},
        PADDED,
        ("logits",),
    ),
)

# ---- checkpoints as they are found -----------------------------------------------------------------------------------

# As facebook/bart-large-cnn has it, sizes aside: switches of the first code, settings of the generation.
CONFIG_2020: dict[str, Any] = {
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["BartForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "classifier_dropout": 0.0,
    "d_model": 36,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 47,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "early_stopping": True,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 53,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 3,
    "eos_token_id": 2,
    "extra_pos_embeddings": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "length_penalty": 2.0,
    "max_length": 142,
    "max_position_embeddings": 40,
    "min_length": 56,
    "model_type": "bart",
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "normalize_embedding": True,
    "num_beams": 4,
    "num_hidden_layers": 3,
    "output_past": True,
    "pad_token_id": 1,
    "prefix": " ",
    "scale_embedding": False,
    "static_position_embeddings": False,
    "task_specific_params": {"summarization": {"length_penalty": 2.0, "max_length": 142, "num_beams": 4}},
    "vocab_size": 61,
}
TABLES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
VERSIONS = {f"model.{part}.version": np.array([3.0], np.float32) for part in ("encoder", "decoder")}
CROSS_PARTS = ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2")
ENCODER_KEYS = (
    *(f"model.encoder.embed_positions.{leaf}" for leaf in ("weight",)),
    *(f"model.encoder.layernorm_embedding.{leaf}" for leaf in ("bias", "weight")),
    *(
        f"model.encoder.layers.{i}.{part}.{leaf}"
        for i in range(3)
        for part in (*CROSS_PARTS, *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")))
        for leaf in ("bias", "weight")
    ),
)

CHECKPOINTS = (
    # Files of 2020 repeat the table under every name that uses it, and number their format.
    Case(
        "old_names",
        "BartForConditionalGeneration",
        CONFIG_2020,
        PAIR,
        ("logits",),
        literal_config=True,
        copies=dict.fromkeys(TABLES, "model.shared.weight"),
        buffers=VERSIONS,
    ),
    # Some files hold the table under the decoder's name alone.
    Case(
        "table_of_the_decoder",
        "BartForConditionalGeneration",
        SIZES,
        PAIR,
        ("logits",),
        rename=(("model.shared.", "model.decoder.embed_tokens."),),
    ),
    # The base model out of a file with a head, and a head put on a base model.
    Case(
        "base_of_a_head",
        "BartModel",
        SIZES,
        PAIR,
        SEEN,
        writer="BartForConditionalGeneration",
        unexpected=("final_logits_bias",),
    ),
    Case(
        "head_on_base_model",
        "BartForConditionalGeneration",
        SIZES,
        PAIR,
        ("logits",),
        writer="BartModel",
    ),
    # The decoder out of a whole model's file. The reference only finds the table under the decoder's own name.
    Case(
        "decoder_of_a_model",
        "BartForCausalLM",
        SIZES,
        PADDED | MEMORY,
        ("logits",),
        writer="BartForConditionalGeneration",
        rename=(("model.shared.", "model.decoder.embed_tokens."),),
        unexpected=("final_logits_bias", *ENCODER_KEYS),
    ),
)

CASES = HEADS + INPUTS + CONFIGS + CHECKPOINTS


# ---- mistakes that the cases above must show -------------------------------------------------------------------------


def _not_shifted(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    inputs["decoder_input_ids"] = inputs["input_ids"].copy()


def _first_end(input_ids: Array) -> Array:
    """Drops the last end-of-text token of every row."""
    out = input_ids.copy()
    for row in out:
        row[np.flatnonzero(row == 2)[-1]] = 9
    return out


WHOLE = ("model", "conditional_generation", "conditional_generation_of_ids", "act_relu")
LAYERS = (*WHOLE, "sequence_classification", "question_answering")
EVERY = (*LAYERS, "causal_lm", "causal_lm_cross")
ENCODER_QKV = tuple(
    f"encoder.layers.{i}.self_attn.{x}_proj.{y}" for i in (0, 1, 2) for x in "qkv" for y in ("weight", "bias")
)
DECODER_QKV = tuple(
    f"decoder.layers.{i}.{kind}.{x}_proj.{y}"
    for i in (0, 1)
    for kind in ("self_attn", "encoder_attn")
    for x in "qkv"
    for y in ("weight", "bias")
)


def _of_decoder(name: str, apply: Any, *, cases: tuple[str, ...] = EVERY) -> tuple[Bug, ...]:
    """A mistake that leaves the encoder as it is."""
    whole = tuple(case for case in cases if case in ("model", "act_relu", "ids_only", "head_masks"))
    words = tuple(case for case in cases if case.startswith("conditional_generation"))
    rest = tuple(case for case in cases if case not in (*whole, *words))
    outputs = {whole: ("last_hidden_state",), words: ("logits",), rest: ()}
    return tuple(Bug(name, given, apply, outputs=judged) for given, judged in outputs.items() if given)


BUGS = (
    Bug("positions forgotten", EVERY, zero("embed_positions.weight")),
    Bug("positions not offset by 2", EVERY, change(lambda w: np.roll(w, 2, 0), "embed_positions.weight")),
    Bug("bias of the first norm forgotten", EVERY, zero("layernorm_embedding.bias")),
    Bug(
        "query and key exchanged",
        EVERY,
        swap("q_proj", "k_proj", "weight", "bias"),
    ),
    Bug("scores not divided by sqrt(d)", EVERY, change(lambda w: w * 3.0, "q_proj.weight", "q_proj.bias")),
    Bug("heads of the encoder split the wrong way round", LAYERS, change(heads_last(4), *ENCODER_QKV)),
    *_of_decoder("heads of the decoder split the wrong way round", change(heads_last(3), *DECODER_QKV)),
    Bug("the encoder has the decoder's heads", LAYERS, configure(encoder_attention_heads=3)),
    *_of_decoder(
        "the decoder has the encoder's heads", configure(decoder_attention_heads=4), cases=(*LAYERS, "causal_lm")
    ),
    Bug("square kernels not transposed", EVERY, change(np.transpose, "v_proj.weight")),
    Bug("norms of a layer exchanged", EVERY, swap("self_attn_layer_norm.weight", "final_layer_norm.weight")),
    *_of_decoder(
        "cross-attention's norm taken for its own",
        swap("encoder_attn_layer_norm.weight", "self_attn_layer_norm.weight"),
        cases=LAYERS,
    ),
    # The two curves are within 5e-4 of each other everywhere.
    Bug(
        "gelu by tanh instead of erf",
        tuple(name for name in EVERY if name != "act_relu"),
        configure(activation_function="gelu_new"),
        least=2e-4,
    ),
    Bug("gelu for every activation", ("act_relu",), configure(activation_function="gelu")),
    # With inputs a thousand times as large the epsilon is none.
    Bug(
        "epsilon forgotten",
        ("tiny_inputs",),
        both(
            change_input("inputs_embeds", lambda x: 1000 * x),
            change_input("decoder_inputs_embeds", lambda x: 1000 * x),
            change(lambda w: 1000 * w, "embed_positions.weight"),
        ),
    ),
    Bug(
        "padding attended to",
        tuple(name for name in EVERY if name != "causal_lm"),
        change_input("attention_mask", np.ones_like),
    ),
    Bug("padding of the states attended to", ("encoder_outputs",), change_input("attention_mask", np.ones_like)),
    Bug(
        "padding of the states attended to", ("causal_lm_cross",), change_input("encoder_attention_mask", np.ones_like)
    ),
    *_of_decoder(
        "decoder's padding attended to",
        change_input("decoder_attention_mask", np.ones_like),
        cases=("model", "act_relu", "conditional_generation_of_ids"),
    ),
    *_of_decoder(
        "decoder not causal",
        not_causal,
        cases=("model", "conditional_generation_of_ids", "causal_lm", "causal_lm_cross"),
    ),
    Bug("cross-attention left out", ("causal_lm_cross",), zero("encoder_attn.out_proj.weight")),
    *_of_decoder(
        "decoder reads the text as it is",
        _not_shifted,
        cases=("ids_only", "question_answering", "sequence_classification"),
    ),
    Bug(
        "decoder starts with the end",
        ("question_answering", "sequence_classification"),
        shifted(2, name="input_ids"),
    ),
    Bug(
        "labels that do not count read as the end",
        ("conditional_generation",),
        shifted(5, pad=2),
        outputs=("logits",),
    ),
    Bug("words not scaled", ("scaled", "causal_lm_untied"), configure(scale_embedding=False)),
    Bug(
        "given vectors scaled, too",
        ("inputs_embeds",),
        both(
            change_input("inputs_embeds", lambda x: 6 * x),
            change_input("decoder_inputs_embeds", lambda x: 6 * x),
        ),
    ),
    Bug(
        "final_logits_bias forgotten",
        ("conditional_generation", "scaled", "untied"),
        zero("final_logits_bias"),
        outputs=("logits",),
    ),
    Bug("the first end classified", ("sequence_regression",), change_input("input_ids", _first_end)),
    Bug("head masks ignored", ("head_masks",), change_input("head_mask", np.ones_like)),
    *_of_decoder(
        "head masks of the decoder ignored",
        change_input("decoder_head_mask", np.ones_like),
        cases=("head_masks",),
    ),
    *_of_decoder(
        "head masks of own and cross-attention exchanged", swap_head_masks, cases=("head_masks", "causal_lm_cross")
    ),
    *_of_decoder(
        "head masks of layers exchanged",
        change_input("cross_attn_head_mask", lambda m: m[::-1]),
        cases=("head_masks", "causal_lm_cross"),
    ),
    Bug(
        "tables of encoder and decoder exchanged",
        ("untied",),
        swap("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    Bug(
        "the output read from the decoder's table",
        ("untied", "causal_lm_untied"),
        swap("lm_head.weight", "model.decoder.embed_tokens.weight"),
        outputs=("logits",),
    ),
    ignored_labels_count("conditional_generation_of_ids", "causal_lm"),
    labels_off_by_one("conditional_generation_of_ids", "causal_lm", least=5e-3),
    answers_cut_off("question_answering"),
)

# Losses of the next word whose labels are not shifted.
UNSHIFTED = ("BartForCausalLM",)

# A bias that is zero where a file lacks it, without a word.
SILENT = (r"^final_logits_bias$",)
# Tensors that are saved under another name than they were read from: (new, old), without the prefix.
MOVED = {"shared.weight": "decoder.embed_tokens.weight"}

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.k_proj\.bias$",)
