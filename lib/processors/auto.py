"""Auto classes for what turns images and recordings into inputs, and processors that hold a tokenizer beside."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from formax.audio import feature_extractor as audio
from formax.audio.feature_extractor import FeatureExtractor
from formax.processors.files import (
    HUB_PATTERNS,
    PREPROCESSOR,
    PROCESSOR,
    BatchFeature,
    folder_of,
    read,
    save,
    settings_of,
    split_options,
    type_of,
    unknown,
)
from formax.text.own_classes import OwnClasses
from formax.text.tokenizer import CONFIG as TOKENIZER_CONFIG
from formax.text.tokenizer import HUB_PATTERNS as TOKENIZER_PATTERNS
from formax.text.tokenizer import TOKENIZER, AutoTokenizer, Tokenizer
from formax.vision import image_processor as vision
from formax.vision.image_processor import ImageProcessor


class _Registry(OwnClasses):
    """Types of a user's own, as the files of a folder name them."""

    @classmethod
    def _own(cls, folder: Path, named: str) -> Any:
        """The user's class of the name in the files, else of the model type; None where there is none."""
        return cls._classes.get(named or str(read(folder, "config.json").get("model_type")))


class AutoImageProcessor(_Registry):
    """The image processor of a checkpoint."""

    _classes: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **options: Any) -> Any:
        """Opens the image processor of a folder or hub repository; as `ImageProcessor.from_pretrained`."""
        where, settings = split_options(options)
        return cls._open(folder_of(path_or_repo, **where), settings)

    @classmethod
    def _open(cls, folder: Path, settings: Mapping[str, Any]) -> Any:
        values, file = settings_of(folder, "image_processor")
        own = cls._own(folder, type_of(values, folder, {}))
        if own is not None:
            return own.from_pretrained(folder, **settings)
        named = type_of(values, folder, vision.TYPE_OF_MODEL_TYPE)
        if vision.canonical(named) not in vision.TYPES:
            raise unknown(named, file, {*vision.TYPES, *cls._classes}, "image processor")
        return ImageProcessor.from_folder(folder, **settings)


class AutoFeatureExtractor(_Registry):
    """The feature extractor of a checkpoint; that of an image model is its image processor, as it was once called."""

    _classes: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **options: Any) -> Any:
        """Opens the feature extractor of a folder or hub repository; as `FeatureExtractor.from_pretrained`."""
        where, settings = split_options(options)
        return cls._open(folder_of(path_or_repo, **where), settings)

    @classmethod
    def _open(cls, folder: Path, settings: Mapping[str, Any]) -> Any:
        values, file = settings_of(folder, "feature_extractor")
        own = cls._own(folder, type_of(values, folder, {}))
        if own is not None:
            return own.from_pretrained(folder, **settings)
        named = type_of(values, folder, audio.TYPE_OF_MODEL_TYPE | vision.TYPE_OF_MODEL_TYPE)
        if vision.canonical(named) in vision.TYPES:
            return ImageProcessor.from_folder(folder, **settings)
        if named not in audio.TYPES:
            raise unknown(named, file, {*audio.TYPES, *cls._classes}, "feature extractor")
        return FeatureExtractor.from_folder(folder, **settings)


# --------------------------------------------------------------------------------------------------- with a tokenizer

# The types of processors: which part stands beside the tokenizer.
PROCESSORS = {
    "CLIPProcessor": "image_processor",
    "Wav2Vec2Processor": "feature_extractor",
    "WhisperProcessor": "feature_extractor",
}
_MODEL_TYPES = {
    "CLIPProcessor": "aimv2 clip groupvit metaclip_2",
    "Wav2Vec2Processor": "hubert moonshine sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-bert"
    " wav2vec2-conformer wavlm",
    "WhisperProcessor": "whisper",
}
PROCESSOR_OF_MODEL_TYPE = {model_type: name for name, types in _MODEL_TYPES.items() for model_type in types.split()}


@dataclass(frozen=True)
class Processor:
    """A tokenizer and an image processor or feature extractor, called as one.

    Attributes:
        processor_class: a key of `PROCESSORS`.
        tokenizer: for `text`.
        image_processor: for `images`, or None.
        feature_extractor: for `audio`, or None.
    """

    processor_class: str
    tokenizer: Tokenizer
    image_processor: Any = None
    feature_extractor: Any = None

    def __post_init__(self) -> None:
        if self.processor_class not in PROCESSORS:
            raise unknown(self.processor_class, "Processor", PROCESSORS, "processor")
        if getattr(self, PROCESSORS[self.processor_class]) is None:
            raise ValueError(f"{self.processor_class} needs its {PROCESSORS[self.processor_class]}")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **options: Any) -> Processor:
        """Reads both parts of a checkpoint; as `AutoProcessor.from_pretrained`.

        Raises:
            UnknownProcessorError: the checkpoint is of no type in `PROCESSORS`.
        """
        where, settings = split_options(options)
        folder = folder_of(path_or_repo, (*HUB_PATTERNS, *TOKENIZER_PATTERNS), **where)
        return cls.from_folder(folder, **settings)

    @classmethod
    def from_folder(cls, folder: Path, **settings: Any) -> Processor:
        """Reads both parts of a local folder; the settings are those of the part beside the tokenizer."""
        name = _processor_class(folder)
        if name not in PROCESSORS:
            raise unknown(name, folder, PROCESSORS, "processor")
        part = PROCESSORS[name]
        auto = AutoImageProcessor if part == "image_processor" else AutoFeatureExtractor
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: {error}. {auto.__name__} opens its {part} alone") from None
        return cls(name, tokenizer, **{part: auto._open(folder, settings)})

    def save_pretrained(self, save_directory: str | Path) -> tuple[str, ...]:
        """Writes the files of both parts, so that transformers opens them as one too, and returns their paths."""
        part = getattr(self, PROCESSORS[self.processor_class])
        values = {**part.to_dict(), "processor_class": self.processor_class}
        return (*self.tokenizer.save_pretrained(save_directory), save(save_directory, PREPROCESSOR, values))

    def __call__(
        self,
        audio: Any = None,
        *,
        text: Any = None,
        images: Any = None,
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """The inputs of a model, from text and images, or text and recordings; either alone will do.

        Args:
            audio: for the feature extractor.
            text: for the tokenizer; beside recordings it becomes `labels`.
            images: for the image processor.
            text_kwargs: options of the tokenizer's call alone.
            images_kwargs: options of the image processor's call alone.
            audio_kwargs: options of the feature extractor's call alone.
            **options: options of any part's call; each part is given those that it has.

        Raises:
            ValueError: nothing to process, an input that no part takes, or an option that no part has.
        """
        beside = PROCESSORS[self.processor_class]
        given, own = (images, images_kwargs) if beside == "image_processor" else (audio, audio_kwargs)
        surplus, name = (audio, "audio") if beside == "image_processor" else (images, "images")
        wanted = "images" if beside == "image_processor" else "audio"
        if surplus is not None:
            raise ValueError(f"{self.processor_class} takes {wanted}= and text=, no {name}")
        if given is None and text is None:
            raise ValueError(f"{self.processor_class} needs {wanted}= or text=, or both")
        part = getattr(self, beside)
        names = {"tokenizer": _options(self.tokenizer), beside: _options(part)}
        for option in options:
            if not any(option in known for known in names.values()):
                raise ValueError(f"{self.processor_class}: neither its tokenizer nor its {beside} has {option!r}")
        batch = BatchFeature()
        if given is not None:
            batch.update(part(given, **_chosen(options, names[beside]), **(own or {})))
        if text is not None:
            tokens = self.tokenizer(text, **_chosen(options, names["tokenizer"]), **(text_kwargs or {}))
            batch.update({"labels": tokens["input_ids"]} if beside == "feature_extractor" and batch else tokens)
        return batch

    def decode(self, token_ids: Any, **options: Any) -> str:
        """The text of ids, by the tokenizer."""
        return self.tokenizer.decode(token_ids, **options)

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """The texts of rows of ids, by the tokenizer."""
        return self.tokenizer.batch_decode(sequences, **options)


def _options(part: Any) -> set[str]:
    """The names of the options of a part's call."""
    settings = vision.TYPES[part.image_processor_type] if isinstance(part, ImageProcessor) else ()
    return {*list(inspect.signature(part).parameters)[1:], *settings} - {"settings"}


def _chosen(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in names}


def _processor_class(folder: Path, by_model_type: Mapping[str, str] = PROCESSOR_OF_MODEL_TYPE) -> str:
    """What the files of a folder call its processor, else that of the model type; "" where nothing says it."""
    for file in (PROCESSOR, PREPROCESSOR, TOKENIZER_CONFIG, "config.json"):
        named = read(folder, file).get("processor_class")
        if named:
            return str(named)
    return by_model_type.get(str(read(folder, "config.json").get("model_type")), "")


class AutoProcessor(_Registry):
    """What makes the inputs of a checkpoint: both parts where it has two, else the one there is."""

    _classes: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **options: Any) -> Any:
        """Opens the processor of a folder or hub repository.

        Args:
            path_or_repo: as in `formax.from_pretrained`.
            **options: `revision`, `cache_dir`, `local_files_only` and `token` as there; settings of the image
                processor or feature extractor to be replaced.

        Returns:
            A `Processor`; of a checkpoint whose model has none, its image processor, feature extractor or tokenizer.

        Raises:
            FileNotFoundError: no such folder, or a file is missing; a tokenizer without tokenizer.json among them.
            UnknownProcessorError: a type that formax does not have; the message names those there are.
        """
        where, settings = split_options(options)
        folder = folder_of(path_or_repo, (*HUB_PATTERNS, *TOKENIZER_PATTERNS), **where)
        own = cls._own(folder, _processor_class(folder, {}))
        if own is not None:
            return own.from_pretrained(folder, **settings)
        named = _processor_class(folder)
        if named:
            if named not in PROCESSORS:
                raise unknown(named, folder, {*PROCESSORS, *cls._classes}, "processor")
            return Processor.from_folder(folder, **settings)
        if (folder / PREPROCESSOR).is_file() or (folder / PROCESSOR).is_file():
            values, _ = settings_of(folder, "image_processor")
            named = type_of(values, folder, audio.TYPE_OF_MODEL_TYPE)
            speech = named in audio.TYPES or named in AutoFeatureExtractor._classes
            return (AutoFeatureExtractor if speech else AutoImageProcessor)._open(folder, settings)
        if settings or not (folder / TOKENIZER).is_file():
            raise FileNotFoundError(f"{folder} has no {PREPROCESSOR}, no {PROCESSOR} and no {TOKENIZER}")
        return AutoTokenizer.from_pretrained(folder)
