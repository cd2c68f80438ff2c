"""A run that is saved goes on as it would have; what does not fit is refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import formax
from formax.conversion.checkpoint import CheckpointError
from formax.core import spec as specs
from formax.sharding import make_mesh, shard, shard_batch
from formax.training.checkpoint import latest_step, manager, restore, restore_model, save
from formax.training.step import TrainState, compile_step, init_state, make_train_step, state_shardings

SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
IDS = np.random.RandomState(0).randint(1, 64, (8, 12)).astype(np.int32)
BATCH = {"input_ids": IDS, "labels": np.arange(8, dtype=np.int32) % 3}
OPTIMIZER = optax.adamw(1e-2)
STEP = jax.jit(make_train_step(OPTIMIZER))


def bert(seed: int = 0, **fields: Any) -> Any:
    config = formax.AutoConfig.for_model("bert", **SIZES | fields)
    return formax.AutoModelForSequenceClassification.from_config(config, key=jax.random.key(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """A folder with the steps 0 and 2 of a run, and its state after 2."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    state = init_state(bert(), OPTIMIZER, jax.random.key(7))
    save(folder, state)
    for _ in range(2):
        state, _ = STEP(state, BATCH)
    save(folder, state)
    return folder, state


def leaves(state: TrainState) -> list[np.ndarray]:
    """All numbers of a state."""
    assert state.key is not None
    return [np.asarray(x) for x in (*jax.tree.leaves((state.model, state.opt_state, state.step)), _data(state))]


def _data(state: TrainState) -> Any:
    assert state.key is not None
    return jax.random.key_data(state.key)


def equal(a: TrainState, b: TrainState) -> None:
    jax.tree.map(lambda x, y: None, a, b)  # trees of one kind
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_run_goes_on_as_it_would_have(run: tuple[Path, TrainState]) -> None:
    folder, state = run
    found = restore(folder, init_state(bert(seed=1), OPTIMIZER, jax.random.key(0)))
    equal(found, state)
    expected, told = STEP(state, BATCH)
    again, same = STEP(found, BATCH)
    assert same == told
    equal(again, expected)


def test_an_earlier_step(run: tuple[Path, TrainState]) -> None:
    folder, _ = run
    assert latest_step(folder) == 2
    first = init_state(bert(), OPTIMIZER, jax.random.key(7))
    equal(restore(folder, init_state(bert(seed=1), OPTIMIZER, jax.random.key(0)), step=0), first)
    with pytest.raises(CheckpointError, match="run holds no step 1; it has 0, 2"):
        restore(folder, first, step=1)


def test_what_is_in_the_folder(run: tuple[Path, TrainState]) -> None:
    folder, state = run
    assert sorted(path.name for path in folder.iterdir()) == ["0", "2"]
    config = json.loads((folder / "2" / "config" / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["architectures"] == ["BertForSequenceClassification"]
    model = restore_model(folder)
    assert model.config == state.model.config.replace(architectures=("BertForSequenceClassification",))
    jax.tree.map(np.testing.assert_array_equal, model.params, state.model.params)
    np.testing.assert_array_equal(model(IDS).logits, state.model(IDS).logits)


def test_nothing_there(tmp_path: Path) -> None:
    state = init_state(bert(), OPTIMIZER)
    assert latest_step(tmp_path / "none") is None
    assert latest_step(tmp_path) is None
    for find in (lambda folder: restore(folder, state), restore_model):
        with pytest.raises(CheckpointError, match=r"there is no folder .*none"):
            find(tmp_path / "none")
        with pytest.raises(CheckpointError, match="holds no checkpoint of a run"):
            find(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused(run: tuple[Path, TrainState]) -> None:
    folder, state = run
    config = formax.AutoConfig.for_model("bert", **SIZES)
    other = formax.AutoModelForMaskedLM.from_config(config, key=jax.random.key(0))
    with pytest.raises(CheckpointError, match="the state to be restored has a BertForMaskedLM"):
        restore(folder, init_state(other, OPTIMIZER, jax.random.key(0)))
    wider = init_state(bert(intermediate_size=48, num_hidden_layers=1), OPTIMIZER, jax.random.key(0))
    with pytest.raises(CheckpointError) as told:
        restore(folder, wider)
    assert "step 2, holds other parameters:" in str(told.value)
    assert "  layers.0.mlp.down.kernel: float32[40, 24] there, float32[48, 24] here" in str(told.value)
    assert "  layers.1.attn.k.bias: float32[24] there, nothing here" in str(told.value)
    assert "more" in str(told.value)
    with pytest.raises(CheckpointError, match=r"embed.norm.bias: float32\[24\] there, bfloat16\[24\] here"):
        restore(folder, init_state(state.model.astype("bfloat16"), OPTIMIZER, jax.random.key(0)))


def test_another_optimiser_or_key_is_refused(run: tuple[Path, TrainState]) -> None:
    folder, _ = run
    sgd = init_state(bert(), optax.sgd(0.1, momentum=0.9), jax.random.key(0))
    with pytest.raises(CheckpointError, match=r"another kind of key:\n  opt\[0\].count: int32\[\] there, nothing here"):
        restore(folder, sgd)
    with pytest.raises(CheckpointError, match=r"key: uint32\[2\] there, nothing here"):
        restore(folder, init_state(bert(), OPTIMIZER))
    with pytest.raises(CheckpointError, match=r"key: uint32\[2\] there, uint32\[4\] here"):
        restore(folder, init_state(bert(), OPTIMIZER, jax.random.key(0, impl="rbg")))


def test_a_step_is_saved_once(run: tuple[Path, TrainState]) -> None:
    folder, state = run
    with pytest.raises(CheckpointError, match="holds step 2 already"):
        save(folder, state)


def test_interventions_are_not_saved(tmp_path: Path) -> None:
    model = formax.intervene(bert(), {"layers.0.mlp.out": lambda x: 0 * x})
    with pytest.raises(ValueError, match="interventions, which no checkpoint can hold"):
        save(tmp_path, init_state(model, OPTIMIZER))


def test_a_run_that_went_back_saves_earlier_steps(tmp_path: Path) -> None:
    state = init_state(bert(num_hidden_layers=1), optax.sgd(0.1))
    for step in (5, 3):
        save(tmp_path, TrainState(state.model, state.opt_state, jnp.int32(step), None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5"]
    assert latest_step(tmp_path) == 5


def test_what_is_left_of_a_save_that_died_is_no_step(tmp_path: Path) -> None:
    state = init_state(bert(num_hidden_layers=1), optax.sgd(0.1))
    save(tmp_path, state)
    # what orbax writes into until a step is complete
    (tmp_path / "4.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert latest_step(tmp_path) == 0
    equal_params(restore(tmp_path, state), state)


def equal_params(a: TrainState, b: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.model.params, b.model.params)


def test_writing_while_training_goes_on(tmp_path: Path) -> None:
    optimizer = optax.sgd(0.1)
    state = init_state(bert(), optimizer, jax.random.key(7))
    step = compile_step(make_train_step(optimizer), state)
    held = {}
    with manager(tmp_path, keep=2) as writer:
        for _ in range(4):
            held[int(state.step)] = jax.tree.map(np.asarray, state.model.params)
            save(writer, state)
            state, _ = step(state, BATCH)  # takes the memory of what is being written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    for number in (2, 3):
        found = restore(tmp_path, state, step=number)
        jax.tree.map(np.testing.assert_array_equal, found.model.params, held[number])


@pytest.mark.parametrize("abstract", [False, True], ids=["state", "shapes"])
def test_onto_another_mesh(tmp_path: Path, abstract: bool) -> None:
    old = make_mesh(fsdp=4, tensor=2)
    state = init_state(shard(bert(), old), OPTIMIZER, jax.random.key(7))
    step = compile_step(make_train_step(OPTIMIZER), state)
    state, _ = step(state, shard_batch(BATCH, old))
    save(tmp_path, state)
    values = leaves(state)

    new = make_mesh(data=2, fsdp=2, tensor=2)
    like = init_state(shard(bert(seed=1), new), OPTIMIZER, jax.random.key(0))
    if abstract:
        shapes = jax.eval_shape(lambda key: init_state(bert(), OPTIMIZER, key), jax.random.key(0))
        like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            state_shardings(shapes, new),
        )
    found = restore(tmp_path, like)
    for x, y in zip(leaves(found), values, strict=True):
        np.testing.assert_array_equal(x, y)
    places = state_shardings(found, new)
    jax.tree.map(_lies, found, places)
    table = found.opt_state[0].mu["embed"]["word"]["embedding"]
    assert table.sharding == NamedSharding(new, PartitionSpec("tensor", "fsdp"))
    _, told = step(state, shard_batch(BATCH, old))
    _, there = compile_step(make_train_step(OPTIMIZER), found)(found, shard_batch(BATCH, new))
    np.testing.assert_allclose(there["loss"], told["loss"], rtol=1e-5)


def _lies(leaf: jax.Array, place: NamedSharding) -> None:
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.sharding, place)


def test_a_model_alone_onto_a_mesh(run: tuple[Path, TrainState]) -> None:
    folder, state = run
    mesh = make_mesh(fsdp=4, tensor=2)
    model = restore_model(folder, mesh=mesh)
    assert specs.flatten(model.params)["layers", 0, "mlp", "up", "kernel"].sharding.spec == PartitionSpec(
        "fsdp", "tensor"
    )
    equal_params(TrainState(model, None, state.step, None), state)


def test_buffers_bfloat16_and_stacked_layers_come_back(tmp_path: Path) -> None:
    sizes = {"embedding_size": 6, "hidden_sizes": (8,), "depths": (1,)}
    config = formax.AutoConfig.for_model("resnet", **sizes)
    resnet = formax.AutoModelForImageClassification.from_config(config, key=jax.random.key(0))
    for name, model in (("resnet", resnet), ("stacked", bert().astype("bfloat16").stack_layers())):
        state = init_state(model, OPTIMIZER, jax.random.key(1))
        save(tmp_path / name, state)
        blank = jax.tree.map(lambda x: 0 * x, model)
        equal(restore(tmp_path / name, init_state(blank, OPTIMIZER, jax.random.key(0))), state)
        alone = restore_model(tmp_path / name)
        equal_params(TrainState(alone, None, state.step, None), state)


def test_a_configuration_that_is_not_that_of_the_parameters(tmp_path: Path) -> None:
    save(tmp_path, init_state(bert(), optax.sgd(0.1)))
    path = tmp_path / "0" / "config" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 65}))
    with pytest.raises(CheckpointError) as told:
        restore_model(tmp_path)
    assert "not of its own configuration:" in str(told.value)
    assert "embed.word.embedding: float32[64, 24] there, float32[65, 24] here" in str(told.value)


def test_orbax_is_imported_when_it_is_used() -> None:
    program = "import sys, formax.training.checkpoint; print('orbax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
