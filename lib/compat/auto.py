"""Auto classes: the head by its task, the family by config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from formax.compat import files
from formax.core import registry
from formax.core.config import Config
from formax.loading import choose


class Auto:
    """An Auto class: the head by its task, the family by config.json."""

    # (family, architecture) -> class.
    make: ClassVar[Callable[..., Any]]
    task: ClassVar[str]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **options: Any) -> Any:
        """Opens a checkpoint; arguments as those of the class that it turns out to be."""
        config = files.config_of(pretrained_model_name_or_path, options)
        return cls._of(config)[0].from_pretrained(pretrained_model_name_or_path, *args, **options)

    @classmethod
    def from_config(cls, config: Config, **options: Any) -> Any:
        """A model with initial parameters; options as those of its class."""
        kind, config = cls._of(config)
        return kind(config, **options)

    @classmethod
    def _of(cls, config: Config) -> tuple[Any, Config]:
        found, family, config = choose(registry.family(config.model_type), config, cls.task)
        return cls.make(family, found), config
