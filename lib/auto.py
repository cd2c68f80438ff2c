"""Auto classes: from a checkpoint's config.json to the right family and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import jax

from formax import hub
from formax.core import registry
from formax.core.config import Config
from formax.core.family import Family
from formax.loading import as_config, choose, generation_config, load, read_config, spec_of
from formax.model import Model
from formax.sharding import DEFAULT_RULES, Rules, shardings


def register(family: Family, *more: Any) -> None:
    """Makes a family of your own known: its checkpoints open through all Auto classes from then on.

    A family of the same model type is replaced. See "A family of your own" in the documentation.

    Raises:
        TypeError: something else, such as the classes that transformers' `register` takes.
    """
    if more or not isinstance(family, Family):
        raise TypeError(
            "register takes a Family, which says everything of a model type: configuration, parameters, heads; see "
            f"'A family of your own' in the documentation. Got {', '.join(f'{one!r:.60}' for one in (family, *more))}"
        )
    registry.register(family)


class AutoConfig:
    """Configurations by model type."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        trust_remote_code: bool | None = None,
        **overrides: Any,
    ) -> Config:
        """The configuration of a checkpoint folder or hub repository, with fields replaced by `overrides`.

        Raises:
            ConfigError: no or broken config.json, no model_type, impossible values.
            UnknownModelTypeError: a family formax does not have.
            RemoteCodeError: `trust_remote_code=True`.
        """
        hub.refuse_code(trust_remote_code)
        folder = hub.snapshot(
            path_or_repo,
            ("config.json",),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        return read_config(folder, **overrides)

    register = staticmethod(register)

    @classmethod
    def for_model(cls, model_type: str, **overrides: Any) -> Config:
        """The default configuration of a model type, with fields replaced by `overrides`.

        Raises:
            ConfigError: a name that is no field (with the nearest), or an impossible value.
            UnknownModelTypeError: a family formax does not have.
        """
        plain = registry.family(model_type).model_type
        return as_config({"model_type": plain}, f"AutoConfig.for_model({model_type!r})", overrides)


def from_pretrained(path_or_repo: str | Path, **options: Any) -> Any:
    """Opens a checkpoint with the head that its config.json names; the options are those of `formax.loading.load`."""
    return load(path_or_repo, None, **options)


class AutoModel:
    """The bare model of a checkpoint, without a head."""

    task: ClassVar[str] = ""

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **options: Any) -> Any:
        """Opens a checkpoint folder or hub repository; the options are those of `formax.loading.load`."""
        return load(path_or_repo, cls.task, **options)

    @classmethod
    def from_config(
        cls, config: Config, *, key: jax.Array, dtype: Any = None, mesh: Any = None, rules: Rules = DEFAULT_RULES
    ) -> Model:
        """A model with initial parameters.

        Args:
            config: a family's configuration, e.g. from `AutoConfig.for_model`.
            key: `jax.random.key(seed)`; every parameter draws from a key of its own.
            dtype: dtype of the parameters; the configuration's, else float32, by default.
            mesh: a device mesh; every device then makes its own part alone.
            rules: logical axis -> mesh axis.
        """
        architecture, family, config = choose(registry.family(config.model_type), config, cls.task)
        spec = spec_of(architecture, config)
        places = None if mesh is None else shardings(spec, mesh, rules)
        model = Model.initialise(config, architecture, family, key, dtype, places)
        return model.replace(generation_config=generation_config(architecture, config))

    register = staticmethod(register)


class AutoModelForPreTraining(AutoModel):
    """All objectives that the family was pre-trained with."""

    task = "ForPreTraining"


class AutoModelForMaskedLM(AutoModel):
    """Words in the place of masked ones."""

    task = "ForMaskedLM"


class AutoModelForCausalLM(AutoModel):
    """The next word."""

    task = "ForCausalLM"


class AutoModelForSeq2SeqLM(AutoModel):
    """A text out of a text."""

    task = "ForSeq2SeqLM"


class AutoModelForNextSentencePrediction(AutoModel):
    """Whether the second sentence follows the first."""

    task = "ForNextSentencePrediction"


class AutoModelForSequenceClassification(AutoModel):
    """A label for the whole text."""

    task = "ForSequenceClassification"


class AutoModelForMultipleChoice(AutoModel):
    """The best of several continuations."""

    task = "ForMultipleChoice"


class AutoModelForTokenClassification(AutoModel):
    """A label for every token."""

    task = "ForTokenClassification"


class AutoModelForQuestionAnswering(AutoModel):
    """The span of the text that answers a question."""

    task = "ForQuestionAnswering"


class AutoModelForTableQuestionAnswering(AutoModel):
    """The cells of a table that answer a question."""

    task = "ForTableQuestionAnswering"


class AutoModelForTextEncoding(AutoModel):
    """States of a text, by the encoder alone."""

    task = "ForTextEncoding"


class AutoModelForImageClassification(AutoModel):
    """A label for an image."""

    task = "ForImageClassification"


class AutoModelForMaskedImageModeling(AutoModel):
    """The pixels under masked patches."""

    task = "ForMaskedImageModeling"


class AutoModelForImageSegmentation(AutoModel):
    """A mask for every object or region of an image."""

    task = "ForImageSegmentation"


class AutoModelForSemanticSegmentation(AutoModel):
    """A class for every pixel."""

    task = "ForSemanticSegmentation"


class AutoModelForInstanceSegmentation(AutoModel):
    """A mask for every object."""

    task = "ForInstanceSegmentation"


class AutoModelForUniversalSegmentation(AutoModel):
    """Masks for regions of any kind."""

    task = "ForUniversalSegmentation"


class AutoModelForObjectDetection(AutoModel):
    """Classes and boxes of the objects in an image."""

    task = "ForObjectDetection"


class AutoModelForZeroShotObjectDetection(AutoModel):
    """Boxes of objects that are named in words."""

    task = "ForZeroShotObjectDetection"


class AutoModelForZeroShotImageClassification(AutoModel):
    """Which of several texts fits an image."""

    task = "ForZeroShotImageClassification"


class AutoModelForMaskGeneration(AutoModel):
    """The mask of what a point or a box means."""

    task = "ForMaskGeneration"


class AutoModelForDepthEstimation(AutoModel):
    """The distance of every pixel."""

    task = "ForDepthEstimation"


class AutoModelForImageToImage(AutoModel):
    """An image out of an image."""

    task = "ForImageToImage"


class AutoModelForVideoClassification(AutoModel):
    """A label for a video."""

    task = "ForVideoClassification"


class AutoModelForAudioClassification(AutoModel):
    """A label for a recording."""

    task = "ForAudioClassification"


class AutoModelForAudioFrameClassification(AutoModel):
    """A label for every frame of a recording."""

    task = "ForAudioFrameClassification"


class AutoModelForAudioXVector(AutoModel):
    """A vector that tells speakers apart."""

    task = "ForAudioXVector"


class AutoModelForCTC(AutoModel):
    """Letters for the frames of a recording."""

    task = "ForCTC"


class AutoModelForSpeechSeq2Seq(AutoModel):
    """A text out of a recording."""

    task = "ForSpeechSeq2Seq"


class AutoModelForTextToSpectrogram(AutoModel):
    """A spectrogram out of a text."""

    task = "ForTextToSpectrogram"


class AutoModelForTextToWaveform(AutoModel):
    """A recording out of a text."""

    task = "ForTextToWaveform"


class AutoModelForDocumentQuestionAnswering(AutoModel):
    """The span of a document, seen as text and layout, that answers a question."""

    task = "ForDocumentQuestionAnswering"


class AutoModelForVisualQuestionAnswering(AutoModel):
    """The answer to a question about an image."""

    task = "ForVisualQuestionAnswering"


class AutoModelForVision2Seq(AutoModel):
    """A text out of an image."""

    task = "ForVision2Seq"


class AutoModelForImageTextToText(AutoModel):
    """A text out of images and a text."""

    task = "ForImageTextToText"


class AutoBackbone(AutoModel):
    """Feature maps of an image, for models that build on them.

    Which ones is said by `out_features` (names of stages) or `out_indices`, as overrides of the configuration:
    `AutoBackbone.from_pretrained(path, out_features=["stage2", "stage4"])`.
    """

    task = "Backbone"
