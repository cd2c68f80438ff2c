"""Mamba: a state-space model with one head, its projections, its convolution, and checkpoints of its authors.

Sizes are asymmetric on purpose: a state of 5, inner states of 54 for a hidden size of 36, 25 tokens, one row padded.
`layer_norm_epsilon` is large enough that a hard-coded one shows. Where the reference is odd, the case says so.
"""

from typing import Any

import numpy as np

from oracle.cases import (
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
    text,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "state_size": 5,
    "num_hidden_layers": 2,
    "expand": 1.5,
    "layer_norm_epsilon": 0.05,
}


PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)

# ---- the two heads --------------------------------------------------------------------------------------------------

HEADS = (
    Case("model", "MambaModel", SIZES, PADDED, ("last_hidden_state",)),
    # The reference shifts the labels itself: token t is predicted from those before it.
    Case(
        "causal_lm",
        "MambaForCausalLM",
        SIZES,
        PADDED | {"labels": labels("causal_lm", 61, PADDED["attention_mask"])},
        ("loss", "logits"),
    ),
)

# ---- what can be passed in ------------------------------------------------------------------------------------------

INPUTS = (
    # Padding puts nothing into the convolution and nothing into the state.
    Case("left_padded", "MambaForCausalLM", SIZES, LEFT, ("logits",)),
    Case("ids_only", "MambaModel", SIZES, {"input_ids": ids("ids_only", 1, 37)}, ("last_hidden_state",)),
    # Fewer tokens than the convolution is wide.
    Case("short", "MambaModel", SIZES, {"input_ids": ids("short", 2, 3)}, ("last_hidden_state",)),
    Case(
        "inputs_embeds",
        "MambaModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    # The hidden states begin after the first layer, without the words; the last is there twice, before and after the
    # norm.
    Case(
        "traces",
        "MambaForCausalLM",
        SIZES,
        text("traces", 17),
        ("logits", "hidden_states"),
        {"output_hidden_states": True},
    ),
)

# ---- what a configuration can ask for -------------------------------------------------------------------------------

CONFIGS = (
    Case("untied", "MambaForCausalLM", SIZES | {"tie_word_embeddings": False}, text("untied", 25), ("logits",)),
    Case("biases", "MambaModel", SIZES | {"use_bias": True}, PADDED, ("last_hidden_state",)),
    Case("no_conv_bias", "MambaModel", SIZES | {"use_conv_bias": False}, PADDED, ("last_hidden_state",)),
    Case(
        "sizes",
        "MambaModel",
        SIZES | {"conv_kernel": 3, "time_step_rank": 7, "state_size": 8, "num_hidden_layers": 3, "expand": 2},
        text("sizes", 25),
        ("last_hidden_state",),
    ),
    Case(
        "act_gelu",
        "MambaModel",
        SIZES | {"num_hidden_layers": 1, "hidden_act": "gelu"},
        text("act_gelu", 25),
        ("last_hidden_state",),
    ),
    # How sums are kept changes no value in float32, nor does the program that the reference may use in their place.
    Case(
        "no_value",
        "MambaModel",
        SIZES | {"residual_in_fp32": False, "use_cache": False, "rescale_prenorm_residual": True},
        text("no_value", 25),
        ("last_hidden_state",),
    ),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

# As state-spaces/mamba-130m-hf is on the hub: its authors' own settings among the reference's.
CONFIG_2024: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "d_inner": 72,
    "d_model": 36,
    "eos_token_id": 0,
    "expand": 2,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": 36,
    "initializer_range": 0.1,
    "intermediate_size": 72,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "n_layer": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": 5,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 3,
    "time_step_scale": 1.0,
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 61,
}

CHECKPOINTS = (
    Case(
        "old_names",
        "MambaForCausalLM",
        CONFIG_2024,
        text("old_names", 25),
        ("logits",),
        literal_config=True,
        copies={"lm_head.weight": "backbone.embeddings.weight"},
    ),
    Case("base_of_lm", "MambaModel", SIZES, text("base_of_lm", 25), ("last_hidden_state",), writer="MambaForCausalLM"),
)

CASES = HEADS + INPUTS + CONFIGS + CHECKPOINTS


# ---- mistakes that the cases above must show ------------------------------------------------------------------------


def _part(turn: int) -> Any:
    """Reads the parts of a fused projection in another order: of two halves, or of the last two of three parts."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        for key in ending(tensors, "in_proj.weight" if turn == 2 else "x_proj.weight"):
            state = config["state_size"]
            if turn == 2:
                tensors[key] = np.roll(tensors[key], tensors[key].shape[0] // 2, 0)
            else:
                rank = tensors[key].shape[0] - 2 * state
                order = [*range(rank), *range(rank + state, rank + 2 * state), *range(rank, rank + state)]
                tensors[key] = tensors[key][order].copy()

    return apply


SEQUENCES = ("model", "causal_lm", "left_padded", "ids_only", "inputs_embeds", "untied", "biases")

BUGS = (
    Bug("gate and states exchanged", SEQUENCES, _part(2)),
    Bug("input and output of the state exchanged", SEQUENCES, _part(3)),
    Bug("convolution reversed", SEQUENCES, change(lambda w: w[..., ::-1], "conv1d.weight")),
    Bug("convolution off by one", SEQUENCES, change(lambda w: np.roll(w, 1, -1), "conv1d.weight")),
    Bug("bias of the convolution forgotten", SEQUENCES, zero("conv1d.bias")),
    Bug("states forgotten at once", SEQUENCES, change(lambda w: 0 * w + 9, "A_log")),
    Bug("decay not exponentiated", SEQUENCES, change(lambda w: np.log(np.abs(w) + 1e-3), "A_log")),
    Bug("skip connection left out", SEQUENCES, zero("mixer.D")),
    Bug("bias of the time step forgotten", SEQUENCES, zero("dt_proj.bias")),
    Bug("layer_norm_epsilon 1e-5 hard-coded", SEQUENCES, configure(layer_norm_epsilon=1e-5)),
    Bug("scale of the norm added to one", SEQUENCES, change(lambda w: 1 + w, "norm_f.weight")),
    Bug("padding taken for text", ("left_padded", "inputs_embeds"), change_input("attention_mask", np.ones_like)),
    Bug("gelu instead of silu", SEQUENCES, configure(hidden_act="gelu")),
    Bug("silu instead of gelu", ("act_gelu",), configure(hidden_act="silu")),
    Bug("biases forgotten", ("biases",), zero("in_proj.bias", "out_proj.bias")),
    ignored_labels_count("causal_lm", least=1e-3),
    labels_off_by_one("causal_lm", least=1e-3),
)

INVISIBLE: tuple[str, ...] = ()
