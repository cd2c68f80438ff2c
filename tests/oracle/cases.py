"""What the cases of many families are made of: inputs decided by a name, heads that many have, ways to plant a bug."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from oracle.families import Bug, Case

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Plant = Callable[[dict[str, Any], Tensors, Tensors], None]

# Tokens of a text and words of a vocabulary, wherever a family has no reason for another number.
T = 25
VOCAB = 61
# Tokens that a decoder is given where an encoder reads `T`.
U = 27
# The call's switches for all that a model lets be seen.
TRACES = {"output_hidden_states": True, "output_attentions": True}


def ids(name: str, *shape: int, low: int = 1, high: int = VOCAB) -> Array:
    """Returns integers in `[low, high)`, decided by `name`; the default is any token but padding."""
    return np.random.RandomState(zlib.crc32(name.encode())).randint(low, high, shape).astype(np.int64)


def floats(name: str, *shape: int) -> Array:
    """Returns standard normal floats, decided by `name`."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def mask(*lengths: int, width: int = T, left: bool = False) -> Array:
    """Returns a padding mask `[rows, width]`: `lengths[i]` ones, then zeros (before them if `left`)."""
    ones = (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int64)
    return ones[:, ::-1].copy() if left else ones


def text(
    name: str, *lengths: int, left: bool = False, low: int = 1, pad: int = 0, segments: int | None = None
) -> Tensors:
    """Returns token ids from `low` on, `pad` for padding, the padding mask, and segment ids if there are `segments`.

    Each is `[rows, T]`.
    """
    seen = mask(*lengths, left=left)
    read = np.where(seen, ids(f"{name}.input_ids", *seen.shape, low=low), pad)
    made = {"input_ids": read, "attention_mask": seen}
    if segments is not None:
        made["token_type_ids"] = ids(f"{name}.token_type_ids", *seen.shape, low=0, high=segments)
    return made


def written(name: str, rows: int = 2) -> Tensors:
    """Returns what a decoder has written so far, `[rows, U]`; in the last row some tokens are not to be looked at."""
    seen = np.ones((rows, U), np.int64)
    seen[-1, 4:9] = seen[-1, 22:] = 0
    return {"decoder_input_ids": ids(f"{name}.decoder_input_ids", rows, U), "decoder_attention_mask": seen}


def labels(name: str, high: int, seen: Array) -> Array:
    """Returns per-token labels `[rows, T]` in `[0, high)`; -100 (ignored) for padding and for a third of the rest."""
    drawn = ids(name, *seen.shape, low=-high // 2, high=high)
    return np.where((drawn < 0) | (seen == 0), -100, drawn)


# ---- heads that read a text -----------------------------------------------------------------------------------------


def sequence_classification(prefix: str, sizes: dict[str, Any], inputs: Tensors) -> Case:
    """Returns the case of the head that labels every text."""
    drawn = {"labels": np.array([2, 0])}
    architecture, outputs = f"{prefix}ForSequenceClassification", ("loss", "logits")
    return Case("sequence_classification", architecture, sizes | {"num_labels": 3}, inputs | drawn, outputs)


def multiple_choice(prefix: str, sizes: dict[str, Any], choices: Tensors) -> Case:
    """Returns the case of the head that chooses; inputs are rows of six texts, three choices for each of two."""
    shaped = {name: rows.reshape(2, 3, T) for name, rows in choices.items()} | {"labels": np.array([2, 0])}
    return Case("multiple_choice", f"{prefix}ForMultipleChoice", sizes, shaped, ("loss", "logits"))


def masked_lm(prefix: str, sizes: dict[str, Any], inputs: Tensors) -> Case:
    """Returns the case of the head for masked words."""
    drawn = labels("masked_lm", VOCAB, inputs["attention_mask"])
    return Case("masked_lm", f"{prefix}ForMaskedLM", sizes, inputs | {"labels": drawn}, ("loss", "logits"))


def causal_lm(prefix: str, sizes: dict[str, Any], inputs: Tensors) -> Case:
    """Returns the case of the head for next words; the reference shifts the labels itself."""
    drawn = labels("next_words", VOCAB, inputs["attention_mask"])
    return Case("causal_lm", f"{prefix}ForCausalLM", sizes, inputs | {"labels": drawn}, ("loss", "logits"))


def label_heads(prefix: str, sizes: dict[str, Any], inputs: Tensors, choices: Tensors) -> tuple[Case, ...]:
    """Returns the cases of the four heads that give labels, for texts, choices, tokens and spans."""
    return (
        sequence_classification(prefix, sizes, inputs),
        multiple_choice(prefix, sizes, choices),
        token_classification(prefix, sizes, inputs),
        question_answering(prefix, sizes, inputs),
    )


def token_classification(prefix: str, sizes: dict[str, Any], inputs: Tensors) -> Case:
    """Returns the case of the head that labels every token."""
    drawn = labels("token_classification", 5, inputs["attention_mask"])
    architecture, outputs = f"{prefix}ForTokenClassification", ("loss", "logits")
    return Case("token_classification", architecture, sizes | {"num_labels": 5}, inputs | {"labels": drawn}, outputs)


def question_answering(prefix: str, sizes: dict[str, Any], inputs: Tensors) -> Case:
    """Returns the case of the head that finds answers; the second one ends beyond the text and does not count."""
    answers = {"start_positions": np.array([3, 11]), "end_positions": np.array([7, 30])}
    architecture, outputs = f"{prefix}ForQuestionAnswering", ("loss", "start_logits", "end_logits")
    return Case("question_answering", architecture, sizes, inputs | answers, outputs)


def decoder_heads(
    prefix: str, sizes: dict[str, Any], inputs: Tensors, *heads: str, words: str = "ForCausalLM"
) -> tuple[Case, ...]:
    """Returns the cases of a decoder alone: states, next words, and of `heads` those that there are, with their losses.

    The classifier of texts looks for the padding token 0 among the ids, so `sizes` must name it.
    """
    made = {
        "sequence_classification": Case(
            "sequence_classification",
            f"{prefix}ForSequenceClassification",
            sizes | {"num_labels": 3},
            inputs | {"labels": np.array([2, 0])},
            ("loss", "logits"),
        ),
        "token_classification": token_classification(prefix, sizes, inputs),
        "question_answering": question_answering(prefix, sizes, inputs),
    }
    next_words = inputs | {"labels": labels("causal_lm", VOCAB, inputs["attention_mask"])}
    return (
        Case("model", f"{prefix}Model", sizes, inputs, ("last_hidden_state",)),
        Case("causal_lm", f"{prefix}{words}", sizes, next_words, ("loss", "logits")),
        *(made[head] for head in heads),
    )


# ---- mistakes -------------------------------------------------------------------------------------------------------


def ending(tensors: Tensors, *ends: str) -> list[str]:
    """Returns the keys that end so; there must be some, or a bug would silently be none."""
    found = [key for key in tensors if key.endswith(ends)]
    if not found:
        raise ValueError(f"no key ends with {ends}")
    return found


def zero(*ends: str) -> Plant:
    """Forgets parameters."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        tensors.update({key: np.zeros_like(tensors[key]) for key in ending(tensors, *ends)})

    return apply


def change(how: Any, *ends: str) -> Plant:
    """Misreads parameters."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        tensors.update({key: how(tensors[key]).copy() for key in ending(tensors, *ends)})

    return apply


def configure(**changes: Any) -> Plant:
    """Misreads the configuration."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        config.update(changes)

    return apply


def change_input(name: str, how: Any) -> Plant:
    """Misreads an input."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        inputs[name] = how(inputs[name]).copy()

    return apply


def swap(one: str, other: str, *leaves: str) -> Plant:
    """Takes parameters for each other: the keys that end in `one` and in `other`, or in these and each of `leaves`."""
    pairs = [(f"{one}.{leaf}", f"{other}.{leaf}") for leaf in leaves] or [(one, other)]

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        for mine, yours in pairs:
            for key in ending(tensors, mine):
                twin = key.removesuffix(mine) + yours
                tensors[key], tensors[twin] = tensors[twin], tensors[key]

    return apply


def both(*plants: Plant) -> Plant:
    """Several mistakes at once."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        for plant in plants:
            plant(config, tensors, inputs)

    return apply


def heads_last(heads: int) -> Callable[[Array], Array]:
    """Reads rows `(heads, size)` as if they were `(size, heads)`."""
    return lambda rows: rows[np.arange(rows.shape[0]).reshape(-1, heads).T.ravel()]


def not_causal(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    """Lets a decoder see the future."""
    # the reference adds a mask of four dimensions to the scores as it is
    name = "decoder_attention_mask" if "decoder_attention_mask" in inputs else "attention_mask"
    seen = inputs[name][:, None, None, :].astype(np.float32)
    inputs[name] = np.broadcast_to((1 - seen) * -1e9, (*seen.shape[:2], seen.shape[-1], seen.shape[-1])).copy()


def swap_head_masks(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    """Takes the head masks of a decoder's own attention and of its cross-attention for each other."""
    own = "decoder_head_mask" if "decoder_head_mask" in inputs else "head_mask"
    inputs[own], inputs["cross_attn_head_mask"] = inputs["cross_attn_head_mask"], inputs[own]


def ignored_labels_count(*cases: str, least: float = 1e-2) -> Bug:
    """Labels of -100 mean the first token."""
    plant = change_input("labels", lambda y: np.maximum(y, 0))
    return Bug("ignored labels counted as token 0", cases, plant, least, ("loss",))


def labels_off_by_one(*cases: str, least: float = 1e-2) -> Bug:
    """Every label is that of the token after."""
    return Bug("labels off by one token", cases, change_input("labels", lambda y: np.roll(y, 1, -1)), least, ("loss",))


def answers_cut_off(*cases: str, least: float = 1e-2) -> Bug:
    """An answer that ends beyond the text ends at its last token."""
    plant = change_input("end_positions", lambda at: np.minimum(at, T - 1))
    return Bug("answer beyond the text counted as its last token", cases, plant, least, ("loss",))
