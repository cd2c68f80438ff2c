"""Greedy search and sampling: one token a row and step, all steps in one compiled loop.

`begin` chooses the first token after a prompt that was read, `go` the following ones until a column. Between calls of
`go` nothing is compiled and nothing is lost, so a stream of tokens is the same program as a whole text.

B rows, L columns of the buffer, N steps of the record, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.generation import state
from formax.generation.answer import answer, to_the_end
from formax.generation.decoding import Context, Feed, Known, prefill, read
from formax.generation.dola import contrast
from formax.generation.state import Rule, Tokens
from formax.generation.task import Task, negative_of
from formax.model import Model


@dataclass(frozen=True)
class How:
    """What is part of the program.

    Attributes:
        feed: how the model is given tokens.
        steps: most new tokens that a record has room for.
        pads: rows that have ended go on with padding; where no token ends a text they go on with words.
        keeps: of "scores", "logits" and the names of `decoding.SEEN`, what is recorded.
        branches: texts for each prompt.
        negative: how the text after the prompt for guidance is given.
        layers: of DoLa, the candidates that the last layer is contrasted with.
    """

    feed: Feed
    steps: int
    pads: bool = True
    keeps: tuple[str, ...] = ()
    branches: int = 1
    negative: Feed | None = None
    layers: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """What is done to scores, when a text ends, and what follows the end. Their strengths are no part of a program."""

    process: Rule
    criteria: Rule
    pad: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Texts that are being written.

    Attributes:
        tokens: the texts so far.
        context: what the model knows of all but their last token.
        done: bool [B], which of them have ended.
        key: random key for the tokens to come; None if nothing is drawn.
        record: what is kept of every step, arrays [N, ...].
        negative: the texts after the prompt for guidance, and what is known of them.
    """

    tokens: Tokens
    context: Context
    done: Array
    key: Array | None
    record: dict[str, Any]
    negative: tuple[Tokens, Context] | None = None


def begin(
    model: Model, known: Known, rules: Rules, key: Array | None, negative: Known | None = None, *, how: How
) -> Texts:
    """Chooses the first token after a prompt that was read."""
    texts = _first(model, known.forgotten(), rules, key, negative, how=how)
    if how.branches > 1:
        return texts
    # Caches went in, but did not come out, which would have copied them.
    other = None if negative is None or texts.negative is None else (texts.negative[0], negative.context)
    return replace(texts, context=known.context, negative=other)


@partial(jax.jit, static_argnames=("how",))
def _first(model: Model, known: Known, rules: Rules, key: Array | None, negative: Known | None, *, how: How) -> Texts:
    known = known.branched(how.branches)
    texts = Texts(known.tokens, known.context, jnp.zeros(len(known.logits), bool), key, {})
    other = None
    if negative is not None:
        negative = negative.branched(how.branches)
        texts, other = replace(texts, negative=(negative.tokens, negative.context)), negative.logits
    record = empty_record(model, how.feed, texts.context, texts.tokens, known.logits, how.steps, how.keeps)
    texts = replace(texts, record=record)
    texts = choose(model, texts, known.logits, rules, how, other, known.states)
    if how.branches == 1:
        none = Context(None, None, {})
        texts = replace(texts, context=none, negative=texts.negative and (texts.negative[0], none))
    return texts


@partial(jax.jit, static_argnames=("how",), donate_argnames=("texts",))
def go(model: Model, texts: Texts, rules: Rules, until: Array, *, how: How) -> tuple[Texts, Array, Array]:
    """Writes on until the column `until`, or until all texts have ended.

    Returns:
        The texts, whether all have ended, and their last tokens [B].
    """

    def unfinished(texts: Texts) -> Array:
        return ~texts.done.all() & (texts.tokens.length < until)

    texts = jax.lax.while_loop(unfinished, lambda texts: step(model, texts, rules, how), texts)
    return texts, texts.done.all(), texts.tokens.last(1)[:, 0]


def step(model: Model, texts: Texts, rules: Rules, how: How) -> Texts:
    """Reads the last token of every text and chooses the next."""
    logits, context, seen = read_last(model, how.feed, texts.context, texts.tokens)
    texts = replace(texts, context=context, record=noted(texts.record, seen, texts.tokens))
    other, negative = read_negative(model, how.negative, texts.negative)
    texts = replace(texts, negative=negative)
    states = tuple(x[:, -1] for x in seen.get("hidden_states", ()))
    return choose(model, texts, logits, rules, how, other, states)


def choose(
    model: Model,
    texts: Texts,
    logits: Array,
    rules: Rules,
    how: How,
    other: Array | None = None,
    states: tuple[Array, ...] = (),
) -> Texts:
    """Writes the next token of every text.

    Args:
        model: the model.
        texts: the texts.
        logits: scores of the model [B, V].
        rules: what is done to them.
        how: the rest.
        other: the scores without the prompt, for guidance.
        states: of all layers [B, E], for DoLa.
    """
    scores = contrast(model, how.feed, how.layers, logits, states) if how.layers else logits
    scores = processed(rules.process, texts.tokens, scores, other)
    texts = replace(texts, record=noted(texts.record, {"scores": scores, "logits": logits}, texts.tokens))
    key = texts.key
    if key is not None:
        key, own = jax.random.split(key)
        chosen = jax.random.categorical(own, scores).astype(jnp.int32)
    else:
        chosen = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if how.pads:
        chosen = jnp.where(texts.done, rules.pad, chosen)
    tokens = written(texts.tokens, chosen)
    negative = texts.negative and (written(texts.negative[0], chosen), texts.negative[1])
    return replace(texts, tokens=tokens, done=texts.done | rules.criteria(tokens, scores), key=key, negative=negative)


def processed(process: Rule, tokens: Tokens, scores: Array, other: Array | None) -> Array:
    """Scores [B, V] after the rules, which are given those without the prompt if there is guidance."""
    return process(tokens, scores, **({} if other is None else {"unconditional": other}))


def written(tokens: Tokens, chosen: Array) -> Tokens:
    """The texts with one token [B] more."""
    ids = jax.lax.dynamic_update_slice_in_dim(tokens.ids, chosen[:, None], tokens.length, axis=1)
    return state.replace(tokens, ids=ids, length=tokens.length + 1)


def read_last(model: Model, feed: Feed, context: Context, tokens: Tokens) -> tuple[Array, Context, dict[str, Any]]:
    """Reads the last token of every text: scores of the next [B, V], what is known then, what else was asked for."""
    logits, context, seen = read(model, feed, context, tokens, tokens.length - 1, 1)
    return logits[:, 0], context, seen


def read_negative(
    model: Model, feed: Feed | None, negative: tuple[Tokens, Context] | None
) -> tuple[Array | None, tuple[Tokens, Context] | None]:
    """As `read_last`, of the texts after the prompt for guidance: scores [B, V], None without guidance; the texts."""
    if feed is None or negative is None:
        return None, negative
    tokens, context = negative
    scores, context, _ = read_last(model, feed, context, tokens)
    return scores, (tokens, context)


def empty_record(
    model: Model, feed: Feed, context: Context, tokens: Tokens, logits: Array, steps: int, keeps: tuple[str, ...]
) -> dict[str, Any]:
    """A record without entries, with room for so many steps."""
    one: dict[str, Any] = {"scores": logits, "logits": logits}
    if feed.seen:
        one |= jax.eval_shape(lambda: read_last(model, feed, context, tokens)[2])
    kept = {name: one[name] for name in keeps if name in one}
    return jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), kept)


def noted(record: dict[str, Any], entries: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
    """The record with what it has of these entries, at the step that writes the next token."""
    put = partial(jax.lax.dynamic_update_index_in_dim, index=tokens.new(), axis=0)
    return {name: jax.tree.map(put, held, entries[name]) if name in entries else held for name, held in record.items()}


def how_of(task: Task) -> How:
    """What is part of the program."""
    return How(
        feed=task.feed,
        steps=task.steps if task.keeps else 0,
        pads=bool(task.config.eos_token_ids),
        keeps=task.keeps,
        branches=task.config.num_return_sequences,
        layers=task.layers,
    )


def rules_of(task: Task) -> Rules:
    """What is no part of it."""
    return Rules(task.process, task.criteria, jnp.int32(task.pad))


def first_of(task: Task, negative: Any, negative_mask: Any) -> tuple[Known, Known | None, How]:
    """What is known of the prompt, and of the one for guidance if there is guidance; and the program."""
    other, feed = guidance_of(task, negative, negative_mask)
    return task.known(), other, replace(how_of(task), negative=feed)


def guidance_of(task: Task, negative: Any, negative_mask: Any) -> tuple[Known | None, Feed | None]:
    """What is known of the prompt that guidance leads away from, and how its text is given; None without guidance.

    Raises:
        ValueError: there is no guidance, and a prompt for it is given.
    """
    if "unconditional" in task.process.needs:
        prompt, (feed, room, count) = negative_of(task, negative, negative_mask)
        return prefill(task.model, feed, prompt, room, count), feed
    if negative is not None:
        raise ValueError("negative_prompt_ids has an effect only with a guidance_scale other than 1")
    return None, None


def write(task: Task, key: Array | None, streamer: Any, negative: Any = None, negative_mask: Any = None) -> Any:
    """Greedy search and sampling, from the prompt to what `generate` returns."""
    rules, (known, other, how) = rules_of(task), first_of(task, negative, negative_mask)
    texts, seen = begin(task.model, known, rules, key, other, how=how), known.seen
    if streamer is None:
        texts, _ = to_the_end(task, lambda texts, until: go(task.model, texts, rules, until, how=how)[:2], texts)
        return answer(task, texts, seen, how.branches)
    if task.traced:
        raise TypeError("a streamer has nothing to show in a trace (jax.jit, jax.pmap, ...): leave it out")
    streamer.put(task.shown)
    until, over = int(task.prompt.length), False
    while not over:
        until += 1
        texts, done, last = go(task.model, texts, rules, jnp.int32(until), how=how)
        streamer.put(np.asarray(last))
        over = bool(done) or until >= int(task.prompt.length) + task.most or task.late()
    streamer.end()
    return answer(task, texts, seen, how.branches)


def tokens_of(task: Task, key: Array | None, negative: Any = None, negative_mask: Any = None) -> Iterator[np.ndarray]:
    """Greedy search and sampling, token by token: int32 [B] each."""
    rules, (known, other, how) = rules_of(task), first_of(task, negative, negative_mask)
    texts = begin(task.model, known, rules, key, other, how=how)
    until = int(task.prompt.length) + 1
    texts, over, last = go(task.model, texts, rules, jnp.int32(until), how=how)
    while True:
        until += 1
        # The next token is on its way while this one is looked at.
        ahead = go(task.model, texts, rules, jnp.int32(until), how=how)
        yield np.asarray(last)
        if over or task.late():
            return
        texts, over, last = ahead
