"""Words that a text must hold: one phrase, or one of several.

How far a text is follows from its tokens, one constraint after the other: a token that does not go on with the phrase
that was begun undoes it. A constraint is a trie, and a text's progress a node in each; both are arrays, so that the
search is a compiled program.

B inputs, K beams, c constraints, N nodes of all tries, W most children of a node, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.generation.state import Tokens, token_ids

PENDING, BEGUN, MET = 0, 1, 2


@dataclass(frozen=True)
class PhrasalConstraint:
    """The text must hold these tokens, in this order and nothing between them."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", token_ids("token_ids", self.token_ids))

    @property
    def phrases(self) -> tuple[tuple[int, ...], ...]:
        """The phrases of which one must be there."""
        return (self.token_ids,)


@dataclass(frozen=True)
class DisjunctiveConstraint:
    """The text must hold one of these phrases, none of which may begin another."""

    nested_token_ids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.nested_token_ids:
            raise ValueError("nested_token_ids must hold a phrase, got none")
        given = tuple(token_ids("nested_token_ids", one) for one in self.nested_token_ids)
        for one in given:
            for other in given:
                if one is not other and other[: len(one)] == one:
                    raise ValueError(f"the phrase {list(one)} begins {list(other)}: one of them is enough")
        object.__setattr__(self, "nested_token_ids", given)

    @property
    def phrases(self) -> tuple[tuple[int, ...], ...]:
        """The phrases of which one must be there."""
        return self.nested_token_ids


def constraints_of(constraints: Sequence[Any] | None, force_words_ids: Sequence[Any] | None) -> list[Any]:
    """The constraints that settings ask for.

    Raises:
        ValueError: what is no constraint, or no words.
    """
    found = list(constraints or ())
    for one in found:
        if not isinstance(one, PhrasalConstraint | DisjunctiveConstraint):
            raise ValueError(f"constraints must be PhrasalConstraint or DisjunctiveConstraint, got {one!r}")
    for words in force_words_ids or ():
        if not hasattr(words, "__len__") or not len(words):
            raise ValueError(f"force_words_ids must be lists of token ids, or of phrases to choose from, got {words!r}")
        several = hasattr(words[0], "__len__")
        found.append(DisjunctiveConstraint(tuple(map(tuple, words))) if several else PhrasalConstraint(tuple(words)))
    if not found:
        raise ValueError("constraints and force_words_ids name no words")
    return found


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """How far texts are: of every constraint int32 [..., c] the node, whether it is met, and its place in the queue."""

    node: Array
    status: Array
    order: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Constraints:
    """The tries of all constraints.

    Attributes:
        tokens: int32 [N, W], the tokens that lead on from a node, -1 where there are fewer.
        children: int32 [N, W], where they lead.
        roots: int32 [c].
        depth: int32 [N].
        heights: int32 [c], tokens of the longest phrase.
    """

    tokens: Array
    children: Array
    roots: Array
    depth: Array
    heights: Array

    @classmethod
    def of(cls, constraints: Sequence[Any]) -> Constraints:
        """The tries of these constraints."""
        nodes: list[dict[int, int]] = []
        depth, roots = list[int](), list[int]()
        for one in constraints:
            roots.append(len(nodes))
            nodes.append({})
            depth.append(0)
            for phrase in one.phrases:
                at = roots[-1]
                for token in phrase:
                    if token not in nodes[at]:
                        nodes[at][token] = len(nodes)
                        nodes.append({})
                        depth.append(depth[at] + 1)
                    at = nodes[at][token]
        width = max(map(len, nodes))
        tokens = np.full((len(nodes), width), -1, np.int32)
        children = np.zeros((len(nodes), width), np.int32)
        for i, node in enumerate(nodes):
            tokens[i, : len(node)], children[i, : len(node)] = list(node), list(node.values())
        heights = [max(map(len, one.phrases)) for one in constraints]
        return cls(*(jnp.asarray(x, jnp.int32) for x in (tokens, children, roots, depth, heights)))

    def begun(self, shape: tuple[int, ...]) -> Progress:
        """The progress of texts without tokens, [*shape, c]."""
        count = len(self.roots)
        whole = (*shape, count)
        return Progress(
            jnp.broadcast_to(self.roots, whole), jnp.zeros(whole, jnp.int32), jnp.broadcast_to(jnp.arange(count), whole)
        )

    def after(self, ids: Array, there: Array) -> Progress:
        """The progress of texts [B, L], of which the columns that are `there` [L] count."""

        def step(progress: Progress, column: tuple[Array, Array]) -> tuple[Progress, None]:
            token, counts = column
            new = self.added(progress, token)
            return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, progress), None

        return jax.lax.scan(step, self.begun(ids.shape[:1]), (ids.T, there))[0]

    def met(self, progress: Progress) -> Array:
        """Bool [...]: whether all constraints are met."""
        return (progress.status == MET).all(-1)

    def added(self, progress: Progress, token: Array) -> Progress:
        """The progress with one token [...] more."""
        leads = self.tokens[progress.node] == token[..., None, None]  # [..., c, W]
        child = jnp.where(leads, self.children[progress.node], 0).sum(-1)
        goes = leads.any(-1)
        begun = progress.status == BEGUN
        waiting = (progress.status == PENDING) & goes
        # The first in the queue that the token begins, if none is begun already.
        first = jnp.where(waiting, progress.order, jnp.iinfo(jnp.int32).max)
        first = waiting & (first == first.min(-1, keepdims=True)) & ~begun.any(-1, keepdims=True)
        on = (begun & goes) | first
        undone = begun & ~goes
        node = jnp.where(on, child, jnp.where(undone, self.roots, progress.node))
        status = jnp.where(on, jnp.where(self.tokens[node, 0] < 0, MET, BEGUN), progress.status)
        status = jnp.where(undone, PENDING, status)
        # What was undone waits behind all others.
        order = jnp.where(undone, progress.order.max(-1, keepdims=True) + 1, progress.order)
        new = Progress(node, status, order)
        over = self.met(progress)[..., None]
        return jax.tree.map(lambda a, b: jnp.where(over, b, a), new, progress)

    def advancing(self, progress: Progress) -> Array:
        """The tokens int32 [..., c * W] that bring a text on, -1 where there are fewer; none where all is met."""
        begun = progress.status == BEGUN
        asked = begun | ((progress.status == PENDING) & ~begun.any(-1, keepdims=True))
        tokens = jnp.where(asked[..., None], self.tokens[progress.node], -1)
        return tokens.reshape(*tokens.shape[:-2], -1)

    def bank(self, progress: Progress) -> Array:
        """int32 [...]: how far texts are, in tokens."""
        most = self.heights.max()
        part = most - (self.heights - self.depth[progress.node])
        return ((progress.status == MET) * most + jnp.where(progress.status == BEGUN, part, 0)).sum(-1)

    def dealt(
        self, picked: Sequence[Array], sums: Array, ids: Array, before: Tokens, progress: Progress
    ) -> tuple[list[Array], Progress]:
        """Beams to go on with: those picked by their scores, and those that come nearer to the constraints.

        They are dealt in turns: the best of those that are farthest, the best of the next, ..., then the second ones.

        Args:
            picked: scores [B, K], and of each the beam and the token.
            sums: scores of all continuations [B, K, V].
            ids: the beams' tokens before [B, K, L].
            before: what is written of them.
            progress: how far they are.

        Returns:
            Scores, beams and tokens [B, K] of those that go on, and how far these are.
        """
        scores, beam, token = picked
        inputs, k = scores.shape
        more = self.advancing(progress)  # [B, K, c * W]
        width = more.shape[-1]
        its = jnp.take_along_axis(sums, jnp.maximum(more, 0), axis=-1)
        scores = jnp.concatenate([scores, jnp.where(more < 0, -jnp.inf, its).reshape(inputs, -1)], axis=1)
        beam = jnp.concatenate([beam, jnp.broadcast_to(jnp.repeat(jnp.arange(k), width), (inputs, k * width))], axis=1)
        token = jnp.concatenate([token, more.reshape(inputs, -1)], axis=1)

        # One text may be found several times: the first counts. Beams are equal at the first step.
        written = before.written()
        same = (ids[:, :, None] == ids[:, None]) | ~written
        same = jnp.take_along_axis(same.all(-1), beam[:, :, None], axis=1)
        same = jnp.take_along_axis(same, beam[:, None], axis=2) & (token[:, :, None] == token[:, None])
        earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
        known = (same & earlier).any(-1) & (jnp.arange(scores.shape[1]) >= k)
        out = known | (token < 0)

        now = jax.tree.map(lambda x: jnp.take_along_axis(x, beam[..., None], axis=1), progress)
        after = self.added(now, token)
        banks = self.bank(after)
        # As far as numbers of 32 bits tell: scores of beams that are none take the bank away.
        value = jnp.where(out, -jnp.inf, banks.astype(jnp.float32) * 100 + scores)
        order = jnp.argsort(-value, axis=1, stable=True)
        banks, gone = (jnp.take_along_axis(x, order, axis=1) for x in (banks, out))
        starts = jnp.concatenate([jnp.ones((inputs, 1), bool), banks[:, 1:] != banks[:, :-1]], axis=1)
        places = jnp.arange(banks.shape[1])
        turn = places - jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
        turn = jnp.where(gone, jnp.iinfo(jnp.int32).max, turn)
        kept = jnp.take_along_axis(order, jnp.argsort(turn, axis=1, stable=True)[:, :k], axis=1)
        nothing_new = (out | (jnp.arange(scores.shape[1]) < k)).all(-1, keepdims=True)
        kept = jnp.where(nothing_new, jnp.arange(k), kept)
        chosen = [jnp.take_along_axis(x, kept, axis=1) for x in (scores, beam, token)]
        return chosen, jax.tree.map(lambda x: jnp.take_along_axis(x, kept[..., None], axis=1), after)
