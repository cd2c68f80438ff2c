"""From a model to files: the reference's layout, every bit, and nothing lost when a save goes wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

import formax
from formax.conversion.checkpoint import CheckpointError
from formax.sharding import make_mesh

ARCHITECTURES = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertLMHeadModel",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
IDS = np.arange(24, dtype=np.int32).reshape(2, 12)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved(folder: Path) -> tiny.Arrays:
    return tiny.read_tensors(folder / "model.safetensors")


# The layout.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_files_of_the_reference(tmp_path: Path, architecture: str) -> None:
    arrays = tiny.tensors(architecture)
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source", architecture))
    files = model.save_pretrained(tmp_path / "target")
    assert listing(tmp_path / "target") == sorted(file.name for file in files) == ["config.json", "model.safetensors"]
    assert tiny.bits(saved(tmp_path / "target")) == tiny.bits(dict(sorted(arrays.items())))
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config.items() >= tiny.config(architecture, dtype="float32").items()


def test_old_names_are_saved_as_new_ones(tmp_path: Path) -> None:
    arrays = tiny.tensors("BertForMaskedLM")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in arrays.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(40)[None]
    old["cls.predictions.decoder.weight"] = old.pop("bert.embeddings.word_embeddings.weight")
    tiny.write(tmp_path / "source", tiny.config("BertForMaskedLM"), old)
    formax.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "target")
    assert tiny.bits(saved(tmp_path / "target")) == tiny.bits(arrays)


def test_a_head_on_a_base_model_is_saved_as_a_head(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "source", "BertModel")
    model = formax.AutoModelForTokenClassification.from_pretrained(tmp_path / "source", num_labels=3)
    model.save_pretrained(tmp_path / "target")
    found = saved(tmp_path / "target")
    assert {name: array.shape for name, array in found.items()} == tiny.shapes(
        "BertForTokenClassification", num_labels=3
    )
    again = formax.from_pretrained(tmp_path / "target")
    assert (again.architecture.name, again.config.num_labels) == ("BertForTokenClassification", 3)
    np.testing.assert_array_equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_the_configuration_is_kept(tmp_path: Path) -> None:
    given = tiny.config(
        "BertForSequenceClassification",
        id2label={"0": "bad", "1": "good", "2": "so-so"},
        label2id={"bad": 0, "good": 1, "so-so": 2},
        layer_norm_eps=1e-3,
        hidden_act="relu",
        problem_type="multi_label_classification",
        task_specific_params={"x": [1, {"y": None}]},
        transformers_version="4.57.6",
    )
    arrays = tiny.tensors("BertForSequenceClassification", num_labels=3)
    model = formax.from_pretrained(tiny.write(tmp_path / "source", given, arrays))
    model.save_pretrained(tmp_path / "target")
    assert json.loads((tmp_path / "target" / "config.json").read_text()).items() >= given.items()
    assert formax.AutoConfig.from_pretrained(tmp_path / "target") == model.config.replace(dtype="float32")


# Every bit.


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_every_bit(tmp_path: Path, dtype: Any, mesh: dict[str, int]) -> None:
    """NaNs with their payloads, infinities, denormals and both zeros, on one device and on eight."""
    arrays = tiny.noise(tiny.tensors("BertForMaskedLM"), dtype)
    everything = np.concatenate([array.reshape(-1) for array in arrays.values()]).astype(np.float32)
    assert np.isnan(everything).any()
    assert (np.signbit(everything) & (everything == 0)).any()
    tiny.write(tmp_path / "source", tiny.config("BertForMaskedLM"), arrays)
    model = formax.from_pretrained(tmp_path / "source", **({"mesh": make_mesh(**mesh)} if mesh else {}))
    model.save_pretrained(tmp_path / "target")
    assert tiny.bits(saved(tmp_path / "target")) == tiny.bits(dict(sorted(arrays.items())))
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == np.dtype(dtype).name


def test_mixed_dtypes(tmp_path: Path) -> None:
    arrays = tiny.tensors("BertModel")
    kinds = (np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e5m2)
    arrays = {name: array.astype(kinds[i % 4]) for i, (name, array) in enumerate(arrays.items())}
    tiny.write(tmp_path / "source", tiny.config("BertModel", dtype="bfloat16"), arrays)
    formax.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "target")
    found = saved(tmp_path / "target")
    assert {name: found[name].tobytes() for name in arrays} == {name: a.tobytes() for name, a in arrays.items()}
    assert {name: found[name].dtype for name in arrays} == {name: a.dtype for name, a in arrays.items()}
    # no single dtype is right, so it stays what the source said
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_dtype(tmp_path: Path) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source", "BertModel"))
    model.astype("bfloat16").save_pretrained(tmp_path / "target")
    cast = tiny.tensors("BertModel", ml_dtypes.bfloat16)
    assert tiny.bits(saved(tmp_path / "target")) == tiny.bits(dict(sorted(cast.items())))
    assert formax.from_pretrained(tmp_path / "target").config.dtype == "bfloat16"


def test_arrays_of_numpy(tmp_path: Path) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source", "BertModel"))
    params = jax.tree.map(lambda leaf: np.asfortranarray(leaf), model.params)
    model.replace(params=params).save_pretrained(tmp_path / "target")
    assert tiny.bits(saved(tmp_path / "target")) == tiny.bits(dict(sorted(tiny.tensors("BertModel").items())))


# Several files.


@pytest.mark.parametrize(("limit", "least"), [(10_000, 6), ("20KB", 3), ("0.0195MiB", 3), (4096, 15)])
def test_shards(tmp_path: Path, limit: int | str, least: int) -> None:
    arrays = tiny.tensors("BertForMaskedLM")
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source", "BertForMaskedLM"))
    files = model.save_pretrained(tmp_path / "target", max_shard_size=limit)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) >= least
    assert listing(tmp_path / "target") == sorted(file.name for file in files)
    assert listing(tmp_path / "target") == sorted(["config.json", "model.safetensors.index.json", *shards])
    found: tiny.Arrays = {}
    most = {10_000: 10_000, "20KB": 20_000, "0.0195MiB": 20_448, 4096: 4096}[limit]
    for i, shard in enumerate(shards, 1):
        assert shard == f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        part = tiny.read_tensors(tmp_path / "target" / shard)
        assert {name for name, place in index["weight_map"].items() if place == shard} == part.keys()
        assert len(part) == 1 or sum(array.nbytes for array in part.values()) <= most
        found |= part
    assert {name: a.tobytes() for name, a in found.items()} == {name: a.tobytes() for name, a in arrays.items()}
    again = formax.from_pretrained(tmp_path / "target")
    np.testing.assert_array_equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("limit", ["5 bananas", 0, -1, "GB"])
def test_sizes_that_are_none(tmp_path: Path, limit: Any) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source"))
    with pytest.raises(ValueError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "target", max_shard_size=limit)
    assert listing(tmp_path) == ["source", "source/config.json", "source/model.safetensors"]


# Where there is something already.


def test_over_the_folder_it_came_from(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", "BertForMaskedLM")
    tiny.write_tensors(folder / "model.safetensors", tiny.tensors("BertForMaskedLM"), align=64)
    model = formax.from_pretrained(folder)
    before = np.asarray(model(input_ids=IDS).logits)
    doubled = model.replace(params=jax.tree.map(lambda leaf: 2 * leaf, model.params))
    doubled.save_pretrained(folder)
    for name, array in saved(folder).items():
        np.testing.assert_array_equal(array, 2 * tiny.tensors("BertForMaskedLM")[name], err_msg=name)
    np.testing.assert_array_equal(np.asarray(model(input_ids=IDS).logits), before)
    # one file or many, the old weights are gone
    doubled.save_pretrained(folder, max_shard_size=10_000)
    assert "model.safetensors" not in listing(folder)
    model.save_pretrained(folder)
    assert listing(folder) == ["config.json", "model.safetensors"]
    np.testing.assert_array_equal(formax.from_pretrained(folder)(input_ids=IDS).logits, before)


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    others = {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"a": 1}',
        "special_tokens_map.json": b"{ }",
        "vocab.txt": b"[PAD]\n",
        "README.md": b"# mine",
        "pytorch_model.bin": b"old weights of another program",
    }
    for name, text in others.items():
        (folder / name).write_bytes(text)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_bytes(b"{}")
    stamps = {name: (folder / name).stat() for name in (*others, "1_Pooling/config.json")}
    formax.from_pretrained(folder).save_pretrained(folder, max_shard_size=10_000)
    for name, stamp in stamps.items():
        now = (folder / name).stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_size) == (stamp.st_ino, stamp.st_mtime_ns, stamp.st_size), name


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source"))
    model.save_pretrained("~/models/new")
    assert (tmp_path / "models" / "new" / "config.json").exists()
    assert formax.from_pretrained("~/models/new").num_parameters() == model.num_parameters()
    assert not (tmp_path / "~").exists()


def test_the_target_is_a_file(tmp_path: Path) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source"))
    (tmp_path / "target").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="target: is a file"):
        model.save_pretrained(tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"precious"


# Saves that fail.


@pytest.mark.parametrize("limit", ["5GB", 10_000])
def test_a_save_that_fails_changes_nothing(tmp_path: Path, limit: Any) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    before = content(folder)
    model = formax.from_pretrained(folder)
    params = jax.tree.map(lambda leaf: leaf + 1, model.params)
    broken = model.replace(params=params)
    params["layers"][1]["mlp"]["up"]["kernel"].delete()
    for target in (folder, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="deleted"):
            broken.save_pretrained(target, max_shard_size=limit)
    assert content(folder) == before
    assert listing(tmp_path) == ["model", "model/config.json", "model/model.safetensors"]


KILLED = """
import os, signal, sys
import jax
import formax
from formax import saving

folder, limit, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = formax.from_pretrained(folder)
original = saving.stored_tensors

def stored(spec, params):
    tensors, fetch = original(spec, params)
    seen = []
    def killing(name):
        seen.append(name)
        if len(seen) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return fetch(name)
    return tensors, killing

saving.stored_tensors = stored
model.replace(params=jax.tree.map(lambda leaf: -leaf, model.params)).save_pretrained(folder, max_shard_size=limit)
"""


def test_a_killed_save_changes_nothing(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    before = content(folder)
    command = [sys.executable, "-c", KILLED, str(folder), "10KB", "30"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = [path for path in folder.iterdir() if path.name not in before]
    assert [path.is_dir() for path in left] == [True]  # what it had written, out of everybody's way
    assert {name: (folder / name).read_bytes() for name in before} == before
    # and the next save tidies up
    model = formax.from_pretrained(folder)
    model.save_pretrained(folder)
    assert listing(folder) == ["config.json", "model.safetensors"]
    assert tiny.bits(saved(folder)) == tiny.bits(dict(sorted(tiny.tensors().items())))


def test_interventions_cannot_be_saved(tmp_path: Path) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source"))
    changed = formax.intervene(model, {"layers.0.mlp.out": lambda x: 0 * x})
    with pytest.raises(ValueError, match="interventions, which no checkpoint can hold"):
        changed.save_pretrained(tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_parameters_that_are_not_the_architectures(tmp_path: Path) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source"))
    pooler = model.params["pooler"]
    cases: list[tuple[Any, str]] = [
        ({key: part for key, part in model.params.items() if key != "pooler"}, "the parameters lack pooler.kernel"),
        (model.params | {"pooler": pooler | {"kernel": jnp.ones((32, 31))}}, r"pooler.kernel has shape \(32, 31\)"),
        (model.params | {"adapter": jnp.ones(3)}, "adapter is no parameter of this configuration; it would be lost"),
    ]
    for params, message in cases:
        with pytest.raises(ValueError, match=message):
            model.replace(params=params).save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match=r"embed.word.embedding has shape \(64, 32\), .* declares \(65, 32\)"):
        model.replace(config=model.config.replace(vocab_size=65)).save_pretrained(tmp_path / "target")
    assert not (tmp_path / "target").exists()


# Models of another size than they had.


@pytest.mark.parametrize("size", [50, 71])
def test_a_resized_vocabulary(tmp_path: Path, size: int) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source", "BertForMaskedLM"))
    resized = model.resize_token_embeddings(size, key=jax.random.key(1))
    resized.save_pretrained(tmp_path / "target")
    found = saved(tmp_path / "target")
    assert {name: array.shape for name, array in found.items()} == tiny.shapes("BertForMaskedLM", vocab_size=size)
    kept = min(size, 64)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        np.testing.assert_array_equal(found[name][:kept], tiny.tensors("BertForMaskedLM")[name][:kept])
    assert json.loads((tmp_path / "target" / "config.json").read_text())["vocab_size"] == size
    again = formax.from_pretrained(tmp_path / "target")
    assert again(input_ids=IDS).logits.shape == (2, 12, size)
    np.testing.assert_array_equal(again(input_ids=IDS).logits, resized(input_ids=IDS).logits)


def test_pruned_heads(tmp_path: Path) -> None:
    model = formax.from_pretrained(tiny.checkpoint(tmp_path / "source", "BertForMaskedLM"))
    pruned = model.prune_heads({1: [0, 2]})
    pruned.save_pretrained(tmp_path / "target")
    found = saved(tmp_path / "target")
    source = tiny.tensors("BertForMaskedLM")
    layer = "bert.encoder.layer.1.attention"
    rows = np.r_[8:16, 24:32]  # heads 1 and 3 of four, eight columns each
    np.testing.assert_array_equal(found[f"{layer}.self.key.weight"], source[f"{layer}.self.key.weight"][rows])
    np.testing.assert_array_equal(found[f"{layer}.self.value.bias"], source[f"{layer}.self.value.bias"][rows])
    np.testing.assert_array_equal(
        found[f"{layer}.output.dense.weight"], source[f"{layer}.output.dense.weight"][:, rows]
    )
    np.testing.assert_array_equal(found[f"{layer}.output.dense.bias"], source[f"{layer}.output.dense.bias"])
    assert json.loads((tmp_path / "target" / "config.json").read_text())["pruned_heads"] == {"1": [0, 2]}
    again = formax.from_pretrained(tmp_path / "target")
    np.testing.assert_array_equal(again(input_ids=IDS).logits, pruned(input_ids=IDS).logits)
    # the numbers of the heads are those of the whole model, also the second time
    twice = again.prune_heads({1: [3], 0: [1]})
    twice.save_pretrained(tmp_path / "twice")
    config = formax.AutoConfig.from_pretrained(tmp_path / "twice")
    assert dict(config.pruned_heads) == {0: (1,), 1: (0, 2, 3)}
    kept = saved(tmp_path / "twice")[f"{layer}.self.query.weight"]
    np.testing.assert_array_equal(kept, source[f"{layer}.self.query.weight"][8:16])
