"""Which kind of cache a text is generated with: `cache_implementation` and `cache_config` of the settings.

A family makes full caches (`Model.init_cache`); what is asked for takes their place, so no family knows of kinds.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formax.core.config import Config, ConfigError
from formax.generation.config import GenerationConfig, GenerationMode
from formax.layers.attention.cache import Cache, CrossCache, KVCache, caches_of, map_caches
from formax.layers.attention.offloaded import OffloadedCache
from formax.layers.attention.quantised import BITS, QuantisedCache
from formax.layers.attention.ring import RingCache
from formax.layers.attention.sink import SinkCache
from formax.layers.rope import Rope

RINGS = ("sliding_window", "hybrid", "hybrid_chunked")
# Of the reference's `cache_config`: what is done here, and what chooses between libraries or layouts of its own.
QUANTISED = {"nbits": 4, "q_group_size": 64, "residual_length": 128}
SINK = {"window_length": 256, "num_sink_tokens": 4}  # as the reference's class was used; it had no defaults
OTHER = ("backend", "axis_key", "axis_value", "compute_dtype", "device")


@dataclass(frozen=True)
class Kind:
    """A kind of cache: full ones, which families make. Each other kind says what takes the place of a full one."""

    def made(self, one: KVCache, layer: int) -> Cache:
        """An empty cache of this kind in the place of an empty full one, of a layer."""
        return one

    @property
    def window(self) -> int | None:
        """Positions that are kept, where older ones are lost."""
        return None


@dataclass(frozen=True)
class Rings(Kind):
    """Of windows: what each layer's attention sees, None for everything; one entry stands for all layers."""

    windows: tuple[int | None, ...]

    def made(self, one: KVCache, layer: int) -> Cache:
        window = self.windows[layer if len(self.windows) > 1 else 0]
        return one if window is None else RingCache.empty(*_shape(one), window=window)

    @property
    def window(self) -> int | None:
        return max(filter(None, self.windows))


@dataclass(frozen=True)
class Sinks(Kind):
    """Of the first positions and a window: how many are kept, the first among them, and how the model turns keys."""

    kept: int
    sinks: int
    rope: Rope

    def made(self, one: KVCache, layer: int) -> Cache:
        batch, _, *shape = _shape(one)
        return SinkCache.empty(batch, self.kept, self.sinks, *shape, rope=self.rope)

    @property
    def window(self) -> int | None:
        return self.kept


@dataclass(frozen=True)
class FewBits(Kind):
    """Of few bits a number: those, channels that have a step of their own, and newest positions kept as they are."""

    bits: int
    group: int
    residual: int

    def made(self, one: KVCache, layer: int) -> Cache:
        return QuantisedCache.empty(*_shape(one), bits=self.bits, group=self.group, residual=self.residual)


@dataclass(frozen=True)
class OnHost(Kind):
    """In the host's memory."""

    def made(self, one: KVCache, layer: int) -> Cache:
        return OffloadedCache.empty(*_shape(one))


FULL = Kind()


def _shape(one: KVCache) -> tuple[Any, ...]:
    """Rows, positions, heads, channels and dtype."""
    return (*one.k.shape, one.k.dtype)


def kind_of(config: GenerationConfig, model_config: Config, mode: GenerationMode, cache: Any = None) -> Kind:
    """The kind that settings ask for; a `cache` that is given stays of the kind that it is.

    Raises:
        ConfigError: a `cache_config` with a name that nobody knows or an impossible value, or a way of generating that
            has to go back where the cache cannot.
    """
    kind, name = _asked(config, model_config), f"cache_implementation={config.cache_implementation!r}"
    if cache is not None:
        kind, name = kind_held(cache), "the cache that is given"
    if kind.window is not None and mode is GenerationMode.ASSISTED:
        raise ConfigError(
            f"{name} keeps a window of {kind.window} positions and cannot go back over tokens that the assistant got "
            "wrong; leave it out for assisted generation"
        )
    return kind


def _asked(config: GenerationConfig, model_config: Config) -> Kind:
    name = config.cache_implementation or "dynamic"
    if name == "quantized":
        return _quantised(config.cache_config or {})
    if name == "sink":
        return _sink(config.cache_config or {}, model_config)
    if "offloaded" in name:
        return OnHost()
    if name not in RINGS:
        return FULL
    windows = windows_of(model_config)
    return Rings(windows) if any(windows) else FULL


def _quantised(given: Mapping[str, Any]) -> Kind:
    bits, group, residual = _settings(given, QUANTISED, OTHER)
    if bits not in BITS:
        raise ConfigError(f"cache_config: nbits={bits!r} is none of {', '.join(map(str, BITS))}")
    for name, value, least in (("q_group_size", group, 1), ("residual_length", residual, 0)):
        _check_whole(name, value, least)
    return FewBits(bits, group, residual)


def _sink(given: Mapping[str, Any], c: Config) -> Kind:
    window, sinks = _settings(given, SINK)
    _check_whole("num_sink_tokens", sinks, 0)
    _check_whole("window_length", window, sinks + 1)
    rope = getattr(c, "rope", None)
    if rope is None or any(windows_of(c)) or rope.parameters.get("rope_type") == "dynamic":
        raise ConfigError(
            f"cache_implementation='sink' turns keys on as the text moves away from them: that is for models with "
            f"rotary positions, without windows of their own or dynamic scaling, and not for this {c.model_type}"
        )
    return Sinks(window, sinks, rope)


def _settings(given: Mapping[str, Any], defaults: Mapping[str, Any], others: tuple[str, ...] = ()) -> list[Any]:
    """The values of `cache_config` for these names."""
    known = (*defaults, *others)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"cache_config has no {name!r}{f'; did you mean {near[0]}?' if near else ''}")
    return [given.get(name, default) for name, default in defaults.items()]


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"cache_config: {name}={value!r} must be a whole number, {least} or more")


def windows_of(c: Config) -> tuple[int | None, ...]:
    """How many positions each layer's attention sees, None for all of them; one entry where all layers are alike."""
    window = getattr(c, "sliding_window", None)
    if not window or getattr(c, "use_sliding_window", True) is False:
        return (None,)
    types = getattr(c, "layer_types", None)
    return (window,) if types is None else tuple(window if one == "sliding_attention" else None for one in types)


def as_kind(tree: Any, kind: Kind) -> Any:
    """A model's empty caches, those of positions that are written replaced by ones of this kind.

    Raises:
        ValueError: windows for another number of layers.
    """
    count = sum(type(one) is KVCache for one in caches_of(tree))
    if isinstance(kind, Rings) and len(kind.windows) not in (1, count):
        raise ValueError(f"the configuration has windows of {len(kind.windows)} layers, the cache has {count}")
    layers = iter(range(count))
    return map_caches(lambda one: kind.made(one, next(layers)) if type(one) is KVCache else one, tree)


def kind_held(tree: Any) -> Kind:
    """The kind of caches that are given, so that empty ones can be made to compare them with."""
    held = [one for one in caches_of(tree) if not one.recurrent and not isinstance(one, CrossCache)]
    for one in held:
        if isinstance(one, QuantisedCache):
            return FewBits(one.k.bits, one.group, one.residual)
        if isinstance(one, OffloadedCache):
            return OnHost()
        if isinstance(one, SinkCache):
            return Sinks(one.window, one.sinks, one.rope)
    if any(isinstance(one, RingCache) for one in held):
        return Rings(tuple(one.window if isinstance(one, RingCache) else None for one in held))
    return FULL
