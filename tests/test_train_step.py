"""A step of training: what it changes, by how much, and what it leaves alone."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import weights
from safetensors.numpy import save_file

import formax
from formax.conversion.load import stored_tensors
from formax.core import spec as specs
from formax.training.objective import loss, loss_of
from formax.training.step import compile_step, init_state, make_train_step, split

KEY = jax.random.key(3)
DRAW = np.random.RandomState(0)
IDS = jnp.asarray(DRAW.randint(1, 50, (8, 12)), jnp.int32)
BATCH = {"input_ids": IDS, "attention_mask": jnp.ones_like(IDS).at[1, 8:].set(0), "labels": jnp.arange(8) % 3}
IMAGES = {"pixel_values": jnp.asarray(DRAW.randn(4, 3, 33, 40), jnp.float32), "labels": jnp.arange(4) % 3}
SGD = optax.sgd(0.1)
STEP = jax.jit(make_train_step(SGD))
ORACLE = Path(__file__).resolve().parent / "data" / "batch_norm.npz"


def bert(**fields: Any) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"intermediate_size": 40, "max_position_embeddings": 16, "initializer_range": 0.2, "num_labels": 3}
    config = formax.AutoConfig.for_model("bert", **sizes | more | fields)
    return formax.AutoModelForSequenceClassification.from_config(config, key=jax.random.key(0))


def resnet() -> Any:
    sizes = {"embedding_size": 6, "hidden_sizes": (8,), "depths": (1,), "num_labels": 3}
    config = formax.AutoConfig.for_model("resnet", **sizes)
    return formax.AutoModelForImageClassification.from_config(config, key=jax.random.key(0))


def same(a: Any, b: Any, **how: Any) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, **how), a, b)


# --- what a step is


def test_a_step_is_the_gradient_of_the_objective_with_its_own_noise() -> None:
    state = init_state(bert(), SGD, KEY)
    expect = jax.jit(jax.value_and_grad(loss))
    for i in range(2):
        expected, slope = expect(state.model, BATCH, key=jax.random.fold_in(KEY, i))
        moved = jax.tree.map(lambda w, g: w - 0.1 * g, state.model.params, slope.params)
        again, told = STEP(state, BATCH)
        np.testing.assert_allclose(told["loss"], expected, rtol=1e-6)
        norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(slope.params)))
        np.testing.assert_allclose(told["grad_norm"], norm, rtol=1e-5)
        same(again.model.params, moved, rtol=1e-5, atol=1e-6)
        assert int(again.step) == i + 1
        assert (jax.random.key_data(again.key) == jax.random.key_data(KEY)).all()
        _, repeated = STEP(state, BATCH)
        assert repeated["loss"] == told["loss"]
        state = again


def test_without_a_key_there_is_no_noise() -> None:
    state, told = STEP(init_state(bert(), SGD), BATCH)
    np.testing.assert_allclose(told["loss"], loss(bert(), BATCH), rtol=1e-6)
    assert state.key is None
    _, other = STEP(init_state(bert(), SGD, KEY), BATCH)
    assert abs(other["loss"] - told["loss"]) > 1e-4


def test_metrics_are_float32_scalars() -> None:
    schedule = optax.linear_schedule(1.0, 0.5, 10)
    optimizer = optax.sgd(schedule)
    step = jax.jit(make_train_step(optimizer, learning_rate=schedule))
    state, told = step(init_state(bert(), optimizer), BATCH)
    _, then = step(state, BATCH)
    assert told.keys() == {"loss", "grad_norm", "learning_rate"}
    assert {(x.shape, x.dtype.name) for x in told.values()} == {((), "float32")}
    np.testing.assert_allclose([told["learning_rate"], then["learning_rate"]], [1.0, 0.95])


def test_a_constant_learning_rate() -> None:
    _, told = jax.jit(make_train_step(SGD, learning_rate=0.25))(init_state(bert(), SGD), BATCH)
    assert told["learning_rate"] == 0.25


def test_another_objective() -> None:
    def doubled(model: Any, out: Any, batch: Any) -> jax.Array:
        return 2 * loss_of(model, out, batch)

    state = init_state(bert(), SGD)
    _, once = STEP(state, BATCH)
    _, twice = jax.jit(make_train_step(SGD, objective=doubled))(state, BATCH)
    np.testing.assert_allclose(twice["loss"], 2 * once["loss"], rtol=1e-6)
    np.testing.assert_allclose(twice["grad_norm"], 2 * once["grad_norm"], rtol=1e-5)


def test_a_compiled_step_takes_the_state_over_and_leaves_the_callers_key() -> None:
    optimizer = optax.adamw(1e-3)
    key, model = jax.random.key(5), bert()
    state = init_state(model, optimizer, key)
    step: Any = compile_step(make_train_step(optimizer), state)
    new, _ = step(state, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.model, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in (*jax.tree.leaves(new), key))
    step(new, BATCH)
    assert step._cache_size() == 1


# --- weights and buffers


def test_buffers_are_left_alone_by_the_optimiser() -> None:
    model = resnet()
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    state = init_state(model, optimizer)
    held, buffers = split(model)
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * len(jax.tree.leaves(held))
    after, _ = jax.jit(make_train_step(optimizer))(state, IMAGES)
    moved, kept = split(after.model)
    jax.tree.map(np.testing.assert_array_equal, kept, buffers)
    assert len(jax.tree.leaves(buffers)) > 3
    for path, leaf in specs.flatten(moved).items():
        assert leaf is None or not np.array_equal(leaf, specs.flatten(held)[path]), path


def test_batch_norms_are_trained_as_pytorch_trains_them(tmp_path: Path) -> None:
    with np.load(ORACLE) as file:
        oracle = dict(file)
    after = {name.removeprefix("after."): array for name, array in oracle.items() if name.startswith("after.")}
    (tmp_path / "config.json").write_text(str(oracle["config"]))
    before = {name: weights.tensor(name, x.shape, x.dtype) for name, x in after.items()}
    save_file(before, tmp_path / "model.safetensors")
    optimizer = optax.sgd(float(oracle["rate"]), momentum=float(oracle["momentum"]))
    state = init_state(formax.from_pretrained(tmp_path), optimizer, KEY)
    step = compile_step(make_train_step(optimizer), state)
    found = []
    for pixels, labels in zip(oracle["pixel_values"], oracle["labels"], strict=True):
        state, told = step(state, {"pixel_values": pixels.astype(np.float32) / 2, "labels": labels.astype(np.int32)})
        found.append(told["loss"])
    np.testing.assert_allclose(found, oracle["losses"], rtol=1e-5)
    tensors, fetch = stored_tensors(state.model.spec, state.model.params)
    assert tensors.keys() == after.keys()
    for name, expected in after.items():
        far = np.abs(fetch(name) - expected).max() / max(expected.std(), 1e-2)
        assert far < 1e-4, (name, far)


# --- parts of a batch


def test_parts_of_a_batch_make_the_step_of_the_whole() -> None:
    state = init_state(bert(), SGD)
    whole, told = STEP(state, BATCH)
    parts, summed = jax.jit(make_train_step(SGD, accumulate=4))(state, BATCH)
    same(summed, told, rtol=1e-5)
    same(parts.model.params, whole.model.params, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_have_noise_and_running_statistics_of_their_own() -> None:
    optimizer = optax.sgd(0.0)
    model, key = resnet(), jax.random.fold_in(KEY, 0)
    state, told = jax.jit(make_train_step(optimizer, accumulate=2))(init_state(model, optimizer, KEY), IMAGES)
    found, whole = [], jax.jit(make_train_step(optimizer))
    for i in range(2):
        rows = {name: x[i::2] for name, x in IMAGES.items()}
        one, more = whole(init_state(model, optimizer, jax.random.fold_in(key, i)), rows)
        model = one.model
        found.append(more["loss"])
    np.testing.assert_allclose(told["loss"], np.mean(found), rtol=1e-6)
    same(state.model.params, model.params, rtol=1e-5, atol=1e-6)


def test_rows_that_make_no_equal_parts() -> None:
    state = init_state(bert(), SGD)
    with pytest.raises(ValueError, match=r"3 parts need arrays of equally many rows, .*input_ids \[8\]"):
        make_train_step(SGD, accumulate=3)(state, BATCH)
    with pytest.raises(ValueError, match=r"head_mask \[4\]"):
        make_train_step(SGD, accumulate=2)(state, BATCH | {"head_mask": jnp.ones(4)})
    with pytest.raises(ValueError, match="accumulate must be 1 or more, got 0"):
        make_train_step(SGD, accumulate=0)


# --- dtypes


def dtypes(tree: Any) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def test_the_optimiser_works_in_float32_on_bfloat16_weights() -> None:
    optimizer = optax.adamw(1e-2)
    model = bert().astype("bfloat16")
    state = init_state(model, optimizer)
    after, told = jax.jit(make_train_step(optimizer))(state, BATCH)
    assert dtypes(after.model) == {"bfloat16"}
    assert dtypes((state.opt_state, after.opt_state, told)) == {"float32"}
    slope = jax.tree.map(lambda g: g.astype(jnp.float32), jax.jit(jax.grad(loss))(model, BATCH).params)
    wide = model.astype("float32").params
    updates, _ = optimizer.update(slope, optimizer.init(wide), wide)
    expected = jax.tree.map(lambda w: w.astype(jnp.bfloat16), optax.apply_updates(wide, updates))
    # In the last bit of bfloat16, where gradients that are rounded in another order meet Adam's division.
    equal = jax.tree.map(lambda a, b: (a == b).mean(), after.model.params, expected)
    assert np.mean(jax.tree.leaves(equal)) > 0.98


def test_computing_in_bfloat16_keeps_small_steps() -> None:
    optimizer = optax.sgd(1e-4)
    exact, told = jax.jit(make_train_step(optimizer))(init_state(bert(), optimizer), BATCH)
    mixed, near = jax.jit(make_train_step(optimizer, compute_dtype="bfloat16"))(init_state(bert(), optimizer), BATCH)
    rounded = init_state(bert().astype("bfloat16"), optimizer)
    lost, _ = jax.jit(make_train_step(optimizer))(rounded, BATCH)
    assert dtypes(mixed) == {"float32"}
    assert 1e-5 < abs(near["loss"] / told["loss"] - 1) < 0.05
    before, path = bert().params, ("layers", 0, "mlp", "up", "kernel")
    by, expected = (specs.flatten(x.model.params)[path] - specs.flatten(before)[path] for x in (mixed, exact))
    assert np.corrcoef(by.ravel(), expected.ravel())[0, 1] > 0.99
    assert (specs.flatten(lost.model.params)[path] == specs.flatten(rounded.model.params)[path]).mean() > 0.9


def test_running_statistics_stay_float32_when_computing_in_bfloat16() -> None:
    optimizer = optax.sgd(1e-2)
    state = init_state(resnet(), optimizer, KEY)
    after, _ = jax.jit(make_train_step(optimizer, compute_dtype="bfloat16"))(state, IMAGES)
    assert dtypes(after) == {"float32"}
    mean = after.model.params["stem"]["norm"]["mean"]
    assert not np.array_equal(mean, mean.astype(jnp.bfloat16).astype(jnp.float32))


# --- it learns


def learned(model: Any, batch: Any, steps: int, rate: float) -> tuple[float, float]:
    """Losses without noise, before and after `steps` steps with it."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    before = float(loss(model, batch))
    state = init_state(model, optimizer, KEY)
    step = compile_step(make_train_step(optimizer), state)
    for _ in range(steps):
        state, _ = step(state, batch)
    return before, float(loss(state.model, batch))


def test_bert_learns_eight_labels_by_heart() -> None:
    before, after = learned(bert(num_hidden_layers=2), BATCH, 60, 5e-3)
    assert after < before / 10


def test_gpt2_learns_eight_texts_by_heart() -> None:
    config = formax.AutoConfig.for_model("gpt2", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model = formax.AutoModelForCausalLM.from_config(config, key=jax.random.key(0))
    before, after = learned(model, {"input_ids": IDS, "labels": IDS}, 120, 2e-2)
    assert before > 3.5
    assert after < before / 10
