"""BLOOM: ALiBi for two numbers of heads, q, k and v of a head together, normalised words; five heads.

Sizes are asymmetric on purpose: 6 heads of 7, which are no power of two, 25 tokens, one row padded. The slopes of all
heads differ, so that exchanged heads show. `layer_norm_epsilon` is large enough that a hard-coded one shows.
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
    ending,
    floats,
    ids,
    ignored_labels_count,
    labels_off_by_one,
    text,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 42,
    "n_layer": 2,
    "n_head": 6,
    "layer_norm_epsilon": 0.05,
    "pad_token_id": 0,
}
PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)
# Padding between a text and what is written after it does not count as distance.
INSIDE = text("inside", 25, 25)
INSIDE["attention_mask"][1, 9:16] = 0

HEADS = decoder_heads("Bloom", SIZES, PADDED, "sequence_classification", "token_classification", "question_answering")

# As bigscience/bloom-560m is on the hub: a language model by its configuration, without prefix and head.
CONFIG_2022: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "architectures": ["BloomForCausalLM"],
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 0.05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 36,
    "n_inner": None,
    "n_layer": 2,
    "num_attention_heads": 4,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 4,
    "seq_length": 40,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 61,
}

CASES = (
    *HEADS,
    Case("left_padded", "BloomForCausalLM", SIZES, LEFT, ("logits",)),
    Case("padded_inside", "BloomForCausalLM", SIZES, INSIDE, ("logits",)),
    Case(
        "inputs_embeds",
        "BloomModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 42), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    Case("traces", "BloomForCausalLM", SIZES, text("traces", 17), ("logits", "hidden_states", "attentions"), TRACES),
    Case("ids_only", "BloomModel", SIZES, {"input_ids": ids("ids_only", 1, 31)}, ("last_hidden_state",)),
    Case(
        "residual_of_norm",
        "BloomModel",
        SIZES | {"apply_residual_connection_post_layernorm": True},
        PADDED,
        ("last_hidden_state",),
    ),
    Case("untied", "BloomForCausalLM", SIZES | {"tie_word_embeddings": False}, text("untied", 25), ("logits",)),
    Case(
        "old_names",
        "BloomForCausalLM",
        CONFIG_2022,
        text("old_names", 25),
        ("logits",),
        writer="BloomModel",
        literal_config=True,
    ),
)


def _thirds(fused: Array) -> Array:
    """Reads all queries first, then all keys, then all values."""
    return fused.reshape(3, SIZES["n_head"], -1, *fused.shape[1:]).swapaxes(0, 1).reshape(fused.shape)


def _order(*parts: int) -> Any:
    """Reads q, k and v of every head in another order."""

    def how(fused: Array) -> Array:
        return fused.reshape(SIZES["n_head"], 3, -1, *fused.shape[1:])[:, parts].reshape(fused.shape)

    return how


def _slopes(heads: list[int]) -> Any:
    """Gives every head the slope of another one, by taking the heads in another order."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        for key in ending(tensors, "query_key_value.weight", "query_key_value.bias"):
            x = tensors[key]
            tensors[key] = x.reshape(len(heads), -1, *x.shape[1:])[heads].reshape(x.shape).copy()
        for key in ending(tensors, "self_attention.dense.weight"):
            x = tensors[key]
            tensors[key] = x.reshape(len(x), len(heads), -1)[:, heads].reshape(x.shape).copy()

    return apply


DECODERS = tuple(case.name for case in HEADS)
RESIDUAL = "apply_residual_connection_post_layernorm"
FUSED = ("query_key_value.weight", "query_key_value.bias")

BUGS = (
    Bug("q, k and v one after the other", DECODERS, change(_thirds, *FUSED)),
    Bug("query and key exchanged", DECODERS, change(_order(1, 0, 2), *FUSED)),
    Bug("key and value exchanged", DECODERS, change(_order(0, 2, 1), *FUSED)),
    Bug("slopes in the order of their size", (*DECODERS, "left_padded"), _slopes([0, 4, 1, 5, 2, 3])),
    Bug("the same slope for neighbours", ("old_names",), _slopes([1, 0, 3, 2])),
    Bug("scores not divided by sqrt(d)", DECODERS, change(lambda w: w * 7**0.5, "query_key_value.weight")),
    Bug("words not normalised", DECODERS, change(lambda w: 0.3 + 0 * w, "word_embeddings_layernorm.weight")),
    Bug("residual of the states all the same", ("residual_of_norm",), configure(**{RESIDUAL: False})),
    Bug("residual of the norm", DECODERS, configure(**{RESIDUAL: True})),
    Bug("bias of the output forgotten", DECODERS, zero("self_attention.dense.bias")),
    Bug("square kernels not transposed", DECODERS, change(np.transpose, "self_attention.dense.weight")),
    Bug("layer_norm_epsilon 1e-5 hard-coded", DECODERS, configure(layer_norm_epsilon=1e-5)),
    Bug("padding attended to", ("left_padded", "padded_inside"), change_input("attention_mask", np.ones_like)),
    Bug("head tied all the same", ("untied",), configure(tie_word_embeddings=True)),
    Bug("label read off the last position", ("sequence_classification",), configure(pad_token_id=55)),
    ignored_labels_count("causal_lm", "token_classification", least=5e-3),
    labels_off_by_one("causal_lm", least=5e-3),
    answers_cut_off("question_answering", least=5e-3),
)

# A key's bias is a third of `query_key_value.bias`, and shows with the other two thirds.
INVISIBLE: tuple[str, ...] = ()
