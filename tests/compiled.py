"""What tests ask of compiled functions."""

from typing import Any


def programs(compiled: Any) -> int:
    """How many programs a jitted function has become so far."""
    return int(compiled._cache_size())
