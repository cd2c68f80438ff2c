"""GPT-J: rotary positions of neighbouring channels, parts side by side, a head with a bias; four heads.

Sizes are asymmetric on purpose: 3 heads of 12 of which 8 channels turn, an odd feed-forward width, 25 tokens of 40
positions, one row padded. `layer_norm_epsilon` is large enough that a hard-coded one shows.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    Array,
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
    "n_positions": 40,
    "n_embd": 36,
    "n_layer": 2,
    "n_head": 3,
    "rotary_dim": 8,
    "n_inner": 53,
    "layer_norm_epsilon": 0.05,
    "bos_token_id": 60,
    "eos_token_id": 60,
    "pad_token_id": 0,
}
PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)

HEADS = decoder_heads("GPTJ", SIZES, PADDED, "sequence_classification", "question_answering")

CAUSAL = np.tril(np.ones((1, 1, 40, 40), np.uint8))
MASKS: Tensors = {"bias": CAUSAL, "masked_bias": np.array(-1e9, np.float32)}
OLD = {f"transformer.h.{i}.attn.{name}": value for i in range(2) for name, value in MASKS.items()}

CASES = (
    *HEADS,
    Case("left_padded", "GPTJForCausalLM", SIZES, LEFT, ("logits",)),
    Case(
        "inputs_embeds",
        "GPTJModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    # Segments are looked up in the table of words.
    Case(
        "ids_of_all_kinds",
        "GPTJModel",
        SIZES,
        PADDED
        | {
            "token_type_ids": ids("token_type_ids", 2, T, low=0, high=VOCAB),
            "position_ids": ids("position_ids", 2, T, low=0, high=40),
        },
        ("last_hidden_state",),
    ),
    Case("traces", "GPTJForCausalLM", SIZES, text("traces", 17), ("logits", "hidden_states", "attentions"), TRACES),
    # Whole heads turn, and the network is four times as wide.
    Case("whole_heads", "GPTJModel", SIZES | {"rotary_dim": 12, "n_inner": None}, PADDED, ("last_hidden_state",)),
    # The bias of the head is its own even where the table is not.
    Case("tied", "GPTJForCausalLM", SIZES | {"tie_word_embeddings": True}, text("tied", 25), ("logits",)),
    # As its first files have it: the causal masks inside.
    Case(
        "old_keys",
        "GPTJForCausalLM",
        SIZES,
        text("old_keys", 25),
        ("logits",),
        buffers=OLD,
        unexpected=tuple(OLD),
    ),
)


def _halves(kernel: Array) -> Array:
    """Turns the channels of the two halves together, not neighbours."""
    heads = kernel.reshape(3, 12, -1)
    turned = heads[:, :8].reshape(3, 4, 2, -1).swapaxes(1, 2).reshape(3, 8, -1)
    return np.concatenate([turned, heads[:, 8:]], axis=1).reshape(kernel.shape)


DECODERS = tuple(case.name for case in HEADS)

BUGS = (
    Bug(
        "halves turned instead of neighbours",
        (*DECODERS, "left_padded"),
        change(_halves, "q_proj.weight", "k_proj.weight"),
    ),
    Bug("whole heads turned", DECODERS, configure(rotary_dim=12)),
    Bug("fewer channels turned", DECODERS, configure(rotary_dim=6)),
    Bug("part of a head turned", ("whole_heads",), configure(rotary_dim=8)),
    Bug("scores not divided by sqrt(d)", DECODERS, change(lambda w: w * 12**0.5, "q_proj.weight")),
    Bug("bias of the head forgotten", ("causal_lm", "left_padded", "tied"), zero("lm_head.bias")),
    Bug("key and value exchanged", DECODERS, swap("k_proj.weight", "v_proj.weight")),
    Bug("heads split the wrong way round", DECODERS, change(heads_last(3), "v_proj.weight")),
    Bug("square kernels not transposed", DECODERS, change(np.transpose, "out_proj.weight")),
    Bug("layer_norm_epsilon 1e-5 hard-coded", DECODERS, configure(layer_norm_epsilon=1e-5)),
    Bug("padding attended to", ("left_padded",), change_input("attention_mask", np.ones_like)),
    Bug("segments ignored", ("ids_of_all_kinds",), change_input("token_type_ids", np.zeros_like)),
    Bug(
        "position_ids ignored",
        ("ids_of_all_kinds",),
        change_input("position_ids", lambda p: np.arange(T)[None] + 0 * p),
    ),
    Bug("head tied all the same", ("causal_lm",), configure(tie_word_embeddings=True)),
    Bug("label read off the last position", ("sequence_classification",), configure(pad_token_id=55)),
    ignored_labels_count("causal_lm", least=5e-3),
    labels_off_by_one("causal_lm", least=5e-3),
    answers_cut_off("question_answering"),
)

INVISIBLE: tuple[str, ...] = ()

# The reference reports the masks of its older versions as unused; formax knows that nothing is lost with them.
SILENT = (r"\.attn\.(masked_)?bias$",)
