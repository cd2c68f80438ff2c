"""Layers that several families share, against their formulas: speech, maps, backbones, heads of encoder-decoders."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.core import registry, tap
from formax.core import spec as specs
from formax.core.config import ConfigError, check_multiple, config
from formax.core.outputs import Seq2SeqOutput
from formax.layers import maps, norm, seq2seq, seq2seq_heads, speech, speech_heads
from formax.layers.attention import KVCache, causal_mask
from formax.layers.backbone import BackboneConfig
from formax.layers.spec_augment import drawn_spans
from formax.layers.speech import AdaptedSpeechConfig, SpeechConfig

KEY = jax.random.key(0)


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def drawn(spec: Any) -> Any:
    """Parameters that are nowhere 0 or 1, so that each can be seen."""
    return jax.tree.map(lambda leaf: 0.5 + jax.random.uniform(KEY, leaf.shape), specs.init(spec, KEY))


# ---- configurations and initial values


def test_a_field_that_does_not_divide_another_is_named() -> None:
    c = SpeechConfig(hidden_size=12, num_attention_heads=3, num_conv_pos_embedding_groups=4)
    check_multiple(c, "hidden_size", "num_attention_heads")
    with pytest.raises(ConfigError, match="hidden_size=12 is no multiple of num_attention_heads=5"):
        SpeechConfig(hidden_size=12, num_attention_heads=5, num_conv_pos_embedding_groups=4)
    with pytest.raises(ConfigError, match="hidden_size=12 is no multiple of num_attention_heads=0"):
        SpeechConfig(hidden_size=12, num_attention_heads=0, num_conv_pos_embedding_groups=4)


def test_a_constant_is_everywhere_the_same() -> None:
    np.testing.assert_array_equal(specs.constant(2.5)(KEY, (2, 3), jnp.float32), np.full((2, 3), 2.5))
    assert specs.constant(2.5) is specs.constant(2.5)  # leaves of one initialiser are drawn together


# ---- speech

SPEECH = partial(
    SpeechConfig,
    hidden_size=4,
    num_attention_heads=2,
    num_conv_pos_embedding_groups=2,
    conv_dim=(5, 6),
    conv_stride=(3, 2),
    conv_kernel=(7, 4),
)


@pytest.mark.parametrize("kind", ["group", "layer"])
@pytest.mark.parametrize("samples", [16, 17, 21, 22, 47])
def test_frames_are_counted_as_they_are_made(kind: str, samples: int) -> None:
    c = SPEECH(feat_extract_norm=kind)
    p = specs.init(speech.features_spec(c), KEY)
    assert ["norm" in layer for layer in p] == [True, kind == "layer"]
    made = speech.features(p, c, jnp.asarray(draw(2, samples)))
    assert made.shape == (2, speech.frame_lengths(c, samples), 6)
    assert speech.least_samples(c) == 16
    speech.check_samples(c, jnp.zeros((2, 16)))
    for shape in ((2, 15), (16,)):
        with pytest.raises(
            ValueError, match=r"input_values must be \[batch, samples\], at least 16 of them; got shape"
        ):
            speech.check_samples(c, jnp.zeros(shape))


def test_norms_of_the_feature_encoder_are_over_a_channel_or_over_a_frame() -> None:
    c = SPEECH(feat_extract_activation="linear", conv_dim=(5,), conv_stride=(3,), conv_kernel=(7,))
    x = speech.features(specs.init(speech.features_spec(c), KEY), c, jnp.asarray(draw(2, 100)))
    np.testing.assert_allclose(x.mean(1), 0, atol=1e-5)
    c = SPEECH(feat_extract_activation="linear", feat_extract_norm="layer")
    x = speech.features(specs.init(speech.features_spec(c), KEY), c, jnp.asarray(draw(2, 100)))
    np.testing.assert_allclose(x.mean(-1), 0, atol=1e-5)


def test_real_frames_are_made_of_real_samples_alone() -> None:
    mask = jnp.arange(40) < jnp.array([[40], [22], [21], [9]])
    frames = speech.frame_lengths(SPEECH(), 40)
    found = speech.real_frames(SPEECH(), mask, frames)
    assert found.sum(-1).tolist() == [5, 2, 1, 0]
    assert found[1].tolist() == [True, True, False, False, False]


# Of torch 2.13.0: a `Conv1d` of 4 channels in 2 groups under `weight_norm(dim=2)`, GELU behind it.
TORCH = {
    4: [
        [-0.16617, 0.1377, 0.4054, 0.69762],
        [-0.10706, 0.08153, -0.03772, 0.17518],
        [-0.16954, -0.16499, -0.15414, 0.23945],
        [-0.08592, -0.14338, 0.04166, 1.17069],
        [-0.0715, -0.16785, 0.82076, 1.78371],
        [-0.14908, -0.01803, 0.7668, 1.26511],
    ],
    5: [
        [-0.16049, -0.12772, 0.1252, 0.78683],
        [-0.13068, -0.15365, 0.26857, 1.03772],
        [-0.13959, -0.13124, 0.37707, 1.00995],
        [-0.16991, -0.02307, 0.31194, 0.7053],
        [-0.1679, -0.04627, 0.35387, 0.84675],
        [-0.15225, -0.12103, 0.32137, 1.00823],
    ],
}


@pytest.mark.parametrize("width", TORCH)
def test_positions_of_speech(width: int) -> None:
    c = SPEECH(num_conv_pos_embeddings=width)
    stored = np.sin(np.arange(4 * 2 * width, dtype=np.float32) * 0.7).reshape(4, 2, width)
    p = {
        "magnitude": jnp.linspace(1, 2, width)[:, None, None],
        "direction": jnp.asarray(stored.transpose(2, 1, 0)),
        "bias": jnp.linspace(-1, 1, 4),
    }
    x = jnp.cos(jnp.arange(24, dtype=jnp.float32) * 0.3).reshape(1, 6, 4)
    np.testing.assert_allclose(speech.positions(p, c, x)[0], TORCH[width], atol=2e-5)
    shapes = {entry.name: entry.stored_shape for entry in specs.table(speech.position_spec(c)).entries}
    prefix = "encoder.pos_conv_embed.conv"
    assert shapes == {
        f"{prefix}.parametrizations.weight.original0": (1, 1, width),
        f"{prefix}.parametrizations.weight.original1": (4, 2, width),
        f"{prefix}.bias": (4,),
    }
    init = specs.init(speech.position_spec(SPEECH(hidden_size=64, num_conv_pos_embeddings=9)), KEY)
    lengths = jnp.linalg.norm(init["direction"], axis=(1, 2))
    np.testing.assert_allclose(init["magnitude"][:, 0, 0], lengths, rtol=0.1)  # at first the kernel is the direction


@pytest.mark.parametrize("width", [4, 6])
def test_the_adapter_shortens_as_it_is_counted(width: int) -> None:
    c = AdaptedSpeechConfig(
        hidden_size=4,
        num_attention_heads=2,
        num_conv_pos_embedding_groups=2,
        add_adapter=True,
        num_adapter_layers=2,
        output_hidden_size=width,
    )
    p = specs.init(speech.adapter_spec(c), KEY)
    assert p.keys() == ({"convs"} if width == 4 else {"convs", "project", "norm"})
    samples = 400 * 21
    frames = speech.frame_lengths(c, samples)
    out = speech.adapt(p, c, jnp.asarray(draw(2, frames, 4)))
    assert out.shape == (2, speech.frame_lengths(c, samples, adapter=True), width)
    assert c.states_size == width
    plain = SPEECH()
    assert speech.frame_lengths(plain, 47) == speech.frame_lengths(plain, 47, adapter=True)
    assert plain.states_size == 4


def test_fields_with_an_entry_a_layer() -> None:
    with pytest.raises(
        ConfigError, match=re.escape("conv_dim=(5, 6) and conv_kernel=(7,) must have one entry a layer")
    ):
        SPEECH(conv_kernel=(7,))
    with pytest.raises(ConfigError, match="must have one entry a layer"):
        SPEECH(conv_dim=(), conv_stride=(), conv_kernel=())
    with pytest.raises(ConfigError, match="num_feat_extract_layers=3"):
        SPEECH(num_feat_extract_layers=3)


def test_hidden_frames_become_one_vector() -> None:
    c, x = SPEECH(mask_time_prob=0.05), jnp.asarray(draw(2, 5, 4))
    p = {"masked": jnp.arange(4.0)}
    given = jnp.array([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    found = speech.hide(p, c, x, given, None, None)
    np.testing.assert_array_equal(found, np.where(given[..., None], np.arange(4.0), x))
    np.testing.assert_array_equal(speech.hide(p, SPEECH(apply_spec_augment=False), x, given, None, None), x)
    with pytest.raises(ValueError, match=r"mask_time_indices must be \[batch, frames\] \(2, 5\), got shape \(2, 4\)"):
        speech.hide(p, c, x, given[:, :4], None, None)
    with pytest.raises(ValueError, match="masked frames have a vector only where"):
        speech.hide({}, c, x, given, None, None)
    assert isinstance(speech.masked_spec(SPEECH(mask_time_prob=0.0)), specs.Ignored)
    assert isinstance(speech.masked_spec(c), specs.Param)


def test_time_delay_layers_are_linear_maps_of_spread_windows() -> None:
    class C:
        tdnn_kernel, tdnn_dilation = (3, 2), (2, 1)

    p = [{"kernel": jnp.asarray(draw(3 * 4, 5)), "bias": jnp.arange(5.0)}, {"kernel": jnp.asarray(draw(2 * 5, 6))}]
    x = draw(2, 9, 4)
    first = np.stack([x[:, i : i + 5 : 2].reshape(2, -1) for i in range(5)], 1) @ draw(12, 5) + np.arange(5)
    first = np.maximum(first, 0)
    second = np.stack([first[:, i : i + 2].reshape(2, -1) for i in range(4)], 1) @ draw(10, 6)
    np.testing.assert_allclose(
        speech_heads.time_delay(p, C(), jnp.asarray(x)), np.maximum(second, 0), rtol=1e-4, atol=1e-4
    )


def test_the_mean_is_over_real_frames() -> None:
    x, real = draw(2, 5, 3), np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)[..., None]
    found = speech_heads.mean(jnp.asarray(x), jnp.asarray(real))
    np.testing.assert_allclose(found, [x[0, :3].mean(0), np.zeros(3)], rtol=1e-5)
    less = speech_heads.mean(jnp.asarray(x), jnp.asarray(real), lost=1)
    np.testing.assert_allclose(less[0], x[0, :3].sum(0) / 2, rtol=1e-5)


def test_heads_of_recordings_and_of_frames() -> None:
    c = SPEECH()
    states = draw(2, 5, 4)
    p = {"projector": {"kernel": jnp.asarray(draw(4, 3))}, "head": {"kernel": jnp.asarray(draw(3, 2))}}

    def encode(p: Any, c: Any, input_values: Any, attention_mask: Any = None, key: Any = None) -> Any:
        return jnp.asarray(states), None

    mask = jnp.arange(40) < jnp.array([[40], [22]])  # 5 frames and 2
    logits = speech_heads.audio_classification(encode)(p, c, jnp.zeros((2, 40)), mask).logits
    mean = np.stack([states[0].mean(0), states[1, :2].mean(0)])
    np.testing.assert_allclose(logits, mean @ draw(4, 3) @ draw(3, 2), rtol=1e-4, atol=1e-5)
    p = {"head": {"kernel": jnp.asarray(draw(4, 3))}}
    for head in (speech_heads.frame_classification, speech_heads.ctc):
        logits = head(encode)(p, c, jnp.zeros((2, 40)), attention_mask=mask).logits
        np.testing.assert_allclose(logits, states @ draw(4, 3), rtol=1e-4, atol=1e-5)


def test_spans_are_those_that_a_configuration_has() -> None:
    c = SPEECH(mask_time_prob=0.5, mask_time_length=3, mask_feature_prob=0.0)
    time, feature = drawn_spans(KEY, c, 4, 50, 20, lengths=jnp.array([50, 20, 50, 50]))
    assert feature is None
    assert time is not None
    assert time.shape == (4, 50)
    assert time[0].any()
    assert not time[1, 20:].any()
    c = SPEECH(mask_time_prob=0.0, mask_feature_prob=0.5, mask_feature_length=3)
    time, feature = drawn_spans(KEY, c, 4, 50, 20)
    assert time is None
    assert feature is not None
    assert (feature.shape, bool(feature.any())) == ((4, 20), True)
    given = jnp.ones((4, 9))  # spans of 10 frames would not fit, but none are drawn
    assert drawn_spans(KEY, SPEECH(), 4, 9, 20, given=given) == (given, None)


def test_layers_are_weighed() -> None:
    states = draw(3, 2, 5, 4)
    weights = jnp.log(jnp.array([1.0, 2.0, 5.0]))
    expected = (states[0] + 2 * states[1] + 5 * states[2]) / 8
    for before in (tuple(states[:2]), states[:2]):  # of layers one by one, and of stacked ones
        found = speech.weighted(weights, jax.tree.map(jnp.asarray, before), jnp.asarray(states[2]))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ---- maps


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),  # of torch.nn.functional.interpolate(mode="nearest")
    [
        (5, 8, [0, 0, 1, 1, 2, 3, 3, 4]),
        (7, 3, [0, 2, 4]),
        (42, 11, [0, 3, 7, 11, 15, 19, 22, 26, 30, 34, 38]),
        (34, 9, [0, 3, 7, 11, 15, 18, 22, 26, 30]),
    ],
)
def test_nearest_places_are_torchs(size: int, wanted: int, expected: list[int]) -> None:
    assert maps.nearest(size, wanted).tolist() == expected


def test_maps_are_resized_by_rows_and_by_columns() -> None:
    x = draw(2, 5, 7, 3)
    found = maps.resize(jnp.asarray(x), 8, 3)
    np.testing.assert_array_equal(found, x[:, [0, 0, 1, 1, 2, 3, 3, 4]][:, :, [0, 2, 4]])


def test_what_a_map_shows_that_is_no_padding() -> None:
    mask = jnp.ones((2, 8, 12)).at[1, 4:].set(0).at[1, :, 9:].set(0)
    seen = maps.seen_places(mask, (2, 8, 12), (2, 4))
    assert seen.tolist() == [[[True] * 4] * 2, [[True, True, True, False], [False] * 4]]
    assert maps.seen_places(None, (2, 8, 12), (2, 4)).all()
    with pytest.raises(ValueError, match=r"pixel_mask must be \[batch, height, width\] \(2, 8, 12\), got \(2, 12, 8\)"):
        maps.seen_places(jnp.ones((2, 12, 8)), (2, 8, 12), (2, 4))


def test_sine_positions_are_parts_of_what_is_real() -> None:
    seen = np.zeros((1, 4, 6), bool)
    seen[:, :3, :5] = True
    found = np.asarray(maps.sine_positions(jnp.asarray(seen), 8))
    for y, x in ((0, 0), (2, 3)):
        for half, at in ((0, (y + 1) / 3), (4, (x + 1) / 5)):
            for pair, period in ((0, 1.0), (2, 100.0)):  # 10000 ** (0 / 4) and (2 / 4)
                angle = at * 2 * np.pi / period
                np.testing.assert_allclose(found[0, y, x, half + pair], np.sin(angle), atol=2e-5)
                np.testing.assert_allclose(found[0, y, x, half + pair + 1], np.cos(angle), atol=2e-5)


def test_learned_positions_are_columns_then_rows() -> None:
    p = drawn(maps.learned_spec(6, 4))
    found = maps.learned_positions(p, jnp.ones((2, 3, 4), bool))
    assert found.shape == (2, 3, 4, 6)
    np.testing.assert_array_equal(found[1, 2, 3, :3], p["columns"]["embedding"][3])
    np.testing.assert_array_equal(found[0, 2, 3, 3:], p["rows"]["embedding"][2])
    with pytest.raises(ValueError, match="the map is 3 x 5 places, learned positions know 4 rows and columns"):
        maps.learned_positions(p, jnp.ones((2, 3, 5), bool))


def test_a_frozen_batch_norm_has_no_weights() -> None:
    spec = norm.frozen_batch_spec("bn", 3)
    frozen, free = (specs.table(one).entries for one in (spec, norm.batch_spec("bn", 3)))
    assert [(entry.name, entry.path) for entry in frozen] == [(entry.name, entry.path) for entry in free[:-1]]
    assert all(entry.param.buffer for entry in frozen)
    assert specs.table(spec).ignored == {"bn.num_batches_tracked"}
    p, x = drawn(spec), draw(2, 4, 5, 3)
    scale = np.asarray(p["scale"]) / np.sqrt(np.asarray(p["var"]) + 1e-5)
    expected = (x - np.asarray(p["mean"])) * scale + np.asarray(p["bias"])
    np.testing.assert_allclose(norm.batch(p, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


# ---- backbones


@config
class Stages(BackboneConfig):
    depths: tuple[int, ...] = (1, 1, 1)


@pytest.mark.parametrize(
    ("given", "features"),
    [
        ({}, (3,)),
        ({"out_features": ("stem", "stage2")}, (0, 2)),
        ({"out_indices": (1, -1)}, (1, 3)),
        ({"out_features": ("stage1",), "out_indices": (1,)}, (1,)),
    ],
)
def test_maps_of_a_backbone(given: dict[str, Any], features: tuple[int, ...]) -> None:
    assert Stages(**given).features == features
    assert Stages().stages == ("stem", "stage1", "stage2", "stage3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"out_features": ("stage4",)}, "out_features has 'stage4'; there are stem, stage1, stage2, stage3"),
        ({"out_indices": (4,)}, "out_indices=(4,) must be stages of 0 to 3, in order"),
        ({"out_indices": (2, 1)}, "in order"),
        ({"out_indices": (1, 1)}, "in order"),
        ({"out_features": ("stage1",), "out_indices": (2,)}, "are not the same"),
    ],
)
def test_maps_that_a_backbone_does_not_have(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Stages(**given)


# ---- encoder-decoders


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BeitForSemanticSegmentation", {"out_indices": (1, 2, 3, 4), "auxiliary_concat_input": True}),
        ("RegNetForImageClassification", {"depths": (2, 1), "hidden_sizes": (8, 12), "groups_width": 4}),
    ],
)
def test_places_of_running_statistics_are_those_of_the_buffers(name: str, fields: dict[str, Any]) -> None:
    """So a training step finds them."""
    family = registry.family("beit" if name.startswith("Beit") else "regnet")
    architecture, c = family.find(name), family.config(**fields)
    assert architecture is not None
    spec, seen = architecture.spec(c), {}

    def run(p: Any, pixels: Any) -> None:
        with tap.watch(("**.mean", "**.var", "**.count")) as found:
            architecture.apply(p, c, pixels, key=KEY)
        seen.update(found.seen)

    jax.eval_shape(run, specs.abstract(spec), jax.ShapeDtypeStruct((2, 3, 224, 224), jnp.float32))
    assert seen.keys() == {entry.key for entry in specs.table(spec).entries if entry.param.buffer}


def test_states_at_the_last_end_of_text() -> None:
    x = jnp.asarray(draw(4, 5, 3))
    ids = jnp.array([[7, 2, 7, 2, 7], [2, 7, 7, 7, 7], [7, 7, 7, 7, 2], [7, 7, 9, 7, 7]])
    found = jax.jit(seq2seq.eos_states, static_argnums=2)(x, ids, 2)
    np.testing.assert_array_equal(found[:3], x[jnp.arange(3), jnp.array([3, 0, 4])])
    assert np.isnan(found[3]).all()  # a text without an end
    found = jax.jit(seq2seq.eos_states, static_argnums=2)(x, ids, (2, 9))
    np.testing.assert_array_equal(found, x[jnp.arange(4), jnp.array([3, 0, 4, 2])])
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        seq2seq.eos_states(x, None, 2)
    with pytest.raises(ValueError, match="needs eos_token_id"):
        seq2seq.eos_states(x, ids, None)


def test_a_decoder_sees_what_was_before() -> None:
    padding = jnp.array([[0, 1, 1], [1, 1, 1]])
    mask = causal_mask(padding, None)
    assert (mask.causal, mask.q_offset) == (True, 0)
    held = KVCache.empty(2, 6, 1, 4).append(jnp.ones((2, 2, 1, 4)), jnp.ones((2, 2, 1, 4)))
    mask = causal_mask(padding, ({"attn": held, "cross": None},))
    assert mask.q_offset == 2
    seen = mask.materialise(1, 6)
    assert seen is not None
    assert seen[:, 0, 0].tolist() == [[False, True, True, False, False, False], [True] * 3 + [False] * 3]


def test_heads_of_encoder_decoders() -> None:
    states, memory = draw(2, 4, 3), jnp.asarray(draw(2, 5, 3))

    def run(p: Any, c: Any, input_ids: Any = None, key: Any = None) -> Seq2SeqOutput:
        return Seq2SeqOutput(
            last_hidden_state=jnp.asarray(states), cache="kept", encoder_last_hidden_state=jnp.asarray(memory)
        )

    class C:
        eos_token_id, classifier_dropout = 2, 0.5

    ids = jnp.array([[2, 7, 2, 7], [2, 7, 7, 7]])
    p = specs.init(seq2seq_heads.labels_spec(3, 6, init=specs.normal(1.0)), KEY)
    out = seq2seq_heads.sequence_classification(run)(p, C(), ids)
    dense, last = (np.asarray(p["head"][key]["kernel"]) for key in ("dense", "out"))
    expected = np.tanh(states[[0, 1], [2, 0]] @ dense) @ last
    np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-5)
    assert (out.cache, out.encoder_last_hidden_state is memory) == ("kept", True)
    noisy = [seq2seq_heads.sequence_classification(run)(p, C(), ids, key=jax.random.key(i)).logits for i in (1, 2)]
    assert np.abs(noisy[0] - noisy[1]).max() > 0.01
    names = {entry.name for entry in specs.table(seq2seq_heads.labels_spec(3, 6, init=specs.ones)).entries}
    assert names == {
        f"classification_head.{part}.{leaf}" for part in ("dense", "out_proj") for leaf in ("weight", "bias")
    }

    p = {"head": {"kernel": jnp.asarray(draw(3, 2))}}
    out = seq2seq_heads.question_answering(run)(p, C(), ids)
    both = states @ draw(3, 2)
    np.testing.assert_allclose(out.start_logits, both[..., 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.end_logits, both[..., 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        seq2seq_heads.conditional_generation(run)(p, C(), ids).logits, both, rtol=1e-4, atol=1e-5
    )
    out = seq2seq_heads.conditional_generation(run, lambda p, c, x: 2 * x)(p, C(), ids)
    np.testing.assert_array_equal(out.logits, 2 * states)
    assert out.cache == "kept"
