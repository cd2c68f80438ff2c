"""Token healing: a prompt that ends within a word is taken back by a token, and its end is chosen anew.

"http" and ":" before "//" are two tokens that no text has: a tokenizer would have made "://" one. So the prompt's last
token is a choice again, among all tokens that begin as it does; the model's likeliest takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

# Among the tokens that begin alike the likeliest counts, but for a little that the prompt's own is ahead.
AHEAD = 1.0


class Heals(Protocol):
    """What healing asks of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def all_special_ids(self) -> list[int]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...


def healed(
    ids: np.ndarray, mask: np.ndarray | None, tokenizer: Heals | None, scores_of: Callable[[Any, Any], Any]
) -> np.ndarray:
    """Prompts whose last token is, of those that begin with it, the one that the model finds likeliest.

    Args:
        ids: int32 [B, T]; padding is on the left.
        mask: [B, T], which are no padding; None if there is none.
        tokenizer: whose tokens they are.
        scores_of: what the model says of the token after prompts and a mask like these: [B, V].

    Returns:
        int32 [B, T], with other tokens in the last column.

    Raises:
        ValueError: no tokenizer, or padding on the right.
    """
    if tokenizer is None:
        raise ValueError("token_healing needs the tokenizer of the model: pass tokenizer=")
    ids = ids.copy()
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    if not mask[:, -1].all():
        raise ValueError("token_healing is about the last column, where there is padding: pad on the left")
    special, vocabulary = set(tokenizer.all_special_ids), tokenizer.get_vocab()
    choices: dict[int, list[int]] = {}
    for row, (tail, length) in enumerate(zip(ids[:, -1].tolist(), mask.sum(1).tolist(), strict=True)):
        begins = tokenizer.convert_ids_to_tokens(tail)
        found = [index for token, index in vocabulary.items() if token.startswith(begins) and index not in special]
        # A prompt of one token has nothing before it that would tell, unless texts begin with a token of their own.
        if len(found) > 1 and tail not in special and (length > 1 or tokenizer.bos_token_id is not None):
            choices[row] = found
    if not choices:
        return ids
    # The tokens before; a column more on the left, for the beginning of a text that has one token.
    before, seen = np.roll(ids, 1, axis=1), np.roll(mask, 1, axis=1)
    before[:, 0], seen[:, 0] = 0, False
    alone = mask.sum(1) == 1
    before[alone, -1] = 0 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    seen[alone, -1] = True
    scores = np.asarray(scores_of(before, seen), np.float32)
    for row, found in choices.items():
        own = scores[row, found] + AHEAD * (np.asarray(found) == ids[row, -1])
        ids[row, -1] = found[int(own.argmax())]
    return ids
