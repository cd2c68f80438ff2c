"""Configurations: frozen, hashable dataclasses with the names and defaults of `config.json`.

A family subclasses `Config`, adds its fields, and may set

- `attribute_map`: names of other frameworks or relatives for its fields ({"n_embd": "hidden_size"});
- `sub_configs`: fields that are configurations themselves, as {field: class};
- `implemented`: switches the reference knows, with the values we have ({"position_embedding_type": ("absolute",)}).

What a `config.json` holds beyond the fields is kept in `extra` and written back; a key that neither we nor the
reference know is reported once. Values that cannot be right (a negative size, text for a number) raise `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import numpy as np

from formax.core.frozen import FrozenDict, freeze, thaw

T = TypeVar("T")

log = logging.getLogger("formax")

# Keys of the reference that change nothing we compute: kept and written back without a word.
INERT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_name_or_path",
        "_num_labels",
        "attention_implementation",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "classif_dropout",
        "cross_attention_hidden_size",
        "custom_pipelines",
        "dense_act_fn",
        "directionality",
        "diversity_penalty",
        "do_sample",
        "dropout",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "force_bos_token_to_be_generated",
        "forced_bos_token_id",
        "forced_decoder_ids",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "is_composition",
        "is_gated_act",
        "length_penalty",
        "max_length",
        "min_length",
        "model_max_length",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_hidden_layers",
        "num_return_sequences",
        "output_past",
        "output_scores",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
        "prefix",
        "quantization_config",
        "remove_invalid_values",
        "repetition_penalty",
        "replacing_rate",
        "return_dict",
        "return_dict_in_generate",
        "student_decoder_layers",
        "student_encoder_layers",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_return_dict",
    }
)

# Keys for which null means "not given".
NEVER_NULL = frozenset({"id2label", "label2id", "num_labels", "pruned_heads"})
ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# A dimension beyond this is a damaged or hostile file, not a model: no array of that size can be indexed in 32 bits.
MAX_DIMENSION = 2**31 - 1
MAX_LAYERS = 1_000
MAX_LABELS = 1_000_000


class ConfigError(ValueError):
    """A configuration that cannot be right; the message names the key."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields that every family shares, with the reference's defaults."""

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[Mapping[str, str]] = {}
    sub_configs: ClassVar[Mapping[str, type[Config]]] = {}
    implemented: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    architectures: tuple[str, ...] | None = None
    dtype: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    pruned_heads: FrozenDict = field(default_factory=FrozenDict)
    tie_word_embeddings: bool = True
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: bool = False
    is_decoder: bool = False
    add_cross_attention: bool = False
    id2label: FrozenDict = field(default_factory=lambda: _label_map(2))
    label2id: FrozenDict = field(default_factory=FrozenDict)  # empty means: the inverse of id2label
    problem_type: str | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    sep_token_id: int | None = None
    decoder_start_token_id: int | None = None
    extra: FrozenDict = field(default_factory=FrozenDict, repr=False)

    # --- reading

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config", **overrides: Any) -> Self:
        """Reads the content of a config.json.

        Args:
            values: the JSON object.
            source: where it came from, for error messages.
            **overrides: fields (or names of `attribute_map`, or `num_labels`) that replace what the file says.

        Raises:
            ConfigError: an impossible value, or a switch whose value is not implemented.
        """
        with _told(source):
            rope = {"rope_parameters": cls().rope_parameters} if _has_rope(cls) else {}
            merged = cls._named(overrides, cls._named(values, rope))
        named_type = merged.pop("model_type", cls.model_type)
        fields = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {key: value for key, value in merged.items() if key in fields}
        extra = {key: value for key, value in merged.items() if key not in fields}
        for key, sub_config in cls.sub_configs.items():
            if isinstance(known.get(key), Mapping):
                known[key] = sub_config.from_dict(known[key], source=f"{source}: {key}")
        if named_type != cls.model_type:
            extra["model_type"] = named_type
        silent = {"model_type", *INERT, *cls.implemented}
        unknown = sorted(key for key in extra if key not in silent and not key.startswith("_"))
        if unknown:
            _report_unknown(cls.__name__, source, tuple(unknown))
        with _told(source):
            return cls(**known, extra=FrozenDict(extra))

    @classmethod
    def _named(cls, values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """`before` with `values` in the place of its own, under our field names.

        Aliases, and old and new spellings of the reference, are understood. What speaks of a part leaves the rest as it
        was: `num_labels` keeps the labels when their number stays, `rope_theta` keeps the scaling, a dict for a
        configuration inside this one keeps the fields that it does not name.
        """
        new = {cls.attribute_map.get(key, key): value for key, value in values.items()}
        old_spelling = new.pop("torch_dtype", None)
        dtype = old_spelling if new.get("dtype") is None else new["dtype"]
        if dtype is not None:
            new["dtype"] = _dtype_name(dtype)
        new = {key: value for key, value in new.items() if value is not None or key not in NEVER_NULL}
        count = new.pop("num_labels", None)
        if count is not None:
            labels = new.get("id2label", before.get("id2label"))
            if labels is None or (isinstance(labels, Mapping) and len(labels) != count):
                new = {**new, "id2label": _label_map(count), "label2id": FrozenDict()}
        if "id2label" in new:
            new.setdefault("label2id", FrozenDict())
        for key in cls.sub_configs:
            inner = before.get(key)
            inner = inner.to_dict() if isinstance(inner, Config) else inner
            if isinstance(inner, Mapping) and isinstance(new.get(key), Mapping):
                new[key] = {**inner, **new[key]}
        if _has_rope(cls):
            new = rope_parameters(new, before.get("rope_parameters"))
        return {**before, **new}

    # --- checks

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = _type_hints(kind)
        for key in ("id2label", "pruned_heads"):
            object.__setattr__(self, key, _numbered(key, getattr(self, key)))
        if not self.label2id:
            object.__setattr__(self, "label2id", _inverse(self.id2label))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            object.__setattr__(self, f.name, value := freeze(value))
            if not _fits(value, hints[f.name]):
                raise ConfigError(f"{f.name} must be {_spell(hints[f.name])}, got {value!r}")
            _check_size(f.name, value)
        for key, values in self.implemented.items():
            value = getattr(self, key, self.extra.get(key, values[0]))
            if value not in values:
                options = ", ".join(map(repr, values))
                raise ConfigError(f"{key}={value!r} is a switch that formax does not implement; it has {options}")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(f"problem_type={self.problem_type!r} is none of {', '.join(PROBLEM_TYPES)}")
        _check_pruned(self.pruned_heads, getattr(self, "num_attention_heads", None))
        self.check()

    def check(self) -> None:
        """What a family demands of its fields together; raises `ConfigError`."""

    @property
    def num_labels(self) -> int:
        """Number of classes of a classification head."""
        return len(self.id2label)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are no field: aliases first, then what the file held beyond the fields.
        mapped = type(self).attribute_map.get(name)
        if mapped is not None:
            return getattr(self, mapped)
        extra = self.__dict__.get("extra")
        if extra is not None and name in extra:
            return extra[name]
        raise _NoFieldError(self, name)

    def __hash__(self) -> int:
        # A configuration is hashed at every call of a model, and never changes.
        cached = self.__dict__.get("_hash")
        if cached is None:
            cached = hash(tuple(getattr(self, f.name) for f in dataclasses.fields(self)))
            object.__setattr__(self, "_hash", cached)
        return cached

    def __getstate__(self) -> dict[str, Any]:
        # Text hashes differently in every process: the cached hash must not travel.
        return {key: value for key, value in self.__dict__.items() if key != "_hash"}

    # --- writing

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, by field name, alias or `num_labels`; a name nobody knows is an error."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        named = self._named(changes, fields)
        for key in named:
            if key not in fields:
                raise ConfigError(f"{type(self).__name__} has no field {key!r}{_nearest(key, fields)}")
        for key, sub_config in self.sub_configs.items():
            if isinstance(named[key], Mapping):
                named[key] = sub_config.from_dict(named[key], source=key)
        return type(self)(**named)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json: the family's own fields, the shared ones that differ, and `extra`."""
        shared = {f.name for f in dataclasses.fields(Config)}
        default = type(self)()
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "extra" or (
                f.name in shared and value == getattr(default, f.name) and f.name not in _own(type(self))
            ):
                continue
            out[f.name] = value.to_dict() if isinstance(value, Config) else thaw(value)
        out["model_type"] = self.model_type
        out |= thaw(self.extra)
        if out.get("rope_parameters") is not None:
            out |= v4_rope(out.pop("rope_parameters"))
        return dict(sorted(out.items()))


# Dataclass decorators of subclasses would put a field-by-field hash in the place of the cached one.
@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Class decorator of a family's configuration: a frozen, keyword-only dataclass with `Config`'s cached hash.

    Of several bases the first one's defaults hold, also those of fields that it has only from `Config`.
    """
    made = dataclass(frozen=True, kw_only=True)(cls)
    type.__setattr__(made, "__hash__", Config.__hash__)
    return made


def check_multiple(c: Config, whole: str, part: str) -> None:
    """Raises ConfigError unless the field `part` divides the field `whole`, as heads do the width of the states."""
    a, b = getattr(c, whole), getattr(c, part)
    if b < 1 or a % b:
        raise ConfigError(f"{whole}={a} is no multiple of {part}={b}")


def rope_parameters(values: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Rotary settings in one form: `rope_parameters` with `rope_type` and `rope_theta`, whatever the file's age.

    Version 4 of the reference wrote `rope_theta` beside `rope_scaling` (whose kind was called `type` before
    `rope_type`); version 5 writes `rope_parameters`, or one such object for each kind of layer.

    Args:
        values: settings, rotary ones among them.
        before: the `rope_parameters` that they change; what they leave unsaid stays as it was there.

    Raises:
        ConfigError: a setting that is no object, or one for all layers where `before` has one for each kind of layer.
    """
    out = {key: value for key, value in values.items() if key not in ROPE_KEYS}
    new, theta, scaling = (values.get(key) for key in ROPE_KEYS)
    for key, value in (("rope_parameters", new), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping | None):
            raise ConfigError(f"{key} must be an object, got {value!r}")
    old = dict(before or {})
    if new is not None and _by_layer_type(new):
        return {**out, "rope_parameters": new}
    if new is None:
        resets = "rope_scaling" in values and bool(old) and not _by_layer_type(old)
        if theta is None and scaling is None and not resets:
            return out
        if _by_layer_type(old):
            key = "rope_scaling" if theta is None else "rope_theta"
            raise ConfigError(f"{key} is for all layers; give rope_parameters, one object for each kind of layer")
        new = scaling or {} if "rope_scaling" in values else {k: v for k, v in old.items() if k != "rope_theta"}
    merged = dict(new)
    kind = merged.pop("type", None)
    merged.setdefault("rope_type", kind or "default")
    merged.setdefault("rope_theta", old.get("rope_theta") if theta is None else theta)
    return {**out, "rope_parameters": {key: value for key, value in merged.items() if value is not None}}


def _by_layer_type(parameters: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in parameters.values())


def _has_rope(cls: type[Config]) -> bool:
    return "rope_parameters" in cls.__dataclass_fields__


def v4_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as version 4 writes it, which version 5 reads as well."""
    if _by_layer_type(parameters):
        return {"rope_parameters": dict(parameters)}
    rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
    out: dict[str, Any] = {"rope_scaling": None if rest == {"rope_type": "default"} else rest}
    if "rope_theta" in parameters:
        out["rope_theta"] = parameters["rope_theta"]
    return out


def _label_map(count: Any) -> FrozenDict:
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_LABELS:
        raise ConfigError(f"num_labels must be a number of classes, got {count!r}")
    return FrozenDict({i: f"LABEL_{i}" for i in range(count)})


def _inverse(labels: Mapping[Any, str]) -> FrozenDict:
    return FrozenDict({label: int(i) for i, label in labels.items()})


def _own(cls: type[Config]) -> set[str]:
    """Shared fields that a family declares again (with another default): always written, as the reference does."""
    shared = Config.__dataclass_fields__
    return {name for name, f in cls.__dataclass_fields__.items() if f is not shared.get(name)}


def _numbered(name: str, value: Any) -> FrozenDict:
    """A mapping from numbers, whose keys JSON made text."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object with numbers as keys, got {value!r}")
    for key in value:
        if not isinstance(key, int) and not str(key).isdecimal():
            raise ConfigError(f"{name} must have numbers as keys, got {key!r}")
    return FrozenDict({int(key): item for key, item in value.items()})


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype given as text, or as an object of NumPy, JAX or PyTorch."""
    name = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str) or name != str(dtype):
        return name
    try:
        return np.dtype(dtype).name
    except TypeError:
        raise ConfigError(f"dtype must be the name of a dtype, got {dtype!r}") from None


def _check_pruned(pruned: Mapping[int, Any], total: Any) -> None:
    for layer, heads in pruned.items():
        fit = isinstance(heads, tuple) and all(_fits(head, int) and head >= 0 for head in heads)
        if not fit or len(set(heads)) != len(heads):
            raise ConfigError(f"pruned_heads must have different head numbers for layer {layer}, got {heads!r}")
        if isinstance(total, int) and heads and (max(heads) >= total or len(heads) >= total):
            raise ConfigError(f"pruned_heads has {heads} for layer {layer}, which has {total} heads and must keep one")


@contextmanager
def _told(source: str) -> Iterator[None]:
    """Errors of what is inside say where the values came from."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


class _NoFieldError(AttributeError):
    """Says which fields are near once it is asked: of most nobody hears (`getattr` with a default)."""

    def __init__(self, config: Config, field: str) -> None:
        super().__init__(name=field, obj=config)
        self._cls, self._field = type(config), field

    def __str__(self) -> str:
        return (
            f"{self._cls.__name__} has no field {self._field!r}{_nearest(self._field, self._cls.__dataclass_fields__)}"
        )


def _nearest(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; the nearest are {', '.join(near)}" if near else ""


@lru_cache(maxsize=256)
def _report_unknown(cls: str, source: str, names: tuple[str, ...]) -> None:
    log.warning("%s: %s does not know %s; kept as given and written back", source, cls, ", ".join(names))


@lru_cache(maxsize=1024)
def _type_hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("formax.core.frozen.", "")


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        return
    if abs(value) > MAX_DIMENSION:
        raise ConfigError(f"{name}={value} is larger than any array can be ({MAX_DIMENSION})")
    if name.startswith("num_") or name.endswith(("_size", "_dim", "_heads", "_layers")):
        limit = MAX_LAYERS if name.endswith("_layers") else MAX_DIMENSION
        if not 0 <= value <= limit:
            raise ConfigError(f"{name}={value} is out of range, 0 to {limit}")
