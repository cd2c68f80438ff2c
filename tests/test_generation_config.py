"""The settings of generation, against the reference's: files, what is refused or told of, and the way that follows."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import jax
import pytest
from compiled import programs
from oracle import make_generation as oracle

from formax.core import registry
from formax.core.config import ConfigError
from formax.generation.config import (
    GenerationConfig,
    GenerationMode,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "generation" / "settings.json").read_text())


def test_defaults_equal_the_reference() -> None:
    assert GenerationConfig().to_dict() == GOLDEN["defaults"]


@pytest.mark.parametrize("name", oracle.SAVED)
def test_files_are_written_as_the_reference_writes_them(name: str, tmp_path: Path) -> None:
    config = GenerationConfig.from_dict(oracle.SAVED[name])
    path = Path(config.save_pretrained(tmp_path))
    assert path == tmp_path / "generation_config.json"
    assert path.read_text() == GOLDEN["saved"][name]
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    if name != "bias":  # JSON turns its keys into text, here as there.
        assert again == config
    assert hash(again) == hash(GenerationConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("values", "expected"),
    list(zip(oracle.CHECKED, GOLDEN["checked"], strict=True)),
    ids=[str(values)[:60] for values in oracle.CHECKED],
)
def test_what_is_refused_and_told_of(
    values: dict[str, Any], expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if expected == "refused":
        with pytest.raises(ConfigError, match=rf"generation_config.json: .*({'|'.join(_words(values))})"):
            GenerationConfig.from_dict(values)
        return
    config = GenerationConfig.from_dict(values)
    assert sorted(config.issues()) == sorted(expected)
    with caplog.at_level(logging.WARNING, logger="formax"):
        config.check()
    assert len(caplog.records) == len(expected)
    assert all(any(name in record.getMessage() for name in expected) for record in caplog.records)
    if expected:
        with pytest.raises(ConfigError, match=str(expected[0])):
            config.check(strict=True)
        with pytest.raises(ConfigError, match=str(expected[0])):
            config.save_pretrained(tmp_path)
        assert list(tmp_path.iterdir()) == []
    else:
        config.check(strict=True)


def _words(values: dict[str, Any]) -> list[str]:
    """Every setting in question, the inner ones of a watermark too."""
    inner = values.get("watermarking_config", {})
    return [*values, *inner]


@pytest.mark.parametrize(
    ("values", "assistant", "expected"),
    [(*mode, expected) for mode, expected in zip(oracle.MODES, GOLDEN["modes"], strict=True)],
)
def test_the_way_that_follows(
    values: dict[str, Any], assistant: bool, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="formax"):
        mode = GenerationConfig.from_dict(values).mode(assistant=assistant)
    assert mode == GenerationMode(expected)
    asked = assistant or any(
        name in values for name in ("dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit")
    )
    followed = mode in (GenerationMode.ASSISTED, GenerationMode.DOLA) and not (assistant and "dola_layers" in values)
    assert bool(caplog.records) == (asked and not followed)


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_settings_in_old_configurations_of_models(name: str) -> None:
    case = GOLDEN["models"][name]
    assert GenerationConfig.from_model_config(case["config"]).to_diff_dict() == case["made"]
    if name == "composite":
        return
    family = registry.family(name).config
    config = family.from_dict(case["config"])
    assert GenerationConfig.from_model_config(config).to_diff_dict() == case["made"]


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    values = {"lang_to_id": {"<|en|>": 5}, "alignment_heads": [[1, 2]], "transformers_version": "4.30.0"}
    (tmp_path / "generation_config.json").write_text(json.dumps({**values, "max_length": 30}))
    config = GenerationConfig.from_pretrained(tmp_path, max_length=40, temperature=0.5)
    assert (config.max_length, config.temperature, config.alignment_heads) == (40, 0.5, ((1, 2),))
    assert config.replace(alignment_heads=[[3]]).alignment_heads == ((3,),)
    written = config.to_diff_dict()
    assert written == {**values, "max_length": 40, "temperature": 0.5, "transformers_version": "4.57.6"}


def test_replace() -> None:
    config = GenerationConfig(eos_token_id=[2, 5])
    assert config.eos_token_ids == (2, 5)
    assert GenerationConfig(eos_token_id=2).eos_token_ids == (2,)
    assert GenerationConfig().eos_token_ids == ()
    assert config.replace(num_beams=3).num_beams == 3
    assert config.num_beams == 1
    with pytest.raises(ConfigError, match="no setting 'num_beam'; did you mean 'num_beams'"):
        config.replace(num_beam=3)
    with pytest.raises(ConfigError, match=r"streamer is an argument of generate\(\)"):
        config.replace(streamer=None)
    with pytest.raises(AttributeError, match="no setting 'num_beam'; did you mean 'num_beams'"):
        config.num_beam  # noqa: B018


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_length": "long"}, "max_length must be a whole number or null, got 'long'"),
        ({"top_k": 2.5}, "top_k must be a whole number or null, got 2.5"),
        ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
        ({"do_sample": None}, "do_sample must be true or false, got None"),
        ({"temperature": True}, "temperature must be a number or null, got True"),
        ({"eos_token_id": ["a"]}, "eos_token_id must be a whole number or a list of a whole number or null"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list of a list of a whole number or null"),
        ({"watermarking_config": {"ngram_len": 5}}, "watermarking_config needs 'keys'"),
        ({"watermarking_config": {"ratio": 5}}, "watermarking_config has no setting 'ratio'"),
        (
            {"watermarking_config": {"ngram_len": 5, "keys": [1], "sampling_table_size": 2**25}},
            "sampling_table_size must be at most 2",
        ),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"generation_config.json: {message}"):
        GenerationConfig.from_dict(values)


def test_watermarks_of_both_kinds(tmp_path: Path) -> None:
    for values, kind in (
        ({"bias": 3.0}, WatermarkingConfig),
        ({"ngram_len": 5, "keys": [1, 2]}, SynthIDTextWatermarkingConfig),
    ):
        config = GenerationConfig.from_dict({"watermarking_config": values})
        assert isinstance(config.watermarking_config, kind)
        config.save_pretrained(tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path) == config


def test_a_folder_without_settings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no generation_config.json; .*from_model_config"):
        GenerationConfig.from_pretrained(tmp_path)


def test_several_decoders_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than one of decoder, generator, text_config"):
        GenerationConfig.from_model_config({"decoder": {}, "text_config": {}})


def test_a_static_argument() -> None:
    run = jax.jit(lambda config, x: x * config.temperature, static_argnums=0)
    config = GenerationConfig(temperature=0.5, sequence_bias={(1, 2): 0.5}, extra={"a": [1]})
    assert run(config, 2.0) == 1.0
    assert run(pickle.loads(pickle.dumps(config)), 2.0) == 1.0
    assert programs(run) == 1
