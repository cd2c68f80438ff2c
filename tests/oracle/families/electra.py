"""ELECTRA: narrow word vectors, generator and discriminator, heads over summaries; the rest is BERT's."""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    answers_cut_off,
    causal_lm,
    change,
    change_input,
    configure,
    floats,
    heads_last,
    ids,
    ignored_labels_count,
    label_heads,
    labels_off_by_one,
    masked_lm,
    swap,
    text,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 53,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
    "layer_norm_eps": 0.05,
    "embedding_size": 20,
}
DECODER = SIZES | {"is_decoder": True}
PADDED = text("padded", 25, 17, segments=3)
CHOICES = text("choices", 25, 20, 9, 13, 25, 17, segments=3)
REPLACED = {"labels": ids("replaced", 2, T, low=0, high=2)}

CASES = (
    Case("model", "ElectraModel", SIZES, PADDED, ("last_hidden_state",)),
    Case(
        "traces",
        "ElectraModel",
        SIZES,
        text("traces", 25, segments=3),
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
    # Padding does not count, where the mask says what is padding.
    Case("pre_training", "ElectraForPreTraining", SIZES, PADDED | REPLACED, ("loss", "logits")),
    Case(
        "pre_training_without_mask",
        "ElectraForPreTraining",
        SIZES | {"hidden_act": "relu"},
        {"input_ids": PADDED["input_ids"]} | REPLACED,
        ("loss", "logits"),
    ),
    masked_lm("Electra", SIZES | {"hidden_act": "relu"}, PADDED),
    causal_lm("Electra", DECODER, text("left", 25, 18, left=True, segments=3)),
    *label_heads("Electra", SIZES, PADDED, CHOICES),
    # Word vectors as wide as the states are not projected, and inputs_embeds are vectors of words.
    Case(
        "inputs_embeds",
        "ElectraModel",
        SIZES | {"embedding_size": 36},
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": PADDED["attention_mask"]},
        ("last_hidden_state",),
    ),
    Case(
        "summary_of_last",
        "ElectraForMultipleChoice",
        SIZES | {"summary_type": "last", "summary_activation": None},
        {name: rows.reshape(2, 3, T) for name, rows in CHOICES.items()},
        ("logits",),
    ),
    Case("untied", "ElectraForMaskedLM", SIZES | {"tie_word_embeddings": False}, PADDED, ("logits",)),
)

HEADS = ("model", "pre_training", "masked_lm", "sequence_classification", "multiple_choice", "token_classification")
QKV = tuple(f"self.{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weight", "bias"))

BUGS = (
    Bug("positions forgotten", HEADS, zero("position_embeddings.weight")),
    Bug("segments forgotten", HEADS, zero("token_type_embeddings.weight")),
    Bug("query and key exchanged", HEADS, swap("self.query", "self.key", "weight", "bias")),
    Bug("heads split the wrong way round", HEADS, change(heads_last(SIZES["num_attention_heads"]), *QKV)),
    Bug("square kernels not transposed", HEADS, change(np.transpose, "self.value.weight")),
    Bug("layer_norm_eps 1e-12 hard-coded", HEADS, configure(layer_norm_eps=1e-12)),
    Bug("padding attended to", HEADS[:4], change_input("attention_mask", np.ones_like)),
    Bug("decoder not causal", ("causal_lm",), configure(is_decoder=False)),
    Bug("first state instead of the last", ("summary_of_last",), configure(summary_type="first")),
    Bug("summary without its activation", ("multiple_choice",), configure(summary_activation=None)),
    Bug("activation of the discriminator fixed", ("pre_training_without_mask",), configure(hidden_act="gelu")),
    Bug("replaced and kept exchanged", ("pre_training",), change_input("labels", lambda y: 1 - y), outputs=("loss",)),
    ignored_labels_count("masked_lm", "causal_lm", "token_classification"),
    labels_off_by_one("masked_lm", "causal_lm"),
    answers_cut_off("question_answering"),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.self\.key\.bias$",)
