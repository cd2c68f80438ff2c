"""The small layers against their formulas."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.core import spec as specs
from formax.core.tap import watch
from formax.layers import embed, heads, linear, mlp, norm, rope
from formax.layers.activations import ACTIVATIONS, activation
from formax.layers.conv import conv, conv_transpose, conv_transpose_spec
from formax.layers.dropout import drop_path, dropout
from formax.models.text.gptj import GPTJConfig

Formula = Callable[[float], float]
POINTS = np.concatenate([np.linspace(-6, 6, 49), [-25.0, -0.01, 0.0, 0.01, 25.0]]).astype(np.float32)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS: dict[str, Formula] = {
    "gelu": gelu,
    "gelu_10": lambda x: min(max(gelu(x), -10.0), 10.0),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": lambda x: 0.5 * (1 + math.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "linear": lambda x: x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "tanh": math.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas(name: str) -> None:
    expected = [FORMULAS[name](float(x)) for x in POINTS]
    np.testing.assert_allclose(activation(name)(jnp.asarray(POINTS)), expected, rtol=1e-5, atol=2e-6)
    half = activation(name)(jnp.asarray(POINTS, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert np.isfinite(half.astype(np.float32)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_finite_gradients(name: str) -> None:
    assert np.isfinite(jax.vmap(jax.grad(activation(name)))(jnp.asarray(POINTS))).all()


def test_an_unknown_activation_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'gleu'; try gelu"):
        activation("gleu")
    with pytest.raises(ValueError, match=r"unknown activation 'zzz'; try gelu, gelu_10, .*tanh"):
        activation("zzz")


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def test_linear() -> None:
    p, x = {"kernel": jnp.asarray(draw(4, 3)), "bias": jnp.arange(3.0)}, draw(2, 5, 4)
    np.testing.assert_allclose(linear.linear(p, jnp.asarray(x)), x @ draw(4, 3) + np.arange(3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(linear.linear({"kernel": p["kernel"]}, jnp.asarray(x)), x @ draw(4, 3), rtol=1e-5)
    assert linear.linear(p, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16  # as the states, not as the weights
    table = specs.table(linear.linear_spec("fc", 4, 3, ("embed", "mlp"), init=specs.ones))
    assert {entry.name: entry.stored_shape for entry in table.entries} == {"fc.weight": (3, 4), "fc.bias": (3,)}
    assert len(specs.table(linear.linear_spec("fc", 4, 3, (None, None), init=specs.ones, bias=False)).entries) == 1


def test_layer_norm() -> None:
    x, scale, bias = 100 + draw(2, 3, 8), 1 + draw(8), draw(8) + 2
    p = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}

    def expected(x: np.ndarray[Any, Any], eps: float) -> np.ndarray[Any, Any]:
        y = x.astype(np.float64)
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps) * scale + bias

    np.testing.assert_allclose(norm.layer(p, jnp.asarray(x), 0.1), expected(x, 0.1), rtol=1e-4, atol=1e-4)
    half = (draw(2, 3, 8) * 900).astype(np.float16)  # squares beyond float16's range
    found = norm.layer(p, jnp.asarray(half), 1e-12)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found, expected(half, 1e-12), rtol=3e-3, atol=3e-3)
    assert np.isfinite(jax.grad(lambda x: norm.layer(p, x, 1e-12).sum())(jnp.zeros((1, 8)))).all()
    names = specs.table(norm.layer_spec("LayerNorm", 8)).known_names()
    assert names == {f"LayerNorm.{name}" for name in ("weight", "bias", "gamma", "beta")}


def test_a_norm_that_multiplies_by_one_and_its_scale() -> None:
    x, scale = np.random.default_rng(4).normal(size=(3, 5)), np.array([0.5, -1.0, 0.0, 2.0, -0.25])
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * (1 + scale)
    p = {"scale": jnp.asarray(scale, jnp.float32)}
    np.testing.assert_allclose(norm.rms_plus_one(p, jnp.asarray(x, jnp.float32), 0.1), expected, rtol=1e-5)
    # multiplied before it is rounded
    halved = norm.rms_plus_one(p, jnp.asarray(x, jnp.bfloat16), 0.1)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    exact = rounded / np.sqrt((rounded**2).mean(-1, keepdims=True) + 0.1) * (1 + scale)
    np.testing.assert_array_equal(halved, jnp.asarray(exact, jnp.bfloat16))
    assert specs.init({"": norm.rms_plus_one_spec("norm", 3)}, jax.random.key(0))[""]["scale"].tolist() == [0, 0, 0]


def test_neighbours_turn_as_complex_numbers() -> None:
    x, angles = np.random.default_rng(5).normal(size=(2, 3, 4, 7)), np.arange(6).reshape(3, 1, 2) / 3
    pairs = x[..., :4].reshape(2, 3, 4, 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    expected = np.stack([turned.real, turned.imag], -1).reshape(2, 3, 4, 4)
    cos, sin = (jnp.asarray(f(angles)[None], jnp.float32) for f in (np.cos, np.sin))
    found = rope.rotate_neighbours(jnp.asarray(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(found[..., :4], expected, atol=1e-5)
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:].astype(np.float32))
    whole = rope.rotate_neighbours(jnp.asarray(x[..., :4], jnp.float32), cos, sin)
    np.testing.assert_array_equal(whole, found[..., :4])


def test_positions_that_do_not_count_padding() -> None:
    x = jnp.zeros((2, 3, 5))
    seen = jnp.asarray([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]], bool)
    assert embed.positions_of_tokens(None, 2, x).tolist() == [[2, 3, 4]]
    assert embed.positions_of_tokens(seen, 0, x).tolist() == [[-1, 0, 1], [0, 1, 2]]
    assert embed.positions_of_tokens(seen, 3, x).tolist() == [[-1, 2, 3], [3, 4, 5]]
    assert embed.positions_of_tokens(seen, jnp.asarray([1, 2]), x).tolist() == [[0, 1, -1], [2, 3, 4]]


def test_a_tied_head_with_a_bias_of_its_own() -> None:
    tied = GPTJConfig(vocab_size=11, n_embd=6, n_head=1, rotary_dim=2, tie_word_embeddings=True)
    spec = {
        "embed": {"word": embed.embedding_spec("wte", 11, 6, init=specs.normal(1.0))},
        **heads.lm_head(bias=True)(tied),
    }
    assert specs.table(spec).known_names() == {"wte.weight", "lm_head.weight", "lm_head.bias"}
    p = specs.init(spec, jax.random.key(0)) | {"head_bias": jnp.arange(11.0)}
    x = jnp.ones((1, 2, 6))
    np.testing.assert_allclose(heads.lm_logits(p, x), x @ p["embed"]["word"]["embedding"].T + jnp.arange(11), rtol=1e-5)


def test_mlp() -> None:
    spec = mlp.dense_spec(4, 6, ("fc1", "fc2"), init=specs.normal(1.0))
    p = specs.init(spec, jax.random.key(0))
    x = draw(2, 3, 4)
    with watch(("mlp.hidden", "mlp.out")) as state:
        y = mlp.dense(p, jnp.asarray(x), "relu")
    hidden = np.maximum(x @ np.asarray(p["up"]["kernel"]), 0)
    np.testing.assert_allclose(state.seen["mlp.hidden"], hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, hidden @ np.asarray(p["down"]["kernel"]), rtol=1e-4, atol=1e-4)
    assert state.seen["mlp.out"] is y


# --- dropout


def test_dropout_is_off_without_a_key_and_at_rate_zero() -> None:
    x = jnp.asarray(draw(3, 4))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_a_share_and_scales_the_rest(rate: float) -> None:
    x = jnp.full((400, 500), 3.0)
    y = np.asarray(dropout(x, rate, jax.random.key(0)))
    zeros = y == 0
    # five standard deviations of a share of 200,000 draws
    assert abs(zeros.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / y.size)
    np.testing.assert_allclose(y[~zeros], 3 / (1 - rate), rtol=1e-6)
    # rows and columns are drawn one by one
    assert zeros.mean(0).std() < 5 * math.sqrt(rate * (1 - rate) / 400)
    assert 0 < zeros.mean(1).std() < 5 * math.sqrt(rate * (1 - rate) / 500)
    np.testing.assert_array_equal(y, dropout(x, rate, jax.random.key(0)))
    assert np.any(y != np.asarray(dropout(x, rate, jax.random.key(1))))
    gradient = jax.grad(lambda x: dropout(x, rate, jax.random.key(0)).sum())(x)
    np.testing.assert_allclose(gradient, ~zeros / (1 - rate), rtol=1e-6)


def test_dropout_keeps_the_dtype_and_its_limit_is_zero() -> None:
    x = jnp.ones((4, 4), jnp.bfloat16)
    assert dropout(x, 0.3, jax.random.key(0)).dtype == jnp.bfloat16
    assert not np.any(dropout(x, 1.0, jax.random.key(0)))
    assert not np.any(jax.grad(lambda x: dropout(x, 1.0, jax.random.key(0)).sum())(jnp.ones(3)))


@pytest.mark.parametrize("rate", [0.0, 0.4, jnp.float32(0.4), 1.0])
def test_paths_are_dropped_by_whole_rows(rate: Any) -> None:
    x = jnp.full((20_000, 2, 3), 3.0, jnp.bfloat16)
    assert drop_path(x, rate, None) is x
    y = np.asarray(drop_path(x, rate, jax.random.key(0)), np.float32)
    zeros = (y == 0).all((1, 2))
    assert drop_path(x, rate, jax.random.key(0)).dtype == x.dtype
    assert abs(zeros.mean() - rate) < 5 * math.sqrt(0.25 / len(y))
    np.testing.assert_allclose(y[~zeros], 3 / (1 - min(rate, 0.99)), rtol=1e-2)


# --- convolutions


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_transposed_convolution_is_the_transpose(stride: int) -> None:
    spec = conv_transpose_spec("up", 3, 4, (2, 3), init=specs.normal(1.0))
    p = specs.init(spec, jax.random.key(0))
    assert specs.table(spec).stored()["up.weight"][0].stored_shape == (3, 4, 2, 3)
    x = jnp.asarray(draw(2, 5, 7, 3))
    y = conv_transpose(p, x, stride=stride)
    assert y.shape == (2, 4 * stride + 2, 6 * stride + 3, 4)
    back = {"kernel": p["kernel"].swapaxes(2, 3)}
    _, transpose = jax.vjp(lambda y: conv(back, y, stride=stride), y)
    np.testing.assert_allclose(y, transpose(x)[0], rtol=1e-4, atol=1e-4)
    shifted = conv_transpose(p | {"bias": jnp.arange(4.0)}, x, stride=stride)
    np.testing.assert_allclose(shifted - y, np.broadcast_to(np.arange(4.0), y.shape), atol=1e-4)


# --- look-up tables


def test_embeddings_and_their_transpose() -> None:
    table = draw(7, 4)
    p = {"embedding": jnp.asarray(table)}
    np.testing.assert_array_equal(embed.embed(p, jnp.array([[0, 6], [3, 3]])), table[[[0, 6], [3, 3]]])
    # a compiled look-up cannot raise: the nearest row, never one counted from the end, never NaN
    np.testing.assert_array_equal(embed.embed(p, jnp.array([-3, 7, 1000])), table[[0, 6, 6]])
    x = draw(2, 3, 4)
    np.testing.assert_allclose(embed.logits(p, jnp.asarray(x)), x @ table.T, rtol=1e-4, atol=1e-5)
    assert embed.logits(p, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    (entry,) = specs.table(embed.embedding_spec("words", 7, 4, init=specs.ones)).entries
    assert (entry.key, entry.name, entry.param.axes) == ("embedding", "words.weight", ("vocab", "embed"))


def test_positions_as_waves() -> None:
    table = np.asarray(embed.vaswani_in_pairs(jax.random.key(0), (7, 10), jnp.float32))
    for position, channel in ((0, 0), (3, 4), (6, 9)):
        angle = position / 10000 ** (2 * (channel // 2) / 10)
        expected = math.cos(angle) if channel % 2 else math.sin(angle)
        assert table[position, channel] == pytest.approx(expected, abs=1e-6)


def test_neighbours_are_turned_as_halves_are() -> None:
    x, angles = jnp.asarray(draw(2, 5, 3, 8)), jnp.asarray(draw(1, 5, 1, 4))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    apart = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    expected = rope.rotate(apart, cos, sin)
    turned = rope.rotate_neighbours(x, cos, sin)
    np.testing.assert_allclose(jnp.concatenate([turned[..., ::2], turned[..., 1::2]], axis=-1), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (None, None, "give either input_ids or inputs_embeds$"),
        ((2, 3), (2, 3, 4), "give either input_ids or inputs_embeds, not both"),
        ((3,), None, r"input_ids must be \[batch, length\], got shape \(3,\)"),
        ((2, 3, 4), None, r"input_ids must be \[batch, length\], got shape \(2, 3, 4\)"),
        (None, (2, 3), r"inputs_embeds must be \[batch, length, size\], got shape \(2, 3\)"),
        ((2, 9), None, r"input_ids has 9 positions, the model has 8 \(max_position_embeddings\); truncate"),
        (None, (2, 9, 4), r"inputs_embeds has 9 positions, the model has 8"),
        ((2, 0), None, r"input_ids of shape \(2, 0\) has no positions"),
    ],
)
def test_inputs_that_cannot_be_meant(ids: Any, vectors: Any, message: str) -> None:
    def zeros(shape: Any) -> Any:
        return None if shape is None else jnp.zeros(shape)

    with pytest.raises(ValueError, match=message):
        embed.check_inputs(zeros(ids), zeros(vectors), 8)
    embed.check_inputs(jnp.zeros((2, 8)), None, 8)
    embed.check_inputs(None, jnp.zeros((0, 8, 4)), 8)
