"""OPT: norms before and behind, words of another width, positions that do not count padding; four heads.

Sizes are asymmetric on purpose: 3 heads of 12, an odd feed-forward width, 25 tokens of 40 positions, one row padded.
The epsilon of norms is fixed, and small.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    Tensors,
    answers_cut_off,
    both,
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
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "ffn_dim": 53,
    "max_position_embeddings": 40,
    "num_attention_heads": 3,
    "pad_token_id": 0,
}
# As the model of 350 million parameters.
BEHIND = SIZES | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}
PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)
INSIDE = text("inside", 25, 25)
INSIDE["attention_mask"][1, 9:16] = 0

HEADS = decoder_heads("OPT", SIZES, PADDED, "sequence_classification", "question_answering")

# As facebook/opt-350m is on the hub.
CONFIG_2022: dict[str, Any] = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 53,
    "hidden_size": 36,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 40,
    "model_type": "opt",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 61,
    "word_embed_proj_dim": 20,
}

CASES = (
    *HEADS,
    # The first real token of a row is at position 0, padding before it or not.
    Case("left_padded", "OPTForCausalLM", SIZES, LEFT, ("logits",)),
    # Nor does padding inside a text count.
    Case("padded_inside", "OPTForCausalLM", SIZES, INSIDE, ("logits",)),
    Case(
        "position_ids",
        "OPTModel",
        SIZES,
        PADDED | {"position_ids": ids("position_ids", 2, T, low=0, high=40)},
        ("last_hidden_state",),
    ),
    Case(
        "inputs_embeds",
        "OPTModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    Case(
        "behind_traces",
        "OPTForCausalLM",
        BEHIND,
        text("behind_traces", 17),
        ("logits", "hidden_states", "attentions"),
        TRACES,
    ),
    Case(
        "behind_label",
        "OPTForSequenceClassification",
        BEHIND | {"num_labels": 3},
        PADDED,
        ("logits",),
    ),
    Case("untied", "OPTForCausalLM", BEHIND | {"tie_word_embeddings": False}, text("untied", 25), ("logits",)),
    Case("no_last_norm", "OPTModel", SIZES | {"_remove_final_layer_norm": True}, PADDED, ("last_hidden_state",)),
    # As Galactica has it. (Norms may lack parameters as well: the reference opens such a model, but cannot make one.)
    Case(
        "no_biases",
        "OPTModel",
        SIZES | {"enable_bias": False, "activation_function": "gelu"},
        PADDED,
        ("last_hidden_state",),
    ),
    Case("old_config", "OPTForCausalLM", CONFIG_2022, text("old_config", 25), ("logits",), literal_config=True),
)


def _by_place(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    """Counts padding as positions."""
    inputs["position_ids"] = np.arange(T)[None].repeat(2, axis=0)


DECODERS = tuple(case.name for case in HEADS)
POSITIONS = "embed_positions.weight"

BUGS = (
    Bug("positions forgotten", (*DECODERS, "left_padded", "old_config"), zero(POSITIONS)),
    Bug("positions not offset by 2", DECODERS, change(lambda w: np.roll(w, 2, 0), POSITIONS)),
    Bug("padding counted in positions", ("left_padded", "padded_inside"), _by_place),
    Bug("position_ids ignored", ("position_ids",), change_input("position_ids", lambda p: 0 * p + np.arange(T))),
    Bug("padding attended to", ("left_padded", "padded_inside"), change_input("attention_mask", np.ones_like)),
    # Where there is no norm after the last layer, nothing else depends on where they are.
    Bug("norms behind", ("no_last_norm",), configure(do_layer_norm_before=False)),
    Bug(
        "norms before",
        ("behind_label", "old_config"),
        configure(do_layer_norm_before=True, _remove_final_layer_norm=True),
    ),
    Bug(
        "norms of a layer exchanged",
        DECODERS,
        both(*(swap(f"{i}.self_attn_layer_norm.weight", f"{i}.final_layer_norm.weight") for i in (0, 1))),
    ),
    Bug("scores not divided by sqrt(d)", DECODERS, change(lambda w: w * 12**0.5, "q_proj.weight", "q_proj.bias")),
    Bug("key and value exchanged", DECODERS, swap("k_proj", "v_proj", "weight", "bias")),
    Bug("heads split the wrong way round", DECODERS, change(heads_last(3), "v_proj.weight", "v_proj.bias")),
    Bug("square kernels not transposed", DECODERS, change(np.transpose, "out_proj.weight")),
    Bug("gelu instead of relu", DECODERS, configure(activation_function="gelu")),
    Bug("relu instead of gelu", ("no_biases",), configure(activation_function="relu")),
    Bug("head tied all the same", ("untied",), configure(tie_word_embeddings=True)),
    Bug("label read off the last position", ("sequence_classification",), configure(pad_token_id=55)),
    ignored_labels_count("causal_lm", least=5e-3),
    labels_off_by_one("causal_lm", least=5e-3),
    answers_cut_off("question_answering", least=5e-3),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.k_proj\.bias$",)
