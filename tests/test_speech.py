"""Losses of speech models, beside those that the goldens record; and what is random in their training."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.goldens import Golden

import formax
from formax.core import spec as specs
from formax.core.config import ConfigError
from formax.layers import speech_heads
from formax.models.audio import wav2vec2
from formax.training import speech

FAMILY = "wav2vec2"
SAMPLES = 311


def inputs_of(name: str) -> dict[str, Any]:
    """Inputs and labels of a golden's call."""
    arrays = Golden(FAMILY, name).arrays
    return {key.removeprefix("in."): jnp.asarray(x) for key, x in arrays.items() if key.startswith("in.")}


# ---- connectionist temporal classification ---------------------------------------------------------------------------


def all_paths(log_probs: np.ndarray, labels: list[int], blank: int) -> float:
    """Minus the log of the sum over all paths that read as `labels`, one by one."""
    frames, tokens = log_probs.shape
    total = 0.0
    for path in np.ndindex(*(tokens,) * frames):
        merged = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
        if [token for token in merged if token != blank] == labels:
            total += np.exp(log_probs[np.arange(frames), path].sum())
    return -np.log(total)


@pytest.mark.parametrize("labels", [[1, 3], [1, 1], [0, 3, 0], [3], []], ids=str)
def test_ctc_sums_over_all_paths(labels: list[int]) -> None:
    logits = jax.random.normal(jax.random.key(0), (1, 5, 4))
    expected = all_paths(np.asarray(jax.nn.log_softmax(logits))[0], labels, blank=2)
    padded = jnp.array([labels + [-100] * (4 - len(labels))])
    np.testing.assert_allclose(speech.ctc(logits, padded, blank=2), expected, rtol=1e-5)


def test_ctc_reductions_and_lengths() -> None:
    logits = jax.random.normal(jax.random.key(0), (3, 9, 5))
    labels = jnp.array([[1, 2, 3, -100], [4, -100, -100, -100], [1, 1, 1, -100]])
    lengths = jnp.array([9, 6, 9])
    rows = np.asarray(speech.ctc(logits, labels, lengths, reduction="none"))
    np.testing.assert_allclose(rows[1], speech.ctc(logits[1:2, :6], labels[1:2]), rtol=1e-6)
    np.testing.assert_allclose(speech.ctc(logits, labels, lengths), rows.sum(), rtol=1e-6)
    means = np.mean(rows / np.array([3, 1, 3]))
    np.testing.assert_allclose(speech.ctc(logits, labels, lengths, reduction="mean"), means, rtol=1e-6)


@pytest.mark.parametrize(("frames", "fits"), [(5, True), (4, False)])
def test_equal_labels_need_a_frame_between(frames: int, fits: bool) -> None:
    logits, labels = jnp.zeros((1, 8, 4)), jnp.array([[1, 1, 1]])
    assert bool(jnp.isfinite(speech.ctc(logits, labels, jnp.array([frames])))) == fits


def test_infinite_losses_as_zero_have_no_gradient() -> None:
    labels, lengths = jnp.array([[1, 2, 3], [1, 2, 3]]), jnp.array([2, 6])
    found = jax.grad(lambda y: speech.ctc(y, labels, lengths, zero_infinity=True))(jnp.ones((2, 6, 5)))
    assert not found[0].any()
    assert found[1].any()
    assert jnp.isfinite(found).all()


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="reduction='total' is none of 'sum', 'mean', 'none'"):
        speech.ctc(jnp.ones((1, 4, 3)), jnp.array([[1]]), reduction="total")


# ---- contrast --------------------------------------------------------------------------------------------------------


def test_negatives_are_other_masked_frames_of_the_row() -> None:
    masked = jnp.array([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0]])
    drawn = np.asarray(jax.jit(speech.sample_negatives, static_argnums=2)(jax.random.key(0), masked, 400))
    for row, frame in zip(*np.nonzero(np.asarray(masked)), strict=True):
        others = {int(i) + 6 * row for i in np.flatnonzero(masked[row]) if i != frame} or {6 * row + frame}
        assert set(drawn[row, frame]) == others
        counts = np.unique(drawn[row, frame], return_counts=True)[1]
        assert np.abs(counts - 400 / len(others)).max() < 4.5 * np.sqrt(400 / len(others))


def test_a_negative_of_the_same_code_is_no_wrong_answer() -> None:
    states, targets = jax.random.normal(jax.random.key(0), (2, 1, 4, 8))
    targets = targets.at[:, 2].set(targets[:, 0])
    masked = jnp.array([[True, False, False, False]])
    three = speech.contrastive(states, targets, jnp.array([[[1, 2, 3]] * 4]), masked)
    two = speech.contrastive(states, targets, jnp.array([[[1, 3]] * 4]), masked)
    np.testing.assert_allclose(three, two, rtol=1e-6)
    found = jax.grad(lambda x: speech.contrastive(x, targets, jnp.array([[[1, 2, 3]] * 4]), masked))(states)
    assert jnp.isfinite(found).all()
    assert found[:, 0].any()
    assert not found[:, 1:].any()


def test_all_codes_in_use_are_diverse() -> None:
    masked = jnp.array([[True, True, False]])
    np.testing.assert_allclose(speech.diversity(jnp.array(10.0), 10, masked), 0)
    np.testing.assert_allclose(speech.diversity(jnp.array(2.0), 10, masked), 1.6, rtol=1e-6)


# ---- what is random in training --------------------------------------------------------------------------------------


def opened(name: str, folder: Path, **changes: Any) -> Any:
    """The golden's model, with every kind of noise off but what `changes` turns on."""
    model, _ = Golden(FAMILY, name).open(folder)
    rates = ("hidden", "activation", "attention", "feat_proj", "feat_quantizer", "final")
    off = {f"{rate}_dropout": 0.0 for rate in rates} | {"layerdrop": 0.0, "mask_time_prob": 0.0}
    # the vector for masked frames stays declared
    off = {**off, "mask_feature_prob": 1e-9, "mask_feature_min_masks": 0, **changes}
    return model.replace(config=model.config.replace(**off))


def same(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, atol=1e-5))


@pytest.mark.parametrize("name", ["model", "stable"])
def test_without_noise_a_key_changes_nothing(name: str, tmp_path: Path) -> None:
    model, given = opened(name, tmp_path), inputs_of(name)
    assert same(model(**given, key=jax.random.key(0)).last_hidden_state, model(**given).last_hidden_state)


@pytest.mark.parametrize(
    "noise",
    [
        {"hidden_dropout": 0.2},
        {"activation_dropout": 0.2},
        {"attention_dropout": 0.2},
        {"feat_proj_dropout": 0.2},
        {"layerdrop": 0.5},
        {"mask_time_prob": 0.3, "mask_time_length": 4},
        {"mask_feature_prob": 0.3, "mask_feature_length": 4},
    ],
    ids=lambda noise: next(iter(noise)),
)
def test_each_noise_is_on_under_a_key_alone(noise: dict[str, Any], tmp_path: Path) -> None:
    model, given = opened("model", tmp_path, **noise), inputs_of("model")
    quiet, first, again, second = (
        model(**given, key=key).last_hidden_state
        for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    )
    assert same(quiet, Golden(FAMILY, "model").outputs["last_hidden_state"])
    assert same(first, again)
    assert not same(first, second)
    assert not same(first, quiet)


def test_a_dropped_layer_is_left_out(tmp_path: Path) -> None:
    model = opened("traces", tmp_path, layerdrop=1.0, mask_feature_prob=0.0)
    out = model(**inputs_of("traces"), key=jax.random.key(0), output_hidden_states=True)
    assert same(out.last_hidden_state, out.hidden_states[0])


def test_given_frames_take_the_place_of_random_ones(tmp_path: Path) -> None:
    model = opened("masked", tmp_path, mask_time_prob=0.5, mask_time_length=4)
    out = model(**inputs_of("masked"), key=jax.random.key(0))
    assert same(out.last_hidden_state, Golden(FAMILY, "masked").outputs["last_hidden_state"])


def test_no_vector_for_masked_frames(tmp_path: Path) -> None:
    model, _ = Golden(FAMILY, "traces").open(tmp_path)
    with pytest.raises(ValueError, match="only where mask_time_prob or mask_feature_prob is above 0"):
        model(**inputs_of("traces"), mask_time_indices=np.zeros((1, 25), bool))
    model, _ = Golden(FAMILY, "model").open(tmp_path)
    with pytest.raises(ValueError, match=r"mask_time_indices must be \[batch, frames\] \(2, 25\), got shape \(2, 24\)"):
        model(**inputs_of("model"), mask_time_indices=np.zeros((2, 24), bool))


@pytest.mark.parametrize("shape", [(SAMPLES,), (1, 2, SAMPLES), (1, 16)])
def test_other_shapes_than_waveforms_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    model, _ = Golden(FAMILY, "traces").open(tmp_path)
    with pytest.raises(ValueError, match=r"input_values must be \[batch, samples\], at least 17 of them; got shape \("):
        model(np.zeros(shape, np.float32))


def test_voices_need_frames_for_the_time_delay_layers(tmp_path: Path) -> None:
    model, _ = Golden(FAMILY, "xvector").open(tmp_path)
    with pytest.raises(ValueError, match=r"the time-delay layers need 9 frames, input_values \(1, 100\) make 7"):
        model(np.zeros((1, 100), np.float32))


def test_codes_are_drawn_by_their_scores(tmp_path: Path) -> None:
    model, _ = Golden(FAMILY, "pre_training").open(tmp_path)
    p = jax.tree.map(jnp.asarray, model.params["quantizer"])
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 1, 10)), (1, 3000, 10))
    groups = p["codes"].shape[:2]
    one_hot = {**p, "codes": jnp.broadcast_to(jnp.eye(groups[1]), (*groups, groups[1]))}
    codes, perplexity = speech_heads.quantize(one_hot, x, None, 2.0, jax.random.key(1))
    scores = (x[0, 0] @ p["scores"]["kernel"] + p["scores"]["bias"]).reshape(groups)
    chances = jax.nn.softmax(scores)
    found = codes.reshape(3000, *groups)
    assert np.allclose(found.sum(-1), 1, atol=1e-5)
    assert np.abs(found.mean(0) - chances).max() < 4.5 * np.sqrt(0.25 / 3000)
    # perplexity is that of the chances, not of what was drawn
    entropy = -(chances * jnp.log(chances)).sum(-1)
    np.testing.assert_allclose(perplexity, jnp.exp(entropy).sum(), rtol=1e-4)


def test_gradients_reach_everything_in_pre_training(tmp_path: Path) -> None:
    golden = Golden(FAMILY, "pre_training")
    model, _ = golden.open(tmp_path)

    def objective(m: Any, key: jax.Array) -> jax.Array:
        out = m(**golden.inputs, gumbel_temperature=1.5, key=key)
        return speech.pretraining_objective(out, m.config, inputs_of("pre_training"))

    found = specs.flatten(jax.jit(jax.grad(objective))(model, jax.random.key(0)).params)
    still = {path for path, leaf in found.items() if not np.abs(leaf).max() > 0}
    # a key's bias moves all scores of a query alike
    assert {path for path in still if path[-3:] != ("attn", "k", "bias")} == set()
    assert all(np.isfinite(leaf).all() for leaf in found.values())


def test_a_voice_that_never_changes_has_a_gradient(tmp_path: Path) -> None:
    model, _ = Golden(FAMILY, "xvector").open(tmp_path)
    # rectified to 0 everywhere: a deviation of 0, whose root has no derivative
    dead = jax.tree.map(lambda leaf: leaf - 100 if leaf.ndim == 1 else leaf, model.params["tdnn"][-1])
    model = model.replace(params={**model.params, "tdnn": (*model.params["tdnn"][:-1], dead)})
    found = jax.jit(jax.grad(lambda m: m(**Golden(FAMILY, "xvector").inputs).logits.sum()))(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))


# ---- languages -------------------------------------------------------------------------------------------------------


def test_a_language_is_its_adapters_and_its_letters() -> None:
    golden = Golden(FAMILY, "ctc_language_adapter")
    names = {entry.name for entry in wav2vec2.language_leaves(golden.architecture.spec(golden.config))}
    assert names == {name for name in golden.saved_keys if "adapter_layer" in name or name.startswith("lm_head.")}
    assert len(names) == 2 * 6 + 2
    plain = Golden(FAMILY, "ctc_mean")
    with pytest.raises(ValueError, match="adapter_attn_dim"):
        wav2vec2.language_leaves(plain.architecture.spec(plain.config))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"conv_stride": (5, 2, 2, 2, 2, 2, 0)}, "conv_stride=.* must be above 0"),
        ({"conv_kernel": (0, 3, 3, 3, 3, 2, 2)}, "conv_kernel=.* must be above 0"),
        ({"num_conv_pos_embeddings": 0}, "num_conv_pos_embeddings=0 must be above 0"),
        ({"add_adapter": True, "adapter_stride": 0}, "adapter_stride=0 must be above 0"),
        ({"tdnn_kernel": (5, 3, 3, 1, 0)}, "tdnn_kernel=.* must be above 0"),
        ({"hidden_size": 0}, "hidden_size=0 must be above 0"),
    ],
)
def test_sizes_that_cannot_be(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        formax.AutoConfig.for_model("wav2vec2", **fields)
