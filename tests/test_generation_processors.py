"""Processors of scores, alone and in `jit`, against the reference's.

Each case runs twice: as the reference has the text, closed over by a compiled function; and handed to one as an
argument, with filling before the text and other tokens behind it, which must not be looked at.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import programs
from jax import Array
from oracle import make_generation as oracle

from formax.core.config import ConfigError
from formax.generation import config as settings
from formax.generation import processors, state, stopping, watermark
from formax.generation.config import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
from formax.generation.processors import then
from formax.generation.state import Rule, Tokens

DATA = Path(__file__).parent / "data" / "generation"
TOLERANCE = 1e-6
# Differences that take the leading digits away: of two log-probabilities, and of 1 and the mass of a layer's winners.
LOOSER = {"guidance": 4e-6, "synthid": 1e-5, "synthid_forgetful": 1e-5}
BEFORE, BEHIND = 3, 2


@lru_cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def plain(ids: np.ndarray, length: int, prompt: int = oracle.PROMPT) -> Tokens:
    """The state as the reference has it: nothing before the text."""
    return Tokens(jnp.asarray(ids), jnp.int32(length), jnp.int32(0), jnp.int32(prompt))


def filled(ids: np.ndarray, length: int, prompt: int = oracle.PROMPT) -> Tokens:
    """The same text after filling; what is before and behind it are tokens that are in it too."""
    columns = (np.arange(BEFORE + oracle.SIZE + BEHIND) - BEFORE) % ids.shape[1]
    around = ids[:, columns].copy()
    around[:, BEFORE : BEFORE + length] = ids[:, :length]
    return Tokens(jnp.asarray(around), jnp.int32(length + BEFORE), jnp.int32(BEFORE), jnp.int32(prompt + BEFORE))


def made(case: dict[str, Any]) -> Rule:
    kwargs = dict(case["kwargs"])
    named: dict[str, Any] = {"encoder": oracle.ENCODER, "allowed": oracle.allowed}
    kwargs = {key: named.get(value, value) if isinstance(value, str) else value for key, value in kwargs.items()}
    if case["ours"] == "green_list":
        return watermark.green_list(WatermarkingConfig(**kwargs["config"]))
    if case["ours"] == "synthid":
        return watermark.synthid(SynthIDTextWatermarkingConfig(**kwargs["config"]))
    constructor: Callable[..., Rule] = getattr(processors, case["ours"])
    return constructor(**kwargs)


def given(case: dict[str, Any], length: int) -> dict[str, Any]:
    out = {}
    for key, value in case.get("given", {}).items():
        out[key] = jnp.asarray(oracle.given_scores("plain", length + 50) if value == "other" else value)
    return out


def same(got: Array, expected: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected), err_msg=what)
    tolerance = LOOSER.get(what.partition(" ")[0], TOLERANCE)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=what)


@jax.jit
def applied(process: Rule, tokens: Tokens, scores: Array, more: dict[str, Any]) -> Array:
    return process(tokens, scores, **more)


@pytest.mark.parametrize("name", oracle.CASES)
def test_equals_the_reference(name: str) -> None:
    case = oracle.CASES[name]
    process = made(case)
    closed = jax.jit(lambda tokens, scores, more: process(tokens, scores, **more))
    ids = oracle.given_texts(case.get("texts", "plain"))
    before = programs(applied)
    for length in case.get("lengths", oracle.LENGTHS):
        scores = jnp.asarray(oracle.given_scores(case.get("scores", "plain"), length))
        expected = golden("processors")[f"{name}.{length}"]
        more = given(case, length)
        same(closed(plain(ids, length), scores, more), expected, f"{name} at {length}")
        same(applied(process, filled(ids, length), scores, more), expected, f"{name} at {length}, after filling")
    assert programs(closed) == 1
    # One program for all lengths: as a case of equal shapes may have made it before, perhaps none.
    assert programs(applied) - before <= 1


def values(jaxpr: Any) -> Iterator[Any]:
    """Every value that a program makes on its way."""
    for equation in jaxpr.eqns:
        yield from (out.aval for out in equation.outvars)
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda one: hasattr(one, "eqns")):
            if hasattr(inner, "eqns"):
                yield from values(inner)


@pytest.mark.parametrize("name", oracle.CASES)
def test_nothing_grows_with_the_square_of_the_text(name: str) -> None:
    case = oracle.CASES[name]
    length = 1031
    tokens = Tokens.of(np.resize(oracle.texts(), (oracle.ROWS, length)), room=1)
    scores = jnp.asarray(oracle.given_scores(case.get("scores", "plain"), 5))
    program = jax.make_jaxpr(lambda tokens: made(case)(tokens, scores, **given(case, 5)))(tokens)
    sizes = [value.size for value in values(program)]
    assert sizes
    assert max(sizes) < length**2 / 4


def test_tokens() -> None:
    tokens = filled(oracle.texts(), 5)
    assert jnp.flatnonzero(tokens.written()).tolist() == [3, 4, 5, 6, 7]
    assert (int(tokens.count()), int(tokens.new())) == (5, 1)
    np.testing.assert_array_equal(tokens.last(3), oracle.texts()[:, 2:5])
    np.testing.assert_array_equal(tokens.last(6, missing=-7)[:, 0], [-7] * 3)
    assert Tokens.of([[1, 2, 3]], room=2, prompt=1).ids.tolist() == [[1, 2, 3, 0, 0]]
    assert int(Tokens.of([[1, 2, 3]], prompt=1).new()) == 2


def test_the_cases_do_something() -> None:
    """Every processor changes some scores, at some length, and what it makes is not the same at all lengths or rows."""
    for name, case in oracle.CASES.items():
        if case["class"].startswith("Unbatched") or name.endswith("_0") or name == "top_k_2_1" or name == "top_k_2_3":
            continue
        changed = [
            not np.array_equal(
                golden("processors")[f"{name}.{length}"], oracle.given_scores(case.get("scores", "plain"), length)
            )
            for length in case.get("lengths", oracle.LENGTHS)
        ]
        assert any(changed), name


def test_dia_ends_with_a_delay() -> None:
    process = then(processors.dia_eos_filter(3, 7), processors.dia_eos_delay([0, 2, 3], 7, 14))
    run = jax.jit(lambda tokens, scores: process(tokens, scores))
    ids = golden("processors")["dia.ids"]
    for step in range(6):
        scores = oracle.given_scores("plain", step)
        if step == 2:
            scores[0, 7] = 30.0
        same(run(plain(ids, 4 + step), jnp.asarray(scores)), golden("processors")[f"dia.{step}"], f"step {step}")
    assert [int(np.argmax(row == 7)) for row in ids[:, 4:]] == [2, 4, 5]


def test_dia_ends_where_there_is_no_more_room() -> None:
    process = processors.dia_eos_delay([0, 2, 3], 7, 10)
    ids = jnp.full((3, 12), 9)
    scores = jnp.asarray(oracle.given_scores("plain", 0)).at[:, 7].set(-9.0)
    for length, forced in ((5, []), (6, [0])):
        out = process(Tokens.of(ids[:, :length], room=2, prompt=4), scores)
        assert [i for i in range(3) if out[i, 7] == 0] == forced
    ended = Tokens.of(ids[:, :9].at[0, 6].set(7), room=2, prompt=4)
    assert [i for i in range(3) if process(ended, scores)[i, 7] == 0] == [2]


@pytest.mark.parametrize("name", oracle.LISTS)
def test_lists_are_the_reference_s(name: str) -> None:
    config = GenerationConfig(**oracle.LISTS[name])
    listed = processors.processors_of(config, encoder_ids=oracle.ENCODER)
    counterparts = [COUNTERPARTS[str(cls)].rpartition(".")[2] for cls in golden("lists")[f"{name}.classes"]]
    assert [one.name for one in listed] == counterparts
    run = jax.jit(lambda tokens, scores: then(*listed)(tokens, scores))
    for length in (4, 5, 9, 13):
        expected = golden("lists")[f"{name}.{length}"]
        # Where nothing is left, probabilities of the rest are 0 / 0 in both.
        got = run(filled(oracle.texts(), length), jnp.asarray(oracle.scores("plain", length)))
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
        np.testing.assert_allclose(got, expected, rtol=5e-6, atol=5e-6)


def test_lists_take_what_their_processors_need() -> None:
    config = GenerationConfig(guidance_scale=2.0, min_length=3, eos_token_id=7)
    process = then(*processors.processors_of(config))
    assert process.needs == ("unconditional",)
    scores = jnp.asarray(oracle.scores())
    with pytest.raises(TypeError, match="then needs unconditional="):
        process(plain(oracle.texts(), 5), scores)
    assert process(plain(oracle.texts(), 5), scores, unconditional=scores).shape == scores.shape


def test_an_end_that_is_ruled_out_does_not_become_likelier() -> None:
    config = GenerationConfig(min_length=12, eos_token_id=7, exponential_decay_length_penalty=(1, 1.5))
    run = then(*processors.processors_of(config))
    scores = jnp.asarray(oracle.scores())
    tokens = Tokens.of(oracle.texts()[:, :9], prompt=2)
    np.testing.assert_array_equal(run(tokens, scores), scores.at[:, 7].set(-jnp.inf))


def test_own_processors_go_before_those_of_sampling() -> None:
    mine = processors.custom(lambda tokens, scores: scores + 1, "mine")
    config = GenerationConfig(do_sample=True, repetition_penalty=2.0, renormalize_logits=True)
    names = [one.name for one in processors.processors_of(config, also=[mine])]
    assert names == ["repetition_penalty", "mine", "top_k", "renormalize"]
    assert (mine(plain(oracle.texts(), 5), jnp.zeros((3, 29))) == 1).all()


def test_forced_tokens() -> None:
    process = processors.forced_tokens({5: 11, 9: 12})
    scores = jnp.asarray(oracle.scores())
    for length, token in ((5, 11), (9, 12)):
        out = jax.jit(process)(filled(oracle.texts(), length), scores)
        assert (out.argmax(-1) == token).all()
        assert (jnp.isfinite(out).sum(-1) == 1).all()
    assert (jax.jit(process)(filled(oracle.texts(), 8), scores) == scores).all()


def test_no_speech_probability() -> None:
    scores = jnp.asarray(oracle.scores())
    expected = jax.nn.softmax(scores, axis=-1)[:, 4]
    assert jnp.allclose(processors.no_speech_probability(scores, 4), expected)
    logs = jax.nn.log_softmax(scores, axis=-1)
    assert jnp.allclose(processors.no_speech_probability(logs, 4, are_logprobs=True), expected)


# ------------------------------------------------------------------------------------------------------------ strengths

STRENGTHS: list[tuple[Callable[[Any], Rule], list[Any]]] = [
    (processors.temperature, [0.5, 2.0]),
    (processors.top_p, [0.3, 0.8]),
    (processors.top_k, [2, 7]),
    (processors.min_p, [0.1, 0.4]),
    (processors.typical, [0.3, 0.7]),
    (processors.epsilon, [0.01, 0.1]),
    (processors.eta, [0.01, 0.1]),
    (processors.repetition_penalty, [1.5, 3.0]),
    (lambda n: processors.min_length(n, 7), [4, 12]),
    (lambda n: processors.min_new_tokens(n, 7), [1, 12]),
    (lambda n: processors.forced_eos(7, max_length=n), [4, 6]),
    (lambda n: processors.exponential_decay_length(n, 1.1, 7), [1, -3]),
    (lambda b: processors.sequence_bias({(5,): b, (3, 4): b}), [0.5, 2.0]),
    (lambda b: watermark.green_list(WatermarkingConfig(bias=b)), [0.5, 2.0]),
]


@pytest.mark.parametrize(("constructor", "values"), STRENGTHS)
def test_other_strengths_are_the_same_program(constructor: Callable[[Any], Rule], values: list[Any]) -> None:
    scores = jnp.asarray(oracle.scores())
    tokens = plain(oracle.texts(), 5)
    run = jax.jit(lambda process, tokens, scores: process(tokens, scores))
    for value in values:
        expected = constructor(value)(tokens, scores)
        same(run(constructor(value), tokens, scores), np.asarray(expected), f"{value}")
    assert programs(run) == 1
    first, second = (constructor(value)(tokens, scores) for value in values)
    assert not np.array_equal(first, second)


def test_constructors_take_traced_strengths() -> None:
    @jax.jit
    def run(t: Array, p: Array, k: Array, scores: Array) -> Array:
        return then(processors.temperature(t), processors.top_k(k), processors.top_p(p))(
            plain(oracle.texts(), 5), scores
        )

    scores = jnp.asarray(oracle.scores())
    for t, p, k in ((0.7, 0.9, 9), (1.4, 0.5, 3)):
        process = then(processors.temperature(t), processors.top_k(k), processors.top_p(p))
        same(run(t, p, k, scores), np.asarray(process(plain(oracle.texts(), 5), scores)), f"{t}, {p}, {k}")
    assert programs(run) == 1


# ----------------------------------------------------------------------------------------------------------- watermarks


@pytest.mark.parametrize("size", [(50, 1), (50, 7), (50, 50), (1500, 1400)])
def test_shuffles_are_those_of_the_twister(size: tuple[int, int]) -> None:
    """Against the shuffle taken step by step, with the same numbers from NumPy."""
    whole, count = size
    seeds = [0, 1, 2**32 - 1, 15485863]
    got = np.asarray(jax.jit(watermark.shuffled, static_argnums=(1, 2))(jnp.asarray(seeds, jnp.uint32), whole, count))
    for seed, row in zip(seeds, got, strict=True):
        twister = np.random.MT19937()
        twister._legacy_seeding(seed)
        draws = twister.random_raw(count)
        values = list(range(whole))
        for i in range(count):
            j = i + int(draws[i]) % (whole - i)
            values[i], values[j] = values[j], values[i]
        assert row.tolist() == values[:count]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("left", WatermarkingConfig()),
        (
            "self",
            WatermarkingConfig(greenlist_ratio=0.4, hashing_key=77, seeding_scheme="selfhash", context_width=3),
        ),
    ],
)
def test_detector_equals_the_reference(name: str, config: WatermarkingConfig) -> None:
    ids = golden("watermarks")[f"{name}.ids"]
    report = watermark.WatermarkDetector(config, vocab_size=61, bos_token_id=1)(ids)
    for key in vars(report):
        np.testing.assert_allclose(getattr(report, key), golden("watermarks")[f"{name}.{key}"], rtol=1e-12, err_msg=key)
    assert report.prediction.tolist() == [True, False, False, False]


def test_detector_finds_what_the_processor_wrote() -> None:
    """And counts a sequence that repeats once, if it is told to."""
    config = WatermarkingConfig(greenlist_ratio=0.3, bias=50.0)
    process = jax.jit(watermark.green_list(config))
    tokens = Tokens.of(np.full((1, 1), 3), room=40)
    for i in range(40):
        scores = jnp.asarray(np.random.RandomState(i).randn(1, 61), jnp.float32)
        ids = tokens.ids.at[:, i + 1].set(process(tokens, scores).argmax(-1).astype(jnp.int32))
        tokens = state.replace(tokens, ids=ids, length=tokens.length + 1)
    text = np.tile(np.asarray(tokens.ids), (1, 3))
    every = watermark.WatermarkDetector(config, 61)(text)
    once = watermark.WatermarkDetector(config, 61, ignore_repeated_ngrams=True)(text)
    assert every.prediction.all()
    assert every.green_fraction[0] > 0.95
    assert once.num_tokens_scored[0] <= 42 < every.num_tokens_scored[0] == 122


def test_synthid_detector_equals_the_reference() -> None:
    config = SynthIDTextWatermarkingConfig(**oracle.SYNTHID, context_history_size=7)
    ids = golden("watermarks")["synthid.ids"]
    np.testing.assert_array_equal(watermark.g_values(config, ids), golden("watermarks")["synthid.g"])
    np.testing.assert_array_equal(watermark.unrepeated(config, ids), golden("watermarks")["synthid.mask"])
    beta, delta = golden("watermarks")["synthid.beta"], golden("watermarks")["synthid.delta"]
    detector = watermark.SynthIDDetector(config, beta, delta, prior=0.3, eos_token_id=9)
    np.testing.assert_allclose(detector(ids), golden("watermarks")["synthid.posterior"], rtol=1e-5)
    assert not golden("watermarks")["synthid.mask"].all()


# ------------------------------------------------------------------------------------------------------------ bad input


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: processors.temperature(0.0), r"temperature must be a number above 0 .*do_sample=False.*got 0.0"),
    (lambda: processors.temperature("warm"), "temperature must be a number above 0"),  # type: ignore[arg-type]
    (lambda: processors.top_p(2), "top_p must be a number between 0 and 1, got 2"),
    (lambda: processors.top_p(float("nan")), "top_p must be a number between 0 and 1, got nan"),
    (lambda: processors.top_k(0), "top_k must be a whole number, 1 or more, got 0"),
    (lambda: processors.top_k(2.5), "top_k must be a whole number"),
    (lambda: processors.min_p(-0.1), "min_p must be a number between 0 and 1"),
    (lambda: processors.typical(1.0), "typical_p must be .* neither of them"),
    (lambda: processors.epsilon(0.0), "epsilon_cutoff must be .* neither of them"),
    (lambda: processors.eta(1.0), "eta_cutoff must be .* neither of them"),
    (lambda: processors.top_p(0.5, min_tokens_to_keep=0), "min_tokens_to_keep must be a whole number, 1 or more"),
    (lambda: processors.repetition_penalty(-1.0), "repetition_penalty must be a number above 0, got -1.0"),
    (lambda: processors.no_repeat_ngram(0), "no_repeat_ngram_size must be a whole number, 1 or more, got 0"),
    (lambda: processors.min_length(-1, 7), "min_length must be a whole number, 0 or more, got -1"),
    (lambda: processors.min_length(3, "x"), "eos_token_id must be token ids .*got 'x'"),  # type: ignore[arg-type]
    (lambda: processors.suppress_tokens([]), "suppress_tokens must name a token, got none"),
    (lambda: processors.bad_words([]), r"bad_words_ids must be a list of lists of token ids, got \[\]"),
    (lambda: processors.bad_words([5]), r"bad_words_ids must be a list of lists of token ids, got 5"),  # type: ignore[list-item]
    (lambda: processors.bad_words([[5, -1]]), "bad_words_ids must be token ids .*got -1"),
    (lambda: processors.sequence_bias({}), "sequence_bias must name a sequence, got none"),
    (lambda: processors.sequence_bias({(5,): "x"}), "a bias of sequence_bias must be a number"),  # type: ignore[dict-item]
    (lambda: processors.sequence_bias([[5, 1.0, 2]]), "sequence_bias must be pairs"),
    (lambda: processors.sequence_bias({"five": 1.0}), "'five' is no sequence of token ids"),
    (lambda: processors.forced_eos(7), "forced_eos needs either max_length or max_new_tokens"),
    (lambda: processors.hamming_diversity(0.5, 2, 3), "num_beam_groups=3 is more than the num_beams=2"),
    (lambda: processors.guidance_of_halves(1.0), "guidance_scale must be a number above 1, got 1.0"),
    (lambda: processors.dia_eos_delay([1, 2], 7, 9), "delay_pattern must begin with 0"),
    (lambda: processors.encoder_no_repeat_ngram(2, np.zeros((1, 2, 3))), r"must be \[rows, tokens\]"),
    (lambda: then(3), r"then\(\) takes processors, such as temperature\(0.7\), got 3"),  # type: ignore[arg-type]
    (lambda: watermark.green_list(WatermarkingConfig(greenlist_ratio=1.0)), "greenlist_ratio must be between 0 and 1"),
    (lambda: watermark.green_list(WatermarkingConfig(hashing_key=2**32)), "hashing_key must be between"),
    (
        lambda: processors.processors_of(GenerationConfig(encoder_no_repeat_ngram_size=2)),
        "look at the encoder's input: pass encoder_ids",
    ),
    (
        lambda: processors.processors_of(GenerationConfig(exponential_decay_length_penalty=(2, 1.1))),
        "exponential_decay_length_penalty needs an eos_token_id",
    ),
    (lambda: processors.processors_of(GenerationConfig(do_sample=True, top_p=2)), "top_p must be a number between"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_settings_are_told(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    "process",
    [
        processors.bad_words([[5, 29]]),
        processors.sequence_bias({(31,): 1.0}),
        processors.suppress_tokens([29]),
        processors.forced_bos(29),
        processors.min_length(3, 29),
        processors.whisper_timestamps(40, 7, 3),
    ],
    ids=lambda one: one.name,
)
def test_tokens_outside_the_vocabulary_are_told(process: Rule) -> None:
    with pytest.raises(ValueError, match=rf"{process.name}: no token \d+ in a vocabulary of 29 \(ids are 0 to 28\)"):
        process(plain(oracle.texts(), 5), jnp.asarray(oracle.scores()))


def test_bad_calls_are_told() -> None:
    tokens, scores = plain(oracle.texts(), 5), jnp.asarray(oracle.scores())
    with pytest.raises(TypeError, match="temperature takes nothing beside the scores, got beam_group"):
        processors.temperature(2.0)(tokens, scores, beam_group=1)
    with pytest.raises(TypeError, match="hamming_diversity needs current_tokens=, beam_group="):
        processors.hamming_diversity(0.5, 4, 2)(tokens, scores)
    with pytest.raises(ValueError, match="6 rows for 3 rows of text, got 3"):
        processors.guidance_of_halves(2.0)(tokens, scores)
    with pytest.raises(ValueError, match="3 rows of scores are no multiple of 2 rows"):
        processors.encoder_no_repeat_ngram(2, np.zeros((2, 4), np.int32))(tokens, scores)
    with pytest.raises(ValueError, match="temperature: scores must be"):
        processors.temperature(2.0)(tokens, scores[:2])
    with pytest.raises(ValueError, match=r"ids must be \[rows, tokens\]"):
        Tokens.of([1, 2, 3])
    with pytest.raises(ValueError, match="prompt=4 is not between 0 and the 3 tokens"):
        Tokens.of([[1, 2, 3]], prompt=4)
    with pytest.raises(Exception, match="no token is allowed for input 0"):
        processors.prefix_allowed_tokens(lambda row, text: [])(tokens, scores)
    with pytest.raises(ConfigError, match="no setting 'greenlist'; did you mean 'greenlist_ratio'"):
        GenerationConfig(watermarking_config={"greenlist": 0.5})  # type: ignore[arg-type]


def test_a_rule_prints_its_settings() -> None:
    assert repr(processors.temperature(0.7)) == "temperature(value=0.7)"


# ------------------------------------------------------------------------------------------------------------------ all

# The reference's classes, and what does their work here.
COUNTERPARTS = {
    "AlternatingCodebooksLogitsProcessor": "processors.alternating_codebooks",
    "BarkEosPrioritizerLogitsProcessor": "processors.bark_eos",
    "ClassifierFreeGuidanceLogitsProcessor": "processors.guidance_of_halves",
    "ConfidenceCriteria": "stopping.confidence",
    "DiaClassifierFreeGuidanceLogitsProcessor": "processors.dia_guidance",
    "DiaEOSChannelFilterLogitsProcessor": "processors.dia_eos_filter",
    "DiaEOSDelayPatternLogitsProcessor": "processors.dia_eos_delay",
    "EncoderNoRepeatNGramLogitsProcessor": "processors.encoder_no_repeat_ngram",
    "EncoderRepetitionPenaltyLogitsProcessor": "processors.encoder_repetition_penalty",
    "EosTokenCriteria": "stopping.eos",
    "EpsilonLogitsWarper": "processors.epsilon",
    "EtaLogitsWarper": "processors.eta",
    "ExponentialDecayLengthPenalty": "processors.exponential_decay_length",
    "ForceTokensLogitsProcessor": "processors.forced_tokens",
    "ForcedBOSTokenLogitsProcessor": "processors.forced_bos",
    "ForcedEOSTokenLogitsProcessor": "processors.forced_eos",
    "HammingDiversityLogitsProcessor": "processors.hamming_diversity",
    "InfNanRemoveLogitsProcessor": "processors.remove_invalid",
    "LogitNormalization": "processors.renormalize",
    "LogitsProcessor": "processors.custom",
    "LogitsProcessorList": "processors.then",
    "LogitsWarper": "processors.custom",
    "MaxLengthCriteria": "stopping.max_length",
    "MaxTimeCriteria": "stopping.MaxTime",
    "MinLengthLogitsProcessor": "processors.min_length",
    "MinNewTokensLengthLogitsProcessor": "processors.min_new_tokens",
    "MinPLogitsWarper": "processors.min_p",
    "NoBadWordsLogitsProcessor": "processors.bad_words",
    "NoRepeatNGramLogitsProcessor": "processors.no_repeat_ngram",
    "PrefixConstrainedLogitsProcessor": "processors.prefix_allowed_tokens",
    "RepetitionPenaltyLogitsProcessor": "processors.repetition_penalty",
    "SequenceBiasLogitsProcessor": "processors.sequence_bias",
    "StopStringCriteria": "stopping.stop_strings",
    "StoppingCriteria": "stopping.custom",
    "StoppingCriteriaList": "stopping.any_of",
    "SuppressTokensAtBeginLogitsProcessor": "processors.suppress_at_begin",
    "SuppressTokensLogitsProcessor": "processors.suppress_tokens",
    "SynthIDTextWatermarkDetector": "watermark.SynthIDDetector",
    "SynthIDTextWatermarkLogitsProcessor": "watermark.synthid",
    "TemperatureLogitsWarper": "processors.temperature",
    "TopKLogitsWarper": "processors.top_k",
    "TopPLogitsWarper": "processors.top_p",
    "TypicalLogitsWarper": "processors.typical",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "processors.guidance",
    "WatermarkDetector": "watermark.WatermarkDetector",
    "WatermarkLogitsProcessor": "watermark.green_list",
    "WhisperNoSpeechDetection": "processors.no_speech_probability",
    "WhisperTimeStampLogitsProcessor": "processors.whisper_timestamps",
}


def test_every_class_of_the_reference_has_a_counterpart() -> None:
    classes = json.loads((DATA / "settings.json").read_text())["classes"]
    assert {cls.removeprefix("Flax").removeprefix("TF") for cls in classes} == set(COUNTERPARTS)
    homes = {"processors": processors, "stopping": stopping, "watermark": watermark}
    for name in COUNTERPARTS.values():
        home, _, attribute = name.partition(".")
        assert callable(getattr(homes[home], attribute)), name


def test_every_processor_has_a_case() -> None:
    """All constructors that `processors_of` or a model may use are compared with the reference, or tested above."""
    compared = {case["ours"] for case in oracle.CASES.values()}
    apart = {
        "custom",
        "then",
        "forced_tokens",
        "dia_eos_delay",
        "no_speech_probability",
        "WatermarkDetector",
        "SynthIDDetector",
    }
    ours = {name.partition(".")[2] for name in COUNTERPARTS.values() if not name.startswith("stopping")}
    assert ours - apart == compared
    assert settings.VERSION == "4.57.6"
