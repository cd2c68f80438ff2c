"""Heads of encoder-decoders: words, labels for texts, spans.

Each is made from the family's own `run(p, c, ..., key) -> Seq2SeqOutput`, whose first input may be ids, images or
sounds, and has the signature of an architecture's `apply`. Where labels are for texts and spans, `run` makes the
decoder's inputs itself if there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from formax.core.family import Architecture
from formax.core.layout import Reshape
from formax.core.outputs import Seq2SeqLogitsOutput, Seq2SeqOutput, Seq2SeqQuestionAnsweringOutput
from formax.core.rng import fold_path, split
from formax.core.spec import At, Initializer, Param, Spec, normal
from formax.layers import heads
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec
from formax.layers.seq2seq import eos_states

Run = Callable[..., Seq2SeqOutput]
Apply = Callable[..., Any]


def beside(out: Seq2SeqOutput) -> dict[str, Any]:
    """What every head hands on of the model under it."""
    return {"cache": out.cache, "encoder_last_hidden_state": out.encoder_last_hidden_state}


def conditional_generation(run: Run, logits: Callable[[Any, Any, jax.Array], jax.Array] | None = None) -> Apply:
    """Scores of the decoder's next words: logits [B, T, V], or at the positions of `logits_to_keep` (`heads.kept`).

    `logits(p, c, states [B, T, E])` is what makes them, if it is more than the head of `heads.lm_head`.
    """

    def apply(p: Any, c: Any, *args: Any, logits_to_keep: Any = 0, **inputs: Any) -> Seq2SeqLogitsOutput:
        out = run(p, c, *args, **inputs)
        x = heads.kept(out.last_hidden_state, logits_to_keep)
        return Seq2SeqLogitsOutput(logits=heads.lm_logits(p, x) if logits is None else logits(p, c, x), **beside(out))

    return apply


def bias_spec(c: Any, size: int | None = None) -> dict[str, Spec]:
    """A bias for every word that is stored as a buffer and that not every checkpoint has; see `biased_words`.

    `size` is the number of words, the configuration's vocabulary by default.
    """
    size = c.vocab_size if size is None else size
    row = Reshape((1, size))
    return {"bias": Param((size,), ("vocab",), "final_logits_bias", layout=row, optional=True, buffer=True)}


def biased_words(p: Any, c: Any, x: jax.Array) -> jax.Array:
    """Scores of all words, with a bias for each: [B, T, E] -> [B, T, V]."""
    logits = heads.lm_logits(p, x)
    return logits + p["bias"].astype(logits.dtype)


def word_heads(
    name: str, spec: Callable[[Any], dict[str, Spec]], run: Run, *, also: tuple[str, ...] = (), **more: Any
) -> tuple[Architecture, ...]:
    """The bare model and `...ForConditionalGeneration`, stored as BART's.

    Args:
        name: what the class names begin with.
        spec: of the bare model, which is called "model" beside a head.
        run: see above.
        also: further tasks of the head.
        **more: what else is to be said of both.
    """
    words, apply = (
        heads.with_heads("model", spec, heads.lm_head(), bias_spec),
        conditional_generation(run, biased_words),
    )
    return (
        Architecture(f"{name}Model", "", spec, run, **more),
        Architecture(f"{name}ForConditionalGeneration", "ForSeq2SeqLM", words, apply, also=also, **more),
    )


def labels_spec(size: int, labels: int, *, init: Initializer, name: str = "classification_head") -> dict[str, Spec]:
    """Two linear maps of `sequence_classification`: from a state of that `size` to another, and to the labels."""
    dense = partial(linear_spec, d_in=size, axes=("embed", None), init=init)
    return {"head": At(name, {"dense": dense("dense", d_out=size), "out": dense("out_proj", d_out=labels)})}


def sequence_classification(run: Run) -> Apply:
    """A label for every text, from the decoder's state at the last end-of-text token: logits [B, labels].

    A text without that token gives NaN (`eos_states`).
    """

    def apply(p: Any, c: Any, input_ids: Any = None, key: Any = None, **inputs: Any) -> Seq2SeqLogitsOutput:
        out = run(p, c, input_ids, key=key, **inputs)
        x = eos_states(out.last_hidden_state, input_ids, c.eos_token_id)
        k_in, k_out = split(None if key is None else fold_path(key, "head"), 2)
        x = jnp.tanh(linear(p["head"]["dense"], dropout(x, c.classifier_dropout, k_in)))
        logits = linear(p["head"]["out"], dropout(x, c.classifier_dropout, k_out))
        return Seq2SeqLogitsOutput(logits=logits, **beside(out))

    return apply


def question_answering(run: Run) -> Apply:
    """Scores of the decoder's positions as first and last of the answer: two times [B, T]."""

    def apply(p: Any, c: Any, *args: Any, **inputs: Any) -> Seq2SeqQuestionAnsweringOutput:
        out = run(p, c, *args, **inputs)
        start, end = jnp.moveaxis(linear(p["head"], out.last_hidden_state)[..., :2], -1, 0)
        return Seq2SeqQuestionAnsweringOutput(start_logits=start, end_logits=end, **beside(out))

    return apply


def label_heads(
    name: str, base: str, spec: Callable[[Any], dict[str, Spec]], run: Run, **more: Any
) -> tuple[Architecture, ...]:
    """The two heads that give labels, for texts and for spans, named and stored as BART's.

    Args:
        name: what the class names begin with.
        base: the bare model's prefix in checkpoints.
        spec: of the bare model.
        run: see above.
        **more: what else is to be said of both.
    """

    def labels(c: Any) -> dict[str, Spec]:
        return labels_spec(c.hidden_size, c.num_labels, init=normal(c.initializer_range))

    table: dict[str, tuple[Callable[[Any], dict[str, Spec]], Apply]] = {
        "ForSequenceClassification": (labels, sequence_classification(run)),
        "ForQuestionAnswering": (heads.linear_head("qa_outputs", 2), question_answering(run)),
    }
    return tuple(
        Architecture(name + task, task, heads.with_heads(base, spec, head), apply, **more)
        for task, (head, apply) in table.items()
    )


def lone_decoder(
    name: str,
    base: str,
    spec: Callable[[Any], dict[str, Spec]],
    decode: Apply,
    words: Callable[[Any], dict[str, Spec]] | None = None,
) -> Architecture:
    """The decoder alone with a head for words, `...ForCausalLM`.

    Args:
        name: what the class name begins with.
        base: the bare model's prefix in checkpoints.
        spec: of the decoder, under the names of the whole model.
        decode: `decode(p, c, input_ids, ..., key) -> (states [B, T, E], cache)`.
        words: spec of the head; `heads.lm_head()` by default.
    """
    made = heads.with_heads(base, spec, words or heads.lm_head())
    return Architecture(name + "ForCausalLM", "ForCausalLM", made, heads.causal_lm(decode), inputs=decode)
