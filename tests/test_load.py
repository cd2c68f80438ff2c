"""From files to parameters: what arrives, what is refused, and what is read at all."""

import difflib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

import formax
from formax.conversion import load
from formax.conversion.checkpoint import Checkpoint, CheckpointError, open_checkpoint, write_checkpoint
from formax.conversion.load import LoadReport, load_params, stored_tensors
from formax.core import spec as specs
from formax.core.layout import CONV_1D, TRANSPOSE, Layout, Part, Reshape, Stacked
from formax.core.spec import At, Ignored, Param, Spec, Tied
from formax.sharding import make_mesh, placements

WORDS = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def leaves(model: Any) -> dict[str, np.ndarray]:
    return {specs.dotted(path): np.asarray(leaf) for path, leaf in specs.flatten(model.params).items()}


def opened(folder: Path, **options: Any) -> tuple[Any, LoadReport]:
    return formax.from_pretrained(folder, output_loading_info=True, **options)


def rewrite(folder: Path, change: Callable[[tiny.Arrays], None], architecture: str = "BertForMaskedLM") -> Path:
    """A checkpoint of the architecture whose tensors were changed."""
    arrays = tiny.tensors(architecture)
    change(arrays)
    return tiny.write(folder, tiny.config(architecture), arrays)


# What arrives.


def test_every_tensor_arrives(tmp_path: Path) -> None:
    arrays = tiny.tensors("BertForPreTraining")
    model, report = opened(tiny.checkpoint(tmp_path, "BertForPreTraining"))
    assert report == LoadReport()
    found = leaves(model)
    assert len(found) == len(arrays)
    pairs = {
        "embed.word.embedding": arrays[WORDS],
        "embed.norm.scale": arrays["bert.embeddings.LayerNorm.weight"],
        "layers.1.attn.q.kernel": arrays[QUERY].T,
        "layers.0.attn.v.bias": arrays["bert.encoder.layer.0.attention.self.value.bias"],
        "layers.0.mlp.down.kernel": arrays["bert.encoder.layer.0.output.dense.weight"].T,
        "pooler.kernel": arrays["bert.pooler.dense.weight"].T,
        "head.bias": arrays["cls.predictions.bias"],
        "pair.kernel": arrays["cls.seq_relationship.weight"].T,
    }
    for key, array in pairs.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@pytest.mark.parametrize("shards", [2, 5])
def test_several_files(tmp_path: Path, shards: int) -> None:
    arrays = tiny.tensors("BertForMaskedLM")
    whole = formax.from_pretrained(tiny.checkpoint(tmp_path / "whole", "BertForMaskedLM"))
    parts = tiny.write(tmp_path / "parts", tiny.config("BertForMaskedLM"), arrays, shards)
    assert not (parts / "model.safetensors").exists()
    assert tiny.bits(leaves(formax.from_pretrained(parts))) == tiny.bits(leaves(whole))


@pytest.mark.parametrize("align", [1, 3])
def test_elements_at_odd_addresses(tmp_path: Path, align: int) -> None:
    arrays = tiny.tensors("BertModel")
    folder = tiny.checkpoint(tmp_path, "BertModel")
    expected = leaves(formax.from_pretrained(folder))
    tiny.write_tensors(folder / "model.safetensors", arrays, align=4, offset=align)
    assert tiny.bits(leaves(formax.from_pretrained(folder))) == tiny.bits(expected)
    mesh = make_mesh(fsdp=4, tensor=2)
    assert tiny.bits(leaves(formax.from_pretrained(folder, mesh=mesh))) == tiny.bits(expected)


# Names.


def test_a_base_model_in_a_head(tmp_path: Path) -> None:
    base = formax.from_pretrained(tiny.checkpoint(tmp_path, "BertModel"))
    model, report = formax.AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert report == LoadReport(initialised=("head.kernel", "head.bias"), left_out=PLAIN_POOLER)
    found, expected = leaves(model), leaves(base)
    assert found.keys() - expected.keys() == {"head.kernel", "head.bias"}
    for key in found.keys() & expected.keys():
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


PLAIN_POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def test_a_head_in_a_base_model(tmp_path: Path) -> None:
    head = formax.from_pretrained(tiny.checkpoint(tmp_path, "BertForSequenceClassification"))
    model, report = formax.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report == LoadReport(left_out=("classifier.weight", "classifier.bias"))
    for key, leaf in leaves(model).items():
        np.testing.assert_array_equal(leaf, leaves(head)[key], err_msg=key)


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM"])
def test_names_of_2018(tmp_path: Path, architecture: str) -> None:
    arrays = tiny.tensors(architecture)
    new = formax.from_pretrained(tiny.checkpoint(tmp_path / "new", architecture))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in arrays.items()
    }
    model, report = opened(tiny.write(tmp_path / "old", tiny.config(architecture), old))
    assert report == LoadReport()
    assert sum(name.endswith((".gamma", ".beta")) for name in old) >= 10
    assert tiny.bits(leaves(model)) == tiny.bits(leaves(new))


def test_only_the_tied_names_are_in_the_file(tmp_path: Path) -> None:
    def move(arrays: tiny.Arrays) -> None:
        arrays["cls.predictions.decoder.weight"] = arrays.pop(WORDS)
        arrays["cls.predictions.decoder.bias"] = arrays.pop("cls.predictions.bias")

    new = formax.from_pretrained(tiny.checkpoint(tmp_path / "new", "BertForMaskedLM"))
    model, report = opened(rewrite(tmp_path / "old", move))
    assert report == LoadReport()
    assert tiny.bits(leaves(model)) == tiny.bits(leaves(new))


def test_tied_names_beside_their_targets(tmp_path: Path) -> None:
    def repeat(arrays: tiny.Arrays) -> None:
        arrays["cls.predictions.decoder.weight"] = arrays[WORDS] + 1
        arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"] + 1

    model, report = opened(rewrite(tmp_path, repeat))
    assert report == LoadReport()
    # as the reference, which ties the decoder to what it read for the embeddings
    np.testing.assert_array_equal(leaves(model)["embed.word.embedding"], tiny.tensors("BertForMaskedLM")[WORDS])
    np.testing.assert_array_equal(leaves(model)["head.bias"], tiny.tensors("BertForMaskedLM")["cls.predictions.bias"])


@pytest.mark.parametrize(
    ("stored", "opens"),
    [
        ("BertModel", "AutoModel"),
        ("BertModel", "AutoModelForMaskedLM"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertForMaskedLM", "AutoModel"),
    ],
)
def test_the_position_ids_of_old_files(tmp_path: Path, stored: str, opens: str) -> None:
    arrays = tiny.tensors(stored)
    arrays[f"{'' if stored == 'BertModel' else 'bert.'}embeddings.position_ids"] = np.arange(40)[None]
    tiny.write(tmp_path, tiny.config(stored), arrays)
    _, report = getattr(formax, opens).from_pretrained(tmp_path, output_loading_info=True)
    assert not any("position_ids" in name for name in report.left_out)


# Heads that are not in the file, and heads that are not asked for.


def test_a_new_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.checkpoint(tmp_path, "BertModel")
    with caplog.at_level(logging.INFO, logger="formax"):
        model, report = formax.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, key=jax.random.key(3), num_labels=5, output_loading_info=True
        )
    assert report == LoadReport(initialised=("head.kernel", "head.bias"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("BertForSequenceClassification", "head.kernel, head.bias", str(tmp_path), "initialised", "train it"):
        assert part in record.getMessage()

    # as in a model made from nothing with that key, which is what makes a run repeatable
    fresh = formax.AutoModelForSequenceClassification.from_config(model.config, key=jax.random.key(3))
    assert model.params["head"]["kernel"].shape == (32, 5)
    np.testing.assert_array_equal(model.params["head"]["kernel"], fresh.params["head"]["kernel"])
    other = formax.AutoModelForSequenceClassification.from_pretrained(tmp_path, key=jax.random.key(4), num_labels=5)
    assert (np.asarray(model.params["head"]["kernel"]) != np.asarray(other.params["head"]["kernel"])).all()
    assert np.isfinite(model(input_ids=[[1, 2, 3]]).logits).all()


def test_half_a_head(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda arrays: arrays.__delitem__("classifier.bias"), "BertForSequenceClassification")
    model, report = opened(tmp_path)
    assert report == LoadReport(initialised=("head.bias",))
    stored = tiny.tensors("BertForSequenceClassification")["classifier.weight"]
    np.testing.assert_array_equal(leaves(model)["head.kernel"], stored.T)


def test_no_pooler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.checkpoint(tmp_path, "BertForMaskedLM")
    _, report = formax.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report.initialised == ("pooler.kernel", "pooler.bias")
    assert {name.split(".")[0] for name in report.left_out} == {"cls"}
    assert "pooler.kernel, pooler.bias" in caplog.text


def test_other_heads_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.checkpoint(tmp_path, "BertForPreTraining")
    with caplog.at_level(logging.INFO, logger="formax"):
        model, report = formax.AutoModelForNextSentencePrediction.from_pretrained(tmp_path, output_loading_info=True)
    predictions = {name for name in tiny.shapes("BertForPreTraining") if name.startswith("cls.predictions")}
    assert set(report.left_out) == predictions
    assert (report.initialised, report.mismatched) == ((), ())
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "cls.predictions" in record.getMessage()
    assert model.architecture.name == "BertForNextSentencePrediction"


# What is refused, before anything is read.


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that reads or makes a tensor."""

    def read(*_: Any, **__: Any) -> Any:
        pytest.fail("a tensor was made of a checkpoint that does not fit")

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(specs, "init_entries", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("shards", [1, 3])
def test_another_shape(tmp_path: Path, shards: int) -> None:
    arrays = tiny.tensors("BertForMaskedLM")
    arrays[QUERY] = arrays[QUERY][:-1]
    folder = tiny.write(tmp_path / "shapes", tiny.config("BertForMaskedLM"), arrays, shards)
    with pytest.raises(CheckpointError) as caught:
        formax.from_pretrained(folder)
    file = "model.safetensors" if shards == 1 else "model-00002-of-00003.safetensors"
    assert str(caught.value) == (
        f"{folder / file}: {QUERY!r} has shape (31, 32), the configuration asks for (32, 32); "
        "ignore_mismatched_sizes=True initialises it instead"
    )


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("dtype", [np.int64, np.bool_])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}, {"strict": False}])
def test_another_kind_of_number(tmp_path: Path, dtype: Any, options: dict[str, Any]) -> None:
    # The path is part of the message, so its words must not decide anything.
    folder = tmp_path / "shape of things"
    rewrite(folder, lambda arrays: arrays.update({QUERY: np.ones((32, 32), dtype)}))
    with pytest.raises(CheckpointError) as caught:
        formax.from_pretrained(folder, **options)
    name = np.dtype(dtype).name
    assert str(caught.value) == (
        f"{folder / 'model.safetensors'}: {QUERY!r} has dtype {name}, a floating-point one is needed"
    )


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("strict", [True, False])
def test_a_misspelt_name(tmp_path: Path, strict: bool) -> None:
    wrong = QUERY.replace("query", "qeury")
    rewrite(tmp_path, lambda arrays: arrays.update({wrong: arrays.pop(QUERY)}))
    with pytest.raises(CheckpointError) as caught:
        formax.from_pretrained(tmp_path, strict=strict)
    lines = [
        f"{tmp_path / 'model.safetensors'} does not fit this architecture",
        f"  missing: {QUERY!r} (nearest: {wrong!r})",
        f"  unexplained: {wrong!r} (nearest: {QUERY!r})",
    ]
    assert str(caught.value).splitlines() == (lines if strict else lines[:2])


@pytest.mark.usefixtures("unread")
def test_missing_in_a_file_without_the_prefix(tmp_path: Path) -> None:
    """The message speaks the language of the file."""
    arrays = tiny.tensors("BertModel")
    del arrays[QUERY.removeprefix("bert.")]
    tiny.write(tmp_path, tiny.config("BertModel"), arrays)
    for opens in (formax.AutoModel, formax.AutoModelForMaskedLM):
        with pytest.raises(CheckpointError, match=r"missing: 'encoder\.layer\.1\.attention\.self\.query\.weight'"):
            opens.from_pretrained(tmp_path)


@pytest.mark.usefixtures("unread")
def test_many_names_are_counted(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "BertModel", num_hidden_layers=3)
    for layers, message in ((2, "and 11 more unexplained"), (4, "and 11 more missing")):
        with pytest.raises(CheckpointError) as caught:
            formax.from_pretrained(tmp_path, num_hidden_layers=layers)
        assert len(str(caught.value).splitlines()) < 10
        assert message in str(caught.value)


@pytest.mark.usefixtures("unread")
def test_a_file_of_something_else(tmp_path: Path) -> None:
    tiny.write(tmp_path, tiny.config("BertModel"), {"transformer.h.0.attn.c_attn.weight": np.zeros((2, 6), np.float32)})
    with pytest.raises(CheckpointError, match=r"missing: 'embeddings\.word_embeddings\.weight'\n"):
        formax.from_pretrained(tmp_path)
    tiny.write(tmp_path, tiny.config("BertModel"), {})
    with pytest.raises(CheckpointError, match="and 32 more missing"):
        formax.from_pretrained(tmp_path)


def test_unexplained_tensors(tmp_path: Path) -> None:
    extra = QUERY.replace("weight", "weight_scale")
    rewrite(tmp_path, lambda arrays: arrays.update({extra: np.ones(1, np.float32), "zzz": np.ones(1, np.int64)}))
    with pytest.raises(CheckpointError) as caught:
        formax.from_pretrained(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'model.safetensors'} does not fit this architecture",
        f"  unexplained: {extra!r} (nearest: {QUERY!r})",
        "  unexplained: 'zzz'",
        "  strict=False reads the checkpoint without them",
    ]
    model, report = opened(tmp_path, strict=False)
    assert report == LoadReport(left_out=(extra, "zzz"))
    np.testing.assert_array_equal(leaves(model)["layers.1.attn.q.kernel"], tiny.tensors("BertForMaskedLM")[QUERY].T)


@pytest.mark.usefixtures("unread")
def test_the_search_for_the_nearest_name_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []

    def nearest(name: str, pool: Sequence[str], **_: Any) -> list[str]:
        searched.append(len(pool))
        return []

    monkeypatch.setattr(difflib, "get_close_matches", nearest)
    rewrite(tmp_path, lambda arrays: arrays.update({"zzz": np.ones(1, np.float32)}))
    with pytest.raises(CheckpointError, match="and 4763 more missing"):
        formax.from_pretrained(tmp_path, num_hidden_layers=300)
    assert max(searched) == load.SEARCHED
    assert len(searched) <= 10


def test_mismatched_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.checkpoint(tmp_path, "BertForTokenClassification", num_labels=3)
    with pytest.raises(CheckpointError, match=r"'classifier.weight' has shape \(3, 32\), .* asks for \(7, 32\)"):
        formax.from_pretrained(tmp_path, num_labels=7)
    model, report = opened(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert report == LoadReport(mismatched=("head.kernel", "head.bias"))
    assert "head.kernel, head.bias has another shape" in caplog.text
    assert (model.params["head"]["kernel"].shape, model.config.num_labels) == ((32, 7), 7)
    assert model(input_ids=[[1, 2, 3]]).logits.shape == (1, 3, 7)
    kept = tiny.tensors("BertForTokenClassification", num_labels=3)[QUERY]
    np.testing.assert_array_equal(leaves(model)["layers.1.attn.q.kernel"], kept.T)


def test_mismatched_sizes_do_not_excuse_missing_ones(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda arrays: arrays.__delitem__(QUERY))
    with pytest.raises(CheckpointError, match="missing"):
        formax.from_pretrained(tmp_path, ignore_mismatched_sizes=True, strict=False)


# Dtypes.


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("asked", [None, "auto"])
def test_the_dtype_on_disk_is_kept(tmp_path: Path, dtype: Any, asked: Any) -> None:
    arrays = tiny.noise(tiny.tensors("BertModel"), dtype)
    found = leaves(formax.from_pretrained(tiny.write(tmp_path, tiny.config(), arrays), dtype=asked))
    for key, array in (("embed.word.embedding", WORDS), ("layers.1.attn.q.kernel", QUERY)):
        stored = arrays[array.removeprefix("bert.")]
        wanted = stored.T if key.endswith("kernel") else stored
        assert tiny.bits({key: found[key]}) == tiny.bits({key: wanted})
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(dtype)}


def test_dtypes_may_be_mixed(tmp_path: Path) -> None:
    def halve(arrays: tiny.Arrays) -> None:
        for name in arrays:
            if "LayerNorm" not in name:
                arrays[name] = arrays[name].astype(ml_dtypes.bfloat16)

    found = leaves(formax.from_pretrained(rewrite(tmp_path, halve)))
    kinds = {key: leaf.dtype.name for key, leaf in found.items()}
    assert {key for key, kind in kinds.items() if kind == "float32"} == {key for key in kinds if "norm" in key}
    assert set(kinds.values()) == {"float32", "bfloat16"}


@pytest.mark.parametrize("asked", ["bfloat16", jnp.float16, np.dtype("float32"), "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_casts(tmp_path: Path, asked: Any, name: str) -> None:
    tiny.checkpoint(tmp_path, "BertModel")
    model = formax.AutoModelForTokenClassification.from_pretrained(tmp_path, **{name: asked})
    found = leaves(model)
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(asked)}  # the new head too
    stored = tiny.tensors("BertModel")
    for key, array in (("embed.word.embedding", WORDS), ("layers.1.attn.q.kernel", QUERY)):
        wanted = stored[array.removeprefix("bert.")].astype(jnp.dtype(asked))
        assert found[key].tobytes() == (wanted.T if key.endswith("kernel") else wanted).tobytes()


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int32", "dtype='int32' is not floating-point; give one such as 'float32' or 'bfloat16'"),
        ("flaot32", "dtype='flaot32' is no dtype; give one such as 'float32' or 'bfloat16'"),
        ("float64", "dtype='float64' needs jax.config.update('jax_enable_x64', True)"),
    ],
)
@pytest.mark.usefixtures("unread")
def test_dtypes_that_parameters_cannot_have(tmp_path: Path, dtype: Any, message: str) -> None:
    tiny.checkpoint(tmp_path, "BertModel")
    with pytest.raises(ValueError, match="dtype=") as caught:
        formax.from_pretrained(tmp_path, dtype=dtype)
    assert str(caught.value) == message


def test_doubles_become_floats(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "BertModel", np.float64)
    stored = tiny.tensors("BertModel", np.float64)[QUERY.removeprefix("bert.")]
    for options in ({}, {"mesh": make_mesh(fsdp=8)}):
        kernel = leaves(formax.from_pretrained(tmp_path, **options))["layers.1.attn.q.kernel"]
        assert kernel.dtype == np.float32
        np.testing.assert_array_equal(kernel, stored.T)


def test_a_new_head_has_the_precision_to_learn(tmp_path: Path) -> None:
    arrays = tiny.tensors("BertModel", ml_dtypes.float8_e4m3fn)
    arrays |= {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items() if "LayerNorm" in name}
    tiny.write(tmp_path, tiny.config("BertModel"), arrays)
    head = formax.AutoModelForSequenceClassification.from_pretrained(tmp_path).params["head"]
    assert head["kernel"].dtype == jnp.bfloat16
    tiny.checkpoint(tmp_path, "BertModel", ml_dtypes.float8_e4m3fn)
    head = formax.AutoModelForSequenceClassification.from_pretrained(tmp_path).params["head"]
    assert head["kernel"].dtype == jnp.float32


# Memory of their own.


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4, "tensor": 2}, {"fsdp": 8}], ids=str)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_parameters_are_no_views_of_the_file(tmp_path: Path, mesh: dict[str, int], dtype: str | None) -> None:
    """Every tensor begins where a CPU device would gladly take the file's own memory."""
    arrays = tiny.tensors("BertModel")
    assert all(array.nbytes % 64 == 0 for array in arrays.values())
    tiny.write(tmp_path, tiny.config("BertModel"), arrays)
    file = tmp_path / "model.safetensors"
    tiny.write_tensors(file, arrays, align=64)
    model = formax.from_pretrained(tmp_path, dtype=dtype, **({"mesh": make_mesh(**mesh)} if mesh else {}))
    with file.open("r+b") as written:
        written.write(b"\x7f" * file.stat().st_size)
    for name, key in (
        ("embeddings.word_embeddings.weight", "embed.word.embedding"),
        ("pooler.dense.bias", "pooler.bias"),
    ):
        wanted = arrays[name] if dtype is None else arrays[name].astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(leaves(model)[key], wanted)
    assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in leaves(model).values())


def test_the_file_may_go_away(tmp_path: Path) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path, "BertModel"))
    before = tiny.bits(leaves(model))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors").unlink()
    assert tiny.bits(leaves(model)) == before


# Shards of devices.


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """{name in the file: sizes of all parts that were taken of it}."""
    taken: dict[str, list[int]] = {}
    original = Layout.read

    def read(self: Layout, get: Any, name: str, shape: Any, index: Any) -> np.ndarray:
        part = original(self, get, name, shape, index)
        assert not part.flags.owndata, f"{name} was copied before it was cut"
        taken.setdefault(name, []).append(part.size)
        return part

    monkeypatch.setattr(Layout, "read", read)
    return taken


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"tensor": 4, "fsdp": 2}, {"data": 8}], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_device_reads_its_own_slices(
    tmp_path: Path, reads: dict[str, list[int]], axes: dict[str, int], shards: int
) -> None:
    arrays = tiny.tensors("BertForMaskedLM")
    tiny.write(tmp_path, tiny.config("BertForMaskedLM"), arrays, shards)
    mesh = make_mesh(**axes)
    model = formax.from_pretrained(tmp_path, mesh=mesh)
    whole = set()
    for place, entry in zip(placements(model.spec, mesh), specs.table(model.spec).entries, strict=True):
        leaf = specs.flatten(model.params)[entry.path]
        sharding = NamedSharding(mesh, place.partition)
        assert leaf.sharding == sharding, entry.key
        part = int(np.prod(sharding.shard_shape(leaf.shape)))
        assert set(reads[entry.name]) == {part}, entry.key
        assert len(reads[entry.name]) <= 8
        if part == leaf.size:
            whole.add(entry.key)
    assert whole == ({e.key for e in specs.table(model.spec).entries} if "data" in axes else {"head.dense.bias"})
    assert tiny.bits(leaves(model)) == tiny.bits(leaves(formax.from_pretrained(tmp_path)))


def test_a_head_is_made_where_it_belongs(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "BertModel")
    mesh, key = make_mesh(fsdp=4, tensor=2), jax.random.key(5)
    model = formax.AutoModelForMaskedLM.from_pretrained(tmp_path, mesh=mesh, key=key)
    for place, (path, leaf) in zip(placements(model.spec, mesh), specs.flatten(model.params).items(), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, place.partition), leaf.ndim), specs.dotted(path)
    whole = formax.AutoModelForMaskedLM.from_pretrained(tmp_path, key=key)
    assert tiny.bits(leaves(model)) == tiny.bits(leaves(whole))
    ids = np.arange(24).reshape(2, 12)
    np.testing.assert_allclose(model(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_slices_are_cast(tmp_path: Path, reads: dict[str, list[int]], dtype: str) -> None:
    tiny.checkpoint(tmp_path, "BertModel")
    model = formax.from_pretrained(tmp_path, mesh=make_mesh(fsdp=4, tensor=2), dtype=dtype)
    assert set(reads["encoder.layer.1.attention.self.query.weight"]) == {32 * 32 // 8}
    assert tiny.bits(leaves(model)) == tiny.bits(leaves(formax.from_pretrained(tmp_path, dtype=dtype)))


# Layouts that BERT does not have.


def toy() -> Spec:
    sizes = (8, 4, 4)
    fused = {
        key: Param((16, size), ("embed", "heads"), "qkv.weight", layout=Part(i, sizes, then=TRANSPOSE))
        for i, (key, size) in enumerate(zip("qkv", sizes, strict=True))
    }
    return {
        "scale": Param((), (), "logit_scale"),
        "token": Param((16,), ("embed",), "cls_token", layout=Reshape((1, 1, 16))),
        "conv": Param((3, 8, 16), (None, "conv_in", "conv_out"), "conv.weight", layout=CONV_1D),
        "experts": Param((4, 16, 8), ("experts", "embed", "mlp"), "experts.{}.up.weight", layout=Stacked(4, TRANSPOSE)),
        "attn": At("attention", fused),
        "again": Tied("head.weight", "token"),
        "old": Ignored("buffer"),
    }


TOY = {
    "logit_scale": (),
    "cls_token": (1, 1, 16),
    "conv.weight": (16, 8, 3),
    "experts.0.up.weight": (8, 16),
    "experts.1.up.weight": (8, 16),
    "experts.2.up.weight": (8, 16),
    "experts.3.up.weight": (8, 16),
    "attention.qkv.weight": (16, 16),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_every_layout_goes_in_and_out(tmp_path: Path, mesh: dict[str, int], dtype: Any) -> None:
    arrays = tiny.noise({name: np.zeros(shape, np.float32) for name, shape in TOY.items()}, dtype)
    tiny.write_tensors(tmp_path / "model.safetensors", arrays, align=64)
    spec = toy()
    places = None
    if mesh:
        devices = make_mesh(**mesh)
        entries = specs.table(spec).entries
        found = [NamedSharding(devices, place.partition) for place in placements(spec, devices)]
        places = specs.unflatten({entry.path: one for entry, one in zip(entries, found, strict=True)})
    with open_checkpoint(tmp_path) as checkpoint:
        params, report = load_params(checkpoint, spec, shardings=places)
    assert report == LoadReport()
    read = {name: np.asarray(leaf) for name, leaf in params.items() if name not in ("attn", "experts")}
    wanted = {
        "scale": arrays["logit_scale"],
        "token": arrays["cls_token"].reshape(16),
        "conv": arrays["conv.weight"].transpose(2, 1, 0),
    }
    assert tiny.bits(read) == tiny.bits(wanted)
    for i in range(4):
        assert np.asarray(params["experts"])[i].tobytes() == arrays[f"experts.{i}.up.weight"].T.tobytes()
    cuts = dict(zip("qkv", np.split(arrays["attention.qkv.weight"], (8, 12)), strict=True))
    for key, cut in cuts.items():
        assert np.asarray(params["attn"][key]).tobytes() == cut.T.tobytes()

    stored, fetch = stored_tensors(spec, params)
    write_checkpoint(tmp_path / "saved", stored, fetch)
    assert tiny.bits(tiny.read_tensors(tmp_path / "saved" / "model.safetensors")) == tiny.bits(arrays)


def test_a_fused_tensor_that_is_missing_or_too_short(tmp_path: Path) -> None:
    arrays = {name: np.zeros(shape, np.float32) for name, shape in TOY.items()}
    del arrays["experts.2.up.weight"]
    tiny.write_tensors(tmp_path / "model.safetensors", arrays)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"missing: 'experts\.2\.up"):
        load_params(checkpoint, toy())
    arrays["experts.2.up.weight"] = np.zeros((8, 15), np.float32)
    tiny.write_tensors(tmp_path / "model.safetensors", arrays)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"'experts\.2\.up.*\(8, 15\)"):
        load_params(checkpoint, toy())
