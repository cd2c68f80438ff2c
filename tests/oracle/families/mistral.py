"""Mistral: what it has beside Llama, a sliding window, in all five heads.

Sizes are asymmetric on purpose: 6 heads of 10 on a hidden size of 36, 2 key-value heads, a window of 7, 25 tokens, one
row padded. `rms_norm_eps` is large enough that a hard-coded one shows, and `rope_theta` so small that every frequency
turns within a text. Rotary scalings and activations are Llama's, and tried there.
"""

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
    decoder_heads,
    floats,
    heads_last,
    ids,
    ignored_labels_count,
    labels_off_by_one,
    swap,
    text,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 40,
    "rms_norm_eps": 0.05,
    "rope_theta": 300.0,
    "pad_token_id": 0,
    "sliding_window": 7,
}
# Less padding than the window is long: what a position computes that sees nothing at all is nobody's business, but in a
# span's loss it counts.
PADDED = text("padded", 25, 19)
LEFT = text("left", 25, 18, left=True)

HEADS = decoder_heads("Mistral", SIZES, PADDED, "sequence_classification", "token_classification", "question_answering")

CASES = (
    *HEADS,
    Case("left_padded", "MistralForCausalLM", SIZES, LEFT, ("logits",)),
    Case(
        "inputs_embeds",
        "MistralModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    Case("traces", "MistralForCausalLM", SIZES, text("traces", 17), ("logits", "hidden_states", "attentions"), TRACES),
    # As the later checkpoints: no window, heads as wide as the hidden size has room for.
    Case(
        "no_window",
        "MistralModel",
        SIZES | {"sliding_window": None, "head_dim": None, "num_key_value_heads": 3},
        PADDED,
        ("last_hidden_state",),
    ),
    # More tokens than positions, whose numbers are given.
    Case(
        "position_ids",
        "MistralModel",
        SIZES | {"max_position_embeddings": 20},
        PADDED | {"position_ids": ids("position_ids", 2, T, low=0, high=40)},
        ("last_hidden_state",),
    ),
)

DECODERS = tuple(case.name for case in HEADS)
WINDOWS = (*DECODERS, "left_padded")

BUGS = (
    Bug("no window", WINDOWS, configure(sliding_window=None)),
    Bug("window one wider", WINDOWS, configure(sliding_window=8)),
    Bug("window one narrower", WINDOWS, configure(sliding_window=6)),
    Bug("a window all the same", ("no_window",), configure(sliding_window=7)),
    Bug(
        "positions not rotated",
        DECODERS,
        configure(rope_theta=1e30, rope_scaling={"rope_type": "linear", "factor": 1e9}),
    ),
    Bug("rope_theta 10000 hard-coded", DECODERS, configure(rope_theta=10000.0)),
    Bug("rms_norm_eps 1e-6 hard-coded", DECODERS, configure(rms_norm_eps=1e-6)),
    Bug("heads split the wrong way round", DECODERS, change(heads_last(2), "v_proj.weight")),
    Bug("gate and up exchanged", DECODERS, swap("gate_proj.weight", "up_proj.weight")),
    # Behind a causal mask only padding before the text can be attended to.
    Bug("padding attended to", ("left_padded",), change_input("attention_mask", np.ones_like)),
    Bug("position_ids ignored", ("position_ids",), change_input("position_ids", lambda p: np.arange(T)[None] + 0 * p)),
    Bug("label read off the last position", ("sequence_classification",), configure(pad_token_id=60)),
    ignored_labels_count("causal_lm", "token_classification", least=5e-3),
    labels_off_by_one("causal_lm"),
    answers_cut_off("question_answering"),
)

INVISIBLE: tuple[str, ...] = ()
