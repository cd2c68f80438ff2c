"""What CLIP offers beyond the battery: vectors of texts and images, its towers as trees, towers configured twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from battery.goldens import Golden

from formax.core.config import ConfigError
from formax.models.multimodal import clip


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return Golden("clip", "model").open(tmp_path)[0]


INPUTS = Golden("clip", "model").inputs


def test_features_are_the_embeddings_before_they_are_normalised(model: Any) -> None:
    out = model(**INPUTS)
    texts = model.get_text_features(INPUTS["input_ids"], INPUTS["attention_mask"])
    images = model.get_image_features(INPUTS["pixel_values"])
    for found, expected in ((texts, out.text_embeds), (images, out.image_embeds)):
        length = np.linalg.norm(found, axis=-1, keepdims=True)
        assert np.all(np.abs(length - 1) > 0.1)
        np.testing.assert_allclose(found / length, expected, atol=1e-6)


def test_a_tower_alone_is_a_part_of_the_tree(model: Any) -> None:
    text, vision = model.config.text_config, model.config.vision_config
    out = model(**INPUTS)
    alone = clip.text_model(model.params["text"], text, INPUTS["input_ids"], INPUTS["attention_mask"])
    np.testing.assert_allclose(alone["pooler_output"], out.text_model_output.pooler_output, atol=1e-5)
    seen = clip.vision_model(model.params["vision"], vision, INPUTS["pixel_values"])
    np.testing.assert_allclose(seen["pooler_output"], out.vision_model_output.pooler_output, atol=1e-5)


def test_what_a_tower_is_said_to_be_the_second_time_counts() -> None:
    # the reference takes all of it, defaults too, over the first
    twice = {"text_config": {"hidden_size": 24, "vocab_size": 7}, "text_config_dict": {"hidden_size": 48}}
    config = clip.CLIPConfig.from_dict({**twice, "vision_config": None, "vision_config_dict": {"patch_size": 16}})
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (48, 49408)
    assert (config.vision_config.patch_size, config.vision_config.hidden_size) == (16, 768)
    assert "text_config_dict" not in config.to_dict()
    assert clip.CLIPConfig.from_dict({"text_config": None, "text_config_dict": None}) == clip.CLIPConfig()


def test_heads_cannot_be_pruned_as_in_the_reference() -> None:
    with pytest.raises(ConfigError, match=r"pruned_heads.* is a switch that formax does not implement"):
        clip.CLIPTextConfig(pruned_heads={0: (1,)})  # type: ignore[arg-type]


def test_missing_inputs_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match="give input_ids"):
        model(pixel_values=INPUTS["pixel_values"])
    with pytest.raises(ValueError, match=r"pixel_values must be .*, got nothing"):
        model(INPUTS["input_ids"])
    with pytest.raises(ValueError, match="outside the table of 61 rows"):
        model([[61]], INPUTS["pixel_values"])
