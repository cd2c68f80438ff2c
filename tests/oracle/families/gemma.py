"""Gemma: what it has beside Llama, in all four heads: scaled words, norms that multiply by 1 + scale, the tanh GELU.

Sizes are asymmetric on purpose: 6 heads of 10 on a hidden size of 36, 2 key-value heads, 25 tokens, one row padded.
`rms_norm_eps` is large enough that a hard-coded one shows, and `rope_theta` so small that every frequency turns within
a text. Rotary scalings are Llama's, and tried there.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    change,
    change_input,
    configure,
    decoder_heads,
    floats,
    heads_last,
    ignored_labels_count,
    labels_off_by_one,
    swap,
    text,
    zero,
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
    "rms_norm_eps": 0.5,
    "rope_theta": 300.0,
    "pad_token_id": 0,
    # as most of its files, which name another activation in the field that counts elsewhere
    "hidden_activation": "relu",
}
PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)
HEADS = decoder_heads("Gemma", SIZES, PADDED, "sequence_classification", "token_classification")

CASES = (
    *HEADS,
    Case("left_padded", "GemmaForCausalLM", SIZES, LEFT, ("logits",)),
    # Vectors that are given are scaled, too.
    Case(
        "inputs_embeds",
        "GemmaModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    # The first of the hidden states is scaled, the last is normed.
    Case("traces", "GemmaForCausalLM", SIZES, text("traces", 17), ("logits", "hidden_states", "attentions"), TRACES),
    Case("biases", "GemmaModel", SIZES | {"attention_bias": True}, PADDED, ("last_hidden_state",)),
    Case("untied", "GemmaForCausalLM", SIZES | {"tie_word_embeddings": False}, text("untied", 25), ("logits",)),
    # As the first files have it.
    Case("exact_gelu", "GemmaModel", SIZES | {"hidden_act": "gelu"}, text("exact_gelu", 25), ("last_hidden_state",)),
)

DECODERS = tuple(case.name for case in HEADS)
NORMS = ("norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight")

BUGS = (
    Bug("words not scaled", DECODERS, change(lambda w: w / 6, "embed_tokens.weight")),
    Bug("given vectors not scaled", ("inputs_embeds",), change_input("inputs_embeds", lambda x: x / 6)),
    Bug("one not added to the scale", DECODERS, change(lambda w: w - 1, *NORMS)),
    Bug("rms_norm_eps 1e-6 hard-coded", DECODERS, configure(rms_norm_eps=1e-6)),
    Bug("gelu by erf instead of tanh", DECODERS, configure(hidden_act="gelu"), least=2e-4),
    Bug("gelu by tanh instead of erf", ("exact_gelu",), configure(hidden_act="gelu_pytorch_tanh"), least=2e-4),
    Bug("hidden_activation followed", DECODERS, configure(hidden_act="relu")),
    Bug("rope_theta 10000 hard-coded", DECODERS, configure(rope_theta=10000.0)),
    Bug("heads split the wrong way round", DECODERS, change(heads_last(2), "v_proj.weight")),
    Bug("gate and up exchanged", DECODERS, swap("gate_proj.weight", "up_proj.weight")),
    Bug("biases of the attention forgotten", ("biases",), zero("q_proj.bias", "v_proj.bias", "o_proj.bias")),
    Bug("head tied all the same", ("untied",), configure(tie_word_embeddings=True)),
    Bug("padding attended to", ("left_padded",), change_input("attention_mask", np.ones_like)),
    ignored_labels_count("causal_lm", "token_classification", least=5e-3),
    labels_off_by_one("causal_lm"),
)

INVISIBLE: tuple[str, ...] = ()
