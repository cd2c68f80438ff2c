"""RoFormer: rotary positions of neighbouring channels, narrow word vectors, heads over summaries; the rest is BERT's.

Its table of sines and cosines is a stored parameter. The reference reads it as it stands, so that of those that write
it holds anything; that of the others is the real one, as Flax's classes have no other.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    answers_cut_off,
    causal_lm,
    change,
    change_input,
    configure,
    floats,
    heads_last,
    ignored_labels_count,
    label_heads,
    labels_off_by_one,
    mask,
    masked_lm,
    swap,
    text,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 53,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
    "layer_norm_eps": 0.05,
    "embedding_size": 20,
}
DECODER = SIZES | {"is_decoder": True}
CROSS = DECODER | {"add_cross_attention": True}
PADDED = text("padded", 25, 17, segments=3)
MEMORY = {"encoder_hidden_states": floats("memory", 2, 13, 36), "encoder_attention_mask": mask(13, 8, width=13)}

_angles = np.arange(40)[:, None] / 10000 ** (np.arange(0, 12, 2) / 12)
TABLE = np.concatenate([np.sin(_angles), np.cos(_angles)], axis=1).astype(np.float32)


def real(case: Case) -> Case:
    """Returns the case with the real table of sines and cosines."""
    prefix = "" if case.architecture == "RoFormerModel" else "roformer."
    return replace(case, buffers={f"{prefix}encoder.embed_positions.weight": TABLE})


_cases = (
    Case("model", "RoFormerModel", SIZES, PADDED, ("last_hidden_state",)),
    Case(
        "traces",
        "RoFormerModel",
        SIZES,
        text("traces", 25, segments=3),
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
    masked_lm("RoFormer", SIZES, PADDED),
    causal_lm("RoFormer", DECODER, text("left", 25, 18, left=True, segments=3)),
    *label_heads(
        "RoFormer", SIZES | {"hidden_act": "relu"}, PADDED, text("choices", 25, 20, 9, 13, 25, 17, segments=3)
    ),
    Case("rotary_value", "RoFormerForCausalLM", DECODER | {"rotary_value": True}, PADDED, ("logits",)),
    Case("cross", "RoFormerForCausalLM", CROSS, PADDED | MEMORY, ("logits",)),
    # Word vectors as wide as the states, as published ones are, are not projected.
    Case(
        "inputs_embeds",
        "RoFormerModel",
        SIZES | {"embedding_size": None},
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": PADDED["attention_mask"]},
        ("last_hidden_state",),
    ),
)

CASES = tuple(case if case.architecture == "RoFormerForCausalLM" else real(case) for case in _cases)

HEADS = ("model", "masked_lm", "causal_lm", "sequence_classification", "multiple_choice", "token_classification")
QKV = tuple(f"self.{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weight", "bias"))


def halves(table: Any) -> Any:
    """Reads sines and cosines the other way round."""
    return np.roll(table, table.shape[1] // 2, axis=1)


def by_halves(rows: Any) -> Any:
    """Reads the channels of a head [heads * 12] as if pairs were (i, i + 6), not neighbours."""
    order = np.arange(12).reshape(2, 6).T.ravel()
    return rows.reshape(-1, 12, *rows.shape[1:])[:, order].reshape(rows.shape)


BUGS = (
    Bug("segments forgotten", HEADS, zero("token_type_embeddings.weight")),
    Bug("sines and cosines exchanged", HEADS, change(halves, "embed_positions.weight")),
    Bug(
        "positions off by one",
        ("causal_lm", "rotary_value"),
        change(lambda table: np.roll(table, 1, 0), "embed_positions.weight"),
    ),
    Bug("channels i and i + half turned", HEADS, change(by_halves, *QKV[:4])),
    Bug("query and key exchanged", HEADS, swap("self.query", "self.key", "weight", "bias")),
    Bug("heads split the wrong way round", HEADS, change(heads_last(SIZES["num_attention_heads"]), *QKV)),
    Bug("square kernels not transposed", HEADS, change(np.transpose, "self.value.weight")),
    Bug("layer_norm_eps 1e-12 hard-coded", HEADS, configure(layer_norm_eps=1e-12)),
    Bug("padding attended to", ("model", "masked_lm", "causal_lm"), change_input("attention_mask", np.ones_like)),
    Bug("decoder not causal", ("causal_lm",), configure(is_decoder=False)),
    Bug("values not turned", ("rotary_value",), configure(rotary_value=False)),
    Bug("activation of the text head fixed", ("sequence_classification",), configure(hidden_act="gelu")),
    Bug("cross-attention left out", ("cross",), zero("crossattention.output.dense.weight")),
    ignored_labels_count("masked_lm", "token_classification"),
    labels_off_by_one("masked_lm", "causal_lm"),
    answers_cut_off("question_answering"),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away; where keys are turned, it shows.
INVISIBLE = (r"\.crossattention\.self\.key\.bias$",)
