"""What backbones have in common: which of their maps they give."""

from __future__ import annotations

from formax.core.config import Config, ConfigError, config


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
