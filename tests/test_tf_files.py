"""TensorFlow's checkpoints: the tensors, names and groups that the reference saves, and broken files."""

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from battery.goldens import Golden
from oracle.compare import error
from oracle.frameworks import CASES, Case, model_from, path_of

import formax
from formax.conversion import tf_h5
from formax.conversion.checkpoint import CheckpointError, open_checkpoint, write_checkpoint
from formax.core.frameworks import FrameworkError

h5py = pytest.importorskip("h5py")

KEPT = {case.golden.partition("/")[0]: case for case in CASES["tf"] if case.kept}


def bits(x: Any) -> list[Any]:
    """Shape, dtype and checksum."""
    return [list(x.shape), x.dtype.name, zlib.crc32(np.ascontiguousarray(x).tobytes())]


def stored(folder: Path) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """What h5py finds in a folder's files: tensors by their full names, and how many each group lists."""
    tensors: dict[str, list[Any]] = {}
    groups: dict[str, int] = {}
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            for layer in [*file.attrs["layer_names"], *{"top_level_model_weights"} & file.keys()]:
                if isinstance(file[layer], h5py.Dataset):
                    tensors[layer] = bits(file[layer][()])
                    continue
                names = file[layer].attrs["weight_names"]
                groups |= {layer: len(names)} if len(names) else {}
                tensors |= {name: bits(file[layer][name][()]) for name in names}
    return tensors, groups


def assert_equal(found: Any, expected: Any) -> None:
    assert found.architecture is expected.architecture
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("case", CASES["tf"], ids=lambda case: case.name)
def test_written_as_the_reference_writes_it_and_read_back(case: Case, tmp_path: Path) -> None:
    model = model_from(case, tmp_path / "pytorch", formax)
    model.save_pretrained(tmp_path / "tf", format="tf", max_shard_size=case.shard_size)
    record = json.loads(path_of("tf", case).read_text())
    assert stored(tmp_path / "tf") == (record["tensors"], record["groups"])
    found, report = formax.from_pretrained(tmp_path / "tf", output_loading_info=True)
    assert (report.initialised, report.mismatched, report.left_out) == ((), (), ())
    if model.config.model_type not in ("resnet", "regnet"):  # whose counts of batches no other framework keeps
        assert_equal(found, model)


@pytest.mark.parametrize("case", KEPT.values(), ids=lambda case: case.name)
def test_a_file_of_the_reference_opens(case: Case, tmp_path: Path) -> None:
    model = model_from(case, tmp_path / "pytorch", formax)
    folder = path_of("tf", case).with_suffix("")
    found, report = formax.from_pretrained(folder, output_loading_info=True)
    assert (report.initialised, report.mismatched, report.left_out) == ((), (), ())
    found.save_pretrained(tmp_path / "again", format="tf", max_shard_size=case.shard_size)
    assert stored(tmp_path / "again") == stored(folder)
    if model.config.model_type != "resnet":
        assert_equal(found, model)


def test_attributes_and_index_are_the_references(tmp_path: Path) -> None:
    """But for layers without weights, whose names count the layers of a process."""

    def attributes(path: Path) -> dict[str, Any]:
        with h5py.File(path) as file:
            found = {name: (value.dtype if hasattr(value, "dtype") else value) for name, value in file.attrs.items()}
            layers = [name for name in file.attrs["layer_names"] if len(file[name].attrs["weight_names"])]
            return found | {
                "layers": layers,
                "groups": {name for name in file if name in layers or name.startswith("top")},
                "top": (file["top_level_model_weights"].attrs["weight_names"].shape,),
            }

    folder = path_of("tf", KEPT["bert"]).with_suffix("")
    formax.from_pretrained(folder).save_pretrained(tmp_path / "bert", format="tf")
    expected, found = attributes(folder / "tf_model.h5"), attributes(tmp_path / "bert" / "tf_model.h5")
    assert expected.pop("layer_names") == found.pop("layer_names")
    assert found == expected
    folder = path_of("tf", KEPT["t5"]).with_suffix("")
    formax.from_pretrained(folder).save_pretrained(tmp_path / "t5", format="tf", max_shard_size="1KB")
    expected, found = (json.loads((path / "tf_model.h5.index.json").read_text()) for path in (folder, tmp_path / "t5"))
    assert found["weight_map"].keys() == expected["weight_map"].keys()
    assert found["metadata"] == expected["metadata"]


@pytest.mark.parametrize("name", ["bert/masked_lm", "gpt2/double_heads", "t5/encoder", "resnet/image_classification"])
def test_outputs_are_the_goldens(name: str, tmp_path: Path) -> None:
    golden = Golden(*name.split("/"))
    expected, _ = golden.open(tmp_path)
    expected.save_pretrained(tmp_path / "tf", format="tf")
    out = formax.from_pretrained(tmp_path / "tf")(**golden.inputs)
    checked = {field: value for field, value in golden.outputs.items() if "." not in field}
    for field, value in checked.items():
        assert error(value, np.asarray(getattr(out, field))) < 1e-4, field
    assert checked


def test_tables_under_their_older_name(tmp_path: Path) -> None:
    """Until 2023 some classes called tables `weight` and others `embeddings`; then some changed."""
    model = model_from(KEPT["t5"], tmp_path / "pytorch", formax)
    model.save_pretrained(tmp_path / "tf", format="tf")
    with h5py.File(tmp_path / "tf" / "tf_model.h5", "r+") as file:
        for layer in ("shared", "encoder"):
            group = file[layer]
            group["tft5/shared/weight:0"] = group["shared/shared/embeddings:0"]
            names = [n.replace("shared/shared/embeddings", "tft5/shared/weight") for n in group.attrs["weight_names"]]
            group.attrs["weight_names"] = np.asarray([name.encode() for name in names])
    assert_equal(formax.from_pretrained(tmp_path / "tf"), model)


def test_tf_weights_in_safetensors(tmp_path: Path) -> None:
    """As the reference's TensorFlow classes save them with `safe_serialization=True`."""
    from safetensors.numpy import save_file

    model = model_from(KEPT["bert"], tmp_path / "pytorch", formax)
    folder = path_of("tf", KEPT["bert"]).with_suffix("")
    with open_checkpoint(folder) as opened:
        tensors = {name: np.array(opened.read(name)) for name in opened}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "tf"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert_equal(formax.from_pretrained(tmp_path), model)


def test_what_tensorflow_does_not_have(tmp_path: Path) -> None:
    def refuse(name: str, match: str) -> None:
        model = model_from(Case(name), tmp_path / str(len(list(tmp_path.iterdir()))), formax)
        with pytest.raises((FrameworkError, CheckpointError), match=match):
            model.save_pretrained(tmp_path / "refused", format="tf")

    refuse("llama/causal_lm", "llama does not exist in TensorFlow; it exists in PyTorch and Flax")
    refuse("bart/causal_lm", "BartForCausalLM does not exist in TensorFlow; it exists in PyTorch and Flax: format=")
    refuse("bert/untied", r"BertForMaskedLM of this .* has no place for head\.decoder\.kernel")
    refuse("wav2vec2/model", r"conv_dim=\(")
    half = model_from(KEPT["bert"], tmp_path / "half", formax).astype("bfloat16")
    with pytest.raises(CheckpointError, match="HDF5 cannot hold bfloat16"):
        half.save_pretrained(tmp_path / "refused", format="tf")
    assert not (tmp_path / "refused").exists()
    half.astype("float16").save_pretrained(tmp_path / "float16", format="tf")
    assert formax.from_pretrained(tmp_path / "float16").config.dtype == "float16"


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "formax\[tf\]"'):
        formax.from_pretrained(path_of("tf", KEPT["bert"]).with_suffix(""))


def test_what_is_missing_has_the_frameworks_name(tmp_path: Path) -> None:
    folder = path_of("tf", KEPT["bert"]).with_suffix("")
    with open_checkpoint(folder) as opened:
        tensors = {name: np.array(opened.read(name)) for name in opened}
    kernel = "bert/encoder/layer_._0/output/dense/kernel:0"
    del tensors[kernel]
    files = {"config.json": (folder / "config.json").read_bytes()}
    write_checkpoint(tmp_path, tensors, tensors.__getitem__, framework="tf", files=files)
    with pytest.raises(CheckpointError, match=f"missing: '{kernel}'"):
        formax.from_pretrained(tmp_path)


def test_many_names_are_divided_among_attributes(tmp_path: Path) -> None:
    tensors = {f"layer/{'x' * 90}/{i}/kernel:0": np.full(2, i, np.float32) for i in range(900)}
    write_checkpoint(tmp_path, tensors, tensors.__getitem__, framework="tf")
    with h5py.File(tmp_path / "tf_model.h5") as file:
        assert "weight_names0" in file["layer"].attrs
    with open_checkpoint(tmp_path) as opened:
        assert opened.keys() == tensors.keys()
        assert opened.read(f"layer/{'x' * 90}/899/kernel:0").tolist() == [899, 899]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("BertForMaskedLM", "tf_bert_for_masked_lm"),
        ("GPT2LMHeadModel", "tfgpt2lm_head_model"),
        ("T5Model", "tft5_model"),
    ],
)
def test_names_of_models(architecture: str, name: str) -> None:
    assert tf_h5.model_name(architecture) == name


# --- broken files


def keras(tmp_path: Path, change: Callable[[Any], object] = lambda file: None) -> Path:
    """A file of one layer with one weight, changed."""
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.asarray([b"dense"])
        group = file.create_group("dense")
        group.attrs["weight_names"] = np.asarray([b"m/dense/kernel:0"])
        group["m/dense/kernel:0"] = np.arange(6, dtype=np.float32).reshape(2, 3)
        change(file)
    return path


def again(value: Any, **options: Any) -> Callable[[Any], object]:
    """Puts another dataset in the place of the weight."""

    def change(file: Any) -> None:
        del file["dense/m/dense/kernel:0"]
        file["dense"].create_dataset("m/dense/kernel:0", data=value, **options)

    return change


def linked(link: Any) -> Callable[[Any], object]:
    """Puts a link in the place of the weight."""

    def change(file: Any) -> None:
        del file["dense/m/dense/kernel:0"]
        file["dense/m/dense/kernel:0"] = link

    return change


def test_the_hand_made_file_is_good(tmp_path: Path) -> None:
    with open_checkpoint(keras(tmp_path)) as opened:
        assert opened.read("dense/kernel:0").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda file: file.attrs.__delitem__("layer_names"), "no weights of Keras"),
        (lambda file: file.attrs.__setitem__("layer_names", np.asarray([b"other"])), "lists 'other', which the file"),
        (lambda file: file.attrs.__setitem__("layer_names", np.asarray([1])), "'layer_names' of '/' must hold names"),
        (lambda file: file.attrs.__setitem__("layer_names", np.asarray([b"\xff"])), "cannot be read as HDF5"),
        (
            lambda file: file["dense"].attrs.__setitem__("weight_names", np.asarray([b"m/../x"])),
            r"lists 'm/\.\./x', which the file does not hold",
        ),
        (lambda file: file["dense"].attrs.__setitem__("weight_names", np.asarray([b"m"])), "'m' is a group"),
        (again(np.asarray([b"text"])), r"holds \|S4 elements"),
        (again(np.zeros(3, ">f4")), "holds >f4 elements"),
        (again(np.zeros((64, 64)), chunks=(8, 8), compression="gzip"), "does not lie in the file in one piece"),
        (again(np.zeros(2**10), chunks=(2**10,), maxshape=(None,)), "does not lie in the file in one piece"),
        (linked(None if h5py is None else h5py.SoftLink("/dense/m/dense/kernel:0")), "is a link to somewhere else"),
        (linked(None if h5py is None else h5py.ExternalLink("other.h5", "/x")), "is a link to somewhere else"),
    ],
)
def test_a_broken_file_is_refused(change: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"tf_model\.h5: .*{match}"):
        open_checkpoint(keras(tmp_path, change))


def test_one_group_under_many_names(tmp_path: Path) -> None:
    """Names times names: a small file must not keep the reader busy for hours."""

    def change(file: Any) -> None:
        group = file["dense"]
        group.attrs["weight_names"] = np.asarray([b"m/dense/kernel:0"] * 3000)
        for i in range(300):
            file[f"{i}"] = group
        file.attrs["layer_names"] = np.asarray([f"{i}".encode() for i in range(300)])

    path = keras(tmp_path, change)
    assert path.stat().st_size < 500_000
    with pytest.raises(CheckpointError, match="lists more names than a file of"):
        open_checkpoint(path)
    path = keras(tmp_path, lambda file: file.attrs.__setitem__("layer_names", np.asarray([b"dense"] * 3000)))
    with open_checkpoint(path) as opened:
        assert list(opened) == ["dense/kernel:0"]


def test_a_name_that_no_attribute_can_list(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file, pytest.raises(CheckpointError, match="longer than HDF5 can list"):
        tf_h5._set_names(file, "weight_names", ["x" * (tf_h5.MAX_ATTRIBUTE + 1), "y"])


def test_elements_that_were_never_written(tmp_path: Path) -> None:
    """A file may declare an array of any size without holding a byte of it."""

    def change(file: Any) -> None:
        del file["dense/m/dense/kernel:0"]
        file["dense"].create_dataset("m/dense/kernel:0", (2**40,), np.float32)

    with pytest.raises(CheckpointError, match="takes 4398046511104 bytes, which end behind the file"):
        open_checkpoint(keras(tmp_path, change))


def test_a_cycle_of_groups_is_no_cycle_of_names(tmp_path: Path) -> None:
    def change(file: Any) -> None:
        file["dense/m/dense/dense"] = file["dense"]

    with open_checkpoint(keras(tmp_path, change)) as opened:
        assert list(opened) == ["dense/kernel:0"]


def test_truncated_or_damaged_anywhere(tmp_path: Path) -> None:
    """A part of a file is refused; one with wrong bytes is, too, or holds arrays that lie inside it."""
    path = keras(tmp_path)
    whole = path.read_bytes()
    for end in range(1, len(whole) - 1, 7):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="tf_model"):
            open_checkpoint(path)
    numbers = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(numbers.randrange(1, 4)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        path.write_bytes(data)
        try:
            with open_checkpoint(path) as opened:
                assert all(opened.read(name).nbytes <= len(whole) for name in opened)
        except CheckpointError as problem:
            assert "tf_model" in str(problem)  # noqa: PT017
