"""Beam search in groups that avoid each other's words, and beam search that must say certain words.

Diverse beam search: Vijayakumar et al. 2016, arXiv:1610.02424. Constrained: Anderson et al. 2017, arXiv:1612.00576,
with beams dealt in turns to those that are equally far (Post and Vilar 2018, arXiv:1804.06609). Both keep of every
group the best texts that have ended; a group is done when none of its beams can become better than the worst of these.

B inputs, G groups, k beams of a group, K = G k beams, C candidates, L columns of the buffer, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.generation import state
from formax.generation.answer import beam_answer, to_the_end
from formax.generation.beams import NEVER, How, Rules, Some, continued, rules_of
from formax.generation.config import GenerationMode
from formax.generation.constraints import Constraints, Progress, constraints_of
from formax.generation.decoding import Context, Known
from formax.generation.sampling import empty_record, noted, read_last
from formax.generation.state import Tokens
from formax.generation.task import Task
from formax.model import Model

# In the ids of a text that has ended: there was a token that ends texts.
END = -1


@dataclass(frozen=True)
class GroupsHow(How):
    """As in `beams.How`, where `beams` and `candidates` are of all groups and of one group.

    Attributes:
        groups: how many there are.
        ends: the tokens that end a text.
    """

    groups: int = 1
    ends: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """A search that is going on.

    Attributes:
        tokens: the running beams as rows, [B * K, L].
        context: what the model knows of all but their last token.
        running: the same with their scores, [B, K].
        aside: the best that have ended, [B * G, k].
        done: bool [B, G].
        over: bool, whether all of them are, or all texts meet a criterion.
        record: what is kept of every step.
        progress: of constrained search, how far each running beam is.
    """

    tokens: Tokens
    context: Context
    running: Some
    aside: Some
    done: Array
    over: Array
    record: dict[str, Any]
    progress: Progress | None


@partial(jax.jit, static_argnames=("how",))
def begin(model: Model, known: Known, rules: Rules, constraints: Constraints | None, *, how: GroupsHow) -> Groups:
    """Takes the first step after a prompt that was read."""
    inputs, k = len(known.logits), how.beams
    of_group = k // how.groups
    progress = None
    if constraints is not None:
        said = constraints.after(known.tokens.ids, known.tokens.written())
        progress = jax.tree.map(lambda x: jnp.repeat(x[:, None], k, axis=1), said)
    known = known.branched(k)
    ids = known.tokens.ids.reshape(inputs, k, -1)
    scores = jnp.where(jnp.arange(k) % of_group == 0, 0, NEVER).astype(jnp.float32)
    scores, parents = jnp.broadcast_to(scores, (inputs, k)), jnp.full((inputs, k, how.steps), -1, jnp.int32)
    running = Some(ids, scores, parents, jnp.zeros((inputs, k), bool))
    aside = jax.tree.map(lambda x: x.reshape(inputs * how.groups, of_group, *x.shape[2:]), running)
    search = Groups(
        known.tokens,
        known.context,
        running,
        replace(aside, scores=jnp.full_like(aside.scores, -jnp.inf)),
        jnp.zeros((inputs, how.groups), bool),
        jnp.zeros((), bool),
        empty_record(model, how.feed, known.context, known.tokens, known.logits, how.steps, how.keeps),
        progress,
    )
    return choose(search, known.logits, rules, constraints, how)


@partial(jax.jit, static_argnames=("how",), donate_argnames=("search",))
def go(
    model: Model, search: Groups, rules: Rules, constraints: Constraints | None, until: Array, *, how: GroupsHow
) -> tuple[Groups, Array]:
    """Searches on until the column `until`, or the end: the search, and whether it is over."""

    def step(search: Groups) -> Groups:
        logits, context, seen = read_last(model, how.feed, search.context, search.tokens)
        record = noted(search.record, seen, search.tokens)
        return choose(replace(search, context=context, record=record), logits, rules, constraints, how)

    search = jax.lax.while_loop(lambda one: ~one.over & (one.tokens.length < until), step, search)
    return search, search.over


def choose(search: Groups, logits: Array, rules: Rules, constraints: Constraints | None, how: GroupsHow) -> Groups:
    """Continues the beams of one group after the other, by the scores [B * K, V]."""
    inputs, k = search.running.scores.shape
    size, before = k // how.groups, search.tokens
    new = before.new() + 1
    logs = jax.nn.log_softmax(logits, axis=-1).reshape(inputs, k, -1)
    current = jnp.zeros((inputs, k), jnp.int32)  # what groups have chosen in this step; 0 is a token, as it is there
    running, aside, done, all_scores = [], [], [], []
    progress = search.progress
    for group in range(how.groups):
        own = slice(group * size, (group + 1) * size)
        beams = jax.tree.map(lambda x, own=own: x[:, own], search.running)
        scores = _processed(rules, before, beams, logs[:, own], current, group)
        sums = scores + beams.scores[..., None]
        best, places = jax.lax.top_k(sums.reshape(inputs, -1), how.candidates)
        beam, token = places // sums.shape[-1], places % sums.shape[-1]
        finished = search.done[:, group]
        ends = jnp.isin(token, jnp.asarray(how.ends, jnp.int32))
        rows = jnp.arange(inputs)[:, None] * k + group * size
        # Texts that end at a candidate among the first k are put aside.
        closed = ends & (jnp.arange(how.candidates) < size) & ~finished[:, None]
        if constraints is not None and progress is not None:
            closed &= jnp.take_along_axis(constraints.met(progress), beam, axis=1)
        over = continued(beams, beam, jnp.where(ends, END, token), rows + beam, before)
        held = jax.tree.map(lambda x, g=group: x.reshape(inputs, how.groups, *x.shape[1:])[:, g], search.aside)
        held = offered(held, replace(over, scores=best, ended=closed), new, rules)
        # The others go on.
        on = jnp.argsort(ends, axis=1, stable=True)[:, :size]
        picked = [jnp.take_along_axis(x, on, axis=1) for x in (best, beam, token)]
        if constraints is not None and progress is not None:
            picked, progress = constraints.dealt(picked, sums, beams.ids, before, progress)
        # Groups that are done go on with padding, at a score that harms nobody.
        score, beam, token = (
            jnp.where(finished[:, None], still, x)
            for x, still in zip(picked, (jnp.float32(0), jnp.int32(0), rules.fill), strict=True)
        )
        running.append(replace(continued(beams, beam, token, rows + beam, before), scores=score))
        current = current.at[:, own].set(token.astype(jnp.int32))
        done.append(finished | is_done(held, best[:, 0], new, rules, how))
        aside.append(held)
        all_scores.append(scores)
    kept = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *running)
    put = jax.tree.map(lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *aside)
    tokens = replace(before, ids=kept.ids.reshape(inputs * k, -1), length=before.length + 1)
    parents = jax.lax.dynamic_index_in_dim(kept.parents, before.new(), axis=2, keepdims=False)
    scores = jnp.concatenate(all_scores, axis=1).reshape(inputs * k, -1)
    finished = jnp.stack(done, axis=1)
    return Groups(
        tokens,
        search.context.take(parents.reshape(-1), of_texts=True),
        kept,
        put,
        finished,
        finished.all() | rules.criteria(tokens, scores).all(),
        noted(search.record, {"scores": scores, "logits": logits}, before),
        progress,
    )


def _processed(rules: Rules, before: Tokens, beams: Some, logs: Array, current: Array, group: int) -> Array:
    """The scores [B, k, V] of a group, after the rules."""
    inputs, size, _ = logs.shape
    own = state.replace(before, ids=beams.ids.reshape(inputs * size, -1))
    given = {"current_tokens": current.reshape(-1), "beam_group": group}
    given = {name: x for name, x in given.items() if name in rules.process.needs}
    return rules.process(own, logs.reshape(inputs * size, -1), **given).reshape(logs.shape)


def offered(held: Some, found: Some, length: Array, rules: Rules) -> Some:
    """The best of the texts that are held and of those that have `ended`, by their sums over a power of the length."""
    scores = rules.weighed(found.scores, length)
    # A text that nothing speaks for is still better than none.
    scores = jnp.where(found.ended, jnp.maximum(scores, jnp.finfo(jnp.float32).min), -jnp.inf)
    return held.beside(replace(found, scores=scores)).best(held.scores.shape[1])


def is_done(held: Some, best: Array, length: Array, rules: Rules, how: GroupsHow) -> Array:
    """Bool [B]: whether a group is full, and no beam of it can become better than the worst that it holds."""
    full = held.ended.all(-1)
    if how.early is True:
        return full
    return full & (held.scores.min(-1) >= rules.hoped(best, length, how))


@partial(jax.jit, static_argnames=("how", "returns"))
def finish(search: Groups, rules: Rules, constraints: Constraints | None, *, how: GroupsHow, returns: int) -> Some:
    """The best `returns` texts of every input, [B, returns]; beams of groups that are not done count as they are."""
    inputs, k = search.running.scores.shape
    size = k // how.groups
    open_ = jax.tree.map(lambda x: x.reshape(inputs * how.groups, size, *x.shape[2:]), search.running)
    left = jnp.broadcast_to(~search.done.reshape(-1)[:, None], (inputs * how.groups, size))
    if constraints is not None and search.progress is not None:
        met = constraints.met(search.progress)
        # Where too few have met the constraints, all count.
        left &= met | (met.sum(-1, keepdims=True) < returns)
    all_ = offered(search.aside, replace(open_, ended=left), search.tokens.new(), rules)
    # Of equal ones the last, as there.
    together = jax.tree.map(lambda x: x.reshape(inputs, k, *x.shape[2:])[:, ::-1], all_)
    return together.best(returns)


def spelled(found: Some, shown: np.ndarray, start: int, most: int, pad: int, ends: tuple[int, ...]) -> np.ndarray:
    """The texts with their prompts, int32 [B * returns, T]: an end, and then padding.

    Args:
        found: texts [B, returns].
        shown: their prompts [B, T'].
        start: column of the first new token.
        most: tokens that can be new.
        pad: the padding token.
        ends: the tokens that end a text.
    """
    returns = found.scores.shape[1]
    ids = np.asarray(found.ids).reshape(len(shown) * returns, -1)[:, start:]
    counts = (np.asarray(found.parents).reshape(len(ids), -1) >= 0).sum(-1)
    ids = np.where(np.arange(ids.shape[1]) < counts[:, None], ids, END)
    lengths = (ids != END).sum(-1)
    size = min(int(lengths.max()) + 1, most)
    out = np.full((len(ids), size), pad, np.int32)
    for row, length in enumerate(lengths):
        out[row, :length] = ids[row, :length]
        if length < size and ends:
            out[row, length] = ends[0]
    return np.concatenate([np.repeat(shown, returns, axis=0), out], axis=1)


def write(task: Task) -> Any:
    """Beam search in groups or with constraints, from the prompt to what `generate` returns.

    Raises:
        ValueError: settings that do not go together.
    """
    c, ends, count = task.config, task.config.eos_token_ids, task.config.num_beam_groups
    constraints = None
    if task.mode is GenerationMode.CONSTRAINED_BEAM:
        if c.num_beams < 2 or count > 1 or c.do_sample:
            raise ValueError(
                "constraints want beams, without groups and sampling: "
                f"num_beams={c.num_beams}, num_beam_groups={count}, do_sample={c.do_sample}"
            )
        constraints = Constraints.of(constraints_of(c.constraints, c.force_words_ids))
    elif c.num_beams % count or c.do_sample:
        raise ValueError(
            "groups want as many beams each, and no sampling: "
            f"num_beams={c.num_beams}, num_beam_groups={count}, do_sample={c.do_sample}"
        )
    how = GroupsHow(
        feed=task.feed,
        steps=task.steps,
        keeps=task.keeps,
        beams=c.num_beams,
        candidates=max(2, 1 + len(ends)) * (c.num_beams // count),
        early=c.early_stopping,
        groups=count,
        ends=ends,
    )
    rules = rules_of(task, task.pad)
    known = task.known()
    search = begin(task.model, known.forgotten(), rules, constraints, how=how)
    search, _ = to_the_end(task, lambda one, until: go(task.model, one, rules, constraints, until, how=how), search)
    best = finish(search, rules, constraints, how=how, returns=c.num_return_sequences)
    sequences = jnp.asarray(spelled(best, task.shown, int(task.prompt.length), task.most, task.pad, ends))
    parents = best.parents.reshape(len(sequences), -1)
    return beam_answer(task, search, known.seen, sequences, best.scores.reshape(-1), parents)
