"""A part of a model, opened out of the whole's checkpoint."""

from pathlib import Path

import numpy as np
import pytest
from battery.goldens import Golden

import formax
from formax.core.config import ConfigError

CLIP = Golden("clip", "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return CLIP.checkpoint(tmp_path)


def test_the_text_tower_of_a_clip_checkpoint(folder: Path) -> None:
    whole = formax.from_pretrained(folder)
    texts = {name: CLIP.inputs[name] for name in ("input_ids", "attention_mask")}
    tower, report = formax.AutoModelForTextEncoding.from_pretrained(folder, output_loading_info=True)
    assert (tower.architecture.name, tower.config) == ("CLIPTextModel", whole.config.text_config)
    assert report.initialised == ()
    assert any(name.startswith("vision_model.") for name in report.left_out)
    expected = whole(**CLIP.inputs).text_model_output
    np.testing.assert_allclose(tower(**texts).pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    # This checkpoint's towers say another width of the common space than the whole, which counts there.
    same = {"text_config": {"projection_dim": whole.config.projection_dim}}
    projected = formax.from_pretrained(folder, architecture="CLIPTextModelWithProjection", **same)
    features = projected(**texts).text_embeds
    np.testing.assert_allclose(features, whole.get_text_features(**texts), rtol=1e-5, atol=1e-5)


def test_a_tower_is_saved_as_the_model_that_it_is(folder: Path, tmp_path: Path) -> None:
    tower = formax.from_pretrained(folder, architecture="CLIPVisionModel")
    tower.save_pretrained(tmp_path / "tower")
    again = formax.from_pretrained(tmp_path / "tower")
    assert again.family.model_type == "clip_vision_model"
    images = CLIP.inputs["pixel_values"]
    np.testing.assert_array_equal(again(images).last_hidden_state, tower(images).last_hidden_state)


def test_what_no_part_has(folder: Path) -> None:
    with pytest.raises(ConfigError, match="architecture = 'CLIPForSinging', which is none of clip's: CLIPModel, "):
        formax.from_pretrained(folder, architecture="CLIPForSinging")
    with pytest.raises(ConfigError, match="clip has no head for AutoModelForMaskedLM; it has AutoModel, "):
        formax.AutoModelForMaskedLM.from_pretrained(folder)


def test_methods_are_models_too(folder: Path) -> None:
    whole, images = formax.from_pretrained(folder), CLIP.inputs["pixel_values"]
    out, seen = formax.capture(whole.as_method("get_image_features"), "vision.layers.*.out")(images)
    np.testing.assert_array_equal(out, whole.get_image_features(images))
    assert list(seen) == [f"vision.layers.{i}.out" for i in range(whole.config.vision_config.num_hidden_layers)]
    with pytest.raises(AttributeError, match="no attribute 'get_tex_features'; beside a Model's own it has get_text_"):
        whole.get_tex_features  # noqa: B018 (asking is the test)
