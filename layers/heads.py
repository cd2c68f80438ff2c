"""Heads that text models share: words, and labels for texts, tokens, choices and spans.

Each is made from the family's own `encode(p, c, input_ids, ..., key) -> (states [B, T, E], cache)` or
`summary(p, c, input_ids, ..., key) -> [B, E]`, and has the signature of an architecture's `apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.family import Architecture
from formax.core.outputs import BaseModelOutput, DoubleHeadsOutput, LogitsOutput, QuestionAnsweringOutput
from formax.core.rng import fold_path, split
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


def width(c: Any) -> int:
    """Width of the states that heads read, which a family may make another than that of its layers (`states_size`)."""
    return getattr(c, "states_size", c.hidden_size)


def linear_head(
    name: str, labels: int | None = None, *, key: str = "head", bias: bool = True, tf: str | None = None
) -> Callable[[Any], dict[str, Spec]]:
    """A linear map from the states to `labels` scores (the configuration's labels when None), stored as `name`.

    `tf` is the name in TensorFlow's checkpoints if it is another.
    """

    def spec(c: Any) -> dict[str, Spec]:
        count = c.num_labels if labels is None else labels
        init = normal(c.initializer_range)
        made = linear_spec(name, width(c), count, ("embed", None), init=init, bias=bias)
        return {key: replace(made, tf=tf)}

    return spec


def words_spec(
    prefix: str,
    c: Any,
    *,
    names: tuple[str, str, str],
    bias: str = "bias",
    size: int | None = None,
    tf: str | None = None,
    tf_bias: str | None = None,
) -> dict[str, Spec]:
    """Masked-word head: a transform, then the word table again (unless untied) and a bias for every word.

    `names` are the checkpoint's for the dense layer, its norm and the decoder; that of the `bias` may be the decoder's.
    `size` is the width of the word table if it is not that of the states. `tf` takes the place of the prefix in
    TensorFlow's checkpoints, where heads are always tied, `tf_bias` that of the bias.
    """
    init, size = normal(c.initializer_range), size or c.hidden_size
    dense, layer_norm, decoder = names
    untied = linear_spec(decoder, size, c.vocab_size, ("embed", "vocab"), init=init, bias=False)
    spec: dict[str, Spec] = {
        "dense": linear_spec(dense, c.hidden_size, size, ("embed", None), init=init),
        "norm": norm.layer_spec(layer_norm, size),
        "bias": Param((c.vocab_size,), ("vocab",), bias, tf=tf_bias),
        "decoder": Tied(f"{decoder}.weight", "embed.word.embedding")
        if c.tie_word_embeddings
        else replace(untied, tf=""),
    }
    if bias != f"{decoder}.bias":
        spec["decoder_bias"] = Tied(f"{decoder}.bias", "head.bias")
    return {"head": At(prefix, spec, tf=tf)}


def words(p: dict[str, Any], c: Any, x: jax.Array, act: str | None = None) -> jax.Array:
    """Scores of all words, [B, T, E] -> [B, T, V]; `act` is the transform's activation where it is not the layers'."""
    head = p["head"]
    x = norm.layer(head["norm"], activation(act or c.hidden_act)(linear(head["dense"], x)), c.layer_norm_eps)
    y = linear(head["decoder"], x) if "decoder" in head else embed.logits(p["embed"]["word"], x)
    return y + head["bias"].astype(y.dtype)


def lm_head(
    name: str = "lm_head",
    *,
    tied_to: str = "embed.word.embedding",
    bias: bool = False,
    flax: str | None = None,
    tf: str | None = "",
) -> Callable[[Any], dict[str, Spec]]:
    """Output projection onto the vocabulary: the word table itself when tied, else a linear map stored as `name`.

    A `bias` is its own in both cases. `flax` and `tf` are the names in those frameworks' checkpoints if they are
    others; in TensorFlow most are tied.
    """

    def spec(c: Any) -> dict[str, Spec]:
        if c.tie_word_embeddings:
            tied: dict[str, Spec] = {"head": Tied(f"{name}.weight", tied_to)}
            return {**tied, "head_bias": Param((c.vocab_size,), ("vocab",), f"{name}.bias")} if bias else tied
        init = normal(c.initializer_range)
        own = linear_spec(name, width(c), c.vocab_size, ("embed", "vocab"), init=init, bias=bias)
        return {"head": replace(own, flax=flax, tf=tf)}

    return spec


def lm_logits(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """Scores of all words by the head of `lm_head`, [B, T, E] -> [B, T, V]."""
    y = linear(p["head"], x) if "head" in p else embed.logits(p["embed"]["word"], x)
    return y + p["head_bias"].astype(y.dtype) if "head_bias" in p else y


def classifier_rate(c: Any) -> float:
    """Dropout before classifiers: the configuration's for them, else for states, else 0.1."""
    rates = (getattr(c, name, None) for name in ("classifier_dropout", "hidden_dropout_prob"))
    return next((rate for rate in rates if rate is not None), 0.1)


def classify(
    p: dict[str, Any], c: Any, x: jax.Array, key: jax.Array | None, rate: Callable[[Any], float] = classifier_rate
) -> jax.Array:
    """Dropout at `rate(c)`, then the linear head: [..., E] -> [..., labels]."""
    return linear(p["head"], dropout(x, rate(c), None if key is None else fold_path(key, "head")))


def sequence_classification(summary: Apply, rate: Callable[[Any], float] = classifier_rate) -> Apply:
    """A label for every text, of its summary after dropout at `rate(c)`: logits [B, labels]."""

    def apply(p: Any, c: Any, input_ids: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
        return LogitsOutput(logits=classify(p, c, summary(p, c, input_ids, key=key, **inputs), key, rate))

    return apply


def deep_head(name: str = "classifier", *, first: str = "pooler") -> Callable[[Any], dict[str, Spec]]:
    """The two linear maps of `deep_classification`, stored as `name.dense` (here under `first`) and `name.out_proj`."""

    def spec(c: Any) -> dict[str, Spec]:
        make = partial(linear_spec, d_in=c.hidden_size, axes=("embed", None), init=normal(c.initializer_range))
        parts = {first: make("dense", d_out=c.hidden_size), "head": make("out_proj", d_out=c.num_labels)}
        return under(name, parts)

    return spec


def deep_classification(encode: Apply, act: Callable[[Any], str] = lambda c: "tanh", *, first: str = "pooler") -> Apply:
    """A label for every text, from its first token through two linear maps, `act(c)` between them: logits [B, labels].

    The first map is what other heads share as a pooler, and here belongs to the head: RoBERTa's. A family that has a
    pooler beside it calls it otherwise (`first`).
    """

    def apply(p: Any, c: Any, input_ids: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
        x = encode(p, c, input_ids, key=key, **inputs)[0][:, 0]
        x = dropout(x, classifier_rate(c), None if key is None else fold_path(key, first))
        x = tap.tap(first, activation(act(c))(linear(p[first], x)))
        return LogitsOutput(logits=classify(p, c, x, key))

    return apply


def kept(x: jax.Array, which: Any) -> jax.Array:
    """Of states [B, T, E] those whose scores are wanted, which for a large vocabulary cost more than the states.

    Args:
        x: states.
        which: the last so many, or the positions in an array [n]; 0 for all.
    """
    if isinstance(which, int):
        return x[:, -which:]
    return jnp.take(x, which, axis=1, mode="clip")


def bare(encode: Apply) -> Callable[..., BaseModelOutput]:
    """The model without a head, of a family that has no pooler: `encode` gives (states [B, T, E], cache)."""

    def model(p: Any, c: Any, input_ids: Any = None, **inputs: Any) -> BaseModelOutput:
        """States [B, T, E]."""
        x, cache = encode(p, c, input_ids, **inputs)
        return BaseModelOutput(last_hidden_state=x, cache=cache)

    return model


def causal_lm(encode: Apply, logits: Callable[[Any, Any, jax.Array], jax.Array] | None = None) -> Apply:
    """Scores of the next word at every position: logits [B, T, V], or at those of `logits_to_keep` (`kept`).

    `logits(p, c, states [B, T, E])` is what makes them, if it is more than the head of `lm_head`.
    """

    def apply(p: Any, c: Any, input_ids: Any = None, logits_to_keep: Any = 0, **inputs: Any) -> LogitsOutput:
        x, cache = encode(p, c, input_ids, **inputs)
        x = kept(x, logits_to_keep)
        return LogitsOutput(logits=lm_logits(p, x) if logits is None else logits(p, c, x), cache=cache)

    return apply


def masked_lm(encode: Apply, logits: Callable[[Any, Any, jax.Array], jax.Array] = words) -> Apply:
    """Scores of all words at every position as `logits(p, c, states)` makes them: [B, T, V]."""

    def apply(p: Any, c: Any, input_ids: Any = None, **inputs: Any) -> LogitsOutput:
        x, cache = encode(p, c, input_ids, **inputs)
        return LogitsOutput(logits=logits(p, c, x), cache=cache)

    return apply


def last_token_classification(encode: Apply) -> Apply:
    """A label for every text, from its last token that is no padding: logits [B, labels].

    Where padding is, is told from `pad_token_id` among the ids; vectors (`inputs_embeds`) have none.

    Raises:
        ValueError: several rows, and the configuration has no `pad_token_id`.
    """

    def apply(p: Any, c: Any, input_ids: Any = None, **inputs: Any) -> LogitsOutput:
        x, cache = encode(p, c, input_ids, **inputs)
        if c.pad_token_id is None and len(x) > 1:
            raise ValueError("classifying several rows by their last token needs pad_token_id in the configuration")
        last = jnp.full(len(x), x.shape[1] - 1)
        if c.pad_token_id is not None and input_ids is not None:
            last = jnp.argmax(jnp.where(input_ids != c.pad_token_id, jnp.arange(x.shape[1]), 0), axis=-1)
        return LogitsOutput(logits=linear(p["head"], x[jnp.arange(len(x)), last]), cache=cache)

    return apply


def decoder_heads(
    name: str,
    base: str,
    spec: Callable[[Any], dict[str, Spec]],
    encode: Apply,
    *,
    lm: str = "ForCausalLM",
    token: str = "score",
    span: str = "",
) -> tuple[Architecture, ...]:
    """The heads of decoders: the next word, and labels for texts (from their last token), tokens and spans.

    Args:
        name: what the class names begin with.
        base: the bare model's prefix in checkpoints.
        spec: of the bare model.
        encode: see above.
        lm: what the class name of the first ends with.
        token: checkpoint name of the token head.
        span: the bare model's prefix in checkpoints of the span head, `base` by default.
    """
    words, text = with_heads(base, spec, lm_head()), with_heads(base, spec, linear_head("score", bias=False))
    labels, spans = with_heads(base, spec, linear_head(token)), linear_head("qa_outputs", 2)
    return (
        Architecture(name + lm, "ForCausalLM", words, causal_lm(encode), also=("ForPreTraining",)),
        Architecture(
            name + "ForSequenceClassification", "ForSequenceClassification", text, last_token_classification(encode)
        ),
        Architecture(name + "ForTokenClassification", "ForTokenClassification", labels, token_classification(encode)),
        Architecture(
            name + "ForQuestionAnswering",
            "ForQuestionAnswering",
            with_heads(span or base, spec, spans),
            question_answering(encode),
            base=span or base,
        ),
    )


def summary_spec(name: str, c: Any, labels: int) -> dict[str, Spec]:
    """The projection of a text's vector onto scores, as the `summary_*` fields say that the configuration has."""
    if not getattr(c, "summary_use_proj", False):
        return {}
    width = labels if getattr(c, "summary_proj_to_labels", False) else c.hidden_size
    return {"summary": linear_spec(name, c.hidden_size, width, ("embed", None), init=normal(c.initializer_range))}


def summary(p: dict[str, Any], c: Any, x: jax.Array, at: jax.Array | None, key: jax.Array | None) -> jax.Array:
    """Scores of every text from one of its states or their mean: [B, ..., T, E] -> [B, ..., labels].

    `at` [B, ...] says which state for the type "cls_index"; the last one by default. The other types take the second
    dimension of the states, as the reference does, which among several choices is that of the choices.
    """
    match getattr(c, "summary_type", "last"):
        case "first":
            x = x[:, 0]
        case "mean":
            x = x.mean(1)
        case "last":
            x = x[:, -1]
        case _:
            x = x[..., -1, :] if at is None else jnp.take_along_axis(x, at[..., None, None], axis=-2)[..., 0, :]
    k_in, k_out = split(None if key is None else fold_path(key, "summary"), 2)
    x = dropout(x, getattr(c, "summary_first_dropout", 0.0), k_in)
    x = linear(p["summary"], x) if "summary" in p else x
    x = activation(getattr(c, "summary_activation", None) or "linear")(x)
    return dropout(x, getattr(c, "summary_last_dropout", 0.0), k_out)


def summary_choice(base: str, spec: Callable[[Any], dict[str, Spec]], encode: Apply) -> tuple[Apply, Apply]:
    """Spec and `apply` of a head for choices over the `summary` of each, as ELECTRA's: for `label_heads`.

    `base` and `spec` are the bare model's prefix in checkpoints and its declaration.
    """

    def vector(p: Any, c: Any, input_ids: Any = None, key: Any = None, **inputs: Any) -> jax.Array:
        return summary(p, c, encode(p, c, input_ids, key=key, **inputs)[0], None, key)

    def projection(c: Any) -> dict[str, Spec]:
        return summary_spec("sequence_summary.summary", c, c.num_labels)

    made = with_heads(base, spec, projection, linear_head("classifier", 1))
    return made, multiple_choice(vector, lambda c: 0.0)


def double_heads(name: str, base: str, spec: Callable[[Any], dict[str, Spec]], encode: Apply) -> Architecture:
    """The architecture `name` with two heads, for the next word and for the best of several continuations.

    Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training". `base` and `spec` are the bare
    model's prefix in checkpoints and its declaration, `encode` is that of all heads here.
    """

    def both(c: Any) -> dict[str, Spec]:
        return {**with_heads(base, spec, lm_head())(c), **summary_spec("multiple_choice_head.summary", c, 1)}

    def apply(
        p: Any,
        c: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        mc_token_ids: Any = None,
        key: Any = None,
    ) -> DoubleHeadsOutput:
        """The next word [B, choices, T, V] and a score of each choice [B, choices]; inputs are [B, choices, T].

        `mc_token_ids` [B, choices] are the positions that the scores are made from, the last ones by default.
        """
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        given = zip(names, (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds), strict=True)
        rows, shape = as_rows(dict(given))
        x, _ = encode(p, c, key=key, **rows)
        x = x.reshape(*shape, *x.shape[1:])
        scores = summary(p, c, x, mc_token_ids, key)
        return DoubleHeadsOutput(logits=lm_logits(p, x), mc_logits=scores[..., 0] if scores.shape[-1] == 1 else scores)

    return Architecture(name, "ForDoubleHeads", both, apply, inputs=apply)


def token_classification(encode: Apply) -> Apply:
    """A label for every token: logits [B, T, labels]."""

    def apply(p: Any, c: Any, input_ids: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
        return LogitsOutput(logits=classify(p, c, encode(p, c, input_ids, key=key, **inputs)[0], key))

    return apply


def multiple_choice(summary: Apply, rate: Callable[[Any], float] = classifier_rate) -> Apply:
    """A score for every choice: inputs [B, choices, T], run as rows of one batch -> logits [B, choices].

    It is made of the choice's summary after dropout at `rate(c)`.
    """

    def apply(p: Any, c: Any, key: Any = None, **inputs: Any) -> LogitsOutput:
        rows, shape = as_rows(inputs)
        return LogitsOutput(logits=classify(p, c, summary(p, c, key=key, **rows), key, rate).reshape(shape))

    return apply


def as_rows(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, int]]:
    """Inputs [B, choices, T, ...] as rows [B * choices, T, ...], without those that are None; and (B, choices).

    Raises:
        ValueError: no input at all, or one without a dimension for the choices.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    if not given:
        raise ValueError("give either input_ids or inputs_embeds")
    for name, x in given.items():
        if x.ndim < 3:
            raise ValueError(f"multiple choice takes [batch, choices, length], got {name} {x.shape}")
    first = next(iter(given.values()))
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in given.items()}, first.shape[:2]


def question_answering(encode: Apply) -> Apply:
    """Scores of every token as the first and as the last of the answer: two times [B, T]."""

    def apply(p: Any, c: Any, input_ids: Any = None, **inputs: Any) -> QuestionAnsweringOutput:
        start, end = jnp.moveaxis(linear(p["head"], encode(p, c, input_ids, **inputs)[0])[..., :2], -1, 0)
        return QuestionAnsweringOutput(start_logits=start, end_logits=end)

    return apply


def label_heads(
    name: str,
    plain: Apply,
    pooled: Apply,
    encode: Apply,
    summary: Apply,
    *,
    text: tuple[Apply, Apply] | None = None,
    choice: tuple[Apply, Apply] | None = None,
) -> tuple[Architecture, ...]:
    """The four heads that give labels, named and stored as BERT's.

    Args:
        name: what the class names begin with.
        plain: `plain(head) -> spec` of the encoder with a head.
        pooled: the same with the pooler between.
        encode: see above.
        summary: see above.
        text: spec and `apply` of the head for texts, if it is not a linear map of the summary.
        choice: the same of the head for choices.
    """
    labels, score, span = linear_head("classifier"), linear_head("classifier", 1), linear_head("qa_outputs")
    table: dict[str, tuple[Apply, Apply]] = {
        "ForSequenceClassification": text or (pooled(labels), sequence_classification(summary)),
        "ForMultipleChoice": choice or (pooled(score), multiple_choice(summary)),
        "ForTokenClassification": (plain(labels), token_classification(encode)),
        "ForQuestionAnswering": (plain(span), question_answering(encode)),
    }
    return tuple(Architecture(name + task, task, spec, apply) for task, (spec, apply) in table.items())
