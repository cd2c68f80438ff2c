"""DistilBERT: its names, its heads, half of BERT's inputs; the rest is BERT's."""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    answers_cut_off,
    change,
    change_input,
    configure,
    floats,
    heads_last,
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
    "dim": 36,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 53,
    "max_position_embeddings": 40,
}
PADDED = text("padded", 25, 17)

CASES = (
    Case("model", "DistilBertModel", SIZES, PADDED, ("last_hidden_state",)),
    Case(
        "traces",
        "DistilBertModel",
        SIZES,
        text("traces", 25),
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
    masked_lm("DistilBert", SIZES | {"activation": "relu"}, PADDED),
    *label_heads("DistilBert", SIZES, PADDED, text("choices", 25, 20, 9, 13, 25, 17)),
    Case(
        "inputs_embeds",
        "DistilBertModel",
        SIZES | {"pruned_heads": {1: [0, 2]}},
        {
            "inputs_embeds": floats("inputs_embeds", 2, T, 36),
            "attention_mask": text("left", 25, 18, left=True)["attention_mask"],
        },
        ("last_hidden_state",),
    ),
    # The table of positions is in the file whatever it began as.
    Case("sinusoidal", "DistilBertModel", SIZES | {"sinusoidal_pos_embds": True}, PADDED, ("last_hidden_state",)),
    Case("untied", "DistilBertForMaskedLM", SIZES | {"tie_word_embeddings": False}, PADDED, ("logits",)),
    # As the first checkpoints are: a buffer of positions, and the decoder's kernel beside the table that it repeats.
    Case(
        "old_extra_keys",
        "DistilBertForMaskedLM",
        SIZES,
        PADDED,
        ("logits",),
        copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        buffers={"distilbert.embeddings.position_ids": np.arange(40)[None]},
    ),
)

HEADS = ("model", "masked_lm", "sequence_classification", "token_classification", "question_answering")
QKV = tuple(f"{part}_lin.{leaf}" for part in "qkv" for leaf in ("weight", "bias"))

BUGS = (
    Bug("positions forgotten", (*HEADS, "sinusoidal", "inputs_embeds"), zero("position_embeddings.weight")),
    Bug("query and key exchanged", HEADS, swap("q_lin", "k_lin", "weight", "bias")),
    Bug("heads split the wrong way round", HEADS, change(heads_last(SIZES["n_heads"]), *QKV)),
    Bug("square kernels not transposed", HEADS, change(np.transpose, "v_lin.weight")),
    Bug("activation of the word head forgotten", ("masked_lm",), configure(activation="gelu")),
    Bug("padding attended to", (*HEADS, "inputs_embeds"), change_input("attention_mask", np.ones_like)),
    Bug(
        "first layer of the head left out",
        ("sequence_classification", "multiple_choice"),
        zero("pre_classifier.weight"),
    ),
    ignored_labels_count("masked_lm", "token_classification"),
    labels_off_by_one("masked_lm"),
    answers_cut_off("question_answering"),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.k_lin\.bias$",)
