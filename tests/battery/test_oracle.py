"""The measure by which the battery judges, and the weights it is made of: both must not change unnoticed."""

import numpy as np
import pytest
from oracle.compare import error, visible
from oracle.weights import tensor


def test_weights_are_frozen() -> None:
    # a change here means that every golden must be made anew
    kernel = tensor("bert.encoder.layer.0.output.dense.weight", (36, 53))
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel[0, :3] * np.sqrt(53), [-0.5893236, 0.6337094, 0.6978816], rtol=1e-6)
    np.testing.assert_allclose(tensor("bert.embeddings.LayerNorm.weight", (36,))[:2], [1.3338432, 1.2057294], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "mean", "spread"),
    [
        ("layer.dense.weight", (500, 400), 0.0, 0.05),
        ("conv.weight", (100, 10, 40), 0.0, 0.05),
        ("layer.dense.bias", (9000,), 0.0, 0.2),
        ("layer.LayerNorm.weight", (9000,), 1.0, 0.2),
        ("layer.LayerNorm.gamma", (9000,), 1.0, 0.2),
        ("layer.LayerNorm.beta", (9000,), 0.0, 0.2),
        ("embeddings.word_embeddings.weight", (300, 30), 0.0, 0.5),
        ("embeddings.cls_token", (1, 1, 9000), 0.0, 0.5),
        ("embeddings.patch_embeddings.projection.weight", (300, 3, 5, 5), 0.0, 75**-0.5),
    ],
)
def test_weights_have_the_spread_that_shows_bugs(name: str, shape: tuple[int, ...], mean: float, spread: float) -> None:
    drawn = tensor(name, shape)
    assert drawn.shape == shape
    assert np.mean(drawn) == pytest.approx(mean, abs=0.05 * spread)
    assert np.std(drawn) == pytest.approx(spread, rel=0.05)


def test_variances_are_positive() -> None:
    assert tensor("bn.running_var", (9000,)).min() > 0


def test_integer_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embeddings\.position_ids: weights of dtype int64 cannot be made up"):
        tensor("embeddings.position_ids", (1, 40), np.int64)


def test_error_is_relative_to_the_spread() -> None:
    expected = np.array([[-2.0, 2.0], [2.0, -2.0]], np.float32)
    assert error(expected, expected) == 0
    assert error(expected, expected + np.array([[0, 0], [0, 0.5]], np.float32)) == 0.25
    assert error(np.float32(4.0) * np.ones(()), np.float32(5.0) * np.ones(())) == 0.25


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_far(bad: float) -> None:
    assert error(np.array([1.0, 2.0]), np.array([1.0, bad])) == np.inf


def test_outputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the golden has shape \(2, 1\), the output \(2,\)"):
        error(np.ones((2, 1)), np.ones(2))


def test_padding_is_not_looked_at() -> None:
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    tokens = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    np.testing.assert_array_equal(visible(tokens, {"attention_mask": mask})[:, 0], [0, 4, 16, 20])
    weights = np.arange(2 * 5 * 3 * 7).reshape(2, 5, 3, 7)
    assert visible(weights, {"attention_mask": mask}).shape == (4, 5, 7)
    np.testing.assert_array_equal(visible(weights, {"attention_mask": mask})[1], weights[0, :, 1])
    pooled = np.ones((2, 4))
    assert visible(pooled, {"attention_mask": mask}) is pooled
    assert visible(tokens, {"attention_mask": np.ones((2, 3, 3))}) is tokens
    assert visible(tokens, {}) is tokens
