"""Llama: five heads, grouped keys, head sizes of their own, five kinds of rotary positions, and the first checkpoints.

Sizes are asymmetric on purpose: 6 heads of 10 on a hidden size of 36, 2 key-value heads, 25 tokens of 40 positions, one
row padded. `rms_norm_eps` is large enough that a hard-coded one shows, and `rope_theta` so small that every frequency
turns within a text. Where the reference is odd, the case says so.
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
    floats,
    heads_last,
    ids,
    ignored_labels_count,
    labels,
    labels_off_by_one,
    question_answering,
    swap,
    text,
    token_classification,
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
    "rms_norm_eps": 0.05,
    "rope_theta": 300.0,
    "pad_token_id": 0,
}


def pairs(name: str, rows: int) -> Array:
    """Returns a mask `[rows, 1, T, T]` to be added to the scores; it is not causal, and every query has a key."""
    allowed = ids(name, rows, 1, T, T, low=0, high=2).astype(bool) | np.eye(T, dtype=bool)
    return np.where(allowed, np.float32(0), np.finfo(np.float32).min)


PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)

# ---- the five heads, each with its loss -----------------------------------------------------------------------------

HEADS = (
    Case("model", "LlamaModel", SIZES, PADDED, ("last_hidden_state",)),
    # The reference shifts the labels itself: token t is predicted from those before it.
    Case(
        "causal_lm",
        "LlamaForCausalLM",
        SIZES,
        PADDED | {"labels": labels("causal_lm", 61, PADDED["attention_mask"])},
        ("loss", "logits"),
    ),
    # The label is read off the last token that is not padding; what is padding is said by the ids, not by the mask.
    Case(
        "sequence_classification",
        "LlamaForSequenceClassification",
        SIZES | {"num_labels": 3},
        PADDED | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    token_classification("Llama", SIZES, PADDED),
    # In this head alone the base model is stored as `transformer`. The second answer ends beyond the text.
    question_answering("Llama", SIZES, PADDED),
)

# ---- what can be passed in ------------------------------------------------------------------------------------------

INPUTS = (
    Case("left_padded", "LlamaForCausalLM", SIZES, LEFT, ("logits",)),
    Case("left_padded_label", "LlamaForSequenceClassification", SIZES | {"num_labels": 3}, LEFT, ("logits",)),
    # More tokens than `max_position_embeddings`, which rotations do not mind.
    Case("ids_only", "LlamaModel", SIZES, {"input_ids": ids("ids_only", 1, 43)}, ("last_hidden_state",)),
    # Without a padding token there is one text, and its last token counts.
    Case(
        "no_pad_token",
        "LlamaForSequenceClassification",
        SIZES | {"num_labels": 3, "pad_token_id": None},
        {"input_ids": ids("no_pad_token", 1, T)},
        ("logits",),
    ),
    Case(
        "inputs_embeds",
        "LlamaModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    Case(
        "position_ids",
        "LlamaModel",
        SIZES,
        PADDED | {"position_ids": ids("position_ids", 2, T, low=0, high=40)},
        ("last_hidden_state",),
    ),
    # What is added to the scores takes the place of the causal mask: these tokens see the future.
    Case(
        "mask_4d",
        "LlamaModel",
        SIZES,
        {"input_ids": ids("mask_4d", 2, T), "attention_mask": pairs("mask_4d", 2)},
        ("last_hidden_state",),
    ),
    # The last of the hidden states is normed, as `last_hidden_state` is.
    Case(
        "traces",
        "LlamaForCausalLM",
        SIZES,
        text("traces", 17),
        ("logits", "hidden_states", "attentions"),
        TRACES,
    ),
)

# ---- what a configuration can ask for -------------------------------------------------------------------------------


def rope(name: str, inputs: Tensors, settings: dict[str, Any], **sizes: Any) -> Case:
    """Returns a case with a scaling of rotary positions."""
    return Case(
        f"rope_{name}", "LlamaModel", SIZES | sizes | {"rope_scaling": settings}, inputs, ("last_hidden_state",)
    )


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.5, "beta_slow": 0.2, "original_max_position_embeddings": 30}

CONFIGS = (
    # Keys for every head, heads as wide as the hidden size has room for: what the configuration leaves out.
    Case(
        "plain_heads",
        "LlamaModel",
        {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
        | {"num_attention_heads": 3},
        PADDED,
        ("last_hidden_state",),
    ),
    Case("tied", "LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}, text("tied", 25), ("logits",)),
    Case("biases", "LlamaModel", SIZES | {"attention_bias": True, "mlp_bias": True}, PADDED, ("last_hidden_state",)),
    Case(
        "act_gelu",
        "LlamaModel",
        SIZES | {"num_hidden_layers": 1, "hidden_act": "gelu"},
        text("act_gelu", 19),
        ("last_hidden_state",),
    ),
    rope("default", text("rope_default", 25), {"rope_type": "default"}, rope_theta=10000.0),
    rope("linear", text("rope_linear", 25), {"rope_type": "linear", "factor": 3.0}),
    # Within `max_position_embeddings` nothing is scaled; beyond it, the longer the text the more, on all its positions.
    rope("dynamic", text("rope_dynamic", 25), {"rope_type": "dynamic", "factor": 3.0}),
    rope(
        "dynamic_long",
        PADDED,
        {"rope_type": "dynamic", "factor": 3.0},
        max_position_embeddings=16,
    ),
    # Frequencies on both sides of the two bounds, and between them.
    rope("llama3", PADDED, LLAMA3),
    rope("yarn", PADDED, YARN),
    rope("yarn_defaults", text("yarn_defaults", 25), {"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=120),
    rope("yarn_attention_factor", text("yarn_attention_factor", 25), YARN | {"attention_factor": 1.7}),
    # The attention factor out of two others, and a ramp whose ends are not rounded.
    rope("yarn_mscale", text("yarn_mscale", 25), YARN | {"mscale": 2.0, "mscale_all_dim": 0.7, "truncate": False}),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

CONFIG_2023: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 36,
    "initializer_range": 0.02,
    "intermediate_size": 53,
    "max_sequence_length": 40,
    "model_type": "llama",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 0.05,
    "torch_dtype": "float32",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 61,
}
INV_FREQ = (1 / 10000 ** (np.arange(0, 12, 2) / 12)).astype(np.float32)

CHECKPOINTS = (
    # As the first conversions are on the hub: frequencies as buffers, a configuration without most of its keys.
    Case(
        "old_names",
        "LlamaForCausalLM",
        CONFIG_2023,
        {"input_ids": ids("old_names", 1, T)},
        ("logits",),
        literal_config=True,
        buffers={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": INV_FREQ for i in range(2)},
    ),
    # The kind of scaling was called `type` at first.
    Case(
        "old_rope_scaling",
        "LlamaModel",
        CONFIG_2023 | {"architectures": ["LlamaModel"], "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"input_ids": ids("old_rope_scaling", 1, T)},
        ("last_hidden_state",),
        literal_config=True,
    ),
    # The base model out of a language model.
    Case(
        "base_of_lm",
        "LlamaModel",
        SIZES,
        text("base_of_lm", 25),
        ("last_hidden_state",),
        writer="LlamaForCausalLM",
        unexpected=("lm_head.weight",),
    ),
    # A head put on a base model: the names get the prefix, the classifier is new.
    Case(
        "head_on_base_model",
        "LlamaForTokenClassification",
        SIZES,
        text("head_on_base_model", 25),
        ("hidden_states",),
        {"output_hidden_states": True},
        writer="LlamaModel",
        missing=("score.bias", "score.weight"),
    ),
)

CASES = HEADS + INPUTS + CONFIGS + CHECKPOINTS


# ---- mistakes that the cases above must show ------------------------------------------------------------------------


def _interleaved(kernel: Array) -> Array:
    """Reads the rows of a head as pairs of neighbours, which the original checkpoints rotate together."""
    heads = kernel.reshape(-1, SIZES["head_dim"], kernel.shape[-1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(kernel.shape)


def _cyclic_groups(kernel: Array) -> Array:
    """Gives query head i the keys of group i modulo the number of groups, not of neighbours."""
    heads = SIZES["num_attention_heads"]
    order = np.arange(heads).reshape(SIZES["num_key_value_heads"], -1).T.ravel()
    return kernel.reshape(heads, SIZES["head_dim"], -1)[order].reshape(kernel.shape)


def _scale(**changes: Any) -> Any:
    """Misreads the rotary settings."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        config["rope_scaling"] = config["rope_scaling"] | changes

    return apply


def _future(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    seen = inputs["attention_mask"][:, None, None, :].repeat(T, axis=2).astype(bool)
    inputs["attention_mask"] = np.where(seen, np.float32(0), np.finfo(np.float32).min)


DECODERS = tuple(case.name for case in HEADS)
YARNS = ("rope_yarn", "rope_yarn_defaults", "rope_yarn_attention_factor", "rope_yarn_mscale")
SCALED = ("rope_linear", "rope_dynamic_long", "rope_llama3", *YARNS)
ROTATED = ("q_proj.weight", "k_proj.weight")

BUGS = (
    Bug(
        "positions not rotated",
        DECODERS,
        configure(rope_theta=1e30, rope_scaling={"rope_type": "linear", "factor": 1e9}),
    ),
    Bug("rope_theta 10000 hard-coded", (*DECODERS, *SCALED), configure(rope_theta=10000.0)),
    Bug("rotary scaling ignored", SCALED, configure(rope_scaling=None)),
    Bug("neighbours rotated together", DECODERS, change(_interleaved, *ROTATED)),
    Bug("query heads share keys in turns", DECODERS, change(_cyclic_groups, "q_proj.weight")),
    Bug("heads split the wrong way round", DECODERS, change(heads_last(2), "v_proj.weight")),
    Bug("key and value exchanged", DECODERS, swap("k_proj.weight", "v_proj.weight")),
    Bug("gate and up exchanged", DECODERS, swap("gate_proj.weight", "up_proj.weight")),
    Bug("the two norms exchanged", DECODERS, swap("input_layernorm.weight", "post_attention_layernorm.weight")),
    Bug("scores not divided by sqrt(d)", DECODERS, change(lambda w: w * 10**0.5, "q_proj.weight")),
    # heads of 10 where the hidden size would give 6
    Bug("scores divided by sqrt(hidden / heads)", DECODERS, change(lambda w: w * (10 / 6) ** 0.5, "q_proj.weight")),
    Bug("rms_norm_eps 1e-6 hard-coded", DECODERS, configure(rms_norm_eps=1e-6)),
    Bug(
        "scale of the norm added to one",
        DECODERS,
        change(lambda w: 1 + w, "model.norm.weight", "transformer.norm.weight", "norm.weight"),
    ),
    Bug("not causal", ("causal_lm", "left_padded", "model"), _future),
    # Behind a causal mask only padding before the text can be attended to.
    Bug("padding attended to", ("left_padded", "left_padded_label"), change_input("attention_mask", np.ones_like)),
    Bug("position_ids ignored", ("position_ids",), change_input("position_ids", lambda p: np.arange(T)[None] + 0 * p)),
    Bug("mask transposed", ("mask_4d",), change_input("attention_mask", lambda m: m.swapaxes(2, 3))),
    Bug("label read off the last position", ("sequence_classification",), configure(pad_token_id=60)),
    Bug("gelu instead of silu", DECODERS, configure(hidden_act="gelu")),
    Bug("silu instead of gelu", ("act_gelu",), configure(hidden_act="silu")),
    Bug("biases of the attention forgotten", ("biases",), zero("q_proj.bias", "v_proj.bias", "o_proj.bias")),
    Bug("biases of the feed-forward forgotten", ("biases",), zero("gate_proj.bias", "up_proj.bias", "down_proj.bias")),
    Bug(
        "length of the text left out of dynamic scaling", ("rope_dynamic_long",), configure(max_position_embeddings=40)
    ),
    Bug("llama3's middle frequencies not interpolated", ("rope_llama3",), _scale(high_freq_factor=1.001)),
    Bug("llama3's bounds 8192 hard-coded", ("rope_llama3",), _scale(original_max_position_embeddings=8192)),
    Bug("yarn without its attention factor", YARNS, _scale(attention_factor=1.0)),
    Bug("yarn's bounds 32 and 1 hard-coded", YARNS[:1] + YARNS[2:], _scale(beta_fast=32, beta_slow=1)),
    Bug("yarn's original length ignored", ("rope_yarn",), _scale(original_max_position_embeddings=400)),
    Bug("yarn's two scales ignored", ("rope_yarn_mscale",), _scale(mscale=None)),
    Bug("yarn's bounds rounded all the same", ("rope_yarn_mscale",), _scale(truncate=True)),
    Bug("an old kind of scaling not seen", ("old_rope_scaling",), configure(rope_scaling=None)),
    ignored_labels_count("causal_lm", "token_classification"),
    labels_off_by_one("causal_lm"),
    answers_cut_off("question_answering"),
)

INVISIBLE: tuple[str, ...] = ()

# The frequencies of all positions follow the length of the text, so keys that were turned earlier are turned otherwise.
NOT_STEPWISE = ("rope_dynamic_long",)
