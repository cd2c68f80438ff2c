"""Detection: matching and losses against SciPy and the reference, backbones under timm's names, dilated stages."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.goldens import Golden, goldens
from hypothesis import given
from hypothesis import strategies as st
from oracle import weights
from oracle.compare import error
from safetensors.numpy import load_file, save_file
from scipy.optimize import linear_sum_assignment

import formax
from formax.core import spec as specs
from formax.core.config import ConfigError
from formax.core.outputs import DetectionModelOutput, FoundOutput
from formax.layers.conv import conv
from formax.models.vision import detr, resnet
from formax.models.vision.detr import DetrConfig
from formax.training import detection

ALL = [golden for golden in goldens() if golden.family_name == "detr"]
LOSSES = [golden for golden in ALL if "out.loss" in golden.arrays]
PARTS = ("encoder", "decoder")
LOSS = jax.jit(detection.set_loss, static_argnums=1)
FEATURES = jax.jit(resnet.features, static_argnums=1, static_argnames="shrink")


def named(name: str) -> Golden:
    return Golden("detr", name)


def targets(golden: Golden) -> dict[str, Any]:
    """The objects of a golden's call, as `set_loss` takes them."""
    given = {name.removeprefix("in.labels."): x for name, x in golden.arrays.items() if name.startswith("in.labels.")}
    counts = given.pop("count")
    return given | {"real": np.arange(given["boxes"].shape[1]) < counts[:, None]}


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", LOSSES, ids=str)
def test_losses_are_the_references(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    out = model(**golden.inputs)
    total, parts = LOSS(out, golden.config, **targets(golden))
    expected = {name: x for name, x in golden.arrays.items() if name.startswith("out.loss_dict.")}
    assert {f"out.loss_dict.{name}" for name in parts} == expected.keys()
    for name, value in parts.items():
        np.testing.assert_allclose(value, expected[f"out.loss_dict.{name}"], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, golden.arrays["out.loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ["object_detection", "crowded", "auxiliary_segmentation"])
def test_padding_and_order_of_objects_change_nothing(name: str, tmp_path: Path) -> None:
    golden = named(name)
    model, _ = golden.open(tmp_path)
    out, objects = model(**golden.inputs), targets(golden)
    right, _ = LOSS(out, golden.config, **objects)
    padded = {
        key: np.pad(x, [(0, 0), (3, 2)] + [(0, 0)] * (x.ndim - 2), constant_values=False if key == "real" else 1)
        for key, x in objects.items()
    }
    order = np.random.RandomState(0).permutation(padded["real"].shape[1])
    moved = {key: x[:, order] for key, x in padded.items()}
    for other in (padded, moved):
        np.testing.assert_allclose(LOSS(out, golden.config, **other)[0], right, rtol=1e-5)


def test_gradients_of_the_loss_are_finite_and_reach_the_model(tmp_path: Path) -> None:
    golden = named("auxiliary_segmentation")
    model, _ = golden.open(tmp_path)

    def loss(model: Any) -> jax.Array:
        return detection.set_loss(model(**golden.inputs), model.config, **targets(golden))[0]

    found = specs.flatten(jax.jit(jax.grad(loss))(model).params)
    assert all(np.isfinite(x).all() for x in found.values())
    for path in (("masks", "out", "kernel"), ("head", "box", 2, "kernel"), ("embed", "queries", "embedding")):
        assert np.abs(found[path]).max() > 1e-6, path


def test_no_objects_at_all() -> None:
    out = FoundOutput(logits=jnp.zeros((2, 5, 4)), pred_boxes=jnp.full((2, 5, 4), 0.5))
    config = DetrConfig()
    for most in (0, 3):
        given = {"class_labels": jnp.zeros((2, most), int), "boxes": jnp.zeros((2, most, 4))}
        total, parts = LOSS(out, config, real=jnp.zeros((2, most), bool), **given)
        np.testing.assert_allclose(total, math.log(4), rtol=1e-6)
        assert float(parts["loss_bbox"]) == float(parts["loss_giou"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((2, 3, 5))}, r"boxes \[2, N, 4\], got .*\(2, 3, 5\)"),
        ({"real": np.ones((3,), bool)}, r"real must be \[2, N\]"),
        ({"masks": np.zeros((2, 3, 8, 8))}, "this model does not segment"),
    ],
)
def test_targets_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    out = FoundOutput(logits=jnp.zeros((2, 5, 4)), pred_boxes=jnp.full((2, 5, 4), 0.5))
    objects: dict[str, Any] = {
        "class_labels": np.zeros((2, 3), int),
        "boxes": np.full((2, 3, 4), 0.5),
        "real": np.ones((2, 3), bool),
    }
    with pytest.raises(ValueError, match=message):
        detection.set_loss(out, DetrConfig(), **objects | change)


# ---- matching -------------------------------------------------------------------------------------------------------

MATCH = jax.jit(detection.match)


@given(st.sampled_from([(7, 4), (4, 4), (3, 6), (1, 3), (5, 1)]), st.integers(0, 2**31), st.floats(0, 1), st.booleans())
def test_the_assignment_costs_as_little_as_scipys(size: tuple[int, int], seed: int, some: float, coarse: bool) -> None:
    count, most = size
    draw = np.random.RandomState(seed)
    costs = draw.standard_normal((3, count, most)).astype(np.float32) * 10
    costs = np.round(costs / 8) if coarse else costs  # many of them equal
    real = draw.uniform(size=(3, most)) < some
    found = np.asarray(MATCH(costs, real))
    for row, own, queries in zip(costs, real, found, strict=True):
        used = queries[own & (queries < count)]
        assert len(set(used)) == len(used) == min(count, own.sum())
        assert (queries[~own] == count).all()
        best = row[:, own][linear_sum_assignment(row[:, own])].sum()
        at = np.flatnonzero(queries < count)
        np.testing.assert_allclose(row[queries[at], at].sum(), best, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_no_numbers_end(bad: float) -> None:
    costs = np.random.RandomState(0).standard_normal((2, 5, 3)).astype(np.float32)
    costs[0, :, 1] = bad
    costs[1] = bad
    found = np.asarray(MATCH(costs, np.ones((2, 3), bool)))
    for row in found:
        used = row[row < 5]
        assert len(set(used)) == len(used)
    assert (found[0][[0, 2]] < 5).all()  # the others still get queries


# ---- boxes and masks ------------------------------------------------------------------------------------------------


def test_generalised_iou_by_hand() -> None:
    a = jnp.array([0.0, 0.0, 2.0, 2.0])
    boxes = jnp.array([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2], [3, 0, 4, 2], [0.5, 0.5, 1.5, 1.5]], jnp.float32)
    right = [1.0, 1 / 7 - 2 / 9, 0.0, -2 / 8, 1 / 4]
    np.testing.assert_allclose(detection.generalised_iou(a, boxes), right, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(detection.corners(jnp.array([0.5, 0.4, 0.2, 0.6])), [0.4, 0.1, 0.6, 0.7], rtol=1e-6)


def test_boxes_without_area_have_gradients() -> None:
    point = jnp.array([0.3, 0.3, 0.0, 0.0])
    for other in (point, jnp.array([0.5, 0.3, 0.0, 0.0]), jnp.array([0.5, 0.5, 0.2, 0.2])):

        def agreement(box: jax.Array, other: jax.Array = other) -> jax.Array:
            return detection.generalised_iou(detection.corners(box), detection.corners(other))

        value, slope = jax.value_and_grad(agreement)(point)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_masks_by_hand() -> None:
    logits = jnp.array([[math.log(3.0), -math.log(3.0)]])  # three quarters and one quarter
    ones = jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(detection.dice(logits, ones), 1 - 2.5 / 3, rtol=1e-6)
    of_one, of_zero = 0.25 * 0.25**2 * math.log(4 / 3), 0.75 * 0.25**2 * math.log(4 / 3)
    np.testing.assert_allclose(detection.focal(logits, ones), (of_one + of_zero) / 2, rtol=1e-6)


# ---- backbones ------------------------------------------------------------------------------------------------------

TO_TIMM = (
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    (r"shortcut\.convolution\.", "downsample.0."),
    (r"shortcut\.normalization\.", "downsample.1."),
    (r"layer\.(\d)\.convolution\.", lambda m: f"conv{int(m[1]) + 1}."),
    (r"layer\.(\d)\.normalization\.", lambda m: f"bn{int(m[1]) + 1}."),
    (r"encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
)


def to_timm(name: str) -> str:
    """The checkpoint name that a parameter has in timm's ResNet."""
    if "conv_encoder" in name:
        for pattern, new in TO_TIMM:
            name = re.sub(pattern, new, name)
    return name


def test_a_backbone_under_timms_names_is_the_same(tmp_path: Path) -> None:
    golden = named("segmentation_bottleneck")
    golden.checkpoint(tmp_path)
    own = golden.meta["config"]["backbone_config"]
    config = {key: x for key, x in golden.meta["config"].items() if key not in ("backbone_config", "backbone")}
    config |= {
        "use_timm_backbone": True,
        "backbone": "resnet50",
        "dilation": False,
        "backbone_kwargs": {
            "in_chans": 3,
            "out_indices": [1, 2, 3, 4],
            "layers": own["depths"],
            "channels": [width // 4 for width in own["hidden_sizes"]],
        },
    }
    tensors = {to_timm(name): x for name, x in golden.tensors().items()}
    assert "detr.model.backbone.conv_encoder.model.layer2.0.downsample.1.running_mean" in tensors
    # checkpoints of before the norms were frozen count their batches
    counted = tensors | {"detr.model.backbone.conv_encoder.model.bn1.num_batches_tracked": np.array(7)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(counted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = formax.from_pretrained(tmp_path, output_loading_info=True)
    assert not report.initialised
    out = model(**golden.inputs)
    for name, expected in golden.outputs.items():
        assert error(expected, np.asarray(out[name])) < 1e-4, name
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == x.tobytes() for name, x in tensors.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["backbone_kwargs"] == config["backbone_kwargs"]


def test_the_published_detector() -> None:
    # 41302368 is what the original code counts as trained: it holds the stem and the first stage fixed.
    entries = specs.table(detr.detection_spec(DetrConfig.from_dict({"num_labels": 91}))).entries
    sizes = {entry.key: math.prod(entry.param.shape) for entry in entries if not entry.param.buffer}
    fixed = [key for key in sizes if key.startswith(("backbone.stem.", "backbone.stages.0."))]
    assert sum(sizes.values()) == 41_524_768
    assert sum(sizes.values()) - sum(sizes[key] for key in fixed) == 41_302_368
    names = {entry.name: entry.stored_shape for entry in entries}
    prefix = "model.backbone.conv_encoder.model."
    assert names[prefix + "layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert names[prefix + "layer4.2.conv2.weight"] == (512, 512, 3, 3)
    assert names[prefix + "layer3.5.bn3.running_var"] == (1024,)
    assert prefix + "layer1.1.downsample.0.weight" not in names


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("shrink", [8, 16])
def test_dilated_stages_see_what_strided_ones_see(kind: str, shrink: int) -> None:
    """Of maps that keep their size, every second (fourth) place is what the strided network computes there."""
    c = resnet.ResNetConfig(embedding_size=4, hidden_sizes=(8, 8, 12, 16), depths=(1, 2, 2, 3), layer_type=kind)
    # weights of the oracle's: to compile the program that draws initial ones takes half a minute
    p = specs.build(
        resnet.features_spec(c),
        lambda entry: entry.param.layout.load(weights.tensor(entry.name, entry.stored_shape), entry.param.shape),
    )
    x = np.random.default_rng(1).standard_normal((1, 75, 98, 3), np.float32)
    strided, dilated = (FEATURES(p, c, x, shrink=one) for one in (None, shrink))
    for i, (a, b) in enumerate(zip(strided, dilated, strict=True)):
        step = max(1, 2 ** (i + 1) // shrink) if i else 1
        assert a.shape[1] == -(-b.shape[1] // step)
        np.testing.assert_allclose(b[:, ::step, ::step], a, atol=1e-4 * float(a.std()))
    assert dilated[-1].shape[1:3] == (-(-75 // shrink), -(-98 // shrink))


def test_dilation_is_an_output_stride() -> None:
    assert DetrConfig(dilation=True).shrink == 16
    assert DetrConfig().shrink == 32
    both = DetrConfig.from_dict(
        {"dilation": True, "backbone_kwargs": {"output_stride": 8, "out_indices": [1, 2, 3, 4]}}
    )
    assert both.shrink == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backbone": "resnet50d"}, "backbone='resnet50d' is none of timm's that formax has: resnet18"),
        ({"use_timm_backbone": False, "backbone": "microsoft/resnet-50"}, "names another checkpoint"),
        ({"use_timm_backbone": False, "backbone_config": {"model_type": "swin"}}, "model_type='swin'"),
        ({"backbone_config": {"model_type": "resnet"}}, "backbone_config is for use_timm_backbone=False"),
        ({"backbone_kwargs": {"aa_layer": "blur"}}, "backbone_kwargs has 'aa_layer'"),
        ({"backbone_kwargs": {"output_stride": 4}}, "output_stride=4"),
        ({"backbone_kwargs": {"out_indices": [0, 4]}}, "may be 1 to 4"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type='rotary'"),
        ({"d_model": 250}, "no multiple of encoder_attention_heads"),
        ({"activation_function": "rulu"}, "activation_function='rulu'"),
    ],
)
def test_configurations_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DetrConfig.from_dict(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"out_features": ("stage5",)}, "out_features has 'stage5'; there are stem, stage1"),
        ({"out_features": ("stage2", "stage1")}, "in order"),
        ({"out_indices": (7,)}, "must be stages of 0 to 4"),
        ({"out_features": ("stage1",), "out_indices": (2,)}, "are not the same"),
        ({"depths": (1, 2)}, "must be a number of layers for each"),
        ({"layer_type": "wide"}, "layer_type='wide'"),
    ],
)
def test_backbones_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resnet.ResNetConfig(**config)


# ---- calls ----------------------------------------------------------------------------------------------------------


def test_states_of_the_encoder_can_be_given(tmp_path: Path) -> None:
    golden = named("model")
    model, _ = golden.open(tmp_path)
    right = model(**golden.inputs)
    states = right.encoder_last_hidden_state
    for given_states in (states, DetectionModelOutput(last_hidden_state=states)):
        out = model(**golden.inputs, encoder_outputs=given_states)
        np.testing.assert_allclose(out.last_hidden_state, right.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("name", ["model", "auxiliary_model"])
def test_stacked_layers_are_the_same(name: str, tmp_path: Path) -> None:
    golden = named(name)
    model, _ = golden.open(tmp_path)
    parts = {part: model.params[part] | {"layers": specs.stack(model.params[part]["layers"])} for part in PARTS}
    right, out = (one(**golden.inputs) for one in (model, model.replace(params=model.params | parts)))
    for field, expected in right.items():
        np.testing.assert_allclose(out[field], expected, atol=1e-4, err_msg=field)


def test_layers_are_dropped_under_a_key_alone(tmp_path: Path) -> None:
    golden = named("auxiliary_model")
    model, _ = golden.open(tmp_path)
    off = {"dropout": 0.0, "encoder_layerdrop": 1.0, "decoder_layerdrop": 1.0}
    dropped = model.replace(config=model.config.replace(**off))
    right, out = (one(**golden.inputs) for one in (model, dropped))
    np.testing.assert_array_equal(out.last_hidden_state, right.last_hidden_state)
    out, seen = formax.capture(dropped, "encoder.embed.out")(**golden.inputs, key=jax.random.key(0))
    np.testing.assert_array_equal(out.encoder_last_hidden_state, seen["encoder.embed.out"])
    assert np.abs(out.intermediate_hidden_states).max() == 0  # the decoder starts from zeros


def test_a_mask_head_that_cannot_be() -> None:
    config: Any = named("segmentation").config.replace(d_model=40)
    params = specs.abstract(detr.segmentation_spec(config))
    with pytest.raises(ValueError, match=r"8 must divide the channels of its own maps, \[48, 20, 10, 5, 2\]"):
        jax.eval_shape(lambda p: detr.segmentation(p, config, jnp.zeros((1, 3, 64, 64))), params)


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    golden = named("model")
    model, _ = golden.open(tmp_path)
    pixels = golden.inputs["pixel_values"]
    with pytest.raises(
        ValueError, match=r"pixel_values must be \[batch, 3 channels, height, width\], got shape \(2, 1,"
    ):
        model(pixel_values=pixels[:, :1])
    with pytest.raises(ValueError, match="got nothing"):
        model()
    with pytest.raises(ValueError, match=r"pixel_mask must be .*\(2, 34, 42\), got \(2, 5, 6\)"):
        model(pixel_values=pixels, pixel_mask=np.ones((2, 5, 6)))
    wide = named("learned_positions").open(tmp_path)[0]
    with pytest.raises(ValueError, match="learned positions know 50 rows and columns"):
        wide(pixel_values=np.zeros((1, 3, 34, 408), np.float32))


def test_a_key_turns_dropout_on_and_leaves_frozen_norms_alone(tmp_path: Path) -> None:
    golden = named("object_detection")
    model, _ = golden.open(tmp_path)
    plain, seen = formax.capture(model, "backbone.stages.1.out")(**golden.inputs)
    noisy, noisy_seen = formax.capture(model, "backbone.stages.1.out")(**golden.inputs, key=jax.random.key(0))
    np.testing.assert_array_equal(seen["backbone.stages.1.out"], noisy_seen["backbone.stages.1.out"])
    assert np.abs(plain.logits - noisy.logits).max() > 1e-3


def test_batch_statistics_are_handed_out_where_the_buffers_are(tmp_path: Path) -> None:
    golden = Golden("resnet", "model")
    model, _ = golden.open(tmp_path)
    _, seen = formax.capture(model, "**.mean", "**.var", "**.count")(**golden.inputs, key=jax.random.key(0))
    buffers = {entry.key for entry in specs.table(model.spec).entries if entry.param.buffer}
    assert seen.keys() == buffers
    x = resnet.to_maps(model.params, model.config, jnp.asarray(golden.inputs["pixel_values"]))
    stem = model.params["stem"]
    y = np.asarray(conv(stem["conv"], x, stride=2, padding=3)).reshape(-1, 10)
    # PyTorch's: a tenth of the batch's, whose variance is the unbiased one
    np.testing.assert_allclose(
        seen["stem.norm.mean"], 0.9 * stem["norm"]["mean"] + 0.1 * y.mean(0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(seen["stem.norm.var"], 0.9 * stem["norm"]["var"] + 0.1 * y.var(0, ddof=1), rtol=1e-4)
    assert float(seen["stem.norm.count"]) == float(stem["norm"]["count"]) + 1
