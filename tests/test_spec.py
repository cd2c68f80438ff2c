"""One declaration, and what follows from it: names, initial values, shapes, the printed table, and running layers."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from formax.core import spec as specs
from formax.core.layout import TRANSPOSE, Part, Stacked
from formax.core.spec import At, Ignored, Param, Spec, Tied, fold, normal, stack, unstack
from formax.core.tap import watch
from formax.layers.dropout import dropout
from formax.sharding import make_mesh

KEY = jax.random.key(0)


def linear(name: str, d_in: int, d_out: int, std: float = 0.1) -> Spec:
    kernel = Param((d_in, d_out), ("embed", "mlp"), "weight", normal(std), TRANSPOSE)
    return At(name, {"kernel": kernel, "bias": Param((d_out,), ("mlp",), "bias")})


def small() -> dict[str, Spec]:
    table = Param((7, 4), ("vocab", "embed"), "weight", normal(1.0))
    norm = At("LayerNorm", {"scale": Param((4,), ("embed",), "weight", specs.ones, also=("gamma",))})
    return {
        "embed": At("embeddings", {"word": At("words", {"embedding": table}), "position_ids": Ignored("position_ids")}),
        "layers": specs.stack_of("encoder.layer", [{"mlp": linear("dense", 4, 4), "norm": norm} for _ in range(2)]),
        "pooler": specs.optional(linear("pooler", 4, 4)),
        "decoder": Tied("decoder.weight", "embed.word.embedding"),
        "steps": Param((), (), "num_batches_tracked", buffer=True),
    }


@cache
def initial() -> Any:
    return specs.init(small(), KEY)


def test_prefixes_make_the_checkpoint_names() -> None:
    table = specs.table(small())
    assert {entry.key: entry.name for entry in table.entries} == {
        "embed.word.embedding": "embeddings.words.weight",
        "layers.0.mlp.kernel": "encoder.layer.0.dense.weight",
        "layers.0.mlp.bias": "encoder.layer.0.dense.bias",
        "layers.0.norm.scale": "encoder.layer.0.LayerNorm.weight",
        "layers.1.mlp.kernel": "encoder.layer.1.dense.weight",
        "layers.1.mlp.bias": "encoder.layer.1.dense.bias",
        "layers.1.norm.scale": "encoder.layer.1.LayerNorm.weight",
        "pooler.kernel": "pooler.weight",
        "pooler.bias": "pooler.bias",
        "steps": "num_batches_tracked",
    }
    assert table.tied == {"decoder.weight": "embed.word.embedding"}
    assert table.ignored == {"embeddings.position_ids"}
    assert {entry.key for entry in table.entries if entry.param.optional} == {"pooler.kernel", "pooler.bias"}
    old = {"encoder.layer.0.LayerNorm.gamma", "encoder.layer.1.LayerNorm.gamma"}
    stored = {entry.name for entry in table.entries}
    assert table.known_names() == stored | old | {"decoder.weight", "embeddings.position_ids"}


def test_the_tree_holds_parameters_only() -> None:
    spec, params = small(), initial()
    assert params.keys() == {"embed", "layers", "pooler", "steps"}
    assert params["embed"].keys() == {"word"}
    assert isinstance(params["layers"], tuple)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), specs.abstract(spec))
    assert specs.trainable(spec)["steps"] is False
    assert all(jax.tree.leaves({**specs.trainable(spec), "steps": True}))
    assert specs.logical_axes(spec)["layers"][1]["mlp"]["kernel"] == ("embed", "mlp")
    assert specs.abstract(spec, jnp.bfloat16)["steps"].dtype == jnp.bfloat16
    assert specs.count(spec) == 28 + 2 * (16 + 4 + 4) + 20 + 1
    assert list(small()) == list(specs.under("bert", spec))
    assert specs.table(specs.under("bert", spec)).entries[0].name == "bert.embeddings.words.weight"


def test_flatten_and_unflatten_are_inverse() -> None:
    leaves = specs.flatten(specs.build(small(), lambda entry: entry.name))
    assert leaves["layers", 1, "mlp", "bias"] == "encoder.layer.1.dense.bias"
    assert specs.flatten(specs.unflatten(leaves)) == leaves
    # in whatever order the leaves come, and never with one layer in the place of another
    assert specs.unflatten({(1, "a"): "second", (0, "a"): "first"}) == ({"a": "first"}, {"a": "second"})
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        specs.unflatten({(0, "a"): "first", (2, "a"): "third"})


# --- what a declaration must not say


def test_tables_refuse_contradictions() -> None:
    one, other = Param((2,), (None,), "x"), Param((3,), (None,), "x")
    with pytest.raises(ValueError, match=r"a, b all claim the checkpoint tensor 'x'"):
        specs.table({"a": one, "b": other})
    with pytest.raises(ValueError, match=r"'decoder' is declared tied to 'embed', which is no parameter"):
        specs.table({"a": one, "tie": Tied("decoder", "embed")})
    with pytest.raises(ValueError, match=r"parameter 'x': 1 axes \('embed',\) for shape \(2, 3\)"):
        Param((2, 3), ("embed",), "x")
    with pytest.raises(ValueError, match=r"unknown logical axes \['heds'\]; known are batch"):
        Param((2,), ("heds",), "x")


def fused(*layouts: Part) -> dict[str, Spec]:
    return {str(i): Param((4, 2), (None, None), "qkv", layout=layout) for i, layout in enumerate(layouts)}


def test_parts_make_up_their_tensor() -> None:
    sizes = (2, 2, 2)
    q, k, v = (Part(i, sizes, then=TRANSPOSE) for i in range(3))
    table = specs.table(fused(v, q, k))  # in any order in the tree
    assert [entry.key for entry in table.stored()["qkv"]] == ["1", "2", "0"]
    assert {entry.stored_shape for entry in table.entries} == {(6, 4)}
    for wrong in ((q, k), (q, k, k), (q, k, Part(2, (2, 2, 2), axis=0, groups=2, then=TRANSPOSE))):
        with pytest.raises(ValueError, match=r"'qkv' must be made of all its parts, once each: 0 \(Part\(index=0"):
            specs.table(fused(*wrong))


def test_stacks_are_known_by_all_their_names() -> None:
    spec = At("experts", {"up": Param((2, 4, 3), ("experts", None, None), "{}.w", layout=Stacked(2, TRANSPOSE))})
    assert specs.table(spec).stored().keys() == {"experts.0.w", "experts.1.w"}
    assert specs.table(spec).known_names() == {"experts.0.w", "experts.1.w"}


# --- initial values


def test_adding_a_parameter_changes_no_other() -> None:
    spec = small()
    # of the same shape and initialiser as others, with which it is drawn together
    more: dict[str, Spec] = {"first": Param((4, 4), (None, None), "first", normal(0.1)), **spec}
    before, after = specs.flatten(initial()), specs.flatten(specs.init(more, KEY))
    assert after.keys() - before.keys() == {("first",)}
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=str(path))


def test_leaves_are_drawn_independently() -> None:
    params = initial()
    first, second = (layer["mlp"]["kernel"] for layer in params["layers"])
    assert not np.allclose(first, second)
    assert not np.allclose(first, specs.init(small()["layers"], jax.random.key(0))[0]["mlp"]["kernel"])  # another path
    np.testing.assert_array_equal(params["layers"][0]["norm"]["scale"], np.ones(4))
    assert specs.init(small()["pooler"], KEY, jnp.bfloat16)["kernel"].dtype == jnp.bfloat16
    large = specs.init({"w": Param((300, 300), (None, None), "w", normal(0.5))}, KEY)["w"]
    assert abs(float(large.std()) - 0.5) < 0.01
    assert abs(float(large.mean())) < 0.01


def test_some_entries_are_drawn_as_in_the_whole() -> None:
    entries = specs.table(small()).entries
    some = specs.init_entries(entries[4:8], KEY)
    assert list(some) == [entry.path for entry in entries[4:8]]
    for path, value in some.items():
        np.testing.assert_array_equal(value, specs.flatten(initial())[path])
    with pytest.raises(TypeError, match=r"key must be a jax.random.key, got int; write key=jax.random.key\(0\)"):
        specs.init(small(), 0)  # type: ignore[arg-type]


def test_sharded_initial_values_are_the_same() -> None:
    mesh = make_mesh(fsdp=2, tensor=4)
    spec = {"w": Param((8, 12), (None, None), "w", normal(0.1)), "b": Param((12,), (None,), "b", specs.ones)}
    parts = {"w": PartitionSpec("fsdp", "tensor"), "b": PartitionSpec("tensor")}
    places = {key: NamedSharding(mesh, part) for key, part in parts.items()}
    sharded, whole = specs.init(spec, KEY, shardings=places), specs.init(spec, KEY)
    for key, leaf in sharded.items():
        assert leaf.sharding == places[key]
        assert leaf.addressable_shards[0].data.size < leaf.size
        # The same random bits; but how XLA vectorises the arithmetic after them depends on the shape of a shard, and
        # since jax 0.11 the last bit may differ.
        np.testing.assert_allclose(leaf, whole[key], rtol=1e-6, atol=0)


def test_describe_prints_every_parameter() -> None:
    spec = small()
    text = specs.describe(spec, specs.abstract(spec, jnp.bfloat16)).splitlines()
    assert text[0].split() == ["parameter", "shape", "dtype", "axes", "checkpoint"]
    assert text[2].split("  ")[0] == "layers.0.mlp.kernel"
    (row,) = [line.split() for line in text if line.startswith("layers.1.mlp.kernel")]
    assert row[1:] == ["4", "x", "4", "bfloat16", "embed,", "mlp", "encoder.layer.1.dense.weight"]
    assert "scalar" in next(line for line in text if line.startswith("steps"))
    assert text[-1] == "97 parameters in 10 arrays"
    assert "dtype" not in specs.describe(spec).splitlines()[0]


# --- layers


@cache
def layers_of(depth: int) -> tuple[Any, ...]:
    spec = tuple(linear(str(i), 6, 6, std=0.7) for i in range(depth))
    return specs.init(spec, KEY)


def test_stack_and_unstack_are_inverse() -> None:
    layers = layers_of(3)
    stacked = stack(layers)
    assert stacked["kernel"].shape == (3, 6, 6)
    for a, b in zip(unstack(stacked), layers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_only_equal_layers_stack() -> None:
    layers = layers_of(2)
    smaller = {**layers[1], "bias": layers[1]["bias"][:5]}
    with pytest.raises(ValueError, match=r"layers 0 and 1 differ at 'bias': \(6,\) and \(5,\); only equal layers"):
        stack([layers[0], smaller])
    with pytest.raises(ValueError, match=r"layers 0 and 2 differ at 'scale': None and \(1,\)"):
        stack([*layers, {**layers[0], "scale": jnp.ones(1)}])
    with pytest.raises(ValueError, match="no layers"):
        stack([])


def block(p: Any, x: jax.Array, cache: Any, key: Any, data: Any) -> tuple[jax.Array, Any]:
    """Uses all that `fold` hands on, so that a mix-up of layers shows in the result."""
    new = None if cache is None else {"sum": cache["sum"] * 2 + x.sum()}
    seen = 0 if cache is None else cache["sum"]
    h = jnp.tanh(x @ p["kernel"] + p["bias"]) * (1 if data is None else data) + seen
    return x + dropout(h, 0.5, key), new


def without_data(p: Any, x: jax.Array, cache: Any, key: Any) -> tuple[jax.Array, Any]:
    return block(p, x, cache, key, None)


DEPTH = 3


@pytest.mark.parametrize(
    ("cached", "keyed", "varied"),
    [(True, False, True), (False, True, False)],
    ids=["caches and data", "dropout"],
)
def test_fold_runs_the_same_layers_in_every_form(cached: bool, keyed: bool, varied: bool) -> None:
    layers = layers_of(DEPTH)
    x = jax.random.normal(jax.random.key(3), (2, 6))
    caches = tuple({"sum": jnp.asarray(0.1 * i)} for i in range(DEPTH)) if cached else None
    data = tuple(jnp.asarray(1.0 + i) for i in range(DEPTH)) if varied else None
    key = jax.random.key(4) if keyed else None
    run = block if varied else without_data

    def together(trees: Any) -> Any:
        return None if trees is None else stack([{"": tree} for tree in trees])[""]

    def by_hand(layers: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        new = []
        for i, p in enumerate(layers):
            one = None if key is None else jax.random.fold_in(key, i)
            x, cache = block(p, x, None if caches is None else caches[i], one, None if data is None else data[i])
            new.append(cache)
        return x, tuple(new) if cached else None

    def forms() -> dict[str, Callable[[Any, jax.Array], Any]]:
        def unrolled(remat: bool) -> Any:
            return lambda p, x: fold(run, p, x, cache=caches, key=key, data=data, remat=remat)

        def scanned(remat: bool) -> Any:
            def call(p: Any, x: jax.Array) -> Any:
                out, new = fold(run, stack(p), x, cache=together(caches), key=key, data=together(data), remat=remat)
                return out, None if new is None else unstack(new)

            return call

        return {
            "unrolled": unrolled(False),
            "unrolled remat": unrolled(True),
            "scanned": scanned(False),
            "scanned remat": scanned(True),
        }

    def graded(run: Callable[..., Any]) -> Any:
        def loss(layers: Any, x: jax.Array) -> Any:
            out, cache = run(layers, x)
            return jnp.sin(out).sum(), (out, cache)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(layers, x)

    expected = graded(by_hand)
    for name, form in forms().items():
        close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6, err_msg=name)
        jax.tree.map(close, graded(form), expected)


@pytest.mark.parametrize("kinds", ["abab", "aabb", "aaaa"])
def test_scanned_layers_of_several_kinds_take_turns(kinds: str) -> None:
    layers, x, key = layers_of(4), jnp.ones((2, 6)), jax.random.key(5)
    caches = tuple({"sum": jnp.asarray(0.1 * i)} for i in range(4))

    def of_kind(p: Any, x: jax.Array, cache: Any, key: Any, kind: specs.Static) -> tuple[jax.Array, Any]:
        return block(p, x, cache, key, None) if kind.value == "a" else block(p, -x, cache, key, 3.0)

    def called(layers: Any, caches: Any, remat: bool) -> Any:
        with watch(("layers.*.out",)) as seen:
            out, new = fold(of_kind, layers, x, cache=caches, key=key, data=(*map(specs.Static, kinds),), remat=remat)
        return out, new, seen.find(("layers.*.out",))

    out, new, seen = called(layers, caches, False)
    assert list(seen) == [f"layers.{i}.out" for i in range(4)]
    for remat in (False, True):
        call = partial(called, stack(layers), stack(caches), remat)
        found, caches_found, seen_found = jax.jit(call)()
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5), (found, seen_found), (out, seen))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5), unstack(caches_found), new)
    scans = [eqn for eqn in jax.make_jaxpr(call)().jaxpr.eqns if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in scans] == [{"abab": 2, "aabb": 1, "aaaa": 4}[kinds]]


def primitives(jaxpr: Any) -> list[str]:
    return [eqn.primitive.name for eqn in jaxpr.eqns]


def test_fold_unrolls_tuples_scans_stacks_and_remats_on_demand() -> None:
    layers, x = layers_of(DEPTH), jnp.ones((2, 6))

    def seen(layers: Any, remat: bool) -> list[str]:
        return primitives(jax.make_jaxpr(lambda p: fold(without_data, p, x, remat=remat)[0])(layers).jaxpr)

    assert seen(layers, False).count("dot_general") == DEPTH
    assert seen(stack(layers), False).count("scan") == 1
    assert sum("remat" in name or "checkpoint" in name for name in seen(layers, True)) == DEPTH
    assert "dot_general" not in seen(layers, True)


def test_fold_wants_as_many_caches_as_layers() -> None:
    with pytest.raises(ValueError, match="3 layers need as many caches, got 2"):
        fold(without_data, layers_of(3), jnp.ones((2, 6)), cache=({"sum": 0}, {"sum": 0}))
    with pytest.raises(ValueError, match="3 layers need as many data, got 4"):
        fold(block, layers_of(3), jnp.ones((2, 6)), data=(1, 2, 3, 4))


def test_no_layers_are_the_identity() -> None:
    x = jnp.ones((2, 6))
    assert fold(without_data, (), x)[0] is x


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4, 6), (3,)])
def test_initial_values_are_the_same_drawn_in_a_row(shape: tuple[int, ...]) -> None:
    for made in (specs.normal(0.3), *(specs.scaled(2.0, fan, uniform=u) for fan in ("in", "average") for u in (0, 1))):
        if len(shape) > 1 or made is specs.normal(0.3):
            drawn = made(KEY, shape, jnp.float32)
            np.testing.assert_array_equal(made.in_a_row(KEY, shape, jnp.float32), drawn)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("fan", "theirs"), [("in", "fan_in"), ("out", "fan_out"), ("average", "fan_avg")])
@pytest.mark.parametrize(("uniform", "kind"), [(False, "normal"), (True, "uniform")])
def test_scaled_initial_values_are_jaxs(fan: str, theirs: Any, uniform: bool, kind: Any) -> None:
    shape = (3, 2, 40, 60)
    expected = jax.nn.initializers.variance_scaling(1.7, theirs, kind)(KEY, shape, jnp.float32)
    # Since jax 0.12 its factor is folded while compiling, to another last bit.
    np.testing.assert_allclose(specs.scaled(1.7, fan, uniform=uniform)(KEY, shape, jnp.float32), expected, rtol=1e-6)
    expected = jax.nn.initializers.normal(0.3)(KEY, shape, jnp.float32)
    np.testing.assert_allclose(specs.normal(0.3)(KEY, shape, jnp.float32), expected, rtol=1e-6)
