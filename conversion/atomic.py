"""Replaces files of a directory all together or not at all.

New files are written into a hidden folder, on the same file system, and reach the disk before the first of them is
moved. Until then whatever happens leaves the directory as it was. A directory that does not exist yet appears whole, by
one rename; in one that exists the files are renamed one by one, in an order that the caller chooses.

The hidden folder's name tells machine and process, so that the next save removes what a killed one left behind.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

from formax.conversion.mapped import CheckpointError

Change = tuple[Literal["place", "remove"], str]
Write = Callable[[bytes | memoryview], object]

_HOST = f"{zlib.crc32(os.uname().nodename.encode()):08x}"
_LEFTOVER = re.compile(r"(.*)\.saving-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
# Folders that this process is writing now: its own process id does not make them leftovers, nor save them.
_ACTIVE: set[str] = set()


class Staging:
    """The hidden folder, as a context manager: it goes away when the block ends, unless its files were moved.

    Attributes:
        directory: Where the files shall end up.
        folder: The hidden folder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._inside = directory.is_dir()
        tag = f".saving-{_HOST}-{os.getpid()}-{os.urandom(4).hex()}"
        self.folder = directory / tag if self._inside else directory.parent / f".{directory.name}{tag}"
        self._new_parents = [path for path in directory.parents if not path.exists()]
        self._committing = False

    def __enter__(self) -> Staging:
        with self._explained(self.directory):
            for path in (self.directory, *self.directory.parents):
                if path.exists() and not path.is_dir():
                    raise CheckpointError(f"{path}: is a file; a checkpoint is saved into a directory")
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            for leftover in _leftovers(self.directory):
                shutil.rmtree(leftover, ignore_errors=True)
            _ACTIVE.add(self.folder.name)
            self.folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # When the moves themselves fail, half of the new files may exist nowhere else.
        if kind is None or not self._committing:
            shutil.rmtree(self.folder, ignore_errors=True)
        if kind is not None:
            for path in self._new_parents:
                with suppress(OSError):  # Somebody else may use it by now.
                    path.rmdir()
        _ACTIVE.discard(self.folder.name)

    @contextmanager
    def open(self, name: str) -> Iterator[Write]:
        """Creates the file `name`, a path relative to the directory, and yields the function that writes to it.

        Raises:
            CheckpointError: if it cannot be written, as on a full disk.
        """
        path, shown = self.folder / name, self.directory / name
        with self._explained(shown):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("xb")

        def write(data: bytes | memoryview) -> None:
            with self._explained(shown):
                file.write(data)

        try:
            yield write
            with self._explained(shown):
                file.flush()
                os.fsync(file.fileno())
        finally:
            with self._explained(shown):
                file.close()

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Yields where to create the file `name`, for writers that move about in it; otherwise as `open`."""
        path, shown = self.folder / name, self.directory / name
        with self._explained(shown):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def commit(self, changes: Sequence[Change]) -> None:
        """Moves the files to where they belong.

        Args:
            changes: What to do, in this order: ("place", name) moves a written file to the directory, over one of the
                same name; ("remove", name) deletes a file there. A new directory appears whole, whatever the order.

        Raises:
            CheckpointError: if a file cannot be moved.
        """
        for folder, _, _ in os.walk(self.folder):
            _sync(Path(folder))
        if not self._inside:
            with self._explained(self.directory):
                self.folder.rename(self.directory)
            _sync(self.directory.parent)
            return
        self._committing = True
        try:
            before = None
            for action, name in changes:
                if before not in (None, action):
                    _sync(self.directory)
                before = action
                target = self.directory / name
                if action == "remove":
                    target.unlink(missing_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / name).replace(target)
            _sync(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory / name}: cannot be replaced: {error.strerror}; "
                f"the new files that were not moved yet are in {self.folder}"
            ) from error

    @contextmanager
    def _explained(self, shown: Path) -> Iterator[None]:
        """Turns a failure of the file system into one that names the user's file."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{shown}: cannot be written: {error.strerror}; nothing in {self.directory} was changed"
            ) from error


def leftovers_of(directory: Path) -> list[Path]:
    """Hidden folders in a directory or beside it that saves into it have left or are writing, by whatever process."""
    inside = list(directory.iterdir()) if directory.is_dir() else []
    beside = list(directory.parent.iterdir())
    found = [path for path in inside if (match := _LEFTOVER.fullmatch(path.name)) and match[1] == ""]
    found += [path for path in beside if (match := _LEFTOVER.fullmatch(path.name)) and match[1] == f".{directory.name}"]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _leftovers(directory: Path) -> list[Path]:
    """Those of them whose writer is dead, as far as this machine can tell."""
    dead = []
    for path in leftovers_of(directory):
        match = _LEFTOVER.fullmatch(path.name)
        assert match is not None
        process = int(match[3])
        alive = path.name in _ACTIVE if process == os.getpid() else _is_alive(process)
        if match[2] == _HOST and not alive:
            dead.append(path)
    return dead


def _is_alive(process: int) -> bool:
    """Whether a process of this id runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Makes the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
