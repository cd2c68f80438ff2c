"""Directories of checkpoints: what opens, what an index may say, and saves that fail or are killed at any moment."""

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st

from formax.conversion import atomic, checkpoint
from formax.conversion.checkpoint import CheckpointError, open_checkpoint, write_checkpoint
from formax.conversion.mapped import Region

TORCH = Path(__file__).parent / "data" / "torch_bin"
NAMES = ("a", "b", "c", "d")


def weights(value: float, names: tuple[str, ...] = NAMES) -> dict[str, np.ndarray]:
    return {name: np.full(10, value, np.float32) for name in names}


def save(directory: Path, value: float, shard: int = 10**9, names: tuple[str, ...] = NAMES) -> list[Path]:
    """Saves tensors of 40 bytes each; `config.json` tells the value too."""
    tensors = weights(value, names)
    files = {"config.json": json.dumps(value).encode()}
    return write_checkpoint(directory, tensors, tensors.__getitem__, max_shard_size=shard, files=files)


def values(directory: Path) -> set[float]:
    """The values in a saved checkpoint: one, unless two saves are mixed up."""
    with open_checkpoint(directory) as opened:
        assert set(opened) <= {*NAMES, "e"}
        return {float(value) for name in opened for value in opened.read(name)}


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Reading.


def test_mapping(tmp_path: Path) -> None:
    save(tmp_path / "new", 1.0)
    opened = open_checkpoint(tmp_path / "new")
    assert opened.path == tmp_path / "new"
    assert (list(opened), len(opened), "a" in opened, "z" in opened) == (list(NAMES), 4, True, False)
    assert (opened["a"].shape, opened["a"].dtype, opened["a"].file.name) == ((10,), np.dtype("f4"), "model.safetensors")
    assert "4 tensors, safetensors" in repr(opened)
    for ask in (opened.__getitem__, opened.read, opened.release):
        with pytest.raises(KeyError, match="z"):
            ask("z")


def test_views_outlive_the_checkpoint_and_the_file(tmp_path: Path) -> None:
    save(tmp_path / "new", 1.0)
    with open_checkpoint(tmp_path / "new") as opened:
        view = opened.read("a")
    save(tmp_path / "new", 2.0)
    assert view.tolist() == [1.0] * 10
    shutil.rmtree(tmp_path / "new")
    assert view.tolist() == [1.0] * 10
    with pytest.raises(CheckpointError, match="new: the checkpoint is closed; open it again to read 'a'"):
        opened.read("a")


def test_a_checkpoint_can_be_saved_over_itself(tmp_path: Path) -> None:
    save(tmp_path / "new", 1.0)
    opened = open_checkpoint(tmp_path / "new")
    write_checkpoint(tmp_path / "new", {"e": opened["a"]}, lambda _: opened.read("a") + 1)
    assert values(tmp_path / "new") == {2.0}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells the pages of a map")
def test_release_drops_the_pages(tmp_path: Path) -> None:
    size = 4 * 2**20
    tensors = {name: np.ones(size // 4, np.float32) for name in "ab"}
    (path,) = write_checkpoint(tmp_path / "new", tensors, tensors.__getitem__)

    def resident() -> int:
        """Bytes of the file that are in this process's memory."""
        entry = Path("/proc/self/smaps").read_text().split(str(path))[1]
        return int(entry.split("Rss:")[1].split()[0]) * 1024

    opened = open_checkpoint(path)
    assert opened.read("a").sum() + opened.read("b").sum() == size // 2
    assert resident() >= 2 * size
    opened.release("a")
    assert size <= resident() < size + 2**17
    opened.release("b")
    assert resident() < 2**17
    assert opened.read("a").sum() == size // 4


def test_the_preferred_file_is_opened(tmp_path: Path) -> None:
    shutil.copy(TORCH / "nested.bin", tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).format == "torch"
    shutil.copy(save(tmp_path / "new", 1.0)[0], tmp_path)
    assert open_checkpoint(tmp_path).format == "safetensors"


def test_the_format_is_told_by_content(tmp_path: Path) -> None:
    shutil.copy(TORCH / "nested.bin", tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).format == "torch"
    shutil.move(save(tmp_path / "new", 1.0)[0], tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path / "pytorch_model.bin").format == "safetensors"


def test_shards_of_torch_files(tmp_path: Path) -> None:
    shutil.copy(TORCH / "nested.bin", tmp_path / "one.bin")
    shutil.copy(TORCH / "zip.bin", tmp_path / "two.bin")
    places = {"weight": "one.bin", "bias": "one.bin", "scalar": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    opened = open_checkpoint(tmp_path)
    assert opened.format == "torch"
    assert opened.read("bias").tolist() == [0, 1, 2]
    assert opened.read("scalar") == 7
    assert opened["scalar"].file == tmp_path / "two.bin"
    # The index need not list everything.
    assert "transposed" in opened
    assert opened.metadata["epoch"] == "3"
    assert opened.metadata["no_tensor"] == "a string"


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Snapshots there are links into another folder, named by hash."""
    made = save(tmp_path / "new", 1.0, shard=80)
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(made):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert values(snapshot) == {1.0}
    assert values(snapshot / "model.safetensors.index.json") == {1.0}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path, 1.0, shard=80)
    return tmp_path


def edit(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Changes the weight map of an index."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "place",
    [
        *("../model.safetensors", "/etc/passwd", "sub/../../x", "..", ".", "", "a\\b", "a\0b", "sub/.."),
        *(3, None, ["model-00001-of-00002.safetensors"]),
    ],
)
def test_no_index_leads_out_of_its_directory(sharded: Path, place: str) -> None:
    edit(sharded, lambda places: places.update(c=place))
    with pytest.raises(CheckpointError, match=r"index\.json: the index puts 'c' into .*in the same directory"):
        open_checkpoint(sharded)


def test_an_index_is_checked_against_its_files(sharded: Path) -> None:
    edit(sharded, lambda places: places.update(e="model-00001-of-00002.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"puts 'e' into 'model-00001-of-00002\.safetensors', which does not hold"
    ):
        open_checkpoint(sharded)
    edit(sharded, lambda places: places.pop("e"))
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "copy.safetensors")
    edit(sharded, lambda places: places.update(a="copy.safetensors"))
    with pytest.raises(CheckpointError, match=r"index\.json: both 'copy\.safetensors' and 'model-00001-of-00002"):
        open_checkpoint(sharded)
    edit(sharded, lambda places: places.update(a="missing.safetensors"))
    with pytest.raises(CheckpointError, match=r"puts 'a' into 'missing\.safetensors', which is missing"):
        open_checkpoint(sharded)
    shutil.copy(TORCH / "nested.bin", sharded / "nested.bin")
    edit(sharded, lambda places: places.update(a="model-00001-of-00002.safetensors", weight="nested.bin"))
    with pytest.raises(CheckpointError, match="mixes safetensors and PyTorch"):
        open_checkpoint(sharded)


def test_a_shard_in_a_folder_below(sharded: Path) -> None:
    (sharded / "sub").mkdir()
    (sharded / "model-00001-of-00002.safetensors").rename(sharded / "sub" / "x")
    edit(sharded, lambda places: places.update(a="sub/x", b="sub/x"))
    assert values(sharded) == {1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("<!doctype html>", "a web page"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, not list"),
        ("{}", "must hold 'weight_map'"),
        ('{"weight_map": {}}', "must hold 'weight_map'"),
        ('{"weight_map": ["a"]}', "must hold 'weight_map'"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "holds the key 'a' twice"),
    ],
)
def test_malformed_indices(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json: .*{message}"):
        open_checkpoint(tmp_path)


def test_an_absurd_index(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_INDEX", 100)
    with pytest.raises(CheckpointError, match="at most 100 are read"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "a web page"),
        (b"<HTML><body>404</body></HTML>", "a web page"),
        (b"<?xml version='1.0'?><Error/>", "a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "cannot be read as HDF5"),
        (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
        (b"abc", "too few|neither a safetensors file nor a PyTorch checkpoint"),
        (b"just text, and more of it", "would be|neither a safetensors file nor a PyTorch checkpoint"),
        (b"PK\x03\x04", "truncated"),
        (b"\x80\x02", "truncated"),
    ],
)
def test_other_files_in_the_place_of_weights(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: .*({message})"):
        open_checkpoint(tmp_path)


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights; expected one of model\.safetensors, .* found nothing"):
        open_checkpoint(tmp_path)
    for name in ("config.json", "adapter_model.safetensors", "vocab.txt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"found adapter_model\.safetensors, config\.json, vocab\.txt") as error:
        open_checkpoint(tmp_path)
    assert "adapter_model.safetensors holds an adapter, which needs the model it belongs to" in str(error.value)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"the shards there need their model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
    for number in range(30):
        (tmp_path / f"{number}").touch()
    with pytest.raises(CheckpointError, match="and 14 more"):
        open_checkpoint(tmp_path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing: no such file or directory"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"missing\.index\.json: no such file or directory"):
        open_checkpoint(tmp_path / "missing.index.json")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="fifo: not a regular file"):
        open_checkpoint(tmp_path / "fifo")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        open_checkpoint(tmp_path)


# Writing.


def test_one_file(tmp_path: Path) -> None:
    made = save(tmp_path / "deep" / "new", 1.0)
    assert made == [tmp_path / "deep" / "new" / name for name in ("model.safetensors", "config.json")]
    assert listing(tmp_path / "deep") == ["new"]
    assert listing(tmp_path / "deep" / "new") == ["config.json", "model.safetensors"]
    assert open_checkpoint(tmp_path / "deep" / "new").metadata == {"format": "pt"}


def test_shards(tmp_path: Path) -> None:
    made = save(tmp_path / "new", 1.0, shard=80)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert [path.name for path in made] == [*names, "config.json"]
    assert made[2].read_text() == (
        "{\n"
        '  "metadata": {\n    "total_size": 160\n  },\n'
        '  "weight_map": {\n'
        f'    "a": "{names[0]}",\n    "b": "{names[0]}",\n    "c": "{names[1]}",\n    "d": "{names[1]}"\n'
        "  }\n}\n"
    )
    assert values(tmp_path / "new") == {1.0}


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12), limit=st.integers(1, 12))
def test_shards_as_hugging_face_makes_them(sizes: list[int], limit: int) -> None:
    tensors = {f"t{number}": Region((size,), np.dtype(np.uint8), 0) for number, size in enumerate(sizes)}
    theirs = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    assert checkpoint.split(tensors, limit) == theirs.filename_to_tensors


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1GiB", 2**30), (" 1.5 kb ", 1500), ("2TiB", 2**41)],
)
def test_sizes(size: int | str, wanted: int) -> None:
    assert checkpoint.parse_size(size) == wanted


@pytest.mark.parametrize("size", ["", "GB", "5 G", "5XB", "-1", -1, 0, "0.1", "1e9", "1_0", "nan", None, True])
def test_sizes_that_are_none(tmp_path: Path, size: str) -> None:
    with pytest.raises(ValueError, match="give bytes, or a size such as '5GB'"):
        write_checkpoint(tmp_path / "new", {}, lambda _: np.zeros(1), max_shard_size=size)
    assert listing(tmp_path) == []


def test_no_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "new", {}, lambda _: np.zeros(1))
    assert len(open_checkpoint(tmp_path / "new")) == 0


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "", "a/../../x", "model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"],
)
def test_other_files_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot save a file as"):
        write_checkpoint(tmp_path / "new", {}, lambda _: np.zeros(1), files={name: b""})
    assert listing(tmp_path) == []


@pytest.mark.parametrize("exists", [False, True])
def test_other_files_in_folders(tmp_path: Path, exists: bool) -> None:
    if exists:
        tmp_path.joinpath("new").mkdir()
    write_checkpoint(tmp_path / "new", {}, lambda _: np.zeros(1), files={"1_Pooling/config.json": b"{}"})
    assert (tmp_path / "new" / "1_Pooling" / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("exists", [False, True])
def test_permissions_follow_the_umask(tmp_path: Path, exists: bool) -> None:
    before = os.umask(0o022)
    try:
        if exists:
            tmp_path.joinpath("new").mkdir()
        made = save(tmp_path / "new", 1.0)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o644}


def test_the_target_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("mine")
    with pytest.raises(CheckpointError, match="new: is a file; a checkpoint is saved into a directory"):
        save(tmp_path / "new", 1.0)
    assert (tmp_path / "new").read_text() == "mine"
    with pytest.raises(CheckpointError, match="new: is a file; a checkpoint is saved into a directory"):
        save(tmp_path / "new" / "below", 1.0)
    assert listing(tmp_path) == ["new"]


SHARDS = (10**9, 120, 80, 40)


@pytest.mark.parametrize("before", SHARDS)
@pytest.mark.parametrize("after", SHARDS)
def test_old_weights_go_and_nothing_else(tmp_path: Path, before: int, after: int) -> None:
    save(tmp_path, 1.0, before)
    others = {"pytorch_model.bin", "model-1-of-2.safetensors", "model.fp16.safetensors", "notes.txt", "config.json"}
    for name in others:
        (tmp_path / name).write_text("mine")
    made = save(tmp_path, 2.0, after)
    assert set(listing(tmp_path)) == others | {path.name for path in made}
    assert values(tmp_path) == {2.0}
    assert {(tmp_path / name).read_text() for name in others - {"config.json"}} == {"mine"}


# Saves that do not come to their end.


@pytest.mark.parametrize("exists", [False, True])
def test_a_fetch_that_fails(tmp_path: Path, exists: bool) -> None:
    if exists:
        save(tmp_path / "new", 1.0, 80)
    before = listing(tmp_path)

    def fetch(name: str) -> np.ndarray:
        if name == "d":
            raise ZeroDivisionError("mine")
        return weights(2.0)[name]

    for target in ("new", "deep/down/new"):
        with pytest.raises(ZeroDivisionError, match="mine"):
            write_checkpoint(tmp_path / target, weights(2.0), fetch, max_shard_size=80)
    assert listing(tmp_path) == before
    if exists:
        assert len(listing(tmp_path / "new")) == 4
        assert values(tmp_path / "new") == {1.0}


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(tmp_path: Path, exists: bool) -> None:
    """A limit on the size of files stands for the disk: the same call fails, in the same way."""
    if exists:
        save(tmp_path / "new", 1.0)
    before = listing(tmp_path)
    big = np.zeros(2**20, np.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"new/model\.safetensors: cannot be written: .*nothing in .*new was"):
            write_checkpoint(tmp_path / "new", {"a": big}, lambda _: big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == before
    if exists:
        assert listing(tmp_path / "new") == ["config.json", "model.safetensors"]
        assert values(tmp_path / "new") == {1.0}


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from formax.conversion.checkpoint import write_checkpoint

def fetch(name):
    if name == "c":
        print("half written", flush=True)
        time.sleep(60)
    return np.full(10, 2.0, np.float32)

tensors = {name: np.zeros(10, np.float32) for name in "abcd"}
write_checkpoint(Path(sys.argv[1]), tensors, fetch, max_shard_size=80)
"""


@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_save(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "new"
    if exists:
        save(target, 1.0, 80)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half written\n"
        (left,) = atomic.leftovers_of(target)
        assert "model-00001-of-00002.safetensors" in listing(left)
        # Another save meanwhile leaves the folder of the living one alone.
        save(target, 3.0, 80)
        assert left.exists()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert values(target) == {3.0}
    save(target, 4.0, 80)
    assert atomic.leftovers_of(target) == []
    assert values(target) == {4.0}


def test_leftovers_of_others_stay(tmp_path: Path) -> None:
    """Whether a process of another machine lives is not known here."""
    other = f"{int(atomic._HOST, 16) ^ 1:08x}"
    elsewhere = tmp_path / "new" / f".saving-{other}-{2**22 + 1}-00000000"
    mine = [".saving", ".saving-x", f".saving-{atomic._HOST}-99999999", f"x.saving-{atomic._HOST}-99999999-00000000"]
    dead = tmp_path / "new" / f".saving-{atomic._HOST}-{2**22 + 1}-00000000"
    beside = tmp_path / f".new.saving-{atomic._HOST}-{2**22 + 1}-00000000"
    for path in (elsewhere, dead, beside, *(tmp_path / "new" / name for name in mine)):
        path.mkdir(parents=True)
    save(tmp_path / "new", 1.0)
    assert set(listing(tmp_path / "new")) == {elsewhere.name, *mine, "config.json", "model.safetensors"}
    assert listing(tmp_path) == ["new"]


def test_an_interrupted_save_is_mentioned(tmp_path: Path) -> None:
    (tmp_path / ".saving-00000000-1-00000000").mkdir()
    with pytest.raises(
        CheckpointError, match=r"a save is under way or was interrupted, and its files are in .*\.saving"
    ):
        open_checkpoint(tmp_path)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("before", SHARDS)
@pytest.mark.parametrize("after", SHARDS)
def test_killed_at_every_step_of_the_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """Never a mixture; and never nothing, unless shards are replaced by shards of the same names."""
    outcomes = []
    for last in range(20):
        directory = tmp_path / f"{last}"
        save(directory, 1.0, before)
        steps = iter(range(last))

        def counted(
            function: Callable[..., object], steps: "Mapping[int, int] | object" = steps
        ) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                if next(steps, None) is None:  # type: ignore[call-overload]
                    raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            try:
                save(directory, 2.0, after)
                finished = True
            except Killed:
                finished = False
        try:
            found = values(directory)
        except CheckpointError:
            found = set()
        assert len(found) <= 1
        outcomes.append(found)
        if finished:
            break
        save(directory, 3.0, after)
        assert values(directory) == {3.0}
        assert atomic.leftovers_of(directory) == []
    else:
        pytest.fail("more steps than expected")
    assert outcomes[0] == {1.0}
    assert outcomes[-1] == {2.0}
    assert sorted(outcomes, key=lambda found: min(found, default=1.5)) == outcomes, "old, then nothing, then new"
    same_names = before == after != SHARDS[0] or {before, after} == {120, 80}
    assert (set() in outcomes) == same_names


def test_a_move_that_fails_keeps_the_new_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1.0, 80)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: cannot be replaced: Operation not p"):
            save(tmp_path, 2.0, 80)
    (left,) = atomic.leftovers_of(tmp_path)
    assert values(left) == {2.0}


def test_two_saves_at_once(tmp_path: Path) -> None:
    """A save in another thread is not taken for the leftover of a dead process."""
    inner = threading.Thread(target=save, args=(tmp_path / "new", 2.0))

    def fetch(name: str) -> np.ndarray:
        if name == "b":
            inner.start()
            inner.join()
        return weights(1.0)[name]

    (tmp_path / "new").mkdir()
    write_checkpoint(tmp_path / "new", weights(1.0), fetch)
    assert values(tmp_path / "new") == {1.0}
    assert atomic.leftovers_of(tmp_path / "new") == []
