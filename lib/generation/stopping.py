"""When a text is finished: pure functions of the state, alone and inside `jit`.

    done = any_of(max_length(64), eos((0, 2)))(state)           # bool [B]

The one that asks the clock, `MaxTime`, stays outside compiled programs.

B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.generation.config import GenerationConfig
from formax.generation.state import Number, Rule, Tokens, number, rule, token_ids, whole


class HasVocabulary(Protocol):
    """What `stop_strings` asks of a tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def convert_tokens_to_string(self, tokens: list[str]) -> str: ...


def any_of(*criteria: Rule) -> Rule:
    """True for rows that one of the criteria holds for; with none, for no row.

    Raises:
        TypeError: something that is no criterion.
    """
    for one in criteria:
        if not isinstance(one, Rule):
            raise TypeError(f"any_of() takes criteria, such as max_length(64), got {one!r}")
    needs = tuple(dict.fromkeys(name for one in criteria for name in one.needs))
    return rule("any_of", _any_of, {"criteria": tuple(criteria)}, needs=needs)


def _any_of(state: Tokens, scores: Array | None, *, criteria: tuple[Rule, ...], **given: Any) -> Array:
    done = jnp.zeros(state.ids.shape[0], bool)
    for one in criteria:
        done |= one(state, scores, **{name: given[name] for name in one.needs})
    return done


def custom(function: Callable[[Tokens, Array | None], Array], name: str = "custom") -> Rule:
    """A criterion of your own: `function(state, scores) -> bool [B]`, which JAX must be able to trace."""
    return rule(name, function)


def max_length(length: Number) -> Rule:
    """All rows, once the text, prompt included, has `length` tokens (a strength)."""
    return rule("max_length", _max_length, {"most": whole("max_length", length)})


def _max_length(state: Tokens, scores: Array | None, *, most: Any) -> Array:
    return jnp.broadcast_to(state.count() >= most, state.ids.shape[:1])


def max_new_tokens(count: Number) -> Rule:
    """All rows, once there are `count` new tokens (a strength)."""
    return rule("max_new_tokens", _max_new_tokens, {"most": whole("max_new_tokens", count, 1)})


def _max_new_tokens(state: Tokens, scores: Array | None, *, most: Any) -> Array:
    return jnp.broadcast_to(state.new() >= most, state.ids.shape[:1])


def eos(token_id: int | Sequence[int]) -> Rule:
    """Rows whose last token is the end, or one of several."""
    return rule("eos", _eos, None, {"ids": token_ids("eos_token_id", token_id)})


def _eos(state: Tokens, scores: Array | None, *, ids: tuple[int, ...]) -> Array:
    return jnp.isin(state.last(1)[:, 0], np.asarray(ids, np.int32))


def confidence(threshold: Number) -> Rule:
    """Rows whose last token had a probability below `threshold` (a strength): an assistant that became unsure.

    Scores [B, V] are those that the last token was chosen by.
    """
    ok = number("assistant_confidence_threshold", threshold, lambda v: 0 <= v <= 1, "a number between 0 and 1")
    return rule("confidence", _confidence, {"threshold": ok})


def _confidence(state: Tokens, scores: Array | None, *, threshold: Any) -> Array:
    if scores is None:
        raise TypeError("confidence needs the scores that the last token was chosen by")
    chosen = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), state.last(1, missing=0), axis=-1)
    return chosen[:, 0] < threshold


def stop_strings(strings: str | Sequence[str], vocabulary: HasVocabulary | Mapping[int, str]) -> Rule:
    """Rows in which a string was completed by the last token, wherever in the token it ends.

    The text of every token is known beforehand, so each token becomes a step of an automaton that reads the string:
    from how much of it has been read to how much of it is read then. Only tables are looked at inside a program.

    Args:
        strings: a string, or several.
        vocabulary: a tokenizer, or the text of each token: {id: text as it stands within a sentence}. A token that is
            not in it ends no string and goes on with none.

    Raises:
        ValueError: an empty string, or one that no token of the vocabulary can end.
    """
    given = (strings,) if isinstance(strings, str) else tuple(strings)
    if not given or not all(given):
        raise ValueError(f"stop_strings must be texts of one character or more, got {strings!r}")
    texts = vocabulary if isinstance(vocabulary, Mapping) else texts_of(vocabulary)
    tables = [_automaton(one, texts) for one in given]
    # As the reference: it goes back no further than as many tokens as the longest string has characters.
    return rule(
        "stop_strings",
        _stop_strings,
        {"steps": tuple(table for table, _ in tables), "ends": tuple(ends for _, ends in tables)},
        {"window": max(map(len, given))},
    )


def _stop_strings(state: Tokens, scores: Array | None, *, steps: Any, ends: Any, window: int) -> Array:
    size = steps[0].shape[0] - 1
    tokens = state.last(window)
    tokens = jnp.where((tokens < 0) | (tokens > size), size, tokens)
    found = jnp.zeros(tokens.shape[0], bool)
    for step, end in zip(steps, ends, strict=True):
        # A loop, since XLA would fuse look-ups in look-ups into one expression that doubles with every one of them.
        go = partial(_step, jnp.asarray(step), tokens)
        read = jax.lax.fori_loop(0, window - 1, go, jnp.zeros(tokens.shape[0], jnp.int32))
        found |= jnp.asarray(end)[tokens[:, -1], read]
    return found


def _step(table: Array, tokens: Array, i: Array, read: Array) -> Array:
    return table[tokens[:, i], read].astype(jnp.int32)


def texts_of(tokenizer: HasVocabulary) -> dict[int, str]:
    """The text of each token as it stands within a sentence, where a leading space is a space."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("abcdef", add_special_tokens=False)["input_ids"])
    # What this tokenizer makes of it: one that does not know the letters has something else there.
    before = tokenizer.convert_tokens_to_string(tokens)
    return {
        index: tokenizer.convert_tokens_to_string([*tokens, token]).removeprefix(before)
        for token, index in tokenizer.get_vocab().items()
    }


def _automaton(string: str, texts: Mapping[int, str]) -> tuple[np.ndarray, np.ndarray]:
    """The tables of one string.

    Returns:
        (steps, ends), [V + 1, len(string)]: how much of the string is read after a token, by how much was before it;
        and whether the token completes it. The last row is that of unknown tokens.
    """
    size = len(string)
    alphabet = {character: i for i, character in enumerate(sorted(set(string)))}
    # By how much is read (0..size) and the next character: how much is read then (Knuth, Morris and Pratt).
    table = np.zeros((size + 1, len(alphabet) + 1), np.int32)
    for read in range(size + 1):
        for character, i in alphabet.items():
            text = string[:read] + character
            table[read, i] = next(n for n in range(min(len(text), size), -1, -1) if text.endswith(string[:n]))
    rows = max(texts, default=-1) + 2
    steps, ends = np.zeros((rows, size), np.int32), np.zeros((rows, size), bool)
    by_length: dict[int, list[int]] = {}
    for index, text in texts.items():
        by_length.setdefault(len(text), []).append(index)
    for length, indices in by_length.items():
        codes = np.asarray([[alphabet.get(c, len(alphabet)) for c in texts[index]] for index in indices], np.int32)
        after = np.tile(np.arange(size, dtype=np.int32), (len(indices), 1))
        done = np.zeros(after.shape, bool)
        for i in range(length):
            after = table[after, codes[:, i, None]]
            done = done | (after == size)
        # A whole string that was read goes on as its longest end that is also its beginning.
        border = next(n for n in range(size - 1, -1, -1) if string.endswith(string[:n]))
        steps[indices], ends[indices] = np.where(after == size, border, after), done
    if not ends.any():
        raise ValueError(f"no token of this vocabulary can end the stop string {string!r}")
    return steps.astype(np.min_scalar_type(size)), ends


@dataclass(frozen=True)
class MaxTime:
    """True once `seconds` have passed since `start`. Called between compiled steps, it cannot be part of one.

    Attributes:
        seconds: how long.
        start: in seconds since 1970; when the object was made, by default.
    """

    seconds: float
    start: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        number("max_time", self.seconds, lambda v: v >= 0, "a number of seconds, 0 or more")

    def __call__(self) -> bool:
        """Whether the time is over."""
        return time.time() - self.start > self.seconds


def criteria_of(
    config: GenerationConfig, *, tokenizer: HasVocabulary | Mapping[int, str] | None = None
) -> tuple[tuple[Rule, ...], MaxTime | None]:
    """The criteria that settings ask for, in the reference's order; the clock apart, since it asks the host.

    `max_new_tokens` goes before `max_length`, as in `generate`.

    Raises:
        ValueError: a setting that makes no criterion, or stop strings without a tokenizer.
    """
    out = list[Rule]()
    if config.max_new_tokens is not None:
        out.append(max_new_tokens(config.max_new_tokens))
    elif config.max_length is not None:
        out.append(max_length(config.max_length))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer of the model: pass tokenizer=")
        out.append(stop_strings(config.stop_strings, tokenizer))
    if config.eos_token_ids:
        out.append(eos(config.eos_token_ids))
    if config.is_assistant and config.assistant_confidence_threshold:
        out.append(confidence(config.assistant_confidence_threshold))
    return tuple(out), None if config.max_time is None else MaxTime(config.max_time)
