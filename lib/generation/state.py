"""What processors and criteria look at (`Tokens`), and what they are (`Rule`): pure functions that pass through `jit`.

Axes: B rows, L columns of the buffer, V tokens of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from formax.core.frozen import FrozenDict

Number = float | Array
"""A number, or a scalar array that may be traced."""


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "length", "first", "prompt"], meta_fields=[])
@dataclass(frozen=True)
class Tokens:
    """The text so far, in a buffer whose size never changes.

    Attributes:
        ids: int32 [B, L]. Columns `first` to `length - 1` are the text, prompt included; columns before `first` are
            filling that made prompts of different lengths share a compiled program, those from `length` on are not
            written yet. Neither is ever looked at.
        length: int32, where the next token goes.
        first: int32, where the text begins.
        prompt: int32, where the new tokens begin.
    """

    ids: Array
    length: Array | int
    first: Array | int
    prompt: Array | int

    @classmethod
    def of(cls, ids: Any, *, room: int = 0, prompt: int | None = None) -> Tokens:
        """The state after the tokens `ids` [B, T], with `room` columns that are not written yet.

        Args:
            ids: the text.
            room: columns for tokens to come.
            prompt: how many of the T tokens are the prompt; all of them by default.

        Raises:
            ValueError: `ids` has not two axes, or the prompt is longer than the text.
        """
        ids = jnp.asarray(ids, jnp.int32)
        if ids.ndim != 2:
            raise ValueError(f"ids must be [rows, tokens], got the shape {ids.shape}")
        length = ids.shape[1]
        prompt = length if prompt is None else prompt
        if not 0 <= prompt <= length:
            raise ValueError(f"prompt={prompt} is not between 0 and the {length} tokens that there are")
        filled = jnp.pad(ids, ((0, 0), (0, room)))
        return cls(filled, jnp.int32(length), jnp.int32(0), jnp.int32(prompt))

    def written(self) -> Array:
        """Bool [L]: which columns are text."""
        columns = jnp.arange(self.ids.shape[1])
        return (columns >= self.first) & (columns < self.length)

    def count(self) -> Array:
        """int32: the tokens of the text, which the reference calls its length."""
        return jnp.asarray(self.length - self.first, jnp.int32)

    def new(self) -> Array:
        """int32: how many of them are new."""
        return jnp.asarray(self.length - self.prompt, jnp.int32)

    def last(self, n: int, missing: int = -1) -> Array:
        """int32 [B, n]: the last n tokens; `missing` where the text is shorter."""
        columns = self.length - n + jnp.arange(n)
        inside = jnp.clip(columns, 0, self.ids.shape[1] - 1)
        return jnp.where(columns >= self.first, jnp.take(self.ids, inside, axis=1), missing)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["strengths"],
    meta_fields=["name", "function", "settings", "needs"],
)
@dataclass(frozen=True, eq=False)  # hashed by identity, so that `jax.jit(rule)` works
class Rule:
    """A processor or a criterion: a function with its settings, and a pytree whose leaves are its strengths.

    A rule that a compiled function closes over is part of the program. One that is handed to it as an argument is not:
    then its strengths may change and nothing is compiled again.

    Attributes:
        name: what its constructor is called.
        function: `(state, scores, *, strengths, settings, needs) -> result`.
        strengths: numbers (and arrays) that may be traced.
        settings: what decides shapes, and token ids.
        needs: names of what the call must hand in beside the state and the scores.
    """

    name: str
    function: Callable[..., Array]
    strengths: dict[str, Any] = field(default_factory=dict)
    settings: FrozenDict = field(default_factory=FrozenDict)
    needs: tuple[str, ...] = ()

    def __call__(self, state: Tokens, scores: Array | None = None, **given: Any) -> Array:
        """Applies the rule.

        Args:
            state: the text so far, of B rows.
            scores: float [B, V]; criteria that do not look at scores go without.
            **given: what `needs` names.

        Raises:
            TypeError: something that is needed is missing, or something else is given.
            ValueError: shapes that do not fit together, or a token that the vocabulary does not have.
        """
        missing = [name for name in self.needs if name not in given]
        if missing:
            raise TypeError(f"{self.name} needs {', '.join(f'{name}=' for name in missing)}")
        other = sorted(set(given) - set(self.needs))
        if other:
            raise TypeError(f"{self.name} takes {', '.join(self.needs) or 'nothing'} beside the scores, got {other[0]}")
        if scores is not None and (scores.ndim != 2 or scores.shape[0] % state.ids.shape[0]):
            rows = state.ids.shape[0]
            raise ValueError(f"{self.name}: scores must be [{rows}, vocabulary] for {rows} rows, got {scores.shape}")
        return self.function(state, scores, **self.strengths, **self.settings, **given)

    def __repr__(self) -> str:
        told = {**self.strengths, **self.settings}
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in told.items())})"


def rule(
    name: str,
    function: Callable[..., Array],
    strengths: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    needs: tuple[str, ...] = (),
) -> Rule:
    """Makes a `Rule`; see there."""
    return Rule(name, function, dict(strengths or {}), FrozenDict(settings or {}), needs)


def known(value: Any) -> bool:
    """Whether a number is known now, and not only when the program runs."""
    return not isinstance(value, jax.core.Tracer)


def number(name: str, value: Any, ok: Callable[[Any], bool], right: str) -> Any:
    """`value`, if it is a number for which `ok` holds or one that is traced.

    Raises:
        ValueError: says what `right` would be.
    """
    if not known(value):
        return value
    try:
        good = not isinstance(value, bool | str) and bool(ok(value))
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} must be {right}, got {value!r}")
    return value


def whole(name: str, value: Any, least: int = 0) -> Any:
    """`value`, if it is a whole number of at least `least` or one that is traced."""
    right = f"a whole number, {least} or more"
    return number(name, value, lambda v: v >= least and v == int(v), right)


def token_ids(name: str, value: Any, *, several: bool = True) -> tuple[int, ...]:
    """Token ids, given as one or as a sequence, as a tuple.

    Raises:
        ValueError: an id that is no whole number of 0 or more, or no ids at all.
    """
    given = (value,) if not hasattr(value, "__iter__") else tuple(value)
    for one in given:
        if isinstance(one, bool) or not hasattr(one, "__index__") or one < 0:
            raise ValueError(f"{name} must be token ids (whole numbers, 0 or more), got {one!r}")
    if not given:
        raise ValueError(f"{name} must name a token, got none")
    if len(given) > 1 and not several:
        raise ValueError(f"{name} must be one token id, got {list(given)}")
    return tuple(int(one) for one in given)


def in_vocabulary(name: str, ids: Any, size: int) -> None:
    """Raises ValueError for a token id that a vocabulary of `size` does not have."""
    beyond = sorted({one for one in ids if one >= size})
    if beyond:
        told = ", ".join(map(str, beyond[:5])) + (", ..." if len(beyond) > 5 else "")
        raise ValueError(f"{name}: no token {told} in a vocabulary of {size} (ids are 0 to {size - 1})")


def replace(state: Tokens, **changes: Any) -> Tokens:
    """A copy of the state with other fields."""
    return dataclasses.replace(state, **changes)
