"""State-space layers against their recurrence, whole and in parts, and the configuration of Mamba."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formax
from formax.core import spec as specs
from formax.core.config import ConfigError
from formax.layers import ssm
from formax.models.text import mamba

B, C, N, W = 2, 6, 3, 4


def series(length: int) -> tuple[jax.Array, ...]:
    """Input, steps, rates and the two projections of the state, and a state to begin with."""
    draw = partial(jax.random.normal, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(length), 6)
    x, dt = draw(keys[0], (B, length, C)), jax.nn.softplus(draw(keys[1], (B, length, C)))
    a, b, c = -jnp.exp(draw(keys[2], (C, N))), draw(keys[3], (B, length, N)), draw(keys[4], (B, length, N))
    return x, dt, a, b, c, draw(keys[5], (B, C, N))


def by_hand(x: Any, dt: Any, a: Any, b: Any, c: Any, h: Any) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence, position by position, in float64."""
    x, dt, a, b, c, h = (np.asarray(each, np.float64) for each in (x, dt, a, b, c, h))
    out = []
    for t in range(x.shape[1]):
        h = np.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        out.append((h * c[:, t, None]).sum(-1))
    return np.stack(out, 1), h


@pytest.fixture(params=["one by one", "at once"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either program, whatever the platform, on chunks so short that there are many."""
    monkeypatch.setattr(ssm, "CHUNK", 4)
    if request.param == "at once":
        monkeypatch.setattr(ssm, "_one_by_one", ssm._at_once)


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
def test_the_scan_is_the_recurrence(length: int) -> None:
    y, state = ssm.selective_scan(*series(length))
    expected, last = by_hand(*series(length))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("split", [1, 4, 6, 10])
def test_a_state_goes_on_where_it_ended(split: int) -> None:
    x, dt, a, b, c, h = series(11)
    y, last = ssm.selective_scan(x, dt, a, b, c, h)
    parts = []
    for piece in (slice(None, split), slice(split, None)):
        part, h = ssm.selective_scan(x[:, piece], dt[:, piece], a, b[:, piece], c[:, piece], h)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), y, atol=1e-5)
    np.testing.assert_allclose(h, last, atol=1e-5)


def test_without_a_state_it_is_zero() -> None:
    x, dt, a, b, c, h = series(5)
    with_zero = ssm.selective_scan(x, dt, a, b, c, 0 * h)
    for found, expected in zip(ssm.selective_scan(x, dt, a, b, c), with_zero, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("program")
def test_gradients_are_those_of_the_recurrence() -> None:
    def plain(x: Any, dt: Any, a: Any, b: Any, c: Any, h: Any) -> Any:
        ys = []
        for t in range(x.shape[1]):
            h, y = ssm._step(h, a, dt[:, t] * x[:, t], dt[:, t], b[:, t], c[:, t])
            ys.append(y)
        return jnp.stack(ys, 1), h

    found, expected = (
        jax.jit(jax.grad(lambda *given, scan=scan: sum(jnp.sin(out).sum() for out in scan(*given)), tuple(range(6))))(
            *series(6)
        )
        for scan in (ssm.selective_scan, plain)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_training_does_not_keep_every_state() -> None:
    length, channels, size = 1024, 64, 16
    shapes = [(1, length, channels)] * 2 + [(channels, size)] + [(1, length, size)] * 2
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(jax.grad(lambda *given: ssm.selective_scan(*given)[0].sum(), tuple(range(5))))
    used = program.lower(*given).compile().memory_analysis()
    assert used is not None
    assert used.temp_size_in_bytes < length * channels * size * 4


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform: str) -> None:
    program = jax.jit(jax.grad(lambda *given: ssm.selective_scan(*given)[0].sum(), tuple(range(6))))
    assert jax.export.export(program, platforms=[platform])(*series(9)).platforms == (platform,)


def test_bfloat16_keeps_its_state_in_float32() -> None:
    x, dt, a, b, c, _ = (each.astype(jnp.bfloat16) for each in series(5))
    y, state = ssm.selective_scan(x, dt, a, b, c)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert ssm.MambaCache.empty(1, C, W, N, jnp.bfloat16).state.dtype == jnp.float32


# ---- convolution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, W])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_the_convolution_looks_back(width: int, length: int) -> None:
    x = np.random.RandomState(0).standard_normal((B, length, C)).astype(np.float32)
    kernel = np.random.RandomState(1).standard_normal((width, 1, C)).astype(np.float32)
    bias = np.arange(C, dtype=np.float32)
    y, after = ssm.causal_conv({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}, jnp.asarray(x))
    padded = np.concatenate([np.zeros((B, width - 1, C), np.float32), x], 1)
    expected = np.stack([(padded[:, t : t + width] * kernel[:, 0]).sum(1) for t in range(length)], 1) + bias
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(after, padded[:, length:])


@pytest.mark.parametrize("split", [1, 2, 5])
def test_the_convolution_goes_on_where_it_ended(split: int) -> None:
    x = jax.random.normal(jax.random.key(0), (B, 9, C))
    p = {"kernel": jax.random.normal(jax.random.key(1), (W, 1, C))}
    whole, after = ssm.causal_conv(p, x)
    first, before = ssm.causal_conv(p, x[:, :split])
    second, last = ssm.causal_conv(p, x[:, split:], before)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-6)
    np.testing.assert_array_equal(last, after)


# ---- padding --------------------------------------------------------------------------------------------------------


def test_which_positions_are_no_padding() -> None:
    x, mask = jnp.ones((2, 3, C)), jnp.array([[0, 1, 1, 1, 0], [1, 1, 1, 0, 1]])
    assert ssm.tokens_seen(None, x, 0) is None
    for offset, expected in ((0, mask[:, :3]), (2, mask[:, 2:]), (4, [[0, 1, 1], [1, 1, 1]]), (9, [[1] * 3] * 2)):
        found = jax.jit(lambda offset: ssm.tokens_seen(mask, x, offset))(offset)
        np.testing.assert_array_equal(found[..., 0], expected)
    # as wide as there are positions: it is about them
    found = ssm.tokens_seen(mask[:, :3], x, 7)
    assert found is not None
    np.testing.assert_array_equal(found[..., 0], mask[:, :3])


@pytest.mark.parametrize("shape", [(2, 2), (2, 1, 3, 3), (3,)])
def test_masks_that_cannot_be_meant(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, length\], for \(2, 3\) at least, got"):
        ssm.tokens_seen(jnp.ones(shape), jnp.ones((2, 3, C)), 0)


# ---- Mamba ----------------------------------------------------------------------------------------------------------

CONFIG = mamba.MambaConfig(vocab_size=31, hidden_size=12, state_size=N, num_hidden_layers=2, conv_kernel=3)


def test_initial_values() -> None:
    params = specs.init(mamba.model_spec(CONFIG), jax.random.key(0))
    p = params["layers"][0]["mixer"]
    np.testing.assert_allclose(jnp.exp(p["a_log"]), np.tile([1, 2, 3], (24, 1)), rtol=1e-6)
    np.testing.assert_array_equal(p["d"], 1)
    steps = jax.nn.softplus(p["step"]["bias"])
    assert CONFIG.time_step_min <= steps.min() * 1.001
    assert steps.max() <= CONFIG.time_step_max * 1.001
    assert steps.max() > 5 * steps.min()
    assert 0.5 < np.abs(p["step"]["kernel"]).max() <= 1  # one over the root of its rank, which is 1
    constant = specs.init(mamba.model_spec(CONFIG.replace(time_step_init_scheme="constant")), jax.random.key(0))
    np.testing.assert_array_equal(constant["layers"][0]["mixer"]["step"]["kernel"], 1)


def test_generation_with_left_padding_is_that_of_the_text_alone() -> None:
    model = formax.AutoModelForCausalLM.from_config(CONFIG, key=jax.random.key(1))
    ids = np.random.RandomState(0).randint(1, 31, (1, 7))
    padded, mask = (np.pad(each, ((0, 0), (4, 0))) for each in (ids, np.ones((1, 7))))
    found = model(input_ids=padded, attention_mask=mask).logits
    np.testing.assert_allclose(found[:, 4:], model(input_ids=ids).logits, atol=1e-5)


def test_a_cache_does_not_grow() -> None:
    sizes = [jax.tree.map(jnp.shape, mamba.init_cache(CONFIG, 2, length, 0, jnp.float32)) for length in (1, 10_000)]
    assert sizes[0] == sizes[1]


def test_scanned_layers_with_their_caches() -> None:
    params = specs.init(mamba.model_spec(CONFIG.replace(initializer_range=0.5)), jax.random.key(0))
    ids = jax.random.randint(jax.random.key(5), (2, 9), 0, 31)
    scanned = params | {"layers": specs.stack(params["layers"])}
    expected = mamba.model(params, CONFIG, ids)
    np.testing.assert_allclose(
        jax.jit(lambda p: mamba.model(p, CONFIG, ids).last_hidden_state)(scanned), expected.last_hidden_state, atol=1e-5
    )


def test_the_file_holds_numbers_for_what_follows_from_others() -> None:
    written = mamba.MambaConfig(hidden_size=40, expand=1.5).to_dict()
    assert (written["intermediate_size"], written["time_step_rank"]) == (60, 3)
    # the reference believes the file, whatever `expand` says
    again = mamba.MambaConfig.from_dict({"hidden_size": 40, "intermediate_size": 52, "time_step_rank": "auto"})
    assert (again.inner_size, again.rank) == (52, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_step_rank": "none"}, "time_step_rank='none' must be a number or \"auto\""),
        ({"time_step_rank": 0}, "time_step_rank=0 must be at least 1"),
        ({"time_step_init_scheme": "zero"}, "time_step_init_scheme='zero' is none of random, constant"),
        ({"conv_kernel": 0}, "conv_kernel=0 must be at least 1"),
        ({"expand": 0.01}, "intermediate_size=0 must be at least 1"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CONFIG.replace(**change)
