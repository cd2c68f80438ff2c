"""What a tokenizer call returns: a dictionary of ids and masks that also maps between characters, words and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Encoding

TENSOR_TYPES = ("np", "jax")


class TokenSpan(NamedTuple):
    """Tokens `start` to `end - 1`."""

    start: int
    end: int


class CharSpan(NamedTuple):
    """Characters `start` to `end - 1` of the text."""

    start: int
    end: int


class BatchEncoding(dict[str, Any]):
    """A dictionary whose entries are attributes too (`batch.input_ids`), with the encodings it came from.

    An integer key gives the `tokenizers.Encoding` of that row. The methods that map positions take a row before the
    position, `char_to_token(row, char)`; without one the row is 0.

    Attributes:
        encodings: one `tokenizers.Encoding` for each row; empty when the batch was not made from text.
    """

    def __init__(self, data: dict[str, Any], encodings: Sequence[Encoding] = ()) -> None:
        super().__init__(data)
        self.encodings = list(encodings)

    def __getitem__(self, key: str | int | slice) -> Any:
        """The entry of that name, or the encoding of that row."""
        if isinstance(key, str):
            return super().__getitem__(key)
        if not self.encodings:
            raise KeyError(f"{key!r}: rows are found by number only in a batch that was made from text")
        return self.encodings[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"this batch has no {name!r}; it has {', '.join(self)}") from None

    @property
    def n_sequences(self) -> int | None:
        """1 when each row is one text, 2 when each is a pair, None when that is not known."""
        return self.encodings[0].n_sequences if self.encodings else None

    def _row(self, index: int) -> Encoding:
        if not self.encodings:
            raise ValueError("only a batch that was made from text knows its words and characters")
        return self.encodings[index]

    def _at(self, row: int, position: int | None) -> tuple[Encoding, int]:
        """Reads `(row, position)`, where a single number is a position in row 0."""
        return (self._row(0), row) if position is None else (self._row(row), position)

    def tokens(self, row: int = 0) -> list[str]:
        """The tokens of a row as text."""
        return self._row(row).tokens

    def word_ids(self, row: int = 0) -> list[int | None]:
        """For each token the number of its word, None for special tokens."""
        return self._row(row).word_ids

    def sequence_ids(self, row: int = 0) -> list[int | None]:
        """For each token 0 if it is of the first text, 1 if of the second, None for special tokens."""
        return self._row(row).sequence_ids

    def token_to_sequence(self, row: int, token: int | None = None) -> int | None:
        """Which text of a pair a token is of."""
        encoding, token = self._at(row, token)
        return encoding.token_to_sequence(token % len(encoding))

    def token_to_word(self, row: int, token: int | None = None) -> int | None:
        """The number of the word a token is of."""
        encoding, token = self._at(row, token)
        return encoding.token_to_word(token % len(encoding))

    def token_to_chars(self, row: int, token: int | None = None) -> CharSpan | None:
        """The characters a token stands for, None for special tokens."""
        encoding, token = self._at(row, token)
        span = encoding.token_to_chars(token)
        return None if span is None else CharSpan(*span)

    def char_to_token(self, row: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        """The token that holds a character, None for white space."""
        encoding, char = self._at(row, char)
        return encoding.char_to_token(char, sequence_index)

    def char_to_word(self, row: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        """The number of the word that holds a character."""
        encoding, char = self._at(row, char)
        return encoding.char_to_word(char, sequence_index)

    def word_to_tokens(self, row: int, word: int | None = None, sequence_index: int = 0) -> TokenSpan | None:
        """The tokens of a word, None when it has none."""
        encoding, word = self._at(row, word)
        span = encoding.word_to_tokens(word, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(self, row: int, word: int | None = None, sequence_index: int = 0) -> CharSpan | None:
        """The characters of a word, None when it has no tokens."""
        encoding, word = self._at(row, word)
        span = encoding.word_to_chars(word, sequence_index)
        return None if span is None else CharSpan(*span)

    def with_tensors(self, kind: str | None) -> BatchEncoding:
        """The same batch with arrays for lists.

        Args:
            kind: "np" (int64), "jax" (int32), or None for the lists as they are.

        Raises:
            ValueError: an unknown kind, or rows of different lengths.
        """
        if kind is None:
            return self
        if kind not in TENSOR_TYPES:
            raise ValueError(f"return_tensors={kind!r}: use 'np', 'jax' or None")
        arrays: dict[str, Any] = {key: _as_array(key, value) for key, value in self.items()}
        if kind == "jax":
            import jax.numpy as jnp

            arrays = {key: jnp.asarray(value, jnp.int32) for key, value in arrays.items()}
        return BatchEncoding(arrays, self.encodings)


def _as_array(key: str, value: Any) -> np.ndarray:
    """Makes an int64 array of nested lists.

    Raises:
        ValueError: the rows differ in length.
    """
    if isinstance(value, list) and value and isinstance(value[0], list):
        lengths = {len(row) for row in value}
        if len(lengths) > 1:
            raise ValueError(
                f"{key!r} has rows of {min(lengths)} to {max(lengths)} tokens, which make no array: pass padding=True"
                " (and truncation=True where texts may be too long)"
            )
    return np.asarray(value, np.int64)
