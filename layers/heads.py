"""Heads that text encoders share: labels for texts, tokens, choices and spans.

Each is made from the family's own `encode(p, c, input_ids, ..., key) -> (states [B, T, E], cache)` or
`summary(p, c, input_ids, ..., key) -> [B, E]`, and has the signature of an architecture's `apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from formax.core.family import Architecture
from formax.core.outputs import LogitsOutput, QuestionAnsweringOutput
from formax.core.rng import fold_path
from formax.core.spec import At, Param, Spec, Tied, normal, under
from formax.layers import embed, norm
from formax.layers.activations import activation
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec

Apply = Callable[..., Any]


def with_heads(prefix: str, base: Callable[[Any], dict[str, Spec]], *heads: Callable[[Any], dict[str, Spec]]) -> Apply:
    """Spec of an architecture with heads: the base model's parameters under `prefix`, the heads' own beside them."""

    def spec(c: Any) -> dict[str, Spec]:
        out = under(prefix, base(c))
        for head in heads:
            out |= head(c)
        return out

    return spec


def linear_head(name: str, labels: int | None = None, *, key: str = "head") -> Callable[[Any], dict[str, Spec]]:
    """A linear map from the states to `labels` scores (the configuration's labels when None), stored as `name`."""

    def spec(c: Any) -> dict[str, Spec]:
        count = c.num_labels if labels is None else labels
        return {key: linear_spec(name, c.hidden_size, count, ("embed", None), init=normal(c.initializer_range))}

    return spec


def words_spec(prefix: str, c: Any, *, names: tuple[str, str, str]) -> dict[str, Spec]:
    """Masked-word head: a transform, then the word table again (unless untied) and a bias for every word.

    `names` are the checkpoint's for the dense layer, its norm and the decoder; the bias is `bias`, also the decoder's.
    """
    init = normal(c.initializer_range)
    dense, layer_norm, decoder = names
    untied = linear_spec(decoder, c.hidden_size, c.vocab_size, ("embed", "vocab"), init=init, bias=False)
    spec: dict[str, Spec] = {
        "dense": linear_spec(dense, c.hidden_size, c.hidden_size, ("embed", None), init=init),
        "norm": norm.layer_spec(layer_norm, c.hidden_size),
        "bias": Param((c.vocab_size,), ("vocab",), "bias"),
        "decoder": Tied(f"{decoder}.weight", "embed.word.embedding") if c.tie_word_embeddings else untied,
        "decoder_bias": Tied(f"{decoder}.bias", "head.bias"),
    }
    return {"head": At(prefix, spec)}


def words(p: dict[str, Any], c: Any, x: jax.Array) -> jax.Array:
    """Scores of all words, [B, T, E] -> [B, T, V]."""
    head = p["head"]
    x = norm.layer(head["norm"], activation(c.hidden_act)(linear(head["dense"], x)), c.layer_norm_eps)
    y = linear(head["decoder"], x) if "decoder" in head else embed.logits(p["embed"]["word"], x)
    return y + head["bias"].astype(y.dtype)


def classify(p: dict[str, Any], c: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Dropout, then the linear head: [..., E] -> [..., labels]."""
    rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
    return linear(p["head"], dropout(x, rate, None if key is None else fold_path(key, "head")))


def sequence_classification(summary: Apply) -> Apply:
    """A label for every text: logits [B, labels]."""

    def apply(p: Any, c: Any, input_ids: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
        return LogitsOutput(logits=classify(p, c, summary(p, c, input_ids, key=key, **inputs), key))

    return apply


def token_classification(encode: Apply) -> Apply:
    """A label for every token: logits [B, T, labels]."""

    def apply(p: Any, c: Any, input_ids: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
        return LogitsOutput(logits=classify(p, c, encode(p, c, input_ids, key=key, **inputs)[0], key))

    return apply


def multiple_choice(summary: Apply) -> Apply:
    """A score for every choice: inputs [B, choices, T], run as rows of one batch -> logits [B, choices]."""

    def apply(p: Any, c: Any, key: Any = None, **inputs: Any) -> LogitsOutput:
        given = {name: x for name, x in inputs.items() if x is not None}
        if not given:
            raise ValueError("give either input_ids or inputs_embeds")
        first = next(iter(given.values()))
        if first.ndim < 3:
            raise ValueError(f"multiple choice takes [batch, choices, length], got {next(iter(given))} {first.shape}")
        rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in given.items()}
        return LogitsOutput(logits=classify(p, c, summary(p, c, key=key, **rows), key).reshape(first.shape[:2]))

    return apply


def question_answering(encode: Apply) -> Apply:
    """Scores of every token as the first and as the last of the answer: two times [B, T]."""

    def apply(p: Any, c: Any, input_ids: Any = None, **inputs: Any) -> QuestionAnsweringOutput:
        start, end = jnp.moveaxis(linear(p["head"], encode(p, c, input_ids, **inputs)[0])[..., :2], -1, 0)
        return QuestionAnsweringOutput(start_logits=start, end_logits=end)

    return apply


def label_heads(name: str, plain: Apply, pooled: Apply, encode: Apply, summary: Apply) -> tuple[Architecture, ...]:
    """The four heads that give labels, named and stored as BERT's.

    Args:
        name: what the class names begin with.
        plain: `plain(head) -> spec` of the encoder with a head.
        pooled: the same with the pooler between.
        encode: see above.
        summary: see above.
    """
    labels, choice, span = linear_head("classifier"), linear_head("classifier", 1), linear_head("qa_outputs")
    table: dict[str, tuple[Apply, Apply]] = {
        "ForSequenceClassification": (pooled(labels), sequence_classification(summary)),
        "ForMultipleChoice": (pooled(choice), multiple_choice(summary)),
        "ForTokenClassification": (plain(labels), token_classification(encode)),
        "ForQuestionAnswering": (plain(span), question_answering(encode)),
    }
    return tuple(Architecture(name + task, task, spec, apply) for task, (spec, apply) in table.items())
