"""XGLM: sines for positions, scaled words, norms before the parts, an encoder to look at; two heads.

Sizes are asymmetric on purpose: 3 heads of 12, an odd feed-forward width, 25 tokens, one row padded. The epsilon of
norms is fixed, and small.
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
    decoder_heads,
    floats,
    heads_last,
    ids,
    ignored_labels_count,
    labels_off_by_one,
    mask,
    swap,
    text,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
    "d_model": 36,
    "ffn_dim": 53,
    "num_layers": 2,
    "attention_heads": 3,
}
PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)
CROSS = SIZES | {"add_cross_attention": True}
MEMORY = {"encoder_hidden_states": floats("memory", 2, 13, 36), "encoder_attention_mask": mask(13, 8, width=13)}

HEADS = decoder_heads("XGLM", SIZES, PADDED)

CASES = (
    *HEADS,
    # Positions are not shifted for left padding: the first real token of a padded row is not at position 0.
    Case("left_padded", "XGLMForCausalLM", SIZES, LEFT, ("logits",)),
    # More tokens than positions, which sines do not mind.
    Case(
        "ids_only",
        "XGLMModel",
        SIZES | {"max_position_embeddings": 20},
        {"input_ids": ids("ids_only", 1, 31)},
        ("last_hidden_state",),
    ),
    # Vectors that are given are not scaled.
    Case(
        "inputs_embeds",
        "XGLMModel",
        SIZES,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("last_hidden_state",),
    ),
    Case("traces", "XGLMForCausalLM", SIZES, text("traces", 17), ("logits", "hidden_states", "attentions"), TRACES),
    # The sines at the place that has the number of the padding token are zero: here those of the fourth token.
    Case("padding_place", "XGLMModel", SIZES | {"pad_token_id": 5}, text("padding_place", 25), ("last_hidden_state",)),
    Case(
        "cross",
        "XGLMForCausalLM",
        CROSS,
        PADDED | MEMORY,
        ("logits", "cross_attentions"),
        {"output_attentions": True},
    ),
    Case(
        "switches",
        "XGLMForCausalLM",
        SIZES | {"tie_word_embeddings": False, "scale_embedding": False, "activation_function": "relu"},
        text("switches", 25),
        ("logits",),
    ),
)


def _from_zero(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    """Gives the first token the first row of sines, which is the third one's."""
    inputs["position_ids"] = np.arange(T)[None].repeat(2, axis=0) - 2


DECODERS = tuple(case.name for case in HEADS)

BUGS = (
    Bug("words not scaled", DECODERS, configure(scale_embedding=False)),
    Bug("words scaled all the same", ("switches",), configure(scale_embedding=True)),
    Bug("given vectors scaled, too", ("inputs_embeds",), change_input("inputs_embeds", lambda x: 6 * x)),
    Bug("positions begin with 0", (*DECODERS, "left_padded"), _from_zero),
    Bug("no place is nowhere", ("padding_place",), configure(pad_token_id=1)),
    Bug("scores not divided by sqrt(d)", DECODERS, change(lambda w: w * 12**0.5, "q_proj.weight", "q_proj.bias")),
    Bug("key and value exchanged", DECODERS, swap("k_proj", "v_proj", "weight", "bias")),
    Bug("heads split the wrong way round", DECODERS, change(heads_last(3), "v_proj.weight", "v_proj.bias")),
    Bug("square kernels not transposed", DECODERS, change(np.transpose, "out_proj.weight")),
    Bug("the two norms exchanged", DECODERS, swap("self_attn_layer_norm.weight", "final_layer_norm.weight")),
    Bug("gelu by tanh instead of erf", DECODERS, configure(activation_function="gelu_new"), least=2e-4),
    Bug("gelu for every activation", ("switches",), configure(activation_function="gelu")),
    Bug("padding attended to", ("left_padded",), change_input("attention_mask", np.ones_like)),
    Bug("cross-attention left out", ("cross",), zero("encoder_attn.out_proj.weight"), outputs=("logits",)),
    Bug("padding of the states attended to", ("cross",), change_input("encoder_attention_mask", np.ones_like)),
    Bug("head tied all the same", ("switches",), configure(tie_word_embeddings=True)),
    ignored_labels_count("causal_lm", least=5e-3),
    labels_off_by_one("causal_lm", least=5e-3),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.k_proj\.bias$",)
