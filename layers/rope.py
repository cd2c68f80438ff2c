"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them beyond the trained length.

Queries and keys are turned by angles that grow with the position: `position * frequency`, a frequency for every pair
of channels. A configuration's `rope_parameters` says which frequencies: `rope_theta` is the base, `rope_type` the
stretching.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def check_rope(parameters: Mapping[str, Any]) -> None:
    """Refuses rotary settings that cannot be computed.

    Raises:
        ValueError: an unknown kind, a missing or impossible setting; the message names it.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type={kind!r} is none of {', '.join(ROPE_TYPES)}")
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    for name in ("rope_theta", *needed.get(kind, ())):
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"rope_parameters of rope_type {kind!r} need a positive {name}, got {value!r}")


@dataclass(frozen=True)
class Rope:
    """How a model's queries and keys are turned.

    Attributes:
        parameters: `rope_parameters` of its configuration.
        dim: number of channels that are turned (even), a head's size or a part of it.
        max_positions: the configuration's `max_position_embeddings`.
    """

    parameters: Mapping[str, Any]
    dim: int
    max_positions: int

    def at(self, positions: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """What turns queries or keys [B, T, H, D] that stand at positions [B or 1, T]."""
        cos, sin = cos_sin(self.parameters, self.dim, self.max_positions, positions)
        return partial(rotate, cos=cos, sin=sin)

    def later(self, keys: jax.Array, by: jax.Array) -> jax.Array:
        """Keys [B, T, K, D], turned already, as if they stood `by` (int32) positions later."""
        angles, _ = _angles(self.parameters, self.dim, self.max_positions, by.reshape(1, 1))
        return rotate(keys, jnp.cos(angles), jnp.sin(angles))


def cos_sin(
    parameters: Mapping[str, Any], dim: int, max_positions: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles of every position, float32.

    Args:
        parameters: `rope_parameters` of a configuration.
        dim: number of channels that are turned (even), a head's size or a part of it.
        max_positions: the configuration's `max_position_embeddings`.
        positions: [B or 1, T].

    Returns:
        Two times [B or 1, T, 1, dim / 2], to broadcast over heads.
    """
    angles, magnitude = _angles(parameters, dim, max_positions, positions)
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def _angles(
    parameters: Mapping[str, Any], dim: int, max_positions: int, positions: jax.Array
) -> tuple[jax.Array, float]:
    """Angles of every position, [B or 1, T, 1, dim / 2], and the factor on their cosine and sine."""
    theta = parameters["rope_theta"]
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    factor = parameters.get("factor", 1.0)
    magnitude = 1.0
    match parameters.get("rope_type", "default"):
        case "default":
            frequencies: Any = 1 / theta**exponents
        case "linear":
            frequencies = 1 / theta**exponents / factor
        case "dynamic":
            # The base grows once a position lies beyond the trained ones (NTK-aware scaling).
            length = jnp.maximum(positions.max() + 1, max_positions).astype(jnp.float32)
            base = theta * ((factor * length / max_positions) - (factor - 1)) ** (dim / (dim - 2))
            frequencies = 1 / base**exponents
        case "llama3":
            frequencies = _llama3(parameters, 1 / theta**exponents)
        case "yarn":
            frequencies, magnitude = _yarn(parameters, theta**exponents, dim, max_positions)
    return positions.astype(jnp.float32)[..., None, None] * jnp.asarray(frequencies, jnp.float32), magnitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (channel i, channel i + dim / 2) of the first `dim` channels, [B, T, H, D] -> [B, T, H, D]."""
    half = cos.shape[-1]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


def rotate_neighbours(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (channel 2i, channel 2i + 1) of the first `dim` channels, [B, T, H, D] -> [B, T, H, D]."""
    dim = 2 * cos.shape[-1]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    a, b, rest = x[..., :dim:2], x[..., 1:dim:2], x[..., dim:]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(*x.shape[:-1], dim)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _llama3(parameters: Mapping[str, Any], frequencies: np.ndarray) -> np.ndarray:
    """Low frequencies divided by the factor, high ones kept, those between blended (Llama 3.1, arXiv:2407.21783)."""
    trained = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    lengths = 2 * np.pi / frequencies
    slowed = frequencies / parameters["factor"]
    share = (trained / lengths - low) / (high - low)
    blended = (1 - share) * slowed + share * frequencies
    return np.where(lengths > trained / low, slowed, np.where(lengths < trained / high, frequencies, blended))


def _yarn(parameters: Mapping[str, Any], inverse: np.ndarray, dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): (frequencies, factor on cosine and sine).

    Channels that turn more than `beta_fast` times over the trained length are kept, those that turn less than
    `beta_slow` times are slowed down, with a linear ramp between.
    """
    theta, factor = parameters["rope_theta"], parameters["factor"]
    trained = parameters.get("original_max_position_embeddings") or max_positions

    def channel(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(parameters.get("beta_fast") or 32), channel(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    slowed = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = slowed / (factor * inverse) + (1 - slowed) / inverse
    return frequencies, _yarn_magnitude(parameters)


def _yarn_magnitude(parameters: Mapping[str, Any]) -> float:
    """Factor on cosine and sine: given, or 0.1 ln(factor) + 1, or a quotient of two such (DeepSeek)."""
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]

    def of(weight: float) -> float:
        factor = parameters["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return of(parameters["mscale"]) / of(parameters["mscale_all_dim"])
    return of(1.0)
