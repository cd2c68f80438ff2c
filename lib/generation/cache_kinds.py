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
    """A kind of cache, with its settings.

    Attributes:
        name: "full", "ring", "sink", "quantised" or "offloaded".
        windows: of a ring, what each layer's attention sees, None for everything; one entry stands for all layers.
        bits: of a quantised one, of every number.
        group: channels that have a step of their own.
        residual: newest positions that are kept as they are.
        window: of one with sinks, how many positions are kept.
        sinks: the first ones among them.
        rope: how the model turns its keys.
    """

    name: str = "full"
    windows: tuple[int | None, ...] = ()
    bits: int = 4
    group: int = 64
    residual: int = 128
    window: int = 0
    sinks: int = 0
    rope: Rope | None = None


FULL = Kind()


def kind_of(config: GenerationConfig, model_config: Config, mode: GenerationMode, cache: Any = None) -> Kind:
    """The kind that settings ask for; a `cache` that is given stays of the kind that it is.

    Raises:
        ConfigError: a `cache_config` with a name that nobody knows or an impossible value, or a way of generating that
            has to go back where the cache cannot.
    """
    kind, name = _asked(config, model_config), f"cache_implementation={config.cache_implementation!r}"
    if cache is not None:
        kind, name = kind_held(cache), "the cache that is given"
    if kind.name in ("ring", "sink") and mode is GenerationMode.ASSISTED:
        window = kind.window or max(filter(None, kind.windows))
        raise ConfigError(
            f"{name} keeps a window of {window} positions and cannot go back over tokens that the assistant got wrong; "
            "leave it out for assisted generation"
        )
    return kind


def _asked(config: GenerationConfig, model_config: Config) -> Kind:
    name = config.cache_implementation or "dynamic"
    if name == "quantized":
        return _quantised(config.cache_config or {})
    if name == "sink":
        return _sink(config.cache_config or {}, model_config)
    if "offloaded" in name:
        return Kind("offloaded")
    if name not in RINGS:
        return FULL
    windows = windows_of(model_config)
    return Kind("ring", windows) if any(windows) else FULL


def _quantised(given: Mapping[str, Any]) -> Kind:
    bits, group, residual = _settings(given, QUANTISED, OTHER)
    if bits not in BITS:
        raise ConfigError(f"cache_config: nbits={bits!r} is none of {', '.join(map(str, BITS))}")
    for name, value, least in (("q_group_size", group, 1), ("residual_length", residual, 0)):
        _check_whole(name, value, least)
    return Kind("quantised", bits=bits, group=group, residual=residual)


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
    return Kind("sink", window=window, sinks=sinks, rope=rope)


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
    own = [one for one in caches_of(tree) if type(one) is KVCache]
    windows = kind.windows * len(own) if len(kind.windows) == 1 else kind.windows
    if kind.name == "ring" and len(windows) != len(own):
        raise ValueError(f"the configuration has windows of {len(windows)} layers, the cache has {len(own)}")
    each = iter(windows)

    def made(one: Cache) -> Cache:
        if type(one) is not KVCache:
            return one
        batch, room, heads, width = one.k.shape
        shape = batch, room, heads, width, one.k.dtype
        if kind.name == "quantised":
            few = {"bits": kind.bits, "group": kind.group, "residual": kind.residual}
            return QuantisedCache.empty(*shape, **few)
        if kind.name == "offloaded":
            return OffloadedCache.empty(*shape)
        if kind.name == "sink":
            assert kind.rope is not None
            return SinkCache.empty(batch, kind.window, kind.sinks, *shape[2:], rope=kind.rope)
        window = next(each) if kind.name == "ring" else None
        return one if window is None else RingCache.empty(*shape, window=window)

    return map_caches(made, tree)


def kind_held(tree: Any) -> Kind:
    """The kind of caches that are given, so that empty ones can be made to compare them with."""
    held = [one for one in caches_of(tree) if not one.recurrent and not isinstance(one, CrossCache)]
    for one in held:
        if isinstance(one, QuantisedCache):
            return Kind("quantised", bits=one.k.bits, group=one.group, residual=one.residual)
        if isinstance(one, OffloadedCache):
            return Kind("offloaded")
        if isinstance(one, SinkCache):
            return Kind("sink", window=one.window, sinks=one.sinks, rope=one.rope)
    if any(isinstance(one, RingCache) for one in held):
        return Kind("ring", tuple(one.window if isinstance(one, RingCache) else None for one in held))
    return FULL
