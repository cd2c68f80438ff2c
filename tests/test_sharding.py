"""Logical axes on a mesh: what is split, what stays whole and why, and that the numbers stay the same."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import formax
from formax.core import spec as specs
from formax.core.mesh import current
from formax.core.spec import Param, Spec
from formax.layers.attention import backends
from formax.models.text.bert import FAMILY, BertConfig
from formax.sharding import DEFAULT_RULES, Placement, make_mesh, placements, report, shard, shardings

(MODEL,) = (found for found in FAMILY.architectures if found.task == "ForMaskedLM")
CONFIG = BertConfig(
    vocab_size=50,  # no multiple of 4: the table stays whole along it
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=16,
    initializer_range=0.3,
)
SMALL = CONFIG.replace(num_hidden_layers=1)  # to be run
IDS = np.arange(28).reshape(4, 7) % 50


def place(shape: tuple[int, ...], axes: tuple[str | None, ...], rules: Any = DEFAULT_RULES, **mesh: int) -> Placement:
    spec: Spec = {"w": Param(shape, axes, "w")}
    (placed,) = placements(spec, AbstractMesh(tuple(mesh.values()), tuple(mesh)), rules)
    return placed


def test_rules_split_what_they_name() -> None:
    placed = place((24, 40, 3), ("embed", "mlp", None), fsdp=2, tensor=4)
    assert (placed.key, placed.partition, placed.remarks) == ("w", PartitionSpec("fsdp", "tensor", None), ())
    assert place((40, 24), ("mlp", "embed"), fsdp=2, tensor=4).partition == PartitionSpec("tensor", "fsdp")
    assert place((7,), (None,), fsdp=2).partition == PartitionSpec(None)
    assert place((), (), fsdp=2).partition == PartitionSpec()
    both = place((16, 3), ("embed", None), [("embed", ("fsdp", "tensor"))], fsdp=2, tensor=4)
    assert both.partition == PartitionSpec(("fsdp", "tensor"), None)


def test_what_stays_whole_says_why() -> None:
    odd = place((50, 24), ("vocab", "embed"), fsdp=2, tensor=4)
    assert odd.partition == PartitionSpec(None, "fsdp")
    assert odd.remarks == ("vocab is whole: 50 is no multiple of 4 (tensor)",)
    twice = place((24, 40), ("heads", "mlp"), tensor=4)
    assert twice.partition == PartitionSpec("tensor", None)
    assert twice.remarks == ("mlp is whole: mesh axis tensor is taken by another dimension",)
    absent = place((24, 40), ("embed", "mlp"), tensor=4)
    assert absent.partition == PartitionSpec(None, "tensor")
    assert absent.remarks == ("embed is whole: the mesh has no axis fsdp",)
    pair = place((12,), ("embed",), [("embed", ("fsdp", "tensor"))], fsdp=2, tensor=4)
    assert pair.remarks == ("embed is whole: 12 is no multiple of 8 (fsdp, tensor)",)


def test_the_next_rule_for_a_dimension_is_tried() -> None:
    rules = [("vocab", "tensor"), ("vocab", "fsdp"), ("embed", "fsdp")]
    placed = place((50, 24), ("vocab", "embed"), rules, fsdp=2, tensor=4)
    assert placed.partition == PartitionSpec("fsdp", None)
    assert placed.remarks == ("embed is whole: mesh axis fsdp is taken by another dimension",)
    neither = place((51,), ("vocab",), rules, fsdp=2, tensor=4)
    assert neither.remarks == ("vocab is whole: 51 is no multiple of 4 (tensor); 51 is no multiple of 2 (fsdp)",)


def test_a_rule_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rule for 'head', which is no logical axis; there are batch, length"):
        place((4,), ("heads",), [("head", "tensor")], tensor=2)


def test_the_report_names_every_parameter() -> None:
    model_spec = MODEL.spec(CONFIG)
    text = report(model_spec, AbstractMesh((2, 4), ("fsdp", "tensor")))
    lines = [line for line in text.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == [entry.key for entry in specs.table(model_spec).entries]
    at = text.splitlines().index("embed.word.embedding  50 x 24  (None, 'fsdp')")
    assert text.splitlines()[at + 1] == "    vocab is whole: 50 is no multiple of 4 (tensor)"
    assert "layers.1.mlp.up.kernel  24 x 40  ('fsdp', 'tensor')" in lines


def test_meshes_are_automatic() -> None:
    mesh = make_mesh(fsdp=2, tensor=4)
    assert dict(mesh.shape) == {"fsdp": 2, "tensor": 4}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 4}, {"tensor": 2, "data": 4}], ids=str)
def test_a_sharded_model_computes_the_same(axes: dict[str, int]) -> None:
    mesh = make_mesh(**axes)
    key = jax.random.key(0)
    whole = formax.AutoModelForMaskedLM.from_config(SMALL, key=key)
    sharded = formax.AutoModelForMaskedLM.from_config(SMALL, key=key, mesh=mesh)
    # But for the last bit: test_spec.py, test_sharded_initial_values_are_the_same.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=0), sharded.params, whole.params)
    places = specs.flatten(shardings(whole.spec, mesh))
    for path, leaf in specs.flatten(sharded.params).items():
        assert leaf.sharding == places[path], path
    assert (
        sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(sharded)) < 0.75 * whole.num_parameters()
    )

    mask = np.ones_like(IDS)
    mask[1, 4:] = 0
    expected = whole(IDS, mask).logits
    np.testing.assert_allclose(sharded(IDS, mask).logits, expected, rtol=1e-5, atol=1e-5)
    if "data" in axes:
        rows = NamedSharding(mesh, PartitionSpec("data"))
        split = sharded(*(jax.device_put(x, rows) for x in (IDS, mask))).logits
        np.testing.assert_allclose(split, expected, rtol=1e-5, atol=1e-5)


def test_a_sharded_model_has_the_same_gradients() -> None:
    key = jax.random.key(0)
    whole = formax.AutoModelForMaskedLM.from_config(SMALL, key=key)
    sharded = formax.AutoModelForMaskedLM.from_config(SMALL, key=key, mesh=make_mesh(fsdp=2, tensor=4))

    def gradient(model: Any) -> Any:
        return jax.jit(jax.grad(lambda m: jnp.square(m(IDS).logits).mean()))(model).params

    expected = specs.flatten(gradient(whole))
    for path, leaf in specs.flatten(gradient(sharded)).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_bert_base_on_a_pod() -> None:
    mesh = AbstractMesh((4, 16), ("fsdp", "tensor"))
    spec = MODEL.spec(BertConfig())
    placed = {one.key: one for one in placements(spec, mesh)}
    parts = {key: NamedSharding(mesh, one.partition).shard_shape(one.shape) for key, one in placed.items()}
    assert parts["layers.11.mlp.up.kernel"] == (768 // 4, 3072 // 16)
    assert parts["layers.0.attn.o.kernel"] == (768 // 16, 768 // 4)
    assert parts["layers.5.attn.k.bias"] == (768 // 16,)
    # 30522 words are no multiple of 16
    assert parts["embed.word.embedding"] == (30522, 768 // 4)
    assert placed["embed.word.embedding"].remarks == ("vocab is whole: 30522 is no multiple of 16 (tensor)",)
    layers = sum(math.prod(shape) for key, shape in parts.items() if key.startswith("layers."))
    whole = sum(math.prod(one.shape) for key, one in placed.items() if key.startswith("layers."))
    assert whole / 64 <= layers < 1.02 * whole / 64
    padded = MODEL.spec(BertConfig(vocab_size=30528))
    (table,) = [one for one in placements(padded, mesh) if one.key == "embed.word.embedding"]
    assert (table.partition, table.remarks) == (PartitionSpec("tensor", "fsdp"), ())


def test_a_model_tells_attention_over_which_mesh_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a trace arrays do not say so, and a kernel would be run for all rows and heads on every device."""
    seen: list[Any] = []
    run = backends.run

    def watched(*args: Any) -> Any:
        seen.append(current())
        return run(*args)

    monkeypatch.setattr(backends, "run", watched)
    config = formax.AutoConfig.for_model("llama", vocab_size=16, hidden_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, intermediate_size=8)  # fmt: skip
    whole = formax.AutoModelForCausalLM.from_config(config, key=jax.random.key(0))
    mesh, ids = make_mesh(fsdp=2, tensor=2), np.arange(2 * 600).reshape(2, 600) % 16
    parts = shard(whole, mesh)
    np.testing.assert_allclose(whole(ids).logits, parts(ids).logits, rtol=1e-4, atol=1e-5)
    assert [None if one is None else one.mesh for one in seen] == [None, mesh]
