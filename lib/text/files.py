"""The JSON files beside a tokenizer or a sentence encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(content: bytes, where: str | Path, kind: type = dict) -> Any:
    """The object (or list) in a JSON file.

    Args:
        content: what the file holds.
        where: the file, for messages.
        kind: dict or list.

    Raises:
        ValueError: it is not JSON, or holds something else.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{where} holds {type(value).__name__}, not {'an object' if kind is dict else 'a list'}")
    return value
