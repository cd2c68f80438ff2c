"""Whisper's own `generate` against the reference's, of recordings of any length; and what is before a transcript.

`tests/oracle/make_transcriptions.py` makes the goldens and says where formax goes another way than the reference.
"""

import json
import zlib
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import cases
from test_generate_goldens import written

import formax
from formax.compat import flax, tf
from formax.core.config import ConfigError
from formax.generation import api, whisper
from formax.generation.whisper import alignment, detect_language, windows
from formax.generation.whisper.call import Call

GOLDEN = json.loads((Path(__file__).parent / "data" / "transcriptions.json").read_text())
CASES: dict[str, Any] = GOLDEN["cases"]
FIRST = 50  # the token of the time 0
Opener = Callable[..., Any]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    models: dict[str, Any] = {}

    def open_(**settings: Any) -> Any:
        key = json.dumps(settings)
        if key not in models:
            said = GOLDEN["model"]["generation_config"] | settings
            models[key] = formax.from_pretrained(written(tmp_path_factory.mktemp("whisper"), GOLDEN["model"], said))
        return models[key]

    return open_


def recordings(name: str) -> tuple[np.ndarray, np.ndarray]:
    case = CASES[name]
    lengths = case["recordings"]
    mask = cases.mask(*lengths, width=max(lengths))
    sound = cases.floats(f"transcriptions.{case['name']}", len(lengths), 8, max(lengths)) * mask[:, None]
    return sound.astype(np.float32), mask


def call(name: str) -> dict[str, Any]:
    sound, mask = recordings(name)
    given = {key: value for key, value in CASES[name]["settings"].items() if not key.startswith("_")}
    return {"input_features": sound, **given} | ({"attention_mask": mask} if "_mask" in CASES[name]["settings"] else {})


@pytest.mark.parametrize("name", CASES)
def test_it_writes_what_the_reference_writes(name: str, opened: Opener) -> None:
    case = CASES[name]
    out = opened(**case["settings"].get("_settings", {})).generate(**call(name))
    sequences = out if isinstance(out, jax.Array) else out.sequences
    np.testing.assert_array_equal(np.asarray(sequences), case["sequences"])
    if "segments" in case:
        assert [len(each) for each in out.segments] == [len(each) for each in case["segments"]]
        for mine, right in zip(chain(*out.segments), chain(*case["segments"]), strict=True):
            np.testing.assert_array_equal(mine["tokens"], right["tokens"])
            assert (mine["start"], mine["end"]) == pytest.approx((right["start"], right["end"]), abs=1e-4)
            assert list(mine["idxs"]) == right["idxs"]
            np.testing.assert_array_equal(mine["result"][slice(*mine["idxs"])], mine["tokens"])
    if "token_timestamps" in case:
        times = np.asarray(out.token_timestamps)
        if "segments" in case:  # the reference's count from the window; those of its segments do not
            (parts,) = case["segments"]
            window = [one["start"] - (one["tokens"][0] - FIRST) * windows.SECONDS for one in parts]
            times = times - np.concatenate(
                [np.full(len(one["tokens"]), at) for one, at in zip(parts, window, strict=True)]
            )
        np.testing.assert_allclose(times, case["token_timestamps"], atol=1e-4)


def alone(model: Any, sound: np.ndarray, length: int, **given: Any) -> np.ndarray:
    return np.asarray(model.generate(sound[None, :, :length], **given))[0]


def test_rows_are_as_they_are_alone(opened: Opener) -> None:
    """Also where what was said before goes before the next window, in prompts of unequal lengths."""
    model, (sound, mask) = opened(), recordings("three")
    given = {"condition_on_prev_tokens": True, "language": "en"}
    together = np.asarray(model.generate(sound, attention_mask=mask, **given))
    for row, length in enumerate(mask.sum(1)):
        own = alone(model, sound[row], int(length), **given)
        np.testing.assert_array_equal(together[row, : len(own)], own)
        assert (together[row, len(own) :] == model.generation_config.pad_token_id).all()


class Counting:
    """`generate` of all models, which notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **given: Any) -> Any:
        self.calls.append(given)
        return api.plain(*args, **given)


def ratio(text: np.ndarray) -> float:
    data = bytes(text.tolist())
    return len(data) / len(zlib.compress(data))


def test_what_looks_wrong_is_written_again_at_a_higher_temperature(opened: Opener) -> None:
    model, (sound, _) = opened(), recordings("asks for the language")
    given: dict[str, Any] = {"language": "en", "key": jax.random.key(0), "return_segments": True}
    first = [one[0]["result"][4:] for one in model.generate(sound, **given).segments]
    ratios = sorted(map(ratio, first))
    assert ratios[1] < ratios[2]
    plain, limit = Counting(), (ratios[1] + ratios[2]) / 2
    out = whisper.generate(plain, model, sound, **given, temperature=(0.0, 0.7, 1.0), compression_ratio_threshold=limit)
    begins = [n for n, call in enumerate(plain.calls) if not call["do_sample"]]  # of windows; the first is looked at
    calls = plain.calls[: [*begins, len(plain.calls)][1]]
    assert [len(call["decoder_input_ids"]) for call in calls][:2] == [3, 1]  # the one row, and no other
    assert [call.get("temperature") for call in calls] == [None, 0.7, 1.0][: len(calls)]
    again = [not np.array_equal(one[0]["result"][4:], was) for one, was in zip(out.segments, first, strict=True)]
    assert again == [ratio(was) > limit for was in first]


def test_nothing_is_conditioned_on_what_was_drawn_hot(opened: Opener) -> None:
    model, (sound, _) = opened(), recordings("long")
    given: dict[str, Any] = {"language": "en", "condition_on_prev_tokens": True, "key": jax.random.key(0)}
    for temperatures, longer in ((0.4, True), (0.5, False)):
        plain = Counting()
        whisper.generate(plain, model, sound, **given, temperature=temperatures)
        lengths = [call["decoder_input_ids"].shape[1] for call in plain.calls]
        assert len(lengths) > 2
        assert lengths[0] == 3
        assert (max(lengths) > 3) == longer


def test_how_likely_a_transcript_is(opened: Opener) -> None:
    """The mean that a threshold is held against, from the scores of a plain call."""
    model, (sound, _) = opened(), recordings("times of tokens")
    given = {"language": "en", "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(sound, **given)
    new = np.asarray(model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True))[0]
    plain = Counting()
    for off, calls in ((-0.01, 1), (0.01, 2)):
        plain.calls.clear()
        whisper.generate(plain, model, sound, language="en", temperature=(0.0, 0.0), logprob_threshold=new.mean() + off)
        assert len(plain.calls) == calls


def test_the_model_is_asked_for_the_language(opened: Opener) -> None:
    model, (sound, _) = opened(), recordings("asks for the language")
    found = detect_language(model, sound)
    assert set(found.tolist()) <= {42, 43, 44}
    out = model.generate(sound, return_dict_in_generate=True, max_new_tokens=2)
    np.testing.assert_array_equal(np.asarray(out.sequences)[:, :3], [[41, one, 49] for one in found])
    names = {42: "en", 43: "de", 44: "zh"}
    named = model.generate(sound, language=[names[one] for one in found.tolist()], task=None, max_new_tokens=5)
    asked = model.generate(sound, max_new_tokens=5, task="transcribe")
    np.testing.assert_array_equal(np.asarray(named), np.asarray(asked))


@pytest.mark.parametrize("language", ["en", None])
def test_in_a_trace(opened: Opener, language: str | None) -> None:
    model, (sound, _) = opened(), recordings("asks for the language")
    eager = np.asarray(model.generate(sound, language=language, max_new_tokens=9))
    traced = np.asarray(jax.jit(lambda x: model.generate(x, language=language, max_new_tokens=9))(sound))
    eos = model.generation_config.eos_token_id
    np.testing.assert_array_equal(np.where(traced == eos, eos, traced)[:, : eager.shape[1]], eager)
    with pytest.raises(ValueError, match="one window of 24 frames"):
        jax.jit(lambda x: model.generate(x))(recordings("long")[0])


def test_token_by_token(opened: Opener) -> None:
    model, (sound, _) = opened(), recordings("a language")
    whole = np.asarray(model.generate(sound, language="de", max_new_tokens=6))
    tokens = np.stack(list(model.stream(sound, language="de", max_new_tokens=6)), axis=1)
    np.testing.assert_array_equal(tokens[:, : whole.shape[1]], whole)


def test_other_arguments_of_generate(opened: Opener) -> None:
    model, (sound, _) = opened(), recordings("a language")
    given = {"language": "en", "max_new_tokens": 8}
    right = np.asarray(model.generate(sound, **given))
    memory = model.as_method("encode")(input_features=jnp.asarray(sound))
    np.testing.assert_array_equal(np.asarray(model.generate(encoder_outputs=memory, **given)), right)
    drawn = model.generate(sound, do_sample=True, num_return_sequences=2, key=jax.random.key(1), **given)
    assert (np.asarray(drawn)[::2] != np.asarray(drawn)[1::2]).any()
    one = sound[:1]
    np.testing.assert_array_equal(np.asarray(model.generate(one, assistant_model=model, **given))[0], right[0])
    seen = model.generate(one, return_dict_in_generate=True, output_hidden_states=True, **given)
    assert (len(seen.encoder_hidden_states), len(seen.decoder_hidden_states[0])) == (3, 3)
    done: list[Any] = []
    long, _ = recordings("long")
    model.generate(long, language="en", monitor_progress=done.append)
    frames = np.concatenate(done)
    assert (np.diff(frames[:, 0]) > 0).all()
    assert (frames[:, 1] == long.shape[-1]).all()


def test_a_decoder_alone_assists(opened: Opener, tmp_path: Path) -> None:
    """As those that were distilled do, which share the encoder's states: another decoder, the same text."""
    model, (sound, _) = opened(), recordings("long")
    folder = written(tmp_path, GOLDEN["model"], GOLDEN["model"]["generation_config"])
    draft = formax.AutoModelForCausalLM.from_pretrained(folder)
    assert draft.architecture.name == "WhisperForCausalLM"
    odd = draft.replace(params=jax.tree.map(lambda x: 1.1 * x, draft.params))
    given = {"language": "en", "return_timestamps": True}
    own = np.asarray(model.generate(sound, begin_suppress_tokens=None, **given))
    for assistant in (draft, odd):
        np.testing.assert_array_equal(np.asarray(model.generate(sound, assistant_model=assistant, **given)), own)


@pytest.mark.parametrize("cls", [flax.FlaxWhisperForConditionalGeneration, tf.TFWhisperForConditionalGeneration])
def test_the_older_classes_have_the_same_arguments(cls: Any, opened: Opener, tmp_path: Path) -> None:
    """They write one window, and return what is before the transcript, too."""
    model, (sound, _) = opened(), recordings("times")
    model.save_pretrained(tmp_path)
    older, given = cls.from_pretrained(tmp_path), {"language": "german", "task": "translate", "max_new_tokens": 9}
    for stamps, start in ((True, [41, 43, 45]), (False, [41, 43, 45, 49])):
        segments = model.generate(sound, return_timestamps=stamps, return_segments=True, **given).segments
        out = older.generate(sound, return_timestamps=stamps, **given)
        for row, parts in zip(np.asarray(getattr(out, "sequences", out)), segments, strict=True):
            own = parts[0]["result"]
            assert own[: len(start)].tolist() == start
            np.testing.assert_array_equal(row[: len(own)], own)


def test_the_older_classes_draw_where_they_are_told_to(opened: Opener, tmp_path: Path) -> None:
    """A temperature alone draws nothing there."""
    model, (sound, _) = opened(), recordings("times")
    model.save_pretrained(tmp_path)
    older, given = flax.FlaxWhisperForConditionalGeneration.from_pretrained(tmp_path), {"language": "en"}
    plain = np.asarray(older.generate(sound, **given).sequences)
    np.testing.assert_array_equal(np.asarray(older.generate(sound, temperature=3.0, **given).sequences), plain)
    drawn = older.generate(sound, temperature=3.0, do_sample=True, num_return_sequences=2, **given).sequences
    assert len(drawn) == 2 * len(sound)


def test_what_is_returned_of_several_temperatures(opened: Opener) -> None:
    """Rows are of different calls then: they come as segments."""
    model, (sound, _) = opened(), recordings("a language")
    given: dict[str, Any] = {"language": "en", "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(sound, temperature=(0.0, 1.0), compression_ratio_threshold=100.0, **given)
    assert isinstance(out, whisper.Transcription)
    result = out.segments[0][0]["result"]
    assert len(result["scores"]) == len(result["sequences"]) - 4
    assert not isinstance(model.generate(sound, **given), whisper.Transcription)


def test_a_recording_of_no_frames_says_nothing(opened: Opener) -> None:
    model, (sound, mask) = opened(), recordings("two long")
    alone = np.asarray(model.generate(sound[:1], language="en", attention_mask=mask[:1]))
    mask = np.stack([mask[0], np.zeros_like(mask[1])])
    out = np.asarray(model.generate(sound, language="en", attention_mask=mask))
    np.testing.assert_array_equal(out[0, : alone.shape[1]], alone[0])
    assert (out[1] == model.generation_config.pad_token_id).all()


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("a language", {"language": "klingon"}, ConfigError, "language='klingon' is none that this model knows"),
        ("a language", {"language": "germn"}, ConfigError, "did you mean german"),
        ("a language", {"language": "french"}, ConfigError, "It knows en, de, zh"),
        ("a language", {"language": ["en", "de"]}, ConfigError, "language names 2 languages, for 3 recordings"),
        ("a language", {"task": "sing"}, ConfigError, "task='sing' is none of transcribe, translate"),
        ("a language", {"is_multilingual": False, "task": "translate"}, ConfigError, "is_multilingual is False"),
        ("long", {"return_timestamps": False}, ValueError, "100 frames, a window 24: longer ones need return_times"),
        ("two long", {}, ValueError, "need an attention_mask"),
        ("long", {"prompt_condition_type": "all-segments"}, ConfigError, "needs condition_on_prev_tokens=True"),
        ("long", {"prompt_condition_type": "some"}, ConfigError, "neither 'first-segment' nor 'all-segments'"),
        ("long", {"no_speech_threshold": 0.5}, ConfigError, "it needs a logprob_threshold"),
        ("long", {"temperature": (0.0, 1.0), "streamer": object()}, ConfigError, "goes with one temperature"),
        ("a language", {"langage": "en"}, TypeError, "takes no 'langage'"),
        ("a language", {"attention_mask": np.ones((3, 7))}, ValueError, r"attention_mask must be \[batch, frames\]"),
    ],
)  # fmt: skip
def test_what_cannot_be(name: str, given: dict[str, Any], error: Any, message: str, opened: Opener) -> None:
    with pytest.raises(error, match=message):
        opened().generate(recordings(name)[0], **given)


def test_settings_that_a_checkpoint_lacks(opened: Opener) -> None:
    bare = opened(lang_to_id=None, no_timestamps_token_id=None, alignment_heads=None, task_to_id=None)
    sound, _ = recordings("a language")
    lacking: dict[str, dict[str, Any]] = {
        "lang_to_id": {"language": "en"},
        "no_timestamps_token_id": {"return_timestamps": True},
        "alignment_heads": {"return_token_timestamps": True},
        "task_to_id": {"task": "translate"},
    }
    for name, given in lacking.items():
        with pytest.raises(ConfigError, match=f"the settings have no {name}"):
            bare.generate(sound, **given)


def test_two_equal_times_do_not_hold_a_window_for_ever(opened: Opener) -> None:
    call = Call.of(opened(), recordings("long")[0], None, {})
    window = windows.Window(np.asarray([41, 42, FIRST, FIRST, 40], np.int32), 2, None)
    assert windows.segments(call, window, None, 0.0, 24)[1] == 24


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (6, 1), (5, 9), (9, 5)])
def test_time_is_warped_along_the_cheapest_way(n: int, m: int) -> None:
    cost = np.random.default_rng(n * m).normal(size=(n, m)) + 3
    rows, columns = alignment.warped(cost)
    assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, n - 1, m - 1)
    steps = {(int(a), int(b)) for a, b in zip(np.diff(rows), np.diff(columns), strict=True)}
    assert steps <= {(0, 1), (1, 0), (1, 1)}

    @cache
    def best(i: int, j: int) -> float:
        before = [best(a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
        return cost[i, j] + min(before, default=0.0)

    assert cost[rows, columns].sum() == pytest.approx(best(n - 1, m - 1), rel=1e-5)
