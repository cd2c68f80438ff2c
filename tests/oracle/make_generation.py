"""Makes `tests/data/generation/`: what the reference's processors, criteria and settings of generation do.

    python tests/oracle/make_generation.py            # in the environment of requirements.txt; writes
    python tests/oracle/make_generation.py --check    # compares with the files, writes nothing; status 1 if any differs

`processors.npz`, `lists.npz`, `watermarks.npz` and `stopping.npz` hold results: texts and scores are made up here by
numpy, for the suite as well. `settings.json` holds what `save_pretrained` writes, which settings are refused or told
of, which way of generating follows, and the names of the classes there are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data" / "generation"
sys.path.insert(0, str(HERE.parent))
TOLERANCE = 1e-6

# --------------------------------------------------------------------------------------------------------------- inputs

ROWS, SIZE, VOCABULARY, PROMPT = 3, 14, 29, 4
LENGTHS = (1, 2, 4, 5, 9, 13, 14)


def texts() -> np.ndarray:
    """Texts [3, 14]: one of few tokens, so that sequences repeat; one that begins with padding; and any."""
    random = np.random.RandomState(0)
    ids = random.randint(3, VOCABULARY, (ROWS, SIZE))
    ids[0] = random.randint(3, 6, SIZE)
    ids[1, :3] = 0
    ids[1, 8:13] = ids[1, 3:8]
    return ids.astype(np.int32)


def scores(kind: str = "plain", length: int = 0) -> np.ndarray:
    """Scores float32 [3, 29]: plain, or with some that are ruled out already, or with values that are none."""
    out = 3 * np.random.RandomState(100 + length).randn(ROWS, VOCABULARY)
    if kind == "ruled_out":
        out[:, ::4] = -np.inf
    if kind == "invalid":
        out[0, 3], out[1, 5], out[2, 7] = np.nan, np.inf, -np.inf
    if kind == "end":
        out[:2, 7] = 14
    return out.astype(np.float32)


def halves(length: int = 0) -> np.ndarray:
    """Scores [6, 29] of a batch with and without the prompt."""
    return np.concatenate([scores("plain", length), scores("plain", length + 50)])


ENCODER = np.random.RandomState(7).randint(3, VOCABULARY, (ROWS, 9)).astype(np.int32)
ENCODER[:, 2:5] = texts()[:, 5:8]
# Whisper's: text below 10, the end is 10, then special tokens; timestamps from 14 on.
STAMPED = np.asarray(
    [[3, 4, 5, 13, 14, 6, 7, 16, 16, 8, 20, 9, 9, 21], [3, 4, 5, 13, 14, 6, 16, 8, 9, 9, 17, 17, 5, 6], [3] * 14],
    np.int32,
)
# Dia's: three channels of one input; what is there does not matter before the end, which is 7.
CHANNELS = np.random.RandomState(3).randint(8, 20, (ROWS, SIZE)).astype(np.int32)
WHISPER = {"no_timestamps_token_id": 13, "eos_token_id": 10, "bos_token_id": 10, "max_initial_timestamp_index": 3}
SYNTHID: dict[str, Any] = {
    "ngram_len": 3,
    "keys": [654, -400, 836, 2**40 + 5],
    "sampling_table_size": 1009,
    "sampling_table_seed": 5,
}
STATIC = {"context_history_size": 64}


def allowed(row: int, text: Any) -> list[int]:
    """A function of a user's, for tokens that may follow a text."""
    return [3 + row, int(text[-1]), (int(text[0]) + len(text)) % VOCABULARY]


# ---------------------------------------------------------------------------------------------------------------- cases


def case(cls: str, reference: dict[str, Any], ours: str, kwargs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A case: the reference's class with its arguments, our constructor with its own, and what to feed."""
    return {"class": cls, "reference": reference, "ours": ours, "kwargs": kwargs, **more}


P = "LogitsProcessor"
CASES: dict[str, dict[str, Any]] = {
    "min_length": case(
        "MinLength" + P, {"min_length": 5, "eos_token_id": [7, 9]}, "min_length", {"length": 5, "eos_token_id": [7, 9]}
    ),
    "min_new_tokens": case(
        "MinNewTokensLength" + P,
        {"prompt_length_to_skip": PROMPT, "min_new_tokens": 5, "eos_token_id": 7},
        "min_new_tokens",
        {"count": 5, "eos_token_id": 7},
    ),
    "temperature": case("TemperatureLogitsWarper", {"temperature": 0.7}, "temperature", {"value": 0.7}),
    "temperature_flat": case("TemperatureLogitsWarper", {"temperature": 1.9}, "temperature", {"value": 1.9}),
    "repetition_penalty": case(
        "RepetitionPenalty" + P, {"penalty": 1.3}, "repetition_penalty", {"penalty": 1.3}, scores="ruled_out"
    ),
    "repetition_penalty_new": case(
        "RepetitionPenalty" + P,
        {"penalty": 0.8, "prompt_ignore_length": PROMPT},
        "repetition_penalty",
        {"penalty": 0.8, "prompt_ignore_length": PROMPT},
    ),
    "encoder_repetition_penalty": case(
        "EncoderRepetitionPenalty" + P,
        {"penalty": 1.7, "encoder_input_ids": "encoder"},
        "encoder_repetition_penalty",
        {"penalty": 1.7, "encoder_ids": "encoder"},
    ),
    "no_repeat_ngram_1": case("NoRepeatNGram" + P, {"ngram_size": 1}, "no_repeat_ngram", {"size": 1}),
    "no_repeat_ngram_2": case("NoRepeatNGram" + P, {"ngram_size": 2}, "no_repeat_ngram", {"size": 2}),
    "no_repeat_ngram_4": case("NoRepeatNGram" + P, {"ngram_size": 4}, "no_repeat_ngram", {"size": 4}),
    "encoder_no_repeat_ngram_1": case(
        "EncoderNoRepeatNGram" + P,
        {"encoder_ngram_size": 1, "encoder_input_ids": "encoder"},
        "encoder_no_repeat_ngram",
        {"size": 1, "encoder_ids": "encoder"},
    ),
    "encoder_no_repeat_ngram_3": case(
        "EncoderNoRepeatNGram" + P,
        {"encoder_ngram_size": 3, "encoder_input_ids": "encoder"},
        "encoder_no_repeat_ngram",
        {"size": 3, "encoder_ids": "encoder"},
        lengths=(1, 2, 7, 8, 13),
    ),
    "prefix_allowed_tokens": case(
        "PrefixConstrained" + P,
        {"prefix_allowed_tokens_fn": "allowed", "num_beams": 1},
        "prefix_allowed_tokens",
        {"allowed": "allowed"},
    ),
    "prefix_allowed_tokens_beams": case(
        "PrefixConstrained" + P,
        {"prefix_allowed_tokens_fn": "allowed", "num_beams": 3},
        "prefix_allowed_tokens",
        {"allowed": "allowed", "num_beams": 3},
    ),
    "hamming_diversity_0": case(
        "HammingDiversity" + P,
        {"diversity_penalty": 1.5, "num_beams": 6, "num_beam_groups": 2},
        "hamming_diversity",
        {"penalty": 1.5, "num_beams": 6, "num_beam_groups": 2},
        given={"current_tokens": [5, 5, 8, 1, 1, 1], "beam_group": 0},
    ),
    "hamming_diversity_1": case(
        "HammingDiversity" + P,
        {"diversity_penalty": 1.5, "num_beams": 6, "num_beam_groups": 2},
        "hamming_diversity",
        {"penalty": 1.5, "num_beams": 6, "num_beam_groups": 2},
        given={"current_tokens": [5, 5, 8, 1, 1, 1], "beam_group": 1},
    ),
    "hamming_diversity_batch": case(
        "HammingDiversity" + P,
        {"diversity_penalty": 0.5, "num_beams": 3, "num_beam_groups": 3},
        "hamming_diversity",
        {"penalty": 0.5, "num_beams": 3, "num_beam_groups": 3},
        given={"current_tokens": [5, 5, 8, 1, 2, 3, 4, 4, 4], "beam_group": 2},
    ),
    "forced_bos": case("ForcedBOSToken" + P, {"bos_token_id": 11}, "forced_bos", {"token_id": 11}),
    "forced_eos": case(
        "ForcedEOSToken" + P,
        {"max_length": 14, "eos_token_id": [7, 9]},
        "forced_eos",
        {"token_id": [7, 9], "max_length": 14},
    ),
    "forced_eos_new": case(
        "ForcedEOSToken" + P,
        {"max_length": PROMPT + 10, "eos_token_id": 7},
        "forced_eos",
        {"token_id": 7, "max_new_tokens": 10},
    ),
    "remove_invalid": case("InfNanRemove" + P, {}, "remove_invalid", {}, scores="invalid"),
    "exponential_decay_length": case(
        "ExponentialDecayLengthPenalty",
        {"exponential_decay_length_penalty": (3, 1.1), "eos_token_id": [7, 9], "input_ids_seq_length": PROMPT},
        "exponential_decay_length",
        {"start": 3, "factor": 1.1, "eos_token_id": [7, 9]},
    ),
    "exponential_decay_length_less": case(
        "ExponentialDecayLengthPenalty",
        {"exponential_decay_length_penalty": (1, 0.8), "eos_token_id": 7, "input_ids_seq_length": PROMPT},
        "exponential_decay_length",
        {"start": 1, "factor": 0.8, "eos_token_id": 7},
    ),
    "renormalize": case("LogitNormalization", {}, "renormalize", {}, scores="ruled_out"),
    "suppress_tokens": case("SuppressTokens" + P, {"suppress_tokens": [1, 28]}, "suppress_tokens", {"ids": [1, 28]}),
    "suppress_at_begin": case(
        "SuppressTokensAtBegin" + P,
        {"begin_suppress_tokens": [1, 28], "begin_index": PROMPT},
        "suppress_at_begin",
        {"ids": [1, 28]},
    ),
    "suppress_at_begin_5": case(
        "SuppressTokensAtBegin" + P,
        {"begin_suppress_tokens": [1], "begin_index": 5},
        "suppress_at_begin",
        {"ids": [1], "begin": 5},
    ),
    "guidance": case(
        "UnbatchedClassifierFreeGuidance" + P,
        {"guidance_scale": 1.5, "model": None},
        "guidance",
        {"scale": 1.5},
        given={"unconditional": "other"},
    ),
    "guidance_1": case(
        "UnbatchedClassifierFreeGuidance" + P,
        {"guidance_scale": 1, "model": None},
        "guidance",
        {"scale": 1},
        given={"unconditional": "other"},
    ),
    "guidance_of_halves": case(
        "ClassifierFreeGuidance" + P,
        {"guidance_scale": 3.0},
        "guidance_of_halves",
        {"scale": 3.0},
        scores="halves",
    ),
    "dia_guidance": case(
        "DiaClassifierFreeGuidance" + P, {"guidance_scale": 3.0}, "dia_guidance", {"scale": 3.0}, scores="halves"
    ),
    "dia_guidance_top_k": case(
        "DiaClassifierFreeGuidance" + P,
        {"guidance_scale": 3.0, "guidance_top_k": 5},
        "dia_guidance",
        {"scale": 3.0, "top_k": 5},
        scores="halves",
    ),
    "dia_eos_filter": case(
        "DiaEOSChannelFilter" + P,
        {"num_channels": 3, "eos_token_id": 7},
        "dia_eos_filter",
        {"num_channels": 3, "eos_token_id": 7},
    ),
    "dia_eos_filter_end": case(
        "DiaEOSChannelFilter" + P,
        {"num_channels": 1, "eos_token_id": 7},
        "dia_eos_filter",
        {"num_channels": 1, "eos_token_id": 7},
        scores="end",
    ),
    "alternating_codebooks": case(
        "AlternatingCodebooks" + P,
        {"input_start_len": PROMPT, "semantic_vocab_size": 5, "codebook_size": 10},
        "alternating_codebooks",
        {"start": PROMPT, "semantic_vocab_size": 5, "codebook_size": 10},
    ),
    "bark_eos": case(
        "BarkEosPrioritizer" + P,
        {"eos_token_id": [7, 9], "min_eos_p": 0.2},
        "bark_eos",
        {"eos_token_id": [7, 9], "min_probability": 0.2},
        scores="end",
    ),
    "whisper_timestamps": case(
        "WhisperTimeStamp" + P,
        {"generate_config": "whisper", "begin_index": 3},
        "whisper_timestamps",
        {"no_timestamps_token_id": 13, "eos_token_id": 10, "begin": 3, "max_initial_timestamp_index": 3},
        texts="stamped",
        lengths=tuple(range(3, 15)),
    ),
    "whisper_timestamps_plain": case(
        "WhisperTimeStamp" + P,
        {"generate_config": "whisper", "begin_index": 4, "_detect_timestamp_from_logprob": False},
        "whisper_timestamps",
        {
            "no_timestamps_token_id": 13,
            "eos_token_id": 10,
            "begin": 4,
            "max_initial_timestamp_index": 3,
            "detect_from_logprob": False,
        },
        texts="stamped",
        lengths=tuple(range(4, 15)),
    ),
    "green_left": case("Watermark" + P, {"vocab_size": VOCABULARY, "device": "cpu"}, "green_list", {"config": {}}),
    "green_left_width": case(
        "Watermark" + P,
        {
            "vocab_size": VOCABULARY,
            "device": "cpu",
            "greenlist_ratio": 0.6,
            "context_width": 3,
            "hashing_key": 2**32 - 5,
        },
        "green_list",
        {"config": {"greenlist_ratio": 0.6, "context_width": 3, "hashing_key": 2**32 - 5}},
    ),
    "green_self": case(
        "Watermark" + P,
        {"vocab_size": 61, "device": "cpu", "seeding_scheme": "selfhash", "bias": 1.5},
        "green_list",
        {"config": {"seeding_scheme": "selfhash", "bias": 1.5}},
        scores="wide",
    ),
    "green_self_width": case(
        "Watermark" + P,
        {"vocab_size": 61, "device": "cpu", "seeding_scheme": "selfhash", "context_width": 4, "greenlist_ratio": 0.5},
        "green_list",
        {"config": {"seeding_scheme": "selfhash", "context_width": 4, "greenlist_ratio": 0.5}},
        scores="wide",
    ),
    "synthid": case(
        "SynthIDTextWatermark" + P,
        SYNTHID | STATIC,
        "synthid",
        {"config": SYNTHID | STATIC},
        scores="ruled_out",
        lengths=tuple(range(PROMPT, 15)),
    ),
    "synthid_forgetful": case(
        "SynthIDTextWatermark" + P,
        SYNTHID | {"context_history_size": 2, "sampling_table_size": 1024},
        "synthid",
        {"config": SYNTHID | {"context_history_size": 2, "sampling_table_size": 1024}},
        lengths=tuple(range(PROMPT, 15)),
    ),
    "synthid_skip": case(
        "SynthIDTextWatermark" + P,
        SYNTHID | STATIC | {"skip_first_ngram_calls": True, "debug_mode": True},
        "synthid",
        {"config": SYNTHID | STATIC | {"skip_first_ngram_calls": True, "debug_mode": True}},
        lengths=tuple(range(PROMPT, 15)),
    ),
}
for _name, _cls, _key, _ours, _arg, _values in (
    ("top_k", "TopKLogitsWarper", "top_k", "top_k", "k", (1, 5, 500)),
    ("top_p", "TopPLogitsWarper", "top_p", "top_p", "p", (0.0, 0.35, 0.9)),
    ("min_p", "MinPLogitsWarper", "min_p", "min_p", "p", (0.02, 0.3, 1.0)),
    ("typical", "TypicalLogitsWarper", "mass", "typical", "mass", (0.2, 0.6, 0.95)),
    ("epsilon", "EpsilonLogitsWarper", "epsilon", "epsilon", "cutoff", (3e-4, 0.02, 0.9)),
    ("eta", "EtaLogitsWarper", "epsilon", "eta", "cutoff", (3e-4, 0.05, 0.9)),
):
    for _i, _value in enumerate(_values):
        for _keep in (1, 3):
            CASES[f"{_name}_{_i}_{_keep}"] = case(
                _cls,
                {_key: _value, "min_tokens_to_keep": _keep},
                _ours,
                {_arg: _value, "min_tokens_to_keep": _keep},
                scores="ruled_out" if _keep == 3 and _i < 2 else "plain",
                lengths=(5, 9),
            )
CASES["top_p_filter"] = case(
    "TopPLogitsWarper", {"top_p": 0.5, "filter_value": -77.0}, "top_p", {"p": 0.5, "filter_value": -77.0}, lengths=(5,)
)
_T = texts()
_BIAS = {
    (5,): 2.5,
    (int(_T[0, 7]), 8): -3.0,
    (int(_T[1, 12]), 8): 1.25,
    (*map(int, _T[2, 9:13]), 8): 0.5,
    tuple(map(int, _T[0, :5])): 4.0,
    (28, 28, 28): -9.0,
}
CASES["sequence_bias"] = case(
    "SequenceBias" + P, {"sequence_bias": _BIAS}, "sequence_bias", {"bias": _BIAS}, lengths=tuple(range(1, 15))
)
CASES["sequence_bias_list"] = case(
    "SequenceBias" + P,
    {"sequence_bias": [[list(key), value] for key, value in _BIAS.items()]},
    "sequence_bias",
    {"bias": [[list(key), value] for key, value in _BIAS.items()]},
)
_WORDS = [[5], [7], *(list(key) for key in _BIAS if len(key) > 1)]
CASES["bad_words"] = case(
    "NoBadWords" + P,
    {"bad_words_ids": _WORDS, "eos_token_id": [7]},
    "bad_words",
    {"words": _WORDS, "eos_token_id": [7]},
    lengths=tuple(range(1, 15)),
)

STATEFUL = ("SynthIDTextWatermark" + P,)

# Lists of processors: settings -> what a whole list makes.
LISTS: dict[str, dict[str, Any]] = {
    "greedy": {
        "sequence_bias": [[[5, 6], -2.5], [[8], 1.5]],
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 2,
        "encoder_repetition_penalty": 1.1,
        "bad_words_ids": [[9], [5, 3]],
        "min_length": 9,
        "min_new_tokens": 3,
        "forced_bos_token_id": 4,
        "forced_eos_token_id": 7,
        "max_length": 14,
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": (2, 1.05),
        "suppress_tokens": [2],
        "begin_suppress_tokens": [1, 4],
        "eos_token_id": [7, 8],
        "renormalize_logits": True,
    },
    "sample": {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.97,
        "epsilon_cutoff": 1e-3,
        "eta_cutoff": 2e-3,
        "repetition_penalty": 1.1,
        "watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash"},
        "renormalize_logits": True,
        "eos_token_id": 7,
    },
    "beam_sample": {"do_sample": True, "num_beams": 3, "top_k": 1, "top_p": 0.2, "eos_token_id": [7, 8, 9]},
    "beam_sample_endless": {"do_sample": True, "num_beams": 3, "top_k": 1, "top_p": 0.2},
}

STRINGS = {
    "one": ["stop"],
    "several": ["</s>", "ab", "\n\n"],
    "overlap": ["aab", "abab"],
    "long": ["the end is near", "xx"],
    "repeated": ["aaa"],
}
PIECES = (
    *("a", "b", "aa", "ab", "ba", "aab", "abab", "s", "st", "sto", "stop", "stopp", "top", "op", "o", "p", "nonstop"),
    *(
        "</",
        "s>",
        "</s>x",
        ">",
        "\n",
        "\n\n",
        "x\n",
        "",
        "the",
        " end",
        " is",
        " near",
        " n",
        "ear",
        "the end",
        "xx",
        "x",
    ),
    *("unstoppable", "a</s", "baab", "aaaa"),
)


def pieces() -> np.ndarray:
    """Texts [600, 9] of `PIECES`, by their numbers, and now and then of a token that there is not."""
    random = np.random.RandomState(5)
    out = random.randint(0, len(PIECES), (600, 9))
    out[:200] = random.randint(0, 7, (200, 9))
    out[200:300] = random.randint(7, 16, (100, 9))
    out[300:400] = random.randint(16, 24, (100, 9))
    out[400:500, -6:] = random.randint(24, 32, (100, 6))
    out[400:450, -4:] = [PIECES.index(piece) for piece in ("the", " end", " is", " near")]
    out[:450, 2] = np.where(random.rand(450) < 0.1, PIECES.index(""), out[:450, 2])
    return np.where(random.rand(*out.shape) < 0.01, len(PIECES) + 3, out).astype(np.int32)


# Settings as `save_pretrained` writes them.
SAVED: dict[str, dict[str, Any]] = {
    "default": {},
    "special": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 32007], "decoder_start_token_id": 0},
    "sample": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "max_length": 4096},
    "equal": {"temperature": 1, "top_k": 50.0, "num_beams": 1},
    "beams": {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0, "num_return_sequences": 2},
    "null": {"temperature": None, "top_k": None, "max_length": None, "use_cache": None},
    "words": {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [1, 2], "exponential_decay_length_penalty": (5, 1.1)},
    "bias": {"sequence_bias": {(5, 6): -1.5, (7,): 2.0}},
    "bias_list": {"sequence_bias": [[[5, 6], -1.5]]},
    "watermark": {"watermarking_config": {"bias": 3.0, "seeding_scheme": "selfhash", "context_width": 2}},
    "strings": {"stop_strings": ["x", "naïve"], "max_time": 3.5},
    "cache": {"cache_implementation": "static", "cache_config": {"max_cache_len": 64}, "num_assistant_tokens": 5},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "whisper": {"no_timestamps_token_id": 50363, "lang_to_id": {"<|en|>": 50259}, "is_multilingual": True},
    "moved": {"penalty_alpha": 0.6, "top_k": 4, "do_sample": True, "dola_layers": "high", "low_memory": True},
}

# Settings that are refused, told of, or fine.
CHECKED: list[dict[str, Any]] = [
    {},
    {"early_stopping": "sometimes"},
    {"early_stopping": "never", "num_beams": 2},
    {"early_stopping": True},
    {"max_new_tokens": 0},
    {"max_new_tokens": -3},
    {"max_new_tokens": 1},
    {"pad_token_id": -1},
    {"cache_implementation": "unknown"},
    {"cache_implementation": "hybrid"},
    {"compile_config": {"mode": "default"}},
    {"watermarking_config": {"seeding_scheme": "righthash"}},
    {"watermarking_config": {"greenlist_ratio": 1.5}},
    {"watermarking_config": {"context_width": 0}},
    {"watermarking_config": {}},
    {"temperature": 0.7},
    {"temperature": 0.7, "do_sample": True},
    {"top_p": 0.9, "min_p": 0.1, "typical_p": 0.5, "top_k": 3, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    {"top_p": None, "temperature": None, "top_k": None},
    {"length_penalty": 2.0},
    {"length_penalty": 2.0, "num_beams": 3},
    {"num_return_sequences": 2},
    {"num_return_sequences": 2, "do_sample": True},
    {"num_return_sequences": 3, "num_beams": 2},
    {"num_return_sequences": 2, "num_beams": 2},
    {"use_cache": False, "cache_implementation": "static", "cache_config": {}, "return_legacy_cache": True},
    {"use_cache": None, "cache_implementation": "static"},
    {"output_scores": True, "output_logits": True, "output_attentions": True},
    {"output_scores": True, "return_dict_in_generate": True},
    {"streamer": None},
    {"logits_processor": []},
    {"assistant_model": "x"},
    {"something_else": 1},
]

MODES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({}, True),
    ({"do_sample": True}, False),
    ({"do_sample": True}, True),
    ({"num_beams": 3}, False),
    ({"num_beams": 3}, True),
    ({"num_beams": 3, "do_sample": True}, False),
    ({"num_beams": 4, "num_beam_groups": 2}, False),
    ({"num_beams": 4, "num_beam_groups": 2, "do_sample": True}, False),
    ({"num_beam_groups": 2}, False),
    ({"force_words_ids": [[5]], "num_beams": 2}, False),
    ({"force_words_ids": [[5]]}, False),
    ({"constraints": []}, False),
    ({"penalty_alpha": 0.6, "top_k": 4}, False),
    ({"penalty_alpha": 0.6, "top_k": 4}, True),
    ({"penalty_alpha": 0.6, "top_k": 1}, False),
    ({"penalty_alpha": 0.0}, False),
    ({"penalty_alpha": 0.6, "do_sample": True}, False),
    ({"penalty_alpha": 0.6, "top_k": None}, False),
    ({"dola_layers": "low"}, False),
    ({"dola_layers": [2, 4], "do_sample": True}, False),
    ({"dola_layers": "low", "num_beams": 2}, False),
    ({"dola_layers": "low"}, True),
    ({"prompt_lookup_num_tokens": 3}, False),
    ({"assistant_early_exit": 2, "do_sample": True}, False),
    ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, False),
]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {}),
    "t5": ("T5Config", {"decoder_start_token_id": 0}),
    "bart": (
        "BartConfig",
        {"num_beams": 4, "no_repeat_ngram_size": 3, "early_stopping": True, "forced_bos_token_id": 0},
    ),
    "llama": ("LlamaConfig", {"max_length": 64, "temperature": 0.5, "do_sample": True, "use_cache": False}),
    "whisper": ("WhisperConfig", {"output_attentions": True, "suppress_tokens": [1, 2]}),
}


# -------------------------------------------------------------------------------------------------------- the reference


def given_scores(kind: str, length: int) -> np.ndarray:
    """The scores of a case, by the name of their kind."""
    if kind == "halves":
        return halves(length)
    if kind == "wide":
        return (3 * np.random.RandomState(300 + length).randn(ROWS, 61)).astype(np.float32)
    return scores(kind, length)


def given_texts(kind: str) -> np.ndarray:
    """The texts of a case, by the name of their kind."""
    return STAMPED if kind == "stamped" else texts()


def processed() -> dict[str, np.ndarray]:
    """What every processor makes of the scores, at several lengths of the text: "case.length" -> [B, V]."""
    import torch
    from transformers.generation import logits_process

    out = {}
    special = {
        "encoder": torch.from_numpy(ENCODER).long(),
        "allowed": lambda row, text: allowed(row, text.tolist()),
        "whisper": SimpleNamespace(**WHISPER),
    }
    for name, one in CASES.items():
        if one["class"].startswith("SynthID"):
            one = one | {"reference": one["reference"] | {"device": "cpu"}}
        arguments = {
            key: special.get(value, value) if isinstance(value, str) else value
            for key, value in one["reference"].items()
        }
        made = getattr(logits_process, one["class"])(**arguments)
        for length in one.get("lengths", LENGTHS):
            ids = torch.from_numpy(given_texts(one.get("texts", "plain"))[:, :length]).long()
            values = torch.from_numpy(given_scores(one.get("scores", "plain"), length).copy())
            if "beam_group" in one.get("given", {}):
                group = one["given"]["beam_group"]
                tokens = torch.tensor(one["given"]["current_tokens"])
                got = made(ids, values, current_tokens=tokens, beam_group_idx=group)
            elif "unconditional" in one.get("given", {}):
                other = torch.from_numpy(given_scores("plain", length + 50))
                made.get_unconditional_logits = lambda ids, other=other: other[:, None]
                got = made(ids, values)
            else:
                got = made(ids, values)
            out[f"{name}.{length}"] = got.numpy()
    return out


def delayed() -> dict[str, np.ndarray]:
    """Dia's delayed ends, step by step, each first choice being the next token."""
    import torch
    from transformers.generation import logits_process

    made = logits_process.DiaEOSDelayPatternLogitsProcessor([0, 2, 3], 7, 14)
    first = logits_process.DiaEOSChannelFilterLogitsProcessor(3, 7)
    ids = torch.from_numpy(CHANNELS[:, :4]).long()
    out = {}
    for step in range(6):
        values = torch.from_numpy(given_scores("plain", step).copy())
        if step == 2:
            values[0, 7] = 30.0
        got = made(ids, first(ids, values))
        out[f"dia.{step}"] = got.numpy().copy()
        ids = torch.cat([ids, got.argmax(-1)[:, None]], 1)
    out["dia.ids"] = ids.numpy().astype(np.int32)
    return out


def listed() -> dict[str, np.ndarray]:
    """What the lists of processors make that settings ask for, and the names of their classes."""
    import torch
    import transformers
    from transformers.generation.utils import GenerationMixin

    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY)))
    model._merge_criteria_processor_list = lambda a, b: GenerationMixin._merge_criteria_processor_list(model, a, b)
    out: dict[str, np.ndarray] = {}
    for name, settings in LISTS.items():
        config = transformers.GenerationConfig(**settings)
        eos = config.eos_token_id
        config._eos_token_tensor = None if eos is None else torch.tensor([eos] if isinstance(eos, int) else eos)
        made = GenerationMixin._get_logits_processor(
            model,
            generation_config=config,
            input_ids_seq_length=PROMPT,
            encoder_input_ids=torch.from_numpy(ENCODER).long(),
            device="cpu",
        )
        out[f"{name}.classes"] = np.asarray([type(one).__name__ for one in made])
        for length in (4, 5, 9, 13):
            ids = torch.from_numpy(texts()[:, :length]).long()
            out[f"{name}.{length}"] = made(ids, torch.from_numpy(scores("plain", length))).numpy()
    return out


def detected() -> dict[str, np.ndarray]:
    """What the detectors of watermarks find in made-up texts."""
    import torch
    from transformers.generation import logits_process, watermarking

    out: dict[str, np.ndarray] = {}
    ids = torch.from_numpy(np.random.RandomState(11).randint(0, 61, (4, 40))).long()
    # One text that is marked: always the likeliest green token.
    for name, settings in (
        (
            "left",
            {
                "greenlist_ratio": 0.25,
                "bias": 2.0,
                "hashing_key": 15485863,
                "seeding_scheme": "lefthash",
                "context_width": 1,
            },
        ),
        (
            "self",
            {"greenlist_ratio": 0.4, "bias": 2.0, "hashing_key": 77, "seeding_scheme": "selfhash", "context_width": 3},
        ),
    ):
        mark = logits_process.WatermarkLogitsProcessor(vocab_size=61, device="cpu", **(settings | {"bias": 100.0}))
        text = ids.clone()
        for i in range(5, 40):
            values = torch.from_numpy(np.random.RandomState(i).randn(1, 61).astype(np.float32))
            text[0, i] = mark(text[:1, :i], values)[0].argmax()
        text[:, 0] = 1
        out[f"{name}.ids"] = text.numpy().astype(np.int32)
        model = SimpleNamespace(bos_token_id=1, is_encoder_decoder=False, vocab_size=61)
        found = watermarking.WatermarkDetector(model, "cpu", settings)(text, return_dict=True)
        for key in (
            "num_tokens_scored",
            "num_green_tokens",
            "green_fraction",
            "z_score",
            "p_value",
            "prediction",
            "confidence",
        ):
            out[f"{name}.{key}"] = np.asarray(getattr(found, key))

    mark = logits_process.SynthIDTextWatermarkLogitsProcessor(**SYNTHID, context_history_size=7, device="cpu")
    text = torch.from_numpy(np.random.RandomState(12).randint(3, 6, (4, 30))).long()
    text[1, 20] = 9
    module = watermarking.BayesianDetectorModel(
        watermarking.BayesianDetectorConfig(watermarking_depth=4, base_rate=0.3)
    )
    random = np.random.RandomState(13)
    with torch.no_grad():
        module.likelihood_model_watermarked.beta.copy_(torch.from_numpy(random.randn(1, 1, 4).astype(np.float32)))
        module.likelihood_model_watermarked.delta.copy_(torch.from_numpy(random.randn(1, 1, 4, 4).astype(np.float32)))
    detector = watermarking.SynthIDTextWatermarkDetector(module, mark, SimpleNamespace(eos_token_id=9))
    with torch.no_grad():
        posterior = detector(text)[0].numpy()
    return out | {
        "synthid.ids": text.numpy().astype(np.int32),
        "synthid.g": mark.compute_g_values(text).numpy().astype(np.int8),
        "synthid.mask": mark.compute_context_repetition_mask(text).numpy(),
        "synthid.posterior": posterior,
        "synthid.beta": module.likelihood_model_watermarked.beta.detach().numpy(),
        "synthid.delta": module.likelihood_model_watermarked.delta.detach().numpy(),
    }


def stopped() -> dict[str, np.ndarray]:
    """What the criteria say."""
    import torch
    import transformers
    from transformers.generation import stopping_criteria

    out: dict[str, np.ndarray] = {}
    for length in LENGTHS:
        ids = torch.from_numpy(texts()[:, :length]).long()
        out[f"max_length.{length}"] = stopping_criteria.MaxLengthCriteria(9)(ids, None).numpy()
        out[f"eos.{length}"] = stopping_criteria.EosTokenCriteria([4, int(texts()[2, 8])])(ids, None).numpy()
        out[f"confidence.{length}"] = np.asarray(
            [
                bool(
                    stopping_criteria.ConfidenceCriteria(0.004)(
                        ids[row : row + 1], torch.from_numpy(scores()[row])[None, None]
                    )
                )
                for row in range(ROWS)
            ]
        )
    # The tables of the reference, from the texts of our tokens.
    for name, strings in STRINGS.items():
        made = object.__new__(stopping_criteria.StopStringCriteria)
        made.stop_strings = tuple(strings)
        table, positions, ends = made._stop_string_create_embedding_vec(
            PIECES, tuple(range(len(PIECES))), made.stop_strings
        )
        made.embedding_vec, made.max_valid_positions, made.max_valid_end_lens = table, positions, ends
        made.maximum_token_len = max(map(len, strings))
        made.num_stop_strings = len(strings)
        made.target_lens = torch.tensor([len(one) for one in strings], dtype=torch.int32)
        for length in (1, 2, 6, 9):
            out[f"strings.{name}.{length}"] = made(torch.from_numpy(pieces()[:, :length]).long(), None).numpy()
    # The other tokenizer there is does not know the letters that the reference puts before a token.
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE.parent / "data" / "text" / "bytelevel")
    tokens, indices = stopping_criteria.StopStringCriteria.clean_tokenizer_vocab(tokenizer)
    by_id = dict(zip(indices, tokens, strict=True))
    out["texts"] = np.asarray(json.dumps([by_id.get(i) for i in range(max(by_id) + 1)]))
    return out


def settings() -> dict[str, Any]:
    """What the reference does with settings."""
    import transformers
    from transformers.generation import GenerationConfig, logits_process, stopping_criteria, watermarking

    saved: dict[str, str] = {}
    checked: list[Any] = []
    for name, values in SAVED.items():
        with tempfile.TemporaryDirectory() as folder:
            GenerationConfig(**values).save_pretrained(folder)
            saved[name] = (Path(folder) / "generation_config.json").read_text()
    for values in CHECKED:
        try:
            made = GenerationConfig(**values)
        except ValueError:
            checked.append("refused")
            continue
        try:
            made.validate(strict=True)
            checked.append([])
        except ValueError as error:
            checked.append(re.findall(r"^- `(\w+)`", str(error), re.MULTILINE))
    modes = [
        GenerationConfig(**values).get_generation_mode(object() if other else None).value for values, other in MODES
    ]
    models = {}
    for name, (cls, values) in MODELS.items():
        config = getattr(transformers, cls)(**values)
        with tempfile.TemporaryDirectory() as folder:
            # As old checkpoints have it: settings of generation in config.json.
            text = config.to_dict()
        made = GenerationConfig.from_model_config(config)
        models[name] = {"config": text, "made": made.to_diff_dict()}
    composite = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(), transformers.BertConfig(bos_token_id=5, num_beams=3, output_attentions=True)
    )
    models["composite"] = {
        "config": composite.to_dict(),
        "made": GenerationConfig.from_model_config(composite).to_diff_dict(),
    }
    exported = (Path(transformers.__file__).parent / "generation" / "__init__.py").read_text()
    kinds = (
        r'"(\w*(?:LogitsProcessor|LogitsProcessorList|Warper|Criteria|CriteriaList|Penalty|Normalization|Detector))"'
    )
    classes = set(re.findall(kinds, exported))
    for module, base in (
        (logits_process, logits_process.LogitsProcessor),
        (stopping_criteria, stopping_criteria.StoppingCriteria),
    ):
        classes |= {name for name, one in vars(module).items() if isinstance(one, type) and issubclass(one, base)}
    classes |= {name for name in vars(watermarking) if name.endswith("Detector")}
    defaults = GenerationConfig().to_dict()
    return {
        "saved": saved,
        "checked": checked,
        "modes": modes,
        "models": models,
        "classes": sorted(classes),
        "defaults": defaults,
    }


def main() -> int:
    """Writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    parser.add_argument("--any-version", action="store_true", help="use whatever version of the reference is here")
    options = parser.parse_args()
    if not options.any_version:
        from oracle.make_goldens import refuse_other_versions

        refuse_other_versions()
    import torch

    torch.set_num_threads(1)
    DATA.mkdir(exist_ok=True)
    arrays = {"processors": processed() | delayed(), "lists": listed(), "watermarks": detected(), "stopping": stopped()}
    text = json.dumps(settings(), indent=1, sort_keys=True) + "\n"
    if not options.check:
        for name, content in arrays.items():
            np.savez_compressed(DATA / f"{name}.npz", allow_pickle=False, **content)
        (DATA / "settings.json").write_text(text)
        return 0
    different = []
    for name, content in arrays.items():
        with np.load(DATA / f"{name}.npz") as before:
            for key in sorted({*before, *content}):
                if key not in before or key not in content:
                    different.append(f"{name}: {key} is in one alone")
                elif content[key].dtype.kind == "U":
                    if (before[key] != content[key]).any():
                        different.append(f"{name}: {key} differs")
                elif not np.allclose(before[key], content[key], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                    different.append(f"{name}: {key} differs")
    if (DATA / "settings.json").read_text() != text:
        different.append("settings.json differs")
    print("\n".join(different) or "no difference")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
