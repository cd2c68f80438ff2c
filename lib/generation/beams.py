"""Beam search, and sampling of beams: several texts for every input, of which the likeliest are kept at every step.

Beams that end are put aside and compete by their sum of log-probabilities over a power of their length. What the
reference does where papers leave it open: of the candidates of a step, `max(2, 1 + ends)` times the beams, only those
among the first K can end; and a search is over when no running beam can become better than the worst that is aside.

B inputs, K beams, C candidates, L columns of the buffer, N steps, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from formax.generation import state
from formax.generation.answer import beam_answer, longest, to_the_end
from formax.generation.decoding import Context, Feed, Known
from formax.generation.sampling import empty_record, guidance_of, noted, processed, read_last, read_negative, written
from formax.generation.state import Rule, Tokens
from formax.generation.task import Task
from formax.model import Model

# A score that every real one is better than.
NEVER = -1.0e9


@dataclass(frozen=True)
class How:
    """What is part of the program; `feed`, `steps`, `keeps` and `negative` as in `sampling.How`.

    Attributes:
        beams: beams of every input.
        candidates: continuations that are looked at in every step.
        early: `early_stopping` of the settings.
    """

    feed: Feed
    steps: int
    keeps: tuple[str, ...]
    beams: int
    candidates: int
    early: bool | str
    negative: Feed | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """What is no part of the program.

    Attributes:
        process: what is done to scores.
        criteria: when a text ends.
        fill: int32, the token in columns after the end.
        length_penalty: float32, the power of the length that scores are divided by.
        most: int32, how many tokens can be new.
    """

    process: Rule
    criteria: Rule
    fill: Array
    length_penalty: Array
    most: Array

    def weighed(self, sums: Array, length: Array) -> Array:
        """Scores of texts of this length, which sums of log-probabilities become."""
        return sums / length.astype(jnp.float32) ** self.length_penalty

    def hoped(self, sums: Array, length: Array, how: How) -> Array:
        """The best scores that texts of this length may come to."""
        if how.early == "never":  # long texts are favoured by a positive power: take the longest
            length = jnp.where(self.length_penalty > 0, self.most, length)
        return self.weighed(sums, length)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Some:
    """Some texts of every input.

    Attributes:
        ids: int32 [B, n, L].
        scores: float32 [B, n].
        parents: int32 [B, n, N], the row that each new token was chosen from; -1 where there is none.
        ended: bool [B, n].
    """

    ids: Array
    scores: Array
    parents: Array
    ended: Array

    def best(self, n: int, scores: Array | None = None) -> Some:
        """Those n of the highest scores, their own or others [B, ...]."""
        found, places = jax.lax.top_k(self.scores if scores is None else scores, n)
        return replace(self.at(places), scores=found)

    def at(self, places: Array) -> Some:
        """Those at places [B, n]."""
        return jax.tree.map(lambda x: jnp.take_along_axis(x, jnp.expand_dims(places, range(2, x.ndim)), axis=1), self)

    def beside(self, other: Some) -> Some:
        """These, and then those."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, other)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beams:
    """A search that is going on.

    Attributes:
        tokens: the running beams as rows, [B * K, L].
        context: what the model knows of all but their last token.
        running: the same with their scores.
        aside: the best that have ended.
        improvable: bool [B, 1], whether a running beam may become better than these.
        stuck: bool, whether every candidate of the last step has ended.
        key: random key, if anything is drawn.
        record: what is kept of every step, arrays [N, B * K, ...].
        negative: the beams after the prompt for guidance, and what is known of them.
    """

    tokens: Tokens
    context: Context
    running: Some
    aside: Some
    improvable: Array
    stuck: Array
    key: Array | None
    record: dict[str, Any]
    negative: tuple[Tokens, Context] | None = None


@partial(jax.jit, static_argnames=("how",))
def begin(
    model: Model, known: Known, rules: Rules, key: Array | None, negative: Known | None = None, *, how: How
) -> Beams:
    """Takes the first step after a prompt that was read, once for all beams."""
    inputs, k, room = len(known.logits), how.beams, known.tokens.ids.shape[1]
    known, beside, other = known.branched(k), None, None
    if negative is not None:
        negative = negative.branched(k)
        beside, other = (negative.tokens, negative.context), negative.logits
    ids = jnp.where(jnp.arange(room) < known.tokens.length, known.tokens.ids, rules.fill)
    tokens, ids = replace(known.tokens, ids=ids), ids.reshape(inputs, k, room)
    # The beams are equal at first: all continuations come from one of them.
    scores = jnp.broadcast_to(jnp.where(jnp.arange(k) == 0, 0, NEVER).astype(jnp.float32), (inputs, k))
    parents, ended = jnp.full((inputs, k, how.steps), -1, jnp.int32), jnp.zeros((inputs, k), bool)
    beams = Beams(
        tokens,
        known.context,
        Some(ids, scores, parents, ended),
        Some(ids, jnp.full_like(scores, NEVER), parents, ended),
        jnp.ones((inputs, 1), bool),
        jnp.zeros((), bool),
        key,
        empty_record(model, how.feed, known.context, tokens, known.logits, how.steps, how.keeps),
        beside,
    )
    return choose(beams, known.logits, rules, how, other)


@partial(jax.jit, static_argnames=("how",), donate_argnames=("beams",))
def go(model: Model, beams: Beams, rules: Rules, until: Array, *, how: How) -> tuple[Beams, Array]:
    """Searches on until the column `until`, or the end: the search, and whether it is over."""

    def step(beams: Beams) -> Beams:
        logits, context, seen = read_last(model, how.feed, beams.context, beams.tokens)
        record = noted(beams.record, seen, beams.tokens)
        other, negative = read_negative(model, how.negative, beams.negative)
        beams = replace(beams, context=context, record=record, negative=negative)
        return choose(beams, logits, rules, how, other)

    beams = jax.lax.while_loop(lambda one: ~over(one, how) & (one.tokens.length < until), step, beams)
    return beams, over(beams, how)


def over(beams: Beams, how: How) -> Array:
    """Whether nothing can be found any more."""
    full = beams.aside.ended.all() if how.early is True else False
    return ~beams.improvable.any() | full | beams.stuck


def choose(beams: Beams, logits: Array, rules: Rules, how: How, other: Array | None = None) -> Beams:
    """Continues every beam by the scores [B * K, V], with `other` ones for guidance, and keeps the best."""
    k, before = how.beams, beams.tokens
    inputs = len(beams.running.scores)
    scores = processed(rules.process, before, jax.nn.log_softmax(logits, axis=-1), other)
    record = noted(beams.record, {"scores": scores, "logits": logits}, before)
    sums = (scores.reshape(inputs, k, -1) + beams.running.scores[..., None]).reshape(inputs, -1)
    key, picked = beams.key, sums
    if key is not None:  # without replacement, which the largest of perturbed logarithms are
        key, own = jax.random.split(key)
        picked = jax.nn.log_softmax(sums, axis=-1) + jax.random.gumbel(own, sums.shape)
    places = jax.lax.top_k(picked, how.candidates)[1]
    beam, token = places // scores.shape[1], places % scores.shape[1]
    rows = jnp.arange(inputs)[:, None] * k + beam
    found = continued(beams.running, beam, token, rows, before)
    found = replace(found, scores=jnp.take_along_axis(sums, places, axis=1))
    tokens = state.replace(before, length=before.length + 1)
    ends = rules.criteria(replace(tokens, ids=found.ids.reshape(-1, found.ids.shape[-1]))).reshape(places.shape)

    kept = jax.lax.top_k(found.scores + jnp.where(ends, NEVER, 0), k)[1]
    running = replace(found, scores=found.scores + jnp.where(ends, NEVER, 0)).at(kept)
    aside = put_aside(beams, found, ends & (jnp.arange(how.candidates) < k), tokens.new(), rules, how)
    sources, chosen = (jnp.take_along_axis(x, kept, axis=1).reshape(-1) for x in (rows, token))
    negative = beams.negative
    if negative is not None:
        its = written(replace(negative[0], ids=negative[0].ids[sources]), chosen.astype(jnp.int32))
        negative = its, negative[1].take(sources, of_texts=True)
    return Beams(
        replace(tokens, ids=running.ids.reshape(inputs * k, -1)),
        beams.context.take(sources, of_texts=True),
        running,
        aside,
        beams.improvable & can_improve(running, aside, tokens.new(), rules, how),
        ends.all(),
        key,
        record,
        negative,
    )


def continued(running: Some, beam: Array, token: Array, rows: Array, tokens: Tokens) -> Some:
    """Beams [B, C], each with one token more, chosen from the scores of these rows."""
    found = running.at(beam)
    ids = jax.lax.dynamic_update_index_in_dim(found.ids, token.astype(jnp.int32), tokens.length, axis=2)
    parents = jax.lax.dynamic_update_index_in_dim(found.parents, rows.astype(jnp.int32), tokens.new(), axis=2)
    return replace(found, ids=ids, parents=parents)


def put_aside(beams: Beams, found: Some, ends: Array, new: Array, rules: Rules, how: How) -> Some:
    """The best of those aside and of candidates that end now."""
    scores = rules.weighed(found.scores, new)
    if how.early is True:
        scores = scores + jnp.where(beams.aside.ended.all(-1, keepdims=True), NEVER, 0)
    scores = scores + jnp.where(beams.improvable, 0, NEVER) + jnp.where(ends, 0, NEVER)
    return beams.aside.beside(replace(found, scores=scores, ended=ends)).best(how.beams)


def cut_off(beams: Beams, rules: Rules, how: How) -> Some:
    """The best of those aside and of those that run, where no time is left for these to end."""
    scores = rules.weighed(beams.running.scores, beams.tokens.new())
    return beams.aside.beside(replace(beams.running, scores=scores)).best(how.beams)


def can_improve(running: Some, aside: Some, new: Array, rules: Rules, how: How) -> Array:
    """Bool [B, 1]: whether the best running beam may become better than one that is aside."""
    best = rules.hoped(running.scores[:, :1], new, how)
    worst = jnp.where(aside.ended, aside.scores.min(-1, keepdims=True), NEVER)
    return (best > worst).any(-1, keepdims=True)


def write(task: Task, key: Array | None, negative: Any = None, negative_mask: Any = None) -> Any:
    """Beam search, from the prompt to what `generate` returns."""
    c, ends = task.config, task.config.eos_token_ids
    other, feed = guidance_of(task, negative, negative_mask)
    how = How(
        feed=task.feed,
        steps=task.steps,
        keeps=task.keeps,
        beams=c.num_beams,
        candidates=max(2, 1 + len(ends)) * c.num_beams,
        early=c.early_stopping,
        negative=feed,
    )
    # The reference's: a padding token 0 does not count as one.
    rules = rules_of(task, (c.pad_token_id or ends[0]) if ends else -1)
    known = task.known()
    beams = begin(task.model, known.forgotten(), rules, key, other, how=how)
    beams, over = to_the_end(task, lambda beams, until: go(task.model, beams, rules, until, how=how), beams)
    if task.traced:
        aside = jax.tree.map(partial(jnp.where, over), beams.aside, cut_off(beams, rules, how))
    else:
        aside = beams.aside if over else cut_off(beams, rules, how)
    best = jax.tree.map(lambda x: x[:, : c.num_return_sequences].reshape(-1, *x.shape[2:]), aside)
    start, steps = int(task.prompt.length), longest(task, best.parents)
    shown = jnp.repeat(jnp.asarray(task.shown), c.num_return_sequences, axis=0)
    sequences = jnp.concatenate([shown, best.ids[:, start : start + steps]], axis=1)
    return beam_answer(task, beams, known.seen, sequences, best.scores, best.parents)


def rules_of(task: Task, fill: int) -> Rules:
    """What is no part of the program; `fill` is the token in columns after the end."""
    power = 1.0 if task.config.length_penalty is None else task.config.length_penalty
    return Rules(task.process, task.criteria, jnp.int32(fill), jnp.float32(power), jnp.int32(task.most))
