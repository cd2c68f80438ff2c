"""Folders, the hub's cache, and the hub itself, which no test reaches: what stands in for it is a folder."""

import fnmatch
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny
from huggingface_hub import constants, errors

import formax
from formax import hub
from formax.conversion.checkpoint import CheckpointError
from formax.core.config import ConfigError
from formax.hub import HubError
from formax.inspection import inspect_table

REPO = "someone/tiny-bert"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "76543210fedcba9876543210fedcba9876543210"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, and a working directory without a folder of a repository's name."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert constants.HF_HUB_OFFLINE
    return folder


def store(cache: Path, source: Path, *, repo: str = REPO, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """Puts the files of a folder into the cache as huggingface_hub does: as links to blobs; returns the snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for path in source.rglob("*"):
        if path.is_file():
            blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    if ref is not None:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return snapshot


def list_tree(cache: Path, names: list[str], *, commit: str = COMMIT) -> None:
    """Puts the list of a commit's files into the cache, which tells whether a snapshot is complete."""
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    path = cache / f"models--{REPO.replace('/', '--')}" / "trees" / f"{commit}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format_version": 1, "files": files}))


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


# The cache.


@pytest.mark.parametrize("shards", [1, 3])
def test_a_repository_in_the_cache(cache: Path, tmp_path: Path, shards: int) -> None:
    arrays = tiny.tensors("BertForMaskedLM")
    source = tiny.write(tmp_path / "source", tiny.config("BertForMaskedLM"), arrays, shards)
    snapshot = store(cache, source)
    model = formax.from_pretrained(REPO)
    np.testing.assert_array_equal(
        model.params["embed"]["word"]["embedding"], arrays["bert.embeddings.word_embeddings.weight"]
    )
    assert formax.AutoConfig.from_pretrained(REPO) == model.config
    assert hub.checkpoint(REPO) == snapshot
    assert "BertForMaskedLM" in inspect_table(REPO)


def test_a_cache_elsewhere(cache: Path, tmp_path: Path) -> None:
    store(tmp_path / "other", tiny.checkpoint(tmp_path / "source"))
    assert formax.from_pretrained(REPO, cache_dir=tmp_path / "other").num_parameters() > 0
    assert formax.from_pretrained(REPO, cache_dir=str(tmp_path / "other"), local_files_only=True).num_parameters() > 0
    with pytest.raises(HubError, match="not in the hub cache"):
        formax.from_pretrained(REPO)


def test_revisions(cache: Path, tmp_path: Path) -> None:
    for commit, ref, labels in ((COMMIT, "main", 2), (OLDER, "v1.0", 3)):
        source = tiny.checkpoint(tmp_path / ref, "BertForSequenceClassification", num_labels=labels)
        store(cache, source, commit=commit, ref=ref)
    for revision, labels in ((None, 2), ("main", 2), ("v1.0", 3), (OLDER, 3), (COMMIT, 2)):
        for options in ({}, {"local_files_only": True}):
            model = formax.from_pretrained(REPO, revision=revision, num_labels=labels, **options)
            assert model.params["head"]["kernel"].shape == (32, labels)
    for opens in (formax.from_pretrained, formax.AutoConfig.from_pretrained):
        with pytest.raises(HubError) as caught:
            opens(REPO, revision="v2.0")
        assert one_line(caught.value) == (
            f"{REPO} (revision 'v2.0') is no folder here, is not in the hub cache, and the hub was not asked or not "
            "reached (offline)"
        )


def test_a_repository_that_is_not_in_the_cache(cache: Path) -> None:
    for opens in (
        formax.from_pretrained,
        formax.AutoModelForMaskedLM.from_pretrained,
        formax.AutoConfig.from_pretrained,
    ):
        for alone in (False, True):
            with pytest.raises(HubError) as caught:
                opens(REPO, local_files_only=alone)
            assert one_line(caught.value) == (
                f"{REPO} is no folder here, is not in the hub cache, and the hub was not asked or not reached (offline)"
            )
            assert caught.value.__suppress_context__


def test_a_repository_that_is_there_in_part(cache: Path, tmp_path: Path) -> None:
    """As after `AutoConfig.from_pretrained`, or a download that broke off."""
    source = tiny.checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    snapshot = store(cache, source)
    with pytest.raises(CheckpointError, match=f"{snapshot}: no weights"):  # nobody knows what there should be
        formax.from_pretrained(REPO)
    list_tree(cache, ["config.json", "model.safetensors", "README.md"])
    assert formax.AutoConfig.from_pretrained(REPO).vocab_size == 64
    with pytest.raises(HubError) as caught:
        formax.from_pretrained(REPO)
    assert one_line(caught.value).startswith(f"{REPO} is in the hub cache in part only: ")
    assert "(model.safetensors)" in str(caught.value)


def test_a_snapshot_without_a_configuration(cache: Path, tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "source")
    (source / "config.json").unlink()
    snapshot = store(cache, source)
    with pytest.raises(ConfigError, match=f"{snapshot} holds no config.json"):
        formax.from_pretrained(REPO)


def test_saving_into_the_cache_leaves_its_blobs(cache: Path, tmp_path: Path) -> None:
    snapshot = store(cache, tiny.checkpoint(tmp_path / "source"))
    blobs = {path: path.read_bytes() for path in (cache / f"models--{REPO.replace('/', '--')}" / "blobs").iterdir()}
    model = formax.from_pretrained(REPO)
    model.astype("float16").save_pretrained(snapshot)
    assert {path: path.read_bytes() for path in blobs} == blobs
    assert formax.from_pretrained(REPO).config.dtype == "float16"


# Names and paths.


@pytest.mark.parametrize(
    "name", ["some one/bert", "a--b/bert", "bert..base", "-bert", "bert.git", "b" * 97, "a\0b", "bért"]
)
def test_names_that_no_repository_can_have(cache: Path, name: str) -> None:
    with pytest.raises(HubError) as caught:
        formax.from_pretrained(name)
    assert one_line(caught.value).startswith(f"{name!r} is neither a folder here nor a valid repository name: ")


def test_paths_that_do_not_exist(cache: Path, tmp_path: Path) -> None:
    for path in ("./bert", "../bert", "a/b/c", str(tmp_path / "bert"), tmp_path / "bert", "~/no/such/folder"):
        for opens in (formax.from_pretrained, formax.AutoConfig.from_pretrained):
            with pytest.raises(HubError) as caught:
                opens(path)
            assert str(caught.value) == f"{path} does not exist"
    with pytest.raises(HubError, match="~nobody-at-all/bert does not exist"):
        formax.from_pretrained("~nobody-at-all/bert")
    with pytest.raises(HubError, match="the path or repository name is empty"):
        formax.from_pretrained("")


def test_a_file_in_the_place_of_a_folder(cache: Path, tmp_path: Path) -> None:
    file = tiny.checkpoint(tmp_path / "source") / "model.safetensors"
    with pytest.raises(HubError) as caught:
        formax.from_pretrained(file)
    assert str(caught.value) == f"{file} is a file, a checkpoint is a folder"
    Path("bert").write_bytes(b"")
    with pytest.raises(HubError, match=r"^bert is a file"):
        formax.from_pretrained("bert")


def test_a_folder_of_that_name_comes_first(cache: Path, tmp_path: Path) -> None:
    store(cache, tiny.checkpoint(tmp_path / "source", num_hidden_layers=1))
    assert formax.from_pretrained(REPO).config.num_hidden_layers == 1
    tiny.checkpoint(Path(REPO), num_hidden_layers=2)
    assert formax.from_pretrained(REPO).config.num_hidden_layers == 2


def test_a_folder_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.checkpoint(tmp_path / "source")
    for path in (tmp_path / "source", str(tmp_path / "source"), "~/source"):
        assert formax.from_pretrained(path).num_parameters() > 0
        assert formax.AutoConfig.from_pretrained(path).vocab_size == 64


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.config()))
    with pytest.raises(CheckpointError) as caught:
        formax.from_pretrained(tmp_path)
    assert f"{tmp_path}: no weights; expected one of model.safetensors" in one_line(caught.value)


# Downloads.


class Remote:
    """Stands in for `snapshot_download`: copies the files that the patterns choose, and keeps what it was asked."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.asked: list[dict[str, Any]] = []

    def __call__(self, repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.asked.append({"repo": repo, **options})
        for path in self.source.rglob("*"):
            name = path.relative_to(self.source)
            # as there, `*` stands for slashes too
            if path.is_file() and any(fnmatch.fnmatchcase(str(name), pattern) for pattern in allow_patterns):
                (self.target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.target / name)
        return str(self.target)

    @property
    def fetched(self) -> set[str]:
        return {str(path.relative_to(self.target)) for path in self.target.rglob("*") if path.is_file()}


@pytest.fixture
def remote(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A repository with every kind of file."""
    source = tiny.checkpoint(tmp_path / "source")
    names = "tokenizer.json vocab.txt spiece.model pytorch_model.bin tf_model.h5 flax_model.msgpack rust_model.ot"
    for name in (*names.split(), "onnx/model.onnx", "1_Pooling/config.json", "README.md", "logo.png"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"{}")
    made = Remote(source, tmp_path / "target")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
    return made


SMALL = {"config.json", "tokenizer.json", "vocab.txt", "spiece.model", "1_Pooling/config.json"}


def test_one_kind_of_weights_is_downloaded(remote: Remote) -> None:
    assert formax.from_pretrained(REPO).num_parameters() > 0
    assert remote.fetched == {*SMALL, "model.safetensors"}


def test_pickles_are_the_second_choice(remote: Remote) -> None:
    (remote.source / "model.safetensors").unlink()
    assert hub.checkpoint(REPO) == remote.target
    assert remote.fetched == {*SMALL, "pytorch_model.bin"}


def test_shards_of_either_kind(remote: Remote) -> None:
    (remote.source / "model.safetensors").unlink()
    (remote.source / "pytorch_model.bin").unlink()
    (remote.source / "pytorch_model.bin.index.json").write_bytes(b"{}")
    for i in (1, 2):
        (remote.source / f"pytorch_model-0000{i}-of-00002.bin").write_bytes(b"")
    hub.checkpoint(REPO)
    pickles = {"pytorch_model.bin.index.json", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))}
    assert remote.fetched == {*SMALL, *pickles}

    tiny.write(remote.source, tiny.config(), tiny.tensors(), shards=3)
    shutil.rmtree(remote.target)
    assert formax.from_pretrained(REPO).num_parameters() > 0
    assert remote.fetched - SMALL - pickles == {
        "model.safetensors.index.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }


def test_a_download_that_broke_off_is_completed(remote: Remote) -> None:
    (remote.source / "model.safetensors").unlink()
    tiny.write(remote.source, tiny.config(), tiny.tensors(), shards=3)
    formax.from_pretrained(REPO)
    (remote.target / "model-00002-of-00003.safetensors").unlink()
    assert formax.from_pretrained(REPO).num_parameters() > 0


def test_a_configuration_alone(remote: Remote) -> None:
    assert formax.AutoConfig.from_pretrained(REPO).vocab_size == 64
    assert remote.fetched == {"config.json"}


@pytest.mark.parametrize(
    "opens", [formax.from_pretrained, formax.AutoModel.from_pretrained, formax.AutoConfig.from_pretrained]
)
def test_what_the_hub_is_told(remote: Remote, tmp_path: Path, opens: Callable[..., Any]) -> None:
    given = {"revision": "v1", "cache_dir": tmp_path, "local_files_only": True, "token": "hf_secret"}
    opens(REPO, **given)
    assert remote.asked
    assert all(asked == {"repo": REPO, **given} for asked in remote.asked)
    remote.asked.clear()
    opens(REPO)
    plain = {"revision": None, "cache_dir": None, "local_files_only": False, "token": None}
    assert all(asked == {"repo": REPO, **plain} for asked in remote.asked)


RESPONSE: Any = SimpleNamespace(headers={}, request=None)
LONG = "404 Client Error. (Request ID: 1)\n\nNot Found for url: models/x.\nTry again."


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.RepositoryNotFoundError(LONG, response=RESPONSE),
            f"{REPO} is no folder here and no repository of the hub, or a private one that needs another token=",
        ),
        (
            errors.GatedRepoError(LONG, response=RESPONSE),
            f"{REPO} is a gated repository: ask for access on its page on the hub, then give your token=",
        ),
        (
            errors.RevisionNotFoundError(LONG, response=RESPONSE),
            f"{REPO} has no revision 'v1'; give a branch, a tag or a commit",
        ),
        (
            errors.LocalEntryNotFoundError(LONG),
            f"{REPO} (revision 'v1') is no folder here, is not in the hub cache, and the hub was not asked or not "
            "reached (offline)",
        ),
        (
            errors.HfHubHTTPError(LONG, response=RESPONSE),
            f"{REPO} (revision 'v1') is no folder here and could not be had from the hub: {' '.join(LONG.split())}",
        ),
        (
            PermissionError(13, "Permission denied", "/cache"),
            f"{REPO} (revision 'v1') is no folder here and could not be had from the hub: [Errno 13] Permission "
            "denied: '/cache'",
        ),
        (
            errors.LocalTokenNotFoundError("Token is required (`token=True`), but no token found."),
            f"{REPO} (revision 'v1') is no folder here and could not be had from the hub: Token is required "
            "(`token=True`), but no token found.",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses(cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError) as caught:
        formax.from_pretrained(REPO, revision="v1")
    assert one_line(caught.value) == message
