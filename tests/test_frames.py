"""Frames that families fill, filled with the least: encoder-decoders, two towers, detectors, images."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.core import spec as specs
from formax.core.config import ConfigError, config
from formax.core.outputs import BaseModelOutput, DetectionModelOutput, TextEmbedsOutput
from formax.core.spec import Param, Spec, stack_of
from formax.layers import detection, image_heads, mask_head, norm, patches, seq2seq, towers, transformer
from formax.layers.attention import Mask
from formax.layers.conv import patch_spec
from formax.layers.dropout import layer_drop
from formax.layers.spec_augment import SpecAugmentConfig, augment
from formax.layers.transformer import TransformerConfig

KEY = jax.random.key(0)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


# ---- encoder and decoder, whatever they are


def encode(
    p: Any, c: Any, input_ids: Any = None, attention_mask: Any = None, vectors: Any = None, key: Any = None
) -> Any:
    return BaseModelOutput(last_hidden_state=input_ids[..., None] * p)


def decode(p: Any, c: Any, *given: Any) -> Any:
    return given, "new cache"


class Starts:
    decoder_start_token_id, pad_token_id = 5, 1


IDS = jnp.array([[7, 8, 9]])


def test_the_decoder_gets_what_the_encoder_made() -> None:
    run = seq2seq.both(encode, decode)
    out = run(2, Starts(), IDS, "mask", IDS + 1, "own mask", key=None)
    given: Any = out.last_hidden_state
    assert [x if isinstance(x, str | None) else x.tolist() for x in given] == [
        *([[8, 9, 10]], "own mask", [[[14], [16], [18]]], "mask"),
        *(None, None, None),
    ]
    assert out.encoder_last_hidden_state is not None
    assert (out.cache, out.encoder_last_hidden_state.tolist()) == ("new cache", [[[14], [16], [18]]])


@pytest.mark.parametrize("given", [{"decoder_input_ids": IDS}, {"decoder_inputs_embeds": draw(1, 2, 3)}, {}])
def test_a_decoder_without_inputs_reads_the_text_where_it_is_so(given: dict[str, Any]) -> None:
    first: Any = seq2seq.both(encode, decode, shifted=seq2seq.after_start)(1, Starts(), IDS, **given).last_hidden_state
    assert first[0] is given.get("decoder_input_ids") if given else first[0].tolist() == [[5, 7, 8]]
    plain: Any = seq2seq.both(encode, decode)(1, Starts(), IDS, **given).last_hidden_state
    assert plain[0] is given.get("decoder_input_ids")
    with pytest.raises(ValueError, match="without input_ids the decoder needs decoder_input_ids or"):
        seq2seq.both(encode, decode, shifted=seq2seq.after_start)(1, Starts(), encoder_outputs=draw(1, 2, 3))


def test_where_the_encoders_states_come_from() -> None:
    states = draw(1, 2, 3)
    made = BaseModelOutput(last_hidden_state=states + 1)
    room: Any = ({"cross": "room"},)

    def memory(inputs: Any, given: Any, cache: Any) -> Any:
        return seq2seq.memory_of(lambda: made, inputs, given, cache)

    assert memory((IDS,), states, room) is states
    assert memory((None, IDS), None, room) is made.last_hidden_state
    assert memory((None,), None, None) is made.last_hidden_state  # an encoder says itself what it lacks
    assert memory((None, None), None, room) is None
    with pytest.raises(ValueError, match="no room for the encoder's states"):
        memory((None,), None, ({"cross": None},))


def test_caches_have_the_heads_of_their_layers() -> None:
    sizes: dict[str, Any] = {"head_dim": 4, "cross_heads": 3}
    made = seq2seq.caches([2, 1], 5, 7, 6, jnp.bfloat16, **sizes)
    assert [(one["attn"].k.shape, one["cross"].v.shape) for one in made if one["attn"] and one["cross"]] == [
        ((5, 7, 2, 4), (5, 6, 3, 4)),
        ((5, 7, 1, 4), (5, 6, 3, 4)),
    ]
    assert seq2seq.caches([2], 5, 7, None, jnp.float32, **sizes)[0]["cross"] is None
    assert seq2seq.caches([2], 5, 7, 0, jnp.float32, **sizes)[0]["cross"] is not None


# ---- BART's line


@config
class SmallConfig(TransformerConfig):
    vocab_size: int = 13
    max_position_embeddings: int = 9
    encoder_layers: int = 2
    decoder_layers: int = 2
    encoder_ffn_dim: int = 10
    decoder_ffn_dim: int = 6
    encoder_attention_heads: int = 3
    decoder_attention_heads: int = 2
    d_model: int = 12
    init_std: float = 0.5
    scale_embedding: bool = True
    decoder_start_token_id: int | None = 5
    pad_token_id: int | None = 1


def part_spec(c: Any, part: str) -> dict[str, Spec]:
    blocks = [transformer.block_spec(c, part)] * getattr(c, f"{part}_layers")
    return {"layers": stack_of("layers", blocks), "norm": norm.layer_spec("layer_norm", c.d_model)}


def embeddings(p: Any, c: Any, part: str, ids: Any, vectors: Any, offset: Any, key: Any) -> jax.Array:
    x = transformer.words(p, c, part, ids, vectors, c.max_position_embeddings)
    return x + jnp.sin(offset + jnp.arange(x.shape[1]))[None, :, None]


@pytest.mark.parametrize("around", [transformer.pre_norm, transformer.post_norm])
def test_a_relative_is_embeddings_and_an_order_of_norms(around: Any) -> None:
    c = SmallConfig()
    p = specs.init(transformer.text_spec(part_spec, c), KEY)
    encode, decode = (make(embeddings, around) for make in (transformer.text_encoder, transformer.text_decoder))
    ids, own = jnp.array([[3, 4, 5, 6, 7], [8, 9, 1, 1, 1]]), jnp.array([[5, 2, 8, 2], [5, 3, 3, 11]])
    mask = (ids != 1).astype(jnp.int32)
    run = partial(seq2seq.both(encode, decode), p, c)
    whole = run(ids, mask, own)
    np.testing.assert_allclose(whole.last_hidden_state.mean(-1), 0, atol=1e-5)  # the last norm
    other = run(ids.at[1, 2:].set(4), mask, own)
    np.testing.assert_allclose(other.last_hidden_state, whole.last_hidden_state, atol=1e-5)  # padding is not read
    with pytest.raises(ValueError, match="give either decoder_input_ids or"):
        run(ids)

    cache = transformer.init_cache(c, 2, 4, 5, jnp.float32)
    first = run(ids, mask, own[:, :3], cache=cache)
    last = run(None, mask, own[:, 3:], cache=first.cache)
    steps = jnp.concatenate([first.last_hidden_state, last.last_hidden_state], 1)
    np.testing.assert_allclose(steps, whole.last_hidden_state, atol=1e-5)
    assert last.encoder_last_hidden_state is None

    alone = specs.init(transformer.lone_decoder_spec(part_spec, c), KEY)
    x, _ = decode(alone, c, own, encoder_hidden_states=draw(2, 5, 12))
    assert np.abs(x - decode(alone, c, own)[0]).max() > 0.01
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        decode(alone, c)


def test_where_the_norms_are() -> None:
    p, x = {"scale": draw(3), "bias": draw(3)}, 5 * draw(2, 4, 3)
    rate: Any = (0.0, None)
    y, seen = transformer.post_norm(p, x, lambda x: (x * x, "seen"), *rate)
    np.testing.assert_allclose(y, norm.layer(p, x + x * x, 1e-5), rtol=1e-5)
    assert seen == "seen"
    y, _ = transformer.pre_norm(p, x, lambda x: (x * x, None), *rate)
    np.testing.assert_allclose(y, x + norm.layer(p, x, 1e-5) ** 2, rtol=1e-5)


def test_given_vectors_are_not_scaled() -> None:
    c = SmallConfig()
    p = specs.init(transformer.text_spec(part_spec, c), KEY)
    rows = p["embed"]["word"]["embedding"][jnp.array([[3, 4]])]
    words = partial(transformer.words, p, c, "encoder")
    np.testing.assert_allclose(words(jnp.array([[3, 4]]), None, 9), rows * 12**0.5, rtol=1e-6)
    np.testing.assert_array_equal(words(None, rows, 9), rows)


def test_a_layer_is_dropped_as_a_whole() -> None:
    before, x = draw(2, 3), 1 + draw(2, 3)
    assert layer_drop(before, x, 0.5, None) is x
    assert layer_drop(before, x, 0.0, KEY) is x
    np.testing.assert_array_equal(layer_drop(before, x, 1.0, KEY), before)
    made = jax.vmap(lambda key: layer_drop(before, x, 0.25, key))(jax.random.split(KEY, 400))
    dropped = [bool((one == before).all()) for one in made]
    assert all(now or bool((one == x).all()) for now, one in zip(dropped, made, strict=True))
    assert 70 < sum(dropped) < 130


@pytest.mark.parametrize("name", ["encoder_attention_heads", "decoder_attention_heads"])
def test_heads_that_do_not_divide_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"d_model=12 is no multiple of {name}=5"):
        SmallConfig(**{name: 5})  # type: ignore[arg-type]


# ---- a spectrogram in training


def test_spans_of_frames_and_mels_are_silent() -> None:
    sizes: dict[str, Any] = {"mask_time_length": 3, "mask_feature_prob": 0.4, "mask_feature_length": 2}
    c, x = SpecAugmentConfig(mask_time_prob=0.5, **sizes), 1 + draw(2, 6, 20) ** 2
    assert augment(c, x, None, None) is x
    assert augment(c.replace(apply_spec_augment=False), x, None, KEY) is x
    padding = (jnp.arange(20) < jnp.array([[20], [9]])).astype(jnp.int32)
    y = augment(c, x, padding, KEY)
    silent = y == 0
    np.testing.assert_array_equal(y[~silent], x[~silent])
    frames, mels = silent.all(1), silent.all(2)
    np.testing.assert_array_equal(silent, frames[:, None] | mels[:, :, None])
    assert frames.any(1).all()
    assert mels.any(1).all()
    assert not frames[1, 9:].any()  # of real frames alone


# ---- two towers


class Whole:
    text_config, vision_config = "words", "pictures"


def text(p: Any, c: Any, input_ids: Any = None, token_type_ids: Any = None, key: Any = None) -> BaseModelOutput:
    assert c == "words"
    x = input_ids if token_type_ids is None else input_ids + token_type_ids
    return BaseModelOutput(last_hidden_state=x, pooler_output=x[:, 0])


def vision(p: Any, c: Any, pixel_values: Any = None, stretch: bool = False, key: Any = None) -> BaseModelOutput:
    assert c == "pictures"
    return BaseModelOutput(last_hidden_state=pixel_values, pooler_output=pixel_values[:, -1] * (2 if stretch else 1))


PARAMS = {"text": {"head": {"kernel": draw(3, 4)}}, "vision": {}, "logit_scale": jnp.log(3.0)}


def test_towers_are_compared() -> None:
    model = towers.both(text, vision)
    names = ["p", "c", "input_ids", "pixel_values", "token_type_ids", "stretch", "key"]
    assert list(inspect.signature(model).parameters) == names
    texts, images = draw(2, 5, 3), draw(3, 6, 4)
    out = model(PARAMS, Whole(), texts, images, token_type_ids=1.0)
    t, i = (texts[:, 0] + 1) @ draw(3, 4), images[:, -1]
    t, i = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (t, i))
    np.testing.assert_allclose(out.logits_per_text, 3 * t @ i.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out.logits_per_image, out.logits_per_text.T)
    np.testing.assert_allclose(out.text_embeds, t, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.vision_model_output.pooler_output, images[:, -1])
    other = towers.both(text, vision, lambda p, t, i: t @ i.T - 5)(PARAMS, Whole(), texts, images, 1.0, True)
    np.testing.assert_allclose(other.logits_per_text, t @ i.T - 5, rtol=1e-4)
    np.testing.assert_array_equal(other.vision_model_output.pooler_output, 2 * images[:, -1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_mask'"):
        model(PARAMS, Whole(), texts, images, attention_mask=1)


def test_vectors_of_one_tower() -> None:
    texts = draw(2, 5, 3)
    found = towers.features(text, "text")(PARAMS, Whole(), texts, token_type_ids=1.0)
    np.testing.assert_allclose(found, (texts[:, 0] + 1) @ draw(3, 4), rtol=1e-5)
    alone = towers.projected(text, TextEmbedsOutput, "text_embeds")
    assert list(inspect.signature(alone).parameters) == ["p", "c", "input_ids", "token_type_ids", "key"]
    out = alone(PARAMS["text"], "words", texts)
    np.testing.assert_allclose(out.text_embeds, texts[:, 0] @ draw(3, 4), rtol=1e-5)
    assert out.last_hidden_state is texts


# ---- images


class Pixels:
    num_channels, image_size, patch_size, encoder_stride, hidden_size = 2, (4, 6), 2, 2, 5
    initializer_range, num_labels = 0.5, 0


def test_an_image_is_a_row_of_vectors() -> None:
    table = Param((7, 5), (None, None), "table", specs.normal(1.0))
    p = specs.init({"patch": patch_spec("patch", 2, 5, (2, 2), init=specs.normal(1.0)), "position": table}, KEY)
    p = {**p, "position": {"embedding": p["position"]}, "cls": {"embedding": draw(5)}}
    x, positions = draw(3, 2, 4, 6), p["position"]["embedding"]
    y = patches.embed_image(p, Pixels(), x, stretch=False)
    np.testing.assert_allclose(y[:, 0], jnp.broadcast_to(draw(5) + positions[0], (3, 5)), rtol=1e-5)
    last = x[:, :, 2:, 4:].transpose(0, 2, 3, 1).reshape(3, -1) @ p["patch"]["kernel"] + p["patch"]["bias"]
    np.testing.assert_allclose(y[:, 6], last + positions[6], rtol=1e-4, atol=1e-5)
    two = {**p, "other": {"embedding": 2 * draw(5)}, "position": {"embedding": jnp.pad(positions, ((1, 0), (0, 0)))}}
    z = patches.embed_image(two, Pixels(), x, stretch=False, first=("other", "cls"))
    np.testing.assert_allclose(z[:, 0], jnp.broadcast_to(2 * draw(5), (3, 5)), rtol=1e-5)
    np.testing.assert_array_equal(z[:, 1:], y)
    two["position"] = {"embedding": positions[1:]}
    np.testing.assert_array_equal(patches.embed_image(two, Pixels(), x, stretch=False, first=()), y[:, 1:])
    with pytest.raises(ValueError, match="this one has no token for masks"):
        patches.embed_image(p, Pixels(), x, stretch=False, hidden=jnp.ones((3, 6)))
    masked = p | {"mask": {"embedding": jnp.full(5, 9.0)}}
    hidden = jnp.zeros((3, 6)).at[:, 5].set(1)
    z = patches.embed_image(masked, Pixels(), x, stretch=False, hidden=hidden)
    np.testing.assert_allclose(z[:, 6], jnp.broadcast_to(9 + positions[6], (3, 5)), rtol=1e-5)
    np.testing.assert_array_equal(z[:, :6], y[:, :6])
    with pytest.raises(ValueError, match=r"bool_masked_pos must be \(3, 6\) \[batch, patches\], got \(3, 5\)"):
        patches.embed_image(masked, Pixels(), x, stretch=False, hidden=jnp.ones((3, 5)))


def test_pixels_lie_where_their_patch_is() -> None:
    c = Pixels()
    p = specs.init(image_heads.pixels_spec(c), KEY)
    x = draw(3, 6, 5)
    y = image_heads.pixels(p, c, x, (2, 3))
    assert y.shape == (3, 2, 4, 6)
    one = (x[:, 5] @ p["head"]["kernel"] + p["head"]["bias"]).reshape(3, 2, 2, 2)  # second row, last column
    np.testing.assert_allclose(y[:, :, 2:, 4:], one, rtol=1e-4, atol=1e-5)
    image_heads.check_stride(c)
    c.encoder_stride = 4
    with pytest.raises(ValueError, match="needs patches of the encoder_stride=4, patch_size is 2"):
        image_heads.check_stride(c)
    assert image_heads.labels_spec(c) == {}


# ---- detectors


class Finds:
    d_model, init_std, init_xavier_std, encoder_attention_heads = 16, 0.5, 1.0, 2


def test_attention_by_place_leaves_values_alone() -> None:
    p = {part: {"kernel": 0.3 * draw(6, 6) + i} for i, part in enumerate("qkvo")}
    x, memory, place = draw(2, 3, 6), draw(2, 4, 6), 1 + draw(1, 4, 6)
    here = jnp.zeros((1, 3, 6))
    found = detection.attend(p, x, here, memory, place, 2, "cross", mask=Mask())
    given = {"q": x, "k": memory + place, "v": memory}
    q, k, v = ((y @ p[part]["kernel"]).reshape(2, -1, 2, 3) for part, y in given.items())
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 3**0.5)
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 3, 6) @ p["o"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_what_states_tell_of_objects() -> None:
    spec = detection.heads_spec(Finds(), 4)
    names = {entry.name for entry in specs.table(spec).entries}
    assert names == {
        f"{layer}.{leaf}"
        for layer in ("class_labels_classifier", *(f"bbox_predictor.layers.{i}" for i in range(3)))
        for leaf in ("weight", "bias")
    }
    p, x = specs.init(spec, KEY)["head"], draw(3, 2, 5, 16)
    out = detection.find(p, x)
    assert (out.logits.shape, out.pred_boxes.shape) == ((3, 2, 5, 4), (3, 2, 5, 4))
    h = x
    for layer in p["box"][:2]:
        h = np.maximum(h @ layer["kernel"] + layer["bias"], 0)
    boxes = 1 / (1 + np.exp(-(h @ p["box"][2]["kernel"] + p["box"][2]["bias"])))
    np.testing.assert_allclose(out.pred_boxes, boxes, rtol=1e-4, atol=1e-5)
    states = DetectionModelOutput(last_hidden_state=x[2], intermediate_hidden_states=x)
    every = detection.found(p, states)
    assert every.auxiliary_outputs is not None
    assert len(every.auxiliary_outputs) == 2
    np.testing.assert_allclose(every.logits, out.logits[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(every.auxiliary_outputs[1].pred_boxes, out.pred_boxes[1], rtol=1e-5, atol=1e-6)


def test_objects_look_at_what_is_no_padding() -> None:
    p = specs.init(mask_head.mask_head_spec(Finds(), (3, 4, 5, 6)), KEY)["attn"]
    seen = jnp.ones((2, 3, 4), bool).at[:, :, 3].set(False)
    where = mask_head.object_attention(p, draw(2, 5, 16), draw(2, 3, 4, 16), seen, 2)
    assert where.shape == (2, 5, 3, 4, 2)
    np.testing.assert_allclose(where.sum((2, 3, 4)), 1, rtol=1e-5)  # one softmax over places and heads
    assert where[:, :, :, 3].max() == 0
