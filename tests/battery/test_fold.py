"""Layers run one by one, in a loop, or computed again in the backward pass: the same model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from oracle.compare import error

import formax
from battery.frames import one_a_frame, one_a_kind
from battery.goldens import Golden, weighted
from formax.core import spec as specs
from formax.sharding import make_mesh, shard

# Relative to the standard deviation; of a gradient that is almost nothing, to that of an average one.
TOLERANCE = 1e-5
# Gradients are summed in another order, and through more layers: DETR's reach 1.5e-5 on a CPU without AVX-512.
OF_GRADIENTS = 3e-5
KEY = jax.random.key(0)


@pytest.mark.parametrize("golden", one_a_kind(), ids=str)
def test_stacked_layers_compute_the_same(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    stacked = model.stack_layers()
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(model))
    expected, out = (one(**golden.inputs, **golden.switches) for one in (model, stacked))
    jax.tree.map(lambda a, b: None, out, expected)  # trees of one kind
    far = [error(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (expected, out)), strict=True)]
    assert max(far) < TOLERANCE, far


@pytest.mark.parametrize("golden", one_a_frame(), ids=str)
def test_gradients_of_stacked_and_rematerialised_layers(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    stacked = model.stack_layers()
    # Both at once: what either does wrong is wrong together, and gradients take longest of all to compile.
    variants = (model, stacked.replace(remat=True))
    given = {name: jnp.asarray(x) for name, x in golden.inputs.items()}

    # One program of both, of which each has parameters of its own: XLA compiles kernels that are alike once.
    @jax.jit
    def gradients(models: Any, inputs: Any, key: Any) -> Any:
        return [jax.grad(lambda model: weighted(model(**inputs, key=key)))(model) for model in models]

    expected, *others = (
        {path: np.asarray(leaf) for path, leaf in specs.flatten(one.unstack_layers().params).items()}
        for one in gradients(variants, given, KEY)
    )
    least = np.sqrt(np.mean([np.var(leaf) for leaf in expected.values()]))
    for found in others:
        assert found.keys() == expected.keys()
        far = {path: np.abs(found[path] - x).max() / max(np.std(x), least) for path, x in expected.items()}
        worst = max(far, key=lambda path: far[path])
        assert far[worst] < OF_GRADIENTS, (specs.dotted(worst), far[worst])


# --- one model of each kind of question

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = jnp.arange(14).reshape(2, 7)


def bert(**fields: Any) -> Any:
    config = formax.AutoConfig.for_model("bert", **SIZES | {"intermediate_size": 40} | fields)
    return formax.AutoModelForMaskedLM.from_config(config, key=KEY)


def loss(model: Any) -> jax.Array:
    return jnp.square(model(IDS).logits).mean()


def test_rematerialised_layers_are_computed_again() -> None:
    """The numbers do not show it, the program does."""
    model = bert()
    for one in (model, model.stack_layers()):
        plain, again = (str(jax.make_jaxpr(jax.grad(loss))(each)) for each in (one, one.replace(remat=True)))
        assert "remat" not in plain
        assert "remat" in again
        assert ("scan" in plain) == ("scan" in again) == (one is not model)


def test_what_was_compiled_without_rematerialising_is_not_used_with_it() -> None:
    model, traced = bert(), []

    @jax.jit
    def program(model: Any) -> jax.Array:
        traced.append(str(jax.make_jaxpr(jax.grad(loss))(model)))
        return loss(model)

    assert program(model) == program(model)
    program(model.replace(remat=True))
    program(model)
    assert ["remat" in text for text in traced] == [False, True]
    # nothing is left behind for what is traced later, without a Model
    direct = jax.grad(lambda p: model.architecture.apply(p, model.config, IDS).logits.sum())
    assert "remat" not in str(jax.make_jaxpr(direct)(model.params))


def test_a_stack_is_undone_bit_for_bit() -> None:
    model = bert()
    stacked = model.stack_layers()
    assert stacked.params["layers"]["mlp"]["up"]["kernel"].shape == (3, 24, 40)
    assert stacked.stack_layers() is stacked
    assert model.unstack_layers() is model
    again = stacked.unstack_layers()
    jax.tree.map(np.testing.assert_array_equal, again, model)


def test_the_declaration_follows_the_stack() -> None:
    model = bert().stack_layers()
    found = {entry.key: entry for entry in specs.table(model.spec).entries}
    assert found.keys() == {specs.dotted(path) for path in specs.flatten(model.params)}
    for path, leaf in specs.flatten(model.params).items():
        assert found[specs.dotted(path)].param.shape == leaf.shape
    kernel = found["layers.mlp.up.kernel"]
    assert kernel.param.axes == ("layers", "embed", "mlp")
    assert kernel.name == "bert.encoder.layer.*.intermediate.dense.weight"
    assert model.num_parameters(only_trainable=True) == bert().num_parameters()
    assert model.astype("bfloat16").params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    fresh = specs.init(model.spec, KEY)["layers"]["mlp"]["up"]["kernel"]
    assert abs(fresh.std() / 0.02 - 1) < 0.1
    assert not np.array_equal(fresh[0], fresh[1])


def test_stacked_parameters_are_split_as_those_of_a_layer() -> None:
    mesh = make_mesh(fsdp=2, tensor=4)
    kernel = shard(bert().stack_layers(), mesh).params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")


def test_a_stacked_model_is_saved_as_any_other(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "one_by_one")
    model.stack_layers().save_pretrained(tmp_path / "stacked")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "stacked" / name).read_bytes() == (tmp_path / "one_by_one" / name).read_bytes()


def test_what_cannot_be_stacked_says_why() -> None:
    pruned = bert().prune_heads({1: [0]})
    with pytest.raises(ValueError, match=r"layers 0 and 1 differ at 'attn.*only equal layers stack"):
        pruned.stack_layers()
    config = formax.AutoConfig.for_model("resnet", embedding_size=4, hidden_sizes=(8,), depths=(1,))
    with pytest.raises(ValueError, match="ResNetModel has no layers to stack"):
        formax.AutoModel.from_config(config, key=KEY).stack_layers()
    decoder = bert(is_decoder=True).stack_layers()
    with pytest.raises(TypeError, match=r"unstack_layers\(\) first"):
        decoder.init_cache(1, 8)
    assert decoder.unstack_layers().init_cache(1, 8) is not None
