"""T5: six heads, bucketed distances, unscaled scores, tied and untied outputs, and checkpoints of every age.

Sizes are asymmetric on purpose: 4 heads of 7 on a size of 36, three decoder layers to two of the encoder, buckets so
few and distances so short that a text of 25 tokens meets every kind of bucket, one row padded. `layer_norm_epsilon` is
large enough that a hard-coded one shows. Where the reference is odd, the case says so.
"""

from functools import partial
from typing import Any

import numpy as np

from oracle import cases
from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    Tensors,
    answers_cut_off,
    change,
    change_input,
    configure,
    ending,
    floats,
    ids,
    ignored_labels_count,
    labels,
    mask,
    question_answering,
    swap,
    token_classification,
    zero,
)
from oracle.families import Bug, Case

# Tokens that the decoder reads: another number than the encoder's.
D = 19

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 36,
    "d_kv": 7,
    "d_ff": 53,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 11,
    "layer_norm_epsilon": 0.05,
    "decoder_start_token_id": 0,
}
V1_1 = SIZES | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
EOS = 1
text = partial(cases.text, low=2)


def answer(name: str, rows: int, length: int = D) -> Tensors:
    """Returns what the decoder reads: a start token and `length - 1` others."""
    tokens = ids(f"{name}.decoder_input_ids", rows, length, low=2)
    tokens[:, 0] = SIZES["decoder_start_token_id"]
    return {"decoder_input_ids": tokens}


def ended(inputs: Tensors) -> Tensors:
    """Returns the text with two end tokens in every row; of each row the last one counts."""
    tokens = inputs["input_ids"].copy()
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        tokens[row, [6 + row, length - 1]] = EOS
    return inputs | {"input_ids": tokens}


PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)
ANSWER = answer("answer", 2)
# A hole in the first row, padding in the second.
ANSWER_MASK = mask(19, 12, width=D)
ANSWER_MASK[0, 4:6] = 0

# ---- the six heads, each with its loss ------------------------------------------------------------------------------

HEADS = (
    Case("model", "T5Model", SIZES, PADDED | ANSWER, ("last_hidden_state", "encoder_last_hidden_state")),
    # The labels are not shifted: the decoder's input is.
    Case(
        "conditional_generation",
        "T5ForConditionalGeneration",
        SIZES,
        PADDED | ANSWER | {"labels": labels("conditional_generation", 61, mask(19, 15, width=D))},
        ("loss", "logits"),
    ),
    Case("encoder", "T5EncoderModel", SIZES, PADDED, ("last_hidden_state",)),
    # The decoder reads the text itself, shifted, and the label is read off the last end token of the text.
    Case(
        "sequence_classification",
        "T5ForSequenceClassification",
        SIZES | {"num_labels": 3},
        ended(PADDED) | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    # The encoder alone.
    token_classification("T5", SIZES, PADDED),
    # The decoder reads the text itself, shifted. The second answer ends beyond the text and does not count.
    question_answering("T5", SIZES, PADDED),
)

# ---- what can be passed in ------------------------------------------------------------------------------------------

INPUTS = (
    # Distances do not mind where a text begins.
    Case("left_padded", "T5Model", SIZES, LEFT | ANSWER, ("last_hidden_state",)),
    Case(
        "ids_only",
        "T5Model",
        SIZES,
        {"input_ids": ids("ids_only", 1, T, low=2)} | answer("ids_only", 1),
        ("last_hidden_state",),
    ),
    Case(
        "decoder_mask",
        "T5Model",
        SIZES,
        PADDED | ANSWER | {"decoder_attention_mask": ANSWER_MASK},
        ("last_hidden_state",),
    ),
    Case(
        "inputs_embeds",
        "T5Model",
        SIZES,
        {
            "inputs_embeds": floats("inputs_embeds", 2, T, 36),
            "attention_mask": PADDED["attention_mask"],
            "decoder_inputs_embeds": floats("decoder_inputs_embeds", 2, D, 36),
        },
        ("last_hidden_state",),
    ),
    # A tuple of one array, as far as the reference can tell; its mask is the encoder's.
    Case(
        "encoder_outputs",
        "T5ForConditionalGeneration",
        SIZES,
        {"encoder_outputs": floats("encoder_outputs", 1, 2, 13, 36), "attention_mask": mask(13, 8, width=13)} | ANSWER,
        ("logits",),
    ),
    # The decoder's input is made of the labels: shifted right, with padding where they are ignored.
    Case(
        "labels_only",
        "T5ForConditionalGeneration",
        SIZES | {"decoder_start_token_id": 5, "pad_token_id": 3},
        text("labels_only", 25) | {"labels": labels("labels_only", 61, mask(19, width=D))},
        ("loss", "logits"),
    ),
    # What the decoder reads may be given to the heads that make it of the text.
    Case(
        "question_answering_decoder",
        "T5ForQuestionAnswering",
        SIZES,
        PADDED | ANSWER,
        ("start_logits", "end_logits"),
    ),
    # The last of the hidden states is normed, as `last_hidden_state` is.
    Case(
        "traces",
        "T5ForConditionalGeneration",
        SIZES,
        {"input_ids": ids("traces", 1, 15, low=2)} | answer("traces", 1, 9),
        (
            "logits",
            "encoder_last_hidden_state",
            "encoder_hidden_states",
            "encoder_attentions",
            "decoder_hidden_states",
            "decoder_attentions",
            "cross_attentions",
        ),
        TRACES,
    ),
    Case(
        "traces_of_the_encoder",
        "T5EncoderModel",
        SIZES,
        {"input_ids": ids("traces_of_the_encoder", 1, 15, low=2)},
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
)

# ---- what a configuration can ask for -------------------------------------------------------------------------------

CONFIGS = (
    # T5 1.1: gated, the output has words of its own and is not scaled down.
    Case("gated_untied", "T5ForConditionalGeneration", V1_1, PADDED | ANSWER, ("logits",)),
    Case(
        "gated_tied", "T5ForConditionalGeneration", V1_1 | {"tie_word_embeddings": True}, PADDED | ANSWER, ("logits",)
    ),
    Case("untied", "T5ForConditionalGeneration", SIZES | {"tie_word_embeddings": False}, PADDED | ANSWER, ("logits",)),
    # `gated-gelu` is by tanh; every other name means what it means elsewhere.
    *(
        Case(
            f"act_{act.replace('-', '_')}",
            "T5EncoderModel",
            SIZES | {"feed_forward_proj": act},
            text(f"act_{act}", 24),
            ("last_hidden_state",),
        )
        for act in ("gelu", "gated-gelu_new", "gated-silu")
    ),
    # As many layers in the decoder as in the encoder, since nothing else is said.
    Case(
        "as_many_layers",
        "T5Model",
        {key: value for key, value in SIZES.items() if key != "num_decoder_layers"},
        text("as_many_layers", 25) | answer("as_many_layers", 1),
        ("last_hidden_state",),
    ),
    # The published buckets: some of their bounds are whole numbers, where a logarithm may fall on either side.
    Case(
        "published_buckets",
        "T5EncoderModel",
        SIZES | {"num_layers": 1, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
        {"input_ids": ids("published_buckets", 1, 141, low=2)},
        ("last_hidden_state",),
    ),
    # The decoder's own: twice as many on its one side.
    Case(
        "published_buckets_decoder",
        "T5Model",
        SIZES
        | {
            "num_layers": 1,
            "num_decoder_layers": 1,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
        },
        {"input_ids": ids("published_buckets_decoder", 1, 5, low=2)} | answer("published_buckets_decoder", 1, 141),
        ("last_hidden_state",),
    ),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

CONFIG_2020: dict[str, Any] = {
    "architectures": ["T5WithLMHeadModel"],
    "d_ff": 53,
    "d_kv": 7,
    "d_model": 36,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 5,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 12,
    "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
    "vocab_size": 61,
}
DEAD_KEY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
OLD_TEXT = text("old_names", 24) | answer("old_names", 1)

CHECKPOINTS = (
    # As t5-small is on the hub: every copy of the word table, distances of the cross-attention that no code ever read.
    Case(
        "old_names",
        "T5ForConditionalGeneration",
        CONFIG_2020,
        OLD_TEXT,
        ("logits",),
        literal_config=True,
        copies={
            "decoder.embed_tokens.weight": "shared.weight",
            "encoder.embed_tokens.weight": "shared.weight",
            "lm_head.weight": "shared.weight",
        },
        buffers={DEAD_KEY: floats("dead", 12, 5)},
    ),
    # T5 1.1 on the hub: the same copies, and an output that is none.
    Case(
        "old_names_untied",
        "T5ForConditionalGeneration",
        V1_1,
        OLD_TEXT,
        ("logits",),
        copies={"decoder.embed_tokens.weight": "shared.weight", "encoder.embed_tokens.weight": "shared.weight"},
    ),
    # The encoder out of a whole model, as text-to-image models take it; the decoder is passed over without a word.
    Case(
        "encoder_of_whole",
        "T5EncoderModel",
        V1_1,
        text("encoder_of_whole", 24),
        ("last_hidden_state",),
        writer="T5ForConditionalGeneration",
        unexpected=("lm_head.weight",),
    ),
    Case(
        "base_of_generation",
        "T5Model",
        SIZES,
        text("base_of_generation", 24) | answer("base_of_generation", 1),
        ("last_hidden_state",),
        writer="T5ForConditionalGeneration",
        buffers={DEAD_KEY: floats("dead", 12, 4)},
    ),
)

CASES = HEADS + INPUTS + CONFIGS + CHECKPOINTS


# ---- mistakes that the cases above must show ------------------------------------------------------------------------


def _exchange_stacks(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    end = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    one, other = (next(key for key in tensors if key.endswith(f"{stack}.{end}")) for stack in ("encoder", "decoder"))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _swap_heads(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    for key in ending(tensors, ".q.weight", ".k.weight"):
        size = SIZES["d_kv"]
        tensors[key] = tensors[key][np.arange(tensors[key].shape[0]).reshape(size, -1).T.ravel()].copy()


def _shift_ids(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    inputs["decoder_input_ids"] = inputs["input_ids"].copy()


BOTH = ("model", "conditional_generation", "sequence_classification", "question_answering")
ENCODERS = ("encoder", "token_classification")
ALL = BOTH + ENCODERS
BIAS = "relative_attention_bias.weight"

BUGS = (
    Bug("distances forgotten", ALL, zero(BIAS)),
    Bug("before and after exchanged", ENCODERS, change(lambda w: np.roll(w, w.shape[0] // 2, 0), BIAS)),
    Bug("the last buckets merged", ALL, configure(relative_attention_max_distance=128)),
    Bug("distances of encoder and decoder exchanged", BOTH, _exchange_stacks),
    Bug("published distances one longer", ("published_buckets",), configure(relative_attention_max_distance=129)),
    Bug("scores divided by sqrt(d)", ALL, change(lambda w: w / 7**0.5, ".q.weight")),
    Bug("heads split the wrong way round", ALL, _swap_heads),
    Bug("key and value exchanged", ALL, swap(".k.weight", ".v.weight")),
    Bug("layer_norm_epsilon 1e-6 hard-coded", ALL, configure(layer_norm_epsilon=1e-6)),
    Bug("scale of the norm added to one", ALL, change(lambda w: 1 + w, "final_layer_norm.weight")),
    Bug("gate and up exchanged", ("gated_untied", "gated_tied"), swap("wi_0.weight", "wi_1.weight")),
    Bug("gelu instead of relu", ALL, configure(dense_act_fn="gelu")),
    # The two curves are within 5e-4 of each other everywhere.
    Bug(
        "gated gelu by erf instead of tanh",
        ("gated_untied", "gated_tied", "act_gated_gelu_new"),
        configure(dense_act_fn="gelu"),
        least=2e-4,
    ),
    Bug("gelu by tanh instead of erf", ("act_gelu",), configure(dense_act_fn="gelu_new"), least=2e-4),
    Bug("gelu instead of silu", ("act_gated_silu",), configure(dense_act_fn="gelu")),
    Bug(
        "tied output not scaled",
        ("conditional_generation", "gated_tied", "encoder_outputs"),
        change(lambda w: 6 * w, "decoder.final_layer_norm.weight"),
    ),
    Bug("untied output scaled", ("gated_untied", "untied"), change(lambda w: w / 6, "decoder.final_layer_norm.weight")),
    Bug("padding attended to", (*ALL, "left_padded", "encoder_outputs"), change_input("attention_mask", np.ones_like)),
    Bug(
        "decoder's mask ignored",
        ("decoder_mask",),
        change_input("decoder_attention_mask", np.ones_like),
    ),
    Bug("cross-attention left out", (*BOTH[1:], "ids_only"), zero("EncDecAttention.o.weight")),
    Bug("text not shifted for the decoder", ("sequence_classification", "question_answering"), _shift_ids),
    Bug(
        "labels ignored by the decoder",
        ("labels_only",),
        change_input("labels", lambda y: np.where(y < 0, 5, y)),
        outputs=("logits",),
    ),
    Bug("start token taken for padding", ("labels_only",), configure(decoder_start_token_id=3), outputs=("logits",)),
    Bug("ignored labels read as another word", ("labels_only",), configure(pad_token_id=0), outputs=("logits",)),
    ignored_labels_count("conditional_generation", "token_classification", least=1e-3),
    Bug(
        "labels shifted",
        ("conditional_generation",),
        change_input("labels", lambda y: np.roll(y, -1, 1)),
        outputs=("loss",),
    ),
    answers_cut_off("question_answering"),
)

INVISIBLE: tuple[str, ...] = ()

# Of a whole model's checkpoint, the encoder alone leaves the decoder out without a word.
SILENT = (r"^decoder\.",)
