"""Processors and criteria under the names that transformers has for them, for scripts that make lists of them.

    from formax.compat.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

    process = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)])
    scores = process(input_ids, scores)                         # PyTorch's; Flax's and TensorFlow's have cur_len, too
    model.generate(input_ids, logits_processor=process)

Each is a rule of `formax.generation` with the arguments of the old class. `formax.compat.flax` and `formax.compat.tf`
have them with "Flax" and "TF" before the name. All of them do what PyTorch's do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from formax.generation import processors, stopping, watermark
from formax.generation.config import SynthIDTextWatermarkingConfig, WatermarkingConfig
from formax.generation.state import Rule, Tokens

# -------------------------------------------------------------------------------------------------------------- classes


class Legacy:
    """A rule under an old name.

    Attributes:
        rule: what it does; None of a class of your own, which has a `__call__` instead.
    """

    rule: Any = None
    made: Callable[..., Any]
    # The arguments of the class, in their order, and how the constructor of the rule calls them.
    arguments: Mapping[str, str]

    def __init__(self, *args: Any, **given: Any) -> None:
        """Takes the arguments of the old class, which are its attributes then.

        Raises:
            TypeError: too many, one twice, or one that there is not.
            ValueError: as the rule's constructor.
        """
        if not hasattr(type(self), "made"):
            return
        named = dict(zip(self.arguments, args, strict=False))
        if len(args) > len(self.arguments) or named.keys() & given.keys() or given.keys() - self.arguments.keys():
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.arguments) or 'no arguments'}, each once")
        named |= given
        vars(self).update(named)
        ours = {self.arguments[name]: value for name, value in named.items() if value is not None}
        self.rule = type(self).made(**{name: value for name, value in ours.items() if name})

    def __call__(self, input_ids: Any, scores: Any, cur_len: Any = None, **given: Any) -> Any:
        """Applies the rule.

        Args:
            input_ids: int [B, T], the text so far; a state of `formax.generation` goes, too.
            scores: float [B, V].
            cur_len: how much of `input_ids` is text; all of it by default.
            **given: what the old class wants besides (`current_tokens`, `beam_group_idx`).

        Raises:
            NotImplementedError: a class of your own without this method.
        """
        if self.rule is None:
            raise NotImplementedError(f"{type(self).__name__} needs a __call__(input_ids, scores) of its own")
        scores = jnp.asarray(scores)
        state = input_ids if isinstance(input_ids, Tokens) else self._state(input_ids, cur_len, len(scores))
        if isinstance(self.rule, stopping.MaxTime):
            return jnp.full(len(state.ids), self.rule())
        return self.rule(state, scores, **{GIVEN.get(name, name): value for name, value in given.items()})

    def _state(self, input_ids: Any, cur_len: Any, rows: int) -> Tokens:
        ids = jnp.zeros((rows, 0), jnp.int32) if input_ids is None else jnp.asarray(input_ids, jnp.int32)
        length = jnp.asarray(ids.shape[1] if cur_len is None else cur_len, jnp.int32)
        # Only the penalty that grows with the new tokens asks where they begin, and it was told.
        return Tokens(ids, length, jnp.int32(0), jnp.asarray(getattr(self, "input_ids_seq_length", length), jnp.int32))

    def __repr__(self) -> str:
        told = [f"{name}={vars(self)[name]!r}" for name in getattr(self, "arguments", ()) if name in vars(self)]
        return f"{type(self).__name__}({', '.join(told)})"


class LogitsProcessor(Legacy):
    """What is done to scores. Classes of your own have a `__call__(input_ids, scores, cur_len)` that JAX can trace."""


class StoppingCriteria(Legacy):
    """When a text ends: bool [B]."""


class LogitsProcessorList(list[Any]):
    """Processors, one after the other."""

    def __call__(self, input_ids: Any, scores: Any, cur_len: Any = None, **given: Any) -> Any:
        """Scores [B, V] that all have been at; `given` goes to those that want more than the others."""
        for one in self:
            more = given if getattr(getattr(one, "rule", None), "needs", ()) else {}
            scores = one(input_ids, scores, *(() if cur_len is None else (cur_len,)), **more)
        return scores


class StoppingCriteriaList(list[Any]):
    """Criteria, one of which is enough."""

    def __call__(self, input_ids: Any, scores: Any, **given: Any) -> jax.Array:
        """Which texts have ended, bool [B]."""
        done = jnp.zeros(len(input_ids), bool)
        for one in self:
            done |= one(input_ids, scores, **given)
        return done

    @property
    def max_length(self) -> int | None:
        """What a criterion of the length says, if there is one."""
        return next((one.max_length for one in self if hasattr(one, "max_length")), None)


# ------------------------------------------------------------------------------------------------------------ the rules


def _forced_tokens(force_token_map: Any) -> Rule:
    """[[place, token], ...], where a token may be None."""
    return processors.forced_tokens({at: token for at, token in dict(force_token_map).items() if token is not None})


def _min_new_tokens(prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: Any) -> Rule:
    return processors.min_length(prompt_length_to_skip + min_new_tokens, eos_token_id)


def _decay(penalty: tuple[int, float], eos_token_id: Any) -> Rule:
    return processors.exponential_decay_length(penalty[0], penalty[1], eos_token_id)


def _green_list(vocab_size: int, **settings: Any) -> Rule:
    return watermark.green_list(WatermarkingConfig(**settings))


def _synthid(keys: Sequence[int], **settings: Any) -> Rule:
    return watermark.synthid(SynthIDTextWatermarkingConfig(keys=tuple(keys), **settings))


def _timestamps(config: Any, begin: int, detect: bool | None = None) -> Rule:
    """Of the settings of a Whisper."""
    end = config.eos_token_id if config.eos_token_id is not None else config.bos_token_id
    if detect is None:
        detect = getattr(config, "_detect_timestamp_from_logprob", True)
    latest = getattr(config, "max_initial_timestamp_index", None)
    no_stamps = config.no_timestamps_token_id
    return processors.whisper_timestamps(
        no_stamps, end, begin, max_initial_timestamp_index=latest, detect_from_logprob=detect
    )


def _timestamps_of_flax(config: Any, length: int, model_config: Any = None) -> Rule:
    """Flax counts from the decoder's prompt on: a token, and two more of a multilingual model."""
    return _timestamps(config, length + 1 + 2 * bool(getattr(config, "is_multilingual", False)))


# What a call hands in, where we call it otherwise.
GIVEN = {"beam_group_idx": "beam_group"}
_FILTER = "filter_value min_tokens_to_keep"
# Class -> what makes its rule, and the arguments of the class: "theirs" or "theirs=ours"; "theirs=" is not looked at.
PROCESSORS: dict[str, tuple[Callable[..., Any], str]] = {
    "AlternatingCodebooksLogitsProcessor": (
        processors.alternating_codebooks,
        "input_start_len=start semantic_vocab_size codebook_size",
    ),
    "BarkEosPrioritizerLogitsProcessor": (processors.bark_eos, "eos_token_id min_eos_p=min_probability device="),
    "ClassifierFreeGuidanceLogitsProcessor": (processors.guidance_of_halves, "guidance_scale=scale"),
    "DiaClassifierFreeGuidanceLogitsProcessor": (processors.dia_guidance, "guidance_scale=scale guidance_top_k=top_k"),
    "DiaEOSChannelFilterLogitsProcessor": (processors.dia_eos_filter, "num_channels eos_token_id"),
    "DiaEOSDelayPatternLogitsProcessor": (
        processors.dia_eos_delay,
        "delay_pattern eos_token_id max_generation_len=max_length device=",
    ),
    "EncoderNoRepeatNGramLogitsProcessor": (
        processors.encoder_no_repeat_ngram,
        "encoder_ngram_size=size encoder_input_ids=encoder_ids",
    ),
    "EncoderRepetitionPenaltyLogitsProcessor": (
        processors.encoder_repetition_penalty,
        "penalty encoder_input_ids=encoder_ids",
    ),
    "EpsilonLogitsWarper": (processors.epsilon, f"epsilon=cutoff {_FILTER}"),
    "EtaLogitsWarper": (processors.eta, f"epsilon=cutoff {_FILTER} device="),
    "ExponentialDecayLengthPenalty": (
        _decay,
        "exponential_decay_length_penalty=penalty eos_token_id input_ids_seq_length=",
    ),
    "FlaxWhisperTimeStampLogitsProcessor": (
        _timestamps_of_flax,
        "generate_config=config model_config decoder_input_length=length",
    ),
    "ForceTokensLogitsProcessor": (_forced_tokens, "force_token_map"),
    "ForcedBOSTokenLogitsProcessor": (processors.forced_bos, "bos_token_id=token_id"),
    "ForcedEOSTokenLogitsProcessor": (processors.forced_eos, "max_length eos_token_id=token_id device="),
    "HammingDiversityLogitsProcessor": (
        processors.hamming_diversity,
        "diversity_penalty=penalty num_beams num_beam_groups",
    ),
    "InfNanRemoveLogitsProcessor": (processors.remove_invalid, ""),
    "LogitNormalization": (processors.renormalize, ""),
    "MinLengthLogitsProcessor": (processors.min_length, "min_length=length eos_token_id device="),
    "MinNewTokensLengthLogitsProcessor": (
        _min_new_tokens,
        "prompt_length_to_skip min_new_tokens eos_token_id device=",
    ),
    "MinPLogitsWarper": (processors.min_p, f"min_p=p {_FILTER}"),
    "NoBadWordsLogitsProcessor": (processors.bad_words, "bad_words_ids=words eos_token_id"),
    "NoRepeatNGramLogitsProcessor": (processors.no_repeat_ngram, "ngram_size=size"),
    "PrefixConstrainedLogitsProcessor": (
        processors.prefix_allowed_tokens,
        "prefix_allowed_tokens_fn=allowed num_beams",
    ),
    "RepetitionPenaltyLogitsProcessor": (processors.repetition_penalty, "penalty prompt_ignore_length"),
    "SequenceBiasLogitsProcessor": (processors.sequence_bias, "sequence_bias=bias"),
    "SuppressTokensAtBeginLogitsProcessor": (
        processors.suppress_at_begin,
        "begin_suppress_tokens=ids begin_index=begin device=",
    ),
    "SuppressTokensLogitsProcessor": (processors.suppress_tokens, "suppress_tokens=ids device="),
    "SynthIDTextWatermarkLogitsProcessor": (
        _synthid,
        "ngram_len keys sampling_table_size sampling_table_seed context_history_size device= skip_first_ngram_calls "
        "debug_mode",
    ),
    "TemperatureLogitsWarper": (processors.temperature, "temperature=value"),
    "TopKLogitsWarper": (processors.top_k, f"top_k=k {_FILTER}"),
    "TopPLogitsWarper": (processors.top_p, f"top_p=p {_FILTER}"),
    "TypicalLogitsWarper": (processors.typical, f"mass {_FILTER}"),
    "WatermarkLogitsProcessor": (
        _green_list,
        "vocab_size device= greenlist_ratio bias hashing_key seeding_scheme context_width",
    ),
    "WhisperTimeStampLogitsProcessor": (
        _timestamps,
        "generate_config=config begin_index=begin _detect_timestamp_from_logprob=detect",
    ),
}
CRITERIA: dict[str, tuple[Callable[..., Any], str]] = {
    "ConfidenceCriteria": (stopping.confidence, "assistant_confidence_threshold=threshold"),
    "EosTokenCriteria": (stopping.eos, "eos_token_id=token_id"),
    "MaxLengthCriteria": (stopping.max_length, "max_length=length max_position_embeddings="),
    "MaxTimeCriteria": (stopping.MaxTime, "max_time=seconds initial_timestamp=start"),
    "StopStringCriteria": (stopping.stop_strings, "tokenizer=vocabulary stop_strings=strings"),
}
PLAIN: dict[str, Any] = {
    "LogitsProcessor": LogitsProcessor,
    "LogitsProcessorList": LogitsProcessorList,
    "LogitsWarper": LogitsProcessor,
    "StoppingCriteria": StoppingCriteria,
    "StoppingCriteriaList": StoppingCriteriaList,
}
# What PyTorch's has a second model for.
GUIDED = "UnbatchedClassifierFreeGuidanceLogitsProcessor"


def listed() -> list[str]:
    """The names that there are, without "Flax" or "TF"."""
    return [*PLAIN, *(name for name in PROCESSORS if not name.startswith("Flax")), *CRITERIA]


def find(name: str, prefix: str = "") -> Any:
    """The class of a name that begins with `prefix`; None if there is none.

    Raises:
        AttributeError: one that cannot be alone.
    """
    plain = name.removeprefix(prefix)
    if plain == GUIDED:
        raise AttributeError(f"{name} runs the model itself: give guidance_scale= to generate()")
    if plain in PLAIN:
        return PLAIN[plain]
    known = PROCESSORS.get(name) or PROCESSORS.get(plain) or CRITERIA.get(plain)
    return None if known is None else _class(name, plain in CRITERIA, *known)


@cache
def _class(name: str, is_criterion: bool, made: Callable[..., Any], arguments: str) -> type[Legacy]:
    pairs = (one.partition("=") for one in arguments.split())
    told = {theirs: ours if equals else theirs for theirs, equals, ours in pairs}
    fields = {"made": staticmethod(made), "arguments": told, "__module__": __name__, "__doc__": made.__doc__}
    return type(name, (StoppingCriteria if is_criterion else LogitsProcessor,), fields)


def __getattr__(name: str) -> Any:
    if (found := find(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *listed()})


# ------------------------------------------------------------------------------------------------------------ functions


def top_k_top_p_filtering(
    logits: Any, top_k: int = 0, top_p: float = 1.0, filter_value: float = -jnp.inf, min_tokens_to_keep: int = 1
) -> jax.Array:
    """Scores [B, V] with `filter_value` for what is not among the likeliest.

    Args:
        logits: the scores.
        top_k: how many stay; 0 for all.
        top_p: the probability that those which stay have together; 1 for all.
        filter_value: the score of the others.
        min_tokens_to_keep: how many stay in any case.
    """
    scores, keep = jnp.asarray(logits), min_tokens_to_keep
    state = Tokens.of(jnp.zeros((len(scores), 0), jnp.int32))
    if top_k > 0:
        scores = processors.top_k(top_k, filter_value=filter_value, min_tokens_to_keep=keep)(state, scores)
    if top_p < 1.0:
        scores = processors.top_p(top_p, filter_value=filter_value, min_tokens_to_keep=keep)(state, scores)
    return scores


@dataclass(frozen=True)
class ByLength:
    """A function `(input_ids [B, L], scores [B, V], cur_len)` of yours, where those of formax take a state."""

    function: Callable[..., Any]

    def __call__(self, state: Tokens, scores: jax.Array) -> jax.Array:
        """Calls it on a buffer in which the text begins with the first column."""
        return jnp.asarray(self.function(jnp.roll(state.ids, -state.first, axis=1), scores, state.count()))


def as_rules(given: Sequence[Any] | None) -> list[Rule]:
    """Processors of a call of Flax's or TensorFlow's `generate` as rules.

    Raises:
        TypeError: something that cannot be called.
    """
    return [_rule(one) for one in given or ()]


def _rule(one: Any) -> Rule:
    if isinstance(found := one if isinstance(one, Rule) else getattr(one, "rule", None), Rule):
        return found
    if not callable(one):
        raise TypeError(f"logits_processor takes processors, or functions (input_ids, scores, cur_len), got {one!r}")
    return processors.custom(ByLength(one))
