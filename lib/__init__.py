"""formax: every transformer family as pure JAX functions.

    import formax
    model = formax.from_pretrained("path-or-repo")
    out = model(input_ids=ids, attention_mask=mask)

Names are imported when they are first used, so that `import formax` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formax.auto import (
        AutoBackbone,
        AutoConfig,
        AutoModel,
        AutoModelForAudioClassification,
        AutoModelForAudioFrameClassification,
        AutoModelForAudioXVector,
        AutoModelForCausalLM,
        AutoModelForCTC,
        AutoModelForDepthEstimation,
        AutoModelForDocumentQuestionAnswering,
        AutoModelForImageClassification,
        AutoModelForImageSegmentation,
        AutoModelForImageTextToText,
        AutoModelForImageToImage,
        AutoModelForInstanceSegmentation,
        AutoModelForMaskedImageModeling,
        AutoModelForMaskedLM,
        AutoModelForMaskGeneration,
        AutoModelForMultipleChoice,
        AutoModelForNextSentencePrediction,
        AutoModelForObjectDetection,
        AutoModelForPreTraining,
        AutoModelForQuestionAnswering,
        AutoModelForSemanticSegmentation,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForSpeechSeq2Seq,
        AutoModelForTableQuestionAnswering,
        AutoModelForTextEncoding,
        AutoModelForTextToSpectrogram,
        AutoModelForTextToWaveform,
        AutoModelForTokenClassification,
        AutoModelForUniversalSegmentation,
        AutoModelForVideoClassification,
        AutoModelForVision2Seq,
        AutoModelForVisualQuestionAnswering,
        AutoModelForZeroShotImageClassification,
        AutoModelForZeroShotObjectDetection,
        from_pretrained,
        register,
    )
    from formax.composed import dual_encoder, encoder_decoder
    from formax.generation.config import GenerationConfig
    from formax.generation.streamers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
    from formax.inside import capture, intervene, places
    from formax.model import Model
    from formax.processors.auto import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor
    from formax.quantization import AutoHfQuantizer, AutoQuantizationConfig
    from formax.text.embedding import SentenceEncoder
    from formax.text.tokenizer import AutoTokenizer

__version__ = "0.1.0"

__all__ = [
    "AsyncTextIteratorStreamer",
    "AutoBackbone",
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoHfQuantizer",
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForAudioClassification",
    "AutoModelForAudioFrameClassification",
    "AutoModelForAudioXVector",
    "AutoModelForCTC",
    "AutoModelForCausalLM",
    "AutoModelForDepthEstimation",
    "AutoModelForDocumentQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForImageSegmentation",
    "AutoModelForImageTextToText",
    "AutoModelForImageToImage",
    "AutoModelForInstanceSegmentation",
    "AutoModelForMaskGeneration",
    "AutoModelForMaskedImageModeling",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForObjectDetection",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSemanticSegmentation",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTableQuestionAnswering",
    "AutoModelForTextEncoding",
    "AutoModelForTextToSpectrogram",
    "AutoModelForTextToWaveform",
    "AutoModelForTokenClassification",
    "AutoModelForUniversalSegmentation",
    "AutoModelForVideoClassification",
    "AutoModelForVision2Seq",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForZeroShotObjectDetection",
    "AutoProcessor",
    "AutoQuantizationConfig",
    "AutoTokenizer",
    "GenerationConfig",
    "Model",
    "SentenceEncoder",
    "TextIteratorStreamer",
    "TextStreamer",
    "capture",
    "dual_encoder",
    "encoder_decoder",
    "from_pretrained",
    "intervene",
    "places",
    "register",
]

# Where each name lives; the Auto classes together.
_HOME = dict.fromkeys(__all__, "formax.auto") | {
    "AsyncTextIteratorStreamer": "formax.generation.streamers",
    "AutoFeatureExtractor": "formax.processors.auto",
    "AutoHfQuantizer": "formax.quantization",
    "AutoImageProcessor": "formax.processors.auto",
    "AutoProcessor": "formax.processors.auto",
    "AutoQuantizationConfig": "formax.quantization",
    "AutoTokenizer": "formax.text.tokenizer",
    "GenerationConfig": "formax.generation.config",
    "Model": "formax.model",
    "SentenceEncoder": "formax.text.embedding",
    "TextIteratorStreamer": "formax.generation.streamers",
    "TextStreamer": "formax.generation.streamers",
    "capture": "formax.inside",
    "dual_encoder": "formax.composed",
    "encoder_decoder": "formax.composed",
    "intervene": "formax.inside",
    "places": "formax.inside",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'formax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
