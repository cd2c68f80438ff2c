"""Which families there are: a literal table, also the index page; modules are imported when first used.

A module's family is its `FAMILY`; where it has several, such as the towers of CLIP, "module:NAME" says which.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache

from formax.core.family import Family

MODULES = {
    "albert": "formax.models.text.albert",
    "bart": "formax.models.text.bart",
    "beit": "formax.models.vision.beit",
    "bert": "formax.models.text.bert",
    "big_bird": "formax.models.text.big_bird",
    "blenderbot": "formax.models.text.blenderbot",
    "blenderbot-small": "formax.models.text.blenderbot_small",
    "bloom": "formax.models.text.bloom",
    "clip": "formax.models.multimodal.clip",
    "clip_text_model": "formax.models.multimodal.clip:TEXT",
    "clip_vision_model": "formax.models.multimodal.clip:VISION",
    "detr": "formax.models.vision.detr",
    "dinov2": "formax.models.vision.dinov2",
    "distilbert": "formax.models.text.distilbert",
    "electra": "formax.models.text.electra",
    "encoder_decoder": "formax.models.text.encoder_decoder",
    "gemma": "formax.models.text.gemma",
    "gpt2": "formax.models.text.gpt2",
    "gpt_neo": "formax.models.text.gpt_neo",
    "gptj": "formax.models.text.gptj",
    "llama": "formax.models.text.llama",
    "longt5": "formax.models.text.longt5",
    "mamba": "formax.models.text.mamba",
    "marian": "formax.models.text.marian",
    "mbart": "formax.models.text.mbart",
    "mistral": "formax.models.text.mistral",
    "mixtral": "formax.models.text.mixtral",
    "mt5": "formax.models.text.mt5",
    "opt": "formax.models.text.opt",
    "pegasus": "formax.models.text.pegasus",
    "regnet": "formax.models.vision.regnet",
    "resnet": "formax.models.vision.resnet",
    "roberta": "formax.models.text.roberta",
    "roberta-prelayernorm": "formax.models.text.roberta_prelayernorm",
    "roformer": "formax.models.text.roformer",
    "speech_encoder_decoder": "formax.models.audio.speech_encoder_decoder",
    "t5": "formax.models.text.t5",
    "vision_encoder_decoder": "formax.models.multimodal.vision_encoder_decoder",
    "vision_text_dual_encoder": "formax.models.multimodal.vision_text_dual_encoder",
    "vit": "formax.models.vision.vit",
    "wav2vec2": "formax.models.audio.wav2vec2",
    "whisper": "formax.models.audio.whisper",
    "xglm": "formax.models.text.xglm",
    "xlm-roberta": "formax.models.text.xlm_roberta",
}

# Model types of checkpoints (or names of families) that are another family under a different tokenizer.
ALIASES = {
    "barthez": "bart",
    "bartpho": "mbart",
    "bert-japanese": "bert",
    "bertweet": "roberta",
    "bort": "bert",
    "byt5": "t5",
    "code_llama": "llama",
    "cpm": "gpt2",
    "dialogpt": "gpt2",
    "dit": "beit",
    "flan-t5": "t5",
    "flan-ul2": "t5",
    "gpt_sw3": "gpt2",
    "herbert": "bert",
    "llama2": "llama",
    "llama3": "llama",
    "mbart50": "mbart",
    "megatron_gpt2": "gpt2",
    "mms": "wav2vec2",
    "phobert": "roberta",
    "t5v1.1": "t5",
    "tapex": "bart",
    "ul2": "t5",
    "wav2vec2_phoneme": "wav2vec2",
    "xlm-v": "xlm-roberta",
    "xls_r": "wav2vec2",
    "xlsr_wav2vec2": "wav2vec2",
}

_registered: dict[str, Family] = {}


class UnknownModelTypeError(ValueError):
    """No family of that name; the message names the nearest ones."""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


@cache
def _spelt() -> tuple[dict[str, str], dict[str, str]]:
    """The tables by plain names: {name: key of `MODULES`}, {alias: name}."""
    return {_plain(key): key for key in MODULES}, {_plain(key): _plain(value) for key, value in ALIASES.items()}


def model_types() -> list[str]:
    """Every model type that `family` knows, aliases included."""
    return sorted({*MODULES, *ALIASES, *_registered})


def register(family: Family) -> None:
    """Adds a user's own family, found by its model type from then on (replacing one of that name)."""
    _registered[_plain(family.model_type)] = family


def family(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        UnknownModelTypeError: naming the nearest ones there are.
    """
    name = _plain(model_type)
    if name in _registered:
        return _registered[name]
    known, aliases = _spelt()
    name = aliases.get(name, name)
    if name not in known:
        near = difflib.get_close_matches(name, [_plain(key) for key in model_types()], n=3, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else f"; there are {', '.join(model_types())}"
        raise UnknownModelTypeError(f"formax has no model_type {model_type!r}{hint}")
    module, _, attribute = MODULES[known[name]].partition(":")
    return getattr(importlib.import_module(module), attribute or "FAMILY")
