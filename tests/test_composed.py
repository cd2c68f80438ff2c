"""Models made of two others: what they share, what is new, that they write, are saved, and what does not fit."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formax
from formax.compat import flax, tf
from formax.core.config import ConfigError

KEY = jax.random.key(0)
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 20}


def bare(model_type: str, **sizes: Any) -> formax.Model:
    return formax.AutoModel.from_config(formax.AutoConfig.for_model(model_type, **sizes), key=KEY)


@pytest.fixture(scope="module")
def gpt2() -> formax.Model:
    sizes = {"n_embd": 12, "n_layer": 1, "n_head": 2, "vocab_size": 31, "n_positions": 20, "eos_token_id": 30}
    config = formax.AutoConfig.for_model("gpt2", bos_token_id=30, **sizes)
    return formax.AutoModelForCausalLM.from_config(config, key=KEY)


@pytest.fixture(scope="module")
def bert() -> formax.Model:
    return bare("bert", vocab_size=23, max_position_embeddings=20, **SIZES)


READERS: dict[str, Any] = {
    "bert": {"input_ids": np.arange(14).reshape(2, 7) % 23},
    "vit": {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)},
    "wav2vec2": {"input_values": np.random.default_rng(0).standard_normal((2, 60), np.float32)},
}


@pytest.mark.parametrize("name", READERS)
def test_it_writes_and_is_saved(name: str, gpt2: formax.Model, bert: formax.Model, tmp_path: Path) -> None:
    sound: dict[str, Any] = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (3,), "num_conv_pos_embeddings": 4}
    sound |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 1}
    sizes: dict[str, Any] = {"vit": {"image_size": 8, "patch_size": 4}, "wav2vec2": sound}
    reader = bert if name == "bert" else bare(name, **SIZES, **sizes[name])
    model = formax.encoder_decoder(reader, gpt2, key=KEY, decoder_start_token_id=30, pad_token_id=0)
    texts = model.generate(**READERS[name], max_new_tokens=5, num_beams=2)
    assert texts.shape[0] == 2
    model.save_pretrained(tmp_path)
    again = formax.from_pretrained(tmp_path)
    assert again.architecture is model.architecture
    np.testing.assert_array_equal(again.generate(**READERS[name], max_new_tokens=5, num_beams=2), texts)
    # what is written follows from what is read
    written: dict[str, Any] = {"decoder_input_ids": np.full((2, 1), 30)}
    other: dict[str, Any] = {key: value[::-1] for key, value in READERS[name].items()}
    logits, flipped = (np.asarray(model(**given, **written).logits) for given in (READERS[name], other))
    np.testing.assert_allclose(logits, flipped[::-1], atol=1e-5)
    assert np.abs(logits - flipped).max() > 1e-6


def test_what_is_said_of_single_tokens_is_read_with_them(gpt2: formax.Model, bert: formax.Model) -> None:
    """`generate` fills ids up to a size that is compiled for, and so their types."""
    model = formax.encoder_decoder(bert, gpt2, key=KEY, decoder_start_token_id=30, pad_token_id=0)
    # All tokens are some, also the one that padding has.
    given = {**READERS["bert"], "attention_mask": np.ones((2, 7), int)}
    given["token_type_ids"] = np.arange(14).reshape(2, 7) % 2
    out = model.generate(**given, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    alone = model(**given, decoder_input_ids=np.full((2, 1), 30)).logits[:, 0]
    np.testing.assert_allclose(out.logits[0], alone, atol=1e-5)


def test_parts_are_shared_and_the_rest_is_new(
    gpt2: formax.Model, bert: formax.Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "formax"):
        model = formax.encoder_decoder(bert, gpt2, key=KEY)
    assert model.params["encoder"]["embed"]["word"]["embedding"] is bert.params["embed"]["word"]["embedding"]
    assert model.params["decoder"]["norm"]["scale"] is gpt2.params["norm"]["scale"]
    assert model.params["bridge"]["kernel"].shape == (16, 12)
    (told,) = caplog.messages
    assert "decoder.layers.0.cross.q.kernel" in told
    assert "bridge.kernel" in told
    assert "mlp" not in told
    same = formax.encoder_decoder(bare("bert", vocab_size=23, **{**SIZES, "hidden_size": 12}), gpt2, key=KEY)
    assert "bridge" not in same.params


def test_towers_meet(bert: formax.Model, tmp_path: Path) -> None:
    vit = bare("vit", image_size=8, patch_size=4, **SIZES)
    model = formax.dual_encoder(vit, bert, key=KEY, projection_dim=6)
    given = READERS["bert"] | READERS["vit"]
    out = model(**given)
    assert out.logits_per_image.shape == (2, 2)
    expected = vit(**READERS["vit"]).pooler_output @ model.params["vision"]["head"]["kernel"]
    np.testing.assert_allclose(model.get_image_features(**READERS["vit"]), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = formax.AutoModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(**given).logits_per_text, out.logits_per_text)


def test_old_classes_are_made_of_two_checkpoints(gpt2: formax.Model, bert: formax.Model, tmp_path: Path) -> None:
    vit = bare("vit", image_size=8, patch_size=4, **SIZES)
    for name, part in (("bert", bert), ("gpt2", gpt2), ("vit", vit)):
        part.save_pretrained(tmp_path / name)
    flat = flax.FlaxEncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "bert", tmp_path / "gpt2", decoder_start_token_id=30, pad_token_id=0
    )
    model = formax.encoder_decoder(bert, gpt2, key=KEY, decoder_start_token_id=30, pad_token_id=0)
    given = {**READERS["bert"], "decoder_input_ids": np.full((2, 1), 30)}
    np.testing.assert_allclose(flat(**given).logits, model(**given).logits, rtol=1e-5, atol=1e-6)
    keras = tf.TFVisionTextDualEncoderModel.from_vision_text_pretrained(
        tmp_path / "vit", tmp_path / "bert", text_dtype="bfloat16", projection_dim=6
    )
    assert keras.model.config.projection_dim == 6
    assert keras.model.params["text"]["embed"]["word"]["embedding"].dtype == jnp.bfloat16
    assert not hasattr(flax.FlaxBertModel, "from_encoder_decoder_pretrained")


def test_what_does_not_fit(gpt2: formax.Model, bert: formax.Model, tmp_path: Path) -> None:
    t5 = formax.AutoConfig.for_model("t5", d_model=16, num_layers=1, num_heads=2)
    both = formax.AutoModel.from_config(t5, key=KEY)
    with pytest.raises(ConfigError, match="t5 is an encoder-decoder itself"):
        formax.encoder_decoder(both, gpt2)
    with pytest.raises(ConfigError, match="vit has no ForCausalLM: it cannot be a decoder"):
        formax.encoder_decoder(bert, bare("vit", image_size=8, patch_size=4, **SIZES))
    with pytest.raises(ValueError, match="the vision tower reads pixel_values; BertModel does not"):
        formax.dual_encoder(bert, bert)
    inner = {"model_type": "bert"}
    for broken, why in (
        ({"encoder": inner}, "made of encoder and decoder; no decoder"),
        ({"encoder": inner, "decoder": {}}, "decoder says by its model_type which family it is of; it has None"),
        ({"encoder": inner, "decoder": {"model_type": "bret"}}, "decoder: formax has no model_type 'bret'"),
        ({"encoder": inner, "decoder": inner}, "add_cross_attention must be true"),
    ):
        with pytest.raises(ConfigError, match=why):
            formax.AutoConfig.for_model("encoder-decoder", **broken)
