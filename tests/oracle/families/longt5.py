"""LongT5: an encoder that attends within blocks, or also to sums of the text; the decoder is T5's.

A text of 25 tokens is four blocks of 7, of which the last is not full, and seven sums of 4, of which the last is of one
token and falls to the one before. The reference numbers blocks in single precision, so that only sums of a power of two
tokens are told apart for certain.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    Tensors,
    change,
    change_input,
    configure,
    ending,
    floats,
    ids,
    ignored_labels_count,
    labels,
    mask,
    swap,
    zero,
)
from oracle.families import Bug, Case
from oracle.families.t5 import ANSWER, LEFT, PADDED, D, answer, text
from oracle.families.t5 import SIZES as PLAIN

SIZES: dict[str, Any] = PLAIN | {"local_radius": 6, "global_block_size": 4}
GLOBAL = SIZES | {"encoder_attention_type": "transient-global", "feed_forward_proj": "gated-gelu"}
STATES = ("last_hidden_state", "encoder_last_hidden_state")

CASES = (
    Case("model", "LongT5Model", SIZES, LEFT | ANSWER, STATES),
    Case("global", "LongT5Model", GLOBAL, PADDED | ANSWER, STATES),
    # Sums are counted by their ends, so those of a text with padding on the left are other ones.
    Case("global_left_padded", "LongT5EncoderModel", GLOBAL, LEFT, ("last_hidden_state",)),
    Case("encoder", "LongT5EncoderModel", SIZES, PADDED, ("last_hidden_state",)),
    # The decoder's input is made of the labels; the head is the table.
    Case(
        "conditional_generation",
        "LongT5ForConditionalGeneration",
        GLOBAL,
        text("labels_only", 25) | {"labels": labels("labels_only", VOCAB, mask(19, width=D))},
        ("loss", "logits"),
    ),
    # Published models have a head of their own.
    Case(
        "untied",
        "LongT5ForConditionalGeneration",
        GLOBAL | {"tie_word_embeddings": False},
        PADDED | ANSWER,
        ("logits",),
        missing=("decoder.embed_tokens.weight", "encoder.embed_tokens.weight"),
    ),
    # Shorter than a block, and than what is summed: there are no sums.
    Case(
        "short",
        "LongT5Model",
        GLOBAL,
        {"input_ids": ids("short", 2, 3, low=2)} | answer("short", 2, 25),
        STATES,
    ),
    Case(
        "inputs_embeds",
        "LongT5Model",
        GLOBAL,
        {
            "inputs_embeds": floats("inputs_embeds", 2, 25, 36),
            "decoder_inputs_embeds": floats("decoder_inputs_embeds", 2, D, 36),
            "head_mask": np.array([[1, 0, 0.5, 1], [0.25, 1, 1, 0]], np.float32),
            # the reference masks as many heads in the decoder if it is not told
            "decoder_head_mask": np.ones((3, 4), np.float32),
        },
        STATES,
    ),
    # Whole blocks, for what the reference has for queries beyond the text is not defined.
    Case(
        "traces",
        "LongT5Model",
        GLOBAL,
        {"input_ids": ids("traces", 1, 14, low=2)} | answer("traces", 1, 9),
        (
            *STATES,
            "encoder_hidden_states",
            "encoder_attentions",
            "decoder_hidden_states",
            "decoder_attentions",
            "cross_attentions",
        ),
        TRACES,
    ),
    Case(
        "traces_of_the_encoder",
        "LongT5EncoderModel",
        SIZES,
        {"input_ids": ids("traces_of_the_encoder", 1, 14, low=2)},
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
)


def _exchange_tables(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    near, far = (ending(tensors, f"TransientGlobalSelfAttention.{name}.weight")[0] for name in TABLES)
    tensors[near], tensors[far] = tensors[far], tensors[near]


TABLES = ("relative_attention_bias", "global_relative_attention_bias")
SUMS = ("global", "global_left_padded", "conditional_generation", "untied")
NEAR = ("model", "encoder")
ALL = (*NEAR, *SUMS)

BUGS = (
    Bug("distances forgotten", ALL, zero(".relative_attention_bias.weight")),
    Bug("distances of sums forgotten", SUMS, zero("global_relative_attention_bias.weight")),
    Bug("tables of distances exchanged", SUMS, _exchange_tables),
    Bug(
        "norm of the sums taken for that of the layer", SUMS, change(lambda w: w / 2, "global_input_layer_norm.weight")
    ),
    Bug("radius one longer", ALL, configure(local_radius=7)),
    Bug("scores divided by sqrt(d)", ALL, change(lambda w: w / 7**0.5, ".q.weight")),
    Bug("gate and up exchanged", SUMS, swap("wi_0.weight", "wi_1.weight")),
    Bug("padding attended to", ("model", "encoder", "global", "untied"), change_input("attention_mask", np.ones_like)),
    Bug("head masks ignored", ("inputs_embeds",), change_input("head_mask", np.ones_like)),
    ignored_labels_count("conditional_generation", least=1e-3),
)

INVISIBLE: tuple[str, ...] = ()
# The kind of attention says which parameters there are.
KEPT = ("encoder_attention_type",)
# Of a whole model's checkpoint, the encoder alone leaves the decoder out without a word; untied tables of words are
# reported as missing, though they are the shared one again.
SILENT = (r"^decoder\.", r"embed_tokens\.weight$")
