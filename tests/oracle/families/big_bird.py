"""BigBird: eight heads over texts read block by block, short texts and decoders read with full attention.

What BERT's cases show is not asked again. Texts of 25 tokens are 9 blocks of 3, two tokens short, or 13 of 2; padded on
the left, whole blocks of them are padding. The reference draws no blocks when it does not train: the first one counts
once or twice more.
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
    floats,
    heads_last,
    ids,
    ignored_labels_count,
    labels,
    labels_off_by_one,
    swap,
    text,
    token_classification,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 53,
    "max_position_embeddings": 40,
    "layer_norm_eps": 0.05,
    "block_size": 3,
    "num_random_blocks": 1,
    "sep_token_id": 7,
}
FINE = SIZES | {"block_size": 2, "num_random_blocks": 2}
# Blocks so large that the text is too short for them.
DECODER = SIZES | {"block_size": 8, "is_decoder": True}


def segments(name: str) -> Tensors:
    """Returns segments of tokens, `[2, T]`."""
    return {"token_type_ids": ids(f"{name}.token_type_ids", 2, T, low=0, high=2)}


PADDED = text("padded", 25, 17) | segments("padded")
CHOICES = {k: v.reshape(2, 3, T) for k, v in text("choices", 25, 20, 9, 13, 25, 17).items()}


def asked(name: str, *at: int) -> Tensors:
    """Returns texts of two parts, with the first separator at the places `at`."""
    made = text(name, *(25, 18)[: len(at)], low=8)
    made["input_ids"][np.arange(len(at)), at] = 7
    made["input_ids"][:, 15] = 7
    return made


ANSWERS = {"start_positions": np.array([9, 11]), "end_positions": np.array([12, 30])}

CASES = (
    Case("model", "BigBirdModel", SIZES, PADDED, ("last_hidden_state", "pooler_output")),
    # Two whole blocks and a part of one are padding.
    Case("left_padded", "BigBirdModel", FINE, text("left", 25, 18, left=True), ("last_hidden_state",)),
    Case(
        "pre_training",
        "BigBirdForPreTraining",
        SIZES,
        PADDED
        | {"labels": labels("pre_training", VOCAB, PADDED["attention_mask"]), "next_sentence_label": np.array([1, 0])},
        ("loss", "prediction_logits", "seq_relationship_logits"),
    ),
    Case(
        "masked_lm",
        "BigBirdForMaskedLM",
        FINE,
        PADDED | {"labels": labels("masked_lm", VOCAB, PADDED["attention_mask"])},
        ("loss", "logits"),
    ),
    Case(
        "causal_lm",
        "BigBirdForCausalLM",
        DECODER,
        PADDED | {"labels": labels("causal_lm", VOCAB, PADDED["attention_mask"])},
        ("loss", "logits"),
    ),
    Case(
        "sequence_classification",
        "BigBirdForSequenceClassification",
        SIZES | {"num_labels": 3},
        PADDED | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    Case(
        "multiple_choice", "BigBirdForMultipleChoice", SIZES, CHOICES | {"labels": np.array([2, 0])}, ("loss", "logits")
    ),
    token_classification("BigBird", SIZES, PADDED),
    # The question ends with the first separator and is the first segment.
    Case(
        "question_answering",
        "BigBirdForQuestionAnswering",
        SIZES,
        asked("question_answering", 6, 4) | ANSWERS,
        ("loss", "start_logits", "end_logits"),
    ),
    # A question of the class token alone, beside which nothing is ruled out: what is, gets -1e6, and then little shows.
    Case(
        "question_lengths",
        "BigBirdForQuestionAnswering",
        FINE,
        asked("question_lengths", 6, 4) | {"question_lengths": np.array([[1], [1]])},
        ("start_logits", "end_logits"),
    ),
    # As many tokens as fill eight blocks. Weights of the first block are shown as if it counted once.
    Case(
        "traces",
        "BigBirdModel",
        SIZES,
        {"input_ids": ids("traces", 1, 24)},
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
    # One token less than would be cut into blocks; vectors are scaled, too.
    Case(
        "full",
        "BigBirdModel",
        SIZES | {"use_bias": False, "rescale_embeddings": True, "attention_type": "original_full"},
        {"inputs_embeds": floats("full", 2, T, 36), "attention_mask": PADDED["attention_mask"]}
        | {"position_ids": ids("full.position_ids", 2, T, low=0, high=40)},
        ("last_hidden_state",),
    ),
    Case("just_too_short", "BigBirdModel", SIZES, {"input_ids": ids("just_too_short", 2, 21)}, ("last_hidden_state",)),
)

# ---- mistakes that the cases above must show ------------------------------------------------------------------------

SPARSE = ("model", "left_padded", "pre_training", "masked_lm", "token_classification")
QKV = tuple(f"self.{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weight", "bias"))


BUGS = (
    Bug("full attention", SPARSE, configure(attention_type="original_full")),
    Bug("blocks of another size", ("model", "pre_training"), configure(block_size=2)),
    Bug("the first block counts once more", ("left_padded", "masked_lm"), configure(num_random_blocks=1)),
    Bug("segments forgotten", ("model", "masked_lm"), zero("token_type_embeddings.weight")),
    Bug("positions forgotten", SPARSE, zero("position_embeddings.weight")),
    Bug("query and key exchanged", SPARSE, swap("self.query", "self.key", "weight", "bias")),
    Bug("heads split the wrong way round", SPARSE, change(heads_last(4), *QKV)),
    Bug(
        "layer_norm_eps 1e-12 hard-coded",
        ("model", "left_padded", "masked_lm", "question_lengths"),
        configure(layer_norm_eps=1e-12),
    ),
    Bug("padding attended to", SPARSE, change_input("attention_mask", np.ones_like)),
    Bug("decoder not causal", ("causal_lm",), configure(is_decoder=False)),
    Bug("vectors not scaled", ("full",), configure(rescale_embeddings=False)),
    Bug(
        "the last separator ends the question",
        ("question_answering",),
        change_input("input_ids", lambda x: np.where((x == 7) & (np.arange(T) < 15), 8, x)),
    ),
    Bug("question lengths ignored", ("question_lengths",), change_input("question_lengths", np.zeros_like)),
    ignored_labels_count("pre_training", "masked_lm", "causal_lm", "token_classification"),
    labels_off_by_one("masked_lm", "causal_lm"),
    answers_cut_off("question_answering"),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
# Poolers are stored with heads that do not use them.
INVISIBLE = (r"\.self\.key\.bias$", r"^bert\.pooler\.")
_HEADS = ("ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
DEAD = {f"BigBird{head}": r"^pooler\." for head in _HEADS}
