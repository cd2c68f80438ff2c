"""mT5: T5's six heads under its defaults, gated networks and a head of its own. The rest is shown by T5's cases."""

import numpy as np

from oracle.cases import (
    answers_cut_off,
    change,
    change_input,
    configure,
    ignored_labels_count,
    labels,
    mask,
    question_answering,
    swap,
    token_classification,
    zero,
)
from oracle.families import Bug, Case
from oracle.families.t5 import ANSWER, LEFT, PADDED, SIZES, D, ended, text

CASES = (
    Case("model", "MT5Model", SIZES, LEFT | ANSWER, ("last_hidden_state", "encoder_last_hidden_state")),
    # The decoder's input is made of the labels.
    Case(
        "conditional_generation",
        "MT5ForConditionalGeneration",
        SIZES | {"decoder_start_token_id": 5, "pad_token_id": 3},
        text("labels_only", 25) | {"labels": labels("labels_only", 61, mask(19, width=D))},
        ("loss", "logits"),
    ),
    Case("tied", "MT5ForConditionalGeneration", SIZES | {"tie_word_embeddings": True}, PADDED | ANSWER, ("logits",)),
    Case("encoder", "MT5EncoderModel", SIZES, PADDED, ("last_hidden_state",)),
    Case(
        "sequence_classification",
        "MT5ForSequenceClassification",
        SIZES | {"num_labels": 3},
        ended(PADDED) | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    token_classification("MT5", SIZES, PADDED),
    question_answering("MT5", SIZES, PADDED),
)

BOTH = ("model", "conditional_generation", "tied", "sequence_classification", "question_answering")
ALL = (*BOTH, "encoder", "token_classification")
READ = (*BOTH[2:], "encoder", "token_classification")

BUGS = (
    Bug("distances forgotten", ALL, zero("relative_attention_bias.weight")),
    Bug("scores divided by sqrt(d)", ALL, change(lambda w: w / 7**0.5, ".q.weight")),
    Bug("gate and up exchanged", ALL, swap("wi_0.weight", "wi_1.weight")),
    # The two curves are within 5e-4 of each other everywhere.
    Bug("gated gelu by erf instead of tanh", ALL, configure(dense_act_fn="gelu"), least=2e-4),
    Bug("padding attended to", (*READ, "model"), change_input("attention_mask", np.ones_like)),
    Bug("cross-attention left out", ("tied", "conditional_generation"), zero("EncDecAttention.o.weight")),
    Bug("tied output not scaled", ("tied",), change(lambda w: 6 * w, "decoder.final_layer_norm.weight")),
    Bug(
        "untied output scaled",
        ("conditional_generation",),
        change(lambda w: w / 6, "decoder.final_layer_norm.weight"),
        outputs=("logits",),
    ),
    Bug(
        "start token taken for padding",
        ("conditional_generation",),
        configure(decoder_start_token_id=3),
        outputs=("logits",),
    ),
    ignored_labels_count("token_classification", least=1e-3),
    answers_cut_off("question_answering"),
)

INVISIBLE: tuple[str, ...] = ()

# Of a whole model's checkpoint, the encoder alone leaves the decoder out without a word.
SILENT = (r"^decoder\.",)
