"""mBART: five heads, norms before every part and after the last layer, texts that end with their language.

What does not differ from BART is shown by BART's cases.
"""

from typing import Any

import numpy as np

from oracle import bart_line
from oracle.bart_line import EVERY, LEFT, PADDED, PAIR, SIZES, shifted, untied, word_cases
from oracle.cases import VOCAB, Tensors, answers_cut_off, floats, question_answering, swap
from oracle.families import Bug, Case

# The state at the last end-of-text token is classified: two in every row, and after the last one the language.
ENDED = {"input_ids": PADDED["input_ids"].copy(), "attention_mask": PADDED["attention_mask"]}
ENDED["input_ids"][[0, 0, 1, 1], [9, 23, 5, 15]] = SIZES["eos_token_id"]

HEADS = (
    *word_cases("MBart"),
    # Untied, the reference has three tables of words, of which it never reads the one that is called shared.
    untied(
        "MBart",
        buffers={
            "model.encoder.embed_tokens.weight": 0.5 * floats("untied.encoder", VOCAB, 36),
            "model.decoder.embed_tokens.weight": 0.5 * floats("untied.decoder", VOCAB, 36),
        },
    ),
    Case(
        "sequence_classification",
        "MBartForSequenceClassification",
        SIZES | {"num_labels": 3},
        ENDED | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    # The decoder reads the text behind its last token.
    question_answering("MBart", SIZES, PADDED),
    # The last token is told by the number of those that are no padding, wherever padding is.
    Case("left_padded", "MBartModel", SIZES, LEFT, ("last_hidden_state",)),
)

# As facebook/mbart-large-en-ro has it, sizes aside.
CONFIG_2020: dict[str, Any] = {
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": True,
    "architectures": ["MBartForConditionalGeneration"],
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "classifier_dropout": 0.0,
    "d_model": 36,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 47,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 57,
    "dropout": 0.1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 53,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 3,
    "eos_token_id": 2,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "max_length": 200,
    "max_position_embeddings": 40,
    "model_type": "mbart",
    "normalize_before": True,
    "normalize_embedding": True,
    "num_beams": 5,
    "num_hidden_layers": 3,
    "output_past": True,
    "pad_token_id": 1,
    "scale_embedding": True,
    "static_position_embeddings": False,
    "task_specific_params": {"translation_en_to_ro": {"decoder_start_token_id": 57}},
    "vocab_size": 61,
}

CHECKPOINTS = (
    # Files of 2020 repeat the table under every name that uses it.
    Case(
        "old_names",
        "MBartForConditionalGeneration",
        CONFIG_2020,
        PAIR,
        ("logits",),
        literal_config=True,
        copies=dict.fromkeys(
            ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
            "model.shared.weight",
        ),
    ),
)

CASES = HEADS + CHECKPOINTS


def _after_the_last_place(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    source = inputs["input_ids"]
    inputs["decoder_input_ids"] = np.concatenate([source[:, -1:], source[:, :-1]], axis=1)


READ = ("question_answering", "sequence_classification")

BUGS = (
    *bart_line.BUGS,
    *bart_line.SCALED,
    bart_line.POSITIONS,
    Bug("positions not offset by 2", EVERY, bart_line.ROLLED),
    Bug("first and last norm exchanged", EVERY, swap("layernorm_embedding", "layer_norm", "weight", "bias")),
    Bug("decoder starts with a token for all", ("conditional_generation",), shifted(5), outputs=("logits",)),
    Bug("decoder starts with a token for all", READ, shifted(5, name="input_ids")),
    Bug("the last token taken for the language", ("question_answering", "left_padded"), _after_the_last_place),
    answers_cut_off("question_answering"),
)

INVISIBLE = bart_line.INVISIBLE
SILENT = bart_line.SILENT
