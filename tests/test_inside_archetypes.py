"""Looking into every kind of model and reaching inside, on the stored checkpoints of the battery.

`test_inside.py` checks the mechanism on one family against its formulas. Here every archetype shows the places that
`docs/looking-inside.md` promises, and what is read there or put there does what the model's own parameters, inputs or
smaller models say it must.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.goldens import Golden, goldens

import formax
from formax.core import registry
from formax.core import spec as specs
from formax.layers import heads, norm
from formax.layers.attention.api import merge_heads
from formax.layers.linear import linear
from formax.layers.resize import grid_of, pair
from formax.model import Model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "looking-inside.md"
# One golden for every archetype, and where to silence something in its first layer: {place: parameters that, zero,
# silence the same}. A residual network has no branch of that name: a map of its first stage is silenced.
ARCHETYPES: dict[str, tuple[str, str]] = {
    "bert/masked_lm": ("layers.0.mlp.out", "mlp.down"),
    "gpt2/lm_head": ("layers.0.mlp.out", "mlp.down"),
    "llama/causal_lm": ("layers.0.mlp.out", "mlp.down"),
    "mixtral/causal_lm": ("layers.0.mlp.out", "mlp.experts.down"),
    "mamba/causal_lm": ("layers.0.mixer.out", "mixer.o"),
    "t5/conditional_generation": ("decoder.layers.0.cross.out", "cross.o"),
    "bart/conditional_generation": ("decoder.layers.0.mlp.out", "mlp.down"),
    "whisper/conditional_generation": ("encoder.layers.0.mlp.out", "mlp.down"),
    "wav2vec2/ctc": ("layers.0.attn.out", "attn.o"),
    "vit/image_classification": ("layers.0.mlp.out", "mlp.down"),
    "clip/model": ("vision.layers.0.mlp.out", "mlp.down"),
    "detr/object_detection": ("decoder.layers.0.cross.out", "cross.o"),
    "resnet/image_classification": ("stages.0.out", ""),
}
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def of(*names: str) -> pytest.MarkDecorator:
    """Runs a test on these goldens (on those of the chosen families, where FORMAX_FAMILIES chooses)."""
    found = {str(golden): golden for golden in goldens()}
    assert os.environ.get("FORMAX_FAMILIES") or not (unknown := set(names) - found.keys()), unknown
    return pytest.mark.parametrize("golden", [found[name] for name in names if name in found], ids=str)


@lru_cache(maxsize=32)
def opened(golden: Golden) -> tuple[Model, dict[str, Any]]:
    """The model and the inputs of its call."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = golden.open(Path(folder))
    switches = {name: value for name, value in golden.switches.items() if not name.startswith("output_")}
    return model, {**golden.inputs, **switches}


def main(out: Any) -> jax.Array:
    """What a model is for: its scores, or the vectors that stand for them."""
    name = next(name for name in ("logits", "logits_per_image", "last_hidden_state") if hasattr(out, name))
    return getattr(out, name)


def at(tree: Any, path: str) -> Any:
    """The branch of a parameter tree at a dotted path."""
    for part in path.split("."):
        tree = tree[int(part) if part.isdigit() else part]
    return tree


def changed(tree: Any, path: str, change: Callable[[jax.Array], jax.Array]) -> Any:
    """The tree with every leaf below a dotted path changed."""
    leaves = specs.flatten(tree)
    chosen = [key for key in leaves if f"{specs.dotted(key)}.".startswith(f"{path}.")]
    assert chosen, path
    return specs.unflatten(leaves | {key: change(leaves[key]) for key in chosen})


def kinds(places: Mapping[str, Any]) -> set[str]:
    """Places with `N`, `M` for numbers, as the documentation writes them."""
    return {re.sub(r"\.\d+", ".N", re.sub(r"(\.\d+)\.\d+", r"\1.M", place)) for place in places}


def zero(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


def same(x: jax.Array) -> jax.Array:
    return x


# ---- what holds everywhere ------------------------------------------------------------------------------------------


@of(*ARCHETYPES)
def test_putting_back_what_was_there_changes_nothing(golden: Golden) -> None:
    model, inputs = opened(golden)
    plain, again = model(**inputs), formax.intervene(model, {"**": same})(**inputs)
    jax.tree.map(np.testing.assert_array_equal, plain, again)


@of(*ARCHETYPES)
def test_silence_is_what_zero_parameters_do(golden: Golden) -> None:
    model, inputs = opened(golden)
    place, parameters = ARCHETYPES[str(golden)]
    silenced = main(formax.intervene(model, {place: zero})(**inputs))
    assert np.isfinite(silenced).all()
    assert np.abs(silenced - main(model(**inputs))).max() > 1e-3
    if parameters:
        layer = place.rpartition(".")[0].rpartition(".")[0]
        params = changed(model.params, f"{layer}.{parameters}", zero)
        close(silenced, main(model.replace(params=params)(**inputs)))


@of(*ARCHETYPES)
def test_gradients_reach_what_is_put_in(golden: Golden) -> None:
    model, inputs = opened(golden)
    place = ARCHETYPES[str(golden)][0]
    weights = jax.random.normal(jax.random.key(0), main(jax.eval_shape(lambda: model(**inputs))).shape)

    @jax.jit
    def steered(vector: jax.Array) -> jax.Array:
        return jnp.vdot(weights, main(formax.intervene(model, {place: lambda x: x + vector})(**inputs)))

    nowhere = jnp.zeros(formax.places(model, **inputs)[place].shape[1:])
    uphill = jax.jit(jax.grad(steered))(nowhere)
    size, step = jnp.linalg.norm(uphill), 1e-2
    ahead, back = (steered(sign * step / size * uphill) for sign in (1, -1))
    np.testing.assert_allclose((ahead - back) / (2 * step), size, rtol=0.02)


@of(*ARCHETYPES)
def test_attention_adds_values_by_its_weights(golden: Golden) -> None:
    model, inputs = opened(golden)
    attentions = [place.removesuffix(".weights") for place in formax.places(model, **inputs) if "weights" in place]
    attentions = attentions[:1] + attentions[-1:]
    if golden.family_name in ("mamba", "resnet"):
        assert attentions == []
        return
    _, seen = formax.capture(model, *(f"{name}.*" for name in attentions))(**inputs)
    for name in attentions:
        weights, v, out = (np.asarray(seen[f"{name}.{part}"]) for part in ("weights", "v", "out"))
        v = np.repeat(v, weights.shape[1] // v.shape[2], axis=2)  # heads that share keys stand side by side
        close(out, linear(at(model.params, name)["o"], merge_heads(jnp.einsum("bhts,bshd->bthd", weights, v))))


@of("gpt2/lm_head", "llama/causal_lm", "mixtral/causal_lm", "mamba/causal_lm", "vit/image_classification")
def test_scanned_layers_have_the_same_places(golden: Golden) -> None:
    model, inputs = opened(golden)
    stacked = model.replace(params={**model.params, "layers": specs.stack(model.params["layers"])})
    patterns = ("layers.*.out", "layers.*.*.out")
    out, seen = formax.capture(model, *patterns)(**inputs)
    again, found = formax.capture(stacked, *patterns)(**inputs)
    assert seen.keys() == found.keys()
    close(main(again), main(out))
    for name in seen:
        close(found[name], seen[name], err_msg=name)


def test_places_come_in_the_order_of_the_pass() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 8}
    config = formax.AutoConfig.for_model("bert", vocab_size=20, **sizes)
    model = formax.AutoModel.from_config(config, key=jax.random.key(0))
    ids = np.arange(6).reshape(1, 6)
    states = [f"layers.{i}.out" for i in range(12)]
    stacked = model.replace(params={**model.params, "layers": specs.stack(model.params["layers"])})
    _, seen = formax.capture(stacked, "layers.*.out", "embed.out", "layers.*.attn.out")(ids)
    assert list(seen) == [*states, "embed.out", *(f"layers.{i}.attn.out" for i in range(12))]
    passed = list(formax.places(model, input_ids=ids))
    assert [name for name in passed if name in states] == states
    assert passed[0] == "embed.out"
    assert passed[-1] == "pooler"


# ---- what the documentation promises --------------------------------------------------------------------------------


def promised() -> list[tuple[str, str, str]]:
    """(family, place, table row) of the page's tables; the first table speaks of stacks of layers."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        families = [name for name in re.findall(r"`([\w-]+)`", cells[0]) if name in registry.MODULES]
        if line.startswith("| ") and len(cells) > 2 and families:
            rows += [(family, place, line) for family in families for place in re.findall(r"`([^`]+)`", cells[1])]
    return rows


# Goldens that pass places which the architectures' first ones do not.
FURTHER = ("bert/cross", "gpt2/cross", "wav2vec2/adapter", "wav2vec2/ctc_language_adapter", "wav2vec2/stable")


@lru_cache(maxsize=32)
def places_of(family: str) -> frozenset[str]:
    """Kinds of places that the goldens of a family pass: one golden for each architecture, and some more."""
    own = [golden for golden in goldens() if golden.family_name == family]
    chosen = {golden.meta["architecture"]: golden for golden in own}
    found: set[str] = set()
    for golden in (*chosen.values(), *(one for one in own if str(one) in (*FURTHER, *ARCHETYPES))):
        model, inputs = opened(golden)
        found |= kinds(formax.places(model, **inputs))
    return frozenset(found)


HERE = {golden.family_name for golden in goldens()}


def test_the_page_speaks_of_every_archetype() -> None:
    assert {family for family, _, _ in promised()} == {name.partition("/")[0] for name in ARCHETYPES}


@pytest.mark.parametrize("family", sorted({family for family, _, _ in promised()} & HERE))
def test_every_place_of_the_page_exists(family: str) -> None:
    there = places_of(family)
    missing = {place for name, place, _ in promised() if name == family and place not in there}
    assert not missing, f"docs/looking-inside.md promises {missing} for {family}; there are {sorted(there)}"


@pytest.mark.parametrize("family", sorted({family for family, _, _ in promised()} & HERE))
def test_every_place_there_is_stands_on_the_page(family: str) -> None:
    general = set(re.findall(r"^\| `([^`]+)`, `\.k`", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert general == {"layers.N.attn.q"}
    parts = r"(embed\.out|layers\.N(\.(attn|cross)\.(q|k|v|scores|weights|out)|\.mlp\.(hidden|out)|\.out))"
    special = {place for name, place, _ in promised() if name == family}
    left = {place for place in places_of(family) - special if not re.fullmatch(rf"(\w+\.)?{parts}", place)}
    assert not left, f"docs/looking-inside.md does not speak of {left} of {family}"


# ---- decoders -------------------------------------------------------------------------------------------------------


@of("llama/causal_lm", "llama/tied")
def test_the_lens_of_a_decoder_is_the_answer_of_a_shorter_one(golden: Golden) -> None:
    model, inputs = opened(golden)
    out, seen = formax.capture(model, "layers.*.out", "last")(**inputs)

    def lens(x: jax.Array) -> jax.Array:
        return heads.lm_logits(model.params, norm.rms(model.params["norm"], x, model.config.rms_norm_eps))

    depth = model.config.num_hidden_layers
    close(lens(seen[f"layers.{depth - 1}.out"]), out.logits)
    close(heads.lm_logits(model.params, seen["last"]), out.logits)
    for i in range(depth):
        cut = model.replace(
            params={**model.params, "layers": model.params["layers"][: i + 1]},
            config=model.config.replace(num_hidden_layers=i + 1),
        )
        close(lens(seen[f"layers.{i}.out"]), cut(**inputs).logits)
    assert np.abs(lens(seen["layers.0.out"]) - out.logits).max() > 0.1


@of("llama/causal_lm", "gpt2/lm_head", "mixtral/causal_lm")
def test_decoders_look_back_and_never_at_padding(golden: Golden) -> None:
    model, inputs = opened(golden)
    _, seen = formax.capture(model, "layers.*.attn.weights")(**inputs)
    mask = np.asarray(inputs["attention_mask"])
    assert (mask == 0).any()
    for weights in seen.values():
        assert np.all(np.triu(weights, 1) == 0)
        assert np.all(np.moveaxis(np.asarray(weights), -1, 1)[mask == 0] == 0)
        np.testing.assert_allclose(weights.sum(-1)[:, :, -1], 1, rtol=1e-5)


@of("llama/causal_lm", "gpt2/lm_head")
def test_a_step_with_a_cache_shows_the_last_row(golden: Golden) -> None:
    model, inputs = opened(golden)
    ids = np.asarray(inputs["input_ids"])
    _, whole = formax.capture(model, "layers.1.attn.weights", "layers.*.out")(ids)
    cache = model(ids[:, :-1], cache=model.init_cache(*ids.shape)).cache
    _, step = formax.capture(model, "layers.1.attn.weights", "layers.*.out")(ids[:, -1:], cache=cache)
    for name, value in step.items():
        close(value[..., -1, :], whole[name][..., -1, :], err_msg=name)


@of("gpt2/lm_head", "mamba/causal_lm")
def test_activation_patching(golden: Golden) -> None:
    model, inputs = opened(golden)
    ids, other = np.asarray(inputs["input_ids"]), np.asarray(inputs["input_ids"])[::-1] + 1
    other = other % model.config.vocab_size
    last = f"layers.{model.config.num_hidden_layers - 1}.out"
    theirs, seen = formax.capture(model, "layers.0.out", last)(other)
    mine = model(ids).logits

    def instead(value: jax.Array, x: jax.Array, at: int | None = None) -> jax.Array:
        return value if at is None else x.at[:, at].set(value[:, at])

    # the whole state: the answer is the other text's
    for place in ("layers.0.out", last):
        moved = formax.intervene(model, {place: partial(instead, seen[place])})(ids)
        close(moved.logits, theirs.logits)
    # one position: nothing before it changes, and after the last layer nothing beside it
    t = ids.shape[1] // 2
    for place, untouched in (("layers.0.out", slice(0, t)), (last, np.arange(ids.shape[1]) != t)):
        put = formax.intervene(model, {place: partial(instead, seen[place], at=t)})(ids).logits
        close(put[:, untouched], mine[:, untouched])
        assert np.abs(put[:, t] - mine[:, t]).max() > 0.1
    close(put[:, t], theirs.logits[:, t])


@of("gpt2/lm_head", "llama/causal_lm", "vit/image_classification", "bert/masked_lm")
def test_silencing_a_head_is_a_head_mask(golden: Golden) -> None:
    model, inputs = opened(golden)
    factors = np.ones((model.config.num_hidden_layers, model.config.num_attention_heads), np.float32)
    factors[1, 2] = 0
    masked = model(**inputs, head_mask=factors)
    silenced = formax.intervene(model, {"layers.1.attn.weights": lambda x: x.at[:, 2].set(0)})(**inputs)
    np.testing.assert_array_equal(main(silenced), main(masked))
    size = at(model.params, "layers.1.attn.o.kernel").shape[0] // factors.shape[1]
    rows = slice(2 * size, 3 * size)
    params = changed(model.params, "layers.1.attn.o.kernel", lambda x: x.at[rows].set(0))
    close(main(masked), main(model.replace(params=params)(**inputs)))


# ---- encoder-decoders -----------------------------------------------------------------------------------------------


@of("t5/conditional_generation", "bart/conditional_generation", "whisper/conditional_generation", "gpt2/cross")
def test_cross_attention_looks_at_the_text_and_not_at_its_padding(golden: Golden) -> None:
    model, inputs = opened(golden)
    _, seen = formax.capture(model, "**.cross.weights")(**inputs)
    name = "encoder_attention_mask" if golden.family_name == "gpt2" else "attention_mask"
    for weights in seen.values():
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        if golden.family_name != "whisper":  # its encoder hears silence like sound
            mask = np.asarray(inputs[name])
            assert (mask == 0).any()
            assert np.all(np.moveaxis(np.asarray(weights), -1, 1)[mask == 0] == 0)


@of("t5/conditional_generation", "bart/conditional_generation", "whisper/conditional_generation")
def test_without_cross_attention_the_decoder_hears_nothing(golden: Golden) -> None:
    model, inputs = opened(golden)
    name = "input_features" if golden.family_name == "whisper" else "input_ids"
    inputs.setdefault("decoder_input_ids", np.arange(18).reshape(2, 9))
    other = {**inputs, name: inputs[name][::-1]}
    deaf = formax.intervene(model, {"decoder.layers.*.cross.out": zero})
    close(deaf(**inputs).logits, deaf(**other).logits)
    assert np.abs(model(**inputs).logits - model(**other).logits).max() > 0.1


@of("bart/conditional_generation")
def test_three_kinds_of_attention(golden: Golden) -> None:
    model, inputs = opened(golden)
    _, seen = formax.capture(model, "encoder.layers.*.attn.weights", "decoder.layers.*.*.weights")(**inputs)
    both_ways, back, across = (
        np.asarray(seen[f"{part}.weights"]) for part in ("encoder.layers.0.attn", "decoder.layers.0.attn",
                                                         "decoder.layers.0.cross")
    )  # fmt: skip
    assert np.triu(both_ways, 1).any()
    assert np.tril(both_ways, -1).any()
    assert not np.triu(back, 1).any()
    assert across.shape[2:] == (back.shape[2], both_ways.shape[3])


# ---- images ---------------------------------------------------------------------------------------------------------


@of("vit/image_classification", "clip/model")
def test_a_patch_nobody_looks_at_does_not_count(golden: Golden) -> None:
    model, inputs = opened(golden)
    prefix, c = ("vision.", model.config.vision_config) if golden.family_name == "clip" else ("", model.config)
    pixels = np.asarray(inputs["pixel_values"])
    height, width = pair(c.patch_size)
    rows, columns = grid_of(pixels.shape[2:], c.patch_size)
    row, column = 1, 2
    patch = 1 + row * columns + column  # the class token comes first
    out, seen = formax.capture(model, f"{prefix}layers.*.attn.weights")(**inputs)
    for weights in seen.values():
        assert weights.shape[2:] == (1 + rows * columns, 1 + rows * columns)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)

    painted = pixels.copy()
    painted[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] += 1
    other = {**inputs, "pixel_values": painted}
    hide = formax.intervene(model, {f"{prefix}layers.*.attn.scores": lambda x: x.at[..., patch].set(-1e9)})
    close(main(hide(**other)), main(hide(**inputs)))
    assert np.abs(main(model(**other)) - main(out)).max() > 1e-2


@of("clip/model")
def test_towers_do_not_see_each_other(golden: Golden) -> None:
    model, inputs = opened(golden)
    out, seen = formax.capture(model, "text.**", "vision.**")(**inputs)
    for tower, names in (("text", ("input_ids", "attention_mask")), ("vision", ("pixel_values",))):
        family = registry.family(f"clip_{tower}_model")
        alone = Model(model.params[tower], getattr(model.config, f"{tower}_config"), family.architectures[0], family)
        _, found = formax.capture(alone, "**")(**{name: inputs[name] for name in names})
        assert {f"{tower}.{name}" for name in found} == {name for name in seen if name.startswith(tower)}
        for name, value in found.items():
            close(value, seen[f"{tower}.{name}"], err_msg=name)
    blind = formax.intervene(model, {"vision.layers.0.out": zero})(**inputs)
    close(blind.text_embeds, out.text_embeds)
    assert np.abs(blind.image_embeds - out.image_embeds).max() > 0.01


@of("resnet/image_classification")
def test_a_channel_of_the_last_map_counts_by_its_mean(golden: Golden) -> None:
    model, inputs = opened(golden)
    out, seen = formax.capture(model, "stem.out", "stages.*.out")(**inputs)
    order = ["stem.out", *(f"stages.{i}.out" for i in range(len(model.config.depths)))]
    sizes = [seen[name].shape[2] for name in order]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    last, head = np.asarray(seen[order[-1]]), model.params["head"]
    close(linear(head, last.mean((2, 3))), out.logits)
    channel = int(np.argmax(last.mean((0, 2, 3))))
    without = formax.intervene(model, {order[-1]: lambda x: x.at[:, channel].set(0)})(**inputs)
    share = last[:, channel].mean((1, 2))[:, None] * np.asarray(head["kernel"])[channel]
    close(without.logits, out.logits - share)


@of("detr/object_detection")
def test_objects_look_at_the_picture_and_not_at_its_padding(golden: Golden) -> None:
    model, inputs = opened(golden)
    out, seen = formax.capture(model, "backbone.stages.*.out", "decoder.layers.*.cross.weights")(**inputs)
    h, w = seen[f"backbone.stages.{len(model.config.resnet.depths) - 1}.out"].shape[2:]
    mask = np.asarray(inputs["pixel_mask"])  # a place of the map is about the pixel that it begins at
    rows, columns = (np.arange(new) * size // new for new, size in zip((h, w), mask.shape[1:], strict=True))
    picture = mask[:, rows][:, :, columns].reshape(len(mask), h * w) != 0
    assert not picture.all()
    depth = model.config.decoder_layers
    for i in range(depth):
        weights = np.asarray(seen[f"decoder.layers.{i}.cross.weights"])
        assert weights.shape[2:] == (model.config.num_queries, h * w)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        assert np.all(np.moveaxis(weights, -1, 1)[~picture] == 0)
    # after the last look nothing passes between objects
    turn = {f"decoder.layers.{depth - 1}.cross.out": lambda x: x.at[:, 3].multiply(-1)}
    moved = np.abs(formax.intervene(model, turn)(**inputs).pred_boxes - out.pred_boxes).max((0, 2))
    assert moved[3] > 1e-3
    assert np.delete(moved, 3).max() < 1e-5


@of("detr/segmentation")
def test_masks_come_from_where_objects_look(golden: Golden) -> None:
    model, inputs = opened(golden)
    out, seen = formax.capture(model, "attn.weights")(**inputs)
    where = seen["attn.weights"]
    np.testing.assert_allclose(where.sum((2, 3, 4)), 1, rtol=1e-5)
    turned = formax.intervene(model, {"attn.weights": lambda x: x.at[:, 1].set(x[:, 1, ::-1, ::-1])})(**inputs)
    moved = np.abs(turned.pred_masks - out.pred_masks).max((0, 2, 3))
    assert moved[1] > 1e-3
    assert np.delete(moved, 1).max() < 1e-4


# ---- sound ----------------------------------------------------------------------------------------------------------


@of("wav2vec2/ctc")
def test_every_frame_is_read_by_itself_at_the_end(golden: Golden) -> None:
    model, inputs = opened(golden)
    out, seen = formax.capture(model, "embed.features", "layers.*.out", "layers.*.attn.weights")(**inputs)
    depth, frames = model.config.num_hidden_layers, out.logits.shape[1]
    assert seen["embed.features"].shape[1] == frames
    close(linear(model.params["head"], seen[f"layers.{depth - 1}.out"]), out.logits)
    assert np.abs(linear(model.params["head"], seen["layers.0.out"]) - out.logits).max() > 0.1
    heard = np.asarray(seen["layers.0.attn.weights"])[1, 0, 0] > 0
    assert heard.any()
    assert not heard.all()  # the second row ends in padding
    for i in range(depth):
        assert np.all(np.asarray(seen[f"layers.{i}.attn.weights"])[1][..., ~heard] == 0)
    # a frame changed after the last layer is that frame's business alone
    put = formax.intervene(model, {f"layers.{depth - 1}.out": lambda x: x.at[:, 5].set(0)})(**inputs).logits
    moved = np.abs(put - out.logits).max((0, 2))
    assert moved[5] > 0.1
    assert np.delete(moved, 5).max() < 1e-5


# ---- experts and states ---------------------------------------------------------------------------------------------


@of("mixtral/causal_lm")
def test_experts_are_the_routers_choice(golden: Golden) -> None:
    model, inputs = opened(golden)
    k, count = model.config.num_experts_per_tok, model.config.num_local_experts
    out, seen = formax.capture(model, "layers.*.mlp.*")(**inputs)
    for i in range(model.config.num_hidden_layers):
        router, chosen, shares = (
            np.asarray(seen[f"layers.{i}.mlp.{part}"]) for part in ("router", "experts", "shares")
        )
        np.testing.assert_array_equal(chosen, np.argsort(-router, axis=-1)[..., :k])
        np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
        best = np.take_along_axis(router, chosen, -1)
        close(shares, np.exp(best) / np.exp(best).sum(-1, keepdims=True))
    assert len(np.unique(seen["layers.0.mlp.experts"])) == count

    # an expert that nobody chooses might as well not be there
    shut = {"layers.0.mlp.router": lambda x: x.at[..., 2].set(-1e9)}
    closed, found = formax.capture(formax.intervene(model, shut), "layers.0.mlp.experts")(**inputs)
    assert not np.any(found["layers.0.mlp.experts"] == 2)
    assert np.abs(closed.logits - out.logits).max() > 1e-2
    broken = changed(model.params, "layers.0.mlp.experts", lambda x: x.at[2].set(jnp.nan))
    close(formax.intervene(model.replace(params=broken), shut)(**inputs).logits, closed.logits)
    # choosing by hand
    first = formax.intervene(model, {"layers.*.mlp.experts": lambda x: jnp.broadcast_to(jnp.arange(k), x.shape)})
    _, found = formax.capture(first, "layers.*.mlp.experts")(**inputs)
    assert all(np.all(value == np.arange(k)) for value in found.values())


@of("mamba/causal_lm")
def test_the_state_forgets_and_writes_by_its_step(golden: Golden) -> None:
    model, inputs = opened(golden)
    ids = np.asarray(inputs["input_ids"])[:, :12]
    out, seen = formax.capture(model, "layers.*.mixer.*")(ids, cache=model.init_cache(*ids.shape))
    assert all(np.all(seen[name] > 0) for name in seen if name.endswith("step"))
    for i, cache in enumerate(out.cache):
        np.testing.assert_array_equal(seen[f"layers.{i}.mixer.state"], cache.state)

    # a step of zero leaves the state as it was; the layers above have not been told
    before = model(ids[:, :-1], cache=model.init_cache(*ids.shape)).cache
    still = formax.intervene(model, {"layers.0.mixer.step": lambda x: x.at[:, -1].set(0)})
    after = still(ids, cache=model.init_cache(*ids.shape)).cache
    close(after[0].state, before[0].state)
    assert np.abs(out.cache[0].state - before[0].state).max() > 1e-2
    assert np.abs(after[1].state - before[1].state).max() > 1e-2
    # a step without end forgets all that was: only the window of the convolution still knows the first word
    other = ids.copy()
    other[:, 0] = (ids[:, 0] + 1) % model.config.vocab_size
    assert model.config.conv_kernel < 9
    forgetful = formax.intervene(model, {"layers.0.mixer.step": lambda x: x.at[:, 9].set(1e4)})
    late = []
    for one in (model, forgetful):
        read = formax.capture(one, "layers.0.mixer.ssm")
        late.append([read(text)[1]["layers.0.mixer.ssm"][:, 10:] for text in (ids, other)])
    assert np.abs(late[0][0] - late[0][1]).max() > 1e-3
    np.testing.assert_allclose(late[1][0], late[1][1], rtol=1e-5)
