"""Training on a mesh: the numbers of one device, the state split as its parameters are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import formax
from formax.core import spec as specs
from formax.sharding import make_mesh, shard, shard_batch, shardings
from formax.training.step import compile_step, init_state, make_train_step, state_shardings

DRAW = np.random.RandomState(0)
TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
DECODER = TEXT | {"num_key_value_heads": 2}
MIXTRAL = DECODER | {"num_local_experts": 4, "output_router_logits": True}
T5 = {"vocab_size": 64, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
VIT = {name: TEXT[name] for name in TEXT if name not in ("vocab_size", "max_position_embeddings")}
IDS = DRAW.randint(2, 64, (8, 12)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[1, 9:] = MASK[6, 7:] = 0
CLASSES = np.arange(8, dtype=np.int32) % 3
WORDS = {"input_ids": IDS, "attention_mask": MASK, "labels": np.where(MASK == 1, IDS, -100)}
PIXELS = DRAW.standard_normal((8, 3, 12, 12)).astype(np.float32)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("ForCausalLM", DECODER, WORDS),
    "bert": ("ForSequenceClassification", TEXT | {"num_labels": 3}, WORDS | {"labels": CLASSES}),
    "t5": ("ForSeq2SeqLM", T5 | {"decoder_start_token_id": 0}, WORDS | {"labels": WORDS["labels"][:, :7]}),
    "vit": (
        "ForImageClassification",
        VIT | {"num_labels": 3, "image_size": 12, "patch_size": 4},
        {"pixel_values": PIXELS, "labels": CLASSES},
    ),
    "mixtral": ("ForCausalLM", MIXTRAL, WORDS),
}
OPTIMIZERS = {"sgd": lambda: optax.sgd(0.05, momentum=0.9), "adamw": lambda: optax.adamw(3e-3)}


def made(family: str) -> Any:
    task, fields, _ = CASES[family]
    config = formax.AutoConfig.for_model(family, **fields)
    return getattr(formax, f"AutoModel{task}").from_config(config, key=jax.random.key(0))


def trained(model: Any, optimizer: Any, batch: Any) -> tuple[list[float], Any]:
    """The losses of five steps with dropout, and the last state."""
    state = init_state(model, optimizer, jax.random.key(1))
    step, losses = compile_step(make_train_step(optimizer), state), []
    for _ in range(5):
        state, told = step(state, batch)
        losses.append(float(told["loss"]))
    return losses, state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", CASES)
def test_sharded_training_gives_the_losses_of_one_device(family: str, optimizer: str) -> None:
    batch = CASES[family][2]
    expected, _ = trained(made(family), OPTIMIZERS[optimizer](), batch)
    assert expected[4] < 0.97 * expected[0]
    for axes in ({"fsdp": 4, "tensor": 2}, {"data": 8}):
        mesh = make_mesh(**axes)
        model = shard(made(family), mesh)
        losses, state = trained(model, OPTIMIZERS[optimizer](), shard_batch(batch, mesh))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        places = state_shardings(state, mesh)
        jax.tree.map(_is_equivalent, state, places)
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 2]
        parts = sum(leaf.addressable_shards[0].data.size for leaf in moments) / sum(leaf.size for leaf in moments)
        assert parts == 1 if "data" in axes else parts < 0.25


def _is_equivalent(leaf: jax.Array, place: NamedSharding) -> None:
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.sharding, place)


def test_a_compiled_step_leaves_the_state_where_it_was() -> None:
    mesh = make_mesh(fsdp=4, tensor=2)
    state = init_state(shard(made("bert"), mesh), optax.adam(1e-3))
    places = state_shardings(state, mesh)

    def forget(state: Any, batch: Any) -> Any:
        """What comes out depends on nothing that would tell the compiler where it is to lie."""
        return jax.tree.map(jnp.zeros_like, state), {}

    after, _ = compile_step(forget, state)(state, {})
    jax.tree.map(_is_equivalent, after, places)


def test_what_the_optimiser_keeps_lies_as_its_parameter_does() -> None:
    mesh = make_mesh(fsdp=4, tensor=2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=_matrices), optax.ema(0.9))
    state = init_state(shard(made("bert"), mesh), optimizer, jax.random.key(1))
    table = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    adam = state.opt_state[1][0]
    for tree in (adam.mu, adam.nu, state.opt_state[2].ema):
        assert tree["embed"]["word"]["embedding"].sharding == table
    assert adam.count.sharding.is_fully_replicated
    assert adam.count.sharding.mesh == mesh
    assert state.key is not None
    assert state.step.sharding == state.key.sharding == NamedSharding(mesh, PartitionSpec())
    places = specs.flatten(shardings(state.model.spec, mesh))
    for path, leaf in specs.flatten(adam.mu).items():
        assert leaf.sharding == places[path], path


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def test_moments_of_another_shape_are_whole() -> None:
    mesh = make_mesh(fsdp=4, tensor=2)
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=16)
    state = init_state(shard(made("bert"), mesh), optimizer)
    factored = jax.tree.leaves(state.opt_state[0].v_row["embed"]["word"])
    assert [leaf.shape for leaf in factored] == [(24,)]
    assert factored[0].sharding.is_fully_replicated
    step = compile_step(make_train_step(optimizer), state)
    _, told = step(state, shard_batch(CASES["bert"][2], mesh))
    assert np.isfinite(told["loss"])


def test_shardings_of_a_state_that_is_nowhere_yet() -> None:
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda key: init_state(made("bert"), optimizer, key), jax.random.key(1))
    mesh = make_mesh(fsdp=4, tensor=2)
    places: Any = state_shardings(state, mesh)
    jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), state, places)  # the same tree, and it fits
    assert places.model.params["embed"]["word"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert places.opt_state[0].mu["layers"][0]["mlp"]["up"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert places.step.spec == places.opt_state[0].count.spec == PartitionSpec()


def test_parts_of_a_sharded_batch_are_worked_off_by_all_devices() -> None:
    mesh, optimizer = make_mesh(fsdp=4, tensor=2), optax.sgd(0.1)
    batch = CASES["bert"][2]
    one, told = jax.jit(make_train_step(optimizer, accumulate=2))(init_state(made("bert"), optimizer), batch)
    state = init_state(shard(made("bert"), mesh), optimizer)
    many, found = compile_step(make_train_step(optimizer, accumulate=2), state)(state, shard_batch(batch, mesh))
    np.testing.assert_allclose(found["loss"], told["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(many.model), jax.tree.leaves(one.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_batches_are_split_over_the_axes_that_there_are() -> None:
    batch = {"input_ids": IDS, "labels": CLASSES}
    for axes, spec in (
        ({"data": 2, "fsdp": 4}, PartitionSpec(("data", "fsdp"))),
        ({"fsdp": 4, "tensor": 2}, PartitionSpec(("fsdp",))),
        ({"tensor": 8}, PartitionSpec(())),
    ):
        split = shard_batch(batch, make_mesh(**axes))
        for name, x in split.items():
            _is_equivalent(x, NamedSharding(make_mesh(**axes), spec))
            np.testing.assert_array_equal(x, batch[name])
    with pytest.raises(ValueError, match=r"input_ids \(6, 12\) has no rows for 8 devices \(data, fsdp\)"):
        shard_batch({"input_ids": IDS[:6]}, make_mesh(data=2, fsdp=4))
    with pytest.raises(ValueError, match=r"labels \(\) has no rows"):
        shard_batch({"labels": jnp.zeros(())}, make_mesh(fsdp=8))


def test_shardings_on_a_pod_need_no_devices() -> None:
    model = made("llama")
    mesh: Any = AbstractMesh((4, 2), ("fsdp", "tensor"))
    state = jax.eval_shape(lambda: init_state(model, optax.adamw(1e-3)))
    places: Any = state_shardings(state, mesh)
    assert places.opt_state[0].nu["embed"]["word"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
