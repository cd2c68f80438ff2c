"""Contrastive search: of the likeliest tokens the one whose state is least like all states before it.

Su et al. 2022, arXiv:2202.06417. Every candidate is read, so a step costs as much as one of k beams; what it finds out
about the one that is taken is the next step's beginning.

B inputs, k candidates, L columns of the buffer, E channels, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from formax.generation import sampling
from formax.generation.answer import answer, to_the_end
from formax.generation.decoding import Context, Known
from formax.generation.sampling import empty_record, noted, read_last, written
from formax.generation.state import Tokens
from formax.generation.task import Task
from formax.model import Model

# The field whose last entry is the state that scores are made of.
STATES = ("hidden_states", "decoder_hidden_states")


@dataclass(frozen=True)
class How(sampling.How):
    """As in `sampling.How`.

    Attributes:
        candidates: tokens that are read in every step (`top_k`).
    """

    candidates: int = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """What is no part of the program: rules, and how much the likeness counts (`penalty_alpha`)."""

    rules: sampling.Rules
    alpha: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Texts that are being written.

    Attributes:
        tokens: the texts [B, L].
        context: what the model knows of them, for k equal rows of each.
        states: float32 [B, L, E], the last layer's, of length 1.
        logits: float32 [B, V] of the next token.
        done: bool [B].
        record: what is kept of every step.
    """

    tokens: Tokens
    context: Context
    states: Array
    logits: Array
    done: Array
    record: dict[str, Any]


@partial(jax.jit, static_argnames=("how",))
def begin(model: Model, known: Known, *, how: How) -> Texts:
    """What a prompt that was read is to this search."""
    k = how.candidates
    states = _unit(_state(known.seen))
    states = jnp.pad(states, ((0, 0), (0, known.tokens.ids.shape[1] - states.shape[1]), (0, 0)))
    several = known.branched(k)
    record = empty_record(model, how.feed, several.context, several.tokens, known.logits, how.steps + 1, how.keeps)
    # Of the candidates' record only the one that is taken is kept.
    record = {
        name: held if name in ("scores", "logits") else jax.tree.map(lambda x: x[:, ::k], held)
        for name, held in record.items()
    }
    return Texts(known.tokens, several.context, states, known.logits, jnp.zeros(len(known.logits), bool), record)


@partial(jax.jit, static_argnames=("how",), donate_argnames=("texts",))
def go(model: Model, texts: Texts, rules: Rules, until: Array, *, how: How) -> tuple[Texts, Array, Array]:
    """Writes on until the column `until`, or until all texts have ended; as `sampling.go`."""

    def unfinished(texts: Texts) -> Array:
        return ~texts.done.all() & (texts.tokens.length < until)

    texts = jax.lax.while_loop(unfinished, lambda texts: step(model, texts, rules, how), texts)
    return texts, texts.done.all(), texts.tokens.last(1)[:, 0]


def step(model: Model, texts: Texts, rules: Rules, how: How) -> Texts:
    """Reads the likeliest tokens and writes the one that is least like the text."""
    rows, k = len(texts.logits), how.candidates
    scores = rules.rules.process(texts.tokens, texts.logits)
    record = noted(texts.record, {"scores": scores, "logits": texts.logits}, texts.tokens)
    likely, ids = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), k)
    several = written(replace(texts.tokens, ids=jnp.repeat(texts.tokens.ids, k, axis=0)), ids.reshape(-1))
    logits, context, seen = read_last(model, how.feed, texts.context, several)
    states = _unit(_state(seen)).reshape(rows, k, -1)

    # All that was read counts, also vectors that are no tokens of the text; what fills a prompt up is masked.
    columns = jnp.arange(texts.states.shape[1]) < texts.tokens.length
    there = columns if texts.context.mask is None else columns & texts.context.mask[::k]
    alike = jnp.einsum("ble,bke->bkl", texts.states, states)
    alike = jnp.where(jnp.broadcast_to(there, (rows, there.shape[-1]))[:, None], alike, -jnp.inf).max(-1)
    best = jnp.argmax((1 - rules.alpha) * likely - rules.alpha * alike, axis=-1)
    row = jnp.arange(rows) * k + best
    chosen = jnp.take_along_axis(ids, best[:, None], axis=1)[:, 0]
    if how.pads:
        chosen = jnp.where(texts.done, rules.rules.pad, chosen)
    tokens = written(texts.tokens, chosen)
    new = jnp.take_along_axis(states, best[:, None, None], axis=1)
    return Texts(
        tokens,
        context.take(jnp.repeat(row, k), of_texts=True),
        jax.lax.dynamic_update_slice_in_dim(texts.states, new, texts.tokens.length, axis=1),
        logits[row],
        texts.done | rules.rules.criteria(tokens, scores),
        noted(record, jax.tree.map(lambda x: x[row], seen), tokens),
    )


def _state(seen: dict[str, Any]) -> Array:
    """The last layer's states [B, T, E]."""
    return next(seen[name] for name in STATES if name in seen)[-1]


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def write(task: Task) -> Any:
    """Contrastive search, from the prompt to what `generate` returns.

    Raises:
        ValueError: there is guidance, or no cache.
    """
    if not task.feed.cached:
        raise ValueError("contrastive search reads every candidate after the same text: it needs use_cache=True")
    own = {**vars(sampling.how_of(task)), "branches": 1}
    how = How(**own, candidates=int(task.config.top_k or 0))
    rules = Rules(sampling.rules_of(task), jnp.float32(task.config.penalty_alpha))
    known = task.known()
    texts = begin(task.model, known, how=how)
    texts, _ = to_the_end(task, lambda texts, until: go(task.model, texts, rules, until, how=how)[:2], texts)
    rows = jnp.arange(len(texts.done)) * how.candidates
    return answer(task, replace(texts, context=texts.context.take(rows)), known.seen)
