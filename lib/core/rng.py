"""Random keys by path: a parameter's random numbers depend on its own name alone.

Adding, removing or renaming one parameter leaves the initial values of all others as they were.
"""

from __future__ import annotations

import zlib

import jax

Key = jax.Array


def fold_path(key: Key, path: str) -> Key:
    """The key that belongs to `path`, e.g. "layers.0.attn.q.kernel"."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def split(key: Key | None, count: int) -> tuple[Key | None, ...]:
    """`count` independent keys; all None when `key` is None, so that dropout stays off."""
    if key is None:
        return (None,) * count
    return tuple(jax.random.split(key, count))
