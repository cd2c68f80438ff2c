"""GPT-Neo: what it has beside GPT-2, layers with a window and scores that are not scaled, in all five heads.

Sizes are asymmetric on purpose: 4 heads of 9, an odd feed-forward width, two layers of each kind, a window of 7, 25
tokens of 40 positions, one row padded. `layer_norm_epsilon` is large enough that a hard-coded one shows.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    Tensors,
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
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
    "hidden_size": 36,
    "num_layers": 4,
    "attention_types": [[["global", "local"], 2]],
    "num_heads": 4,
    "intermediate_size": 53,
    "window_size": 7,
    "layer_norm_epsilon": 0.05,
    "bos_token_id": 60,
    "eos_token_id": 60,
    "pad_token_id": 0,
}
# Less padding than the window is long: what a position computes that sees nothing at all is nobody's business, but in a
# span's loss it counts.
PADDED = text("padded", 25, 19)
LEFT = text("left", 25, 18, left=True)

HEADS = decoder_heads("GPTNeo", SIZES, PADDED, "sequence_classification", "token_classification", "question_answering")

# As EleutherAI/gpt-neo-125m is on the hub: both spellings of what a layer is, the masks inside.
CONFIG_2021: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"],
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 60,
    "embed_dropout": 0,
    "eos_token_id": 60,
    "gradient_checkpointing": False,
    "hidden_size": 36,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 0.05,
    "max_position_embeddings": 40,
    "model_type": "gpt_neo",
    "num_heads": 3,
    "num_layers": 2,
    "resid_dropout": 0,
    "use_cache": True,
    "vocab_size": 61,
    "window_size": 7,
}
CAUSAL = np.tril(np.ones((1, 1, 40, 40), np.uint8))
MASKS: Tensors = {"bias": CAUSAL, "masked_bias": np.array(-1e9, np.float32)}

CASES = (
    *HEADS,
    # Positions are not shifted for left padding: the first real token of a padded row is not at position 0.
    Case("left_padded", "GPTNeoForCausalLM", SIZES, LEFT, ("logits",)),
    Case(
        "inputs_embeds",
        "GPTNeoModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    # Segments are looked up in the table of words.
    Case(
        "ids_of_all_kinds",
        "GPTNeoModel",
        SIZES,
        PADDED
        | {
            "token_type_ids": ids("token_type_ids", 2, T, low=0, high=VOCAB),
            "position_ids": ids("position_ids", 2, T, low=0, high=40),
        },
        ("last_hidden_state",),
    ),
    Case("traces", "GPTNeoForCausalLM", SIZES, text("traces", 17), ("logits", "hidden_states", "attentions"), TRACES),
    # Kinds that take turns in no order.
    Case(
        "kinds",
        "GPTNeoModel",
        SIZES | {"num_layers": 3, "attention_types": [[["local"], 2], [["global"], 1]]},
        PADDED,
        ("last_hidden_state",),
    ),
    Case("untied", "GPTNeoForCausalLM", SIZES | {"tie_word_embeddings": False}, text("untied", 25), ("logits",)),
    Case(
        "old_keys",
        "GPTNeoForCausalLM",
        CONFIG_2021,
        text("old_keys", 25),
        ("logits",),
        literal_config=True,
        copies={"lm_head.weight": "transformer.wte.weight"},
        buffers={f"transformer.h.{i}.attn.attention.{name}": value for i in range(2) for name, value in MASKS.items()},
    ),
)

DECODERS = tuple(case.name for case in HEADS)
WINDOWS = (*DECODERS, "left_padded", "kinds", "old_keys")

BUGS = (
    Bug("no window", (*DECODERS, "left_padded", "kinds"), configure(window_size=40)),
    Bug("window one wider", WINDOWS, configure(window_size=8)),
    Bug("window one narrower", WINDOWS, configure(window_size=6)),
    # In a file the kinds of all layers stand beside what they are made from, and win.
    Bug("local layers first", DECODERS, configure(attention_layers=["local", "global"] * 2)),
    Bug("kinds repeated one by one", DECODERS, configure(attention_layers=["global"] * 2 + ["local"] * 2)),
    Bug("kinds of the default", ("kinds",), configure(attention_layers=["global", "local", "global"])),
    Bug("scores divided by sqrt(d)", DECODERS, change(lambda w: w / 3, "q_proj.weight")),
    Bug("bias of the output forgotten", DECODERS, zero("out_proj.bias")),
    Bug("positions forgotten", (*DECODERS, "left_padded"), zero("wpe.weight")),
    Bug("key and value exchanged", DECODERS, swap("k_proj.weight", "v_proj.weight")),
    Bug("heads split the wrong way round", DECODERS, change(heads_last(4), "v_proj.weight")),
    Bug("square kernels not transposed", DECODERS, change(np.transpose, "out_proj.weight")),
    Bug("layer_norm_epsilon 1e-5 hard-coded", DECODERS, configure(layer_norm_epsilon=1e-5)),
    Bug("padding attended to", ("left_padded",), change_input("attention_mask", np.ones_like)),
    Bug("segments ignored", ("ids_of_all_kinds",), change_input("token_type_ids", np.zeros_like)),
    Bug(
        "position_ids ignored",
        ("ids_of_all_kinds",),
        change_input("position_ids", lambda p: np.arange(T)[None] + 0 * p),
    ),
    Bug("head tied all the same", ("untied",), configure(tie_word_embeddings=True)),
    Bug("label read off the last position", ("sequence_classification",), configure(pad_token_id=55)),
    ignored_labels_count("causal_lm", "token_classification", least=5e-3),
    labels_off_by_one("causal_lm"),
    answers_cut_off("question_answering"),
)

INVISIBLE: tuple[str, ...] = ()
