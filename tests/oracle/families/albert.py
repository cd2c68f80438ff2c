"""ALBERT: layers run through several times, narrow word vectors, the order of sentences; the rest is BERT's."""

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
    ids,
    ignored_labels_count,
    label_heads,
    labels,
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
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 53,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
    "layer_norm_eps": 0.05,
    "embedding_size": 20,
}
PADDED = text("padded", 25, 17, segments=3)
# Three runs through two groups: two through the first and one through the second.
GROUPS = SIZES | {"num_hidden_groups": 2}

CASES = (
    Case("model", "AlbertModel", SIZES, PADDED, ("last_hidden_state", "pooler_output")),
    Case(
        "pre_training",
        "AlbertForPreTraining",
        SIZES,
        PADDED
        | {"labels": labels("pre_training", VOCAB, PADDED["attention_mask"]), "sentence_order_label": np.array([1, 0])},
        ("loss", "prediction_logits", "sop_logits"),
    ),
    masked_lm("Albert", SIZES, PADDED),
    *label_heads("Albert", SIZES, PADDED, text("choices", 25, 20, 9, 13, 25, 17, segments=3)),
    Case(
        "groups",
        "AlbertModel",
        GROUPS,
        text("groups", 25, segments=3),
        ("last_hidden_state", "pooler_output", "hidden_states", "attentions"),
        TRACES,
    ),
    # Of two layers in a group, of a short text for its many attentions. Nothing is to be made wider, and yet projected.
    Case(
        "inner_groups",
        "AlbertModel",
        SIZES
        | {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 36}
        | {"pruned_heads": {1: [2], 2: [0]}},
        {"input_ids": ids("inner_groups", 1, 11)},
        ("last_hidden_state", "attentions"),
        {"output_attentions": True},
    ),
    Case(
        "relative_key",
        "AlbertModel",
        SIZES | {"position_embedding_type": "relative_key"},
        {
            "inputs_embeds": floats("inputs_embeds", 2, T, 20),
            "attention_mask": text("left", 25, 18, left=True)["attention_mask"],
        },
        ("last_hidden_state",),
    ),
    Case("untied", "AlbertForMaskedLM", SIZES | {"tie_word_embeddings": False}, PADDED, ("logits",)),
)

HEADS = ("model", "pre_training", "masked_lm", "sequence_classification", "multiple_choice", "token_classification")
QKV = tuple(f"attention.{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weight", "bias"))

BUGS = (
    Bug("positions forgotten", HEADS, zero("position_embeddings.weight")),
    Bug("segments forgotten", HEADS, zero("token_type_embeddings.weight")),
    Bug("query and key exchanged", HEADS, swap("attention.query", "attention.key", "weight", "bias")),
    Bug("heads split the wrong way round", HEADS, change(heads_last(SIZES["num_attention_heads"]), *QKV)),
    Bug("square kernels not transposed", HEADS, change(np.transpose, "attention.value.weight")),
    Bug("layer_norm_eps 1e-12 hard-coded", HEADS, configure(layer_norm_eps=1e-12)),
    Bug("layers run through once too few", HEADS, configure(num_hidden_layers=2)),
    Bug("gelu by erf instead of tanh", HEADS, configure(hidden_act="gelu"), 2e-4),
    Bug(
        "groups in turn",
        ("groups",),
        swap("albert_layer_groups.0.albert_layers.0.ffn.weight", "albert_layer_groups.1.albert_layers.0.ffn.weight"),
        outputs=("last_hidden_state",),
    ),
    Bug(
        "layers of a group exchanged",
        ("inner_groups",),
        swap("albert_layers.0.ffn.weight", "albert_layers.1.ffn.weight"),
        outputs=("last_hidden_state",),
    ),
    Bug("padding attended to", HEADS[:4], change_input("attention_mask", np.ones_like)),
    ignored_labels_count("pre_training", "masked_lm", "token_classification"),
    labels_off_by_one("masked_lm"),
    answers_cut_off("question_answering"),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.attention\.key\.bias$",)
