"""What the cases of BART's line share: sizes and inputs, the cases that every family has, and mistakes they must show.

Sizes are asymmetric on purpose: 3 layers of 4 heads of 9 read, 2 layers of 3 heads of 12 write; texts of 25 tokens
become texts of 27. The decoder's first token, the end of a text and padding are three different tokens.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    T,
    Tensors,
    U,
    change,
    change_input,
    configure,
    floats,
    ids,
    ignored_labels_count,
    labels,
    labels_off_by_one,
    mask,
    not_causal,
    swap,
    written,
    zero,
)
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 36,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 53,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 47,
    "max_position_embeddings": 40,
    "pad_token_id": 3,
    "eos_token_id": 2,
    "decoder_start_token_id": 5,
}
SEEN = ("last_hidden_state", "encoder_last_hidden_state")
INSIDE = ("encoder_hidden_states", "encoder_attentions", "decoder_hidden_states", "decoder_attentions")
MEMORY = {"encoder_hidden_states": floats("memory", 2, 13, 36), "encoder_attention_mask": mask(13, 8, width=13)}


def text(name: str, *lengths: int, left: bool = False) -> Tensors:
    """Returns what the encoder reads: token ids and their padding mask, `[rows, T]`, without special tokens."""
    seen = mask(*lengths, left=left)
    return {"input_ids": np.where(seen, ids(f"{name}.input_ids", *seen.shape, low=6), 3), "attention_mask": seen}


PADDED = text("padded", 25, 17)
LEFT = text("left", 25, 18, left=True)
WRITTEN = written("written")
PAIR = PADDED | WRITTEN

# ---- cases of every family ------------------------------------------------------------------------------------------


def word_cases(prefix: str, words: str = "ForConditionalGeneration") -> tuple[Case, ...]:
    """Returns the bare model, the head for words and the decoder alone, of classes that are called so."""
    scaled = SIZES | {"scale_embedding": True}
    return (
        # Positions are not shifted for left padding: the first real token of a padded row is not at position 0.
        Case("model", f"{prefix}Model", scaled, LEFT | WRITTEN, SEEN),
        # The decoder reads the labels, shifted by one, and padding for those that do not count.
        Case(
            "conditional_generation",
            f"{prefix}{words}",
            SIZES,
            PADDED | {"labels": labels("conditional_generation", VOCAB, mask(U, 20, width=U))},
            ("loss", "logits", "encoder_last_hidden_state"),
        ),
        # Its labels are not shifted, unlike other models'.
        Case(
            "causal_lm",
            f"{prefix}ForCausalLM",
            scaled,
            LEFT | MEMORY | {"labels": labels("causal_lm", VOCAB, LEFT["attention_mask"])},
            ("loss", "logits"),
        ),
        Case(
            "inputs_embeds",
            f"{prefix}Model",
            scaled,
            {
                "inputs_embeds": floats("inputs_embeds", 2, T, 36),
                "attention_mask": PADDED["attention_mask"],
                "decoder_inputs_embeds": floats("decoder_inputs_embeds", 2, U, 36),
                "decoder_attention_mask": WRITTEN["decoder_attention_mask"],
            },
            SEEN,
        ),
        Case(
            "traces",
            f"{prefix}Model",
            SIZES,
            {"input_ids": ids("traces.input_ids", 1, 11), "decoder_input_ids": ids("traces.decoder_input_ids", 1, 13)},
            (*SEEN, *INSIDE, "cross_attentions"),
            TRACES,
        ),
    )


def with_sines(case: Case) -> Case:
    """Returns the case with the real table of positions, which Flax's classes have alone; other cases hold anything."""
    rows, size = SIZES["max_position_embeddings"], SIZES["d_model"]
    angles = np.arange(rows)[:, None] / 10000 ** (2 * np.arange(size // 2) / size)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    prefix = "" if case.architecture.endswith("Model") and not case.architecture.endswith("MTModel") else "model."
    names = [f"{prefix}{part}.embed_positions.weight" for part in ("encoder", "decoder")]
    return replace(case, buffers=dict.fromkeys(names, table))


def untied(prefix: str, words: str = "ForConditionalGeneration", **more: Any) -> Case:
    """Returns the case of a head for words that has a table of its own."""
    return Case("untied", f"{prefix}{words}", SIZES | {"tie_word_embeddings": False}, PAIR, ("logits",), **more)


# ---- mistakes that they must show -----------------------------------------------------------------------------------

WHOLE = ("model", "conditional_generation")
EVERY = (*WHOLE, "causal_lm")


def shifted(first: int, pad: int = 3, name: str = "labels") -> Any:
    """Gives the decoder that input, shifted, after the token `first`."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        source = inputs[name]
        out = np.concatenate([np.full_like(source[:, :1], first), source[:, :-1]], axis=1)
        inputs["decoder_input_ids"] = np.where(out == -100, pad, out)

    return apply


BUGS = (
    Bug("scores not divided by sqrt(d)", EVERY, change(lambda w: w * 3.0, "q_proj.weight", "q_proj.bias")),
    Bug("norms of a layer exchanged", EVERY, swap("self_attn_layer_norm.weight", "final_layer_norm.weight")),
    # The two curves are within 5e-4 of each other everywhere.
    Bug("gelu by tanh instead of erf", WHOLE, configure(activation_function="gelu_new"), least=2e-4),
    Bug("padding attended to", EVERY[:2], change_input("attention_mask", np.ones_like)),
    Bug("padding of the states attended to", ("causal_lm",), change_input("encoder_attention_mask", np.ones_like)),
    Bug(
        "decoder's padding attended to",
        ("model",),
        change_input("decoder_attention_mask", np.ones_like),
        outputs=("last_hidden_state",),
    ),
    Bug("decoder not causal", ("model",), not_causal, outputs=("last_hidden_state",)),
    Bug("decoder not causal", ("causal_lm",), not_causal),
    Bug("cross-attention left out", ("causal_lm",), zero("encoder_attn.out_proj.weight")),
    Bug("labels that do not count read as the end", WHOLE[1:], shifted(5, pad=2), outputs=("logits",)),
    Bug(
        "final_logits_bias forgotten",
        ("conditional_generation", "untied"),
        zero("final_logits_bias"),
        outputs=("logits",),
    ),
    Bug(
        "given vectors of the encoder scaled, too",
        ("inputs_embeds",),
        change_input("inputs_embeds", lambda x: 6 * x),
    ),
    ignored_labels_count("conditional_generation", "causal_lm"),
    labels_off_by_one("causal_lm", least=5e-3),
)
# The decoder starts with the token that the configuration names.
STARTS = Bug("decoder starts with the end", WHOLE[1:], shifted(2), outputs=("logits",))
# Both parts scale the vectors of words, whatever the order of scale, positions and norm.
SCALED = (Bug("words not scaled", ("model", "causal_lm"), configure(scale_embedding=False)),)
ROLLED = change(lambda w: np.roll(w, 2, 0), "embed_positions.weight")
POSITIONS = Bug("positions forgotten", EVERY, zero("embed_positions.weight"))

# A key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.k_proj\.bias$",)
# A bias that is zero where a file lacks it, without a word.
SILENT = (r"^final_logits_bias$",)
