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

from formax.core.outputs import Seq2SeqLogitsOutput, Seq2SeqOutput, Seq2SeqQuestionAnsweringOutput
from formax.core.rng import fold_path, split
from formax.core.spec import At, Initializer, Spec
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
    """Scores of the decoder's next words: logits [B, T, V].

    `logits(p, c, states [B, T, E])` is what makes them, if it is more than the head of `heads.lm_head`.
    """

    def apply(p: Any, c: Any, *args: Any, **inputs: Any) -> Seq2SeqLogitsOutput:
        out = run(p, c, *args, **inputs)
        x = out.last_hidden_state
        return Seq2SeqLogitsOutput(logits=heads.lm_logits(p, x) if logits is None else logits(p, c, x), **beside(out))

    return apply


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
