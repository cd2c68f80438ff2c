"""RoBERTa: positions counted over real tokens, its word head, its head of two layers for texts; the rest is BERT's.

The padding token is 4, not the usual 1: positions begin after it, and a number written into the code would show. Some
tokens among the real ones are padding tokens, for it is the token that counts and not the mask.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    Tensors,
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

PAD = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 53,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
    "layer_norm_eps": 0.05,
    "pad_token_id": PAD,
}
DECODER = SIZES | {"is_decoder": True}
CROSS = DECODER | {"add_cross_attention": True}


def read(name: str, *lengths: int, left: bool = False, gaps: bool = True) -> Tensors:
    """Returns ids, padding mask and segments, each [rows, T]; with `gaps`, padding tokens inside of the first row."""
    made = text(name, *lengths, left=left, low=PAD + 1, pad=PAD, segments=SIZES["type_vocab_size"])
    if gaps:
        made["input_ids"][0, [6, 11]] = PAD
    return made


PADDED = read("padded", 25, 17)
WRITTEN = read("written", 25, 17, gaps=False)
LEFT = read("left", 25, 18, left=True)
CHOICES = read("choices", 25, 20, 9, 13, 25, 17)
MEMORY = {"encoder_hidden_states": floats("memory", 2, 13, 36), "encoder_attention_mask": mask(13, 8, width=13)}


def cases(prefix: str) -> tuple[Case, ...]:
    """Returns the cases of RoBERTa's line, whose classes begin with `prefix`."""
    return (
        Case(
            "model",
            f"{prefix}Model",
            SIZES,
            {name: rows[:1] for name, rows in PADDED.items()},
            ("last_hidden_state", "pooler_output", "hidden_states", "attentions"),
            TRACES,
        ),
        masked_lm(prefix, SIZES | {"hidden_act": "relu"}, PADDED),
        causal_lm(prefix, DECODER, WRITTEN),
        *label_heads(prefix, SIZES, PADDED, CHOICES),
        Case("left_padded", f"{prefix}ForCausalLM", DECODER, LEFT, ("logits",)),
    )


CASES = (
    *cases("Roberta"),
    # Vectors are all taken for words: positions without gaps.
    Case(
        "inputs_embeds",
        "RobertaForCausalLM",
        DECODER,
        {name: PADDED[name] for name in ("attention_mask", "token_type_ids")}
        | {"inputs_embeds": floats("inputs_embeds", 2, T, 36)},
        ("logits",),
    ),
    Case("untied", "RobertaForMaskedLM", SIZES | {"tie_word_embeddings": False}, PADDED, ("logits",)),
    Case("cross", "RobertaForCausalLM", CROSS, WRITTEN | MEMORY, ("logits",)),
    # As checkpoints of before 2023 are: a buffer of positions, and the decoder's two tensors beside what they repeat.
    Case(
        "old_extra_keys",
        "RobertaForMaskedLM",
        SIZES,
        PADDED,
        ("logits",),
        copies={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        buffers={"roberta.embeddings.position_ids": np.arange(40)[None]},
    ),
)

HEADS = ("masked_lm", "causal_lm", "sequence_classification", "token_classification", "left_padded")
COUNTED = ("multiple_choice", "question_answering", *(name for name in HEADS if name != "causal_lm"))
QKV = tuple(f"self.{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weight", "bias"))


def bert_positions(config: Any, tensors: Tensors, inputs: Tensors) -> None:
    """Numbers tokens from 0 on, whatever they are."""
    shape = inputs["input_ids"].shape if "input_ids" in inputs else inputs["inputs_embeds"].shape[:-1]
    inputs["position_ids"] = np.broadcast_to(np.arange(shape[-1]), shape).copy()


def gapless_positions(config: Any, tensors: Tensors, inputs: Tensors) -> None:
    """Numbers tokens from pad + 1 on, padding tokens too."""
    bert_positions(config, tensors, inputs)
    inputs["position_ids"] += config["pad_token_id"] + 1


def positions_of_the_mask(config: Any, tensors: Tensors, inputs: Tensors) -> None:
    """Counts what the mask says is no padding, rather than tokens."""
    seen = inputs["attention_mask"]
    inputs["position_ids"] = np.cumsum(seen, -1) * seen + config["pad_token_id"]


def bugs() -> tuple[Bug, ...]:
    """Returns the mistakes that the cases of RoBERTa's line must show."""
    return (
        Bug("positions as BERT's", (*COUNTED, "causal_lm"), bert_positions),
        Bug("padding tokens counted", COUNTED, gapless_positions),
        Bug("positions of the mask", COUNTED, positions_of_the_mask),
        Bug("query and key exchanged", HEADS, swap("self.query", "self.key", "weight", "bias")),
        Bug("heads split the wrong way round", HEADS, change(heads_last(SIZES["num_attention_heads"]), *QKV)),
        Bug("square kernels not transposed", HEADS, change(np.transpose, "self.value.weight")),
        Bug("layer_norm_eps 1e-12 hard-coded", HEADS, configure(layer_norm_eps=1e-12)),
        Bug("padding attended to", ("masked_lm", "left_padded"), change_input("attention_mask", np.ones_like)),
        Bug("decoder not causal", ("causal_lm", "left_padded"), configure(is_decoder=False)),
        Bug("dense layer of the text head left out", ("sequence_classification",), zero("classifier.dense.weight")),
        ignored_labels_count("masked_lm", "token_classification"),
        ignored_labels_count("causal_lm", least=1e-3),
        labels_off_by_one("masked_lm", "causal_lm"),
    )


BUGS = (
    *bugs(),
    Bug("positions of vectors as BERT's", ("inputs_embeds",), bert_positions),
    Bug("cross-attention left out", ("cross",), zero("crossattention.output.dense.weight")),
)

# With a cache the reference counts what was read before by columns, also padding; only `position_ids` say otherwise.
NOT_STEPWISE = ("left_padded",)

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.self\.key\.bias$",)
