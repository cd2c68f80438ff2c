"""Mixtral: five heads over a mixture of experts, a sliding window, and the routers' own output and loss.

Sizes are asymmetric on purpose: 6 heads of 10 on a hidden size of 36, 2 key-value heads, 5 experts of which a token
takes 2, a window of 7, 25 tokens, one row padded. `rms_norm_eps` is large enough that a hard-coded one shows, and
`rope_theta` so small that every frequency turns within a text. Rotary scalings are Llama's, and tried there.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    Tensors,
    change,
    change_input,
    configure,
    ending,
    floats,
    ids,
    ignored_labels_count,
    labels,
    labels_off_by_one,
    question_answering,
    swap,
    text,
    token_classification,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 40,
    "rms_norm_eps": 0.05,
    "rope_theta": 300.0,
    "pad_token_id": 0,
}


PADDED = text("padded", 25, 17)
ROUTED = text("routed", 25, 6)
LEFT = text("left", 25, 18, left=True)

# ---- the five heads, each with its loss -----------------------------------------------------------------------------

HEADS = (
    Case("model", "MixtralModel", SIZES, PADDED, ("last_hidden_state",)),
    # The reference shifts the labels itself: token t is predicted from those before it.
    Case(
        "causal_lm",
        "MixtralForCausalLM",
        SIZES,
        PADDED | {"labels": labels("causal_lm", 61, PADDED["attention_mask"])},
        ("loss", "logits"),
    ),
    # Asked for the routers' logits, it also weighs how evenly the experts are used, and adds that to the loss. The
    # logits are those of all rows one below the other, padding included; what padding chose does not count.
    Case(
        "router",
        "MixtralForCausalLM",
        SIZES | {"output_router_logits": True, "router_aux_loss_coef": 0.3},
        ROUTED | {"labels": labels("router", 61, ROUTED["attention_mask"])},
        ("loss", "logits", "aux_loss", "router_logits"),
    ),
    Case(
        "router_ids_only",
        "MixtralForCausalLM",
        SIZES,
        {"input_ids": ids("router_ids_only", 1, T)},
        ("logits", "aux_loss", "router_logits"),
        {"output_router_logits": True},
    ),
    # The label is read off the last token that is not padding; what is padding is said by the ids, not by the mask.
    Case(
        "sequence_classification",
        "MixtralForSequenceClassification",
        SIZES | {"num_labels": 3},
        PADDED | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    token_classification("Mixtral", SIZES, PADDED),
    # Unlike Llama's, stored under `model`. The second answer ends beyond the text and does not count.
    question_answering("Mixtral", SIZES, PADDED),
)

# ---- what can be passed in ------------------------------------------------------------------------------------------

INPUTS = (
    Case("left_padded", "MixtralForCausalLM", SIZES, LEFT, ("logits",)),
    Case(
        "inputs_embeds",
        "MixtralModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    Case(
        "position_ids",
        "MixtralModel",
        SIZES,
        PADDED | {"position_ids": ids("position_ids", 2, T, low=0, high=40)},
        ("last_hidden_state",),
    ),
    # The last of the hidden states is normed, as `last_hidden_state` is.
    Case(
        "traces",
        "MixtralModel",
        SIZES,
        text("traces", 17),
        ("last_hidden_state", "hidden_states", "attentions", "router_logits"),
        TRACES | {"output_router_logits": True},
    ),
)

# ---- what a configuration can ask for -------------------------------------------------------------------------------

CONFIGS = (
    # Heads as wide as the hidden size has room for.
    Case(
        "plain_heads",
        "MixtralModel",
        SIZES | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": None},
        PADDED,
        ("last_hidden_state",),
    ),
    # Each token sees itself and the six before it.
    Case("window", "MixtralModel", SIZES | {"sliding_window": 7}, PADDED, ("last_hidden_state",)),
    Case("window_left_padded", "MixtralForCausalLM", SIZES | {"sliding_window": 7}, LEFT, ("logits",)),
    # One expert a token: its share is all, whatever the router says.
    Case("one_expert", "MixtralModel", SIZES | {"num_experts_per_tok": 1}, PADDED, ("last_hidden_state",)),
    Case(
        "four_experts",
        "MixtralModel",
        SIZES | {"num_experts_per_tok": 4, "num_local_experts": 7},
        text("four_experts", 25),
        ("last_hidden_state",),
    ),
    # Three tokens cannot reach all seven experts.
    Case(
        "idle_experts",
        "MixtralModel",
        SIZES | {"num_local_experts": 7},
        {"input_ids": ids("idle_experts", 1, 3)},
        ("last_hidden_state",),
    ),
    Case("tied", "MixtralForCausalLM", SIZES | {"tie_word_embeddings": True}, text("tied", 25), ("logits",)),
    Case(
        "act_gelu",
        "MixtralModel",
        SIZES | {"num_hidden_layers": 1, "hidden_act": "gelu"},
        text("act_gelu", 25),
        ("last_hidden_state",),
    ),
    Case(
        "rope_linear",
        "MixtralModel",
        SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        text("rope_linear", 25),
        ("last_hidden_state",),
    ),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

CHECKPOINTS = (
    # A head put on a language model.
    Case(
        "head_on_lm",
        "MixtralForTokenClassification",
        SIZES,
        text("head_on_lm", 25),
        ("hidden_states",),
        {"output_hidden_states": True},
        writer="MixtralForCausalLM",
        missing=("score.bias", "score.weight"),
        unexpected=("lm_head.weight",),
    ),
)

CASES = HEADS + INPUTS + CONFIGS + CHECKPOINTS


# ---- mistakes that the cases above must show ------------------------------------------------------------------------


def _experts(order: str) -> Any:
    """Numbers the experts in another order than the router does."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        old = dict(tensors)
        for key in ending(tensors, "w1.weight", "w2.weight", "w3.weight"):
            before, _, rest = key.partition(".experts.")
            number, _, leaf = rest.partition(".")
            tensors[key] = old[f"{before}.experts.{order[int(number)]}.{leaf}"]

    return apply


DECODERS = tuple(case.name for case in HEADS if case.name not in ("router", "router_ids_only"))

BUGS = (
    Bug(
        "positions not rotated",
        DECODERS,
        configure(rope_theta=1e30, rope_scaling={"rope_type": "linear", "factor": 1e9}),
    ),
    Bug("rope_theta 1e6 hard-coded", DECODERS, configure(rope_theta=1e6)),
    Bug("rotary scaling ignored", ("rope_linear",), configure(rope_scaling=None)),
    Bug("rms_norm_eps 1e-5 hard-coded", DECODERS, configure(rms_norm_eps=1e-5)),
    Bug("experts in another order", DECODERS, _experts("12340")),
    Bug("gate and up exchanged", DECODERS, swap("w1.weight", "w3.weight")),
    Bug("one expert a token", DECODERS, configure(num_experts_per_tok=1)),
    Bug("three experts a token", DECODERS, configure(num_experts_per_tok=3)),
    # softmax and then the largest is the softmax of the largest; shares as they are before that are smaller
    Bug("shares not made to add up to one", ("one_expert",), change(lambda w: 0.4 * w, "w2.weight")),
    Bug("equal shares", DECODERS, change(lambda w: 1e-3 * w, "gate.weight")),
    Bug("lowest scores chosen", DECODERS, change(lambda w: -w, "gate.weight")),
    Bug("experts added without shares", DECODERS, change(lambda w: 2 * w, "w2.weight")),
    Bug("gelu instead of silu", DECODERS, configure(hidden_act="gelu")),
    Bug("silu instead of gelu", ("act_gelu",), configure(hidden_act="silu")),
    Bug("no window", ("window", "window_left_padded"), configure(sliding_window=None)),
    Bug("window one wider", ("window", "window_left_padded"), configure(sliding_window=8)),
    Bug("window one narrower", ("window", "window_left_padded"), configure(sliding_window=6)),
    # Behind a causal mask only padding before the text can be attended to.
    Bug("padding attended to", ("left_padded",), change_input("attention_mask", np.ones_like)),
    Bug(
        "padding's experts counted",
        ("router",),
        change_input("attention_mask", np.ones_like),
        1e-3,
        ("aux_loss", "loss"),
    ),
    Bug("position_ids ignored", ("position_ids",), change_input("position_ids", lambda p: np.arange(T)[None] + 0 * p)),
    Bug("label read off the last position", ("sequence_classification",), configure(pad_token_id=60)),
    Bug("the router's loss weighed by 0.001", ("router",), configure(router_aux_loss_coef=1e-3), outputs=("loss",)),
    ignored_labels_count("causal_lm", "token_classification", least=1e-3),
    labels_off_by_one("causal_lm", least=1e-3),
)

INVISIBLE: tuple[str, ...] = ()
