"""What `generate` is told: the settings of generation_config.json, with the reference's names and defaults.

`GenerationConfig` is frozen and hashable, so that it can be a static argument of `jax.jit`. What a file holds beyond
the known settings (Whisper's token ids, say) is kept in `extra`, is readable as an attribute, and is written back.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import logging
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from formax import hub
from formax.core.config import Config, ConfigError
from formax.core.frozen import FrozenDict, freeze, thaw
from formax.text.files import parse_json

log = logging.getLogger("formax")

FILE = "generation_config.json"
# The release whose form is written; it stands in every file.
VERSION = "4.57.6"

CACHES = (
    "static",
    "offloaded_static",
    "sliding_window",
    "hybrid",
    "hybrid_chunked",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
    "dynamic",
    "dynamic_full",
    "offloaded",
    "quantized",
    "sink",
)
OUTPUT_FLAGS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
# What belongs to the call of `generate` and not into its settings.
ARGUMENTS = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "use_model_defaults",
)
# Settings that only sampling reads, and those that only beams read, with the value that says nothing.
_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "top_k": 50,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_DECODERS = ("decoder", "generator", "text_config")


class GenerationMode(enum.StrEnum):
    """The ways of generating; the values are the reference's names."""

    GREEDY = "greedy_search"
    SAMPLE = "sample"
    CONTRASTIVE = "contrastive_search"
    ASSISTED = "assisted_generation"
    DOLA = "dola_generation"
    BEAM = "beam_search"
    BEAM_SAMPLE = "beam_sample"
    CONSTRAINED_BEAM = "constrained_beam_search"
    GROUP_BEAM = "group_beam_search"


@dataclass(frozen=True, kw_only=True)
class WatermarkingConfig:
    """Settings of the green-list watermark (Kirchenbauer et al. 2023, https://arxiv.org/abs/2301.10226).

    Attributes:
        greenlist_ratio: the share of the vocabulary that is green at every step, in [0, 1].
        bias: what is added to the scores of green tokens.
        hashing_key: a secret, between 1 and 2^32 - 1.
        seeding_scheme: "lefthash" (the last token decides) or "selfhash" (the next one takes part).
        context_width: how many tokens "selfhash" looks at.
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def check(self) -> None:
        """Raises ConfigError for values that make no watermark."""
        if self.seeding_scheme not in ("lefthash", "selfhash"):
            raise ConfigError(f"seeding_scheme must be 'lefthash' or 'selfhash', got {self.seeding_scheme!r}")
        if not 0.0 <= self.greenlist_ratio <= 1.0:
            raise ConfigError(f"greenlist_ratio must be between 0 and 1, got {self.greenlist_ratio!r}")
        if self.context_width < 1:
            raise ConfigError(f"context_width must be 1 or more tokens, got {self.context_width!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class SynthIDTextWatermarkingConfig:
    """Settings of the SynthID watermark (Dathathri et al. 2024, https://www.nature.com/articles/s41586-024-08025-4).

    Attributes:
        ngram_len: how many tokens, the next one included, make the key of a step.
        keys: the secret, one number for each layer of the tournament.
        context_history_size: how many contexts are remembered; a repeated one is left alone.
        sampling_table_seed: seed of the table of coin flips.
        sampling_table_size: its length, at most 2^24.
        skip_first_ngram_calls: leave the first steps alone, until `ngram_len` tokens are there.
        debug_mode: take all scores for equal, to see the watermark alone.
    """

    ngram_len: int
    keys: tuple[int, ...]
    context_history_size: int = 1024
    sampling_table_seed: int = 0
    sampling_table_size: int = 2**16
    skip_first_ngram_calls: bool = False
    debug_mode: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(self.keys))

    def check(self) -> None:
        """Raises ConfigError for values that make no watermark."""
        if self.sampling_table_size > 2**24:
            raise ConfigError(f"sampling_table_size must be at most 2^24, got {self.sampling_table_size!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {**dataclasses.asdict(self), "keys": list(self.keys)}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The settings of `generate`, with the names and defaults of transformers 4.57.6.

    Values that can never be right raise `ConfigError` when the object is made. Settings that have no effect together
    are told by `check`, which `generate` and `save_pretrained` call.
    """

    # How long.
    max_length: int | None = 20
    max_new_tokens: int | None = None
    min_length: int | None = 0
    min_new_tokens: int | None = None
    early_stopping: bool | str = False
    max_time: float | None = None
    stop_strings: str | Sequence[str] | None = None

    # Which way.
    do_sample: bool = False
    num_beams: int = 1

    # The cache.
    use_cache: bool | None = True
    cache_implementation: str | None = None
    cache_config: Mapping[str, Any] | None = None
    return_legacy_cache: bool | None = None
    prefill_chunk_size: int | None = None

    # What is done to the scores.
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    epsilon_cutoff: float | None = 0.0
    eta_cutoff: float | None = 0.0
    repetition_penalty: float | None = 1.0
    encoder_repetition_penalty: float | None = 1.0
    length_penalty: float | None = 1.0
    no_repeat_ngram_size: int | None = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    renormalize_logits: bool | None = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    remove_invalid_values: bool | None = False
    exponential_decay_length_penalty: Sequence[float] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    sequence_bias: Mapping[Any, float] | Sequence[Any] | None = None
    token_healing: bool = False
    guidance_scale: float | None = None
    watermarking_config: WatermarkingConfig | SynthIDTextWatermarkingConfig | None = None

    # What comes back.
    num_return_sequences: int = 1
    output_attentions: bool | None = False
    output_hidden_states: bool | None = False
    output_scores: bool | None = False
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = False

    # Special tokens.
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None

    # Encoder-decoders.
    encoder_no_repeat_ngram_size: int | None = 0
    decoder_start_token_id: int | Sequence[int] | None = None

    # Assisted generation.
    is_assistant: bool = False
    num_assistant_tokens: int | None = 20
    num_assistant_tokens_schedule: str | None = "constant"
    assistant_confidence_threshold: float | None = 0.4
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    assistant_early_exit: int | None = None
    assistant_lookbehind: int | None = 10
    target_lookbehind: int | None = 10

    # torch.compile's, in the reference.
    compile_config: Any = None
    disable_compile: bool | None = False

    # Ways that the reference has moved elsewhere.
    low_memory: bool | None = None
    penalty_alpha: float | None = None
    dola_layers: str | Sequence[int] | None = None
    diversity_penalty: float | None = 0.0
    num_beam_groups: int = 1
    constraints: Sequence[Any] | None = None
    force_words_ids: Sequence[Any] | None = None

    _from_model_config: bool = False
    extra: Mapping[str, Any] = field(default_factory=FrozenDict, repr=False)

    # --- reading

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        config_file_name: str = FILE,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Reads the settings of a checkpoint.

        Args:
            path_or_repo: a folder, or a repository of the hub.
            config_file_name: the file in it.
            revision: branch, tag or commit.
            cache_dir: the hub's cache.
            local_files_only: use the cache alone.
            token: access token for private repositories.
            **overrides: settings that replace the file's.

        Raises:
            HubError: the folder or repository cannot be had.
            FileNotFoundError: it has no such file.
            ConfigError: an impossible setting.
        """
        folder = hub.snapshot(
            path_or_repo,
            (config_file_name,),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        path = folder / config_file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path_or_repo} has no {config_file_name}; older checkpoints keep these settings in config.json: "
                "GenerationConfig.from_model_config(AutoConfig.from_pretrained(...))"
            )
        return cls.from_dict(parse_json(path.read_bytes(), path), source=str(path), **overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = FILE, **overrides: Any) -> Self:
        """Reads the content of a generation_config.json.

        Args:
            values: the JSON object. Keys that are no settings are kept in `extra`.
            source: where it came from, for error messages.
            **overrides: settings that replace what the file says.

        Raises:
            ConfigError: an impossible setting, or something that belongs to the call of `generate`.
        """
        merged = {**values, **overrides}
        # Written anew each time; the commit is of the download and not of the settings.
        for key in ("transformers_version", "_commit_hash", "_original_object_hash"):
            merged.pop(key, None)
        settings = _settings()
        known = {key: value for key, value in merged.items() if key in settings}
        extra = {key: value for key, value in merged.items() if key not in settings}
        try:
            return cls(**known, extra=FrozenDict(extra))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_model_config(cls, config: Config | Mapping[str, Any]) -> Self:
        """The settings that an old config.json holds beside the model's shape.

        Where the model is made of several parts, what its decoder says holds for settings that the whole leaves at
        their defaults.

        Args:
            config: a model's configuration, or the content of its config.json.

        Raises:
            ConfigError: an impossible setting.
        """
        values = config.to_dict() if isinstance(config, Config) else dict(config)
        settings = _settings()
        known = {key: value for key, value in values.items() if key in settings and value is not None}
        made = cls(**{**known, "_from_model_config": True})
        decoders = [values[key] for key in _DECODERS if isinstance(values.get(key), Mapping)]
        if len(decoders) > 1:
            raise ConfigError(f"more than one of {', '.join(_DECODERS)} is there: which one generates is not said")
        default = cls()
        changes = {
            key: value
            for decoder in decoders
            for key, value in decoder.items()
            if key in settings and getattr(made, key) == getattr(default, key)
        }
        asked = {**{key: getattr(made, key) for key in OUTPUT_FLAGS}, **changes}
        if not made.return_dict_in_generate and any(asked[key] for key in OUTPUT_FLAGS):
            changes["return_dict_in_generate"] = True
        return made.replace(**changes)

    # --- checks

    def __post_init__(self) -> None:
        hints = _type_hints()
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "watermarking_config":
                value = _watermarking(value)
            object.__setattr__(self, f.name, value := freeze(value))
            if not _fits(value, hints[f.name]):
                raise ConfigError(f"{f.name} must be {_spell(hints[f.name])}, got {value!r}")
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")
        if self.max_new_tokens is not None and self.max_new_tokens <= 0:
            raise ConfigError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.cache_implementation is not None and self.cache_implementation not in CACHES:
            raise ConfigError(
                f"cache_implementation={self.cache_implementation!r} is none of {', '.join(sorted(CACHES))}"
            )
        if self.compile_config is not None:
            raise ConfigError(
                "compile_config is for torch.compile; here every loop is compiled, so leave it out "
                f"(got {self.compile_config!r})"
            )
        if self.watermarking_config is not None:
            self.watermarking_config.check()
        if self.num_return_sequences != 1:
            if self.num_beams == 1 and self.do_sample is False:
                raise ConfigError(
                    f"num_return_sequences={self.num_return_sequences} needs do_sample=True or num_beams > 1: "
                    "greedy search has one result"
                )
            if 1 != self.num_beams < self.num_return_sequences:
                raise ConfigError(
                    f"num_return_sequences={self.num_return_sequences} is more than the num_beams={self.num_beams} "
                    "that there are"
                )
        for name in ARGUMENTS:
            if name in self.extra:
                raise ConfigError(f"{name} is an argument of generate(), not a setting: pass it there")

    def issues(self) -> dict[str, str]:
        """Settings that contradict others and so have no effect: setting -> one sentence that says why."""
        found: dict[str, str] = {}
        if self.pad_token_id is not None and self.pad_token_id < 0:
            found["pad_token_id"] = f"pad_token_id={self.pad_token_id} is no token; padding needs one, 0 or more"
        if self.do_sample is False:
            for name, silent in _SAMPLING.items():
                value = getattr(self, name)
                if value is not None and value != silent:
                    found[name] = f"{name}={value!r} has an effect only with do_sample=True, which is False"
        if self.num_beams == 1:
            if self.early_stopping is not False:
                found["early_stopping"] = (
                    f"early_stopping={self.early_stopping!r} has an effect only with num_beams > 1, which is 1"
                )
            if self.length_penalty is not None and self.length_penalty != 1.0:
                found["length_penalty"] = (
                    f"length_penalty={self.length_penalty!r} has an effect only with num_beams > 1, which is 1"
                )
        if self.use_cache is False:
            for name in ("cache_implementation", "cache_config", "return_legacy_cache"):
                if getattr(self, name) is not None:
                    found[name] = (
                        f"{name}={thaw(getattr(self, name))!r} has no effect without a cache (use_cache=False)"
                    )
        if self.return_dict_in_generate is not True:
            for name in OUTPUT_FLAGS:
                if getattr(self, name) is True:
                    found[name] = f"{name}=True has an effect only with return_dict_in_generate=True"
        return found

    def check(self, *, strict: bool = False) -> None:
        """Tells of settings that have no effect beside the others.

        Args:
            strict: raise instead of warning, as `save_pretrained` does.

        Raises:
            ConfigError: there are such settings, and `strict` is set; the message has one sentence for each.
        """
        found = self.issues()
        if not found:
            return
        if strict:
            raise ConfigError("; ".join(found.values()))
        for sentence in found.values():
            log.warning("%s", sentence)

    def mode(self, *, assistant: bool = False) -> GenerationMode:
        """The way of generating that follows from the settings.

        Args:
            assistant: whether a second model proposes tokens.
        """
        if self.constraints is not None or self.force_words_ids is not None:
            base = GenerationMode.CONSTRAINED_BEAM
        elif self.num_beams != 1:
            if self.num_beam_groups > 1:
                base = GenerationMode.GROUP_BEAM
            else:
                base = GenerationMode.BEAM_SAMPLE if self.do_sample else GenerationMode.BEAM
        elif self.do_sample:
            base = GenerationMode.SAMPLE
        elif (self.top_k or 0) > 1 and (self.penalty_alpha or 0) > 0:
            base = GenerationMode.CONTRASTIVE
        else:
            base = GenerationMode.GREEDY
        extended = base
        assisted = assistant or self.prompt_lookup_num_tokens is not None or self.assistant_early_exit is not None
        for asked, name, way in (
            (assisted, "an assistant", GenerationMode.ASSISTED),
            (self.dola_layers is not None, "dola_layers", GenerationMode.DOLA),
        ):
            if asked and extended in (GenerationMode.GREEDY, GenerationMode.SAMPLE):
                extended = way
            elif asked:
                log.warning("%s works with greedy search and sampling alone, not with %s", name, extended.value)
        return extended

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: none, one, or several."""
        return _ids(self.eos_token_id)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are no field.
        extra = self.__dict__.get("extra")
        if extra is not None and name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no setting {name!r}{_nearest(name, _settings())}")

    # --- writing

    def replace(self, **overrides: Any) -> Self:
        """A copy with other settings; a name nobody knows is an error, unless it is one of `extra`.

        Raises:
            ConfigError: an unknown or impossible setting.
        """
        settings = _settings()
        extra = dict(self.extra)
        for key in [key for key in overrides if key not in settings]:
            if key in ARGUMENTS:
                raise ConfigError(f"{key} is an argument of generate(), not a setting: pass it there")
            if key not in extra:
                raise ConfigError(f"there is no setting {key!r}{_nearest(key, settings)}")
            extra[key] = overrides.pop(key)
        return dataclasses.replace(self, **overrides, extra=FrozenDict(extra))

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON has them, those at their defaults too, and `extra`."""
        out = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name not in ("extra", "compile_config"):
                out[f.name] = value.to_dict() if hasattr(value, "to_dict") else thaw(value)
        return dict(sorted({**out, **thaw(self.extra), "transformers_version": VERSION}.items()))

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of a generation_config.json: what differs from the defaults, `extra`, and the version."""
        default = type(self)().to_dict()
        return {
            key: value
            for key, value in self.to_dict().items()
            if key not in default or key == "transformers_version" or value != default[key]
        }

    def to_json_string(self) -> str:
        """The text of a generation_config.json."""
        return json.dumps(self.to_diff_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path, config_file_name: str = FILE) -> str:
        """Writes the file that transformers would write, and returns its path.

        Raises:
            ConfigError: settings without effect are not saved; the message says which.
            CheckpointError: the file cannot be written; then nothing in the folder was changed.
        """
        from formax.conversion.atomic import Staging

        self.check(strict=True)
        content = self.to_json_string()
        with Staging(Path(save_directory)) as staging:
            with staging.open(config_file_name) as write:
                write(content.encode())
            staging.commit([("place", config_file_name)])
        return str(Path(save_directory) / config_file_name)


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _watermarking(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kind = SynthIDTextWatermarkingConfig if {"ngram_len", "keys"} & set(value) else WatermarkingConfig
    names = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in names:
            raise ConfigError(f"watermarking_config has no setting {key!r}{_nearest(key, names)}")
    for name, f in names.items():
        if f.default is dataclasses.MISSING and name not in value:
            raise ConfigError(f"watermarking_config needs {name!r}")
    return kind(**thaw(value))


@lru_cache
def _settings() -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(GenerationConfig)) - {"extra"}


@lru_cache
def _type_hints() -> dict[str, Any]:
    return typing.get_type_hints(GenerationConfig)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is Sequence:
        # Values are frozen before they are looked at.
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(one, item) for one in value)
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind is float or float(value).is_integer())
    return isinstance(value, kind)


def _spell(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_spell(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Sequence:
        return f"a list of {_spell(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(hint) is Mapping:
        return "an object"
    return "null" if hint is type(None) else names.get(hint, getattr(hint, "__name__", "anything"))


def _nearest(name: str, options: Any) -> str:
    near = difflib.get_close_matches(name, sorted(options), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
