"""`generate` and what belongs to it on the surfaces of transformers' Flax and TensorFlow, and under PyTorch's names."""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import programs
from oracle import make_generation as oracle
from test_generate_goldens import golden, inputs_of, written

import formax
from formax.compat import flax, generation, tf
from formax.generation import Tokens, processors, sampling

Opener = Callable[[str, str], Any]
# Of the reference's, what needs the model, and what remembers the calls before.
NOT_ALONE = ("Unbatched", "SynthID")
ALONE = [name for name, case in oracle.CASES.items() if not case["class"].startswith(NOT_ALONE)]
NAMED = {"encoder": oracle.ENCODER, "allowed": oracle.allowed, "whisper": SimpleNamespace(**oracle.WHISPER)}


# ----------------------------------------------------------------------------------------------------------- processors


@lru_cache
def processed() -> dict[str, np.ndarray]:
    with np.load(oracle.DATA / "processors.npz") as file:
        return dict(file)


def reference(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the reference's class."""
    told = case["reference"].items()
    return {name: NAMED.get(value, value) if isinstance(value, str) else value for name, value in told}


@pytest.mark.parametrize("name", ALONE)
def test_classes_do_what_the_references_do(name: str) -> None:
    """As PyTorch calls them, with a text; and as Flax and TensorFlow do, with a buffer and how much of it is text."""
    case = oracle.CASES[name]
    kind, arguments = getattr(generation, case["class"]), reference(case)
    one = kind(*arguments.values()) if arguments.keys() == {*[*kind.arguments][: len(arguments)]} else kind(**arguments)
    given = {{"beam_group": "beam_group_idx"}.get(key, key): value for key, value in case.get("given", {}).items()}
    ids = oracle.given_texts(case.get("texts", "plain"))
    buffered = jax.jit(lambda scores, length: one(ids, scores, length, **given))
    lengths = case.get("lengths", oracle.LENGTHS)
    for length in lengths:
        scores, expected = oracle.given_scores(case.get("scores", "plain"), length), processed()[f"{name}.{length}"]
        np.testing.assert_allclose(buffered(scores, length), expected, rtol=4e-6, atol=4e-6)
        if length == lengths[len(lengths) // 2]:
            np.testing.assert_allclose(one(ids[:, :length], scores, **given), expected, rtol=4e-6, atol=4e-6)


FLAX_NAMES = (
    "ForcedBOSToken ForcedEOSToken ForceTokens MinLength SuppressTokensAtBegin SuppressTokens WhisperTimeStamp "
    "NoRepeatNGram"
)
TF_NAMES = (
    "ForcedBOSToken ForcedEOSToken ForceTokens MinLength NoBadWords NoRepeatNGram RepetitionPenalty "
    "SuppressTokensAtBegin SuppressTokens"
)


@pytest.mark.parametrize(("module", "prefix", "listed"), [(flax, "Flax", FLAX_NAMES), (tf, "TF", TF_NAMES)])
def test_names_with_a_prefix(module: Any, prefix: str, listed: str) -> None:
    names = [f"{prefix}{name}LogitsProcessor" for name in listed.split()]
    names += [f"{prefix}{name}LogitsWarper" for name in ("Temperature", "TopK", "TopP")]
    base = getattr(module, f"{prefix}LogitsProcessor")
    for name in names:
        made = getattr(module, name)
        assert (made.__name__, made) == (name, getattr(module, name))
        assert issubclass(made, base)
        assert name in dir(module)
    assert getattr(module, f"{prefix}LogitsWarper") is base
    assert issubclass(getattr(module, f"{prefix}LogitsProcessorList"), list)
    kind = getattr(module, f"{prefix}PreTrainedModel")
    assert issubclass(kind, getattr(module, f"{prefix}GenerationMixin"))
    assert module.GenerationConfig is formax.GenerationConfig
    with pytest.raises(AttributeError, match=rf"the nearest are {prefix}TopKLogitsWarper"):
        getattr(module, f"{prefix}TopKLogitWarper")


def test_names_without_a_prefix() -> None:
    assert {*generation.listed()} <= {*dir(generation)}
    for name in {*generation.listed()} - {"LogitsWarper"}:
        assert getattr(generation, name).__name__ == name
    with pytest.raises(AttributeError, match="give guidance_scale= to generate"):
        generation.UnbatchedClassifierFreeGuidanceLogitsProcessor  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'TopKWarper'"):
        generation.TopKWarper  # noqa: B018


def test_lists_and_attributes() -> None:
    ids, scores = oracle.texts()[:, :5], oracle.scores()
    warpers = generation.LogitsProcessorList([generation.TemperatureLogitsWarper(0.5), generation.TopKLogitsWarper(4)])
    expected = processors.then(processors.temperature(0.5), processors.top_k(4))(Tokens.of(ids), jnp.asarray(scores))
    np.testing.assert_array_equal(warpers(ids, scores), expected)
    np.testing.assert_array_equal(warpers(None, scores, cur_len=5), expected)
    assert repr(warpers) == "[TemperatureLogitsWarper(temperature=0.5), TopKLogitsWarper(top_k=4)]"
    assert (warpers[1].top_k, warpers[1].rule.strengths) == (4, {"k": 4})
    group = {"current_tokens": np.array([1, 2, 3, 4, 5, 6]), "beam_group_idx": 1}
    diverse = generation.HammingDiversityLogitsProcessor(1.5, num_beams=2, num_beam_groups=2)
    together = generation.LogitsProcessorList([diverse, lambda ids, scores: scores + 1])(ids, scores, **group)
    np.testing.assert_array_equal(together, diverse(ids, scores, **group) + 1)
    assert not np.array_equal(together, scores + 1)
    for wrong in ((4, 0.0, 1, 1), {"k": 4}):
        with pytest.raises(TypeError, match="TopKLogitsWarper takes top_k, filter_value, min_tokens_to_keep"):
            generation.TopKLogitsWarper(*wrong) if isinstance(wrong, tuple) else generation.TopKLogitsWarper(**wrong)
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        generation.TopKLogitsWarper(0)

    class Mine(generation.LogitsProcessor):
        pass

    with pytest.raises(NotImplementedError, match="Mine needs a __call__"):
        Mine()(ids, scores)


def test_classes_that_the_record_does_not_have() -> None:
    ids, scores = oracle.STAMPED[:, :6], oracle.scores()
    forced = flax.FlaxForceTokensLogitsProcessor([[5, 8], [6, 9], [7, None]])
    assert np.asarray(forced(ids, scores, 6)).argmax(-1).tolist() == [9, 9, 9]
    np.testing.assert_array_equal(forced(ids, scores, 7), scores)
    whisper = SimpleNamespace(**oracle.WHISPER, is_multilingual=True)
    # Flax's is told how long the decoder's prompt is: a language and a task come after its first token.
    made = flax.FlaxWhisperTimeStampLogitsProcessor(whisper, None, 1)
    np.testing.assert_array_equal(
        made(ids, scores, 6), generation.WhisperTimeStampLogitsProcessor(whisper, 4)(ids, scores)
    )


def test_functions_see_a_text_that_begins_with_the_first_column() -> None:
    """Also where filling lies before it, as with models whose caches cannot take anything back."""
    (made,) = generation.as_rules([lambda ids, scores, length: scores + ids[:, :1] + 100 * length])
    state = Tokens(jnp.array([[9, 9, 3, 4, 5], [9, 9, 6, 7, 8]]), jnp.int32(4), jnp.int32(2), jnp.int32(3))
    np.testing.assert_array_equal(made(state, jnp.zeros((2, 7))), np.array([[203.0], [206.0]]).repeat(7, 1))


def test_filtering() -> None:
    scores, state = jnp.asarray(oracle.scores()), Tokens.of(np.zeros((3, 0)))
    np.testing.assert_array_equal(generation.top_k_top_p_filtering(scores), scores)
    found = tf.tf_top_k_top_p_filtering(scores, top_k=9, top_p=0.6, filter_value=-7.0, min_tokens_to_keep=2)
    kept = {"filter_value": -7.0, "min_tokens_to_keep": 2}
    first = processors.top_k(9, **kept)(state, scores)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, processors.top_p(0.6, **kept)(state, first))  # type: ignore[arg-type]
    assert ((found > -7).sum(-1) >= 2).all()


def test_criteria() -> None:
    ids = np.array([[3, 4, 5], [3, 4, 7]])
    criteria = generation.StoppingCriteriaList([generation.MaxLengthCriteria(9), generation.EosTokenCriteria([7, 8])])
    assert criteria.max_length == 9
    assert criteria(ids, np.zeros((2, 9))).tolist() == [False, True]
    assert generation.MaxLengthCriteria(3)(ids, np.zeros((2, 9))).tolist() == [True, True]
    assert generation.StoppingCriteriaList().max_length is None
    late, early = generation.MaxTimeCriteria(100.0), generation.MaxTimeCriteria(0.0, 1.0)
    assert late(ids, np.zeros((2, 9))).tolist() == [False, False]
    assert early(ids, np.zeros((2, 9))).tolist() == [True, True]


# ------------------------------------------------------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Opens the model of a golden as one of a framework, once."""
    folders: dict[str, Path] = {}

    @lru_cache
    def open_(framework: str, family: str) -> Any:
        if family not in folders:
            model = golden(family)["models"]["main"]
            folders[family] = written(tmp_path_factory.mktemp(family), model, model["generation_config"])
        name = golden(family)["models"]["main"]["architecture"]
        kind = getattr(flax, f"Flax{name}") if framework == "flax" else getattr(tf, f"TF{name}")
        return kind.from_pretrained(folders[family])

    return open_


def texts_of(family: str, name: str, model: Any) -> tuple[dict[str, Any], np.ndarray]:
    """Inputs with settings, and the texts; after their ends padding, where PyTorch's beams have the end again."""
    case = golden(family)["cases"][name]
    expected = np.array(case["sequences"])
    new = expected[:, 1 if family in ("t5", "bart") else inputs_of(family, case["inputs"])["input_ids"].shape[1] :]
    ended = np.cumsum(new == model.generation_config.eos_token_id, axis=1) > (
        new == model.generation_config.eos_token_id
    )
    new[ended] = model.generation_config.pad_token_id
    return {**inputs_of(family, case["inputs"]), **case["settings"]}, expected


CASES = [("gpt2", "greedy_plain"), ("gpt2", "beam_3"), ("t5", "greedy_plain"), ("t5", "beam_3")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_texts_are_the_goldens(family: str, name: str, opened: Opener) -> None:
    model, keras = opened("flax", family), opened("tf", family)
    given, expected = texts_of(family, name, model)
    found = model.generate(**given)
    beams = "num_beams" in given
    assert type(found) is getattr(flax, "FlaxBeamSearchOutput" if beams else "FlaxGreedySearchOutput")
    length = given["max_new_tokens"] + (1 if family == "t5" else given["input_ids"].shape[1])
    assert found.sequences.shape == (len(expected), length)  # always, however early the texts end
    np.testing.assert_array_equal(found.sequences[:, : expected.shape[1]], expected)
    assert (np.asarray(found.sequences[:, expected.shape[1] :]) == model.generation_config.pad_token_id).all()
    np.testing.assert_array_equal(keras.generate(**given), expected)
    out = keras.generate(**given, return_dict_in_generate=True)
    part = "EncoderDecoder" if family == "t5" else "DecoderOnly"
    assert type(out) is getattr(tf, f"TF{'BeamSearch' if beams else 'GreedySearch'}{part}Output")
    np.testing.assert_array_equal(out.sequences, expected)
    assert out.scores is None
    if beams:
        np.testing.assert_array_equal(found.scores, out.sequences_scores)
        assert found.scores.shape == (len(expected),)


def test_what_is_asked_for_besides(opened: Opener) -> None:
    keras = opened("tf", "gpt2")
    given, expected = texts_of("gpt2", "greedy_plain", keras)
    out = keras.generate(**given, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 12
    np.testing.assert_array_equal(out.scores[0].argmax(-1), expected[:, 7])
    found = keras.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    np.testing.assert_allclose(found[:, 0], jax.nn.log_softmax(out.scores[0]).max(-1), rtol=1e-6)
    assert not hasattr(out, "logits")


@pytest.mark.parametrize("framework", ["flax", "tf"])
def test_length_and_settings(framework: str, opened: Opener) -> None:
    """Without a length 20 tokens, the prompt among them; the model's settings can be others."""
    model, ids = opened(framework, "gpt2"), inputs_of("gpt2", "whole")["input_ids"][:1]

    def texts(*args: Any, **given: Any) -> Any:
        found = model.generate(ids, *args, **given)
        return found if framework == "tf" else found.sequences

    assert texts(eos_token_id=None).shape == (1, 20)
    own = model.generation_config
    try:
        model.generation_config = own.replace(max_length=11)
        np.testing.assert_array_equal(short := texts(eos_token_id=None), texts(max_new_tokens=4, eos_token_id=None))
        assert short.shape == (1, 11)
        assert texts(formax.GenerationConfig(max_length=12, eos_token_id=39)).shape == (1, 12)
    finally:
        model.generation_config = own
    with pytest.raises(TypeError, match=r"takes no 'num_beam'.*did you mean num_beams"):
        texts(num_beam=2)
    assert model.can_generate()
    assert not (flax.FlaxGPT2Model if framework == "flax" else tf.TFGPT2Model).can_generate()


def test_what_is_drawn_in_flax(opened: Opener) -> None:
    model = opened("flax", "gpt2")
    given = {**inputs_of("gpt2", "padded"), "max_new_tokens": 12, "do_sample": True}
    found = model.generate(**given)
    assert type(found) is flax.FlaxSampleOutput
    for key in (jax.random.PRNGKey(0), jax.random.key(0)):
        np.testing.assert_array_equal(model.generate(**given, prng_key=key).sequences, found.sequences)
    assert not np.array_equal(model.generate(**given, prng_key=jax.random.PRNGKey(1)).sequences, found.sequences)


def test_what_is_drawn_in_tensorflow(opened: Opener) -> None:
    keras = opened("tf", "gpt2")
    given = {**inputs_of("gpt2", "padded"), "max_new_tokens": 12, "do_sample": True}
    one, same, other = (keras.generate(**given, seed=seed) for seed in ([1, 2], [1, 2], [2, 1]))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(keras.generate(**given, seed=3), keras.generate(**given, key=jax.random.key(3)))
    out = keras.generate(**given, seed=3, return_dict_in_generate=True)
    assert type(out) is tf.TFSampleDecoderOnlyOutput


def test_padding_is_guessed_in_tensorflow_alone(opened: Opener) -> None:
    given = {**inputs_of("gpt2", "padded"), "max_new_tokens": 12}
    mask = given.pop("attention_mask")
    keras, model = opened("tf", "gpt2"), opened("flax", "gpt2")
    np.testing.assert_array_equal(keras.generate(**given), keras.generate(**given, attention_mask=mask))
    found = model.generate(**given).sequences
    np.testing.assert_array_equal(found, model.generate(**given, attention_mask=np.ones_like(mask)).sequences)
    assert not np.array_equal(found, model.generate(**given, attention_mask=mask).sequences)


def test_parameters_of_a_call(opened: Opener) -> None:
    model, given = opened("flax", "gpt2"), {**inputs_of("gpt2", "whole"), "max_new_tokens": 12}
    doubled = jax.tree.map(lambda leaf: -leaf, model.params)
    other = type(model)(model.config, _do_init=False)
    other.generation_config = model.generation_config
    expected = model.generate(**given)
    np.testing.assert_array_equal(other.generate(**given, params=model.params).sequences, expected.sequences)
    assert not np.array_equal(model.generate(**given, params=doubled).sequences, expected.sequences)
    with pytest.raises(ValueError, match="holds no parameters"):
        other.generate(**given)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sample"])
def test_a_step_of_generating_under_jit_and_pmap(opened: Opener, name: str, settings: dict[str, Any]) -> None:
    """As in run_summarization_flax: parameters and batches are arguments, texts come out at their full length."""
    model, batch = opened("flax", name), inputs_of(name, "padded")

    def generate_step(params: Any, batch: Any, key: Any) -> Any:
        model.params = params
        ids = batch["input_ids"]
        return model.generate(ids, attention_mask=batch["attention_mask"], prng_key=key, **given).sequences

    given = {"max_length": batch["input_ids"].shape[1] + 7, **settings}
    params, key = model.params, jax.random.PRNGKey(5)
    expected = generate_step(params, batch, key)
    np.testing.assert_array_equal(jax.jit(generate_step)(params, batch, key), expected)
    model.params = params
    twice = jax.tree.map(lambda x: np.stack([x, x]), (params, batch, key))
    found = jax.pmap(generate_step, "batch", devices=jax.devices()[:2])(*twice)
    np.testing.assert_array_equal(found, [expected, expected])
    model.params = params


def test_processors_of_a_call(opened: Opener) -> None:
    """Old classes, rules of formax, functions of yours; a strength that changes compiles nothing again."""
    model, keras = opened("flax", "gpt2"), opened("tf", "gpt2")
    given, expected = texts_of("gpt2", "greedy_repetition", model)
    penalty = given.pop("repetition_penalty")
    length = expected.shape[1]
    for one in (tf.TFRepetitionPenaltyLogitsProcessor(penalty), processors.repetition_penalty(penalty)):
        found = model.generate(**given, logits_processor=flax.FlaxLogitsProcessorList([one])).sequences
        np.testing.assert_array_equal(found[:, :length], expected)
        np.testing.assert_array_equal(keras.generate(**given, logits_processor=[one]), expected)
    before = programs(sampling.go)
    model.generate(**given, logits_processor=[flax.FlaxRepetitionPenaltyLogitsProcessor(penalty + 0.5)])
    assert programs(sampling.go) == before
    plain = keras.model.generate(**given, logits_processor=[generation.RepetitionPenaltyLogitsProcessor(penalty)])
    np.testing.assert_array_equal(plain, expected)

    class Counts(flax.FlaxLogitsProcessor):  # type: ignore[misc]
        """The text, once it is 10 tokens long, repeats the token before the last for ever."""

        def __call__(self, input_ids: Any, scores: Any, cur_len: Any) -> Any:
            again = jax.nn.one_hot(input_ids[:, cur_len - 2], scores.shape[1]) * 1000
            return jnp.where(cur_len >= 10, again, scores)

    one = Counts()
    found = np.asarray(model.generate(**given, eos_token_id=None, logits_processor=[one]).sequences)
    np.testing.assert_array_equal(found[:, 10:], found[:, 8:-2])
    before = programs(sampling.go)
    model.generate(**given, eos_token_id=None, logits_processor=[one])
    assert programs(sampling.go) == before
    with pytest.raises(TypeError, match="takes processors, or functions"):
        model.generate(**given, logits_processor=[3])


def test_criteria_of_a_call(opened: Opener) -> None:
    model, keras = opened("flax", "gpt2"), opened("tf", "gpt2")
    given, expected = texts_of("gpt2", "greedy_plain", model)
    until = generation.StoppingCriteriaList([generation.MaxLengthCriteria(12)])
    np.testing.assert_array_equal(keras.generate(**given, stopping_criteria=until), expected[:, :12])
    found = np.asarray(model.generate(**given, stopping_criteria=until).sequences)
    np.testing.assert_array_equal(found[:, :12], expected[:, :12])
    assert (found[:, 12:] == model.generation_config.pad_token_id).all()
    over = generation.MaxTimeCriteria(0.0, 1.0)
    assert keras.generate(**given, max_time=1000.0, stopping_criteria=[over]).shape[1] < expected.shape[1]


def test_streamers(opened: Opener) -> None:
    class Heard:
        def __init__(self) -> None:
            self.found: list[Any] = []
            self.over = threading.Event()

        def put(self, value: Any) -> None:
            self.found.append(np.asarray(value).tolist())

        def end(self) -> None:
            self.over.set()

    given = {"input_ids": inputs_of("gpt2", "whole")["input_ids"][:1], "max_new_tokens": 4, "eos_token_id": None}
    for framework in ("flax", "tf"):
        heard = Heard()
        found = opened(framework, "gpt2").generate(**given, streamer=heard)
        texts = np.asarray(found if framework == "tf" else found.sequences)
        assert heard.over.is_set()
        assert heard.found[0] == texts[:, :7].tolist()
        assert [one[0] for one in heard.found[1:]] == texts[0, 7:].tolist()


def test_ways_of_generating_as_methods(opened: Opener) -> None:
    """They take processors and criteria as they are, and nothing of the model's own but special tokens."""
    keras, model = opened("tf", "gpt2"), opened("flax", "gpt2")
    given, expected = texts_of("gpt2", "greedy_plain", keras)
    own = keras.generation_config
    try:
        keras.generation_config = own.replace(repetition_penalty=9.0, do_sample=True, max_length=19)
        given.pop("max_new_tokens")
        np.testing.assert_array_equal(keras.greedy_search(**given), expected)
        assert not np.array_equal(keras.generate(**given, do_sample=False), expected)
        found = keras.sample(**given, logits_warper=[generation.TopKLogitsWarper(1)], seed=0)
        np.testing.assert_array_equal(found, expected)
        assert not np.array_equal(keras.sample(**given, seed=0), expected)
    finally:
        keras.generation_config = own
    given, expected = texts_of("gpt2", "beam_3", keras)
    ids = np.repeat(given.pop("input_ids")[:, None], 3, axis=1)  # as TensorFlow's beam_search has them
    given.pop("num_beams")
    np.testing.assert_array_equal(keras.beam_search(ids, **given), expected)
    assert type(model.beam_search(ids, **given)) is flax.FlaxBeamSearchOutput
    row, most = inputs_of("gpt2", "whole")["input_ids"][:1], {"max_new_tokens": 12}
    expected = keras.generate(row, **most)
    np.testing.assert_array_equal(keras.assisted_decoding(row, **most, assistant_model=keras), expected)


def test_settings_are_saved(opened: Opener, tmp_path: Path) -> None:
    for framework, module in (("flax", flax), ("tf", tf)):
        model = opened(framework, "t5")
        own, changed = model.generation_config, formax.GenerationConfig(max_length=33, num_beams=2)
        try:
            model.generation_config = changed
            model.save_pretrained(tmp_path / framework)
        finally:
            model.generation_config = own
        kind = getattr(module, {"flax": "FlaxAutoModelForSeq2SeqLM", "tf": "TFAutoModelForSeq2SeqLM"}[framework])
        again = kind.from_pretrained(tmp_path / framework)
        assert (again.generation_config.max_length, again.generation_config.num_beams) == (33, 2)
        assert kind.from_config(model.config).generation_config.max_length == 20
