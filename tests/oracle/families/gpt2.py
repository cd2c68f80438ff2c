"""GPT-2: six heads, fused projections, three ways to scale scores, cross-attention, and checkpoints of its first years.

Sizes are asymmetric on purpose: 4 heads of 9, an odd feed-forward width, 25 tokens of 40 positions, one row padded.
`layer_norm_epsilon` is large enough that a hard-coded one shows. Where the reference is odd, the case says so.
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
    ending,
    floats,
    ids,
    ignored_labels_count,
    labels,
    labels_off_by_one,
    mask,
    question_answering,
    text,
    token_classification,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 40,
    "n_embd": 36,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 53,
    "layer_norm_epsilon": 0.05,
    "bos_token_id": 60,
    "eos_token_id": 60,
}
LABELLED = SIZES | {"num_labels": 3, "pad_token_id": 0}
CROSS = SIZES | {"add_cross_attention": True}


def with_pad_inside(inputs: Tensors) -> Tensors:
    """Returns the text with a padding token in the middle of its first row, which is not where the row ends."""
    tokens = inputs["input_ids"].copy()
    tokens[0, 7] = 0
    return inputs | {"input_ids": tokens}


PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)
CHOICES = {k: v.reshape(2, 2, T) for k, v in text("choices", 25, 20, 9, 25).items()}
ENDS = {"mc_token_ids": np.array([[24, 19], [8, 3]])}
MEMORY = {"encoder_hidden_states": floats("memory", 2, 13, 36), "encoder_attention_mask": mask(13, 8, width=13)}

# ---- the six heads, each with its loss ------------------------------------------------------------------------------

HEADS = (
    Case("model", "GPT2Model", SIZES, PADDED, ("last_hidden_state",)),
    # The reference shifts the labels itself: token t is predicted from those before it.
    Case(
        "lm_head",
        "GPT2LMHeadModel",
        SIZES,
        PADDED | {"labels": labels("lm_head", 61, PADDED["attention_mask"])},
        ("loss", "logits"),
    ),
    # Each text is a row of the batch; the second head looks at one token of each. (There is a loss for it, too.)
    Case(
        "double_heads",
        "GPT2DoubleHeadsModel",
        SIZES,
        CHOICES | ENDS | {"labels": labels("double_heads", 61, CHOICES["attention_mask"])},
        ("loss", "logits", "mc_logits"),
    ),
    # The label is read off the last token that is not padding; what is padding is said by the ids, not by the mask.
    Case(
        "sequence_classification",
        "GPT2ForSequenceClassification",
        LABELLED,
        with_pad_inside(PADDED) | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    token_classification("GPT2", SIZES, PADDED),
    # The second answer ends beyond the text and does not count.
    question_answering("GPT2", SIZES, PADDED),
)

# ---- what can be passed in ------------------------------------------------------------------------------------------

INPUTS = (
    # Positions are not shifted for left padding: the first real token of a padded row is not at position 0.
    Case("left_padded", "GPT2LMHeadModel", SIZES, LEFT, ("logits",)),
    Case("left_padded_label", "GPT2ForSequenceClassification", LABELLED, LEFT, ("logits",)),
    # As many tokens as there are positions. Without a padding token there is one text, and its last token counts.
    Case("ids_only", "GPT2Model", SIZES, {"input_ids": ids("ids_only", 1, 40)}, ("last_hidden_state",)),
    Case(
        "ids_only_label",
        "GPT2ForSequenceClassification",
        SIZES | {"num_labels": 3},
        {"input_ids": ids("ids_only_label", 1, T) % 50},
        ("logits",),
    ),
    # Of vectors nobody knows which are padding: the last position counts, padded or not.
    Case(
        "inputs_embeds",
        "GPT2ForSequenceClassification",
        LABELLED,
        {"inputs_embeds": floats("inputs_embeds", 2, T, 36), "attention_mask": LEFT["attention_mask"]},
        ("logits",),
    ),
    # Segments are looked up in the table of words.
    Case(
        "token_type_ids",
        "GPT2Model",
        SIZES,
        PADDED | {"token_type_ids": ids("token_type_ids", 2, T, low=0, high=VOCAB)},
        ("last_hidden_state",),
    ),
    Case(
        "position_ids",
        "GPT2Model",
        SIZES,
        PADDED | {"position_ids": ids("position_ids", 2, T, low=0, high=40)},
        ("last_hidden_state",),
    ),
    Case(
        "head_mask",
        "GPT2Model",
        SIZES,
        PADDED | {"head_mask": np.array([[1, 0, 0.5, 1], [0, 1, 1, 0.25]], np.float32)},
        ("last_hidden_state",),
    ),
    Case(
        "traces",
        "GPT2LMHeadModel",
        SIZES,
        text("traces", 17),
        ("logits", "hidden_states", "attentions"),
        TRACES,
    ),
)

# ---- what a configuration can ask for -------------------------------------------------------------------------------

CONFIGS = (
    # Without `n_inner` the feed-forward is four times as wide as the states.
    Case("no_inner", "GPT2Model", SIZES | {"n_inner": None}, text("no_inner", 19), ("last_hidden_state",)),
    *(
        Case(
            f"act_{act}",
            "GPT2Model",
            SIZES | {"n_layer": 1, "activation_function": act},
            text(f"act_{act}", 19),
            ("last_hidden_state",),
        )
        for act in ("gelu", "relu")
    ),
    Case("untied", "GPT2LMHeadModel", SIZES | {"tie_word_embeddings": False}, text("untied", 25), ("logits",)),
    Case("unscaled", "GPT2Model", SIZES | {"scale_attn_weights": False}, PADDED, ("last_hidden_state",)),
    Case(
        "inverse_layer_idx",
        "GPT2Model",
        SIZES | {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
        PADDED,
        ("last_hidden_state",),
    ),
    # The order of the multiplications changes, no value does.
    Case(
        "reordered",
        "GPT2Model",
        SIZES | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        text("reordered", 21),
        ("last_hidden_state",),
    ),
    # What the head of the second kind looks at, and what it makes of it.
    *(
        Case(
            f"summary_{kind}",
            "GPT2DoubleHeadsModel",
            SIZES | {"summary_type": kind, "summary_activation": "tanh"},
            CHOICES | ENDS,
            ("mc_logits",),
        )
        for kind in ("last", "first", "mean")
    ),
    Case("summary_no_index", "GPT2DoubleHeadsModel", SIZES, CHOICES, ("mc_logits",)),
    Case(
        "summary_no_proj",
        "GPT2DoubleHeadsModel",
        SIZES | {"summary_use_proj": False},
        CHOICES | ENDS,
        ("mc_logits",),
    ),
    Case(
        "summary_to_hidden",
        "GPT2DoubleHeadsModel",
        SIZES | {"summary_proj_to_labels": False, "summary_activation": "relu"},
        CHOICES | ENDS,
        ("mc_logits",),
    ),
    Case(
        "cross",
        "GPT2LMHeadModel",
        CROSS,
        PADDED | MEMORY | {"labels": labels("cross", 61, PADDED["attention_mask"])},
        ("loss", "logits"),
    ),
    # Every kind of scaling is that of the cross-attention as well, and so is the head mask.
    Case(
        "cross_scaled",
        "GPT2Model",
        CROSS | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        PADDED
        | {
            "encoder_hidden_states": MEMORY["encoder_hidden_states"],
            "head_mask": np.array([[1, 0, 0.5, 1], [0, 1, 1, 0.25]], np.float32),
        },
        ("last_hidden_state",),
    ),
    Case(
        "cross_traces",
        "GPT2Model",
        CROSS,
        text("cross_traces", 17) | {k: v[1:] for k, v in MEMORY.items()},
        ("last_hidden_state", "hidden_states", "attentions", "cross_attentions"),
        TRACES,
    ),
    # Built for cross-attention, but called without anything to attend to: the layers are passed over.
    Case("cross_unused", "GPT2Model", CROSS, PADDED, ("last_hidden_state",)),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

CONFIG_2019: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 60,
    "embd_pdrop": 0.1,
    "eos_token_id": 60,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 0.05,
    "model_type": "gpt2",
    "n_ctx": 40,
    "n_embd": 36,
    "n_head": 3,
    "n_layer": 2,
    "n_positions": 40,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 61,
}
CAUSAL = np.tril(np.ones((1, 1, 40, 40), np.float32))
PASTED = np.array(-1e4, np.float32)

CHECKPOINTS = (
    # As gpt2 is on the hub: a language model by its configuration, without prefix and head, the causal masks inside.
    Case(
        "old_names",
        "GPT2LMHeadModel",
        CONFIG_2019,
        text("old_names", 24),
        ("logits",),
        writer="GPT2Model",
        literal_config=True,
        buffers={f"h.{i}.attn.bias": CAUSAL for i in range(2)},
    ),
    Case(
        "old_names_base_model",
        "GPT2Model",
        CONFIG_2019,
        text("old_names_base_model", 24),
        ("last_hidden_state",),
        literal_config=True,
        buffers={f"h.{i}.attn.bias": CAUSAL for i in range(2)},
    ),
    # As its fine-tuned relatives are: with the prefix, the tied head, and both buffers of their time.
    Case(
        "old_extra_keys",
        "GPT2LMHeadModel",
        CONFIG_2019,
        text("old_extra_keys", 24),
        ("logits",),
        literal_config=True,
        copies={"lm_head.weight": "transformer.wte.weight"},
        buffers={f"transformer.h.{i}.attn.bias": CAUSAL.astype(np.uint8) for i in range(2)}
        | {f"transformer.h.{i}.attn.masked_bias": PASTED for i in range(2)},
    ),
    # A head put on a language model.
    Case(
        "head_on_lm",
        "GPT2ForTokenClassification",
        SIZES,
        text("head_on_lm", 20),
        ("hidden_states",),
        {"output_hidden_states": True},
        writer="GPT2LMHeadModel",
        missing=("classifier.bias", "classifier.weight"),
    ),
)

CASES = HEADS + INPUTS + CONFIGS + CHECKPOINTS


# ---- mistakes that the cases above must show ------------------------------------------------------------------------


def _order(*parts: int) -> Any:
    """Reads the parts of a fused projection in another order."""

    def how(fused: Array) -> Array:
        pieces = np.split(fused, len(parts), axis=-1)
        return np.concatenate([pieces[i] for i in parts], axis=-1)

    return how


def _per_head(fused: Array) -> Array:
    """Reads q, k and v as if they took turns in every head."""
    return fused.reshape(*fused.shape[:-1], SIZES["n_head"], 3, -1).swapaxes(-2, -3).reshape(fused.shape)


def _swap_heads(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    for key in ending(tensors, ".attn.c_attn.weight", ".attn.c_attn.bias"):
        width = tensors[key].shape[-1]
        places = np.arange(width).reshape(3, SIZES["n_head"], -1).swapaxes(1, 2).ravel()
        tensors[key] = tensors[key][..., places].copy()


DECODERS = tuple(case.name for case in HEADS)
FUSED = (".attn.c_attn.weight", ".attn.c_attn.bias")
SCALES = ("inverse_layer_idx", "reordered", "cross_scaled")

BUGS = (
    Bug("positions forgotten", (*DECODERS, "left_padded"), zero("wpe.weight")),
    Bug("query and key exchanged", DECODERS, change(_order(1, 0, 2), *FUSED)),
    Bug("key and value exchanged", DECODERS, change(_order(0, 2, 1), *FUSED)),
    Bug("fused projection split head by head", DECODERS, change(_per_head, *FUSED)),
    Bug("heads split the wrong way round", DECODERS, _swap_heads),
    Bug("square kernels transposed", DECODERS, change(np.transpose, ".attn.c_proj.weight")),
    Bug("scores not divided by sqrt(d)", DECODERS, configure(scale_attn_weights=False)),
    Bug("scores divided by sqrt(d) all the same", ("unscaled", "cross_scaled"), configure(scale_attn_weights=True)),
    Bug("scores not divided by the layer's number", SCALES, configure(scale_attn_by_inverse_layer_idx=False)),
    Bug("layer_norm_epsilon 1e-5 hard-coded", DECODERS, configure(layer_norm_epsilon=1e-5)),
    # The two curves are within 5e-4 of each other everywhere; of a whole text's label too little is left to judge.
    Bug(
        "gelu by erf instead of tanh",
        tuple(name for name in DECODERS if name != "sequence_classification"),
        configure(activation_function="gelu"),
        least=2e-4,
    ),
    Bug("gelu by tanh instead of erf", ("act_gelu",), configure(activation_function="gelu_new"), least=2e-4),
    # Behind a causal mask only padding before the text can be attended to.
    Bug("padding attended to", ("left_padded", "left_padded_label"), change_input("attention_mask", np.ones_like)),
    Bug("position_ids ignored", ("position_ids",), change_input("position_ids", lambda p: np.arange(T)[None] + 0 * p)),
    Bug("segments ignored", ("token_type_ids",), change_input("token_type_ids", np.zeros_like)),
    Bug("head mask ignored", ("head_mask", "cross_scaled"), change_input("head_mask", np.ones_like)),
    Bug("label read off the last position", ("sequence_classification",), configure(pad_token_id=55)),
    Bug(
        "mc_token_ids ignored", ("double_heads",), change_input("mc_token_ids", lambda at: 0 * at), 1e-2, ("mc_logits",)
    ),
    Bug("summary of the last token", ("summary_first", "summary_mean"), configure(summary_type="last")),
    Bug(
        "summary without its activation",
        ("summary_last", "summary_first", "summary_mean", "summary_to_hidden"),
        configure(summary_activation=None),
    ),
    Bug(
        "cross-attention's key and value exchanged",
        ("cross", "cross_scaled"),
        change(_order(1, 0), "crossattention.c_attn.weight"),
    ),
    Bug("cross-attention left out", ("cross", "cross_scaled"), zero("crossattention.c_proj.weight")),
    Bug("encoder's padding attended to", ("cross",), change_input("encoder_attention_mask", np.ones_like)),
    Bug("head tied all the same", ("untied",), configure(tie_word_embeddings=True)),
    ignored_labels_count("lm_head", "double_heads", "token_classification", "cross"),
    labels_off_by_one("lm_head", "double_heads"),
    answers_cut_off("question_answering"),
)

# A key's bias is a third of `c_attn.bias`, and shows with the other two thirds.
INVISIBLE: tuple[str, ...] = ()
