"""The command `formax`.

Whatever takes time to import is imported by the sub-command that needs it, so that `formax --help` is instant.
Exit status: 0 all went well, 1 something failed on the way, 2 wrong usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from formax.search import Hit, Skipped

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# Errors that say that what the user named is wrong, in one line that is worth reading.
_BAD_INPUT = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
# A progress bar hides the cursor.
_SHOW_CURSOR = b"\x1b[?25h"
_EXCERPT_LINES = 3
# From how many texts on a progress bar is worth its lines.
_LONG = 64
_ENVIRONMENT = ("jax", "jaxlib", "numpy", "ml_dtypes", "tokenizers", "huggingface_hub", "safetensors", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    Args:
        arguments: without the name of the program; those of the process when None.
    """
    # A terminal that cannot show a character gets its code instead of an error.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    with _clean_interrupts():
        try:
            return _run(arguments)
        except BrokenPipeError:
            # Whoever read our output, `head` for one, has enough. Python flushes once more as it ends: into nothing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK


@contextmanager
def _clean_interrupts() -> Iterator[None]:
    """Lets Ctrl-C end the process at once.

    A `KeyboardInterrupt` would not do: one that falls into the callback that jax has the garbage collector call is
    lost, and one that falls into the import of jax crashes the interpreter as it ends.
    """
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(*_: object) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), _SHOW_CURSOR)
    os._exit(INTERRUPTED)


def _run(arguments: Sequence[str] | None) -> int:
    """Runs the sub-command, and turns errors that are worth one line into that line."""
    parser = make_parser()
    try:
        options = parser.parse_args(arguments)
    finally:
        sys.stdout.flush()
    if options.run is None:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"formax {options.command}: error: {_one_line(str(error))}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, _BAD_INPUT) or _is_hub_error(error) else FAILED
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="formax", description="Every transformer family as pure JAX functions.")
    parser.add_argument("--version", action=_Version)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    search = commands.add_parser(
        "search",
        help="find the passages of text files that answer a query",
        description="Finds the passages of text files that answer a query, by meaning rather than by words. Folders"
        " are searched for text files; the passages are ranked by the cosine of their embeddings.",
    )
    search.add_argument("query", metavar="QUERY", help="what to look for, in words")
    search.add_argument("paths", metavar="PATH", nargs="+", help="a text file, or a folder with text files")
    search.add_argument("--model", metavar="PATH", help="folder or hub repository of a BERT-like checkpoint")
    search.add_argument("--top", metavar="N", type=int, default=5, help="how many passages to show (default: 5)")
    search.add_argument("--json", action="store_true", help="print a JSON list instead of text")
    search.add_argument(
        "--batch-size", metavar="N", type=int, default=32, help="passages embedded at once (default: 32)"
    )
    search.add_argument("--max-tokens", metavar="N", type=int, help="longest passage (default: what the model reads)")
    search.set_defaults(run=run_search)

    inspect = commands.add_parser(
        "inspect",
        help="print the parameter table of a checkpoint",
        description="Prints the parameters of a checkpoint: path, shape, dtype, axes and name in the checkpoint.",
    )
    inspect.add_argument("path", metavar="PATH", help="folder or hub repository of a checkpoint")
    inspect.set_defaults(run=run_inspect)

    environment = commands.add_parser("env", help="print versions and devices, for bug reports")
    environment.set_defaults(run=run_env)
    return parser


class _Version(argparse.Action):
    """Prints the version that is installed, which is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import formax

        print(f"formax {formax.__version__}")
        parser.exit()


# -------------------------------------------------------------------------------------------------------------- search


def run_search(options: argparse.Namespace) -> int:
    """`formax search`."""
    from formax import search

    # Before the model is loaded: bad input should not take seconds to be found.
    search.check_request(options.query, options.paths, options.top, options.batch_size, options.max_tokens)
    from formax.text.embedding import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(options.model or search.default_model())
    with _ProgressBar("embedding passages") as progress:
        hits, skipped = search.search(
            options.query,
            options.paths,
            encoder=encoder,
            top=options.top,
            batch_size=options.batch_size,
            max_tokens=options.max_tokens,
            progress=progress,
        )
    _report_skipped(skipped)
    if options.json:
        _print_json(hits)
    elif sys.stdout.isatty():
        _print_rich(hits)
    else:
        _print_plain(hits)
    return OK


class _ProgressBar:
    """A progress bar on a terminal's standard error, shown only when there is much to do, gone when done."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._update: Callable[[int, int], None] | None = None
        self._stop: Callable[[], None] = lambda: None

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, done: int, total: int) -> None:
        """Shows `done` of `total`."""
        if total < _LONG or not sys.stderr.isatty():
            return
        if self._update is None:
            self._start(done, total)
        assert self._update is not None
        self._update(done, total)

    def _start(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(self._what, completed=done, total=total)
        bar.start()
        self._update = lambda done, total: bar.update(task, completed=done, total=total)
        self._stop = bar.stop


def _report_skipped(skipped: Skipped) -> None:
    """Says on standard error what was left out."""
    for detail in skipped.details:
        print(f"formax search: skipped {_one_line(detail)}", file=sys.stderr)
    if skipped.reasons:
        print(f"formax search: left out {skipped}", file=sys.stderr)


def _print_json(hits: Sequence[Hit]) -> None:
    import json

    rows = [
        {
            "score": round(hit.score, 6),
            "path": hit.passage.path,
            "first_line": hit.passage.first_line,
            "last_line": hit.passage.last_line,
            "text": hit.passage.text,
        }
        for hit in hits
    ]
    print(json.dumps(rows, indent=2))


def _print_plain(hits: Sequence[Hit]) -> None:
    for hit in hits:
        print(f"{hit.score:.4f}  {_place(hit)}")
        print(textwrap.indent("\n".join(_excerpt(hit, 120)), "        "))


def _print_rich(hits: Sequence[Hit]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for hit in hits:
        line = Text(f"{hit.score:.4f}  ", "bold green")
        line.append(_place(hit), "bold cyan")
        console.print(line, soft_wrap=True)
        for text in _excerpt(hit, console.width - 8):
            console.print(Text(f"        {text}", "dim"), soft_wrap=True)


def _place(hit: Hit) -> str:
    passage = hit.passage
    return f"{_printable(passage.path)}:{passage.first_line}-{passage.last_line}"


def _excerpt(hit: Hit, width: int) -> list[str]:
    """The first lines of a passage, shortened."""
    lines = [line.strip() for line in hit.passage.text.split("\n") if line.strip()]
    shown = [textwrap.shorten(_printable(line), max(20, width), placeholder=" ...") for line in lines[:_EXCERPT_LINES]]
    return [*shown, "..."] if len(lines) > len(shown) else shown


def _printable(text: str) -> str:
    """Text without control characters: a file must not steer the terminal."""
    return "".join(
        char if char.isprintable() else " " if char.isspace() else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def _one_line(message: str) -> str:
    return _printable(" ".join(message.split()))


# --------------------------------------------------------------------------------------------------------- the others


def run_inspect(options: argparse.Namespace) -> int:
    """`formax inspect`."""
    from formax.inspection import inspect_table

    print(inspect_table(options.path))
    return OK


def run_env(options: argparse.Namespace) -> int:
    """`formax env`."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import formax

    rows = [
        ("formax", formax.__version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
    ]
    for name in _ENVIRONMENT:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    import jax

    devices = jax.devices()
    rows.append(("devices", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"))
    for name, value in rows:
        print(f"{name:<16} {value}")
    return OK


def _is_hub_error(error: Exception) -> bool:
    """Whether a checkpoint was named that cannot be had."""
    hub = sys.modules.get("formax.hub")
    return hub is not None and isinstance(error, hub.HubError)


if __name__ == "__main__":
    sys.exit(main())
