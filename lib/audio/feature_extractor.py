"""Feature extractors: from recordings to `input_features` or `input_values`, as `preprocessor_config.json` says.

A recording is one channel of samples, floats or whole numbers, at the model's sampling rate; reading sound files and
resampling belong to other libraries.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from formax.audio import spectrogram
from formax.processors.files import (
    PREPROCESSOR,
    BatchFeature,
    as_batch,
    folder_of,
    save,
    settings_of,
    split_options,
    type_of,
    unknown,
)

# Added to a variance before its root is divided by.
_EPSILON = 1e-7
PADDINGS = ("longest", "max_length", "do_not_pad")
# Settings that are whole numbers above 0, and what is beyond any model: arrays are made in these sizes.
MOST = {"feature_size": 2**12, "sampling_rate": 2**20, "n_fft": 2**14, "hop_length": 2**20, "chunk_length": 2**20}
MAX_SAMPLES = 2**28  # of a chunk; four hours at 16,000 a second


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """What feature extractors share; `FeatureExtractor.from_pretrained` opens the one that a checkpoint names.

    Attributes:
        feature_size: numbers a frame (or sample).
        sampling_rate: samples a second that the model was trained with.
        padding_value: what shorter recordings are filled up with.
        padding_side: "right" or "left".
        return_attention_mask: whether a call returns `attention_mask` unless asked otherwise.
        other: what else the file said; kept for `save_pretrained`.
    """

    name: ClassVar[str] = ""
    # What the call returns first.
    main_input: ClassVar[str] = ""
    # Written for other readers, and made of the other settings.
    derived: ClassVar[tuple[str, ...]] = ()

    feature_size: int = 1
    sampling_rate: int = 16000
    padding_value: float = 0.0
    padding_side: str = "right"
    return_attention_mask: bool = False
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, most in MOST.items():
            value = getattr(self, key, 1)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"{self.name}: {key}={value!r}: use a whole number above 0, at most {most}")
        for key in ("return_attention_mask", "do_normalize"):
            if not isinstance(getattr(self, key, True), bool):
                raise ValueError(f"{self.name}: {key}={getattr(self, key)!r}: use true or false")
        if type(self.padding_value) not in (int, float):
            raise ValueError(f"{self.name}: padding_value={self.padding_value!r}: use a number")
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"{self.name}: padding_side={self.padding_side!r}: use 'right' or 'left'")

    # ------------------------------------------------------------------------------------------------ reading, writing

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """The names of the settings."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.name != "other")

    @staticmethod
    def from_config(values: Mapping[str, Any], where: str | Path = PREPROCESSOR) -> FeatureExtractor:
        """The feature extractor that the content of a preprocessor_config.json describes.

        Args:
            values: the content; it names its type. Null stands for the type's default.
            where: the file, for messages.

        Raises:
            UnknownProcessorError: no type, or one that there is not.
            ValueError: a value that a setting cannot have.
        """
        named = str(values.get("feature_extractor_type") or "")
        if named not in TYPES:
            raise unknown(named, where, TYPES, "feature extractor")
        cls = TYPES[named]
        dropped = ("feature_extractor_type", *cls.derived)
        given = {key: value for key, value in values.items() if value is not None and key not in dropped}
        settings = {key: value for key, value in given.items() if key in cls.settings()}
        other = {key: value for key, value in given.items() if key not in settings}
        try:
            return cls(**settings, other=other)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @staticmethod
    def from_pretrained(path_or_repo: str | Path, **options: Any) -> FeatureExtractor:
        """Reads the feature extractor of a checkpoint folder or hub repository.

        Args:
            path_or_repo: as in `formax.from_pretrained`.
            **options: `revision`, `cache_dir`, `local_files_only` and `token` as there; settings to be replaced.

        Raises:
            FileNotFoundError: no such folder, or it has no preprocessor_config.json.
            UnknownProcessorError: a type that formax does not have; the message names those there are.
            ValueError: a file that cannot be understood, or a setting that cannot be.
        """
        where, settings = split_options(options)
        return FeatureExtractor.from_folder(folder_of(path_or_repo, **where), **settings)

    @staticmethod
    def from_folder(folder: Path, **settings: Any) -> FeatureExtractor:
        """Reads the feature extractor of a local folder, with settings replaced."""
        values, where = settings_of(folder, "feature_extractor")
        named = type_of(values, folder, TYPE_OF_MODEL_TYPE)
        made = FeatureExtractor.from_config({**values, "feature_extractor_type": named}, where)
        return made.replace(**settings) if settings else made

    def replace(self, **settings: Any) -> Self:
        """The same with other settings; None changes nothing.

        Raises:
            ValueError: a setting that there is not, or a value that it cannot have.
        """
        for key in settings:
            if key not in self.settings():
                near = difflib.get_close_matches(key, self.settings(), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(self.settings())}"
                raise ValueError(f"{self.name} takes no {key!r}{hint}")
        return dataclasses.replace(self, **{key: value for key, value in settings.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The content of preprocessor_config.json."""
        values = {key: getattr(self, key) for key in self.settings()}
        return {**self.other, **values, "feature_extractor_type": self.name}

    def save_pretrained(self, save_directory: str | Path) -> str:
        """Writes preprocessor_config.json, which transformers opens too, and returns its path."""
        return save(save_directory, PREPROCESSOR, self.to_dict())

    @property
    def model_input_names(self) -> tuple[str, ...]:
        """What a call returns."""
        return (self.main_input, "attention_mask") if self.return_attention_mask else (self.main_input,)

    # --------------------------------------------------------------------------------------------------------- running

    def _recordings(self, raw_speech: Any, sampling_rate: int | None) -> list[np.ndarray]:
        """Every recording as float32 [T].

        Raises:
            ValueError: none, something else than samples, or another sampling rate.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the model was trained at {self.sampling_rate} samples a second and this is recorded at"
                f" {sampling_rate}: resample it first"
            )
        batch = isinstance(raw_speech, list | tuple) and not (raw_speech and np.isscalar(raw_speech[0]))
        if isinstance(raw_speech, str | Path):
            raise ValueError(f"a recording is an array of samples, not a {type(raw_speech).__name__}: read it first")
        rows = list(raw_speech) if batch or getattr(raw_speech, "ndim", 1) == 2 else [raw_speech]
        if not rows:
            raise ValueError("no recording was given: the batch is empty")
        return [self._samples(row, index) for index, row in enumerate(rows)]

    @staticmethod
    def _samples(row: Any, index: int) -> np.ndarray:
        """One recording as float32 [T]."""
        try:
            array = np.asarray(row)
        except ValueError:
            array = np.asarray(None)  # nested lists of different lengths
        if array.dtype == bool or not (
            np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
        ):
            raise ValueError(f"recording {index} is no array of samples: it is a {type(row).__name__}")
        if array.ndim != 1:
            raise ValueError(
                f"recording {index} is of shape {array.shape}: use one channel, [T]"
                + (" (mix the channels first)" if array.ndim == 2 else "")
            )
        if array.size == 0:
            raise ValueError(f"recording {index} is empty")
        return array.astype(np.float32)

    def _lengths(
        self,
        rows: list[np.ndarray],
        padding: bool | str,
        max_length: int | None,
        truncation: bool,
        pad_to_multiple_of: int | None,
    ) -> tuple[list[np.ndarray], list[int]]:
        """Recordings cut to the greatest length, and the length that each is to be padded to.

        Raises:
            ValueError: an unknown padding, or a length that is needed and missing, or below 1.
        """
        how = {True: "longest", False: "do_not_pad", None: "do_not_pad"}.get(padding, padding)  # type: ignore[arg-type]
        if how not in PADDINGS:
            raise ValueError(f"padding={padding!r}: use True, False, {', '.join(map(repr, PADDINGS))}")
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: use a number of samples, 1 or more")
        if max_length is None and (truncation or how == "max_length"):
            name = "truncation=True" if truncation else "padding='max_length'"
            raise ValueError(f"{name} needs a max_length (in samples)")

        def rounded(length: int) -> int:
            step = pad_to_multiple_of or 1
            return -(-length // step) * step

        if truncation and max_length is not None:
            rows = [row[: rounded(max_length)] for row in rows]
        if how == "do_not_pad":
            return rows, [len(row) for row in rows]
        longest = max(len(row) for row in rows) if how == "longest" or max_length is None else max_length
        return rows, [max(len(row), rounded(longest)) for row in rows]

    def _pad(self, row: np.ndarray, length: int, value: float) -> np.ndarray:
        """[T] -> [length] on the side for it."""
        spare = length - len(row)
        return np.pad(row, (spare, 0) if self.padding_side == "left" else (0, spare), constant_values=value)


def _normalised(row: np.ndarray) -> np.ndarray:
    """[T] -> [T] of mean 0 and variance 1."""
    return (row - row.mean()) / np.sqrt(row.var() + _EPSILON)


_HINT = "pass padding=True"


@dataclass(frozen=True, kw_only=True)
class WhisperFeatureExtractor(FeatureExtractor):
    """Log-mel spectrograms of recordings that are filled up, or cut, to the 30 seconds of Whisper.

    Attributes:
        feature_size: mel bands.
        n_fft: samples of a frame.
        hop_length: samples from frame to frame.
        chunk_length: seconds.
        dither: noise that is added before; formax adds none.
    """

    name = "WhisperFeatureExtractor"
    main_input = "input_features"
    derived = ("mel_filters", "n_samples", "nb_max_frames")

    feature_size: int = 80
    n_fft: int = 400
    hop_length: int = 160
    chunk_length: int = 30
    dither: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dither:
            raise ValueError(f"{self.name}: dither={self.dither!r}: formax adds no noise; use 0.0")
        if self.n_samples > MAX_SAMPLES:
            raise ValueError(
                f"{self.name}: chunk_length={self.chunk_length} seconds at sampling_rate={self.sampling_rate} are "
                f"{self.n_samples} samples, at most {MAX_SAMPLES} are possible"
            )

    @property
    def n_samples(self) -> int:
        """Samples of a chunk."""
        return self.chunk_length * self.sampling_rate

    @property
    def nb_max_frames(self) -> int:
        """Frames of a chunk."""
        return self.n_samples // self.hop_length

    @property
    def mel_filters(self) -> np.ndarray:
        """The filter bank [frequency bins, mel bands]."""
        return _filters(1 + self.n_fft // 2, self.feature_size, self.sampling_rate)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"n_samples": self.n_samples, "nb_max_frames": self.nb_max_frames}

    def __call__(
        self,
        raw_speech: Any,
        *,
        sampling_rate: int | None = None,
        padding: bool | str = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        do_normalize: bool | None = None,
    ) -> BatchFeature:
        """Makes `input_features` [B, mel bands, frames] of recordings.

        Args:
            raw_speech: a recording [T], a list of them, or an array [B, T].
            sampling_rate: of the recordings; another than the model's is an error.
            padding: "max_length", True or "longest", or False.
            max_length: in samples; the chunk's by default.
            truncation: whether longer recordings are cut to that length.
            pad_to_multiple_of: samples; lengths are rounded up to a multiple.
            return_attention_mask: whether to return `attention_mask` [B, frames] as well.
            return_tensors: "np", "jax", or None: NumPy, where rows of different lengths stay a list.
            do_normalize: whether recordings are brought to mean 0 and variance 1 before.

        Raises:
            ValueError: no recording, something else, or an impossible option.
        """
        rows = self._recordings(raw_speech, sampling_rate)
        rows, lengths = self._lengths(rows, padding, max_length or self.n_samples, truncation, pad_to_multiple_of)
        shortest = min(lengths)
        if shortest <= self.n_fft // 2 or shortest < self.hop_length:
            raise ValueError(f"a recording of {shortest} samples is too short for a frame of {self.n_fft}: pad it")
        waves = [
            self._pad(_normalised(row) if do_normalize else row, length, self.padding_value)
            for row, length in zip(rows, lengths, strict=True)
        ]
        features = [spectrogram.log_mel(wave, self.mel_filters, self.n_fft, self.hop_length) for wave in waves]
        data = {"input_features": features}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            masks = [
                self._pad(np.ones(len(row), np.int32), n, 0)[:: self.hop_length]
                for row, n in zip(rows, lengths, strict=True)
            ]
            data["attention_mask"] = [mask[: feature.shape[-1]] for mask, feature in zip(masks, features, strict=True)]
        return as_batch(data, return_tensors, _HINT)


@lru_cache(maxsize=4)
def _filters(bins: int, bands: int, sampling_rate: int) -> np.ndarray:
    filters = spectrogram.mel_filters(bins, bands, sampling_rate)
    filters.flags.writeable = False  # it is everybody's
    return filters


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2FeatureExtractor(FeatureExtractor):
    """Samples of mean 0 and variance 1, padded.

    With an attention mask, mean and variance are those of the real samples. Without one (wav2vec2-base and its like,
    which were trained so) they are those of the padded recording, as in the reference.

    Attributes:
        do_normalize: whether recordings are brought to mean 0 and variance 1.
    """

    name = "Wav2Vec2FeatureExtractor"
    main_input = "input_values"

    do_normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_size != 1:
            raise ValueError(f"{self.name}: feature_size={self.feature_size!r}: samples are single numbers, 1")

    def __call__(
        self,
        raw_speech: Any,
        *,
        sampling_rate: int | None = None,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Makes `input_values` [B, T] of recordings.

        Args:
            raw_speech: a recording [T], a list of them, or an array [B, T].
            sampling_rate: of the recordings; another than the model's is an error.
            padding: True or "longest", "max_length", or False.
            max_length: in samples.
            truncation: whether longer recordings are cut to that length.
            pad_to_multiple_of: samples; lengths are rounded up to a multiple.
            return_attention_mask: whether to return `attention_mask` [B, T] as well; as the checkpoint says by default.
            return_tensors: "np", "jax", or None: NumPy, where rows of different lengths stay a list.

        Raises:
            ValueError: no recording, something else, or an impossible option.
        """
        masked = self.return_attention_mask if return_attention_mask is None else return_attention_mask
        rows = self._recordings(raw_speech, sampling_rate)
        rows, lengths = self._lengths(rows, padding, max_length, truncation, pad_to_multiple_of)
        values, masks = [], []
        for row, length in zip(rows, lengths, strict=True):
            real = _normalised(row) if self.do_normalize and masked else row
            padded = self._pad(real, length, self.padding_value)
            values.append(_normalised(padded) if self.do_normalize and not masked else padded)
            masks.append(self._pad(np.ones(len(row), np.int32), length, 0))
        data = {"input_values": values} | ({"attention_mask": masks} if masked else {})
        return as_batch(data, return_tensors, _HINT)


TYPES: dict[str, type[FeatureExtractor]] = {
    cls.name: cls for cls in (WhisperFeatureExtractor, Wav2Vec2FeatureExtractor)
}

# For files that name no type.
_MODEL_TYPES = {
    "WhisperFeatureExtractor": "whisper",
    "Wav2Vec2FeatureExtractor": "data2vec-audio hubert moonshine sew sew-d unispeech unispeech-sat wav2vec2"
    " wav2vec2-bert wav2vec2-conformer wavlm",
}
TYPE_OF_MODEL_TYPE = {model_type: name for name, types in _MODEL_TYPES.items() for model_type in types.split()}
