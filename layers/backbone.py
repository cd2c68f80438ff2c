"""What backbones have in common: which of their maps they give, and how encoders of patches make theirs of states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from formax.core.config import Config, ConfigError, config
from formax.core.spec import fold
from formax.layers.patches import PatchesConfig


@config
class BackboneConfig(Config):
    """Fields that say which maps a backbone gives, by name or by number; 0 is the stem, then come the stages.

    A configuration has `depths`, the layers of each stage, or says itself what `stages` there are.
    """

    out_features: tuple[str, ...] | None = None
    out_indices: tuple[int, ...] | None = None
    stage_names: tuple[str, ...] | None = None  # what follows from the number of stages, written by the reference

    def check(self) -> None:
        picked, last = self.features, len(self.stages) - 1
        if not all(0 <= i <= last for i in picked) or list(picked) != sorted(set(picked)):
            raise ConfigError(f"out_indices={self.out_indices} must be stages of 0 to {last}, in order")
        if self.out_features is not None and tuple(self.stages[i] for i in picked) != self.out_features:
            raise ConfigError(f"out_features={self.out_features} and out_indices={self.out_indices} are not the same")
        super().check()

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the maps that a backbone can give."""
        return ("stem", *(f"stage{i + 1}" for i in range(len(self.depths))))

    @property
    def features(self) -> tuple[int, ...]:
        """Numbers of the maps that a backbone gives: what is asked for, or the last."""
        if self.out_indices is not None:
            return tuple(i + len(self.stages) if i < 0 else i for i in self.out_indices)
        if self.out_features is None:
            return (len(self.stages) - 1,)
        if unknown := set(self.out_features) - set(self.stages):
            raise ConfigError(f"out_features has {min(unknown)!r}; there are {', '.join(self.stages)}")
        return tuple(self.stages.index(name) for name in self.out_features)


@config
class PatchBackboneConfig(BackboneConfig, PatchesConfig):
    """A backbone whose stages are the layers of an encoder of patches; the stem is what goes into the first."""

    @property
    def stages(self) -> tuple[str, ...]:
        return ("stem", *(f"stage{i + 1}" for i in range(self.num_hidden_layers)))


def all_states(
    block: Callable[..., jax.Array], layers: Any, x: jax.Array, *, key: Any = None, data: Any = None
) -> list[jax.Array]:
    """What goes into each of the `layers`, and what comes out of the last: L + 1 arrays of the shape of `x`.

    `block(p, x, key) -> x` is one layer; `block(p, x, key, data)` when there is `data`, an entry a layer.
    """

    def run(p: Any, x: jax.Array, cache: Any, *rest: Any) -> tuple[jax.Array, jax.Array]:
        return block(p, x, *rest), x

    last, before = fold(run, layers, x, key=key, data=data)
    return [*(() if before is None else before), last]


def as_map(x: jax.Array, grid: tuple[int, int], *, first: int = 1) -> jax.Array:
    """States of `first` tokens and of the patches of a `grid` -> a map of these: [B, 1 + N, E] -> [B, E, H, W]."""
    return x[:, first:].swapaxes(1, 2).reshape(len(x), x.shape[-1], *grid)
