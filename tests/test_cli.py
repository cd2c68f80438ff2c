"""The command line: what it prints, where, and how it ends."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
import text_models

import formax
from formax import cli, hub, search
from formax.search import Hit, Passage
from formax.text.embedding import SentenceEncoder

DATA = Path(__file__).parent / "data" / "text"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights and the small WordPiece tokenizer."""
    return text_models.tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# The dog\n\nit judges my vow\n")
    (tmp_path / "notes" / "b.md").write_text("a lazy\x1b[31m fox\n\njumps\n")
    (tmp_path / "notes" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "notes" / "photo.jpg").write_bytes(b"\xff\xd8")
    return tmp_path / "notes"


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "formax.cli", *arguments]


# -------------------------------------------------------------------------------------------------------------- search


def test_search_prints_places_and_excerpts(model: Path, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "the dog", str(notes), "--model", str(model)]) == cli.OK
    out, err = capsys.readouterr()
    assert len(re.findall(r"^-?\d\.\d{4}  .*notes/[ab]\.md:1-3$", out, re.MULTILINE)) == 2
    assert "        # The dog\n        it judges my vow" in out
    # what is in a file does not steer the terminal
    assert "\x1b" not in out
    assert "a lazy\N{REPLACEMENT CHARACTER}[31m fox" in out
    assert "formax search: skipped" in err
    assert "latin.txt: is not UTF-8: byte 0xe9 at offset 3" in err
    assert "formax search: left out 1 of other types, 1 unreadable" in err


def test_search_prints_json(model: Path, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", "the dog", str(notes / "a.md"), str(notes / "b.md"), "--model", str(model)]
    assert cli.main([*arguments, "--json"]) == cli.OK
    out, err = capsys.readouterr()
    hits = json.loads(out)
    assert [set(hit) for hit in hits] == [{"score", "path", "first_line", "last_line", "text"}] * 2
    assert {hit["path"]: (hit["first_line"], hit["last_line"], hit["text"]) for hit in hits} == {
        str(notes / "a.md"): (1, 3, "# The dog\n\nit judges my vow"),
        str(notes / "b.md"): (1, 3, "a lazy\x1b[31m fox\n\njumps"),
    }
    assert hits[0]["score"] >= hits[1]["score"]
    assert err == ""
    assert cli.main([*arguments, "--json", "--top", "1", "--batch-size", "1", "--max-tokens", "4"]) == cli.OK
    (hit,) = json.loads(capsys.readouterr().out)
    assert hit["last_line"] - hit["first_line"] < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "a.md"], "the query is empty; say what to look for"),
        (["x", "nowhere"], "nowhere: there is no such file or folder"),
        (["x", "a.md", "--top", "0"], "--top is 0; it is at least 1"),
        (["x", "latin.txt", "--model", "MODEL"], "latin.txt: is not UTF-8: byte 0xe9 at offset 3"),
        (["x", "photo.jpg", "--model", "MODEL"], "photo.jpg: is not UTF-8: byte 0xff at offset 0"),
        (["x", "a.md", "--model", "MODEL", "--max-tokens", "63"], "--max-tokens is 63, and the model reads 62"),
        (["x", "empty", "--model", "MODEL"], "there is no text in empty"),
        (["x", "a.md", "--model", "./nowhere"], "./nowhere does not exist"),
        (["x", "a.md", "--model", "empty"], "holds no config.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    model: Path,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (notes / "empty").mkdir()
    monkeypatch.chdir(notes)
    assert cli.main(["search", *(str(model) if item == "MODEL" else item for item in arguments)]) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("formax search: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(search.SearchError, match="the query is empty"):
        cli.main(["--debug", "search", "", "."])


def test_a_failure_on_the_way_is_status_1(
    notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search, "default_model", fail)
    assert cli.main(["search", "x", str(notes)]) == cli.FAILED
    assert "formax search: error: [Errno 28] No space left on device" in capsys.readouterr().err

    def unreachable() -> Path:
        raise hub.HubError("not to be had")

    monkeypatch.setattr(search, "default_model", unreachable)
    assert cli.main(["search", "x", str(notes)]) == cli.BAD_INPUT


def test_a_mistake_of_ours_is_not_hidden(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake() -> Path:
        raise KeyError("ours")

    monkeypatch.setattr(search, "default_model", mistake)
    with pytest.raises(KeyError, match="ours"):
        cli.main(["search", "x", str(notes)])


@pytest.mark.parametrize(
    "interrupt",
    [
        "os.kill(os.getpid(), signal.SIGINT)",
        # in a callback whose exceptions are lost, such as the one that jax has
        "gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT)); gc.collect()",
    ],
)
def test_an_interrupt_ends_at_once_and_in_silence(notes: Path, interrupt: str) -> None:
    code = (
        "import gc, os, signal, sys\n"
        "from formax import cli, search\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"def default_model():\n    {interrupt}\n    raise SystemExit('still here')\n"
        "search.default_model = default_model\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "search", "x", str(notes)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (cli.INTERRUPTED, "", "")


def test_interrupts_are_the_caller_s_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["search", "", "."]) == cli.BAD_INPUT
    assert signal.getsignal(signal.SIGINT) == before
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(cli.main(["search", "", "."])))
    thread.start()
    thread.join()
    assert statuses == [cli.BAD_INPUT]


def on_terminal(code: str) -> str:
    """What a program prints whose standard output and error are a terminal."""
    parent, child = pty.openpty()
    # Wide enough that no line is broken, and of a kind that has colours.
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=child, stderr=child, env=environment
    ) as process:
        os.close(child)
        shown = b""
        while select.select([parent], [], [], 30)[0]:
            try:
                block = os.read(parent, 65536)
            except OSError:  # the program closed the terminal
                break
            if not block:
                break
            shown += block
        assert process.wait(30) == 0
    os.close(parent)
    return shown.decode()


def test_a_terminal_gets_colours_and_a_progress_bar_that_goes_away() -> None:
    shown = on_terminal(
        "from formax import cli, search\n"
        "with cli._ProgressBar('embedding passages') as progress:\n"
        "    progress(1, 63)\n"
        "    print('short')\n"
        "    progress(32, 100)\n"
        "    progress(100, 100)\n"
        "cli._print_rich([search.Hit(0.5, search.Passage('a [b].md', 1, 2, 'one [red]two[/red]\\x1b[2J'))])\n"
    )
    before, _, after = shown.partition("short")
    assert "embedding" not in before
    assert "embedding passages" in after
    assert " 32/100" in after
    assert "100/100" in after
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", after)
    assert "0.5000  a [b].md:1-2" in plain
    assert "one [red]two[/red]\N{REPLACEMENT CHARACTER}[2J" in plain
    assert "\x1b[2J" not in shown
    assert "\x1b[1;36m" in after
    assert "\x1b[2K" in after  # the bar's line is erased


def test_excerpts_are_short() -> None:
    passage = Passage("a", 1, 9, "\n".join(["first " * 50, "", "second\tline", "third", "fourth"]))
    excerpt = cli._excerpt(Hit(1.0, passage), 40)
    assert excerpt[0].endswith(" ...")
    assert len(excerpt[0]) <= 40
    assert excerpt[1:] == ["second line", "third", "..."]


# --------------------------------------------------------------------------------------------------------- the others


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from formax import cli; cli.make_parser().format_help();"
        "print([name for name in ('jax', 'numpy', 'tokenizers', 'huggingface_hub', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"formax {formax.__version__}\n"
    assert cli.main([]) == cli.BAD_INPUT
    assert "usage: formax" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["search", "only a query"])
    assert stop.value.code == cli.BAD_INPUT


def test_env_names_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == cli.OK
    out = capsys.readouterr().out
    assert re.search(rf"^formax +{re.escape(formax.__version__)}$", out, re.MULTILINE)
    assert re.search(rf"^jax +{re.escape(jax.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^devices +\d+ x .*\(cpu\)$", out, re.MULTILINE)


def test_inspect_prints_the_parameter_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(model)]) == cli.OK
    out = capsys.readouterr().out
    assert "embeddings.word_embeddings.weight" in out
    assert "221 x 24" in out
    assert cli.main(["inspect", str(model / "nowhere")]) == cli.BAD_INPUT
    assert re.fullmatch(r"formax inspect: error: .*nowhere does not exist\n", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "MODEL"]])
def test_a_closed_pipe_ends_in_silence(model: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        program(*(str(model) if item == "MODEL" else item for item in arguments)),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_characters_that_the_terminal_lacks_are_escaped(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("東京 dog", encoding="utf-8")
    done = subprocess.run(
        program("search", "dog", str(tmp_path / "a.txt"), "--model", str(model)),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert "\\u6771\\u4eac dog" in done.stdout


def test_the_encoder_is_the_one_that_users_get() -> None:
    assert formax.SentenceEncoder is SentenceEncoder
