"""Criteria that end a text, alone and in `jit`, against the reference's."""

import itertools
import json
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import programs
from jax import Array
from oracle import make_generation as oracle

from formax.generation import stopping
from formax.generation.config import GenerationConfig
from formax.generation.state import Rule, Tokens
from formax.text.tokenizer import AutoTokenizer

DATA = Path(__file__).parent / "data"
PIECES = dict(enumerate(oracle.PIECES))


@lru_cache
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "generation" / "stopping.npz") as file:
        return dict(file)


def states(ids: np.ndarray, length: int) -> list[Tokens]:
    """The text as it is; and after filling, with tokens before and behind it that must not be looked at."""
    width = ids.shape[1]
    around = ids[:, (np.arange(width + 5) - 3) % width].copy()
    around[:, 3 : 3 + length] = ids[:, :length]
    return [
        Tokens(jnp.asarray(ids), jnp.int32(length), jnp.int32(0), jnp.int32(0)),
        Tokens(jnp.asarray(around), jnp.int32(length + 3), jnp.int32(3), jnp.int32(3)),
    ]


@jax.jit
def applied(criterion: Rule, tokens: Tokens, scores: Array) -> Array:
    return criterion(tokens, scores)


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        ("max_length", stopping.max_length(9)),
        ("max_length", stopping.max_new_tokens(9)),  # where no token is a prompt
        ("eos", stopping.eos([4, int(oracle.texts()[2, 8])])),
        ("confidence", stopping.confidence(0.004)),
    ],
)
def test_equals_the_reference(name: str, criterion: Rule) -> None:
    scores = jnp.asarray(oracle.scores())
    closed = jax.jit(lambda tokens: criterion(tokens, scores))
    answers = set()
    for length in oracle.LENGTHS:
        expected = golden()[f"{name}.{length}"]
        answers.update(expected.tolist())
        for tokens in states(oracle.texts(), length):
            np.testing.assert_array_equal(closed(tokens), expected)
            np.testing.assert_array_equal(applied(criterion, tokens, scores), expected)
    assert answers == {True, False}
    assert programs(closed) == 2  # two sizes of the buffer


@pytest.mark.parametrize("name", oracle.STRINGS)
def test_stop_strings_equal_the_reference(name: str) -> None:
    criterion = stopping.stop_strings(oracle.STRINGS[name], PIECES)
    for length in (1, 2, 6, 9):
        expected = golden()[f"strings.{name}.{length}"]
        for tokens in states(oracle.pieces(), length):
            np.testing.assert_array_equal(jax.jit(criterion)(tokens), expected)
    assert 5 < golden()[f"strings.{name}.9"].sum() < 595


@pytest.mark.parametrize("strings", [["aab"], ["abab", "ba"], ["aaa"], ["bb", "abcab"], ["a"], ["babab", "aa"]])
def test_stop_strings_are_found_where_they_are(strings: list[str]) -> None:
    """A string was completed by the last token when it is in the text, and ends later than that token begins."""
    tokens = ["a", "b", "ab", "ba", "aa", "aab", "bb", "abab", "c", "bcab"]
    texts = list(itertools.product(range(len(tokens)), repeat=4))
    found = jax.jit(stopping.stop_strings(strings, dict(enumerate(tokens))))(Tokens.of(texts, room=1))
    # No further back than the longest string has characters.
    most = max(map(len, strings))
    for text, one in zip(texts, np.asarray(found).tolist(), strict=True):
        whole = "".join(tokens[i] for i in text[-most:])
        begin = len(whole) - len(tokens[text[-1]])
        assert one == any(whole.find(string, max(0, begin - len(string) + 1)) >= 0 for string in strings), text


def test_texts_of_a_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "text" / "bytelevel")
    expected = dict(enumerate(json.loads(str(golden()["texts"]))))
    assert stopping.texts_of(tokenizer) == {i: text for i, text in expected.items() if text is not None}
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    criterion = stopping.stop_strings("two", tokenizer)
    assert criterion(Tokens.of([ids]))[0]
    assert not criterion(Tokens.of([ids[:-1]]))[0]


def test_texts_of_a_tokenizer_without_letters() -> None:
    """The reference has no answer where the letters that it puts before a token are unknown."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "text" / "wordpiece")
    texts = stopping.texts_of(tokenizer)
    assert set(texts) == set(tokenizer.get_vocab().values())
    continued = [texts[i] for token, i in tokenizer.get_vocab().items() if token.startswith("##")]
    assert continued
    assert not any(text.startswith((" ", "##")) for text in continued)


def test_any_of() -> None:
    criterion = jax.jit(stopping.any_of(stopping.max_length(9), stopping.eos(28)))
    ids = jnp.asarray([[28, 5, 5], [5, 5, 28]])
    assert criterion(Tokens.of(ids)).tolist() == [False, True]
    assert criterion(Tokens.of(jnp.tile(ids, 3))).tolist() == [True, True]
    assert stopping.any_of()(Tokens.of(ids)).tolist() == [False, False]
    mine = stopping.custom(lambda tokens, scores: tokens.last(1)[:, 0] == 5)
    assert stopping.any_of(mine)(Tokens.of(ids)).tolist() == [True, False]


def test_other_strengths_are_the_same_program() -> None:
    tokens, scores = states(oracle.texts(), 5)[0], jnp.asarray(oracle.scores())
    run = jax.jit(lambda criterion, tokens: criterion(tokens, scores))
    assert [run(stopping.max_length(n), tokens).all() for n in (4, 6)] == [True, False]
    assert programs(run) == 1


def test_max_time() -> None:
    assert not stopping.MaxTime(60.0)()
    assert stopping.MaxTime(60.0, start=time.time() - 61)()


def test_criteria_of_settings() -> None:
    config = GenerationConfig(
        max_length=30, max_time=2.0, stop_strings=["stop"], eos_token_id=[4, 5], is_assistant=True, max_new_tokens=3
    )
    criteria, clock = stopping.criteria_of(config, tokenizer=PIECES)
    assert [one.name for one in criteria] == ["max_new_tokens", "stop_strings", "eos", "confidence"]
    assert clock is not None
    assert clock.seconds == 2.0
    criteria, clock = stopping.criteria_of(GenerationConfig())
    assert ([one.name for one in criteria], clock) == (["max_length"], None)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: stopping.stop_strings([], PIECES), "stop_strings must be texts of one character or more"),
    (lambda: stopping.stop_strings(["a", ""], PIECES), "stop_strings must be texts of one character or more"),
    (lambda: stopping.stop_strings("€", PIECES), "no token of this vocabulary can end the stop string '€'"),
    (lambda: stopping.max_length(-1), "max_length must be a whole number, 0 or more, got -1"),
    (lambda: stopping.max_new_tokens(0), "max_new_tokens must be a whole number, 1 or more, got 0"),
    (lambda: stopping.eos(-1), "eos_token_id must be token ids .*got -1"),
    (lambda: stopping.confidence(2.0), "assistant_confidence_threshold must be a number between 0 and 1"),
    (lambda: stopping.confidence(0.5)(Tokens.of([[1]])), "confidence needs the scores"),
    (lambda: stopping.MaxTime(-1), "max_time must be a number of seconds"),
    (lambda: stopping.any_of(3), r"any_of\(\) takes criteria, such as max_length\(64\), got 3"),  # type: ignore[arg-type]
    (lambda: stopping.criteria_of(GenerationConfig(stop_strings="a")), "stop_strings need the tokenizer"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_told(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
