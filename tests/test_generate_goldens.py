"""`Model.generate` against the reference's, token for token, on tiny models of seven families.

`tests/oracle/make_generate.py` makes the goldens and says what the reference does that one may not expect. Cases of a
family have few shapes (three rows of 7 or 9 tokens, 12 new ones; one row where only one can be), in an order in which
neighbours have programs in common.
"""

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import pytest
from oracle import cases, weights
from safetensors.numpy import save_file

import formax
from formax import generation
from formax.generation import api

DATA = Path(__file__).parent / "data" / "generate"
FAMILIES = sorted(path.stem for path in DATA.glob("*.json"))
# What is summed in another order is off by the last bits, and a bit more where logits are processed.
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
DRAWS = 3000

Array = npt.NDArray[Any]
Opener = Callable[..., Any]


@cache
def golden(family: str) -> dict[str, Any]:
    return json.loads((DATA / f"{family}.json").read_text())


@cache
def arrays(family: str) -> dict[str, Array]:
    path = DATA / f"{family}.npz"
    if not path.is_file():
        return {}
    with np.load(path) as file:
        return dict(file)


CASES = [(family, name) for family in FAMILIES for name in golden(family)["cases"]]
SAMPLING = [(family, name) for family in FAMILIES for name in golden(family)["sampling"]]


def written(folder: Path, model: dict[str, Any], settings: dict[str, Any]) -> Path:
    """Writes a checkpoint as a user has it, with settings of generation if there are any."""
    (folder / "config.json").write_text(json.dumps(model["config"]))
    if settings:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    save_file(weights.scaled(model["keys"], model["scale"]), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Opens a model of a family once; a draft also for each of its settings."""
    models: dict[Any, Any] = {}

    def open_(family: str, name: str = "main", settings: dict[str, Any] | None = None) -> Any:
        key = family, name, json.dumps(settings)
        if key not in models:
            model = golden(family)["models"][name]
            said = model["generation_config"] | (settings or {})
            models[key] = formax.from_pretrained(written(tmp_path_factory.mktemp(family), model, said))
        return models[key]

    return open_


def inputs_of(family: str, name: str) -> dict[str, Array]:
    """The arrays of a call; sounds are made up again."""
    return {
        key: cases.floats(value[1], *value[2:]) if value[0] == "floats" else np.asarray(value, np.int32)
        for key, value in golden(family)["inputs"][name].items()
    }


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """The settings of a call, of which JSON has no constraints."""
    settings = dict(case["settings"])
    if "constraints" in settings:
        settings["constraints"] = [
            generation.PhrasalConstraint(one["phrase"])
            if "phrase" in one
            else generation.DisjunctiveConstraint(one["any"])
            for one in settings["constraints"]
        ]
    return settings


def plain(model: Any) -> Any:
    """`generate` of all models, also where a family has its own before it (Whisper: `test_whisper.py`)."""
    return partial(api.plain, model) if model.family.model_type == "whisper" else model.generate


def shapes(value: Any) -> Any:
    return list(value.shape) if hasattr(value, "shape") else [shapes(one) for one in value]


def alive(case: dict[str, Any], steps: int, model: Any) -> Array:
    """Which rows have not ended before a step, [steps, rows]: what is computed of padding is of no worth."""
    eos = case["settings"].get("eos_token_id", model.generation_config.eos_token_id)
    ends: Any = [] if eos is None else np.atleast_1d(eos)
    ended = np.isin(np.asarray(case["sequences"])[:, -steps:], ends).cumsum(1)
    return np.pad(ended, ((0, 0), (1, 0)))[:, :-1].T == 0


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family}-{name}" for family, name in CASES])
def test_generate_equals_the_reference(family: str, name: str, opened: Opener) -> None:
    case = golden(family)["cases"][name]
    expected = {
        key.removeprefix(f"{name}."): array for key, array in arrays(family).items() if key.rpartition(".")[0] == name
    }
    model = opened(family)
    more = {"assistant_model": opened(family, "draft", case["assistant"])} if "assistant" in case else {}
    # of beams, scores of texts come with those of tokens
    asked = {"output_scores": True} if "sequences_scores" in expected or "beam_indices" in expected else {}
    settings = settings_of(case) | asked
    out = plain(model)(**inputs_of(family, case["inputs"]), **settings, **more, return_dict_in_generate=True)
    np.testing.assert_array_equal(np.asarray(out.sequences), case["sequences"])
    for key in ("scores", "logits"):
        if key in expected:
            got, right = np.stack([np.asarray(one) for one in getattr(out, key)]), expected[key]
            assert got.shape == right.shape
            rows = alive(case, len(right), model) if case["mode"] != "beam" else np.ones(right.shape[:2], bool)
            np.testing.assert_allclose(got[rows], right[rows], **NEAR, err_msg=key)
    if "sequences_scores" in expected:
        np.testing.assert_allclose(np.asarray(out.sequences_scores), expected["sequences_scores"], **NEAR)
    if "beam_indices" in expected:
        np.testing.assert_array_equal(np.asarray(out.beam_indices), expected["beam_indices"])
    for key, normalize in (("transition_scores", False), ("transition_scores_normalized", True)):
        if key in expected:
            beams = out.beam_indices if "beam_indices" in expected else None
            got = np.asarray(
                model.compute_transition_scores(out.sequences, out.scores, beams, normalize_logits=normalize)
            )
            steps = expected[key].shape[1]
            rows = alive(case, steps, model).T if beams is None else np.ones(expected[key].shape, bool)
            np.testing.assert_allclose(got[rows], expected[key][rows], **NEAR, err_msg=key)
    for key, right in case.get("shapes", {}).items():
        assert shapes(getattr(out, key)) == right, key


def test_a_decoder_alone_assists_an_encoder_decoder(opened: Opener, tmp_path: Path) -> None:
    """It looks at the states of the model's own encoder; whatever it guesses, the text stays what it was."""
    model, config = opened("bart"), opened("bart").config
    model.save_pretrained(tmp_path)
    draft = formax.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert draft.architecture.name == "BartForCausalLM"
    given = {"input_ids": inputs_of("bart", "one")["input_ids"], "max_new_tokens": 12}
    own = np.asarray(model.generate(**given))
    assert len(set(own.ravel().tolist())) > 4
    for assistant in (draft, draft.replace(params=jax.tree.map(lambda x: 1.1 * x, draft.params))):
        np.testing.assert_array_equal(np.asarray(model.generate(**given, assistant_model=assistant)), own)
    mask = np.ones_like(given["input_ids"])
    mask[:, -1] = 0
    with pytest.raises(ValueError, match="a decoder alone looks at all states: give inputs without padding"):
        model.generate(**given, attention_mask=mask, assistant_model=draft)
    narrow = formax.AutoModelForCausalLM.from_config(config.replace(d_model=16), key=jax.random.key(0))
    with pytest.raises(ValueError, match="looks at 16 channels, and the model's encoder has"):
        model.generate(**given, assistant_model=narrow)


@pytest.mark.parametrize(("family", "name"), SAMPLING, ids=[f"{family}-{name}" for family, name in SAMPLING])
def test_samples_have_the_distribution_of_the_reference(family: str, name: str, opened: Opener) -> None:
    case = golden(family)["sampling"][name]
    first, second = (arrays(family)[f"sampling.{name}.{part}"].astype(np.float64) for part in ("first", "second"))
    out = plain(opened(family))(
        **inputs_of(family, case["inputs"]),
        **case["settings"],
        do_sample=True,
        max_new_tokens=2,
        num_return_sequences=DRAWS,
        key=jax.random.key(0),
    )
    pairs = np.asarray(out)[:, -2:]
    counts = np.zeros_like(second)
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    wanted = DRAWS * first[:, None] * second
    assert counts[wanted == 0].sum() == 0, "a token was drawn that the settings rule out"
    # Pairs that are rare are counted together, for the statistic is chi-squared only of five and more.
    often = wanted >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(wanted[often], wanted[~often].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    # Wilson and Hilferty: its cube root is nearly normal; four deviations are one false alarm in 30,000.
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviation < 4
